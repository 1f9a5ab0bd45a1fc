"""A guard against gradients that are not finite, for transformers' Trainer and its subclasses."""

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from structadapt.bounds import few

log = logging.getLogger(__name__)


class NonFiniteGradientError(ArithmeticError):
    """Training was stopped: its gradients are not finite."""


class NonFiniteGuard(TrainerCallback):
    """Skip a step whose gradients are not finite; stop training when that goes on.

    Clipping turns one NaN into NaN everywhere, so the norm of each gradient is taken as it is
    made, which tells the layers, in the order of the backward pass: the first is where it began.
    Whether any is not finite, on any rank, decides before the step. Skipped means that no parameter
    and no optimizer state changes; data, scheduler and random generators go on. Gradients are never
    repaired. A loss that is not finite shows in them.

    Raises NonFiniteGradientError, naming the layers, after `in_a_row` skipped steps or, once
    `window` steps are seen, when more than `share` of the last `window` were skipped; ValueError
    under DeepSpeed, which keeps the gradients to itself. Under fp16 with a gradient scaler,
    skipping is the scaler's part and the guard stays out. `skipped` lists (step, names of layers).
    """

    def __init__(self, in_a_row: int = 3, share: float = 0.01, window: int = 100) -> None:
        if in_a_row < 1 or window < 1 or not 0 <= share <= 1:
            raise ValueError(
                "NonFiniteGuard: in_a_row and window must be at least 1 and share within 0..1, got "
                f"{in_a_row!r}, {window!r}, {share!r}"
            )
        self.in_a_row, self.share, self.window = in_a_row, share, window
        self.skipped: list[tuple[int, list[str]]] = []
        self._recent: deque[bool] = deque(maxlen=window)  # whether each step was skipped
        self._norms: dict[str, Tensor] = {}  # of each gradient, the largest since the last step
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.deepspeed:
            raise ValueError(
                "NonFiniteGuard: DeepSpeed keeps the gradients to itself; leave it out"
            )
        self._recent.clear()
        self._unhook()
        for name, parameter in _trained(kwargs["model"]):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._watch(name)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs["optimizer"], "scaler", None) is not None:
            return
        parameters = dict(_trained(kwargs["model"]))
        clipped = {n: _local(p.grad) for n, p in parameters.items() if p.grad is not None}
        bad = _anywhere([*self._norms.values(), *clipped.values()], args)
        self._recent.append(bad)
        if bad:
            names = _not_finite(self._norms)  # none if it happened on another rank
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
            self.skipped.append((state.global_step, layers))
            log.warning("step %d skipped: gradients not finite in %s", state.global_step, layers)
            for parameter in parameters.values():
                parameter.grad = None  # an optimizer passes over these; zeros would still move Adam
            self._stop_if_it_goes_on(state.global_step, layers)
        self._norms.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unhook()

    def _watch(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            # Kept on the device: nothing waits for it before the step.
            norm = torch.linalg.vector_norm(_local(cast(Tensor, parameter.grad)))
            earlier = self._norms.get(name)
            self._norms[name] = norm if earlier is None else torch.maximum(norm, earlier)

        return hook

    def _stop_if_it_goes_on(self, step: int, layers: list[str]) -> None:
        recent = list(self._recent)
        row = len(recent) >= self.in_a_row and all(recent[-self.in_a_row :])
        often = len(recent) == self.window and sum(recent) > self.share * self.window
        if row or often:
            self._unhook()
            shown = few(layers, 5) or "layers of another rank"
            raise NonFiniteGradientError(
                f"step {step}: gradients not finite in {shown}; {sum(recent)} of the last "
                f"{len(recent)} steps were skipped. The adapters are as after the last good step. "
                "Look at the batch and the loss, lower the learning rate, or resume earlier"
            )

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._norms.clear()


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _local(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    gradient = gradient.detach()
    return cast(Any, gradient).to_local() if hasattr(gradient, "to_local") else gradient


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _anywhere(tensors: list[Tensor], args: TrainingArguments) -> bool:
    """Whether a number is not finite on any rank; every rank gets the same answer."""
    ones = torch.ones((), device=args.device)
    finite = torch.stack([ones, *(t.isfinite().all().to(ones) for t in tensors)]).amin()
    if args.world_size > 1:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return not finite.item()
