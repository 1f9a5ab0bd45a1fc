"""How well a model does on held-out prompts."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from structadapt.grpo.loop import Config, RolloutContext, sample, slices
from structadapt.grpo.rewards import Prompt, Reward, record, score, with_meta
from structadapt.grpo.rollout import evaluating

Z = 1.959964  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Evaluation:
    """Mean reward on some prompts, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    count: int  # completions


def evaluate(
    model: nn.Module,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: Config,
    *,
    greedy: bool = False,
    tokenizer: Any = None,
    rollout_context: RolloutContext = nullcontext,
    seed: int = 0,
    batch_size: int = 512,
) -> Evaluation:
    """One completion of each prompt, sampled at the config's temperature or greedy, in eval mode.

    The interval is Wilson's (1927) if every reward is 0 or 1, else the normal one. ValueError for
    no prompts, or prompts of the wrong form. A reward that fails counts as 0; RuntimeError if in
    any batch more do than config.max_reward_faults.
    """
    if not len(prompts):
        raise ValueError("no prompts to evaluate on")
    records = [record(prompt, tokenizer) for prompt in prompts]
    noise = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    rewards, checked = [], with_meta(reward)
    temperature = 0.0 if greedy else config.temperature
    with evaluating(model), rollout_context():
        for rows in slices(len(records), batch_size):
            batch = records[rows]
            rollout = sample(model, batch, config, noise, 1, temperature)
            allowed = config.max_reward_faults
            scores = score(rollout, batch, checked, config.eos_token_ids, tokenizer, allowed)
            rewards.append(scores.rewards)
    values = torch.cat(rewards)
    mean, count = values.mean().item(), len(values)
    if ((values == 0) | (values == 1)).all():
        return Evaluation(mean, *wilson(mean, count), count)
    half = Z * (values.var(correction=0) / count).sqrt().item()
    return Evaluation(mean, mean - half, mean + half, count)


def wilson(share: float, count: int, z: float = Z) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion seen `count` times (Wilson 1927)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)
