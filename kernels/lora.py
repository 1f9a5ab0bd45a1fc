"""LoRA on Triton: y = x W^T + h (s B)^T + bias with h = x A^T, and its gradients.

The functions at the end have the signatures of their twins in `lean.py` and hold the same for the
backward: x and h. The scale goes on B, in fp32 before its one rounding, so that it costs no second
accumulator and cannot overflow h. Nothing is added atomically: a sum that is split over programs
leaves its parts in fp32, and `sum_parts` adds them in order, so every run gives the same bits.

    narrow     out = x w for a w of few columns: h = x A^T and dS = dY (s B)
    gemm       out = x w + s b, whose last product is low-rank: y, and dX = dY W + dS A
    dy_pass    dS = dY (s B) and dB = s dY^T h (and DoRA's g dY and dg) in one reading of dY
    over_rows  out = z^T h, a sum over the tokens: dA = dS^T x, and dB where the rank is large

Two plans for a product with a low-rank part, by the table: "cublas" writes the low-rank product
first and lets cuBLAS add x W^T onto it, so that the output is rounded once more only in the size of
the update and the bias; "triton" does both in one kernel.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from structadapt.kernels import _launch
from structadapt.kernels._interpreter import interpreting, repair
from structadapt.kernels._launch import Tile, cdiv, power_of_2
from structadapt.kernels.lean import Grads, Tensors, by_layer, flat, shaped

if interpreting():
    repair()


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def narrow_kernel(
    x, w, out, M, K, R, RO, span, sxm, swk, swr, sop,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, m, r] = sum over part's k of x[m, k] w[k, r]; a part is `span` of the K.

    out has RO columns, those from R on 0.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    first = part * span
    last = tl.minimum(first + span, K)
    k = first + tl.arange(0, BK)
    px = x + m.to(tl.int64)[:, None] * sxm + k[None, :]
    pw = w + k.to(tl.int64)[:, None] * swk + r[None, :] * swr
    acc = tl.zeros((BM, BR), tl.float32)
    for k0 in range(first, last, BK):
        inside = tl.arange(0, BK) < last - k0
        a = tl.load(px, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(pw, mask=inside[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        px += BK
        pw += BK * swk
    po = out + part.to(tl.int64) * sop + m.to(tl.int64)[:, None] * RO + r[None, :]
    tl.store(po, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (r < RO)[None, :])


@triton.jit
def _place(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile; GROUP_M rows of tiles share the columns' operand in L2."""
    in_group = GROUP_M * tiles_n
    group = pid // in_group
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % in_group) % rows, (pid % in_group) // rows


