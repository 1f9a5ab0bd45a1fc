"""What a source holds: matrices that are read when asked, and what is left out, with the reason.

Nothing here knows a file format. A reader makes `Stored` tensors, which say what is stored and
read a part of it; `weight`, and `difference` of differences.py, make of them matrices that can be
looked at.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from structadapt.bounds import in_part

CHUNK = 2**23  # values in a slice of rows: 64 MiB in float64
PIECE = 2**18  # values that fit a cache
DTYPES = {  # what is looked at, by name
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class SourceError(ValueError):
    """A source that cannot be read, naming the file, the tensor and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(in_part(message))


class SourceNotFoundError(SourceError, FileNotFoundError):
    """A file or folder that is not there."""


Rows = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Matrix:
    """One matrix that can be looked at, read when asked.

    kind:
        "weight"     a stored weight
        "update"     W' - W, from two checkpoints or an adapter whose update needs no W
        "direction"  s B A alone, of an adapter whose update depends on W (DoRA)
        "effective"  the whole W' - W of such an adapter, with W

    rows(): slices (k, in) from top to bottom on the CPU, at most 64 MiB each in float64, as often
    as it is called; the values are those stored, differences and products are formed in float64.
    factors(): (B (out, r) with the scale in it, A (r, in)) in float64, the matrix is B A.
    magnitude(): m / ||W||_row - 1 (out,) in float64.

    All three raise SourceError for a value that is not finite, naming the tensor and the first
    such place, and for a file that is not as it was when it was opened.
    """

    name: str  # module path without wrappers and without .weight
    kind: str
    shape: tuple[int, int]  # (out, in)
    dtype: str  # of what is stored
    source: str  # path of the file, or "model"
    precision: str  # how the values came about: "stored float32", "difference of bfloat16", ...
    rows: Rows
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None
    base: "Matrix | None" = None  # the frozen weight of an update
    tuned: "Matrix | None" = None  # W' where both whole checkpoints are there
    magnitude: Callable[[], Tensor] | None = None  # DoRA with a base only
    rounding: Callable[[], float] | None = None  # `step`, when it is asked for
    lacks: str = ""  # why the base, or the model, has no weight for it that can be used

    @cached_property
    def step(self) -> float:
        """sqrt(mean ulp^2) of the stored values that were subtracted, or 0.0.

        Rounding to a grid of step ulp adds noise of variance ulp^2 / 12, so the singular values of
        a difference below step / sqrt(12) (sqrt(out) + sqrt(in)) are rounding. It is summed up
        while `rows` streams; asked for before that, it reads the matrix once by itself. Where both
        are stored below float32, both may be copies of finer masters, and the squares of both ulps
        are added; else the ulp is that of the tuned value, or of the base's where it is coarser.
        """
        return 0.0 if self.rounding is None else self.rounding()


@dataclass(frozen=True)
class Skipped:
    """A tensor, or what ought to be one, that is not looked at."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    reason: str


@dataclass(frozen=True)
class Opened:
    """What a source holds. No values have been read.

    what: the form of the source, in words.
    notes: what a reader of the figures has to know.
    files: (path, bytes, sha256 or None) of every file of the source and the base.
    """

    what: str
    matrices: list[Matrix]
    skipped: list[Skipped]
    notes: list[str]
    files: list[tuple[str, int, str | None]]


@dataclass(frozen=True)
class Stored:
    """A tensor where it is stored.

    read(start, stop): the values from start to stop in storage order, 1-D on the CPU, exact.
    problem: why there is nothing to look at, if so.
    transposed: the matrix (out, in) is stored as (in, out).
    tie: equal for two names of the same storage.
    rounded: whether the values were rounded to the dtype; those of an adapted model were not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    read: Callable[[int, int], Tensor]
    problem: str = ""
    transposed: bool = False
    tie: Hashable = None
    rounded: bool = True

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of one that is 2-D."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def skip(self, reason: str = "") -> Skipped:
        return Skipped(self.name, self.shape, self.dtype, self.source, reason or self.problem)


