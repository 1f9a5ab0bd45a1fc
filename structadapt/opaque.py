"""The layers as custom ops, for torch.compile: one node each, with a fake and a backward.

Inside, the implementation is chosen when the op runs, as in eager mode. What they hold for the
backward is what the Triton forms hold; a twin in plain torch that wants more computes it again.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from structadapt.forms import QuanTAForm, implementation
from structadapt.kernels import lean
from structadapt.kernels.reference import no_autocast


def _wanted(grads: Any, needs: list[bool]) -> list[Tensor]:
    return [g.contiguous() for g, need in zip(grads, needs, strict=True) if need]


def _fakes(tensors: Any, needs: list[bool]) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(tensors, needs, strict=True)
        if need
    ]


def _spread(grads: list[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    rest = iter(grads)
    return tuple(next(rest) if need else None for need in needs)


def _output(x: Tensor, W: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], W.shape[0])


def _narrow(x: Tensor, A: Tensor) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), A.shape[0])  # .numel() would fix the number of rows


# -- LoRA ------------------------------------------------------------------------------------------


@custom_op("structadapt::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, h)."""
    with no_autocast(x.device):
        kernels = implementation("lora_linear", x, W, A, B, rank=A.shape[0])
        y, h = kernels.lora_forward(x, W, bias, A, B, scale)
    return y, h.to(x.dtype).contiguous()


@lora_linear.register_fake
def _(x: Tensor, W: Tensor, bias: Any, A: Tensor, B: Tensor, scale: float) -> Any:
    return _output(x, W), _narrow(x, A)


@custom_op("structadapt::lora_linear_backward", mutates_args=())
def _lora_backward(
    dy: Tensor, x: Tensor, h: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
    scale: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    with no_autocast(x.device):
        kernels = implementation("lora_linear", x, W, A, B, rank=A.shape[0])
        return _wanted(kernels.lora_backward(dy, x, h, W, A, B, scale, tuple(needs)), needs)


@_lora_backward.register_fake
def _(dy: Any, x: Any, h: Any, W: Any, bias: Any, A: Any, B: Any, scale: Any, needs: Any) -> Any:
    return _fakes((x, W, bias, A, B), needs)


def _lora_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, bias, A, B, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], W, bias, A, B)
    ctx.mark_non_differentiable(output[1])


def _lora_gradients(ctx: Any, dy: Tensor, _: Any) -> Any:
    needs = list(ctx.needs_input_grad[:5])
    return *_spread(_lora_backward(dy, *ctx.saved_tensors, ctx.scale, needs), needs), None


lora_linear.register_autograd(_lora_gradients, setup_context=_lora_context)


# -- DoRA ------------------------------------------------------------------------------------------


@custom_op("structadapt::dora_norm", mutates_args=())
def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A||_row (out,)."""
    kernels = implementation("dora_norm", W, W, A, B, rank=A.shape[0])
    return kernels.dora_norm(W, A, B, scale)  # type: ignore[no-any-return]


@dora_norm.register_fake
def _(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return W.new_empty(W.shape[0], dtype=torch.promote_types(W.dtype, torch.float32))


@custom_op("structadapt::dora_linear", mutates_args=())
def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, h)."""
    with no_autocast(x.device):
        kernels = implementation("dora_linear", x, W, A, B, g, rank=A.shape[0])
        y, h, _ = kernels.dora_forward(x, W, bias, A, B, g, scale)
    return y, h.to(x.dtype).contiguous()


@dora_linear.register_fake
def _(x: Any, W: Any, bias: Any, A: Any, B: Any, g: Any, scale: Any) -> Any:
    return _output(x, W), _narrow(x, A)


