"""How well a model does on held-out prompts."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structadapt.grpo import processes
from structadapt.grpo.config import Config
from structadapt.grpo.rewards import Prompt, Reward, Scores, record, score, with_meta
from structadapt.grpo.rollout import evaluating
from structadapt.grpo.sampling import sample
from structadapt.grpo.update import Context, slices

Z = 1.959964  # the 97.5 % quantile of the normal distribution
EVALUATION = 2**40  # in place of a step in the key of the noise


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation(Interval):
    """Mean reward on some prompts, with its 95 % confidence interval."""

    count: int  # completions
    pass_at: dict[int, Interval] = field(default_factory=dict)  # k: share of prompts solved in k
    faults: int = 0  # rewards that failed, and counted as 0


def evaluate(
    model: nn.Module,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: Config,
    *,
    greedy: bool = False,
    samples: int = 1,
    k: Sequence[int] = (),
    tokenizer: Any = None,
    rollout_context: Context = nullcontext,
    seed: int = 0,
    batch_size: int = 512,
    spread: bool = False,
) -> Evaluation:
    """Completions of each prompt, sampled at the config's temperature or greedy, in eval mode.

    samples: completions of each prompt. k: the k of `pass_at_k` to report, at most `samples`; a
    completion is right if its reward is 1 or more. The same seed gives the same samples, whatever
    the batch size and the number of processes (up to rounding).
    batch_size: completions that one process samples at once.
    spread: the processes of torch.distributed, which all call this, share the prompts, and each
    returns the whole. Without it a process that calls this evaluates all of them (of a sharded
    model every process has to).

    The interval is Wilson's (1927) if every reward is 0 or 1 and a prompt has one, else the normal
    one over the prompts' means. ValueError for no prompts, prompts of the wrong form, samples < 1,
    k outside [1, samples], several greedy samples; RuntimeError for too many rewards that fail.
    """
    if not len(prompts):
        raise ValueError("no prompts to evaluate on")
    if samples < 1 or not all(1 <= n <= samples for n in k) or (greedy and samples > 1):
        raise ValueError(
            f"samples must be at least 1, 1 if greedy, and every k at most samples; got {samples}, "
            f"greedy={greedy}, k={tuple(k)}"
        )
    records = [record(prompt, tokenizer) for prompt in prompts]
    rank, size = processes.rank_and_size() if spread else (0, 1)
    rewards, faults, checked = dict[int, Tensor](), 0, with_meta(reward)
    temperature = 0.0 if greedy else config.temperature

    def look(places: Sequence[int]) -> Scores:
        drawn = places or [0]  # the forward of a sharded model needs every process
        batch = [records[p] for p in drawn]
        keys = [(seed, EVALUATION, p, i) for p in drawn for i in range(samples)]
        rollout = sample(model, batch, config, keys, temperature)
        if not places:
            return Scores(torch.empty(0, samples), ())
        return score(rollout, batch, checked, config.eos_token_ids, tokenizer,
                     config.max_reward_faults)  # fmt: skip

    with evaluating(model), rollout_context():
        for rows in slices(len(records), size * max(batch_size // samples, 1)):
            own = range(len(records))[rows][rank::size]
            scores = processes.whole(partial(look, own)) if spread else look(own)
            rewards |= zip(own, scores.rewards, strict=True)
            faults += len(scores.faults)
    if spread:
        everyone = processes.gather((rewards, faults))
        rewards = {p: values for own, _ in everyone for p, values in own.items()}
        faults = sum(count for _, count in everyone)
    values = torch.stack([rewards[p] for p in range(len(records))])
    right = (values >= 1).sum(1)
    pass_at = {n: over_prompts(pass_at_k(right, samples, n)) for n in k}
    whole = over_prompts(values.mean(1))  # the samples of one prompt are not independent
    return Evaluation(whole.mean, whole.low, whole.high, values.numel(), pass_at, faults)


def pass_at_k(right: Tensor, samples: int, k: int) -> Tensor:
    """1 - C(n - c, k) / C(n, k), the unbiased estimate from n = `samples` completions of each
    prompt, c = `right` of which are right, that one of k is (Chen et al. 2021, eq. 1).

    right (P,) int -> (P,) float64. ValueError for k outside [1, samples], or counts outside
    [0, samples].

    >>> import torch
    >>> pass_at_k(torch.tensor([0, 1, 4]), samples=4, k=2)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in [1, {samples}], got {k}")
    if ((right < 0) | (right > samples)).any():
        raise ValueError(f"right must be in [0, {samples}], got {right.tolist()}")
    wrong = [math.comb(samples - int(c), k) / math.comb(samples, k) for c in right]
    return 1 - torch.tensor(wrong, dtype=torch.float64)


def over_prompts(values: Tensor) -> Interval:
    """The mean of one value for each prompt (P,)."""
    mean = values.mean().item()
    if ((values == 0) | (values == 1)).all():
        return Interval(mean, *wilson(mean, len(values)))
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = Z * (values.var() / len(values)).sqrt().item()
    return Interval(mean, mean - half, mean + half)


def wilson(share: float, count: int, z: float = Z) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion seen `count` times (Wilson 1927)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)
