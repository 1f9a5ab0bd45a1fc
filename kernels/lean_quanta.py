"""Plain torch forward and backward of the QuanTA chain, a chunk of tokens at a time.

Nothing but x is held for the backward: it runs the chain again, chunk by chunk, so what is alive in
between is a few chunks and not N(N-1)/2 activations. Formulas and shapes are those of
`reference.py`.

With `minus_eye` the chain of identity gates E is taken off: with D = G - E formed in the dtype of
the gates, t_k the input of gate k and d the sum of D_k t_k carried to the end,

    t_{k+1} = E_k t_k + D_k t_k,    T x - E x = d,

and E_k crops or zero-pads. The backward is the same recursion with the gates transposed.

A gate is one matrix product. Between gates an activation is (m, d1, ..., dN); for a gate that has
the last axis it becomes (m, ..., b, last), for another (b, a, m, ..., last). So the last axis is
never moved, and a permutation copies runs of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt.kernels import reference
from structadapt.kernels.lean import FEW

CHUNK_ELEMENTS = 2**20  # of one activation
Sizes = tuple[int, ...]
UNITS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}  # by size in bytes


def quanta_forward(
    x: Tensor, gates: list[Tensor], frozen: list[Tensor], out_features: int, minus_eye: bool
) -> Tensor:
    """T x (M, out) for x (M, in); T x - E x with `minus_eye`, T x - T0 x with `frozen`.

    For a few rows in the dtype of the gates: casting them would cost more than applying them.
    """
    if minus_eye and x.shape[0] <= FEW:
        return _few_minus_eye(x.to(gates[0].dtype), gates, out_features)
    chain, twin = _chain(gates, x.dtype, minus_eye), _chain(frozen, x.dtype, False)

    def update(rows: slice) -> Tensor:
        moved = _run(chain, x[rows], minus_eye)
        if twin:
            moved -= _run(twin, x[rows], False)
        return moved[:, :out_features]

    return _by_chunks(update, x, chain, out_features)


def _few_minus_eye(x: Tensor, gates: list[Tensor], out_features: int) -> Tensor:
    """T x - E x in one subtraction, which needs the digits of fp32."""
    chain = _chain(gates, x.dtype, False)
    moved = _run(chain, x, False).view(-1, *chain[-1].out_sizes)
    start = _unflatten(x, chain[0].in_sizes)
    common = tuple(slice(min(pair)) for pair in zip(moved.shape, start.shape, strict=True))
    moved[common] -= start[common]
    return moved.flatten(1)[:, :out_features]


def quanta_backward(
    dy: Tensor, x: Tensor, gates: list[Tensor], frozen: list[Tensor], minus_eye: bool,
    need_gates: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Gradients of x and of the gates, given x (M, in) and dy (M, out)."""
    chain, twin = _chain(gates, x.dtype, minus_eye), _chain(frozen, x.dtype, False)
    sums = [torch.zeros_like(gate).flatten(0, 1).flatten(1) for gate in gates]  # at least fp32

    def update(rows: slice) -> Tensor:
        inputs = _inputs(chain, x[rows], minus_eye) if need_gates else []
        moved = _run_back(chain, dy[rows], inputs, sums, minus_eye)
        if twin:
            moved -= _run_back(twin, dy[rows], [], [], False)
        return moved[:, : x.shape[1]]

    dx = _by_chunks(update, x, chain, x.shape[1])
    if not need_gates:
        return dx, [None] * len(gates)
    return dx, [total.view(gate.shape) for gate, total in zip(gates, sums, strict=True)]