def spans(shape: tuple[int, int], most: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, stop) of slices of rows, each of at most CHUNK values, at least one row."""
    height = max(1, (most or CHUNK) // max(1, shape[1]))
    for start in range(0, shape[0], height):
        yield start, min(start + height, shape[0])


def rows_of(stored: Stored) -> Iterator[Tensor]:
    """The rows of the matrix (out, in) in the stored dtype, slice by slice.

    A transposed one is read once for every slice: memory is bounded, time is not wasted much, for
    these are embeddings and GPT-2's layers. SourceError for values that are not finite.
    """
    for start, stop in spans(stored.matrix_shape()):
        if stored.transposed:
            part = torch.cat([s[:, start:stop] for s in _stored_rows(stored)]).T
        else:
            part = _block(stored, start, stop)
        if not all_finite(part):
            raise not_finite(stored)
        yield part


def all_finite(x: Tensor) -> bool:
    """In pieces that fit a cache: of a large slice at once it takes several times the memory."""
    flat = x.mT.reshape(-1) if x.dim() == 2 and x.mT.is_contiguous() else x.reshape(-1)
    return all(bool(torch.isfinite(piece).all()) for piece in flat.split(PIECE))


def whole_matrix(stored: Stored) -> Tensor:
    """The matrix (out, in) in the stored dtype, in memory."""
    return torch.cat(list(rows_of(stored)))


def _stored_rows(stored: Stored) -> Iterator[Tensor]:
    rows, columns = stored.shape
    for start, stop in spans((rows, columns)):
        yield _block(stored, start, stop)


def _block(stored: Stored, start: int, stop: int) -> Tensor:
    columns = stored.shape[1]
    return stored.read(start * columns, stop * columns).view(-1, columns)


def not_finite(stored: Stored) -> SourceError:
    """How many values are not finite, and the first, by its place in the stored tensor."""
    size = torch.Size(stored.shape).numel()
    nan = inf = 0
    first = None
    for start, stop in spans((size, 1)):
        values = stored.read(start, stop)
        bad = ~torch.isfinite(values)
        if bad.any():
            nan += int(values.isnan().sum())
            inf += int(values.isinf().sum())
            first = start + int(bad.int().argmax()) if first is None else first
    place: list[int] = []
    for width in reversed(stored.shape):
        first, index = divmod(first or 0, width)
        place.insert(0, index)
    return SourceError(
        f"{stored.source}: {stored.name} is not finite: {nan} NaN and {inf} infinite of {size} "
        f"values, the first at {place}"
    )


def weight(name: str, stored: Stored) -> Matrix:
    """A 2-D stored tensor as it is."""
    precision = f"stored {stored.dtype}"
    shape, source = stored.matrix_shape(), stored.source
    return Matrix(name, "weight", shape, stored.dtype, source, precision, lambda: rows_of(stored))


def expert(stored: Stored, index: int) -> Stored:
    """One matrix of a stored stack (n, a, b)."""
    size = stored.shape[1] * stored.shape[2]

    def read(start: int, stop: int) -> Tensor:
        return stored.read(index * size + start, index * size + stop)

    return replace(stored, name=f"{stored.name}.{index}", shape=stored.shape[1:], read=read)


def kernel(stored: Stored) -> Stored:
    """The kernel of a convolution (out, in, k...) as the matrix (out, in k...)."""
    out, *inner = stored.shape
    return replace(stored, shape=(out, torch.Size(inner).numel()))


def stored_tensor(name: str, tensor: Tensor, source: str, **settings: Any) -> Stored:
    """A tensor in memory. What cannot be looked at has a `problem`."""

    def read(start: int, stop: int) -> Tensor:
        return tensor.detach().reshape(-1)[start:stop].cpu()

    dtype = str(tensor.dtype).removeprefix("torch.")
    problem = problem_of(tensor)
    if not problem and tensor.numel() and tensor.data_ptr():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)
        settings = {"tie": place, **settings}
    return Stored(name, tuple(tensor.shape), dtype, source, read, problem, **settings)


def problem_of(tensor: Tensor) -> str:
    """Why a tensor in memory has no values to look at, or nothing."""
    if hasattr(tensor, "device_mesh"):
        return "sharded over processes: gather it first (full_tensor, or the whole state dict)"
    if hasattr(tensor, "ds_id") and not tensor.numel():
        return "sharded by ZeRO-3, and empty here: gather it first (GatheredParameters)"
    if tensor.is_meta:
        return "on the meta device: it has no values; load the weights first"
    packed = tensor.is_quantized or is_traceable_wrapper_subclass(tensor)
    if tensor.layout is not torch.strided or packed:
        return "no dense tensor of floats: dequantise it, or make it dense first"
    return ""
