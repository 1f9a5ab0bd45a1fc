"""The forms of an adapted linear layer, and the one autograd.Function that runs two of them."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from structadapt import dispatch
from structadapt.kernels import lean, lean_logprob, lean_quanta, reference
from structadapt.onlookers import plain_tensors

# {op: (module in plain torch, its twin, imported when first chosen since it imports triton)}
MODULES = {
    "lora_linear": (lean, "lora"),
    "dora_linear": (lean, "dora"),
    "dora_norm": (lean, "dora"),
    "quanta_linear": (lean_quanta, "quanta"),
    "head_logprobs": (lean_logprob, "logprob"),
}


class Form(Protocol):
    """The forms of one call of a layer, for the tensors (x, W, bias, ...)."""

    kernels: ModuleType | None  # whose functions do the work

    def plain(self, *tensors: Any) -> Tensor: ...

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
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


def implementation(
    op: str, x: Tensor, W: Tensor, *others: Tensor, rank: int = 0, any_strides: bool = False
) -> ModuleType:
    """The module that has the functions of an op for these tensors."""
    refused = dispatch.against(x, W, *others, rank=rank, any_strides=any_strides)
    plain, fused = MODULES[op]
    # A norm is taken of weights that no kernel multiplies, too.
    if dispatch.settle(op, x, W, refused, strict=op != "dora_norm") == "torch":
        return plain
    return import_module(f"structadapt.kernels.{fused}")


def run(
    op: str, form: Any, x: Tensor, W: Tensor, bias: Tensor | None, *tensors: Tensor, rank: int = 0
) -> Tensor:
    """The output (..., out) of a layer."""
    if not plain_tensors(x, W, *tensors):
        if not (x.is_meta or torch.compiler.is_exporting()):
            dispatch.settle(op, x, W, dispatch.OBSERVED)
        return form.plain(x, W, bias, *tensors)  # type: ignore[no-any-return]
    x = dispatch.autocast(x)  # on torch W and bias follow x
    form.kernels = implementation(op, x, W, *tensors, rank=rank)
    if torch.is_grad_enabled():
        return _ByHand.apply(form, x, W, bias, *tensors)  # type: ignore[no-any-return]
    return form.forward(x, W, bias, *tensors)[0]  # type: ignore[no-any-return]


class _ByHand(torch.autograd.Function):
    """A form with its hand-written backward."""

    @staticmethod
    def forward(ctx: Any, form: Form, *tensors: Tensor | None) -> Tensor:
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


class SharedLoRA(torch.autograd.Function):
    """Several frozen layers with LoRA that read the same x: `tensors` is x, then W, bias, A, B of
    every layer. The outputs, one for each."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, scales: list[float], *tensors: Any) -> tuple[Tensor, ...]:
        x, *rest = tensors
        Ws, biases, As, Bs = (rest[i::4] for i in range(4))
        ys, h = kernels.lora_shared_forward(x, Ws, biases, As, Bs, scales)
        ctx.kernels, ctx.scales = kernels, scales
        ctx.save_for_backward(*tensors, h)
        ctx.set_materialize_grads(False)  # a layer whose output is not used has no gradients
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest, h = ctx.saved_tensors
        Ws, _, As, Bs = (rest[i::4] for i in range(4))
        used = [i for i, dy in enumerate(dys) if dy is not None]
        if len(used) < len(dys):
            h = torch.cat([h.new_empty(len(h), 0), *(lean.by_layer(h, As)[i] for i in used)], 1)
        chosen = ([all_of_them[i] for i in used] for all_of_them in (Ws, As, Bs, ctx.scales))
        grads: list[Any] = [None] * len(rest)
        dx, dAs, dBs = ctx.kernels.lora_shared_backward(
            [dys[i] for i in used], x, h, *chosen, ctx.needs_input_grad[2]
        )
        for i, dA, dB in zip(used, dAs, dBs, strict=True):
            grads[4 * i + 2], grads[4 * i + 3] = dA, dB
        return None, None, dx, *grads


@dataclass
class LoRAForm:
    scale: float
    kernels: Any = lean

    def plain(self, *tensors: Any) -> Tensor:
        return reference.lora_linear(*tensors, scale=self.scale)

    def forward(self, *tensors: Any) -> tuple[Tensor, ...]:
        return self.kernels.lora_forward(*tensors, scale=self.scale)

    def backward(self, dy: Tensor, tensors: Any, held: Any, needs: Any) -> Any:
        x, W, _, A, B = tensors
        (h,) = held
        return self.kernels.lora_backward(dy, x, h, W, A, B, self.scale, needs)


@dataclass
class DoRAForm:
    scale: float
    kernels: Any = lean

    def plain(self, *tensors: Any) -> Tensor:
        return reference.dora_linear(*tensors, scale=self.scale)

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        y, h, u = self.kernels.dora_forward(*tensors, scale=self.scale)
        g = tensors[-1]
        return y, h, u if g.requires_grad else None  # only the gradient of g wants it

    def backward(self, dy: Tensor, tensors: Any, held: Any, needs: Any) -> Any:
        x, W, bias, A, B, g = tensors
        h, u = held
        return self.kernels.dora_backward(dy, x, h, u, W, bias, A, B, g, self.scale, needs)


@dataclass
class QuanTAForm:
    n_gates: int
    minus_eye: bool
    kernels: Any = lean_quanta

    def plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *chains: Tensor) -> Tensor:
        gates, frozen = [*chains[: self.n_gates]], [*chains[self.n_gates :]]
        update = reference.quanta_update(x, gates, W.shape[0], self.minus_eye)
        if frozen:
            update = update - reference.quanta_update(x, frozen, W.shape[0], False)
        return F.linear(x, W, bias) + update

    def forward(
        self, x: Tensor, W: Tensor, bias: Tensor | None, *chains: Tensor
    ) -> tuple[Tensor, ...]:
        gates, frozen = [*chains[: self.n_gates]], [*chains[self.n_gates :]]
        X, W, bias = lean.flat(x), W.to(x.dtype), None if bias is None else bias.to(x.dtype)
        moved = self.kernels.quanta_forward(X, gates, frozen, W.shape[0], self.minus_eye)
        if moved.dtype != x.dtype or X.shape[0] <= lean.FEW:
            return (lean.shaped(F.linear(X, W, bias).add_(moved), x),)
        y = moved.addmm_(X, W.T) if bias is None else moved.add_(bias).addmm_(X, W.T)
        return (lean.shaped(y, x),)

    def backward(self, dy: Tensor, tensors: Any, held: Any, needs: Any) -> Any:
        x, W, _, *chains = tensors
        gates, frozen = chains[: self.n_gates], chains[self.n_gates :]
        X, dY = lean.flat(x), lean.flat(dy)
        dx, dgates = self.kernels.quanta_backward(
            dY, X, gates, frozen, self.minus_eye, any(needs[3:])
        )
        dx = dx.addmm_(dY, W.to(dy.dtype)).view(x.shape) if needs[0] else None
        dW = (dY.T @ X).to(W.dtype) if needs[1] else None
        return dx, dW, dY.sum(0) if needs[2] else None, *dgates, *(None for _ in frozen)
