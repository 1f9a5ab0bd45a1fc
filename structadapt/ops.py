"""The one place where an op meets its implementation.

Adapters and GRPO call these names and never a kernel. An adapted linear layer has two forms: the
plain one of `kernels/reference.py`, where formulas, shapes and dtypes are written down, and a lean
one with a hand-written backward that holds little (`kernels/lean.py`, `kernels/lean_quanta.py`).
The lean one runs in eager mode on plain tensors; the plain one wherever something else looks at the
operations: torch.compile, export, torch.func, a dispatch mode, a second derivative, tensor
subclasses.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from structadapt.kernels import lean, lean_quanta, reference
from structadapt.kernels.reference import (
    dora_gain,
    dora_onto,
    eye_gate,
    lora_weight,
    low_rank,
    no_autocast,
    quanta_axes,
    quanta_pairs,
    quanta_update,
    token_logprobs,
    wide_dtype,
)

__all__ = [
    "dora_gain",
    "dora_linear",
    "dora_norm",
    "dora_onto",
    "eye_gate",
    "lora_linear",
    "lora_weight",
    "low_rank",
    "no_autocast",
    "observed",
    "quanta_axes",
    "quanta_linear",
    "quanta_pairs",
    "quanta_update",
    "token_logprobs",
    "wide_dtype",
]


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """y = x W^T + scale (x A^T) B^T + bias. Held for the backward: x and x A^T."""
    return _run(_LoRA(scale), x, W, bias, A, B)


def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> Tensor:
    """y = g (x W^T + scale (x A^T) B^T) + bias. Held: x, x A^T and the output before g."""
    return _run(_DoRA(scale), x, W, bias, A, B, g)


def quanta_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, gates: list[Tensor], frozen: list[Tensor],
    minus_eye: bool,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias + T x, less E x with `minus_eye`, less T0 x with `frozen`. Held: x."""
    form = _QuanTA(len(gates), minus_eye)
    if any(gate.requires_grad for gate in frozen):  # the lean backward takes them as constants
        return form.plain(x, W, bias, *gates, *frozen)
    return _run(form, x, W, bias, *gates, *frozen)


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A||_row (out,), without a gradient."""
    if not _may_be_lean(W, A, B):
        return reference.dora_norm(W, A, B, scale)
    # A normal tensor also under inference mode: a later training step may use it.
    with torch.inference_mode(False), torch.no_grad():
        return lean.dora_norm(W, A, B, scale)


# -- how a layer is run ----------------------------------------------------------------------------


class _Form(Protocol):
    """The two forms of one layer, for the tensors (x, W, bias, ...)."""

    def plain(self, *tensors: Any) -> Tensor: ...

    def forward(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The output, and what the backward wants of the way to it."""
        ...

    def backward(
        self,
        dy: Tensor,
        tensors: tuple[Any, ...],
        held: tuple[Tensor, ...],
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each tensor."""
        ...


def _run(form: _Form, x: Tensor, W: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
    if not _may_be_lean(x, W, *tensors):
        return form.plain(x, W, bias, *tensors)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # W and bias follow x
    if torch.is_grad_enabled():
        return _Lean.apply(form, x, W, bias, *tensors)  # type: ignore[no-any-return]
    return form.forward(x, W, bias, *tensors)[0]


def observed() -> bool:
    """Whether something else looks at the operations: a compiler, a tracer, torch.func, forward
    differentiation, a dispatch mode (as in selective checkpointing, which counts them)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _may_be_lean(*tensors: Tensor) -> bool:
    return not (tensors[0].is_meta or observed() or any(_overridden(type(t)) for t in tensors))


@functools.cache
def _overridden(kind: type[Tensor]) -> bool:
    """Whether a subclass (sharded, quantised, fake) has operations of its own."""
    plain = getattr(Tensor, "__torch_dispatch__", None)
    return getattr(kind, "__torch_dispatch__", None) is not plain


class _Lean(torch.autograd.Function):
    """A form with its hand-written backward."""

    @staticmethod
    def forward(ctx: Any, form: _Form, *tensors: Tensor | None) -> Tensor:
        y, *held = form.forward(*tensors)
        ctx.form, ctx.n_inputs = form, len(tensors)
        ctx.save_for_backward(*tensors, *held)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: checkpointing allows no second time
        tensors, held = saved[: ctx.n_inputs], saved[ctx.n_inputs :]
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # a second derivative is wanted: `held` has no graph
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
            x, W, bias, *rest = tensors
            bias = None if bias is None else bias.to(x.dtype)  # as autocast had them
            y = ctx.form.plain(x, W.to(x.dtype), bias, *rest)
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
            return None, *(next(found) if need else None for need in needs)
        return None, *ctx.form.backward(dy, tensors, held, needs)


@dataclass(frozen=True)
class _LoRA:
    scale: float

    def plain(self, *tensors: Any) -> Tensor:
        return reference.lora_linear(*tensors, scale=self.scale)

    def forward(self, *tensors: Any) -> tuple[Tensor, ...]:
        return lean.lora_forward(*tensors, scale=self.scale)

    def backward(self, dy: Tensor, tensors: Any, held: Any, needs: Any) -> Any:
        x, W, _, A, B = tensors
        (h,) = held
        return lean.lora_backward(dy, x, h, W, A, B, self.scale, needs)


@dataclass(frozen=True)
class _DoRA:
    scale: float

    def plain(self, *tensors: Any) -> Tensor:
        return reference.dora_linear(*tensors, scale=self.scale)

    def forward(self, *tensors: Any) -> tuple[Tensor, ...]:
        return lean.dora_forward(*tensors, scale=self.scale)

    def backward(self, dy: Tensor, tensors: Any, held: Any, needs: Any) -> Any:
        x, W, bias, A, B, g = tensors
        h, u = held
        return lean.dora_backward(dy, x, h, u, W, bias, A, B, g, self.scale, needs)


@dataclass(frozen=True)
class _QuanTA:
    n_gates: int
    minus_eye: bool

    def plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *chains: Tensor) -> Tensor:
        gates, frozen = [*chains[: self.n_gates]], [*chains[self.n_gates :]]
        update = quanta_update(x, gates, W.shape[0], self.minus_eye)
        if frozen:
            update = update - quanta_update(x, frozen, W.shape[0], False)
        return F.linear(x, W, bias) + update

    def forward(
        self, x: Tensor, W: Tensor, bias: Tensor | None, *chains: Tensor
    ) -> tuple[Tensor, ...]:
        gates, frozen = [*chains[: self.n_gates]], [*chains[self.n_gates :]]
        X, W, bias = lean.flat(x), W.to(x.dtype), None if bias is None else bias.to(x.dtype)
        moved = lean_quanta.quanta_forward(X, gates, frozen, W.shape[0], self.minus_eye)
        if moved.dtype != x.dtype or X.shape[0] <= lean.FEW:
            return (lean.shaped(F.linear(X, W, bias).add_(moved), x),)
        y = moved.addmm_(X, W.T) if bias is None else moved.add_(bias).addmm_(X, W.T)
        return (lean.shaped(y, x),)

    def backward(self, dy: Tensor, tensors: Any, held: Any, needs: Any) -> Any:
        x, W, _, *chains = tensors
        gates, frozen = chains[: self.n_gates], chains[self.n_gates :]
        X, dY = lean.flat(x), lean.flat(dy)
        dx, dgates = lean_quanta.quanta_backward(
            dY, X, gates, frozen, self.minus_eye, any(needs[3:])
        )
        dx = dx.addmm_(dY, W.to(dy.dtype)).view(x.shape) if needs[0] else None
        dW = (dY.T @ X).to(W.dtype) if needs[1] else None
        return dx, dW, dY.sum(0) if needs[2] else None, *dgates, *(None for _ in frozen)
