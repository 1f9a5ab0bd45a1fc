"""Plain torch forward and backward of the QuanTA chain, a chunk of tokens at a time.

Nothing but x is held for the backward: it runs the chain again, chunk by chunk, so what is alive in
between is a few chunks and not N(N-1)/2 activations. Formulas and shapes are those of
`reference.py`.

With `minus_eye` the chain of identity gates E is taken off: with D = G - E formed in the dtype of
the gates, t_k the input of gate k and d the sum of D_k t_k carried to the end,

    t_{k+1} = E_k t_k + D_k t_k,    T x - E x = d,

and E_k crops or zero-pads. The backward of x is the same with the gates transposed.

A gate is one matrix product. Between gates an activation is (m, d1, ..., dN); for a gate that has
the last axis it becomes (m, ..., b, last), for another (b, a, m, ..., last). So the last axis is
never moved, and a permutation copies runs of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple

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
    moved = _run(chain, x, False).view(-1, *chain[-1].place.out_sizes)
    return _plus(moved, -_unflatten(x, chain[0].place.in_sizes)).flatten(1)[:, :out_features]


def quanta_backward(
    dy: Tensor, x: Tensor, gates: list[Tensor], frozen: list[Tensor], minus_eye: bool,
    need_gates: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Gradients of x and of the gates, given x (M, in) and dy (M, out)."""
    whole = _chain(gates, x.dtype, False)
    chain = _chain(gates, x.dtype, True) if minus_eye else whole
    back = [gate.transposed for gate in reversed(chain)]
    twin = [gate.transposed for gate in reversed(_chain(frozen, x.dtype, False))]
    sums = [torch.zeros_like(gate).flatten(0, 1).flatten(1) for gate in gates]  # at least fp32

    def update(rows: slice) -> Tensor:
        inputs = _inputs(whole, x[rows]) if need_gates else []

        def add_outer(k: int, grad: Tensor) -> None:
            sums[-1 - k].add_(chain[-1 - k].outer(grad, inputs.pop()))

        moved = _run(back, dy[rows], minus_eye, add_outer if need_gates else None)
        if twin:
            moved -= _run(twin, dy[rows], False)
        return moved[:, : x.shape[1]]

    dx = _by_chunks(update, x, chain, x.shape[1])
    if not need_gates:
        return dx, [None] * len(gates)
    return dx, [total.view(gate.shape) for gate, total in zip(gates, sums, strict=True)]


def _by_chunks(
    update: Callable[[slice], Tensor], x: Tensor, chain: list["_Gate"], width: int
) -> Tensor:
    """`update` of all rows, a chunk of them at a time."""
    widest = max(math.prod(s) for g in chain for s in (g.place.in_sizes, g.place.out_sizes))
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
class _Place:
    """Everything about a gate but its values."""

    order: Sizes  # the dimensions of (m, d1, ..., dN) as the product takes them
    left: bool  # the gate's axes come first: the matrix is multiplied from the left
    in_sizes: Sizes  # (d1, ..., dN) before
    out_sizes: Sizes  # and after

    @cached_property
    def back(self) -> Sizes:
        """The inverse permutation."""
        return tuple(self.order.index(d) for d in range(len(self.order)))

    @cached_property
    def made(self) -> Sizes:
        """The shape that the product makes, -1 for m."""
        return tuple((-1, *self.out_sizes)[d] for d in self.order)

    @cached_property
    def transposed(self) -> "_Place":
        return replace(self, in_sizes=self.out_sizes, out_sizes=self.in_sizes)


