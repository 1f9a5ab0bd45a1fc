"""The GRPO loop: sample, reward, update; one record a step.

Everything here works on any nn.Module and any optimizer. What the module's weights are made of,
and which of them train, is the caller's business.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from structadapt.bounds import few
from structadapt.grpo import objective, processes
from structadapt.grpo.config import Config, Step
from structadapt.grpo.guard import CollapseError, Guard, Observer
from structadapt.grpo.resume import Checkpoints
from structadapt.grpo.rewards import Prompt, Reward, record, with_meta
from structadapt.grpo.sampling import Batch, Sampler
from structadapt.grpo.update import Context, Learner, NonfiniteGradientError

L = TypeVar("L", bound=Learner)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: Config,
    *,
    tokenizer: Any = None,
    rollout_context: Context = nullcontext,
    reference: Context | None = None,
    scheduler: Any = None,
    guard: Guard | None = None,
    observers: Sequence[Observer] = (),
    checkpoints: Checkpoints | None = None,
) -> Iterator[Step]:
    """Go once through `prompts` with GRPO, yielding a `Step` after each update.

    Stop iterating at any step; the model is then in a whole state. Rollouts run in eval mode
    within `rollout_context()`: pass `lambda: structadapt.merged_if_exact(model)` to sample from
    merged weights, which costs a base forward instead of an adapted one, where the weights' dtype
    holds the update (in bf16 a merge rounds most of a small one away). The update runs in the mode
    the model is in, on the parameters that the optimizer holds.

    A minibatch whose advantages are all exactly 0 has a gradient of exactly 0 and is left out:
    optimizer and scheduler do not step, so neither momentum nor weight decay moves the weights.

    With torch.distributed every process calls this with the same arguments. Each samples its part
    of the prompts, groups whole, and the gradients are added up, so that the update is that of one
    process with the same config. A DistributedDataParallel model is unwrapped; one of
    `fully_shard` works as it is.

    prompts: token ids, text, or records (see `Prompt`). reward: see `grpo.rewards`.
    tokenizer: anything with encode(text) -> ids and decode(ids) -> text; with one, prompts may be
        text or messages, for its chat template, and the reward gets text.
    reference: for kl_coef > 0, a context in which the model is the reference policy, such as
        `lambda: structadapt.disabled(model)`.
    scheduler: anything with step(), called after each step of the optimizer.
    guard: the limits of the alarms in `Step`; by default `Guard()`.
    observers: each looks at every step, and what it says joins the step's alarms; on several
        processes each of them looks, and the first one's word counts.
    checkpoints: where to keep the state, and to go on from it if there is one: the run continues as
        if it had not been stopped, with the record of the last step it had saved.

    Raises ValueError for no prompts, prompts of the wrong form or parameters that would train in 16
    bits (before the first step); while running, RuntimeError for too many rewards that fail,
    FloatingPointError for logits or a gradient that is not finite (see Config.nonfinite), before
    the optimizer would apply it (that minibatch is kept with the states), and CollapseError for an
    alarm with on_collapse="stop", after the step's record.
    """
    learner, sampler = prepared(
        model, optimizer, prompts, reward, config, tokenizer, rollout_context, reference, scheduler
    )
    return _steps(learner, sampler, guard or Guard(), observers, checkpoints)


def prepared(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: Config,
    tokenizer: Any,
    rollout_context: Context,
    reference: Context | None,
    scheduler: Any,
    kind: type[L] = Learner,
) -> tuple[L, Sampler]:
    """What learns and what samples; ValueError for what `train` refuses before the first step."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not len(prompts):
        raise ValueError("no prompts to train on")
    records = [record(prompt, tokenizer) for prompt in prompts]
    learner = kind(model, optimizer, config, scheduler, reference)
    if not any(p.requires_grad for p in learner.parameters.values()):
        raise ValueError("no parameter of the optimizer requires a gradient")
    short = [n for n, p in learner.parameters.items() if p.requires_grad and p.element_size() < 4]
    if short:
        raise ValueError(
            f"{few(short)} would train in 16 bits, where most small steps are rounded away: "
            "keep what trains in fp32 (adapters are, over a base of any dtype)"
        )
    if config.kl_coef > 0 and reference is None:
        raise ValueError(
            f"kl_coef is {config.kl_coef}, which needs a reference policy: pass reference=, such "
            "as lambda: structadapt.disabled(model)"
        )
    sampler = Sampler(model, records, with_meta(reward), config, tokenizer, rollout_context)
    return learner, sampler


