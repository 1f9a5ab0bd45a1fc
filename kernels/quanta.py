"""QuanTA on Triton: the chain T x of gates on pairs of axes, and its gradients.

The functions at the end have the signatures of their twins in `lean_quanta.py` and hold the same
for the backward: x alone. A gate on the axes (b, a), b the earlier one, sees an activation
(M, d1 ... dN) as a matrix of the rows (m, the other axes) and the columns (b, a). Turned for a
gate, that matrix lies in memory row by row: a gate reads its rows and writes where the next one
will read rows, so nothing is permuted on the way, and the gradient of a gate is one product.

    turn       x or dY, turned for the first gate; zeros behind the columns of x
    gate       one gate, square or rectangular, forward or (by the strides of w) transposed
    chain      all gates of 16 x 16 x 16 or 8 x 8 x 8 x 8, a few tokens a program, on chip

With `minus_eye` the identity gates E (crop or zero-pad) are taken off: D = G - E, formed in fp32
and rounded once. Between the gates go the activation and the total of what they
have added,

    t' = E t + D t,    d' = E d + D t,    at the end d = T x - E x,

each rounded to the dtype of x, so that no two nearly equal numbers are subtracted. In `chain`, t
stays in fp32 and x is subtracted from it at the end.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from structadapt.kernels import _launch, reference
from structadapt.kernels._interpreter import interpreting, repair
from structadapt.kernels._launch import Tile, cdiv, power_of_2
from structadapt.kernels.lora import PRECISION, over_rows

if interpreting():
    repair()

Sizes = tuple[int, ...]


# -- kernels ---------------------------------------------------------------------------------------
#
# Where the numbers of a tensor lie is constant in a kernel: SIZES are those of the axes that the
# gate leaves alone, the innermost first; strides are those of these axes, then of b, then of a.
# A WIDTH is the number of columns in memory where that is less than the axes make, else 0. Rows fit
# int32: the launches take `CHUNK_ELEMENTS` at a time. PER: rows of a token.


@triton.jit
def _within(row, SIZES: tl.constexpr, STRIDES: tl.constexpr, NAXES: tl.constexpr):
    """The offset of a row within its token."""
    offset = row * 0
    for j in tl.static_range(NAXES):  # pyright: ignore
        offset += row % SIZES[j] * STRIDES[j]
        row = row // SIZES[j]
    return offset


@triton.jit
def turn_kernel(
    x, out, M, sxm, SIZES: tl.constexpr, X: tl.constexpr, NAXES: tl.constexpr,
    PER: tl.constexpr, B: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[row, (b, a)] = x at (m, others, b, a), 0 behind its WIDTH columns."""
    K: tl.constexpr = B * A
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    at = (
        _within(row, SIZES, X, NAXES)[:, None] + (k // A * X[NAXES] + k % A * X[NAXES + 1])[None, :]
    )
    inside = (row // PER < M)[:, None] & (k < K)[None, :]
    within = inside
    if WIDTH:
        within = within & (at < WIDTH)
    t = tl.load(x + (row // PER).to(tl.int64)[:, None] * sxm + at, mask=within, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * K + k[None, :], t, mask=inside)


@triton.jit
def matrix_kernel(
    g, out, size, K, A, OUT_A, MINUS_EYE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = g, or g - E with MINUS_EYE, subtracted before it is rounded; (OUT_B, OUT_A, B, A)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(g + i, mask=i < size, other=0.0).to(tl.float32)
    if MINUS_EYE:
        n, k = i // K, i % K
        t -= ((n // OUT_A == k // A) & (n % OUT_A == k % A)).to(tl.float32)
    tl.store(out + i, t.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def gate_kernel(
    t, td, d, w, t_out, d_out, M, swn, swk, som,
    SIZES: tl.constexpr, OUT: tl.constexpr, NAXES: tl.constexpr, PER: tl.constexpr,
    B: tl.constexpr, A: tl.constexpr, OUT_B: tl.constexpr, OUT_A: tl.constexpr,
    WIDTH: tl.constexpr, HAS_D: tl.constexpr, T_OUT: tl.constexpr, D_OUT: tl.constexpr,
    PLUS: tl.constexpr, W_IS_NK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With u = t w^T (rows, OUT_B OUT_A): t_out = u (PLUS: + E t), d_out = u (HAS_D: + E d).

    t and d are turned for this gate (rows, B A); both outputs have the strides OUT and som. TMA: td
    and w are descriptors of t and of (N, K), or without W_IS_NK of (K, N).
    """
    K: tl.constexpr = B * A
    N: tl.constexpr = OUT_B * OUT_A
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    first, left = pid // tiles_n * BM, pid % tiles_n * BN  # neighbours share the rows, in L2
    row, n = first + tl.arange(0, BM), left + tl.arange(0, BN)
    # By the token: a row's neighbours in memory are inside with it, and leave in one piece.
    rows, columns = (row // PER < M)[:, None], (n < N)[None, :]
    start = row.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        if TMA:
            p = td.load([first, k0])
            q = w.load([left, k0]).T if W_IS_NK else w.load([k0, left])
        else:
            k = k0 + tl.arange(0, BK)
            p = tl.load(t + start + k[None, :], mask=rows & (k < K)[None, :], other=0.0)
            pw = w + k[:, None] * swk + n[None, :] * swn
            q = tl.load(pw, mask=(k < K)[:, None] & columns, other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
    n_b, n_a = n // OUT_A, n % OUT_A
    kept = rows & columns & ((n_b < B) & (n_a < A))[None, :]
    same = start + (n_b * A + n_a)[None, :]  # where E takes the output from
    at = _within(row, SIZES, OUT, NAXES)[:, None]
    at += (n_b * OUT[NAXES] + n_a * OUT[NAXES + 1])[None, :]
    inside = rows & columns
    if WIDTH:
        inside = inside & (at < WIDTH)
    at += (row // PER).to(tl.int64)[:, None] * som
    if T_OUT:
        moved = acc
        if PLUS:
            moved += tl.load(t + same, mask=kept, other=0.0).to(tl.float32)
        tl.store(t_out + at, moved.to(t_out.dtype.element_ty), mask=inside)
    if D_OUT:
        if HAS_D:
            acc += tl.load(d + same, mask=kept, other=0.0).to(tl.float32)
        tl.store(d_out + at, acc.to(d_out.dtype.element_ty), mask=inside)


@triton.jit
def chain_kernel(
    x, w, kept, out, M, sxm, som, skk,
    D: tl.constexpr, NAXES: tl.constexpr, GATES: tl.constexpr, STRIDES: tl.constexpr,
    MOVES: tl.constexpr, SHAPE: tl.constexpr, MINUS_EYE: tl.constexpr, KEEP: tl.constexpr,
    BACK: tl.constexpr, HAS_OUT: tl.constexpr, BT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = T x for BT tokens of D ** NAXES numbers, or with MINUS_EYE T x - x.

    For gate k the tokens are a matrix [(b, a), (m, others)]: the input of a product's right side
    lies in shared memory, its registers are free for the sum. MOVES[k] permutes (b, a, m, others)
    of the gate before, of SHAPE, into that. STRIDES are the strides in memory of the others, the
    innermost first, then of b, then of a, gate after gate. w (GATES D D, D D) holds the gates, or
    G - E with MINUS_EYE; BACK: it is read from its end, and transposed. KEEP: the input of each
    gate but the first (1) or of every one (2), turned for it, goes to kept. Without HAS_OUT the
    last gate is left out.
    """
    PAIRS: tl.constexpr = D * D
    REST: tl.constexpr = D ** (NAXES - 2)
    ROWS: tl.constexpr = BT * REST
    pair, row = tl.arange(0, PAIRS), tl.arange(0, ROWS)
    m = tl.program_id(0) * BT + row // REST
    inside = (m < M)[None, :]
    long = m.to(tl.int64)[None, :]
    dtype = x.dtype.element_ty
    turned = (long * REST + (row % REST)[None, :]) * PAIRS + pair[:, None]
    total = tl.zeros((PAIRS, ROWS), tl.float32)
    for k in tl.static_range(GATES):  # pyright: ignore
        other, at = row, row * 0
        for j in tl.static_range(NAXES - 2):  # pyright: ignore
            at += other % D * STRIDES[k * NAXES + j]
            other = other // D
        b, a = pair // D, pair % D
        place = at[None, :]
        place += (b * STRIDES[(k + 1) * NAXES - 2] + a * STRIDES[(k + 1) * NAXES - 1])[:, None]
        if k == 0:
            t = tl.load(x + long * sxm + place, mask=inside, other=0.0)
            total = t.to(tl.float32)
        else:
            total = tl.permute(tl.reshape(total, SHAPE), MOVES[k])
            total = tl.reshape(total, (PAIRS, ROWS))
            t = total.to(dtype)
        if KEEP == 2 or (KEEP == 1 and k > 0):
            tl.store(kept + (k - 2 + KEEP) * skk + turned, t, mask=inside)
        if k < GATES - 1 or HAS_OUT:
            which = GATES - 1 - k if BACK else k
            if TMA:  # straight to shared memory: 256 x 256 numbers on their way take all registers
                g = w.load([which * PAIRS, 0])
            else:
                g = tl.load(w + (which * PAIRS + pair[:, None]) * PAIRS + pair[None, :])
            if BACK:
                g = g.T
            acc = total if MINUS_EYE else tl.zeros((PAIRS, ROWS), tl.float32)
            total = tl.dot(g, t, acc, input_precision=PRECISION)
            if k == GATES - 1:
                if MINUS_EYE:  # x is read again, from L2: held here it would take registers
                    source = tl.load(x + long * sxm + place, mask=inside, other=0.0)
                    total -= source.to(tl.float32)
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

    @property
    def tiles_for(self) -> dict[str, int]:
        return {"N": self.matrix.shape[0], "K": self.matrix.shape[1]}


def chain_of(gates: list[Tensor], dtype: torch.dtype, minus_eye: bool) -> list[Gate]:
    """G of every gate in `dtype`, or with `minus_eye` G - E, in the order of application.

    The matrices lie behind each other in memory, where `chain` takes them all at once.
    """
    if not gates:
        return []
    steps = _steps(tuple(tuple(g.shape) for g in gates))
    memory = torch.empty(sum(g.numel() for g in gates), dtype=dtype, device=gates[0].device)
    places = memory.split([g.numel() for g in gates])
    return [
        Gate(_matrix(g, m, minus_eye), *s) for g, m, s in zip(gates, places, steps, strict=True)
    ]


def transposed(chain: list[Gate]) -> list[Gate]:
    """The chain of T^T: the gates transposed, the last one first."""
    return [Gate(g.matrix.T, g.pair, g.after, g.before) for g in reversed(chain)]


_steps = cache(reference.quanta_steps)


def _matrix(gate: Tensor, out: Tensor, minus_eye: bool) -> Tensor:
    """G or G - E as (n_b n_a, b a), in `out`."""
    gate = gate.contiguous()
    K = gate[0, 0].numel()
    _launch.run(
        matrix_kernel, (cdiv(gate.numel(), 1024),), gate, out, gate.numel(), K, gate.shape[3],
        gate.shape[1], MINUS_EYE=minus_eye, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out.view(-1, K)


def _strides(sizes: Sizes, pair: tuple[int, int] | None = None) -> Sizes:
    """Of every axis in memory: in their order, or turned for a pair of them."""
    axes = range(len(sizes))
    order = [*axes] if pair is None else [n for n in axes if n not in pair] + [*pair]
    found, step = [0] * len(sizes), 1
    for n in reversed(order):
        found[n], step = step, step * sizes[n]
    return tuple(found)


@cache
def _layout(pair: tuple[int, int], sizes: Sizes, strides: Sizes) -> tuple[Sizes, Sizes]:
    """(SIZES, strides) as the kernels take them."""
    others = [n for n in reversed(range(len(sizes))) if n not in pair and sizes[n] > 1]
    ordered = tuple(strides[n] for n in (*others, *pair))
    return tuple(sizes[n] for n in others) or (1,), ordered if others else (0, *ordered)


# -- launches --------------------------------------------------------------------------------------

CHUNK_ELEMENTS = 2**25  # of one activation; a few of them are alive in a backward
ON_CHIP = {3: 16, 4: 8}  # {axes: size of each} that `chain` takes where the table has its tile


def turn(x: Tensor, sizes: Sizes, pair: tuple[int, int]) -> Tensor:
    """x (M, width), width <= the product of sizes, turned for a gate: (rows, b a)."""
    (b, a), M = pair, x.shape[0]
    K, whole = sizes[b] * sizes[a], math.prod(sizes)
    last = len(sizes) - 1
    if pair == (last - 1, last) and x.shape[1] == whole and x.is_contiguous():
        return x.view(-1, K)
    out = x.new_empty(M * (whole // K), K)
    if M:
        axes, strides = _layout(pair, sizes, _strides(sizes))
        BM, BK = 32, min(128, power_of_2(K))
        _launch.run(
            turn_kernel, (cdiv(len(out), BM), cdiv(K, BK)), x, out, M, x.stride(0),
            SIZES=axes, X=strides, NAXES=len(axes), PER=whole // K, B=sizes[b], A=sizes[a],
            WIDTH=_width(x, sizes), BM=BM, BK=BK, num_warps=4,
        )  # fmt: skip
    return out


def gate(
    t: Tensor, step: Gate, d: Tensor | None = None, t_out: Tensor | None = None,
    d_out: Tensor | None = None, plus: bool = False, then: tuple[int, int] | None = None,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """One gate on t and d (rows, b a), both turned for it, into t_out and d_out.

    t_out = G t, or with `plus` E t + D t; d_out = E d + D t. They are (M, width), or turned for a
    gate on the axes `then`.
    """
    (b, a), (N, K), first = step.pair, step.matrix.shape, t_out if d_out is None else d_out
    assert first is not None
    wanted = {"M": len(t), "sources": 1 if d_out is None else 2, **step.tiles_for}
    blocks, launch = _launch.split(tile or _launch.tile("gate", t.device, **wanted))
    _clamp(blocks, t.dtype, BN=N, BK=K)
    per, whole = math.prod(step.before) // K, math.prod(step.after)
    w, nk = step.matrix, step.matrix.stride(1) == 1
    low = w if nk else w.T
    blocks["TMA"] = int(blocks["TMA"] and _launch.misfit(t, low) is None)
    td, wd = t, w
    if blocks["TMA"]:
        td = TensorDescriptor.from_tensor(t, [blocks["BM"], blocks["BK"]])
        block = [blocks["BN"], blocks["BK"]]
        wd = TensorDescriptor.from_tensor(low, block if nk else block[::-1])
    axes, strides = _layout(step.pair, step.after, _strides(step.after, then))
    if len(t):
        _launch.run(
            gate_kernel, (cdiv(len(t), blocks["BM"]) * cdiv(N, blocks["BN"]),),
            t, td, t if d is None else d, wd, first if t_out is None else t_out, first,
            len(t) // per, w.stride(0), w.stride(1), first.stride(0) if then is None else whole,
            SIZES=axes, OUT=strides, NAXES=len(axes), PER=per,
            B=step.before[b], A=step.before[a], OUT_B=step.after[b], OUT_A=step.after[a],
            WIDTH=_width(first, step.after) if then is None else 0, HAS_D=d is not None,
            T_OUT=t_out is not None, D_OUT=d_out is not None, PLUS=plus, W_IS_NK=nk,
            PRECISION=PRECISION, **blocks, **launch,
        )  # fmt: skip


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
    x: Tensor, steps: list[Gate], out: Tensor | None, minus_eye: bool, keep: bool = False,
    tile: Tile | None = None,
) -> list[Tensor]:  # fmt: skip
    """All gates on x (M, D ** axes) into `out`; every axis has the size D, a power of two.

    With `keep`, returns the input of every gate, turned for it. Without `out` the last is not run.
    """
    (M, width), D, n_axes = x.shape, steps[0].before[0], len(steps[0].before)
    wanted = {"M": M, "sources": 1 + minus_eye, "keep": 1 + keep}  # both take registers
    tile = tile or _launch.tile(f"chain{n_axes}", x.device, **wanted)
    blocks, launch = _launch.split(tile)
    strides, moves = _turns(tuple(step.pair for step in steps), D, n_axes)
    shape = (D, D, blocks["BT"]) + (D,) * (n_axes - 2)
    matrices, back = _stacked([step.matrix for step in steps])
    if blocks["TMA"]:
        matrices = TensorDescriptor.from_tensor(matrices, [D * D, D * D])
    lies = steps[0].pair == (n_axes - 2, n_axes - 1) and x.is_contiguous()  # turned already
    KEEP = (1 if lies else 2) if keep else 0
    kept = x.new_empty(len(steps) - 2 + KEEP if keep else 0, M * width // D**2, D**2)
    target = x if out is None else out
    if M:
        _launch.run(
            chain_kernel, (cdiv(M, blocks["BT"]),),
            x, matrices, kept if keep else x, target, M, x.stride(0), target.stride(0),
            M * width, D=D, NAXES=n_axes, GATES=len(steps), STRIDES=strides, MOVES=moves,
            SHAPE=shape, MINUS_EYE=minus_eye, KEEP=KEEP, BACK=back, HAS_OUT=out is not None,
            PRECISION=PRECISION, **blocks, **launch,
        )  # fmt: skip
    return [x.view(-1, D**2), *kept] if KEEP == 1 else [*kept]


def _stacked(matrices: list[Tensor]) -> tuple[Tensor, bool]:
    """(all of them below each other, whether the last one comes first and they are transposed).

    They lie so in memory, as `chain_of` makes them.
    """
    back = matrices[0].stride(0) == 1
    first, n = matrices[-1].T if back else matrices[0], len(matrices)
    return first.as_strided((n * first.shape[0], first.shape[1]), first.stride()), back


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
            inputs = _run(steps, x[rows], None, minus_eye, keep=True)
            grads = _run(back, dy[rows], dx[rows], minus_eye, keep=True)
            for k, t in enumerate(inputs):
                dG = gate_grad(grads.pop(), t)
                before = sums[k]
                sums[k] = dG if before is None else before.add_(dG)
        _take_off(twin, dy[rows], dx[rows])
    if not need_gates:
        return dx, sums
    return dx, [
        torch.zeros_like(g) if total is None else total.view(g.shape).to(g.dtype)
        for g, total in zip(gates, sums, strict=True)
    ]


def gate_grad(r: Tensor, t: Tensor) -> Tensor:
    """dG (n_b n_a, b a) in fp32 from the gradient r after the gate and its input t, turned."""
    out = torch.empty(r.shape[1], t.shape[1], dtype=torch.float32, device=t.device)
    return over_rows(r, t, out, transposed=False)


def _take_off(twin: list[Gate], x: Tensor, out: Tensor) -> None:
    """out -= T0 x, rounded as T x was: gates that are still T0's give exactly 0."""
    if twin:
        moved = torch.empty_like(out)
        _run(twin, x, moved, False)
        out.sub_(moved)


def _run(
    steps: list[Gate], x: Tensor, out: Tensor | None, minus_eye: bool, keep: bool = False
) -> list[Tensor]:
    """The chain on x into `out`; with `keep`, returns the input of every gate, turned for it.

    Without `out` the last gate is not run, and no total is carried.
    """
    if _on_chip(steps, x, out) and not (out is None and _apart(x, len(steps[0].before))):
        return chain(x, steps, out, minus_eye, keep)
    t, d, inputs = turn(x, steps[0].before, steps[0].pair), None, []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        inputs += [t] if keep else []
        if following is None and out is None:
            break
        if following is None:
            gate(t, step, d, None if minus_eye else out, out if minus_eye else None)
            break
        pair, width = following.pair, math.prod(step.after)
        K = step.after[pair[0]] * step.after[pair[1]]
        t_out = x.new_empty(x.shape[0] * (width // K), K)
        d_out = torch.empty_like(t_out) if minus_eye and out is not None else None
        gate(t, step, d, t_out, d_out, minus_eye, pair)
        t, d = t_out, d_out
    return inputs


def _on_chip(steps: list[Gate], x: Tensor, out: Tensor | None) -> bool:
    """Whether `chain` takes these gates, on this device."""
    if len(steps) < 2:
        return False
    sizes = steps[0].before
    size = ON_CHIP.get(len(sizes))
    square = all(g.before == g.after == sizes for g in steps) and set(sizes) == {size}
    full = x.shape[1] == math.prod(sizes) and (out is None or out.shape[1] == x.shape[1])
    return square and full and f"chain{len(sizes)}" in _launch.table(x.device)


def _apart(x: Tensor, n_axes: int) -> bool:
    """Whether the inputs of the gates alone are made gate by gate, by the table."""
    return _launch.tile(f"inputs{n_axes}", x.device, M=len(x))["plan"] == "gates"


def _chunks(M: int, steps: list[Gate]) -> Iterator[slice]:
    """The tokens, so many at a time that an activation has CHUNK_ELEMENTS numbers."""
    widest = max(math.prod(sizes) for g in steps for sizes in (g.before, g.after))
    count = cdiv(M, max(16, CHUNK_ELEMENTS // widest))
    # Of about the same size, that the last one fills the device too; whole vectors of rows.
    size = cdiv(cdiv(M, max(count, 1)), 16) * 16
    return (slice(start, min(start + size, M)) for start in range(0, M, max(size, 1)))


def _readable(t: Tensor) -> Tensor:
    """t, copied if its columns do not follow each other: a gradient has any strides."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