def _by_chunks(
    update: Callable[[slice], Tensor], x: Tensor, chain: list["_Gate"], width: int
) -> Tensor:
    """`update` of all rows, a chunk of them at a time."""
    widest = max(max(math.prod(g.in_sizes), math.prod(g.out_sizes)) for g in chain)
    size = max(16, CHUNK_ELEMENTS // widest)
    if 0 < x.shape[0] <= size:
        return update(slice(None)).contiguous()
    whole = x.new_empty(x.shape[0], width)
    for start in range(0, x.shape[0], size):
        rows = slice(start, start + size)
        whole[rows] = update(rows)
    return whole


# -- the gates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gate:
    """One gate as a matrix, and where its axes are."""

    matrix: Tensor  # (out_b out_a, in_b in_a)
    order: Sizes  # the dimensions of (m, d1, ..., dN) as the product takes them
    back: Sizes  # the inverse permutation
    left: bool  # the gate's axes come first: the matrix is multiplied from the left
    in_sizes: Sizes  # (d1, ..., dN) before
    out_sizes: Sizes  # and after

    def apply(self, t: Tensor, transpose: bool = False, onto: Tensor | None = None) -> Tensor:
        """The gate, or its transpose, on t, plus `onto`; all in the order of the product."""
        matrix = self.matrix.T if transpose else self.matrix
        sizes = (t.shape[self.back[0]], *(self.in_sizes if transpose else self.out_sizes))
        flat = _rows if self.left else _pairs
        factors = (matrix, flat(t)) if self.left else (flat(t), matrix.T)
        out = torch.mm(*factors) if onto is None else torch.addmm(flat(onto), *factors)
        return out.view([sizes[d] for d in self.order])

    def outer(self, grad: Tensor, t: Tensor) -> Tensor:
        """The gradient of the matrix, both arguments in the order of the product."""
        if self.left:
            return _rows(grad) @ _rows(t).T
        grad, t = _pairs(grad), _pairs(t)
        if len(t) % 2:
            return grad.T @ t
        # Long and thin: two halves keep two threads busier than one product does.
        halves = torch.bmm(grad.view(2, -1, grad.shape[1]).mT, t.view(2, -1, t.shape[1]))
        return halves.to(torch.promote_types(t.dtype, torch.float32)).sum(0)

    def arrange(self, t: Tensor) -> Tensor:
        """(m, d1, ..., dN) -> the order of the product."""
        return _permute(t, self.order)

    def restore(self, t: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return _permute(t, self.back)


def _chain(gates: list[Tensor], dtype: torch.dtype, minus_eye: bool) -> list[_Gate]:
    chain = []
    for gate, places in zip(gates, _places(tuple(g.shape for g in gates)), strict=True):
        matrix = gate
        if minus_eye:  # both diagonals at once: (min of b, min of a)
            matrix = gate.clone(memory_format=torch.contiguous_format)
            matrix.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sub_(1)
        chain.append(_Gate(matrix.flatten(2).flatten(0, 1).to(dtype), *places))
    return chain


@cache
def _places(shapes: tuple[Sizes, ...]) -> list[tuple[Sizes, Sizes, bool, Sizes, Sizes]]:
    """Everything about a chain's gates but their values."""
    if not shapes:
        return []
    sizes = reference.quanta_axes([torch.empty(shape, device="meta") for shape in shapes])
    n, found = len(sizes), []
    for shape, (b, a) in zip(shapes, reference.quanta_pairs(n), strict=True):
        after = list(sizes)
        after[b], after[a] = shape[0], shape[1]
        left = a != n - 1
        rest = [d for d in range(n + 1) if d not in (b + 1, a + 1, n)]
        order = (b + 1, a + 1, *rest, n) if left else (*rest, b + 1, n)
        back = tuple(order.index(d) for d in range(n + 1))
        found.append((order, back, left, sizes, tuple(after)))
        sizes = tuple(after)
    return found


# -- the chain on one chunk ------------------------------------------------------------------------


def _run(chain: list[_Gate], x: Tensor, minus_eye: bool) -> Tensor:
    """(m, in) -> (m, product of the last sizes)."""
    t = _unflatten(x, chain[0].in_sizes)
    total = None
    for k, gate in enumerate(chain):
        moved = gate.restore(gate.apply(gate.arrange(t)))
        if minus_eye:
            total = moved if total is None else _plus(moved, total, total)
            if k < len(chain) - 1:
                moved = _plus(moved, t, None if moved is total else moved)
        t = moved
    return (t if total is None else total).flatten(1)


def _inputs(chain: list[_Gate], x: Tensor, minus_eye: bool) -> list[Tensor]:
    """The input of every gate, in the order of its product."""
    t = _unflatten(x, chain[0].in_sizes)
    inputs = []
    for gate in chain[:-1]:
        inputs.append(gate.arrange(t))
        square = minus_eye and gate.in_sizes == gate.out_sizes
        moved = gate.restore(gate.apply(inputs[-1], onto=inputs[-1] if square else None))
        t = _plus(moved, t, moved) if minus_eye and not square else moved
    return [*inputs, chain[-1].arrange(t)]


def _run_back(
    chain: list[_Gate], dy: Tensor, inputs: list[Tensor], sums: list[Tensor], minus_eye: bool
) -> Tensor:
    """dx (m, product of the first sizes) for dy; the gates' gradients are added to `sums`."""
    grad = _unflatten(dy, chain[-1].out_sizes)
    total = None
    for k, gate in reversed([*enumerate(chain)]):
        arranged = gate.arrange(grad)
        if inputs:
            sums[k].add_(gate.outer(arranged, inputs[k]))
        if k == 0 and total is not None and total.shape[1:] == gate.in_sizes:
            return gate.apply(arranged, transpose=True, onto=total).flatten(1)
        moved = gate.restore(gate.apply(arranged, transpose=True))
        if minus_eye:
            total = moved if total is None else _plus(moved, total, total)
            if k:
                moved = _plus(moved, grad, None if moved is total else moved)
        grad = moved
    return (grad if total is None else total).flatten(1)


def _rows(t: Tensor) -> Tensor:
    """(b, a, ...) -> (b a, ...)."""
    return t.flatten(0, 1).flatten(1)


def _pairs(t: Tensor) -> Tensor:
    """(m, ..., b, a) -> (m ..., b a)."""
    return t.flatten(-2).flatten(0, -2)


def _unflatten(x: Tensor, sizes: Sizes) -> Tensor:
    """(m, n) -> (m, d1, ..., dN), zeros behind x where the sizes make more than n."""
    width = math.prod(sizes)
    if x.shape[1] < width:
        x = F.pad(x, (0, width - x.shape[1]))
    return x.reshape(-1, *sizes)


def _permute(t: Tensor, order: Sizes) -> Tensor:
    """t with its dimensions in another order, contiguous; the last one stays the last.

    Copied in units of up to 16 bytes, one position within the last dimension at a time: a copy of
    single bf16 numbers, or one whose inner loop has a few steps, takes several times as long.
    """
    if order == tuple(range(t.dim())):
        return t
    run = t.shape[-1] * t.element_size()
    unit = next(size for size in UNITS if run % size == 0)
    source = t.contiguous().view(UNITS[unit])
    target = source.new_empty([source.shape[d] for d in order])
    for i in range(run // unit):
        target[..., i].copy_(source[..., i].permute(order[:-1]))
    return target.view(t.dtype)


def _plus(moved: Tensor, t: Tensor, into: Tensor | None) -> Tensor:
    """moved + E t, with t cropped or zero-padded to the sizes of `moved`; written over `into`, one
    of the two, where it has these sizes."""
    if moved.shape == t.shape:
        return torch.add(moved, t, out=into)
    common = tuple(slice(min(pair)) for pair in zip(moved.shape, t.shape, strict=True))
    total = moved if into is moved else moved.clone()
    total[common] += t[common]
    return total
