"""Every op in plain torch: the specification that kernels and tests follow.

Tensors in, tensors out. Nothing here knows a module, an adapter's configuration or a device, and
every function runs in float64. Shapes: x (..., in), W (out, in), bias (out,) or None, A (r, in),
B (out, r), m (out,), g (out,). A QuanTA gate on the axes (b, a), b the earlier one, has the shape
(out_b, out_a, in_b, in_a).

Adapter parameters are kept in fp32 over any base; an op multiplies them in the dtype of x, and
computes norms and magnitudes in at least fp32.
"""

import math
import string
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of adapter parameters, norms and merges over a base of `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Weights and norms are not for autocast. The meta device has none to turn off."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


# -- LoRA ------------------------------------------------------------------------------------------


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """(x A^T) (scale B)^T. On B the scale cannot overflow: the narrow product in fp16 could."""
    return F.linear(F.linear(x, A.to(x.dtype)), (scale * B).to(x.dtype))


def lora_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A in at least fp32, also under autocast (Hu et al. 2021, section 4.1)."""
    wide = wide_dtype(W.dtype)
    with no_autocast(W.device):
        return torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scale)


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """y = x W^T + scale (x A^T) B^T + bias."""
    return F.linear(x, W, bias) + low_rank(x, A, B, scale)


# -- DoRA ------------------------------------------------------------------------------------------


def row_norm(V: Tensor) -> Tensor:
    """Euclidean norm of every row, (out, in) -> (out,)."""
    return torch.linalg.vector_norm(V, dim=1)


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A||_row (out,) in at least fp32, without a gradient (section 4.3)."""
    with torch.no_grad():
        return row_norm(lora_weight(W, A, B, scale))


def dora_gain(m: Tensor, norm: Tensor) -> Tensor:
    """g = m / ||V||_row (Liu et al. 2024), both (out,) and in at least fp32.

    A row of V that is exactly zero has no direction; g = 1 there. The row of W' is zero whatever
    g is, and with 1 its gradients are those of LoRA: finite, and they let the row leave zero.
    """
    alive = norm > 0
    return torch.where(alive, m / torch.where(alive, norm, 1.0), 1.0)


def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> Tensor:
    """y = g (x W^T + scale (x A^T) B^T) + bias; the bias is not scaled."""
    return dora_onto(F.linear(x, W, bias), low_rank(x, A, B, scale), bias, g)


def dora_onto(y: Tensor, low: Tensor, bias: Tensor | None, g: Tensor) -> Tensor:
    """The same from the frozen output y, which has the bias, and the low-rank product.

    g = 1 and B = 0 give y bit for bit. The bias is not taken off y, which has been rounded, but
    what g does to it is put right.
    """
    total = g * y + g * low
    return (total if bias is None else total + (1 - g) * bias).to(y.dtype)


# -- QuanTA ----------------------------------------------------------------------------------------


def quanta_pairs(n_axes: int) -> list[tuple[int, int]]:
    """The axes (earlier, later) of each gate, in order of application (Chen et al. 2024).

    Counted from the end this is (-1,-2), (-1,-3), ..., (-2,-3), ...: for three axes
    [(1, 2), (0, 2), (0, 1)].
    """
    last_to_first = range(n_axes - 1, -1, -1)
    return [(early, late) for late in last_to_first for early in range(late - 1, -1, -1)]


def quanta_axes(gates: list[Tensor]) -> tuple[int, ...]:
    """The input sizes (d1, ..., dN) that a list of N(N-1)/2 gates acts on."""
    n_axes = next(n for n in range(2, 27) if n * (n - 1) // 2 >= len(gates))
    touching_last = gates[: n_axes - 1]  # the pairs (N-2, N-1), ..., (0, N-1)
    return (*(g.shape[2] for g in reversed(touching_last)), gates[0].shape[3])


def quanta_gate_shapes(
    out_axes: tuple[int, ...], in_axes: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    """Shapes of the gates in order; the last gate on an axis takes it from in to out size."""
    pairs = quanta_pairs(len(in_axes))
    last_gate = {axis: i for i, pair in enumerate(pairs) for axis in pair}
    shapes = []
    for i, (b, a) in enumerate(pairs):
        out_b = out_axes[b] if last_gate[b] == i else in_axes[b]
        out_a = out_axes[a] if last_gate[a] == i else in_axes[a]
        shapes.append((out_b, out_a, in_axes[b], in_axes[a]))
    return shapes


def quanta_steps(
    shapes: tuple[tuple[int, ...], ...],
) -> list[tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]]:
    """Of the gate of each shape in order: its axes (b, a), and (d1, ..., dN) before and after."""
    if not shapes:
        return []
    sizes = quanta_axes([torch.empty(shape, device="meta") for shape in shapes])
    steps = []
    for (out_b, out_a, *_), (b, a) in zip(shapes, quanta_pairs(len(sizes)), strict=True):
        after = list(sizes)
        after[b], after[a] = out_b, out_a
        steps.append(((b, a), sizes, tuple(after)))
        sizes = tuple(after)
    return steps


def quanta_gate(u: Tensor, gate: Tensor, early: int, late: int) -> Tensor:
    """Apply one gate to u (M, d1, ..., dN); the two axes take the gate's output sizes."""
    axes = string.ascii_lowercase[: u.dim() - 1]
    b, a = axes[early], axes[late]
    out = axes.replace(b, b.upper()).replace(a, a.upper())
    return torch.einsum(f"z{axes},{b.upper()}{a.upper()}{b}{a}->z{out}", u, gate.to(u.dtype))


def quanta_apply(x: Tensor, gates: list[Tensor]) -> Tensor:
    """T x: all gates in order. x (..., d1 d2 ... dN) -> (..., d1' d2' ... dN')."""
    sizes = quanta_axes(gates)
    u = x.reshape(math.prod(x.shape[:-1]), *sizes)
    for gate, (early, late) in zip(gates, quanta_pairs(len(sizes)), strict=True):
        u = quanta_gate(u, gate, early, late)
    return u.reshape(*x.shape[:-1], u.shape[1:].numel())


def eye_gate(gate: Tensor) -> Tensor:
    """The identity in the shape of `gate`; a size that changes is cropped or zero-padded."""
    out_b, out_a, in_b, in_a = gate.shape
    eye_b = torch.eye(out_b, in_b, dtype=gate.dtype, device=gate.device)
    eye_a = torch.eye(out_a, in_a, dtype=gate.dtype, device=gate.device)
    return eye_b[:, None, :, None] * eye_a[None, :, None, :]


def _like_eye_gate(u: Tensor, gate: Tensor, early: int, late: int) -> Tensor:
    """What the identity in the shape of `gate` does to u: crop or zero-pad its two axes."""
    for dim, size in ((early + 1, gate.shape[0]), (late + 1, gate.shape[1])):
        if u.shape[dim] > size:
            u = u.narrow(dim, 0, size)
        elif u.shape[dim] < size:
            u = F.pad(u, [0, 0] * (u.dim() - 1 - dim) + [0, size - u.shape[dim]])
    return u


def quanta_apply_minus_eye(x: Tensor, gates: list[Tensor]) -> Tensor:
    """T x - E x, where E is the same chain of identity gates.

    Carries the difference through the chain, (G - I) formed in the dtype of the gates. Two nearly
    equal vectors are never subtracted, so a bf16 x keeps updates that bf16 gates would round away,
    and identity gates give exactly zero.
    """
    sizes = quanta_axes(gates)
    u = x.reshape(math.prod(x.shape[:-1]), *sizes)  # E x so far
    difference = None  # T x - E x so far
    for gate, (early, late) in zip(gates, quanta_pairs(len(sizes)), strict=True):
        full = u if difference is None else u + difference
        moved = quanta_gate(full, gate - eye_gate(gate), early, late)
        u = _like_eye_gate(u, gate, early, late)
        if difference is None:
            difference = moved
        else:
            difference = _like_eye_gate(difference, gate, early, late) + moved
    assert difference is not None
    return difference.reshape(*x.shape[:-1], difference.shape[1:].numel())


def quanta_update(x: Tensor, gates: list[Tensor], out_features: int, minus_eye: bool) -> Tensor:
    """T x (..., out_features), or with `minus_eye` T x - E x, for x (..., in).

    Axes that make more than a side of the layer: zeros follow x, the outputs too many are dropped.
    """
    width = math.prod(quanta_axes(gates))
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))
    chain = quanta_apply_minus_eye if minus_eye else quanta_apply
    return chain(x, gates)[..., :out_features]


# -- log-probabilities -----------------------------------------------------------------------------


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token, and the entropy of each distribution, in nats.

    logits (..., V) of any dtype, ids (...). The softmax runs in at least fp32 at `temperature`;
    the entropy carries no gradient.
    """
    logp = torch.log_softmax(logits.to(wide_dtype(logits.dtype)) / temperature, dim=-1)
    chosen = logp.gather(-1, ids[..., None]).squeeze(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logp.exp()).sum(-1)
    return chosen, entropy
