"""QuanTA: a full-rank update from small gates (Chen et al. 2024, https://arxiv.org/abs/2406.00132)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from structadapt import ops
from structadapt.adapters.base import Adapter, uniform

STARTS = ("identity", "paper", "zero_last")
MIN_AXES, MAX_AXES = 3, 5


@dataclass(frozen=True, init=False, repr=False)
class QuanTA(Adapter):
    """W' = W + T(gates) - T(gates at the start).

    x is reshaped to N axes, d1 d2 ... dN = in; one gate per pair of axes acts on it, in the order
    (-1,-2), (-1,-3), ..., (-2,-3), ...; T is the product of the gates. A layer that is not square
    has rectangular gates: the last gate on an axis changes its size, so nothing is padded and
    every row of W' can change.

    axes: how many axes (3 to 5), sizes chosen with the fewest parameters; or the sizes, as in
    (16, 16, 16). Sizes apply to each side of a layer (in, out) whose width is their product; the
    other side of a rectangular layer is factored into as many axes.

    init: "identity": gates start as the identity E (cropped or padded where rectangular) and
    y = W x + (T x - E x). "paper": kaiming-uniform gates and a frozen copy of them. "zero_last":
    kaiming-uniform gates, the last one zero. There is no scale to choose.

    `init` (the method) returns gate_0, gate_1, ... in order of application, each of the shape
    (out_b, out_a, in_b, in_a) with b the earlier axis; "paper" adds frozen_0, ...

    Raises ValueError for other axes or init, for sizes that fit neither side of a layer, and, where
    the sizes are chosen here, for a layer whose gates would cost as much as its weight.
    """

    axes: int | tuple[int, ...]
    start: str  # the constructor's `init`

    def __init__(self, axes: int | tuple[int, ...] = 3, init: str = "identity") -> None:
        sizes = tuple(axes) if isinstance(axes, Iterable) else (axes,)
        n_axes = len(sizes) if isinstance(axes, Iterable) else axes
        whole = all(isinstance(d, int) and not isinstance(d, bool) and d > 0 for d in sizes)
        if not whole or not MIN_AXES <= n_axes <= MAX_AXES:
            raise ValueError(
                f"QuanTA: axes must be a number from {MIN_AXES} to {MAX_AXES} or as many positive "
                f"sizes, got {axes!r}"
            )
        if init not in STARTS:
            expected = ", ".join(map(repr, STARTS))
            raise ValueError(f"QuanTA: init must be one of {expected}, got {init!r}")
        object.__setattr__(self, "axes", axes if isinstance(axes, int) else sizes)
        object.__setattr__(self, "start", init)

    def __repr__(self) -> str:
        return f"QuanTA(axes={self.axes!r}, init={self.start!r})"

    def config(self) -> dict[str, Any]:
        return {"axes": self.axes, "init": self.start}

    def sizes(self, out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of both sides of a layer: (d1', ..., dN') of the output, (d1, ..., dN)."""
        shape = f"{in_features} -> {out_features}"
        if isinstance(self.axes, int):
            out_axes = factorise(out_features, self.axes)
            in_axes = factorise(in_features, self.axes)
            cost = sum(math.prod(s) for s in gate_shapes(out_axes, in_axes))
            if cost >= out_features * in_features:
                raise ValueError(
                    f"QuanTA: {shape} does not factor into {self.axes} axes: the best, "
                    f"{times(in_axes)} -> {times(out_axes)}, has {cost:,} parameters and the "
                    f"weight itself {out_features * in_features:,}; exclude this layer"
                )
            return out_axes, in_axes
        width = math.prod(self.axes)
        if width not in (in_features, out_features):
            raise ValueError(
                f"QuanTA: axes {times(self.axes)} make {width}, but the layer is {shape}; "
                f"give sizes that make {in_features} or {out_features}, or a number of axes"
            )
        out_axes = self.axes if width == out_features else factorise(out_features, len(self.axes))
        in_axes = self.axes if width == in_features else factorise(in_features, len(self.axes))
        return out_axes, in_axes

    def init(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = gate_shapes(*self.sizes(*W.shape))
        if self.start == "identity":
            dtype = ops.wide_dtype(W.dtype)
            gates = [ops.eye_gate(torch.empty(s, dtype=dtype, device=W.device)) for s in shapes]
            return {f"gate_{i}": gate for i, gate in enumerate(gates)}
        generator = generator or torch.Generator().manual_seed(0)
        # kaiming-uniform with gain 1, as the official code has it: variance 1 / fan_in
        gates = [uniform(s, math.sqrt(3 / (s[2] * s[3])), W, generator) for s in shapes]
        p = {f"gate_{i}": gate for i, gate in enumerate(gates)}
        if self.start == "zero_last":
            gates[-1].zero_()
            return p
        return {**p, **{f"frozen_{i}": gate.clone() for i, gate in enumerate(gates)}}

    def update(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """(W' - W) x for x (..., in)."""
        gates = _numbered(p, "gate")
        if self.start == "identity":
            return ops.quanta_apply_minus_eye(x, gates)
        if self.start == "zero_last":
            return ops.quanta_apply(x, gates)
        return ops.quanta_apply(x, gates) - ops.quanta_apply(x, _numbered(p, "frozen"))

    def weight(self, W: Tensor, p: dict[str, Tensor]) -> Tensor:
        wide = ops.wide_dtype(W.dtype)
        columns = torch.eye(W.shape[1], dtype=wide, device=W.device)  # row i is e_i
        with ops.no_autocast(W.device):
            return (W.to(wide) + self.update(columns, p).T).to(W.dtype)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        y = torch.nn.functional.linear(x, W, bias)
        return y + self.update(x, p)


def gate_shapes(
    out_axes: tuple[int, ...], in_axes: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    """Shapes of the gates in order; the last gate on an axis takes it from in to out size."""
    pairs = ops.quanta_pairs(len(in_axes))
    last_gate = {axis: i for i, pair in enumerate(pairs) for axis in pair}
    shapes = []
    for i, (b, a) in enumerate(pairs):
        out_b = out_axes[b] if last_gate[b] == i else in_axes[b]
        out_a = out_axes[a] if last_gate[a] == i else in_axes[a]
        shapes.append((out_b, out_a, in_axes[b], in_axes[a]))
    return shapes


@cache
def factorise(n: int, n_axes: int) -> tuple[int, ...]:
    """The n_axes factors of n, largest first, whose square gates have the fewest parameters."""

    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)})

    def choices(rest: int, axes: int, largest: int) -> list[tuple[int, ...]]:
        if axes == 1:
            return [(rest,)] if rest <= largest else []
        fitting = [d for d in divisors if d <= largest and rest % d == 0]
        return [(d, *tail) for d in fitting for tail in choices(rest // d, axes - 1, d)]

    def cost(sizes: tuple[int, ...]) -> int:
        return sum((sizes[b] * sizes[a]) ** 2 for b, a in ops.quanta_pairs(n_axes))

    return min(choices(n, n_axes, n), key=cost)


def times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _numbered(p: dict[str, Tensor], name: str) -> list[Tensor]:
    """name_0, name_1, ... of p in order."""
    return [p[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in p))]
