"""The GRPO loop: sample, reward, update; one record a step.

Everything here works on any nn.Module and any optimizer. What the module's weights are made of,
and which of them train, is the caller's business.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from structadapt.grpo import objective
from structadapt.grpo.rewards import Prompt, Record, Reward, record, score, with_meta
from structadapt.grpo.rollout import HEADS, Head, Rollout, evaluating, generate, logprobs

RolloutContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Config:
    """How GRPO samples and updates. ValueError for a value out of range."""

    eos_token_id: int | Sequence[int]  # ends a completion, and counts as part of it
    pad_token_id: int = 0  # may equal an end-of-sequence token
    group_size: int = 8  # completions of each prompt
    prompts_per_step: int = 64  # prompts of one rollout
    max_new_tokens: int = 256
    temperature: float = 1.0
    minibatches: int = 1  # optimizer steps on one rollout
    micro_batch_size: int | None = None  # sequences of one backward pass; None: a whole minibatch
    loss: objective.Loss = "dapo"
    advantage: objective.Scaling = "group"
    clip_low: float = 0.2
    clip_high: float = 0.2
    share_prompts: bool = False  # run a prompt once for its group; needs a differentiable cache
    head: Head = "auto"  # update without logits if the head is plain and unwrapped; or "logits"
    max_grad_norm: float = 1.0  # math.inf: no clipping
    max_reward_faults: float = 0.05  # share of a rollout whose reward may fail, counted as 0
    seed: int = 0  # of the sampling noise

    def __post_init__(self) -> None:
        for name in ("group_size", "prompts_per_step", "max_new_tokens", "minibatches"):
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 1, name, "an integer, at least 1", value)
        micro = self.micro_batch_size
        good = micro is None or (isinstance(micro, int) and micro >= 1)
        _check(good, "micro_batch_size", "None or an integer, at least 1", micro)
        good = all(isinstance(token, int) for token in (*self.eos_token_ids, self.pad_token_id))
        _check(good, "eos_token_id and pad_token_id", "integers", self.eos_token_id)
        _check(self.temperature > 0, "temperature", "positive", self.temperature)
        _check(self.loss in objective.LOSSES, "loss", f"one of {objective.LOSSES}", self.loss)
        scalings = f"one of {objective.SCALINGS}"
        _check(self.advantage in objective.SCALINGS, "advantage", scalings, self.advantage)
        _check(self.head in HEADS, "head", f"one of {HEADS}", self.head)
        _check(0 <= self.clip_low < 1, "clip_low", "in [0, 1)", self.clip_low)
        _check(self.clip_high >= 0, "clip_high", "not negative", self.clip_high)
        _check(self.max_grad_norm > 0, "max_grad_norm", "positive", self.max_grad_norm)
        faults = self.max_reward_faults
        _check(0 <= faults <= 1, "max_reward_faults", "in [0, 1]", faults)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        eos = self.eos_token_id
        return tuple(eos) if isinstance(eos, Sequence) else (eos,)


@dataclass(frozen=True)
class Step:
    """What happened in one step. Means are over completions or tokens of the rollout."""

    step: int  # from 0
    prompts: int  # seen so far
    reward: float  # mean
    reward_std: float  # over all completions
    reward_faults: int  # completions whose reward failed, and is 0
    zero_std_fraction: float  # groups whose rewards are all equal: no advantage, no gradient
    length: float  # tokens a completion, with end-of-sequence
    truncated: float  # share of completions without end-of-sequence
    entropy: float  # of the sampling distribution, nats a token
    kl: float  # KL(policy before this step's update || after), nats a token, first minibatch
    clip_fraction: float  # of the tokens, those that the clip keeps from a gradient
    grad_norm: float  # before clipping, mean over the step's updates; 0.0 if there was none
    mismatch: float  # largest |trainer - sampler| log-probability of a token before any update
    updates: int  # optimizer steps taken; one whose advantages are all 0 is left out
    tokens_per_second: float  # generated tokens over rollout and update time
    rollout_seconds: float
    update_seconds: float


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: Config,
    *,
    tokenizer: Any = None,
    rollout_context: RolloutContext = nullcontext,
    scheduler: Any = None,
) -> Iterator[Step]:
    """Go once through `prompts` with GRPO, yielding a `Step` after each update.

    Stop iterating at any step; the model is then in a whole state. Rollouts run in eval mode
    within `rollout_context()`: pass `lambda: structadapt.merged(model)` to sample from merged
    weights, which costs a base forward instead of an adapted one (for fp32 weights: in bf16 a
    merge rounds most of a small update away). The update runs in the mode the model is in, on
    the parameters that the optimizer holds.

    A minibatch whose advantages are all exactly 0 has a gradient of exactly 0 and is left out:
    optimizer and scheduler do not step, so neither momentum nor weight decay moves the weights.

    prompts: token ids, text, or records (see `Prompt`). reward: see `grpo.rewards`.
    tokenizer: anything with encode(text) -> ids and decode(ids) -> text; with one, prompts may be
        text and the reward gets text. Apply a chat template before.
    scheduler: anything with step(), called after each step of the optimizer.

    Raises ValueError for no prompts, or prompts of the wrong form (before the first step); while
    running, RuntimeError if more rewards than config.max_reward_faults raise or are not finite, and
    FloatingPointError for a gradient that is not, before the optimizer would apply it.
    """
    if not len(prompts):
        raise ValueError("no prompts to train on")
    records = [record(prompt, tokenizer) for prompt in prompts]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in parameters):
        raise ValueError("no parameter of the optimizer requires a gradient")
    return _steps(
        model, optimizer, parameters, records, with_meta(reward), config, tokenizer,
        rollout_context, scheduler,
    )  # fmt: skip


def steps_in(prompts: int, config: Config) -> int:
    """How many steps one pass over that many prompts takes."""
    return math.ceil(prompts / config.prompts_per_step)


def _steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    records: list[Record],
    reward: Callable[..., float],
    config: Config,
    tokenizer: Any,
    rollout_context: RolloutContext,
    scheduler: Any,
) -> Iterator[Step]:
    noise = torch.Generator(next(model.parameters()).device).manual_seed(config.seed)
    for step, start in enumerate(range(0, len(records), config.prompts_per_step)):
        batch = records[start : start + config.prompts_per_step]
        started = time.perf_counter()
        with evaluating(model), rollout_context():
            rollout = sample(model, batch, config, noise, config.group_size, config.temperature)
        scores = score(
            rollout, batch, reward, config.eos_token_ids, tokenizer, config.max_reward_faults
        )
        rewards = scores.rewards
        sampled = time.perf_counter()
        try:
            update = _update(model, optimizer, parameters, rollout, rewards, config, scheduler)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {step}: {error}; stopped before this optimizer step"
            ) from None
        done = time.perf_counter()
        tokens = rollout.mask.sum().item()
        yield Step(
            step=step,
            prompts=start + len(batch),
            reward=rewards.mean().item(),
            reward_std=rewards.std().item() if rewards.numel() > 1 else 0.0,
            reward_faults=len(scores.faults),
            zero_std_fraction=objective.equal_groups(rewards).float().mean().item(),
            length=tokens / len(rollout),
            truncated=rollout.truncated.float().mean().item(),
            entropy=rollout.entropy.sum().item() / max(tokens, 1),
            tokens_per_second=tokens / (done - started),
            rollout_seconds=sampled - started,
            update_seconds=done - sampled,
            **update,
        )


def sample(
    model: nn.Module,
    batch: list[Record],
    config: Config,
    noise: torch.Generator,
    group_size: int,
    temperature: float,
) -> Rollout:
    """group_size completions of each prompt, group by group."""
    return generate(
        model,
        [record.ids for record in batch for _ in range(group_size)],
        eos_token_ids=config.eos_token_ids,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        pad_token_id=config.pad_token_id,
        generator=noise,
        share_prompts=config.share_prompts,
    )


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    rollout: Rollout,
    rewards: Tensor,
    config: Config,
    scheduler: Any,
) -> dict[str, Any]:
    """Every minibatch's optimizer step; the fields of `Step` that it knows."""
    A = objective.advantages(rewards, config.advantage).flatten().to(rollout.logp)
    edges = [len(rollout) * i // config.minibatches for i in range(config.minibatches + 1)]
    minibatches = [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]]
    norms: list[float] = []
    clipped, mismatch = 0.0, 0.0
    for rows in minibatches:
        if A[rows].any():
            stats = _accumulate(model, optimizer, rollout[rows], A[rows], config)
            clipped += stats["clipped"]
            mismatch = mismatch if norms else stats["mismatch"]
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            if not math.isfinite(norm):
                model.zero_grad()
                raise FloatingPointError(f"the gradient norm is {norm}")
            optimizer.step()
            model.zero_grad()
            norms.append(norm)
            if scheduler is not None:
                scheduler.step()
    tokens = max(rollout.mask.sum().item(), 1)
    return {
        "kl": _kl_after(model, rollout[minibatches[0]], config) if norms else 0.0,
        "clip_fraction": clipped / tokens,
        "grad_norm": sum(norms) / max(len(norms), 1),
        "mismatch": mismatch,
        "updates": len(norms),
    }


