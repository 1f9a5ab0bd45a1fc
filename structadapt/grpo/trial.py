"""The first update on trial: how far it would move the policy, before a run is begun.

On the embedded task the KL of the first update tells which runs collapse: the table and what it
cannot say are in docs/preflight.md, made by benchmarks/preflight_table.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from structadapt.grpo import objective
from structadapt.grpo.config import Config
from structadapt.grpo.loop import learn, prepared
from structadapt.grpo.rewards import Prompt, Reward
from structadapt.grpo.rollout import Rollout
from structadapt.grpo.sampling import Batch
from structadapt.grpo.undo import Put, restored
from structadapt.grpo.update import Context, Learner

# nats a token; of the runs in docs/results/preflight.json
SAFE_KL = 0.4  # every run up to here lived
COLLAPSE_KL = 0.7  # every run from here on died
AIM = 0.7  # of SAFE_KL, that a suggested rate aims at
EXPONENT = 1.7  # KL ~ rate ** EXPONENT, until two rates are known

Verdict = Literal["safe", "uncertain", "will collapse", "no signal"]
Weights = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]


@dataclass(frozen=True)
class Size:
    """A ratio of norms, over matrices."""

    median: float
    largest: float
    where: str  # the matrix that has the largest

    def __str__(self) -> str:
        return f"median {self.median:.3g}, largest {self.largest:.3g} ({self.where})"


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
    lr: float  # largest of the parameter groups
    kl: float  # KL(policy before || after the first update), nats a token; inf if not finite
    kl_step: float  # the same after all updates of the step
    updates: int  # in the step
    relative: Size | None  # ||dW||_F / ||W||_F of the first update; None for no matrix
    spectral: Size | None  # ||dW||_2 / ||W||_2
    reward: float  # mean of the rollout
    equal_groups: float  # share of groups whose rewards are all equal
    tries: tuple[Try, ...]  # lower rates that were measured
    suggestion: Try | None  # the one of them that is safe
    warming_up: float | None  # the rate that a schedule has yet to reach, if it is above `lr`

    def __str__(self) -> str:
        if self.verdict == "no signal":
            return (
                f"no signal: the rewards of every group are equal (mean reward {self.reward:.3g}), "
                "so the first update is exactly zero and nothing can be said"
            )
        rows = [
            ("KL, first update", f"{self.kl:.3g} nats a token at lr {self.lr:.3g} (safe up to "
             f"{SAFE_KL:.3g}, collapse from {COLLAPSE_KL:.3g})"),
            ("|dW|_F / |W|_F", str(self.relative)),
            ("|dW|_2 / |W|_2", str(self.spectral)),
            ("rollout", f"mean reward {self.reward:.3g}, {self.equal_groups:.0%} of the groups "
             "without a gradient"),
        ]  # fmt: skip
        if self.updates > 1:
            text = f"{self.kl_step:.3g} nats a token"
            rows.insert(1, (f"KL, all {self.updates} updates", text))
        rows += [(f"tried lr x {t.factor:.3g}", f"KL {t.kl:.3g}") for t in self.tries]
        if self.suggestion is not None:
            best = self.suggestion
            rows.append(("suggestion", f"lr {best.lr:.3g}: measured KL {best.kl:.3g}"))
        if self.warming_up is not None:
            text = f"the schedule goes on to {self.warming_up:.3g}: try that rate as well"
            rows.append(("warm-up", text))
        body = [f"  {name:18} {text}" for name, text in rows if text != "None"]
        return "\n".join([_HEADLINES[self.verdict], *body])


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

    weights: gives (name, W, dW) of each adapted matrix as it is now: the base and what training has
        added, such as `zip(names, bases, deltas)`. By default the trained matrices themselves.
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
        equal = objective.equal_groups(batch.rewards).double().mean().item()
        seen = {"reward": batch.rewards.mean().item(), "equal_groups": equal}
        lr = max(group["lr"] for group in optimizer.param_groups)
        goal = max(group.get("initial_lr", 0.0) for group in optimizer.param_groups)
        seen |= {"lr": float(lr), "warming_up": float(goal) if goal > lr * 1.001 else None}
        if equal == 1:
            return Preflight("no signal", kl=0.0, kl_step=0.0, updates=0, relative=None,
                             spectral=None, tries=(), suggestion=None, **seen)  # fmt: skip
        learner.measure = measurement(weights or trained_matrices(learner))
        first = learner.attempt(batch, 1.0)
        updates, sizes, learner.measure = learner.updates, learner.sizes, None
        tried = lower_rates(learner, batch, first, put) if tries else iter(())
        found = tuple(attempt for attempt, _ in zip(tried, range(tries), strict=False))
    best = found[-1] if found and verdict_of(found[-1].kl) == "safe" else None
    return Preflight(verdict_of(first.kl), kl=first.kl, kl_step=first.kl_step, updates=updates,
                     relative=size_of(sizes, 0), spectral=size_of(sizes, 1), tries=found,
                     suggestion=best, **seen)  # fmt: skip


def lower_rates(learner: "Trial", batch: Batch, first: Try, put: Put) -> Iterator[Try]:
    """Tries at ever lower rates until one is safe: along KL ~ rate ** p, with p of the last two."""
    last, power = first, EXPONENT
    while verdict_of(last.kl) != "safe":
        change = (AIM * SAFE_KL / last.kl) ** (1 / power) if math.isfinite(last.kl) else 0.1
        put()
        now = learner.attempt(batch, last.factor * change)
        if 0 < now.kl < last.kl < math.inf:
            power = min(max(math.log(now.kl / last.kl) / math.log(change), 1.0), 2.0)
        last = now
        yield now


# -- one step, and what it changes -----------------------------------------------------------------


@dataclass
class Trial(Learner):
    """A learner that looks at the policy after its first update."""

    measure: Callable[[], dict[str, tuple[float, float]]] | None = None
    first: float | None = None  # KL after the first update
    updates: int = 0

    def attempt(self, batch: Batch, factor: float) -> Try:
        """One step with the rates times `factor`. Leaves the model where the step takes it."""
        self.first, self.updates, self.nonfinite = None, 0, 0
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs = [lr * factor for lr in self.scheduler.base_lrs]
        lr = float(max(group["lr"] for group in self.optimizer.param_groups))
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

    def _step(self) -> float | None:
        norm = super()._step()
        self.updates += norm is not None
        if norm is not None and self.first is None:
            self.first = self._kl_after(self.rollout)
            self.sizes = {} if self.measure is None else self.measure()
        return norm


def trained_matrices(learner: Learner) -> Weights:
    """The two-dimensional parameters of the optimizer: as they are now, and what they gain."""

    def whole(p: Tensor) -> Tensor:
        return getattr(p, "full_tensor", lambda: p)().detach()

    matrices = {n: p for n, p in learner.parameters.items() if p.dim() == 2}
    start = {name: whole(p).clone() for name, p in matrices.items()}
    return lambda: ((name, W, whole(matrices[name]).float() - W) for name, W in start.items())


def measurement(weights: Weights) -> Callable[[], dict[str, tuple[float, float]]]:
    """A function for after an update: (||dW||_F / ||W||_F, ||dW||_2 / ||W||_2) by name, dW being
    the change since now. A matrix of zeros is left out."""
    before = {name: dW.clone() for name, _, dW in weights() if dW.any()}  # none of fresh adapters

    @torch.no_grad()
    def measure() -> dict[str, tuple[float, float]]:
        found = {}
        for name, W, dW in weights():
            W, dW = W.float(), dW.float()
            base, change = (W + before[name], dW - before[name]) if name in before else (W, dW)
            if base.any():
                parts = change.norm() / base.norm(), spectral_norm(change) / spectral_norm(base)
                found[name] = (float(parts[0]), float(parts[1]))
        return found

    return measure


def size_of(sizes: dict[str, tuple[float, float]], which: int) -> Size | None:
    values = {name: pair[which] for name, pair in sizes.items()}
    if not values:
        return None
    where = max(values, key=lambda name: values[name])
    return Size(median(values.values()), values[where], where)


def spectral_norm(W: Tensor, vectors: int = 8, rounds: int = 12) -> Tensor:
    """||W||_2 of a matrix, from below: subspace iteration on W^T W (Halko et al. 2011, 4.4), fp32.

    Off by less than 1 % unless more than `vectors` singular values lie that close together.
    """
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(W.shape[1], min(vectors, *W.shape), generator=generator).to(W.device)
    scale = W.abs().max()
    if scale == 0 or not scale.isfinite():
        return scale
    W = W / scale  # the squares of tiny updates are not even subnormal
    for _ in range(rounds):
        Q = torch.linalg.qr(W.T @ (W @ Q)).Q
    return torch.linalg.matrix_norm(W @ Q, ord=2) * scale
