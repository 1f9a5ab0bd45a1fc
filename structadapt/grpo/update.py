"""The optimizer steps on one rollout."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import utils

from structadapt.bounds import few
from structadapt.grpo import objective, processes
from structadapt.grpo.config import Config
from structadapt.grpo.rollout import Rollout, evaluating, logprobs

logger = logging.getLogger("structadapt")
Context = Callable[[], AbstractContextManager[Any]]

KL_SEQUENCES = 32  # that the KL after the update is measured on
MAX_NONFINITE_SHARE = 0.01  # of the updates, once there were 100


class NonfiniteGradientError(FloatingPointError):
    """A gradient is not finite, and no step was taken with it.

    rollout, advantages: this process's part of the minibatch that gave it.
    """

    def __init__(self, message: str, rollout: Rollout, advantages: Tensor) -> None:
        super().__init__(message)
        self.rollout, self.advantages = rollout, advantages


@dataclass
class Gaps:
    """How far the policy is from the one that sampled and from the reference, before it moves."""

    largest: float = 0.0
    sampler: float = 0.0  # sums of KL over tokens
    reference: float = 0.0
    tokens: float = 0.0
    known: bool = False  # on all processes

    def add(self, logp: Tensor, rollout: Rollout) -> None:
        on = rollout.mask.bool()
        zeroed = torch.where(on, logp.detach() - rollout.logp, 0.0)
        self.largest = max(self.largest, zeroed.abs().max().item() if zeroed.numel() else 0.0)
        self.sampler += objective.kl(torch.zeros_like(zeroed), zeroed).sum().item()
        if rollout.ref_logp is not None:
            apart = torch.where(on, logp.detach() - rollout.ref_logp, 0.0)
            self.reference += objective.kl(apart, torch.zeros_like(apart)).sum().item()
        self.tokens += on.sum().item()

    def means(self) -> dict[str, float]:
        """The fields of `Step`, over all processes."""
        sampler, reference, tokens = processes.total([self.sampler, self.reference, self.tokens])
        return {
            "mismatch": max(processes.gather(self.largest)),
            "mismatch_kl": sampler / max(tokens, 1),
            "reference_kl": reference / max(tokens, 1),
        }


@dataclass
class Learner:
    """What learns, and how. Knows nothing of prompts and rewards."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: Config
    scheduler: Any = None
    reference: Context | None = None  # within it the model is the reference policy
    parameters: dict[str, nn.Parameter] = field(init=False)  # what the optimizer holds, by name
    nonfinite: int = 0  # updates left out in a row
    left_out: int = 0  # in all
    attempts: int = 0  # updates, with those that were left out

    def __post_init__(self) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.parameters = {names.get(p, f"parameter {i}"): p for i, p in enumerate(held)}
        self.collective = processes.sharded(self.model.parameters())
        self.rank, self.size = processes.rank_and_size()

    def prepare(self, rollout: Rollout) -> Rollout:
        """The rollout with what the update compares the policy with, from before it."""
        config = self.config
        self.gaps = Gaps()
        self.blank = replace(rollout[:1], mask=torch.zeros_like(rollout[:1].mask))
        if config.importance_cap is not None:
            old = self._read(rollout)
            self.gaps.add(old, rollout)
            self.gaps.known = True
            weights = objective.truncated_weights(
                old, rollout.logp, rollout.mask, config.importance_cap
            )
            rollout = replace(rollout, logp=old, weights=weights)
        if config.kl_coef > 0:
            assert self.reference is not None
            with self.reference():
                rollout = replace(rollout, ref_logp=self._read(rollout))
        return rollout

    def update(
        self, rollout: Rollout, A: Tensor, positions: Tensor, every: Tensor
    ) -> dict[str, Any]:
        """Every optimizer step on a rollout; the fields of `Step` that it knows.

        rollout: this process's part, as `prepare` returns it; A (n,) its advantages; positions (n,)
        its sequences' places among those of all processes, rising, whose advantages are `every`
        (N,).
        """
        config, N = self.config, len(every)
        edges = [N * i // config.minibatches for i in range(config.minibatches + 1)]
        pairs = [(a, b) for a, b in pairwise(edges) if a < b]
        local = [slice(*torch.searchsorted(positions, torch.tensor(pair)).tolist())
                 for pair in pairs]  # fmt: skip
        norms, clipped, skipped = [], 0.0, 0
        for _ in range(config.epochs):
            for (start, end), rows in zip(pairs, local, strict=True):
                if not every[start:end].any() and not config.kl_coef:
                    continue
                clipped += self._accumulate(rollout[rows], A[rows])
                norm = self._step(rollout[rows], A[rows])
                norms += [] if norm is None else [norm]
                skipped += norm is None
        if not self.gaps.known:  # nothing was learned, and nothing measured on the way
            first = rollout[: config.micro_batch_size or len(rollout)]
            self.gaps.add(self._read(first), first)
        tokens = processes.total([rollout.mask.sum().item()])[0]
        return {
            **self.gaps.means(),
            "kl": self._kl_after(rollout[self._first(positions, edges[1])]) if norms else 0.0,
            "clip_fraction": processes.total([clipped])[0] / max(tokens * config.epochs, 1),
            "grad_norm": sum(norms) / max(len(norms), 1),
            "updates": len(norms),
            "skipped": skipped,
        }

    def _accumulate(self, rollout: Rollout, A: Tensor) -> float:
        """Backward through one minibatch, micro-batch by micro-batch: their gradients add up to the
        minibatch's, because each is divided by the minibatch's normalizer. The clipped tokens."""
        config, clipped = self.config, 0.0
        counts = [rollout.mask.sum().item(), rollout.mask.any(1).sum().item()]
        tokens, sequences = processes.total(counts)
        divisor = objective.divisor_of(tokens, sequences, config.loss, config.max_new_tokens)
        clip = config.clip_low, config.clip_high
        self.optimizer.zero_grad()
        for part, advantage in self._parts(rollout, A):
            logp = self._logprobs(part)
            policy = (logp, part.logp, advantage, part.mask, config.loss)
            loss = objective.loss(*policy, *clip, divisor, weights=part.weights)
            if part.ref_logp is not None:
                penalty = objective.kl_penalty(
                    logp, part.logp, part.ref_logp, part.mask, config.loss, config.kl, divisor,
                    unbiased=config.kl_unbiased,
                )  # fmt: skip
                loss = loss + config.kl_coef * penalty
            loss.backward()
            with torch.no_grad():
                clipped += objective.clipped(*policy, *clip).sum().item()
                if not self.gaps.known:
                    self.gaps.add(logp, part)
        self.gaps.known = True
        for p in self.parameters.values():  # of sharded parameters it is the mean of all processes
            if p.grad is not None and hasattr(p, "full_tensor"):
                p.grad.mul_(self.size)
        processes.sum_gradients(list(self.parameters.values()))
        return clipped

    def _parts(self, rollout: Rollout, A: Tensor) -> Iterator[tuple[Rollout, Tensor]]:
        """The micro-batches. Where the forward of a model is a collective call every process has as
        many: the last ones of some are sequences without a token that counts."""
        pieces = list(slices(len(rollout), self.config.micro_batch_size))
        missing = max(processes.gather(len(pieces))) - len(pieces) if self.collective else 0
        for rows in pieces:
            yield rollout[rows], A[rows]
        for _ in range(missing):
            yield self.blank, A.new_zeros(1)

    def _step(self, rollout: Rollout, A: Tensor) -> float | None:
        """One optimizer step; the norm of the gradient, or None if it was not finite.

        Raises NonfiniteGradientError by the config's policy, before the step; the arguments are
        for it.
        """
        self.attempts += 1
        parameters = list(self.parameters.values())
        whole = utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(getattr(whole, "full_tensor", lambda: whole)())
        if not math.isfinite(norm):
            named = self.parameters.items()
            own = [n for n, p in named if p.grad is not None and not _finite(p.grad)]
            bad = [*dict.fromkeys(n for names in processes.gather(own) for n in names)]
            self.model.zero_grad()
            self.nonfinite += 1
            self.left_out += 1
            often = self.left_out > MAX_NONFINITE_SHARE * self.attempts and self.attempts >= 100
            in_a_row = self.nonfinite >= self.config.max_nonfinite
            if self.config.nonfinite == "stop" or in_a_row or often:
                count = f" ({self.left_out} of {self.attempts} updates)" if often else ""
                message = f"the gradient norm is {norm}: not finite in {few(bad)}{count}"
                raise NonfiniteGradientError(message, rollout, A)
            logger.warning("an update is left out: its gradient is not finite in %s", few(bad))
            return None
        self.nonfinite = 0
        utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, whole)
        self.optimizer.step()
        self.model.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        return norm

    # -- looking at the policy ---------------------------------------------------------------------

    def _logprobs(self, part: Rollout) -> Tensor:
        config = self.config
        return logprobs(self.model, part, config.temperature, config.share_prompts, config.head)[0]

    @torch.no_grad()
    def _read(self, rollout: Rollout) -> Tensor:
        """The log-probabilities (N, T) now, in eval mode."""
        found = torch.zeros_like(rollout.logp)
        with evaluating(self.model):
            places = [*slices(len(rollout), self.config.micro_batch_size)]
            for i, (part, _) in enumerate(self._parts(rollout, rollout.logp[:, 0])):
                logp = self._logprobs(part)
                if i < len(places):
                    found[places[i], : logp.shape[1]] = torch.where(part.mask.bool(), logp, 0.0)
        return found

    @staticmethod
    def _first(positions: Tensor, end: int) -> slice:
        """This process's part of the rollout's first sequences, whatever the number of processes.
        All of a large minibatch would cost a third of its update."""
        return slice(0, int(torch.searchsorted(positions, min(end, KL_SEQUENCES))))

    def _kl_after(self, rollout: Rollout) -> float:
        """KL(policy before the update || now), nats a token of the rollout."""
        apart = objective.kl_from_old(self._read(rollout), rollout.logp)
        apart = torch.where(rollout.mask.bool(), apart, 0.0)
        moved, tokens = processes.total([apart.sum().item(), rollout.mask.sum().item()])
        return moved / max(tokens, 1)


def _finite(t: Tensor) -> bool:
    return bool(getattr(t, "to_local", lambda: t)().isfinite().all())


def slices(count: int, size: int | None) -> Iterator[slice]:
    size = size or max(count, 1)
    return (slice(start, start + size) for start in range(0, count, size))