def _accumulate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    A: Tensor,
    config: Config,
) -> dict[str, float]:
    """Backward through one minibatch, micro-batch by micro-batch: their gradients add up to the
    minibatch's, because each is divided by the minibatch's normalizer."""
    divisor = objective.normalizer(rollout.mask, config.loss, config.max_new_tokens)
    low, high = config.clip_low, config.clip_high
    optimizer.zero_grad()
    clipped, mismatch = 0.0, 0.0
    for rows in slices(len(rollout), config.micro_batch_size):
        part = rollout[rows]
        logp, _ = _logprobs(model, part, config)
        policy = (logp, part.logp, A[rows], part.mask)
        objective.loss(*policy, config.loss, low, high, divisor).backward()
        with torch.no_grad():
            clipped += objective.clipped(*policy, low, high).sum().item()
            gap = torch.where(part.mask.bool(), (logp - part.logp).abs(), 0.0)
            mismatch = max(mismatch, gap.max().item())
    return {"clipped": clipped, "mismatch": mismatch}


@torch.no_grad()
def _kl_after(model: nn.Module, rollout: Rollout, config: Config) -> float:
    """KL(sampling policy || policy now), nats a token of the rollout."""
    total = 0.0
    for rows in slices(len(rollout), config.micro_batch_size):
        part = rollout[rows]
        with evaluating(model):
            logp, _ = _logprobs(model, part, config)
        kl = objective.kl_from_old(logp, part.logp)
        total += torch.where(part.mask.bool(), kl, 0.0).sum().item()
    return total / max(rollout.mask.sum().item(), 1)


def _logprobs(model: nn.Module, part: Rollout, config: Config) -> tuple[Tensor, Tensor]:
    return logprobs(model, part, config.temperature, config.share_prompts, config.head)


def slices(count: int, size: int | None) -> Iterator[slice]:
    size = size or count
    return (slice(start, start + size) for start in range(0, count, size))


def _check(good: bool, name: str, expected: str, found: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {expected}, got {found!r}")
