"""The next completions and their rewards, on one process or on many."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from structadapt.grpo import objective, processes
from structadapt.grpo.config import Config
from structadapt.grpo.network import first_nonfinite
from structadapt.grpo.noise import uniforms
from structadapt.grpo.rewards import Record, score
from structadapt.grpo.rollout import (
    NonfiniteLogitsError,
    Rollout,
    evaluating,
    generate,
    joined,
)
from structadapt.grpo.update import Context

logger = logging.getLogger("structadapt")


@dataclass(frozen=True)
class Group:
    """The rewards of one prompt's completions."""

    rewards: Tensor  # (G,) float64
    process: int  # that has the completions

    @property
    def equal(self) -> bool:
        return bool(objective.equal_groups(self.rewards[None]).item())


@dataclass
class Batch:
    """The completions of a step: this process's, and the rewards of all."""

    rollout: Rollout  # this process's, group by group
    own: Tensor  # (p,) places of this process's prompts in `rewards`
    rewards: Tensor  # (P, G) float64
    shaped: Tensor  # (P, G) with the penalty for length
    resampled: int
    faults: int
    drawn: float  # tokens sampled on all processes, also of groups that were replaced

    def means(self) -> dict[str, float]:
        """The fields of `Step` that the rollout knows."""
        r, count = self.rollout, self.rewards.numel()
        cut = (r.truncated & r.mask.any(1)).sum().item()
        sums = [r.mask.sum().item(), cut, r.entropy.sum().item()]
        tokens, truncated, entropy = processes.total(sums)
        return {
            "length": tokens / count,
            "truncated": truncated / count,
            "entropy": entropy / max(tokens, 1),
        }


@dataclass
class Sampler:
    """Samples and rewards the next prompts."""

    model: nn.Module
    records: list[Record]
    reward: Callable[..., float]
    config: Config
    tokenizer: Any
    context: Context

    def __post_init__(self) -> None:
        self.collective = processes.sharded(self.model.parameters())

    def collect(self, step: int, start: int) -> tuple[Batch, int]:
        """The groups of a step and where the next one starts.

        With resampling, groups with equal rewards are replaced by those of the following prompts
        (DAPO, Yu et al. 2025, section 3.2), as often as the config says. Where too few were found,
        the first of the equal ones stay, so that a step has its number of groups.
        """
        config, rank, size = self.config, *processes.rank_and_size()
        groups: dict[int, Group] = {}
        own: list[tuple[range, Rollout]] = []
        faults, drawn = 0, 0.0
        for _ in range(config.max_resamples + 1):
            useful = sum(not group.equal for group in groups.values())
            end = min(start + config.prompts_per_step - useful, len(self.records))
            if start == end:
                break
            mine, count = range(start, end)[rank::size], end - start
            start = end
            rollout, rewards, failed = processes.whole(
                lambda m=mine, n=count: self._draw(m, step, n)
            )
            own.append((mine, rollout))
            tokens = rollout.mask.sum().item()
            everyone = processes.gather((rewards, failed, tokens))
            for process, (found, _, t) in enumerate(everyone):
                drawn += t
                groups |= {p: Group(values, process) for p, values in found.items()}
            lost = [fault for _, told, _ in everyone for fault in told]
            faults += len(lost)
            if len(lost) > config.max_reward_faults * count * config.group_size:
                raise RuntimeError(
                    f"step {step}: {len(lost)} of {count * config.group_size} rewards failed, more "
                    f"than max_reward_faults = {config.max_reward_faults:.3g} of them; {lost[0]}"
                )
        order = self._chosen(groups)
        places = [i for i, p in enumerate(order) if groups[p].process == rank]
        rollout = self._of({order[i] for i in places}, own)
        rewards = torch.stack([groups[p].rewards for p in order])
        return Batch(
            rollout, torch.tensor(places, dtype=torch.long), rewards,
            self._shaped(rewards, rollout, places), len(groups) - len(order), faults, drawn,
        ), start  # fmt: skip

    def _chosen(self, groups: dict[int, Group]) -> list[int]:
        """The prompts to learn from, in order."""
        if not self.config.max_resamples:
            return sorted(groups)
        useful = [p for p, group in groups.items() if not group.equal]
        missing = max(self.config.prompts_per_step - len(useful), 0)
        return sorted(useful + sorted(set(groups) - set(useful))[:missing])

    def _of(self, wanted: set[int], own: list[tuple[range, Rollout]]) -> Rollout:
        """The completions of some of this process's prompts, or one that does not count."""
        G, parts = self.config.group_size, []
        for prompts, rollout in own:
            if wanted.issuperset(prompts):
                parts += [rollout] if len(prompts) else []
            else:
                parts += [
                    rollout[i * G : (i + 1) * G] for i, p in enumerate(prompts) if p in wanted
                ]
        return joined(parts) if parts else _blank(own[0][1])

    def _draw(
        self, prompts: Sequence[int], step: int, total: int
    ) -> tuple[Rollout, dict[int, Tensor], tuple[str, ...]]:
        """(completions, {prompt: rewards of its group}, rewards that failed) of this process's part
        of `total` prompts."""
        config = self.config
        chosen = [self.records[p] for p in prompts or [0]]
        keys = [(config.seed, step, p, i) for p in prompts or [0] for i in range(config.group_size)]
        with evaluating(self.model), self.context():
            try:
                rollout = sample(self.model, chosen, config, keys, config.temperature)
            except NonfiniteLogitsError as error:
                i = error.row // config.group_size
                layer = "" if self.collective else first_nonfinite(self.model, chosen[i].ids)
                raise FloatingPointError(
                    f"step {step}: the logits are not finite for prompt {[*prompts, 0][i]}"
                    + (f", first in the output of {layer}" if layer else "")
                ) from None
        if not prompts:
            return _blank(rollout), {}, ()
        share = config.max_reward_faults * total / len(prompts)  # of this process's
        scores = score(rollout, chosen, self.reward, config.eos_token_ids, self.tokenizer, share)
        for fault in scores.faults:
            logger.warning("step %d: %s", step, fault)
        return rollout, dict(zip(prompts, scores.rewards, strict=True)), scores.faults

    def _shaped(self, rewards: Tensor, rollout: Rollout, places: list[int]) -> Tensor:
        """The rewards less what too long completions lose."""
        config = self.config
        if not config.overlong_buffer:
            return rewards
        lengths = rollout.mask.sum(1).cpu()
        penalty = objective.overlong_penalty(lengths, config.max_new_tokens, config.overlong_buffer)
        shaped = rewards.clone()
        groups = penalty.view(-1, config.group_size) if places else []
        for part in processes.gather(dict(zip(places, groups, strict=True))):
            for place, lost in part.items():
                shaped[place] += lost
        return shaped


def sample(
    model: nn.Module,
    batch: Sequence[Record],
    config: Config,
    keys: Sequence[Sequence[int]],
    temperature: float,
) -> Rollout:
    """Completions of each prompt, as many as there are keys for it, group by group."""
    group_size = len(keys) // len(batch)
    collective = processes.sharded(model.parameters())
    return generate(
        model,
        [record.ids for record in batch for _ in range(group_size)],
        eos_token_ids=config.eos_token_ids,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        pad_token_id=config.pad_token_id,
        noise=uniforms(keys, config.max_new_tokens),
        share_prompts=config.share_prompts,
        slots=config.slots,
        together=processes.any_of if collective else None,
    )


def _blank(rollout: Rollout) -> Rollout:
    """A sequence that counts for nothing."""
    one = rollout[:1]
    return replace(one, mask=torch.zeros_like(one.mask), entropy=torch.zeros_like(one.entropy))
