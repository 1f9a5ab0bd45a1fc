"""DoRA on Triton: y = g (x W^T + h (s B)^T) + bias with g = m / ||W + s B A||_row.

The functions at the end have the signatures of their twins in `lean.py`. Held for the backward: x,
h = x A^T and the output y itself, which the next operation mostly keeps alive anyway: the gradient
of g is the sum of dY (y - bias) / g. Where |g| is so small, or the bias so large, that y has lost
the digits of what g multiplied, those columns are worked out again. The magnitude is applied in
fp32 in the epilogue.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from structadapt.kernels import _launch
from structadapt.kernels._launch import Tile, cdiv, power_of_2
from structadapt.kernels.lean import LARGE_BIAS, Grads, flat, shaped
from structadapt.kernels.lora import (
    PRECISION,
    SMALL_GAIN,
    SPLIT_RANK,
    FromDY,
    digits,
    dy_pass,
    gemm,
    narrow,
    over_rows,
    parts_of,
    plan,
    present,
    product,
    readable,
    scaled,
    sum_parts,
)

# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _plus_low(v, pa, pb, inside, columns, sad, sbd, DIGITS: tl.constexpr):
    """v + b a, from the digits of both, without products below the last digit."""
    p0, p1 = tl.load(pb, mask=inside, other=0.0), tl.load(pb + sbd, mask=inside, other=0.0)
    q0, q1 = tl.load(pa, mask=columns, other=0.0), tl.load(pa + sad, mask=columns, other=0.0)
    v = tl.dot(p0, q0, v)
    v = tl.dot(p0, q1, v)
    v = tl.dot(p1, q0, v)
    if DIGITS == 3:
        v = tl.dot(p1, q1, v)
        v = tl.dot(p0, tl.load(pa + 2 * sad, mask=columns, other=0.0), v)
        v = tl.dot(tl.load(pb + 2 * sbd, mask=inside, other=0.0), q0, v)
    return v


@triton.jit
def dora_norm_kernel(
    w, a, b, out, N, K, R, span, swn, sad, sbd, DIGITS: tl.constexpr, ONE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[part, n] = sum over the part's k of (w + b a)[n, k]^2: no V in memory, no cancellation.

    a (DIGITS, R, K) and b (DIGITS, N, R), R a multiple of BR. ONE: R is BR.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    first = part * span
    last = tl.minimum(first + span, K)
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    rows = (n < N)[:, None]
    pw = w + n.to(tl.int64)[:, None] * swn + k[None, :]
    pb = b + n.to(tl.int64)[:, None] * R + r[None, :]
    pa = a + r.to(tl.int64)[:, None] * K + k[None, :]
    square = tl.zeros((BN, BK), tl.float32)
    for k0 in range(first, last, BK):
        columns = (k < last - k0)[None, :]
        v = tl.load(pw + k0, mask=rows & columns, other=0.0).to(tl.float32)
        if ONE:
            v = _plus_low(v, pa + k0, pb, rows, columns, sad, sbd, DIGITS)
        else:
            pr = pa + k0
            for r0 in range(0, R, BR):
                v = _plus_low(v, pr, pb + r0, rows, columns, sad, sbd, DIGITS)
                pr += BR * K
        square += v * v
    tl.store(out + part.to(tl.int64) * N + n, tl.sum(square, 1), mask=n < N)


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
def dora_lost_kernel(
    dy, x, h, w, b, bias, g, y, parts, M, N, K, R, span, step,
    sdm, sxm, shm, swn, sbn, sym, HAS_BIAS: tl.constexpr, SMALL: tl.constexpr, LARGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[part, n] = sum over the part's m of dy[m, n] (x[m] . w[n] + h[m] . b[n])

    for the columns whose output lost what g multiplied: |g| < SMALL, or a bias LARGE times the mean
    |y - bias| of BM rows, `step` apart. Programs without such a column leave at once.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    columns = n < N
    lost = tl.abs(tl.load(g + n, mask=columns, other=1.0).to(tl.float32)) < SMALL
    if HAS_BIAS:
        m = tl.arange(0, BM) * step
        sample = (m < M)[:, None] & columns[None, :]
        shift = tl.load(bias + n, mask=columns, other=0.0).to(tl.float32)
        out = tl.load(y + m.to(tl.int64)[:, None] * sym + n[None, :], mask=sample, other=0.0)
        out = tl.where(sample, tl.abs(out.to(tl.float32) - shift[None, :]), 0.0)
        typical = tl.sum(out, 0) / tl.sum((m < M).to(tl.float32), 0)
        lost |= tl.abs(shift) > LARGE * typical
    if tl.sum(lost.to(tl.int32), 0) == 0:
        return
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    long = n.to(tl.int64)[:, None]
    total = tl.zeros((BN,), tl.float32)
    first = part * span
    last = tl.minimum(first + span, M)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        rows = (m < last)[:, None]
        at = m.to(tl.int64)[:, None]
        u = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            inside = (k < K - k0)[None, :]
            p = tl.load(x + at * sxm + k0 + k[None, :], mask=rows & inside, other=0.0)
            q = tl.load(w + long * swn + k0 + k[None, :], mask=columns[:, None] & inside, other=0.0)
            u = tl.dot(p, q.T, u, input_precision=PRECISION)
        for r0 in range(0, R, BR):
            inside = (r < R - r0)[None, :]
            p = tl.load(h + at * shm + r0 + r[None, :], mask=rows & inside, other=0.0)
            q = tl.load(b + long * sbn + r0 + r[None, :], mask=columns[:, None] & inside, other=0.0)
            u = tl.dot(p, q.T, u, input_precision=PRECISION)
        d = tl.load(dy + at * sdm + n[None, :], mask=rows & columns[None, :], other=0.0)
        total += tl.sum(d.to(tl.float32) * u, 0)
    tl.store(parts + part.to(tl.int64) * N + n, total, mask=columns & lost)


# -- launches --------------------------------------------------------------------------------------


# bf16 numbers that A and B are written as, for the tensor cores: two have 16 bits, so that B A is
# off by at most 2^-15 of |B| |A|, less than the rounding of W in bf16; three have all of fp32.
DIGITS = {torch.bfloat16: 2}


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float, tile: Tile | None = None) -> Tensor:
    """||W + scale B A||_row (out,) in fp32, without a gradient."""
    (N, K), R = W.shape, A.shape[0]
    tile = tile or _launch.tile("dora_norm", W.device, rank=R, N=N, K=K)
    blocks, launch = _launch.split(tile)
    n = DIGITS.get(W.dtype, 3)
    widest = blocks["BR"] if n == 2 else max(blocks["BR"] // 2, 16)  # a third one takes registers
    blocks["BR"] = min(widest, power_of_2(R, 16))
    RO = cdiv(R, blocks["BR"]) * blocks["BR"]
    a, b = digits(A, n, (RO, K), 1.0), digits(B, n, (N, RO), scale)
    grid = cdiv(N, blocks["BN"])
    parts, span = parts_of(K, blocks["BK"], grid, W.device, tile.get("waves", 2))
    squares = torch.empty(parts, N, dtype=torch.float32, device=W.device)
    _launch.run(
        dora_norm_kernel, (grid, parts),
        W, a, b, squares, N, K, RO, span, W.stride(0), RO * K, N * RO,
        DIGITS=n, ONE=blocks["BR"] == RO, **blocks, **launch,
    )  # fmt: skip
    return sum_parts(squares, squares.new_empty(N), root=True)


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


def gain_gradient(
    dY: Tensor, X: Tensor, h: Tensor, W: Tensor, b: Tensor, bias: Tensor | None, g: Tensor,
    y: Tensor, parts: Tensor,
) -> Tensor:  # fmt: skip
    """(N,): the sum of `parts` (P, N), worked out again for columns of which y holds too little.

    X (M, K), h (M, R), b (N, R) the scaled B, y (M, N) the output, `parts` as `dy_pass` leaves it.
    """
    (M, N), K, R, P = dY.shape, X.shape[1], h.shape[1], parts.shape[0]
    if not M:
        return parts.sum(0)
    blocks = {"BM": 64, "BN": 16, "BK": 64, "BR": 16}
    _launch.run(
        dora_lost_kernel, (cdiv(N, blocks["BN"]), P),
        dY, X, h, W, b, y if bias is None else bias.contiguous(), g, y, parts, M, N, K, R,
        cdiv(M, P), cdiv(M, blocks["BM"]), dY.stride(0), X.stride(0), h.stride(0), W.stride(0),
        b.stride(0), y.stride(0), HAS_BIAS=bias is not None, SMALL=SMALL_GAIN, LARGE=LARGE_BIAS,
        PRECISION=PRECISION, **blocks, num_warps=4,
    )  # fmt: skip
    return sum_parts(parts, parts.new_empty(N))


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
    gb = scaled(B, scale, dy.dtype, g)
    found = _read_dy(dY, gb, h, scale, g, flat(y) if needs[5] else None, bias)
    dx = dA = dg = None
    if needs[0]:
        by = plan("lora_backward", X, W, A.shape[0])
        low = readable(A.to(dy.dtype))
        dx = product(present(found.gdY), W, found.dS, low, None, by).view(x.shape)
    dW = (present(found.gdY).T @ X).to(W.dtype) if needs[1] else None
    dbias = dY.sum(0) if needs[2] else None
    if needs[3]:
        dA = over_rows(X, found.dS, A.new_empty(A.shape), transposed=True)
    dB = found.dB.to(B.dtype) if needs[4] else None
    if needs[5]:
        dg = gain_gradient(dY, X, h, W, b, bias, g, flat(y), present(found.parts_g)).to(g.dtype)
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
    return FromDY(narrow(dY, gb), dB, part.gdY, part.parts_g)
