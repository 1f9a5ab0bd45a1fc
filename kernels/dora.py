"""DoRA on Triton: y = g (x W^T + h (s B)^T) + bias with g = m / ||W + s B A||_row.

The functions at the end have the signatures of their twins in `lean.py`. Held for the backward: x,
h = x A^T and the output y itself, which the next operation mostly keeps alive anyway: the gradient
of g is the sum of dY (y - bias) / g. Where |g| is so small that y has lost the digits of what g
multiplied, those columns are worked out again. The magnitude is applied in fp32 in the epilogue.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from structadapt.kernels import _launch
from structadapt.kernels._launch import Tile, cdiv, power_of_2
from structadapt.kernels.lean import Grads, flat, shaped
from structadapt.kernels.lora import (
    PRECISION,
    SMALL_GAIN,
    SPLIT_RANK,
    FromDY,
    dy_pass,
    gemm,
    narrow,
    over_rows,
    padded,
    plan,
    present,
    product,
    readable,
    scaled,
)

# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def dora_norm_kernel(
    w, a, b, out, N, K, R, scale, swn, sak, sbn,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """out[n] = ||w[n] + scale b[n] a||, tile by tile in fp32: no V in memory, no cancellation."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    rows = (n < N)[:, None]
    pw = w + n.to(tl.int64)[:, None] * swn + k[None, :]
    pb = b + n.to(tl.int64)[:, None] * sbn + r[None, :]
    square = tl.zeros((BN, BK), tl.float32)
    for k0 in range(0, K, BK):
        columns = (k < K - k0)[None, :]
        low = tl.zeros((BN, BK), tl.float32)
        for r0 in range(0, R, BR):
            inside = r < R - r0
            p = tl.load(pb + r0, mask=rows & inside[None, :], other=0.0)
            pa = a + (r0 + r).to(tl.int64)[:, None] * sak + k0 + k[None, :]
            q = tl.load(pa, mask=inside[:, None] & columns, other=0.0)
            low = tl.dot(p, q, low, input_precision=LOW)
        v = tl.load(pw, mask=rows & columns, other=0.0).to(tl.float32) + scale * low
        square += v * v
        pw += BK
    tl.store(out + n, tl.sqrt(tl.sum(square, 1)), mask=n < N)


@triton.jit
def dora_epilogue_kernel(
    base, h, b, bias, g, M, N, R, sym, shm, sbn,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """base = g (base + h b^T) + bias in place, the low-rank tile computed on the way."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    ph = h + m.to(tl.int64)[:, None] * shm + r[None, :]
    pb = b + n.to(tl.int64)[:, None] * sbn + r[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for r0 in range(0, R, BR):
        inside = (r < R - r0)[None, :]
        p = tl.load(ph + r0, mask=rows & inside, other=0.0)
        q = tl.load(pb + r0, mask=(n < N)[:, None] & inside, other=0.0)
        acc = tl.dot(p, q.T, acc, input_precision=PRECISION)
    py = base + m.to(tl.int64)[:, None] * sym + n[None, :]
    acc += tl.load(py, mask=rows & columns, other=0.0).to(tl.float32)
    acc *= tl.load(g + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(py, acc.to(base.dtype.element_ty), mask=rows & columns)


@triton.jit
def dora_small_gain_kernel(
    dy, x, h, w, b, g, dg, M, K, R, sdm, sxm, shm, swn, sbn, SMALL: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dg[n] = sum_m dy[m, n] (x[m] . w[n] + h[m] . b[n]) for a column with |g| < SMALL.

    Every other program leaves at once: a gain near 0 is rare.
    """
    n = tl.program_id(0).to(tl.int64)
    if tl.abs(tl.load(g + n).to(tl.float32)) >= SMALL:
        return
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    total = 0.0
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        rows = m < M
        long = m.to(tl.int64)[:, None]
        u = tl.zeros((BM,), tl.float32)
        for k0 in range(0, K, BK):
            inside = k < K - k0
            p = tl.load(
                x + long * sxm + k0 + k[None, :], mask=rows[:, None] & inside[None, :], other=0.0
            )
            q = tl.load(w + n * swn + k0 + k, mask=inside, other=0.0)
            u += tl.sum(p.to(tl.float32) * q.to(tl.float32)[None, :], 1)
        for r0 in range(0, R, BR):
            inside = r < R - r0
            p = tl.load(
                h + long * shm + r0 + r[None, :], mask=rows[:, None] & inside[None, :], other=0.0
            )
            q = tl.load(b + n * sbn + r0 + r, mask=inside, other=0.0)
            u += tl.sum(p.to(tl.float32) * q.to(tl.float32)[None, :], 1)
        d = tl.load(dy + m.to(tl.int64) * sdm + n, mask=rows, other=0.0).to(tl.float32)
        total += tl.sum(d * u)
    tl.store(dg + n, total)


# -- launches --------------------------------------------------------------------------------------

# Of A and B in fp32: three tf32 products have the digits of one in fp32, on the tensor cores.
LOW_PRECISION = "tf32x3"


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float, tile: Tile | None = None) -> Tensor:
    """||W + scale B A||_row (out,) in fp32, without a gradient."""
    (N, K), R = W.shape, A.shape[0]
    blocks, launch = _launch.split(tile or _launch.tile("dora_norm", W.device, rank=R, N=N, K=K))
    blocks["BR"] = min(blocks["BR"], power_of_2(R, 16))
    A, B = A.float().contiguous(), B.float().contiguous()
    out = torch.empty(N, dtype=torch.float32, device=W.device)
    _launch.run(
        dora_norm_kernel, (cdiv(N, blocks["BN"]),),
        W, A, B, out, N, K, R, scale, W.stride(0), A.stride(0), B.stride(0),
        LOW=LOW_PRECISION, **blocks, **launch,
    )  # fmt: skip
    return out