class _Gate(NamedTuple):
    matrix: Tensor  # (out_b out_a, in_b in_a)
    place: _Place

    @property
    def transposed(self) -> "_Gate":
        return _Gate(self.matrix.T, self.place.transposed)

    def apply(self, t: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gate on t, added to `onto` if that is given; all in the order of the product."""
        flat = _rows if self.place.left else _pairs
        factors = (self.matrix, flat(t)) if self.place.left else (flat(t), self.matrix.T)
        if onto is not None:
            total = flat(onto)
            return torch.addmm(total, *factors, out=total).view(onto.shape)
        return torch.mm(*factors).view(self.place.made)

    def outer(self, grad: Tensor, t: Tensor) -> Tensor:
        """The gradient of the matrix, both arguments in the order of the product."""
        if self.place.left:
            return _rows(grad) @ _rows(t).T
        grad, t = _pairs(grad), _pairs(t)
        if len(t) % 2:
            return grad.T @ t
        # Long and thin: two halves keep two threads busier than one product does.
        halves = torch.bmm(grad.view(2, -1, grad.shape[1]).mT, t.view(2, -1, t.shape[1]))
        return halves.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))

    def arrange(self, t: Tensor, before: "_Gate | None" = None) -> Tensor:
        """t in the order of this gate's product, from (m, d1, ..., dN) or the order of another."""
        order = self.place.order
        return _permute(t, tuple(before.place.back[d] for d in order) if before else order)

    def restore(self, t: Tensor) -> Tensor:
        """(m, d1, ..., dN) from the order of the product."""
        return _permute(t, self.place.back)


def _chain(gates: list[Tensor], dtype: torch.dtype, minus_eye: bool) -> list[_Gate]:
    chain = []
    for gate, place in zip(gates, _places(tuple(g.shape for g in gates)), strict=True):
        matrix = gate.to(dtype, copy=minus_eye, memory_format=torch.contiguous_format)
        if minus_eye:
            _eye(matrix).copy_(_eye(gate) - 1)
        out_b, out_a, in_b, in_a = gate.shape
        chain.append(_Gate(matrix.reshape(out_b * out_a, in_b * in_a), place))
    return chain


def _eye(gate: Tensor) -> Tensor:
    """Both diagonals of a gate at once: (min of b, min of a)."""
    return gate.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)


@cache
def _places(shapes: tuple[Sizes, ...]) -> list[_Place]:
    found = []
    for (b, a), before, after in reference.quanta_steps(shapes):
        n = len(before)
        left = a != n - 1
        rest = [d for d in range(n + 1) if d not in (b + 1, a + 1, n)]
        order = (b + 1, a + 1, *rest, n) if left else (*rest, b + 1, n)
        found.append(_Place(order, left, before, after))
    return found


# -- the chain on one chunk ------------------------------------------------------------------------


def _run(
    chain: list[_Gate], x: Tensor, minus_eye: bool, see: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """(m, in) -> (m, product of the last sizes). `see` is shown the input of each gate.

    With `minus_eye` that is x + total, where total is what the gates before have added.
    """
    source = _unflatten(x, chain[0].place.in_sizes)
    total, before = None, None
    for k, gate in enumerate(chain):
        if total is None:
            t = gate.arrange(source)
        else:
            total = gate.arrange(total, before)
            t = _plus(total, gate.arrange(source)) if minus_eye else total
        if see:
            see(k, t)
        if total is None or not minus_eye:
            total = gate.apply(t)
        elif gate.place.in_sizes == gate.place.out_sizes:
            total = gate.apply(t, onto=total)
        else:
            total = _plus(gate.apply(t), total)
        before = gate
    assert total is not None
    return chain[-1].restore(total).flatten(1)


def _inputs(chain: list[_Gate], x: Tensor) -> list[Tensor]:
    """The input of every gate, in the order of its product."""
    inputs = [chain[0].arrange(_unflatten(x, chain[0].place.in_sizes))]
    for gate, following in pairwise(chain):
        inputs.append(following.arrange(gate.apply(inputs[-1]), gate))
    return inputs


def _rows(t: Tensor) -> Tensor:
    """(b, a, ...) -> (b a, ...)."""
    return t.reshape(t.shape[0] * t.shape[1], -1)


def _pairs(t: Tensor) -> Tensor:
    """(m, ..., b, a) -> (m ..., b a)."""
    return t.reshape(-1, t.shape[-2] * t.shape[-1])


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
    if order == tuple(range(len(order))):
        return t
    run = t.shape[-1] * t.element_size()
    unit = next(size for size in UNITS if run % size == 0)
    source = t.contiguous()
    if source.storage_offset() * source.element_size() % unit:
        source = source.clone()  # a view as units has to start on one
    source = source.view(UNITS[unit])
    if run == unit:
        return source.permute(order).contiguous().view(t.dtype)
    target = source.new_empty([source.shape[d] for d in order])
    for i in range(run // unit):
        target[..., i].copy_(source[..., i].permute(order[:-1]))
    return target.view(t.dtype)


def _plus(moved: Tensor, t: Tensor) -> Tensor:
    """moved + E t: t is cropped or zero-padded to the sizes of `moved`."""
    if moved.shape == t.shape:
        return moved + t
    common = tuple(slice(min(pair)) for pair in zip(moved.shape, t.shape, strict=True))
    total = moved.clone()
    total[common] += t[common]
    return total
