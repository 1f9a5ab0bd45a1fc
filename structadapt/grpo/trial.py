"""The first update on trial: how far it would move the policy, before a run is begun.

On the embedded task the KL of the first update tells which runs collapse: the table and what it
cannot say are in docs/preflight.md, made by benchmarks/preflight_table.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from structadapt.grpo import objective
from structadapt.grpo.config import Config
from structadapt.grpo.loop import learn, prepared
from structadapt.grpo.rewards import Prompt, Reward
from structadapt.grpo.rollout import Rollout
from structadapt.grpo.sampling import Batch
from structadapt.grpo.sizes import Size, Sizes, Weights, measurement, size_of, trained_matrices
from structadapt.grpo.undo import Put, generators, restored
from structadapt.grpo.update import Context, Learner

# nats a token, rounded; from the runs in docs/results/preflight.json, as a test checks
SAFE_KL = 0.14  # every run up to here lived
COLLAPSE_KL = 0.65  # every run from here on collapsed
AIM = 0.7  # of SAFE_KL, that a suggested rate aims at
EXPONENT = 1.7  # KL ~ rate ** EXPONENT, until two rates are known

Verdict = Literal["safe", "uncertain", "will collapse", "no signal"]


@dataclass(frozen=True)
class Try:
    """The same step with every learning rate times `factor`."""

    factor: float
    lr: float  # largest of the parameter groups
    kl: float  # KL(policy before || after the first update), nats a token; inf if not finite
    kl_step: float  # the same after all updates of the step


@dataclass(frozen=True)
class Preflight:
    """What the first step would do. `str()` of it is a report."""

    verdict: Verdict
    first: Try  # with the rates as they are
    updates: int  # of the optimizer in the step
    relative: Size | None  # ||dW||_F / ||W||_F of the first update; None without a matrix
    spectral: Size | None  # ||dW||_2 / ||W||_2
    reward: float  # mean of the rollout
    equal_groups: float  # share of groups whose rewards are all equal
    warming_up: float | None  # the rate that a schedule has yet to reach, if it is higher
    tries: tuple[Try, ...] = ()  # lower rates that were measured
    suggestion: Try | None = None  # the one of them that is safe

    @property
    def kl(self) -> float:
        """KL(policy before || after the first update), nats a token."""
        return self.first.kl

    def __str__(self) -> str:
        if self.verdict == "no signal":
            return (
                f"no signal: the rewards of every group are equal (mean reward {self.reward:.3g}), "
                "so the first update is exactly zero and nothing can be said"
            )
        return "\n".join(
            [_HEADLINES[self.verdict], *(f"  {name:18} {text}" for name, text in self._rows())]
        )

    def _rows(self) -> Iterator[tuple[str, str]]:
        first, best = self.first, self.suggestion
        yield "learning rate", f"{first.lr:.3g}"
        limits = f"safe up to {SAFE_KL:.3g}, collapse from {COLLAPSE_KL:.3g}"
        yield "KL, first update", f"{first.kl:.3g} nats a token ({limits})"
        if self.updates > 1:
            yield f"KL, {self.updates} updates", f"{first.kl_step:.3g} nats a token"
        if self.relative is not None and self.spectral is not None:
            yield "|dW|_F / |W|_F", str(self.relative)
            yield "|dW|_2 / |W|_2", str(self.spectral)
        equal = f"{self.equal_groups:.0%} of the groups without a gradient"
        yield "rollout", f"mean reward {self.reward:.3g}, {equal}"
        if self.warming_up is not None:
            yield "warm-up", f"the schedule goes on to {self.warming_up:.3g}: try that rate as well"
        for attempt in self.tries:
            yield f"lr x {attempt.factor:.3g}", f"KL {attempt.kl:.3g} nats a token"
        if best is not None:
            yield "suggestion", f"learning rate {best.lr:.3g}, measured KL {best.kl:.3g}"


_HEADLINES = {
    "safe": "safe: first updates of this size did not collapse",
    "uncertain": "uncertain: of first updates of this size some collapsed and some did not",
    "will collapse": "will collapse: first updates of this size all did",
}


def verdict_of(kl: float) -> Verdict:
    """What the runs on the embedded task say of a first update's KL, nats a token."""
    return "safe" if kl <= SAFE_KL else "uncertain" if kl < COLLAPSE_KL else "will collapse"