def dora_epilogue(
    base: Tensor, h: Tensor, b: Tensor, bias: Tensor | None, g: Tensor, tile: Tile | None = None
) -> Tensor:
    """g (base + h b^T) + bias into base (M, N), for h (M, R) and b (N, R)."""
    (M, N), R = base.shape, h.shape[1]
    tile = tile or _launch.tile("dora_epilogue", base.device, rank=R, M=M, N=N)
    blocks, launch = _launch.split(tile)
    blocks["BR"] = min(blocks["BR"], power_of_2(R, 16))
    if M:
        _launch.run(
            dora_epilogue_kernel, (cdiv(M, blocks["BM"]), cdiv(N, blocks["BN"])),
            base, h, b, base if bias is None else bias.contiguous(), g, M, N, R,
            base.stride(0), h.stride(0), b.stride(0), HAS_BIAS=bias is not None,
            PRECISION=PRECISION, **blocks, **launch,
        )  # fmt: skip
    return base


def dora_small_gain(
    dY: Tensor, X: Tensor, h: Tensor, W: Tensor, b: Tensor, g: Tensor, dg: Tensor
) -> Tensor:
    """The gradient of every g with |g| < SMALL_GAIN, into dg (N,)."""
    (M, N), K, R = dY.shape, X.shape[1], h.shape[1]
    _launch.run(
        dora_small_gain_kernel, (N,),
        dY, X, h, W, b, g, dg, M, K, R, dY.stride(0), X.stride(0), h.stride(0), W.stride(0),
        b.stride(0), SMALL=SMALL_GAIN, BM=32, BK=128, BR=16, num_warps=4,
    )  # fmt: skip
    return dg


# -- the op ----------------------------------------------------------------------------------------


def dora_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, y) with h = x A^T and y = g (x W^T + h (scale B)^T) + bias."""
    X, g = flat(x), g.contiguous()
    h, b = narrow(X, A.to(x.dtype).T), scaled(B, scale, x.dtype)
    if plan("dora_forward", X, W, A.shape[0]) == "triton":
        y = gemm(X, W.T, h, b.T, bias, g)
    else:
        y = dora_epilogue(torch.mm(X, W.T), h, b, bias, g)
    y = shaped(y, x)
    return y, h, y


def dora_backward(
    dy: Tensor, x: Tensor, h: Tensor, y: Tensor, W: Tensor, bias: Tensor | None, A: Tensor,
    B: Tensor, g: Tensor, scale: float, needs: tuple[bool, ...],
) -> Grads:  # fmt: skip
    """Gradients of (x, W, bias, A, B, g); the norm inside g is a constant."""
    dY, X, g = readable(flat(dy)), flat(x), g.contiguous()
    b = scaled(B, scale, dy.dtype)
    gb = padded(g[:, None] * scale * B.float(), dy.dtype)
    found = _read_dy(dY, gb, h, scale, g, flat(y) if needs[5] else None, bias)
    dx = dA = None
    if needs[0]:
        by = plan("lora_backward", X, W, A.shape[0])
        low = A.to(dy.dtype).contiguous()
        dx = product(present(found.gdY), W, found.dS, low, None, by).view(x.shape)
    dW = (present(found.gdY).T @ X).to(W.dtype) if needs[1] else None
    dbias = dY.sum(0) if needs[2] else None
    if needs[3]:
        dA = over_rows(X, found.dS, A.new_empty(A.shape), transposed=True)
    dB = found.dB.to(B.dtype) if needs[4] else None
    dg = dora_small_gain(dY, X, h, W, b, g, present(found.dg)).to(g.dtype) if needs[5] else None
    return dx, dW, dbias, dA, dB, dg


def _read_dy(
    dY: Tensor, gb: Tensor, h: Tensor, scale: float, g: Tensor, y: Tensor | None,
    bias: Tensor | None,
) -> FromDY:  # fmt: skip
    """One reading of dY; two where the rank is too large for its registers."""
    if gb.shape[1] <= SPLIT_RANK:
        return dy_pass(dY, gb, h, scale, g, y, bias)
    b, h1 = gb[:, :1].contiguous(), h[:, :1].contiguous()  # only g dY and dg are taken from it
    part = dy_pass(dY, b, h1, scale, g, y, bias)
    out = torch.empty(gb.shape, dtype=torch.float32, device=gb.device)
    dB = over_rows(dY, h, out, transposed=False, factor=scale, scale=g)
    return FromDY(narrow(dY, gb), dB, part.gdY, part.dg)
