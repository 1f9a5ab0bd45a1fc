"""The row of one matrix: its singular values, what they are beside random ones, and how the matrix
lies to the weight below it."""

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from structadapt.spectra import engine, marchenko_pastur, measures, nulls, powerlaw, relations
from structadapt.spectra.columns import COLUMNS, NULLED
from structadapt.spectra.geometry import Vectors, lies
from structadapt.spectra.places import Place
from structadapt.spectra.reading import Matrix
from structadapt.spectra.report import WITHOUT_BASE, Record

# What one matrix may raise without an end to the run: files that changed, values that are not
# finite, an iteration that does not converge, no memory for this one. The last two are of
# RuntimeError, as are what torch raises without memory on the CPU and errors of CUDA's libraries.
FAULTS = (ValueError, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Settings:
    """How every matrix is looked at."""

    method: str  # "auto", "gram" or "svd"
    device: torch.device
    strict: bool = False  # raise for a matrix that cannot be analysed
    relations: bool = True  # angles, energy and vectors beside those of W

    def __post_init__(self) -> None:
        if self.method not in engine.METHODS:
            known = ", ".join(engine.METHODS)
            raise ValueError(f"method must be one of {known}, got {self.method!r}")


@dataclass(frozen=True)
class Found:
    """A row, and the singular values it is made of; None where it was skipped."""

    row: Record
    s: Tensor | None = None


class Weight:
    """The weight below an update, looked at once for all rows of its module."""

    def __init__(self, matrix: Matrix, settings: Settings) -> None:
        self.matrix, self.settings = matrix, settings

    @cached_property
    def vectors(self) -> Vectors:
        """Its singular vectors, and values."""
        return Vectors(self.matrix.rows, self.matrix.shape, self.settings.device)

    @cached_property
    def s(self) -> Tensor:
        """Its singular values (min(out, in),), float64, the largest first."""
        return (
            self.vectors.values
            if self.settings.relations
            else _spectrum(self.matrix, self.settings).s
        )


def look(matrices: list[Matrix], place: Place, settings: Settings) -> list[Found]:
    """The rows of one module: of its weight, its update, or of direction and whole update."""
    below = next((m.base for m in matrices if m.base is not None), None)
    weight = None if below is None else Weight(below, settings)
    return [_found(matrix, place, weight, settings) for matrix in matrices]


def _found(matrix: Matrix, place: Place, weight: Weight | None, settings: Settings) -> Found:
    began = time.perf_counter()
    row = _blank(matrix, place)
    try:
        spectrum = _spectrum(matrix, settings)
        row.update(_own(spectrum, matrix, row["max_rank"]))
    except FAULTS as error:
        if settings.strict:
            raise
        return Found({**row, "status": "skipped", "reason": _words(error)})
    if matrix.lacks:
        row.update(status="partial", reason=f"{WITHOUT_BASE}{matrix.lacks}")
    if weight is not None:
        try:
            row.update(_beside(spectrum.s, matrix, weight))
        except FAULTS as error:
            if settings.strict:
                raise
            row.update(status="partial", reason=f"{WITHOUT_BASE}{_words(error)}")
    row["seconds"] = time.perf_counter() - began
    return Found(row, spectrum.s)


def _blank(matrix: Matrix, place: Place) -> Record:
    row: Record = dict.fromkeys(COLUMNS)
    for field in ("name", "kind", "shape", "dtype", "source", "precision"):
        row[field] = getattr(matrix, field)
    row.update(layer=place[0], module_type=place[1], n_elements=math.prod(matrix.shape))
    row.update(max_rank=_max_rank(matrix), status="ok", reason="")
    if matrix.kind == "direction" and matrix.base is None:
        words = "direction only: the whole update depends on W, pass base="
        row.update(status="partial", reason=words)
    return row


def _max_rank(matrix: Matrix) -> int:
    """min(out, in), or the rank of the factors; they are read again for the values."""
    n = min(matrix.shape)
    try:
        return n if matrix.factors is None else min(n, matrix.factors()[1].shape[0])
    except FAULTS:
        return n  # the row says why there is nothing


def _spectrum(matrix: Matrix, settings: Settings) -> engine.Spectrum:
    if matrix.factors is not None:
        return engine.factor_spectrum(*(X.to(settings.device) for X in matrix.factors()))
    return engine.spectrum(matrix.rows(), matrix.shape, settings.method, settings.device)


def _own(spectrum: engine.Spectrum, matrix: Matrix, max_rank: int) -> dict[str, Any]:
    """All that the singular values themselves say."""
    double = matrix.dtype == "float64"
    dtype = torch.float64 if double else torch.float32
    edge = measures.noise_edge(matrix.step, matrix.shape)
    found: dict[str, Any] = {
        **measures.summary(spectrum.s, matrix.shape, dtype, edge),
        **powerlaw.summary(spectrum.s),
        **marchenko_pastur.summary(spectrum.s, matrix.shape),
        "method": spectrum.method,
        "sigma_floor": spectrum.floor,
    }
    if _hidden(spectrum, found["spectral_norm"] * max(matrix.shape) * torch.finfo(dtype).eps):
        words = "no numerical_rank: values lie below sigma_floor, which method svd can see"
        found.update(numerical_rank=None, status="partial", reason=words)
    if max_rank < min(matrix.shape):  # a shuffle of the entries has full rank: no null of factors
        found.update(mp_spikes=None, mp_spike_energy=None)
    if found["condition"] is not None and math.isinf(found["condition"]):
        found["condition"] = None
    if found["frobenius_norm"]:
        found.update(_random(found, matrix.shape, max_rank))
    return found


def _hidden(spectrum: engine.Spectrum, threshold: float) -> bool:
    """Whether values above a threshold may be among those that the Gram matrix cannot see."""
    gram = spectrum.method == "gram" and spectrum.below_floor > 0
    return gram and spectrum.floor > threshold


def _random(found: dict[str, Any], shape: tuple[int, int], max_rank: int) -> dict[str, Any]:
    """<measure>_null and <measure>_ratio of what has a Gaussian null."""
    null = nulls.null(shape, max_rank if max_rank < min(shape) else None)
    beside: dict[str, Any] = {}
    for name in NULLED:
        if name.startswith("off_principal"):  # its own random share stands beside it
            continue
        beside[f"{name}_null"] = null.get(name)
        beside[f"{name}_ratio"] = _ratio(found.get(name), null.get(name))
    return beside


def _beside(s: Tensor, matrix: Matrix, weight: Weight) -> dict[str, Any]:
    """How large an update is beside its weight, and how it lies to it."""
    found: dict[str, Any] = {}
    W = weight.s
    if len(W) and W[0] > 0:
        found.update(relations.relative_size(s, W))
    if matrix.magnitude is not None and len(drift := matrix.magnitude().abs()):
        found.update(magnitude_mean=drift.mean().item(), magnitude_max=drift.max().item())
    if matrix.tuned is not None and matrix.base is not None:
        pair = matrix.tuned.rows(), matrix.base.rows()
        found["sparsity"] = relations.update_sparsity(*pair)
    if weight.settings.relations and matrix.kind != "direction" and found:
        found.update(lies(matrix, weight.vectors, weight.settings.device))
    return found


def _ratio(value: float | None, null: float | None) -> float | None:
    return None if value is None or not null else value / null


def _words(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
