"""Plain torch forward and backward of the QuanTA chain, a chunk of tokens at a time.

Nothing but x is held for the backward: it runs the chain again, chunk by chunk, so what is alive in
between is a few chunks and not N(N-1)/2 activations. Formulas and shapes are those of
`reference.py`. A gate is one matrix product on its two axes moved to the end; the axes stay where
they were moved until the next gate needs others.

With `minus_eye` the chain of identity gates E is taken off: with D = G - E formed in the dtype of
the gates, t_k the input of gate k and d the sum of D_k t_k carried to the end,

    t_{k+1} = E_k t_k + D_k t_k,    T x - E x = d,

and E_k crops or zero-pads. The backward is the same recursion with the gates transposed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt.kernels import reference

CHUNK_ELEMENTS = 2**18  # of one activation: a chunk's few activations stay in cache

Order = tuple[int, ...]


def quanta_forward(
    y: Tensor, x: Tensor, gates: list[Tensor], frozen: list[Tensor], minus_eye: bool
) -> None:
    """y += T x for y (M, out), x (M, in); T x - E x with `minus_eye`, T x - T0 x with `frozen`."""
    steps, twin = _steps(gates, x.dtype, minus_eye), _steps(frozen, x.dtype, False)
    for rows in _chunks(x.shape[0], steps):
        moved = _run(steps, x[rows], minus_eye)
        if twin:
            moved -= _run(twin, x[rows], False)
        y[rows] += moved[:, : y.shape[1]]


def quanta_backward(
    dx: Tensor | None, dy: Tensor, x: Tensor, gates: list[Tensor], frozen: list[Tensor],
    minus_eye: bool, need_gates: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the gates, given x (M, in) and dy (M, out); dx (M, in) += that of x."""
    steps, twin = _steps(gates, x.dtype, minus_eye), _steps(frozen, x.dtype, False)
    sums = [torch.zeros_like(gate).flatten(0, 1).flatten(1) for gate in gates]  # at least fp32
    for rows in _chunks(x.shape[0], steps):
        inputs: list[Tensor] = []
        if need_gates:
            _run(steps, x[rows], minus_eye, inputs)
        moved = _run_back(steps, dy[rows], inputs, sums, minus_eye)
        if dx is not None:
            if twin:
                moved = moved - _run_back(twin, dy[rows], [], [], False)
            dx[rows] += moved[:, : x.shape[1]]
    if not need_gates:
        return [None] * len(gates)
    return [step.back(total) for step, total in zip(steps, sums, strict=True)]


@dataclass(frozen=True)
class _Step:
    """One gate as a matrix on the last two axes of an activation in a certain order of axes."""

    matrix: Tensor  # (out pair, in pair)
    order: Order  # the axes of the activation; the gate's pair comes last
    in_sizes: Order  # in that order
    out_sizes: Order
    shape: Order  # of the gate
    flipped: bool  # the pair's later axis comes first

    def back(self, matrix: Tensor) -> Tensor:
        """A matrix like this step's in the shape of the gate."""
        out_b, out_a, in_b, in_a = self.shape
        if self.flipped:
            return matrix.view(out_a, out_b, in_a, in_b).permute(1, 0, 3, 2)
        return matrix.view(self.shape)


def _steps(gates: list[Tensor], dtype: torch.dtype, minus_eye: bool) -> list[_Step]:
    if not gates:
        return []
    sizes = list(reference.quanta_axes(gates))
    order = tuple(range(len(sizes)))
    steps = []
    for gate, (b, a) in zip(gates, reference.quanta_pairs(len(sizes)), strict=True):
        rest = tuple(axis for axis in order if axis not in (b, a))
        pair = tuple(axis for axis in order if axis in (b, a))
        order, flipped = rest + pair, pair != (b, a)
        matrix = gate - reference.eye_gate(gate) if minus_eye else gate
        matrix = matrix.permute(1, 0, 3, 2) if flipped else matrix
        matrix = matrix.flatten(2).flatten(0, 1).to(dtype)
        in_sizes = tuple(sizes[axis] for axis in order)
        sizes[b], sizes[a] = gate.shape[0], gate.shape[1]
        out_sizes = tuple(sizes[axis] for axis in order)
        steps.append(_Step(matrix, order, in_sizes, out_sizes, tuple(gate.shape), flipped))
    return steps