def steps_in(prompts: int, config: Config) -> int:
    """How many steps one pass over that many prompts takes, without resampling."""
    return math.ceil(prompts / config.prompts_per_step)


def _steps(
    learner: Learner,
    sampler: Sampler,
    guard: Guard,
    observers: Sequence[Observer],
    checkpoints: Checkpoints | None,
) -> Iterator[Step]:
    config, start, first = learner.config, 0, 0
    if checkpoints is not None:
        found = checkpoints.restore(learner, guard, sampler.records, observers)
        if found is not None:
            start, first = found.prompts, found.step + 1
            yield found
            _stop_at(found, config)
    step = first
    while start < len(sampler.records):
        began = time.perf_counter()
        batch, start = sampler.collect(step, start)
        sampled = time.perf_counter()
        try:
            record = learn(learner, batch, step, sampled - began)
        except NonfiniteGradientError as error:
            if checkpoints is not None:
                checkpoints.keep_batch(step, error.rollout, error.advantages)
            raise
        record = replace(record, prompts=start)
        record = replace(record, alarms=guard.look(record))
        if observers:
            record = replace(record, alarms=record.alarms + _said(observers, record))
        if checkpoints is not None:
            last = start >= len(sampler.records)
            checkpoints.save(learner, guard, sampler.records, record, last, observers)
        yield record
        _stop_at(record, config)
        step += 1
    if checkpoints is not None:  # after the last record was taken
        checkpoints.finish()


def _said(observers: Sequence[Observer], record: Step) -> tuple[str, ...]:
    """What the observers say of a step: the same on every process, as all stop or none does."""
    said = processes.whole(lambda: [word for o in observers for word in o.after(record)])
    return tuple(processes.gather(said)[0])


def _stop_at(record: Step, config: Config) -> None:
    if record.alarms and config.on_collapse == "stop":
        raise CollapseError(f"step {record.step}: {record.alarms[0]}")


def learn(learner: Learner, batch: Batch, step: int, rollout_seconds: float) -> Step:
    """The update on a batch, and its record."""
    config, began = learner.config, time.perf_counter()
    A = objective.advantages(batch.shaped, config.advantage)
    own = batch.own
    rollout = batch.rollout
    if config.overlong == "mask":
        rollout = replace(rollout, mask=rollout.mask * (~rollout.truncated).long()[:, None])
    rollout = learner.prepare(rollout)
    positions = (own[:, None] * config.group_size + torch.arange(config.group_size)).flatten()
    every = A.flatten().to(rollout.logp.dtype)
    if config.overlong == "mask":  # what does not count teaches nothing
        taught = (positions.tolist(), rollout.mask.any(1).tolist()) if len(own) else ([], [])
        for places, counts in processes.gather(taught):
            every[places] *= torch.tensor(counts, dtype=every.dtype)
    mine = every[positions]
    if not len(own):  # a sequence that does not count, for a process without a prompt
        positions, mine = torch.full((len(rollout),), len(every)), every.new_zeros(len(rollout))
    try:
        update = learner.update(rollout, mine.to(rollout.logp.device), positions, every)
    except NonfiniteGradientError as error:
        error.args = (f"step {step}: {error}; stopped before this optimizer step",)
        raise
    seconds = time.perf_counter() - began
    rewards = batch.rewards
    return Step(
        step=step,
        prompts=0,
        reward=rewards.mean().item(),
        reward_std=rewards.std().item() if rewards.numel() > 1 else 0.0,
        zero_std_fraction=objective.equal_groups(rewards).double().mean().item(),
        resampled=batch.resampled,
        reward_faults=batch.faults,
        **batch.means(),
        **update,
        alarms=(),
        tokens_per_second=batch.drawn / (rollout_seconds + seconds),
        rollout_seconds=rollout_seconds,
        update_seconds=seconds,
    )
