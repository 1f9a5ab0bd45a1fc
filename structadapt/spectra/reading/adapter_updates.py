"""The update that an adapter stands for, as matrices: low-rank ones by their factors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from structadapt.adapters import Adapter, DoRA, LoRA
from structadapt.checkpoint import fingerprint
from structadapt.spectra.reading.matrix import (
    PIECE,
    Matrix,
    Rows,
    SourceError,
    Stored,
    all_finite,
    kernel,
    not_finite,
    rows_of,
    spans,
    weight,
    whole_matrix,
)

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One adapted layer, none of it read.

    tensors: the adapter's, by name, in the shapes that its formulas have.
    base: the frozen weight, where the source has it itself.
    stored_transposed: whether a base file has the weight as (in, out); None where only its shape
        or `fingerprint`, that of the weight when the adapter was saved, can tell.
    """

    name: str
    adapter: Adapter
    shape: tuple[int, int]  # (out, in)
    tensors: dict[str, Stored]
    base: Stored | None = None
    stored_transposed: bool | None = None
    fingerprint: str | None = None

    def read(self) -> Parameters:
        """The adapter's tensors in float64. SourceError if one is not finite."""
        return {key: _read(stored).double() for key, stored in self.tensors.items()}

    def refuse_unreadable(self) -> None:
        """SourceError if a tensor has no values."""
        for stored in self.tensors.values():
            if stored.problem:
                raise SourceError(f"{stored.name}: {stored.problem}")


def _read(stored: Stored) -> Tensor:
    tensor = stored.read(0, torch.Size(stored.shape).numel()).view(stored.shape)
    if not all_finite(tensor):
        raise not_finite(stored)
    return tensor


def matrices_of(update: Update, base: Stored | None) -> list[Matrix]:
    """An update as one matrix, or one that depends on W as `direction` and, with a base,
    `effective`."""
    adapter, some = update.adapter, next(iter(update.tensors.values()))
    below = None if base is None else weight(update.name, base)
    word = "factors" if isinstance(adapter, LoRA) else "tensors"
    what: dict[str, Any] = {
        "name": update.name,
        "shape": update.shape,
        "dtype": some.dtype,
        "source": some.source,
        "precision": f"{word} {some.dtype}",
        "base": below,
    }
    if isinstance(adapter, LoRA):
        factors = _factors(update, adapter)
        kind = "update" if adapter.additive else "direction"
        found = [Matrix(kind=kind, rows=_product(factors, update.shape), factors=factors, **what)]
    else:
        kind = "update" if adapter.additive else "direction"
        found = [Matrix(kind=kind, rows=_dense(update), **what)]
    if not adapter.additive and base is not None:
        what["precision"] += f" over {base.dtype}"
        by_rows = isinstance(adapter, DoRA)
        rows = _scaled_rows(update, base) if by_rows else _effective(update, base)
        magnitude = _magnitude(update, base) if by_rows else None
        found.append(Matrix(kind="effective", rows=rows, magnitude=magnitude, **what))
    return found


def _factors(update: Update, adapter: LoRA) -> Callable[[], tuple[Tensor, Tensor]]:
    def factors() -> tuple[Tensor, Tensor]:
        p = update.read()
        return adapter.scale * p["B"], p["A"]

    return factors


def _product(factors: Callable[[], tuple[Tensor, Tensor]], shape: tuple[int, int]) -> Rows:
    def rows() -> Iterator[Tensor]:
        B, A = factors()
        for start, stop in spans(shape):
            yield B[start:stop] @ A

    return rows


def _scaled_rows(update: Update, base: Stored) -> Rows:
    """DoRA: every row of W' depends on its row of W alone."""

    def rows() -> Iterator[Tensor]:
        p = update.read()
        for (start, stop), part in zip(spans(update.shape), rows_of(base), strict=True):
            W = part.double()
            own = {"A": p["A"], "B": p["B"][start:stop], "m": p["m"][start:stop]}
            yield update.adapter.weight(W, own) - W

    return rows


def _magnitude(update: Update, base: Stored) -> Callable[[], Tensor]:
    def magnitude() -> Tensor:
        m = _read(update.tensors["m"]).double()
        norm = torch.cat([W.double().norm(dim=1) for W in rows_of(base)])
        return torch.where(norm > 0, m / norm - 1, 0.0)  # no share of a row that is zero

    return magnitude


def _dense(update: Update) -> Rows:
    """W' - W without W: of QuanTA all of it, exact, formed whole in float64."""

    def rows() -> Iterator[Tensor]:
        p, apply = update.read(), getattr(update.adapter, "update", None)
        if apply is None:
            delta = update.adapter.direction(update.shape, p)
        else:
            out, width = update.shape
            delta = torch.empty(update.shape, dtype=torch.float64)
            for start, stop in spans((width, max(out, width)), 4 * PIECE):
                unit = torch.zeros(stop - start, width, dtype=torch.float64)
                unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
                delta[:, start:stop] = apply(unit, out, p).T
        for start, stop in spans(update.shape):
            yield delta[start:stop]

    return rows


def _effective(update: Update, base: Stored) -> Rows:
    """W' - W by the adapter's own definition, formed whole."""

    def rows() -> Iterator[Tensor]:
        W = whole_matrix(base).double()
        delta = update.adapter.weight(W, update.read()) - W
        for start, stop in spans(update.shape):
            yield delta[start:stop]

    return rows


# -- the weight below ------------------------------------------------------------------------------


def fitted(update: Update, base: Stored) -> Stored:
    """A stored base weight as the matrix (out, in) of an update. SourceError for another shape."""
    if len(base.shape) > 2:
        base = kernel(base)
    fits = [b for b in _ways(base) if b.matrix_shape() == update.shape]
    if len(fits) == 1 or (fits and update.stored_transposed is None and not update.fingerprint):
        return fits[0]
    if fits and update.stored_transposed is not None:
        return fits[1] if update.stored_transposed else fits[0]
    if fits:
        return _oriented(fits[0], update.fingerprint or "")
    raise SourceError(f"{update.name} is {update.shape} in the source and {base.shape} in the base")


def _ways(base: Stored) -> list[Stored]:
    """As it is stored, and, unless that is known of it, as the transpose."""
    if len(base.shape) != 2:
        return []
    return [base] if base.transposed else [base, replace(base, transposed=True)]


def _oriented(base: Stored, digests: str) -> Stored:
    """A square weight, turned if only its transpose is the one that the adapter was saved over."""
    turned: list[bool] = []

    def read(start: int, stop: int) -> Tensor:
        if not turned:
            W = whole()
            straight, across = (set(fingerprint(M).split("-")) for M in (W, W.T))
            saved = set(digests.split("-"))
            turned.append(not straight & saved and bool(across & saved))
        return whole().T.reshape(-1)[start:stop] if turned[0] else base.read(start, stop)

    def whole() -> Tensor:
        return base.read(0, base.shape[0] * base.shape[1]).view(base.shape)

    return replace(base, read=read)