def _chunks(rows: int, steps: list[_Step]) -> Iterator[slice]:
    width = max(max(math.prod(s.in_sizes), math.prod(s.out_sizes)) for s in steps)
    size = max(16, CHUNK_ELEMENTS // width)
    return (slice(i, i + size) for i in range(0, rows, size))


def _run(
    steps: list[_Step], x: Tensor, minus_eye: bool, inputs: list[Tensor] | None = None
) -> Tensor:
    """The chain for x (m, in) -> (m, padded out); with `inputs`, only collect each gate's input."""
    order = tuple(sorted(steps[0].order))
    t = _unflatten(x, steps[0].in_sizes, steps[0].order)
    total = None
    for k, step in enumerate(steps):
        t, order = _arrange(t, order, step.order), step.order
        if inputs is not None:
            inputs.append(t)
            if k == len(steps) - 1:
                break
        moved = _matmul(t, step.matrix.T, step.out_sizes)
        if minus_eye and inputs is None:
            total = _accumulate(total, moved, order, steps[-1].out_sizes, steps[-1].order)
        if minus_eye and k < len(steps) - 1:
            _add(moved, t)
        t = moved
    return _flatten(t, order) if total is None else total.flatten(1)


def _run_back(
    steps: list[_Step], dy: Tensor, inputs: list[Tensor], sums: list[Tensor], minus_eye: bool
) -> Tensor:
    """dx (m, padded in) for dy (m, out); the gates' gradients are added to `sums`."""
    order = tuple(sorted(steps[0].order))
    grad = _unflatten(dy, steps[-1].out_sizes, steps[-1].order)
    total = None
    for k, step in reversed([*enumerate(steps)]):
        grad, order = _arrange(grad, order, step.order), step.order
        if inputs:
            sums[k].add_(_pairs(grad).T @ _pairs(inputs[k]))
        moved = _matmul(grad, step.matrix, step.in_sizes)
        if minus_eye:
            total = _accumulate(total, moved, order, steps[0].in_sizes, steps[0].order)
            if k:
                _add(moved, grad)
        grad = moved
    return _flatten(grad, order) if total is None else total.flatten(1)


def _pairs(t: Tensor) -> Tensor:
    """(m, ..., b, a) -> (m ..., b a)."""
    return t.reshape(-1, t.shape[-2] * t.shape[-1])


def _matmul(t: Tensor, matrix: Tensor, sizes: Order) -> Tensor:
    return (_pairs(t) @ matrix).view(t.shape[0], *sizes)


def _unflatten(x: Tensor, sizes: Order, order: Order) -> Tensor:
    """(m, n) -> (m, d1, ..., dN), zeros behind x where the axes make more than n."""
    width = math.prod(sizes)
    if x.shape[1] < width:
        x = F.pad(x, (0, width - x.shape[1]))
    return x.reshape(-1, *(size for _, size in sorted(zip(order, sizes, strict=True))))


def _flatten(t: Tensor, order: Order) -> Tensor:
    return _arrange(t, order, tuple(sorted(order))).reshape(t.shape[0], -1)


def _arrange(t: Tensor, order: Order, wanted: Order) -> Tensor:
    """t (m, axes in `order`) with its axes in the wanted order."""
    return t.permute(0, *(1 + order.index(axis) for axis in wanted))


def _add(into: Tensor, t: Tensor) -> None:
    """into += E t: t cropped or zero-padded to the sizes of `into`."""
    if into.shape != t.shape:
        common = tuple(slice(min(pair)) for pair in zip(into.shape, t.shape, strict=True))
        into, t = into[common], t[common]
    into += t


def _accumulate(
    total: Tensor | None, moved: Tensor, order: Order, sizes: Order, sizes_order: Order
) -> Tensor:
    """total (m, axes in their own order) + E moved; a new total if there is none yet."""
    own = tuple(sorted(order))
    moved = _arrange(moved, order, own)
    shape = (moved.shape[0], *(n for _, n in sorted(zip(sizes_order, sizes, strict=True))))
    if total is None:
        if moved.shape == shape:
            return moved.clone(memory_format=torch.contiguous_format)
        total = moved.new_zeros(shape)
    _add(total, moved)
    return total