def preflight(
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
    weights: Weights | None = None,
    tries: int = 3,
) -> Preflight:
    """Take the first step of `train` on trial, with the same arguments, and put everything back.

    Costs one rollout, and for each of up to 1 + `tries` rates the updates of a step. Whatever
    happens, the training state is then what it was, bit for bit (see `undo.restored`); of what a
    reward function keeps for itself nothing is known.

    weights: gives (name, W, dW) of each adapted matrix as it is now, the base and what training has
        added; called before and after the first update. By default the trained matrices themselves.
    tries: lower rates to try where the verdict is not "safe", until one is.

    Raises what `train` would raise, ValueError also for a scheduler without state_dict, and
    FloatingPointError if no update of the step is finite.
    """
    if scheduler is not None and not hasattr(scheduler, "state_dict"):
        raise ValueError("the scheduler has no state_dict and cannot be put back: leave it out")
    prompts = prompts[: config.prompts_per_step * (config.max_resamples + 1)]
    learner, sampler = prepared(
        model, optimizer, prompts, reward, config, tokenizer, rollout_context, reference, scheduler,
        kind=Trial,
    )  # fmt: skip
    with restored(learner.model, optimizer, scheduler) as put:
        batch, _ = sampler.collect(step=0, start=0)
        sampled = generators()
        equal = objective.equal_groups(batch.rewards).double().mean().item()
        rollout: dict[str, Any] = {
            "reward": batch.rewards.mean().item(),
            "equal_groups": equal,
            "warming_up": _goal(optimizer),
        }
        if equal == 1:
            nothing = Try(1.0, _rate(optimizer), 0.0, 0.0)
            return Preflight("no signal", nothing, 0, None, None, **rollout)
        learner.measure = measurement(weights or trained_matrices(learner))
        first, updates, sizes = learner.attempt(batch, 1.0), learner.updates, learner.sizes
        learner.measure = None
        again = lambda: (put(), sampled())  # noqa: E731
        tried = tuple(islice(lower_rates(learner, batch, first, again), tries))
    return Preflight(
        verdict_of(first.kl), first, updates, size_of(sizes, 0), size_of(sizes, 1), **rollout,
        tries=tried, suggestion=next((t for t in tried if verdict_of(t.kl) == "safe"), None),
    )  # fmt: skip


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(max(group["lr"] for group in optimizer.param_groups))


def _goal(optimizer: torch.optim.Optimizer) -> float | None:
    """The rate before a scheduler, if that is above the one now."""
    goal = float(max(group.get("initial_lr", 0.0) for group in optimizer.param_groups))
    return goal if goal > _rate(optimizer) * 1.001 else None


def lower_rates(learner: "Trial", batch: Batch, first: Try, again: Put) -> Iterator[Try]:
    """Tries at ever lower rates until one is safe: along KL ~ rate ** p, with p of the last two,
    and two digits of the rate.

    again: puts back what there was after sampling."""
    last, power = first, EXPONENT
    while verdict_of(last.kl) != "safe":
        change = (AIM * SAFE_KL / last.kl) ** (1 / power) if math.isfinite(last.kl) else 0.1
        again()
        rate = _rate(learner.optimizer)
        rounded = float(f"{rate * last.factor * change:.2g}")  # what is printed was measured
        now = learner.attempt(batch, rounded / rate)
        if 0 < now.kl < last.kl < math.inf:
            slope = math.log(now.kl / last.kl) / math.log(now.factor / last.factor)
            power = min(max(slope, 1.0), 2.0)
        last = now
        yield now


# -- one step, and what it changes -----------------------------------------------------------------


@dataclass
class Trial(Learner):
    """A learner that looks at the policy after its first update."""

    measure: Callable[[], Sizes] | None = None
    first: float | None = None  # KL after the first update
    sizes: Sizes = field(default_factory=dict)  # what `measure` found then
    updates: int = 0

    def attempt(self, batch: Batch, factor: float) -> Try:
        """One step with the rates times `factor`. Leaves the model where the step takes it."""
        self.first, self.updates, self.nonfinite = None, 0, 0
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs = [lr * factor for lr in self.scheduler.base_lrs]
        lr = _rate(self.optimizer)
        try:
            learn(self, batch, 0, 0.0)
            after = self._kl_after(self.rollout) if self.updates > 1 else self.first
        except FloatingPointError:
            if self.first is None:
                raise
            after = math.inf  # the first update broke the second
        if self.first is None or after is None:
            raise FloatingPointError("no gradient of the first step is finite")
        return Try(
            factor, lr, *(kl if math.isfinite(kl) else math.inf for kl in (self.first, after))
        )

    def prepare(self, rollout: Rollout) -> Rollout:
        self.rollout = super().prepare(rollout)
        return self.rollout

    def _step(self, rollout: Rollout, A: Tensor) -> float | None:
        norm = super()._step(rollout, A)
        self.updates += norm is not None
        if norm is not None and self.first is None:
            self.first = self._kl_after(self.rollout)
            self.sizes = {} if self.measure is None else self.measure()
        return norm