@triton.jit
def _finished(acc, g, bias, first, N, HAS_G: tl.constexpr, HAS_BIAS: tl.constexpr):
    """g acc + bias for the columns from `first` on."""
    n = first + tl.arange(0, acc.shape[1])
    if HAS_G:
        acc *= tl.load(g + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def gemm_kernel(
    x, w, s, b, bias, g, y, M, N, K, R, sxm, swk, swn, ssm, sbr, sbn, sym,
    HAS_BIAS: tl.constexpr, HAS_G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, n] = g[n] (sum_k x[m, k] w[k, n] + sum_r s[m, r] b[r, n]) + bias[n]."""
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)  # pyright: ignore
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    px = x + m.to(tl.int64)[:, None] * sxm + k[None, :]
    pw = w + k.to(tl.int64)[:, None] * swk + n.to(tl.int64)[None, :] * swn
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        inside = k < K - k0
        p = tl.load(px, mask=rows & inside[None, :], other=0.0)
        q = tl.load(pw, mask=inside[:, None] & columns, other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
        px += BK
        pw += BK * swk
    r = tl.arange(0, BR)
    ps = s + m.to(tl.int64)[:, None] * ssm + r[None, :]
    pb = b + r[:, None] * sbr + n.to(tl.int64)[None, :] * sbn
    for r0 in tl.range(0, R, BR, num_stages=1):  # no buffers of its own: the main loop has them
        inside = r < R - r0
        p = tl.load(ps, mask=rows & inside[None, :], other=0.0)
        q = tl.load(pb, mask=inside[:, None] & columns, other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
        ps += BR
        pb += BR * sbr
    acc = _finished(acc, g, bias, pid_n * BN, N, HAS_G, HAS_BIAS)
    py = y + m.to(tl.int64)[:, None] * sym + n[None, :]
    tl.store(py, acc.to(y.dtype.element_ty), mask=rows & columns)


@triton.jit
def gemm_tma_kernel(
    x, w, s, b, bias, g, y, M, N, K, R,
    W_IS_NK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_G: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The same with the tensor memory accelerator: x, w, s, b and y are descriptors.

    The programs walk over the tiles. W_IS_NK: w is (N, K) and b (N, R), else w is (K, N) and
    b (R, N). The low-rank product comes last and unpipelined, and the output leaves in EPILOGUE
    pieces: both keep shared memory for the stages of the main loop.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for pid in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = _place(pid, tiles_m, tiles_n, GROUP_M)  # pyright: ignore
        m, n = pid_m * BM, pid_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            p = x.load([m, k])
            q = w.load([n, k]).T if W_IS_NK else w.load([k, n])
            acc = tl.dot(p, q, acc)
        for r in tl.range(0, R, BR, num_stages=1):
            p = s.load([m, r])
            q = b.load([n, r]).T if W_IS_NK else b.load([r, n])
            acc = tl.dot(p, q, acc)
        if EPILOGUE == 2:
            halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            y.store([m, n], _finished(left, g, bias, n, N, HAS_G, HAS_BIAS).to(y.dtype))
            n += BN // 2
            y.store([m, n], _finished(right, g, bias, n, N, HAS_G, HAS_BIAS).to(y.dtype))
        else:
            y.store([m, n], _finished(acc, g, bias, n, N, HAS_G, HAS_BIAS).to(y.dtype))


@triton.jit
def dy_pass_kernel(
    dy, b, h, g, y, bias, ds, db, dg, gdy, M, N, R, RO, span,
    sdm, sbn, shm, sym, sgm, sdsp, sdbp, SMALL: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DG: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stripe of BN columns of dY, `span` of its rows (ds has RO columns, from R on 0):

    ds[stripe, m, r] = sum over the stripe's n of dy[m, n] b[n, r]      (b holds s B, or g s B)
    db[part, n, r]   = sum over the part's m of dy[m, n] h[m, r]
    HAS_G: gdy = g dy.  HAS_DG: dg[part, n] = sum of dy (y - bias) / g where |g| >= SMALL, else 0.
    """
    stripe, part = tl.program_id(0), tl.program_id(1)
    n = stripe * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    columns = n < N
    first = part * span
    last = tl.minimum(first + span, M)
    pb = b + n.to(tl.int64)[:, None] * sbn + r[None, :]
    low = tl.load(pb, mask=columns[:, None] & (r < R)[None, :], other=0.0)
    acc = tl.zeros((BN, BR), tl.float32)
    if HAS_G:
        gain = tl.load(g + n, mask=columns, other=1.0).to(tl.float32)
    if HAS_DG:
        moved = tl.zeros((BM, BN), tl.float32)  # summed at the end: across warps it is slow
        inverse = tl.where(tl.abs(gain) >= SMALL, 1.0 / tl.where(gain == 0, 1.0, gain), 0.0)
        if HAS_BIAS:
            shift = tl.load(bias + n, mask=columns, other=0.0).to(tl.float32)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        rows = m < last
        inside = rows[:, None] & columns[None, :]
        long = m.to(tl.int64)[:, None]
        if HAS_DG:  # before the products, which hide its way
            out = tl.load(y + long * sym + n[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + long * sdm + n[None, :], mask=inside, other=0.0)
        part_s = tl.dot(d, low, input_precision=PRECISION)
        ps = ds + stripe.to(tl.int64) * sdsp + long * RO + r[None, :]
        tl.store(ps, part_s, mask=rows[:, None] & (r < RO)[None, :])
        t = tl.load(h + long * shm + r[None, :], mask=rows[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(d.T, t, acc, input_precision=PRECISION)
        if HAS_G:
            wide = d.to(tl.float32)
            pg = gdy + long * sgm + n[None, :]
            tl.store(pg, (wide * gain[None, :]).to(gdy.dtype.element_ty), mask=inside)
            if HAS_DG:
                if HAS_BIAS:
                    out -= shift[None, :]
                out = tl.where(inside & (tl.abs(gain) >= SMALL)[None, :], out, 0.0)
                moved += wide * out
    pdb = db + part.to(tl.int64) * sdbp + n.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(pdb, acc, mask=columns[:, None] & (r < R)[None, :])
    if HAS_DG:
        tl.store(dg + part.to(tl.int64) * N + n, tl.sum(moved, 0) * inverse, mask=columns)


@triton.jit
def over_rows_kernel(
    z, h, out, M, C, R, span, szm, shm, sop, soc, sor,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, c, r] = sum over the part's m of z[m, c] h[m, r]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    first = part * span
    last = tl.minimum(first + span, M)
    acc = tl.zeros((BC, BR), tl.float32)
    for m0 in range(first, last, BM):
        m = m0 + tl.arange(0, BM)
        rows = (m < last)[:, None]
        long = m.to(tl.int64)[:, None]
        p = tl.load(z + long * szm + c[None, :], mask=rows & (c < C)[None, :], other=0.0)
        q = tl.load(h + long * shm + r[None, :], mask=rows & (r < R)[None, :], other=0.0)
        acc = tl.dot(p.T, q, acc, input_precision=PRECISION)
    po = (
        out
        + part.to(tl.int64) * sop
        + c.to(tl.int64)[:, None] * soc
        + r.to(tl.int64)[None, :] * sor
    )
    tl.store(po, acc, mask=(c < C)[:, None] & (r < R)[None, :])


@triton.jit
def sum_parts_kernel(
    parts, scale, out, P, n, factor, per,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """out[i] = factor (times scale[i // per]) times the sum of parts[p, i], GROUP parts at a time.

    ROOT: the root of the sum.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.zeros((BLOCK,), tl.float32)
    for p0 in range(0, P, GROUP):
        p = p0 + tl.arange(0, GROUP)
        at = parts + p.to(tl.int64)[:, None] * n + i[None, :]
        total += tl.sum(tl.load(at, mask=(p < P)[:, None] & inside[None, :], other=0.0), 0)
    if ROOT:
        total = tl.sqrt(total)
    total *= factor
    if SCALED:
        total *= tl.load(scale + i // per, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def digits_kernel(
    t, g, out, size, rows, columns, wide, scale,
    HAS_G: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum over d of out[d, r, c] = scale (g[r]) t, each rounded to the dtype of out; 0 outside t.

    `wide` columns and `size` numbers of each out[d].
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r, c = i // wide, i % wide
    rest = tl.load(t + r * columns + c, mask=(r < rows) & (c < columns), other=0.0)
    rest = rest.to(tl.float32) * scale
    if HAS_G:
        rest *= tl.load(g + r, mask=r < rows, other=0.0).to(tl.float32)
    for d in tl.static_range(DIGITS):  # pyright: ignore
        digit = rest.to(out.dtype.element_ty)
        tl.store(out + d * size.to(tl.int64) + i, digit, mask=i < size)
        rest -= digit.to(tl.float32)


# -- launches --------------------------------------------------------------------------------------

PRECISION = "ieee"  # of the fp32 operands of the interpreter and of `digits` alone
SPLIT_RANK = 64  # the largest rank that the one pass over dY keeps in registers


def sum_parts(
    parts: Tensor, out: Tensor, factor: float = 1.0, scale: Tensor | None = None,
    root: bool = False,
) -> Tensor:  # fmt: skip
    """out = factor * scale[row] * parts.sum(0), or its root; parts (P, *out.shape), fp32."""
    n, block = out.numel(), 512
    if n:
        per = n // out.shape[0]
        _launch.run(
            sum_parts_kernel, (cdiv(n, block),),
            parts, out if scale is None else scale, out, parts.shape[0], n, factor, per,
            BLOCK=block, GROUP=8, SCALED=scale is not None, ROOT=root, num_warps=4,
        )  # fmt: skip
    return out


def digits(
    t: Tensor, n: int, shape: tuple[int, int], scale: float, dtype: torch.dtype = torch.bfloat16,
    g: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """n tensors (n, *shape) of `dtype` that add up to scale g[row] t, zeros beside t."""
    t, out = t.contiguous(), torch.empty(n, *shape, dtype=dtype, device=t.device)
    size, block = math.prod(shape), 1024
    _launch.run(
        digits_kernel, (cdiv(size, block),),
        t, t if g is None else g.contiguous(), out, size, *t.shape, shape[1], scale,
        HAS_G=g is not None, DIGITS=n, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def by_cublas(tile: Tile, x: Tensor) -> bool:
    """Whether the table gives a product to cuBLAS."""
    return x.is_cuda and tile.get("by") == "cublas"


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32)


def narrow(x: Tensor, w: Tensor, tile: Tile | None = None) -> Tensor:
    """x (M, K) @ w (K, R) in the dtype of x, for a w of few columns (any strides)."""
    (M, K), R = x.shape, w.shape[1]
    sizes = {"rank": R, "M": M, "K": K}
    tile = tile or _launch.tile("narrow", x.device, **sizes)
    RO = cdiv(R, 8) * 8  # rows of 16 bytes, which descriptors and wide loads ask for
    out = x.new_empty(M, RO)
    if not M or not K:
        return out.zero_()[:, :R]
    if by_cublas(tile, x):
        return torch.mm(x, w, out=out[:, :R])
    blocks, launch = _launch.split(tile)
    blocks["BR"] = min(blocks["BR"], power_of_2(R, 16))
    grid_m, grid_r = cdiv(M, blocks["BM"]), cdiv(R, blocks["BR"])
    parts, span = parts_of(K, 2 * blocks["BK"], grid_m * grid_r, x.device)
    target = out if parts == 1 else x.new_empty(parts, M, RO, dtype=torch.float32)
    _launch.run(
        narrow_kernel, (grid_m, grid_r, parts),
        x, w, target, M, K, R, RO, span, x.stride(0), w.stride(0), w.stride(1), M * RO,
        PRECISION=PRECISION, **blocks, **launch,
    )  # fmt: skip
    return (out if parts == 1 else sum_parts(target, out))[:, :R]


def gemm(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None = None,
    g: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """g (x w + s b) + bias in one kernel: x (M, K), w (K, N), s (M, R), b (R, N), all views."""
    (M, K), N, R = x.shape, w.shape[1], s.shape[1]
    tile = tile or _launch.tile("gemm", x.device, rank=R, M=M, N=N, K=K)
    blocks, launch = _launch.split(tile)
    blocks["BR"] = min(blocks["BR"], power_of_2(R, 16))
    y = x.new_empty(M, N)
    if not M or not N:
        return y
    flags = {"HAS_BIAS": bias is not None, "HAS_G": g is not None}
    tiles = cdiv(M, blocks["BM"]) * cdiv(N, blocks["BN"])
    extra = [y if t is None else t.contiguous() for t in (bias, g)]
    if "EPILOGUE" in blocks:
        nk = w.stride(0) == 1  # w and b are the transposed views of (N, K) and (N, R)
        w, b = (w.T, b.T) if nk else (w, b)
        BM, BN, BK, BR = (blocks[k] for k in ("BM", "BN", "BK", "BR"))
        shapes = {
            "x": (x, (BM, BK)), "w": (w, (BN, BK) if nk else (BK, BN)), "s": (s, (BM, BR)),
            "b": (b, (BN, BR) if nk else (BR, BN)), "y": (y, (BM, BN // blocks["EPILOGUE"])),
        }  # fmt: skip
        made = {k: TensorDescriptor.from_tensor(t, list(block)) for k, (t, block) in shapes.items()}
        programs = min(tiles, _multiprocessors(x.device))
        _launch.run(
            gemm_tma_kernel, (programs,),
            made["x"], made["w"], made["s"], made["b"], *extra, made["y"], M, N, K, R,
            W_IS_NK=nk, **flags, **blocks, **launch,
        )  # fmt: skip
        return y
    _launch.run(
        gemm_kernel, (tiles,),
        x, w, s, b, *extra, y, M, N, K, R, x.stride(0), w.stride(0), w.stride(1), s.stride(0),
        b.stride(0), b.stride(1), y.stride(0), PRECISION=PRECISION, **flags, **blocks, **launch,
    )  # fmt: skip
    return y


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: few, so that a program walks over several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def over_rows(
    z: Tensor, h: Tensor, out: Tensor, *, transposed: bool, factor: float = 1.0,
    scale: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """factor * scale[row] * z^T h (C, R) for z (M, C) and h (M, R); `transposed`: (R, C).

    A sum over the tokens: split over them, then added in order. Mostly in `out`.
    """
    (M, C), R = z.shape, h.shape[1]
    tile = tile or _launch.tile("over_rows", z.device, rank=R, M=M, K=C)
    if not M:
        return out.zero_()
    if by_cublas(tile, z):
        found = wide_mm(h.T, z) if transposed else wide_mm(z.T, h)
        if factor != 1.0:
            found.mul_(factor)
        if scale is not None:
            found.mul_(scale[:, None])
        return found if out.dtype == found.dtype else out.copy_(found)
    blocks, launch = _launch.split(tile)
    blocks["BR"] = min(blocks["BR"], power_of_2(R, 16))
    grid = cdiv(C, blocks["BC"]), cdiv(R, blocks["BR"])
    parts, span = parts_of(M, blocks["BM"], grid[0] * grid[1], z.device)
    target = z.new_empty(parts, *out.shape, dtype=torch.float32)
    soc, sor = (1, C) if transposed else (R, 1)
    _launch.run(
        over_rows_kernel, (*grid, parts),
        z, h, target, M, C, R, span, z.stride(0), h.stride(0), C * R, soc, sor,
        PRECISION=PRECISION, **blocks, **launch,
    )  # fmt: skip
    return sum_parts(target, out, factor, scale)


@dataclass(frozen=True)
class FromDY:
    """What one reading of dY gives."""

    dS: Tensor  # (M, R) = dY b, in the dtype of dY
    dB: Tensor  # (N, R) = factor * g * dY^T h, in fp32
    gdY: Tensor | None  # (M, N) = g dY
    parts_g: Tensor | None  # (P, N): sums of dY (y - bias) / g where |g| >= SMALL_GAIN, else 0


SMALL_GAIN = 0.0625  # below it the output holds too few digits of what g multiplied


def dy_pass(
    dY: Tensor, b: Tensor, h: Tensor, factor: float, g: Tensor | None = None,
    y: Tensor | None = None, bias: Tensor | None = None, tile: Tile | None = None,
) -> FromDY:  # fmt: skip
    """dS, dB, with g also g dY, with y the gradient of g in parts; b (N, R), h (M, R), R <= 64."""
    (M, N), R = dY.shape, b.shape[1]
    sizes = {"rank": R, "M": M, "N": N, "gain": 1 if g is None else 2}
    tile = tile or _launch.tile("dy_pass", dY.device, **sizes)
    blocks, launch = _launch.split(tile)
    BR, RO = power_of_2(R, 16), cdiv(R, 8) * 8
    fp32 = {"dtype": torch.float32, "device": dY.device}
    gdY = None if g is None else torch.empty_like(dY)
    dS, dB = dY.new_empty(M, RO), torch.empty(N, R, **fp32)
    if not M:
        none = None if y is None else torch.zeros(1, N, **fp32)
        return FromDY(dS[:, :R], dB.zero_(), gdY, none)
    stripes = cdiv(N, blocks["BN"])
    parts, span = parts_of(M, blocks["BM"], stripes, dY.device, tile.get("waves", 2))
    part_s = torch.empty(stripes, M, RO, **fp32)
    part_b = torch.empty(parts, N, R, **fp32)
    part_g = None if y is None else torch.empty(parts, N, **fp32)
    g, bias_ = (dY if t is None else t.contiguous() for t in (g, bias))
    gdY_, y_, part_g_ = (dY if t is None else t for t in (gdY, y, part_g))
    _launch.run(
        dy_pass_kernel, (stripes, parts),
        dY, b, h, g, y_, bias_, part_s, part_b, part_g_, gdY_, M, N, R, RO, span, dY.stride(0),
        b.stride(0), h.stride(0), y_.stride(0), gdY_.stride(0), M * RO, N * R,
        SMALL=SMALL_GAIN, HAS_G=gdY is not None, HAS_DG=y is not None, HAS_BIAS=bias is not None,
        BR=BR, PRECISION=PRECISION, **blocks, **launch,
    )  # fmt: skip
    sum_parts(part_s, dS)
    sum_parts(part_b, dB, factor, None if gdY is None else g)
    return FromDY(dS[:, :R], dB, gdY, part_g)


def parts_of(
    rows: int, block: int, others: int, device: torch.device, waves: int = 2
) -> tuple[int, int]:
    """(how many parts, rows of each) for a sum over `rows`."""
    span = cdiv(cdiv(rows, _launch.splits(rows, 2 * block, others, device, waves)), block) * block
    return cdiv(rows, span), span


# -- the op ----------------------------------------------------------------------------------------


def plan(op: str, x: Tensor, W: Tensor, rank: int) -> str:
    """`cublas` or `triton`, by the table: for "lora_forward", "lora_backward", "dora_forward"."""
    M, (N, K) = x.shape[0], W.shape
    return str(_launch.tile(op, x.device, rank=rank, M=M, N=N, K=K)["plan"])


def product(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, by: str) -> Tensor:
    """x w + s b + bias, the low-rank product first or in the same kernel."""
    if by == "triton":
        return gemm(x, w, s, b, bias)
    low = torch.mm(s, b) if bias is None else torch.addmm(bias.to(x.dtype), s, b)
    return low.addmm_(x, w)


def scaled(B: Tensor, scale: float, dtype: torch.dtype, g: Tensor | None = None) -> Tensor:
    """scale g[row] B (N, R), multiplied in fp32 and rounded once; rows at multiples of 16 bytes."""
    N, R = B.shape
    return digits(B, 1, (N, cdiv(R, 8) * 8), scale, dtype, g)[0, :, :R]


def padded(t: Tensor) -> Tensor:
    """A copy of t (n, R) whose rows start at multiples of 16 bytes."""
    n, R = t.shape
    return t.new_empty(n, cdiv(R, 8) * 8)[:, :R].copy_(t)


def lora_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, h) with h = x A^T and y = x W^T + h (scale B)^T + bias."""
    X = flat(x)
    h = narrow(X, A.to(x.dtype).T)
    by = plan("lora_forward", X, W, A.shape[0])
    return shaped(product(X, W.T, h, scaled(B, scale, x.dtype).T, bias, by), x), h


def lora_backward(
    dy: Tensor, x: Tensor, h: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float,
    needs: tuple[bool, ...],
) -> Grads:  # fmt: skip
    """Gradients of (x, W, bias, A, B)."""
    dY, X = readable(flat(dy)), flat(x)
    dS, dB = low_gradients(
        dY, scaled(B, scale, dy.dtype), h, scale, any((needs[0], needs[3])), needs[4]
    )
    dx = dA = None
    if needs[0]:
        by = plan("lora_backward", X, W, A.shape[0])
        low = readable(A.to(dy.dtype))
        dx = product(dY, W, present(dS), low, None, by).view(x.shape)
    dW = (dY.T @ X).to(W.dtype) if needs[1] else None
    dbias = dY.sum(0) if needs[2] else None
    if needs[3]:
        dA = over_rows(X, present(dS), A.new_empty(A.shape), transposed=True)
    return dx, dW, dbias, dA, None if dB is None else dB.to(B.dtype)


def lora_shared_forward(
    x: Tensor, Ws: Tensors, biases: list[Tensor | None], As: Tensors, Bs: Tensors,
    scales: list[float],
) -> tuple[Tensors, Tensor]:  # fmt: skip
    """([y, ...], h (M, r1 + r2 + ...)) of layers that read the same x, once for all of their h."""
    X = flat(x)
    h = narrow(X, torch.cat([*As]).to(x.dtype).T)
    ys = []
    for W, bias, B, scale, part in zip(Ws, biases, Bs, scales, by_layer(h, As), strict=True):
        part = part if _launch.misfit(part) is None else padded(part)
        by = plan("lora_forward", X, W, B.shape[1])
        ys.append(shaped(product(X, W.T, part, scaled(B, scale, x.dtype).T, bias, by), x))
    return ys, h


def lora_shared_backward(
    dys: Tensors, x: Tensor, h: Tensor, Ws: Tensors, As: Tensors, Bs: Tensors,
    scales: list[float], need_x: bool,
) -> tuple[Tensor | None, Tensors, Tensors]:  # fmt: skip
    """(dx, [dA, ...], [dB, ...]); x is read once for all of dA, and dx is added up in place."""
    X, dYs = flat(x), [readable(flat(dy)) for dy in dys]
    found = [
        low_gradients(dY, scaled(B, scale, x.dtype), part, scale, True, True)
        for dY, B, scale, part in zip(dYs, Bs, scales, by_layer(h, As), strict=True)
    ]
    dS = torch.cat([present(s) for s, _ in found], 1)
    dx = None
    if need_x:
        dx = dS @ torch.cat([*As]).to(x.dtype)
        for dY, W in zip(dYs, Ws, strict=True):
            dx.addmm_(dY, W)
        dx = dx.view(x.shape)
    dA = over_rows(X, dS, torch.empty_like(torch.cat([*As])), transposed=True)
    dAs = dA.split([len(A) for A in As])
    return dx, dAs, [present(b).to(B.dtype) for (_, b), B in zip(found, Bs, strict=True)]


def low_gradients(
    dY: Tensor, b: Tensor, h: Tensor, factor: float, need_s: bool, need_b: bool,
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dY b (M, R) and factor dY^T h (N, R): in one reading of dY where that is faster."""
    (M, N), R = dY.shape, b.shape[1]
    tile = tile or _launch.tile("dy_pass", dY.device, rank=R, M=M, N=N, gain=1)
    if need_s and need_b and R <= SPLIT_RANK and not by_cublas(tile, dY):
        found = dy_pass(dY, b, h, factor, tile=tile)
        return found.dS, found.dB
    dS = narrow(dY, b) if need_s else None
    dB = None
    if need_b:
        out = torch.empty(b.shape, dtype=torch.float32, device=b.device)
        dB = over_rows(dY, h, out, transposed=False, factor=factor)
    return dS, dB


def present(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def readable(t: Tensor) -> Tensor:
    """t (M, n), copied if it cannot be read in 16-byte pieces: a gradient has any strides."""
    return t if _launch.misfit(t) is None else t.clone(memory_format=torch.contiguous_format)
