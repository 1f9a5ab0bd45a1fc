"""QuanTA on Triton: the chain T x of gates on pairs of axes, and its gradients.

The functions at the end have the signatures of their twins in `lean_quanta.py` and hold the same
for the backward: x alone. A gate on the axes (b, a), b the earlier one, sees an activation
(M, d1 ... dN) as [M, O, b, I, a, T]. It is a matrix product with the rows (m, o, i, t), and every
kernel here reads and writes them where they lie: nothing is permuted in memory, zeros behind the
columns of x and outputs too many are masks.

    gate       one gate, square or rectangular, forward or (by the strides of w) transposed
    chain      all gates of 16 x 16 x 16 or 8 x 8 x 8 x 8, a few tokens a program, on chip
    gate_grad  dG = sum over the rows of r (x) t; r the gradient after the gate, t its input

With `minus_eye` the identity gates E (crop or zero-pad) are taken off: D = G - E, formed in the
dtype of the gates and rounded once. The chain carries the total d of what the gates have added,

    t = E x + d (rounded for the product),    d' = E d + D t,    at the end d = T x - E x,

and d is added in fp32. No two nearly equal numbers are subtracted. E x is never made: it is x at
the same multi-index where that is within every size met so far, else 0.

Between `gate` kernels the total is in the dtype of x, in `chain` it stays in fp32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from structadapt.kernels import _launch, reference
from structadapt.kernels._interpreter import interpreting, repair
from structadapt.kernels._launch import Tile, cdiv, power_of_2
from structadapt.kernels.lora import PRECISION, sum_parts

if interpreting():
    repair()

Sizes = tuple[int, ...]


# -- kernels ---------------------------------------------------------------------------------------
#
# Where the numbers of a tensor lie is constant in a kernel: SIZES are those of the axes that the
# gate leaves alone, the innermost first; strides are those of these axes, then of b, then of a.
# A WIDTH is the number of columns in memory where that is less than the axes make, else 0. Rows fit
# int32: the launches take `CHUNK_ELEMENTS` at a time.


@triton.jit
def _within(row, SIZES: tl.constexpr, STRIDES: tl.constexpr, NAXES: tl.constexpr):
    """The offset of a row within its token."""
    offset = row * 0
    for j in tl.static_range(NAXES):  # pyright: ignore
        offset += row % SIZES[j] * STRIDES[j]
        row = row // SIZES[j]
    return offset


@triton.jit
def _below(row, SIZES: tl.constexpr, LIMITS: tl.constexpr, NAXES: tl.constexpr):
    """Whether every axis of a row is below its limit."""
    inside = row >= 0
    for j in tl.static_range(NAXES):  # pyright: ignore
        if LIMITS[j] < SIZES[j]:
            inside = inside & (row % SIZES[j] < LIMITS[j])
        row = row // SIZES[j]
    return inside


@triton.jit
def _operand(
    t, x, m, row, b, a, rows, columns, stm, sxm,
    SIZES: tl.constexpr, T: tl.constexpr, X: tl.constexpr, LIMITS: tl.constexpr,
    NAXES: tl.constexpr, T_WIDTH: tl.constexpr, X_WIDTH: tl.constexpr, PLUS_X: tl.constexpr,
):  # fmt: skip
    """t [rows, (b, a)], or with PLUS_X t + E x rounded to their dtype; 0 where masked.

    LIMITS: what is within E, for the axes of the row, then b, then a.
    """
    long = m.to(tl.int64)[:, None]
    inside = rows[:, None] & columns[None, :]
    at = _within(row, SIZES, T, NAXES)[:, None] + (b * T[NAXES] + a * T[NAXES + 1])[None, :]
    mask = inside
    if T_WIDTH:
        mask = mask & (at < T_WIDTH)
    tile = tl.load(t + long * stm + at, mask=mask, other=0.0)
    if PLUS_X:
        at = _within(row, SIZES, X, NAXES)[:, None] + (b * X[NAXES] + a * X[NAXES + 1])[None, :]
        rows = rows & _below(row, SIZES, LIMITS, NAXES)
        columns = columns & (b < LIMITS[NAXES]) & (a < LIMITS[NAXES + 1])
        inside = rows[:, None] & columns[None, :]
        if X_WIDTH:
            inside = inside & (at < X_WIDTH)
        source = tl.load(x + long * sxm + at, mask=inside, other=0.0)
        tile = (tile.to(tl.float32) + source.to(tl.float32)).to(t.dtype.element_ty)
    return tile


@triton.jit
def gate_kernel(
    t, x, w, out, M, stm, sxm, swn, swk, som,
    SIZES: tl.constexpr, T: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr,
    LIMITS: tl.constexpr, NAXES: tl.constexpr, PER: tl.constexpr,
    B: tl.constexpr, A: tl.constexpr, OUT_B: tl.constexpr, OUT_A: tl.constexpr,
    T_WIDTH: tl.constexpr, X_WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr,
    PLUS_X: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, o, n_b, i, n_a, t] = sum over (b, a) of w[(n_b, n_a), (b, a)] t[m, o, b, i, a, t].

    PLUS_X: t is the total d; E x is added to what is multiplied, and E d to the result.
    PER: rows of a token.
    """
    K: tl.constexpr = B * A
    N: tl.constexpr = OUT_B * OUT_A
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    row = pid // tiles_n * BM + tl.arange(0, BM)  # neighbours share the rows, in L2
    n = pid % tiles_n * BN + tl.arange(0, BN)
    m = row // PER
    rows, columns = m < M, n < N
    long = m.to(tl.int64)[:, None]
    n_b, n_a = n // OUT_A, n % OUT_A
    at = (
        _within(row, SIZES, OUT, NAXES)[:, None]
        + (n_b * OUT[NAXES] + n_a * OUT[NAXES + 1])[None, :]
    )
    target = out + long * som + at
    inside = rows[:, None] & columns[None, :]
    if OUT_WIDTH:
        inside = inside & (at < OUT_WIDTH)
    if PLUS_X:
        kept = columns & (n_b < B) & (n_a < A)
        at = _within(row, SIZES, T, NAXES)[:, None] + (n_b * T[NAXES] + n_a * T[NAXES + 1])[None, :]
        acc = tl.load(t + long * stm + at, mask=rows[:, None] & kept[None, :], other=0.0)
        acc = acc.to(tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        p = _operand(
            t, x, m, row, k // A, k % A, rows, k < K, stm, sxm,
            SIZES, T, X, LIMITS, NAXES, T_WIDTH, X_WIDTH, PLUS_X,
        )  # fmt: skip
        pw = w + k[:, None] * swk + n[None, :] * swn
        q = tl.load(pw, mask=(k < K)[:, None] & columns[None, :], other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_grad_kernel(
    r, y, t, x, out, M, span, srm, sym, stm, sxm,
    SIZES: tl.constexpr, R: tl.constexpr, Y: tl.constexpr, T: tl.constexpr, X: tl.constexpr,
    R_LIMITS: tl.constexpr, T_LIMITS: tl.constexpr, NAXES: tl.constexpr, PER: tl.constexpr,
    B: tl.constexpr, A: tl.constexpr, OUT_B: tl.constexpr, OUT_A: tl.constexpr,
    R_WIDTH: tl.constexpr, Y_WIDTH: tl.constexpr, T_WIDTH: tl.constexpr, X_WIDTH: tl.constexpr,
    PLUS_Y: tl.constexpr, PLUS_X: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, n, k] = sum over the part's rows of (r + E y)[row, n] (t + E x)[row, k].

    n = (n_b, n_a) after the gate, k = (b, a) before it. A part is `span` rows.
    """
    K: tl.constexpr = B * A
    N: tl.constexpr = OUT_B * OUT_A
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile // tiles_k * BN + tl.arange(0, BN)
    k = tile % tiles_k * BK + tl.arange(0, BK)
    first = part * span
    last = tl.minimum(first + span, M * PER)
    acc = tl.zeros((BN, BK), tl.float32)
    for row0 in range(first, last, BM):
        row = row0 + tl.arange(0, BM)
        rows = row < last
        m = row // PER
        p = _operand(
            r, y, m, row, n // OUT_A, n % OUT_A, rows, n < N, srm, sym,
            SIZES, R, Y, R_LIMITS, NAXES, R_WIDTH, Y_WIDTH, PLUS_Y,
        )  # fmt: skip
        q = _operand(
            t, x, m, row, k // A, k % A, rows, k < K, stm, sxm,
            SIZES, T, X, T_LIMITS, NAXES, T_WIDTH, X_WIDTH, PLUS_X,
        )  # fmt: skip
        acc = tl.dot(p.T, q, acc, input_precision=PRECISION)
    po = out + part.to(tl.int64) * (N * K) + n[:, None] * K + k[None, :]
    tl.store(po, acc, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def chain_kernel(
    x, w, kept, out, M, sxm, som, skk,
    D: tl.constexpr, NAXES: tl.constexpr, GATES: tl.constexpr, STRIDES: tl.constexpr,
    MOVES: tl.constexpr, SHAPE: tl.constexpr, MINUS_EYE: tl.constexpr, KEEP: tl.constexpr,
    BT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = T x for BT tokens of D ** NAXES numbers, or with MINUS_EYE T x - x.

    For gate k the tokens are a matrix [(b, a), (m, others)]: the input of a product's right side
    lies in shared memory, its registers are free for the sum. MOVES[k] permutes (b, a, m, others)
    of the gate before, of SHAPE, into that. STRIDES are the strides in memory of the others, the
    innermost first, then of b, then of a, gate after gate. w (GATES D D, D D) holds the gates, or
    G - E with MINUS_EYE. KEEP writes the input t of each gate but the first to
    kept (GATES - 1, M, D ** NAXES).
    """
    PAIRS: tl.constexpr = D * D
    REST: tl.constexpr = D ** (NAXES - 2)
    ROWS: tl.constexpr = BT * REST
    pair, row = tl.arange(0, PAIRS), tl.arange(0, ROWS)
    m = tl.program_id(0) * BT + row // REST
    inside = (m < M)[None, :]
    long = m.to(tl.int64)[None, :]
    dtype = x.dtype.element_ty
    total = tl.zeros((PAIRS, ROWS), tl.float32)
    for k in tl.static_range(GATES):  # pyright: ignore
        other, at = row, row * 0
        for j in tl.static_range(NAXES - 2):  # pyright: ignore
            at += other % D * STRIDES[k * NAXES + j]
            other = other // D
        b, a = pair // D, pair % D
        place = at[None, :]
        place += (b * STRIDES[(k + 1) * NAXES - 2] + a * STRIDES[(k + 1) * NAXES - 1])[:, None]
        acc = tl.zeros((PAIRS, ROWS), tl.float32)
        if k == 0:
            t = tl.load(x + long * sxm + place, mask=inside, other=0.0)
        else:
            total = tl.permute(tl.reshape(total, SHAPE), MOVES[k])
            total = tl.reshape(total, (PAIRS, ROWS))
            if MINUS_EYE:
                # x is read again, from L2: held here it would take the registers of the sum.
                source = tl.load(x + long * sxm + place, mask=inside, other=0.0)
                t = (total + source.to(tl.float32)).to(dtype)
                acc = total
            else:
                t = total
            if KEEP:
                tl.store(kept + (k - 1) * skk + long * (REST * PAIRS) + place, t, mask=inside)
        if TMA:  # straight to shared memory: 256 x 256 numbers on their way take all registers
            g = w.load([k * PAIRS, 0])
        else:
            g = tl.load(w + (k * PAIRS + pair[:, None]) * PAIRS + pair[None, :])
        total = tl.dot(g, t, acc, input_precision=PRECISION)
        if k == GATES - 1:
            tl.store(out + long * som + place, total.to(out.dtype.element_ty), mask=inside)
        elif not MINUS_EYE:
            total = total.to(dtype)


# -- where things lie ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """One gate of a chain, as a matrix, and the sizes around it."""

    matrix: Tensor  # (n_b n_a, b a), any strides
    pair: tuple[int, int]  # the axes (b, a)
    before: Sizes  # (d1, ..., dN)
    after: Sizes
    limits: Sizes  # the smallest size that each axis has had so far: what E has left

    @property
    def tiles_for(self) -> dict[str, int]:
        return {"N": self.matrix.shape[0], "K": self.matrix.shape[1]}


def chain_of(gates: list[Tensor], dtype: torch.dtype, minus_eye: bool) -> list[Gate]:
    """G of every gate in `dtype`, or with `minus_eye` G - E, in the order of application."""
    if not gates:
        return []
    steps = _steps(tuple(tuple(g.shape) for g in gates))
    return _linked([(_matrix(g, dtype, minus_eye), *s) for g, s in zip(gates, steps, strict=True)])


def transposed(chain: list[Gate]) -> list[Gate]:
    """The chain of T^T: the gates transposed, the last one first."""
    return _linked([(g.matrix.T, g.pair, g.after, g.before) for g in reversed(chain)])


def _linked(steps: list[tuple[Tensor, tuple[int, int], Sizes, Sizes]]) -> list[Gate]:
    chain: list[Gate] = []
    for matrix, pair, before, after in steps:
        limits = tuple(map(min, chain[-1].limits, before)) if chain else before
        chain.append(Gate(matrix, pair, before, after, limits))
    return chain


@cache
def _steps(shapes: tuple[Sizes, ...]) -> list[tuple[tuple[int, int], Sizes, Sizes]]:
    """(pair, sizes before, sizes after) of every gate."""
    sizes = reference.quanta_axes([torch.empty(shape, device="meta") for shape in shapes])
    found = []
    for shape, (b, a) in zip(shapes, reference.quanta_pairs(len(sizes)), strict=True):
        after = list(sizes)
        after[b], after[a] = shape[0], shape[1]
        found.append(((b, a), sizes, tuple(after)))
        sizes = tuple(after)
    return found


def _matrix(gate: Tensor, dtype: torch.dtype, minus_eye: bool) -> Tensor:
    """G or G - E as (n_b n_a, b a), subtracted before it is rounded to `dtype`."""
    matrix = gate.to(dtype, copy=minus_eye, memory_format=torch.contiguous_format)
    if minus_eye:
        _diagonal(matrix).copy_(_diagonal(gate) - 1)
    return matrix.flatten(2).flatten(0, 1)


def _diagonal(gate: Tensor) -> Tensor:
    """Where E of a gate's shape is 1, a view."""
    return gate.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)


def _strides(sizes: Sizes) -> Sizes:
    return tuple(math.prod(sizes[n + 1 :]) for n in range(len(sizes)))


@cache
def _layout(
    pair: tuple[int, int], tensors: tuple[Sizes, ...], limits: tuple[Sizes, ...]
) -> tuple[Sizes, list[Sizes], list[Sizes]]:
    """(SIZES, strides of each tensor, limits) as the kernels take them.

    `tensors` are the sizes of each tensor; the first one's are those of the rows. Axes that follow
    each other in all of them, and are not cropped, become one.
    """
    b, a = pair
    strides = [_strides(sizes) for sizes in tensors]
    merged: list[list[Any]] = []  # [size, strides, limits], the outermost first
    for n in (n for n in range(len(tensors[0])) if n not in pair):
        size, steps, most = tensors[0][n], [s[n] for s in strides], [c[n] for c in limits]
        if size == 1:
            continue
        if (
            merged
            and [s * size for s in steps] == merged[-1][1]
            and min(most, default=size) >= size
        ):
            merged[-1] = [merged[-1][0] * size, steps, [c * size for c in merged[-1][2]]]
        else:
            merged.append([size, steps, most])
    merged.reverse()
    return (
        tuple(size for size, _, _ in merged) or (1,),
        [(*([m[1][i] for m in merged] or [0]), s[b], s[a]) for i, s in enumerate(strides)],
        [(*([m[2][i] for m in merged] or [1]), c[b], c[a]) for i, c in enumerate(limits)],
    )


# -- launches --------------------------------------------------------------------------------------

CHUNK_ELEMENTS = 2**24  # of one activation; a few of them are alive in a backward
ON_CHIP = {3: 16, 4: 8}  # {axes: size of each} that `chain` takes where the table has its tile


@dataclass(frozen=True)
class Part:
    """A chain's value at a gate: `source`, or with a `total` E source + total (`minus_eye`)."""

    source: Tensor  # (M, width), width <= the product of sizes
    sizes: Sizes
    total: Tensor | None = None  # (M, product of the sizes at the gate)


def gate(part: Part, step: Gate, out: Tensor, tile: Tile | None = None) -> Tensor:
    """The gate on a part into out (M, width): G t, or E d + D (E x + d)."""
    t = part.source if part.total is None else part.total
    M, (N, K) = t.shape[0], step.matrix.shape
    wanted = {"M": M, "sources": 1 if part.total is None else 2, **step.tiles_for}
    blocks, launch = _launch.split(tile or _launch.tile("gate", t.device, **wanted))
    _clamp(blocks, t.dtype, BN=N, BK=K)
    sizes, (st, sx, so), (limits,) = _layout(
        step.pair, (step.before, part.sizes, step.after), (step.limits,)
    )
    (b, a), per = step.pair, math.prod(step.before) // K
    if M:
        _launch.run(
            gate_kernel, (cdiv(M * per, blocks["BM"]) * cdiv(N, blocks["BN"]),),
            t, part.source, step.matrix, out, M, t.stride(0), part.source.stride(0),
            step.matrix.stride(0), step.matrix.stride(1), out.stride(0),
            SIZES=sizes, T=st, X=sx, OUT=so, LIMITS=limits, NAXES=len(sizes), PER=per,
            B=step.before[b], A=step.before[a], OUT_B=step.after[b], OUT_A=step.after[a],
            T_WIDTH=_width(t, step.before), X_WIDTH=_width(part.source, part.sizes),
            OUT_WIDTH=_width(out, step.after), PLUS_X=part.total is not None,
            PRECISION=PRECISION, **blocks, **launch,
        )  # fmt: skip
    return out


def gate_grad(r: Part, t: Part, step: Gate, back: Gate, tile: Tile | None = None) -> Tensor:
    """dG (n_b n_a, b a) in fp32 from the gradient r after the gate and its input t.

    `back` is the same gate in the transposed chain.
    """
    after = r.source if r.total is None else r.total
    before = t.source if t.total is None else t.total
    M, (N, K) = before.shape[0], step.matrix.shape
    wanted = {"M": M, "sources": 1 if t.total is None else 2, **step.tiles_for}
    tile = tile or _launch.tile("gate_grad", before.device, **wanted)
    blocks, launch = _launch.split(tile)
    _clamp(blocks, before.dtype, BN=N, BK=K)
    dG = torch.empty(N, K, dtype=torch.float32, device=before.device)
    (b, a), per = step.pair, math.prod(step.before) // K
    if not M:
        return dG.zero_()
    sizes, (sr, sy, st, sx), limits = _layout(
        step.pair, (step.after, r.sizes, step.before, t.sizes), (back.limits, step.limits)
    )
    rows, tiles = M * per, cdiv(N, blocks["BN"]) * cdiv(K, blocks["BK"])
    parts = _launch.splits(rows, 2 * blocks["BM"], tiles, before.device)
    span = cdiv(cdiv(rows, parts), blocks["BM"]) * blocks["BM"]
    parts = cdiv(rows, span)
    target = dG.new_empty(parts, N, K)
    _launch.run(
        gate_grad_kernel, (tiles, parts),
        after, r.source, before, t.source, target, M, span, after.stride(0), r.source.stride(0),
        before.stride(0), t.source.stride(0),
        SIZES=sizes, R=sr, Y=sy, T=st, X=sx, R_LIMITS=limits[0], T_LIMITS=limits[1],
        NAXES=len(sizes), PER=per,
        B=step.before[b], A=step.before[a], OUT_B=step.after[b], OUT_A=step.after[a],
        R_WIDTH=_width(after, step.after), Y_WIDTH=_width(r.source, r.sizes),
        T_WIDTH=_width(before, step.before), X_WIDTH=_width(t.source, t.sizes),
        PLUS_Y=r.total is not None, PLUS_X=t.total is not None,
        PRECISION=PRECISION, **blocks, **launch,
    )  # fmt: skip
    return sum_parts(target, dG)


def _width(t: Tensor, sizes: Sizes) -> int:
    """The columns of t if they are fewer than the sizes make, else 0."""
    return t.shape[1] if t.shape[1] < math.prod(sizes) else 0


def _clamp(blocks: Tile, dtype: torch.dtype, **sizes: int) -> None:
    """No block far beyond the matrix; fp32 numbers take twice the shared memory."""
    for name, size in sizes.items():
        blocks[name] = min(blocks[name], power_of_2(size, 16))
    if dtype == torch.float32:
        blocks["BK"] = max(16, blocks["BK"] // 2)


def chain(
    x: Tensor, steps: list[Gate], out: Tensor, minus_eye: bool, kept: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """All gates on x (M, D ** axes) into `out`. `kept` gets the inputs of all gates but the first.

    kept (gates - 1, M, D ** axes) contiguous; every axis has the size D, a power of two.
    """
    (M, _), D, n_axes = x.shape, steps[0].before[0], len(steps[0].before)
    tile = tile or _launch.tile(f"chain{n_axes}", x.device, M=M, sources=1 + minus_eye)
    blocks, launch = _launch.split(tile)
    strides, moves = _turns(tuple(step.pair for step in steps), D, n_axes)
    shape = (D, D, blocks["BT"]) + (D,) * (n_axes - 2)
    matrices = torch.cat([step.matrix for step in steps])
    if blocks["TMA"]:
        matrices = TensorDescriptor.from_tensor(matrices, [D * D, D * D])
    if M:
        _launch.run(
            chain_kernel, (cdiv(M, blocks["BT"]),),
            x, matrices, out if kept is None else kept, out, M, x.stride(0), out.stride(0),
            0 if kept is None else kept.stride(0), D=D, NAXES=n_axes, GATES=len(steps),
            STRIDES=strides, MOVES=moves, SHAPE=shape, MINUS_EYE=minus_eye, KEEP=kept is not None,
            PRECISION=PRECISION, **blocks, **launch,
        )  # fmt: skip
    return out


@cache
def _turns(
    pairs: tuple[tuple[int, int], ...], D: int, n_axes: int
) -> tuple[Sizes, tuple[Sizes, ...]]:
    """(STRIDES, MOVES) of the chain kernel."""
    steps = _strides((D,) * n_axes)
    others = [[n for n in range(n_axes) if n not in pair] for pair in pairs]
    orders = [(*pair, -1, *rest) for rest, pair in zip(others, pairs, strict=True)]  # -1: m
    moves = [tuple(before.index(n) for n in order)
             for before, order in zip([orders[0], *orders], orders, strict=False)]  # fmt: skip
    strides = [steps[n] for rest, pair in zip(others, pairs, strict=True)
               for n in (*reversed(rest), *pair)]  # fmt: skip
    return tuple(strides), tuple(moves)


# -- the op ----------------------------------------------------------------------------------------


def quanta_forward(
    x: Tensor, gates: list[Tensor], frozen: list[Tensor], out_features: int, minus_eye: bool
) -> Tensor:
    """T x (M, out) for x (M, in); T x - E x with `minus_eye`, T x - T0 x with `frozen`."""
    x = _readable(x)
    steps, twin = chain_of(gates, x.dtype, minus_eye), chain_of(frozen, x.dtype, False)
    y = x.new_empty(x.shape[0], out_features)
    for rows in _chunks(x.shape[0], steps):
        _run(steps, x[rows], y[rows], minus_eye)
        _take_off(twin, x[rows], y[rows])
    return y


def quanta_backward(
    dy: Tensor, x: Tensor, gates: list[Tensor], frozen: list[Tensor], minus_eye: bool,
    need_gates: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Gradients of x and of the gates, given x (M, in) and dy (M, out)."""
    dy, x = _readable(dy), _readable(x)
    steps = chain_of(gates, x.dtype, minus_eye)
    back, twin = transposed(steps), transposed(chain_of(frozen, x.dtype, False))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums: list[Tensor | None] = [None] * len(gates)
    for rows in _chunks(x.shape[0], steps):
        if not need_gates:
            _run(back, dy[rows], dx[rows], minus_eye)
        else:
            inputs = _inputs(steps, x[rows], minus_eye)
            grads = _run(back, dy[rows], dx[rows], minus_eye, keep=True)
            for k, t in enumerate(inputs):
                dG = gate_grad(grads.pop(), t, steps[k], back[-1 - k])
                before = sums[k]
                sums[k] = dG if before is None else before.add_(dG)
        _take_off(twin, dy[rows], dx[rows])
    if not need_gates:
        return dx, sums
    return dx, [
        torch.zeros_like(g) if total is None else total.view(g.shape).to(g.dtype)
        for g, total in zip(gates, sums, strict=True)
    ]


def _take_off(twin: list[Gate], x: Tensor, out: Tensor) -> None:
    """out -= T0 x, rounded as T x was: gates that are still T0's give exactly 0."""
    if twin:
        moved = torch.empty_like(out)
        _run(twin, x, moved, False)
        out.sub_(moved)


def _run(
    steps: list[Gate], x: Tensor, out: Tensor, minus_eye: bool, keep: bool = False
) -> list[Part]:
    """The chain on x into `out`. With `keep`, returns what goes into each gate."""
    if _on_chip(steps, x, out):
        kept = x.new_empty(len(steps) - 1, *x.shape) if keep else None
        chain(x, steps, out, minus_eye, kept)
        inputs = [x] if kept is None else [x, *kept]
        return [Part(t, step.before) for t, step in zip(inputs, steps, strict=False)]
    total, parts = None, []
    for step in steps:
        part = _part(x, steps[0].before, total, step.before, minus_eye)
        last = step is steps[-1]
        total = out if last else x.new_empty(x.shape[0], math.prod(step.after))
        gate(part, step, total)
        if keep:
            parts.append(part)
    return parts


def _inputs(steps: list[Gate], x: Tensor, minus_eye: bool) -> list[Part]:
    """What goes into each gate, without the last product."""
    if len(steps) == 1:
        return [Part(x, steps[0].before)]
    last = x.new_empty(x.shape[0], math.prod(steps[-1].before))
    parts = _run(steps[:-1], x, last, minus_eye, keep=True)
    return [*parts, _part(x, steps[0].before, last, steps[-1].before, minus_eye)]


def _part(x: Tensor, first: Sizes, total: Tensor | None, sizes: Sizes, minus_eye: bool) -> Part:
    if total is None:
        return Part(x, first)
    return Part(x, first, total) if minus_eye else Part(total, sizes)


def _on_chip(steps: list[Gate], x: Tensor, out: Tensor) -> bool:
    """Whether `chain` takes these gates, on this device."""
    if len(steps) < 2:
        return False
    sizes = steps[0].before
    size = ON_CHIP.get(len(sizes))
    square = all(g.before == g.after == sizes for g in steps) and set(sizes) == {size}
    full = x.shape[1] == out.shape[1] == math.prod(sizes)
    short = x.element_size() == 2 or interpreting()  # in fp32 the gates overflow shared memory
    return square and full and short and f"chain{len(sizes)}" in _launch.table(x.device)


def _chunks(M: int, steps: list[Gate]) -> Iterator[slice]:
    """The tokens, so many at a time that an activation has CHUNK_ELEMENTS numbers."""
    widest = max(math.prod(sizes) for g in steps for sizes in (g.before, g.after))
    size = max(16, CHUNK_ELEMENTS // widest)
    return (slice(start, min(start + size, M)) for start in range(0, M, size))


def _readable(t: Tensor) -> Tensor:
    """t, copied if its columns do not follow each other: a gradient has any strides."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
