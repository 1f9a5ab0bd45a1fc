"""The one place where an op meets its implementation.

Adapters and GRPO call these names and never a kernel. An adapted linear layer has three forms:

    plain   `kernels/reference.py`: formulas, shapes and dtypes are written down there
    lean    `kernels/lean.py`, `kernels/lean_quanta.py`: plain torch with a hand-written backward
            that holds little
    triton  `kernels/lora.py`, `dora.py`, `quanta.py`: the same functions as fused kernels

The last two run in eager mode on plain tensors, as one autograd.Function; `dispatch.py` chooses
between them. The plain one runs wherever something else looks at the operations: torch.compile,
export, torch.func, a dispatch mode, a second derivative, tensor subclasses. Under torch.compile a
layer that may go to Triton is an opaque custom op instead (`opaque.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structadapt import dispatch, head, opaque
from structadapt.dispatch import Choice, backend
from structadapt.forms import (
    DoRAForm,
    LoRAForm,
    QuanTAForm,
    SharedLoRA,
    implementation,
    run,
)
from structadapt.kernels import lean, reference
from structadapt.kernels.reference import (
    dora_gain,
    dora_onto,
    eye_gate,
    lora_weight,
    low_rank,
    no_autocast,
    quanta_gate_shapes,
    quanta_pairs,
    quanta_update,
    token_logprobs,
    wide_dtype,
)
from structadapt.onlookers import observed, plain_tensors

__all__ = [
    "Explanation",
    "backend",
    "dora_gain",
    "dora_linear",
    "dora_norm",
    "dora_onto",
    "explain",
    "eye_gate",
    "head_logprobs",
    "lora_linear",
    "lora_shared_linear",
    "lora_weight",
    "low_rank",
    "no_autocast",
    "observed",
    "quanta_gate_shapes",
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
    if dispatch.traced_to_kernels(x, W, A, B, rank=A.shape[0]):
        return opaque.lora_linear(dispatch.autocast(x), W, bias, A, B, scale)[0]
    return run("lora_linear", LoRAForm(scale), x, W, bias, A, B, rank=A.shape[0])


def lora_shared_linear(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor, float]],
) -> tuple[Tensor, ...]:
    """`lora_linear` of several layers (W, bias, A, B, scale) on the same x, read once for all.

    Held: x and every x A^T. Where W or a bias is trained, under autocast, for a few rows, or where
    the operations are observed, it is `lora_linear` of each. Else a second derivative raises.
    """

    def apart() -> tuple[Tensor, ...]:
        return tuple(lora_linear(x, *layer) for layer in layers)

    tensors = [t for layer in layers for t in layer[:4]]
    trained = any(t is not None and t.requires_grad for i in (0, 1) for t in tensors[i::4])
    mixed = torch.is_autocast_enabled(x.device.type) or any(W.dtype != x.dtype for W, *_ in layers)
    few = x.shape[:-1].numel() <= lean.FEW  # `lora_linear` has its own way for these
    seen = not plain_tensors(x, *(t for t in tensors if t is not None))
    if not layers or trained or mixed or few or seen:
        return apart()
    against = [dispatch.against(x, W, A, B, rank=A.shape[0]) for W, _, A, B, _ in layers]
    if len({reason is None for reason in against}) > 1:
        return apart()
    kernels = [implementation("lora_linear", x, W, A, B, rank=len(A)) for W, _, A, B, _ in layers]
    scales = [scale for *_, scale in layers]
    return SharedLoRA.apply(kernels[0], scales, x, *tensors)  # type: ignore[no-any-return]


def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> Tensor:
    """y = g (x W^T + scale (x A^T) B^T) + bias.

    Held: x, x A^T and, on torch, the output before g. On Triton the output itself is held in its
    place, so a write into it (`nn.ReLU(inplace=True)`) makes the backward raise.
    """
    if dispatch.traced_to_kernels(x, W, A, B, g, rank=A.shape[0]):
        return opaque.dora_linear(dispatch.autocast(x), W, bias, A, B, g, scale)[0]
    return run("dora_linear", DoRAForm(scale), x, W, bias, A, B, g, rank=A.shape[0])


def quanta_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, gates: list[Tensor], frozen: list[Tensor],
    minus_eye: bool,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias + T x, less E x with `minus_eye`, less T0 x with `frozen`. Held: x."""
    form = QuanTAForm(len(gates), minus_eye)
    if any(gate.requires_grad for gate in frozen):  # a backward by hand takes them as constants
        return form.plain(x, W, bias, *gates, *frozen)
    if dispatch.traced_to_kernels(x, W, *gates, *frozen):
        return opaque.quanta_linear(dispatch.autocast(x), W, bias, gates, frozen, minus_eye)
    return run("quanta_linear", form, x, W, bias, *gates, *frozen)


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A||_row (out,), without a gradient."""
    if dispatch.traced_to_kernels(W, W, A, B, rank=A.shape[0]):
        with torch.no_grad():
            return opaque.dora_norm(W, A, B, scale)
    if not plain_tensors(W, A, B):
        return reference.dora_norm(W, A, B, scale)
    kernels = implementation("dora_norm", W, W, A, B, rank=A.shape[0])
    # A normal tensor also under inference mode: a later training step may use it.
    with torch.inference_mode(False), torch.no_grad():
        return kernels.dora_norm(W, A, B, scale)  # type: ignore[no-any-return]


def head_logprobs(
    hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability (...) of ids and entropy (...) in nats, from hidden (..., H) and a head's W
    (V, H): `token_logprobs` of the logits, of which a chunk exists at a time.

    Held: one tensor in the shape of hidden; hidden too if W or the bias trains. A second derivative
    raises.
    """
    if not plain_tensors(hidden, W, ids, *(() if bias is None else (bias,))):
        if not hidden.is_meta:
            dispatch.settle("head_logprobs", hidden, W, dispatch.OBSERVED)
        return head.plain(hidden, W, bias, ids, temperature)
    hidden = dispatch.autocast(hidden)  # on torch W and bias follow
    kernels = implementation("head_logprobs", hidden, W, ids, any_strides=True)
    return head.head_logprobs(kernels, hidden, W, bias, ids, temperature)