@custom_op("structadapt::dora_linear_backward", mutates_args=())
def _dora_backward(
    dy: Tensor, x: Tensor, h: Tensor, y: Tensor, W: Tensor, bias: Tensor | None, A: Tensor,
    B: Tensor, g: Tensor, scale: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    with no_autocast(x.device):
        kernels = implementation("dora_linear", x, W, A, B, g, rank=A.shape[0])
        if kernels is lean and needs[5]:  # wants the output before g
            y, _ = lean.lora_forward(x, W, bias, A, B, scale)
        found = kernels.dora_backward(dy, x, h, y, W, bias, A, B, g, scale, tuple(needs))
        return _wanted(found, needs)


@_dora_backward.register_fake
def _(
    dy: Any, x: Any, h: Any, y: Any, W: Any, bias: Any, A: Any, B: Any, g: Any, scale: Any,
    needs: Any,
) -> Any:  # fmt: skip
    return _fakes((x, W, bias, A, B, g), needs)


def _dora_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, bias, A, B, g, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], output[0], W, bias, A, B, g)
    ctx.mark_non_differentiable(output[1])


def _dora_gradients(ctx: Any, dy: Tensor, _: Any) -> Any:
    needs = list(ctx.needs_input_grad[:6])
    return *_spread(_dora_backward(dy, *ctx.saved_tensors, ctx.scale, needs), needs), None


dora_linear.register_autograd(_dora_gradients, setup_context=_dora_context)


# -- QuanTA ----------------------------------------------------------------------------------------


@custom_op("structadapt::quanta_linear", mutates_args=())
def quanta_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, gates: list[Tensor], frozen: list[Tensor],
    minus_eye: bool,
) -> Tensor:  # fmt: skip
    """y."""
    with no_autocast(x.device):
        form = _form(x, W, gates, frozen, minus_eye)
        return form.forward(x, W, bias, *gates, *frozen)[0]


@quanta_linear.register_fake
def _(x: Any, W: Any, bias: Any, gates: Any, frozen: Any, minus_eye: Any) -> Any:
    return _output(x, W)


def _form(
    x: Tensor, W: Tensor, gates: list[Tensor], frozen: list[Tensor], minus_eye: bool
) -> QuanTAForm:
    kernels = implementation("quanta_linear", x, W, *gates, *frozen)
    return QuanTAForm(len(gates), minus_eye, kernels)


@custom_op("structadapt::quanta_linear_backward", mutates_args=())
def _quanta_backward(
    dy: Tensor, x: Tensor, W: Tensor, bias: Tensor | None, gates: list[Tensor],
    frozen: list[Tensor], minus_eye: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Those of x, W, bias that are needed, then of every gate if one is."""
    with no_autocast(x.device):
        form = _form(x, W, gates, frozen, minus_eye)
        tensors = x, W, bias, *gates, *frozen
        asked = *needs[:3], *[needs[3]] * len(gates), *[False] * len(frozen)
        grads = form.backward(dy, tensors, (), asked)
        return _wanted(grads, list(asked))


@_quanta_backward.register_fake
def _(
    dy: Any, x: Any, W: Any, bias: Any, gates: Any, frozen: Any, minus_eye: Any, needs: Any
) -> Any:
    return _fakes((x, W, bias, *gates), [*needs[:3], *[needs[3]] * len(gates)])


def _quanta_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, bias, gates, frozen, ctx.minus_eye = inputs
    ctx.n_gates = len(gates)
    ctx.save_for_backward(x, W, bias, *gates, *frozen)


def _quanta_gradients(ctx: Any, dy: Tensor) -> Any:
    x, W, bias, *chains = ctx.saved_tensors
    gates, frozen = chains[: ctx.n_gates], chains[ctx.n_gates :]
    asked = ctx.needs_input_grad
    needs = [*asked[:3], any(asked[3]) if isinstance(asked[3], list | tuple) else bool(asked[3])]
    grads = iter(_quanta_backward(dy, x, W, bias, gates, frozen, ctx.minus_eye, needs))
    first = [next(grads) if need else None for need in needs[:3]]
    return *first, list(grads) or [None] * len(gates), [None] * len(frozen), None


quanta_linear.register_autograd(_quanta_gradients, setup_context=_quanta_context)
