"""Plain torch forward and backward of the adapted linear layers, holding little for the backward.

The twins that fused kernels are measured and tested against; the formulas are those of
`reference.py`, where shapes are written down. x may have any leading dimensions; M is their
product. Every backward returns gradients in the dtype of what they belong to, or None where `needs`
says that one is not wanted.

Held for the backward, beside the parameters: LoRA x and h (M, r); DoRA also the output before its
magnitude u (M, out); QuanTA x alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt.kernels import reference

Grads = tuple[Tensor | None, ...]
Tensors = Sequence[Tensor]
CHUNK_ELEMENTS = 2**18  # of a norm's rows: a chunk stays in cache
LARGE_BIAS = 4.0  # times g u: beside it a 16-bit output holds too few digits of g u
FEW = 8  # rows of x, as in decoding: casting A and B would cost more than multiplying by them


def flat(x: Tensor) -> Tensor:
    """(..., n) -> (M, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """(M, n) -> (..., n) as x has it. No view to autograd, which would forbid writes into it."""
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))  # type: ignore[no-any-return]


# -- LoRA ------------------------------------------------------------------------------------------


def lora_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, h) with h = x A^T and y = x W^T + bias + h (scale B)^T."""
    X = flat(x)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(X, W.to(x.dtype), bias)
    if len(X) <= FEW:
        h = F.linear(X.to(A.dtype), A)
        y.add_(F.linear(h, B), alpha=scale)
    else:
        h = (A.to(x.dtype) @ X.T).T  # columns: faster than rows here and in both of its products
        y.addmm_(h, B.to(x.dtype).T, alpha=scale)
    return shaped(y, x), h


def lora_backward(
    dy: Tensor, x: Tensor, h: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float,
    needs: tuple[bool, ...],
) -> Grads:  # fmt: skip
    """Gradients of (x, W, bias, A, B)."""
    dY, X = flat(dy), flat(x)
    dx = dY @ W.to(dy.dtype) if needs[0] else None  # first: what follows meets dY and dx in cache
    dS = (B.to(dy.dtype).T @ dY.T).mul_(scale).T  # (M, r), stored as h is
    dB = torch.empty_like(B).copy_((h.to(dY.dtype).T @ dY).T).mul_(scale) if needs[4] else None
    dx = None if dx is None else dx.addmm_(dS, A.to(dy.dtype)).view(x.shape)
    dW = (dY.T @ X).to(W.dtype) if needs[1] else None
    dbias = dY.sum(0) if needs[2] else None
    dA = (dS.T @ X).to(A.dtype) if needs[3] else None
    return dx, dW, dbias, dA, dB


# -- LoRA on several layers that read the same x ---------------------------------------------------
#
# Ws, biases, As, Bs and scales have an entry for each layer. h (M, r1 + r2 + ...) holds all of
# their x A^T: x is read once for them, once for all of their dA, and dx is added up in place.


def lora_shared_forward(
    x: Tensor, Ws: Tensors, biases: list[Tensor | None], As: Tensors, Bs: Tensors,
    scales: list[float],
) -> tuple[Tensors, Tensor]:  # fmt: skip
    """([y, ...], h)."""
    X = flat(x)
    h = X @ torch.cat([*As]).to(x.dtype).T
    ys = []
    for W, bias, B, scale, part in zip(Ws, biases, Bs, scales, by_layer(h, As), strict=True):
        y = F.linear(X, W.to(x.dtype), None if bias is None else bias.to(x.dtype))
        ys.append(shaped(y.addmm_(part, B.to(x.dtype).T, alpha=scale), x))
    return ys, h


def lora_shared_backward(
    dys: Tensors, x: Tensor, h: Tensor, Ws: Tensors, As: Tensors, Bs: Tensors,
    scales: list[float], need_x: bool,
) -> tuple[Tensor | None, Tensors, Tensors]:  # fmt: skip
    """(dx, [dA, ...], [dB, ...]); W and bias are frozen."""
    X, dYs = flat(x), [flat(dy) for dy in dys]
    dS = torch.empty_like(h)
    dBs = []
    for dY, B, scale, part, dpart in zip(
        dYs, Bs, scales, by_layer(h, As), by_layer(dS, As), strict=True
    ):
        dpart.copy_(dY @ B.to(x.dtype)).mul_(scale)
        dBs.append((dY.T @ part).to(B.dtype).mul_(scale))
    dx = None
    if need_x:
        dx = dS @ torch.cat([*As]).to(x.dtype)
        for dY, W in zip(dYs, Ws, strict=True):
            dx.addmm_(dY, W.to(x.dtype))
        dx = dx.view(x.shape)
    dAs = (dS.T @ X).split([len(A) for A in As])
    return dx, [t.to(A.dtype) for t, A in zip(dAs, As, strict=True)], dBs


def by_layer(t: Tensor, As: Tensors) -> list[Tensor]:
    """t (n, r1 + r2 + ...) in the columns of each layer."""
    return [*t.split([len(A) for A in As], 1)]


# -- DoRA ------------------------------------------------------------------------------------------


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A||_row (out,) in at least fp32, a block of rows at a time.

    Exact where the terms cancel, which a norm assembled from ||W||^2, <W, BA> and ||BA||^2 is not.
    """
    rows = max(1, CHUNK_ELEMENTS // max(W.shape[1], 1))
    wide, blocks = reference.wide_dtype(W.dtype), []
    with reference.no_autocast(W.device):
        for W_rows, B_rows in zip(W.split(rows), B.split(rows), strict=True):
            V = W_rows.to(wide, copy=True, memory_format=torch.contiguous_format)
            V.addmm_(B_rows.to(wide), A.to(wide), alpha=scale)  # into V: a new one costs its copy
            blocks.append(reference.row_norm(V))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _times(u: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """g u + (1 - g) bias in the dtype of u, for g (out,) in at least fp32.

    In bf16 g is the sum of two of its numbers, so that neither a g near 1 nor one near 0 loses its
    digits, and g = 1 gives u bit for bit; in fp16, where a large g would overflow, in fp32.
    """
    shift = None if bias is None else (1 - g) * bias
    if u.dtype == torch.bfloat16:
        high = g.to(u.dtype)
        product = u * high if shift is None else torch.addcmul(shift.to(u.dtype), u, high)
        return product.addcmul_(u, (g - high).to(u.dtype))
    return (u * g if shift is None else torch.addcmul(shift, u, g)).to(u.dtype)


def dora_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, u) with u = x W^T + h (scale B)^T + bias, h = x A^T and y = g (u - bias) + bias.

    g = 1 and B = 0 give F.linear(x, W, bias) bit for bit.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.shape[:-1].numel() <= FEW:
        X = flat(x)
        frozen, h = F.linear(X, W.to(x.dtype), bias), F.linear(X.to(A.dtype), A)
        u = torch.add(frozen, F.linear(h, B), alpha=scale)  # in fp32 where A and B are
        if bias is None:
            return shaped(torch.mul(u, g, out=frozen), x), h, u
        return shaped(torch.addcmul((1 - g) * bias, u, g, out=frozen), x), h, u
    u, h = lora_forward(x, W, bias, A, B, scale)
    return _times(u, g, bias), h, u


def dora_backward(
    dy: Tensor, x: Tensor, h: Tensor, u: Tensor, W: Tensor, bias: Tensor | None, A: Tensor,
    B: Tensor, g: Tensor, scale: float, needs: tuple[bool, ...],
) -> Grads:  # fmt: skip
    """Gradients of (x, W, bias, A, B, g); the norm inside g is a constant."""
    dY, dx_needs = flat(dy), (needs[0], needs[1], False, needs[3], needs[4])
    dx, dW, _, dA, dB = lora_backward(_times(dy, g), x, h, W, A, B, scale, dx_needs)
    dbias = dY.sum(0) if needs[2] else None
    dg = _gain_gradient(dY, x, h, flat(u), W, bias, B, g, scale) if needs[5] else None
    return dx, dW, dbias, dA, dB, dg


def _gain_gradient(
    dY: Tensor, x: Tensor, h: Tensor, u: Tensor, W: Tensor, bias: Tensor | None, B: Tensor,
    g: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """(N,): the sum of dY (u - bias), the product worked out again beside a large bias."""
    if bias is None:
        return (dY * u).sum(0, dtype=g.dtype)
    v = u - bias.to(u.dtype)
    dg = (dY * v).sum(0, dtype=g.dtype)
    if dY.element_size() > 2 or (dY.is_cuda and torch.cuda.is_current_stream_capturing()):
        return dg  # fp32 has digits enough; in a capture nothing can be decided
    lost = bias.abs().float() > LARGE_BIAS * v.abs().mean(0, dtype=torch.float32)
    columns = lost.nonzero()[:, 0]
    if len(columns):
        v = flat(x) @ W[columns].to(x.dtype).T
        v.addmm_(h.to(x.dtype), B[columns].to(x.dtype).T, alpha=scale)
        dg[columns] = (dY[:, columns] * v).sum(0, dtype=g.dtype)
    return dg