# -- which of them runs, and why -------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What ran each op of a call, in order."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices)) or "no op of structadapt was called"

    @property
    def backend(self) -> str:
        """`triton`, `torch`, `mixed`, or nothing if there was no op."""
        found = {choice.backend for choice in self.choices}
        return found.pop() if len(found) == 1 else "mixed" if found else ""

    @property
    def reason(self) -> str:
        """The reasons, each once."""
        return "; ".join(dict.fromkeys(choice.reason for choice in self.choices))


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend runs an op with these arguments, and why.

    The op is run once, without grad, as any call is: dropout draws, batch norms count it. Layers
    that have no kernel (embeddings, convolutions, quantised and merged ones) have no line; DoRA's
    norm has one where it is not kept from an earlier call.

    op: the name of one ("lora_linear", "lora_shared_linear", "dora_linear", "quanta_linear",
    "dora_norm", "head_logprobs"), or anything callable that calls them, an adapted layer or
    model first of all:

        print(sa.explain(model, input_ids))

    Raises ValueError for an unknown name, and what the call itself raises.
    """
    if isinstance(op, str) and op not in OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(OPS)}, or a callable")
    function = OPS[op] if isinstance(op, str) else op
    with dispatch.watching() as choices, torch.no_grad():
        function(*args, **kwargs)
    return Explanation(tuple(choices))


OPS: dict[str, Callable[..., Any]] = {
    "lora_linear": lora_linear,
    "lora_shared_linear": lora_shared_linear,
    "dora_linear": dora_linear,
    "quanta_linear": quanta_linear,
    "dora_norm": dora_norm,
    "head_logprobs": head_logprobs,
}
