"""QuanTA: a full-rank update from small gates (Chen et al. 2024, https://arxiv.org/abs/2406.00132)."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from structadapt import ops
from structadapt.adapters.base import Adapter, uniform

STARTS = ("identity", "paper", "zero_last")
MIN_AXES, MAX_AXES = 3, 5
Sizes = tuple[int, ...]


@dataclass(frozen=True, init=False, repr=False)
class QuanTA(Adapter):
    """W' = W + T(gates) - T(gates at the start).

    x is reshaped to N axes, d1 d2 ... dN = in; one gate per pair of axes acts on it, in the order
    (-1,-2), (-1,-3), ..., (-2,-3), ...; T is the product of the gates. A layer that is not square
    has rectangular gates: the last gate on an axis changes its size, so every row of W' can change
    and every gate parameter counts.

    axes: how many axes (3 to 5), sizes chosen with the fewest parameters; or the sizes, as in
    (16, 16, 16). Sizes apply to each side of a layer (in, out) whose width is their product; the
    other side of a rectangular layer is factored into as many axes, or is given as out_axes, with
    axes then the sizes of the input. A width that has no factors (a prime) or only costly ones (a
    vocabulary) gets axes that make a little more: zeros follow x, outputs too many are dropped.

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
    out_axes: tuple[int, ...] | None  # of the output, where `axes` are those of the input alone

    no_decay: ClassVar[tuple[str, ...]] = ("gate_",)  # towards 0, which is not where W' = W

    def __init__(
        self,
        axes: int | tuple[int, ...] = 3,
        init: str = "identity",
        out_axes: tuple[int, ...] | None = None,
    ) -> None:
        sizes = _sizes("axes", axes) if isinstance(axes, Iterable) else axes
        n_axes = len(sizes) if isinstance(sizes, tuple) else sizes
        whole = isinstance(n_axes, int) and not isinstance(n_axes, bool)
        if not whole or not MIN_AXES <= n_axes <= MAX_AXES:
            raise _bad_axes("axes", axes)
        out = _sizes("out_axes", out_axes) if isinstance(out_axes, Iterable) else None
        if out_axes is not None and (out is None or isinstance(axes, int) or len(out) != n_axes):
            raise ValueError(
                f"QuanTA: out_axes {out_axes!r} need axes with as many sizes, got {axes!r}"
            )
        if init not in STARTS:
            expected = ", ".join(map(repr, STARTS))
            raise ValueError(f"QuanTA: init must be one of {expected}, got {init!r}")
        object.__setattr__(self, "axes", sizes)
        object.__setattr__(self, "start", init)
        object.__setattr__(self, "out_axes", out)

    def __repr__(self) -> str:
        out = f", out_axes={self.out_axes!r}" if self.out_axes else ""
        return f"QuanTA(axes={self.axes!r}, init={self.start!r}{out})"

    def config(self) -> dict[str, Any]:
        out = {"out_axes": self.out_axes} if self.out_axes else {}
        return {"axes": self.axes, "init": self.start, **out}

    def sizes(self, out_features: int, in_features: int) -> tuple[Sizes, Sizes]:
        """The axes of both sides of a layer: (d1', ..., dN') of the output, (d1, ..., dN)."""
        shape = f"{in_features} -> {out_features}"
        if isinstance(self.axes, int):
            out_axes = factorise(out_features, self.axes)
            in_axes = factorise(in_features, self.axes)
            cost = sum(math.prod(s) for s in ops.quanta_gate_shapes(out_axes, in_axes))
            if cost >= out_features * in_features:
                raise ValueError(
                    f"QuanTA: {shape} does not factor into {self.axes} axes: the best, "
                    f"{times(in_axes)} -> {times(out_axes)}, has {cost:,} parameters and the "
                    f"weight itself {out_features * in_features:,}; exclude this layer"
                )
            return out_axes, in_axes
        if self.out_axes is not None:
            for axes, width in ((self.axes, in_features), (self.out_axes, out_features)):
                # Beyond a slab of the first two axes some gate parameters would meet zeros alone.
                if not width <= math.prod(axes) < width + math.prod(axes[2:]):
                    raise ValueError(
                        f"QuanTA: axes {times(axes)} make {math.prod(axes)} for a side of {width} "
                        f"of a layer {shape}; give sizes that make it, or less than "
                        f"{math.prod(axes[2:])} more"
                    )
            return self.out_axes, self.axes
        width = math.prod(self.axes)
        if width not in (in_features, out_features):
            raise ValueError(
                f"QuanTA: axes {times(self.axes)} make {width}, but the layer is {shape}; "
                f"give sizes that make {in_features} or {out_features}, or a number of axes"
            )
        out_axes = self.axes if width == out_features else factorise(out_features, len(self.axes))
        in_axes = self.axes if width == in_features else factorise(in_features, len(self.axes))
        return out_axes, in_axes

    def resolved(self, out_features: int, in_features: int) -> "QuanTA":
        out_axes, in_axes = self.sizes(out_features, in_features)
        return QuanTA(in_axes, self.start, out_axes)

    def init(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = ops.quanta_gate_shapes(*self.sizes(*W.shape))
        if self.start == "identity":
            dtype = ops.wide_dtype(W.dtype)
            gates = [torch.empty(s, dtype=dtype, device=W.device) for s in shapes]
            if not W.is_meta:
                gates = [ops.eye_gate(gate) for gate in gates]
            return {f"gate_{i}": gate for i, gate in enumerate(gates)}
        generator = generator or torch.Generator().manual_seed(0)
        # kaiming-uniform with gain 1, as the official code has it: variance 1 / fan_in
        gates = [uniform(s, math.sqrt(3 / (s[2] * s[3])), W, generator) for s in shapes]
        p = {f"gate_{i}": gate for i, gate in enumerate(gates)}
        if self.start == "zero_last":
            gates[-1].zero_()
            return p
        return {**p, **{f"frozen_{i}": gate.clone() for i, gate in enumerate(gates)}}

    def update(self, x: Tensor, out_features: int, p: dict[str, Tensor]) -> Tensor:
        """(W' - W) x for x (..., in)."""
        moved = ops.quanta_update(x, _gates(p), out_features, self.start == "identity")
        if self.start != "paper":
            return moved
        return moved - ops.quanta_update(x, _frozen(p), out_features, False)

    def weight(self, W: Tensor, p: dict[str, Tensor]) -> Tensor:
        wide = ops.wide_dtype(W.dtype)
        columns = torch.eye(W.shape[1], dtype=wide, device=W.device)  # row i is e_i
        with ops.no_autocast(W.device):
            return (W.to(wide) + self.update(columns, W.shape[0], p).T).to(W.dtype)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        minus_eye = self.start == "identity"
        return ops.quanta_linear(x, W, bias, _gates(p), _frozen(p), minus_eye)

    def onto(
        self,
        y: Tensor,
        x: Tensor,
        W: Callable[[], Tensor],
        bias: Tensor | None,
        p: dict[str, Tensor],
    ) -> Tensor:
        return y + self.update(x.to(y.dtype), y.shape[-1], p)


@cache
def factorise(n: int, n_axes: int) -> Sizes:
    """The sizes, largest first, whose square gates have the fewest parameters.

    Factors of n, unless some sizes that make less than 1/8 more need less than half of their
    parameters. Then the padding is less than one slab of the first two axes, so that no pair of
    indices holds padding alone and every gate parameter counts.
    """
    exact = _cheapest(n, n_axes)
    if _cost(exact) <= 2 * n_axes**2 * n ** (4 / n_axes):  # near the ideal of equal sizes
        return exact
    best = exact
    largest = n + n // 8
    for head in _combinations(largest, n_axes - 1):
        # the smallest first axis that reaches n
        rest = math.prod(head)
        sizes = tuple(sorted((-(-n // rest), *head), reverse=True))
        padding = math.prod(sizes) - n
        fits = math.prod(sizes) <= largest and padding < math.prod(sizes[2:])
        if fits and (_cost(sizes), padding) < (_cost(best), math.prod(best) - n):
            best = sizes
    return best if 2 * _cost(best) < _cost(exact) else exact


def _cheapest(n: int, n_axes: int) -> Sizes:
    """The n_axes factors of n, largest first, with the fewest parameters."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)})

    def choices(rest: int, axes: int, largest: int) -> list[Sizes]:
        if axes == 1:
            return [(rest,)] if rest <= largest else []
        fitting = [d for d in divisors if d <= largest and rest % d == 0]
        return [(d, *tail) for d in fitting for tail in choices(rest // d, axes - 1, d)]

    return min(choices(n, n_axes, n), key=_cost)


def _combinations(n: int, n_axes: int) -> Iterator[Sizes]:
    """Sizes of n_axes near the (n_axes + 1)-th root of n, in every combination."""
    root = n ** (1 / (n_axes + 1))
    near = range(max(1, int(root * 0.4)), int(root * 1.4) + 2)
    return itertools.combinations_with_replacement(near, n_axes)


def _cost(sizes: Sizes) -> int:
    return sum((sizes[b] * sizes[a]) ** 2 for b, a in ops.quanta_pairs(len(sizes)))


def times(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))


def _sizes(name: str, sizes: Iterable[Any]) -> Sizes:
    found = tuple(sizes)
    if not all(isinstance(d, int) and not isinstance(d, bool) and 0 < d <= 2**24 for d in found):
        raise _bad_axes(name, sizes)
    return found


def _bad_axes(name: str, axes: Any) -> ValueError:
    return ValueError(
        f"QuanTA: {name} must be a number from {MIN_AXES} to {MAX_AXES} or as many positive "
        f"sizes, got {axes!r}"
    )


def _gates(p: dict[str, Tensor]) -> list[Tensor]:
    return _numbered(p, "gate")


def _frozen(p: dict[str, Tensor]) -> list[Tensor]:
    return _numbered(p, "frozen")


def _numbered(p: dict[str, Tensor], name: str) -> list[Tensor]:
    """name_0, name_1, ... of p in order."""
    return [p[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in p))]
