"""Singular values of a matrix that arrives in slices of rows, in float64.

"gram"      The eigenvalues of the Gram matrix of the smaller side, half of which is added up
            slice by slice. Values within rounding of the largest, s_1 sqrt(n eps), are lost.
"svd"       QR slice by slice, then an SVD of the triangle: several times slower, and values down
            to s_1 max(m, k) eps are right.
"factors"   Of B A from the factors, by QR of each and an SVD of the small core (r, r).

Values of float16, bfloat16 and float32 are exact in float64, and so are the products of two.
Values in float64 near the ends of its range are scaled by a power of two.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
LEAF = 128  # rows of a Gram matrix that are multiplied whole
GRAM_CHUNK = 2**20, 256  # values that are float64 at a time, and columns at least: fit for a cache
QR_CHUNK = 2**22, 1
METHODS = ("auto", "gram", "svd")

Slices = Tensor | Iterable[Tensor]


class NonFiniteError(ValueError):
    """A matrix with NaN or Inf: `nans` and `infs` of them, the first at (row, column) `first`."""

    def __init__(self, what: str, nans: int, infs: int, first: tuple[int, int]) -> None:
        place = f"first at row {first[0]}, column {first[1]}"
        super().__init__(f"{what} is not finite: {nans} NaN, {infs} Inf, {place}")
        self.nans, self.infs, self.first = nans, infs, first


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a matrix."""

    s: Tensor  # (n,) float64 on the CPU, largest first; exactly 0 below the floor
    method: str  # "gram", "svd" or "factors"
    floor: float  # values below cannot be told from rounding

    @property
    def below_floor(self) -> int:
        """How many values are below the floor, and 0 in `s`."""
        return int((self.s == 0).sum())


def spectrum(
    rows: Slices,
    shape: tuple[int, int] | None = None,
    method: str = "auto",
    device: str | torch.device = "cpu",
) -> Spectrum:
    """All singular values of a matrix (m, k).

    rows: the matrix, or its rows top to bottom in slices (any, k).
    shape: (m, k); needed with slices.
    method: "gram" ("auto" is the same) or "svd".
    device: where the work is done, "cpu" or a CUDA device. A matrix with fewer rows than columns
        is held whole there, in the dtype it comes in; of others one slice at a time.

    Raises NonFiniteError (a ValueError) that counts NaN and Inf; ValueError for rows that do not
    fit the shape, an unknown method, or a device without float64.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if torch.device(device).type == "mps":
        raise ValueError("an mps device has no float64: pass device='cpu'")
    m, k = shape = _checked_shape(rows, shape)
    n = min(m, k)
    if method == "svd":
        R, unit = _triangle(_columns(rows, shape, device, QR_CHUNK), n, device)
        # The SVD of CUDA is no faster at these sizes, and its default driver less accurate.
        s = torch.linalg.svdvals(R.cpu()) if n else R.new_zeros(0).cpu()
        return _spectrum(s, "svd", max(m, k) * EPS, unit)
    G, unit = _gram(_columns(rows, shape, device, GRAM_CHUNK), n, device)
    energy = torch.linalg.eigvalsh(G).flip(0).clamp(min=0).cpu() if n else G.new_zeros(0).cpu()
    return _spectrum(energy.sqrt(), "gram", math.sqrt(n * EPS), unit)


def factor_spectrum(B: Tensor, A: Tensor) -> Spectrum:
    """All min(m, k) singular values of B A, B (m, r) and A (r, k), which is never formed.

    B = Q R and A^T = P S give B A = Q (R S^T) P^T: the values are those of R S^T, and 0. Raises
    NonFiniteError; ValueError for factors that do not fit.
    """
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(f"expected (m, r) and (r, k), got {tuple(B.shape)} and {tuple(A.shape)}")
    (m, r), k = B.shape, A.shape[1]
    s = torch.zeros(min(m, k), dtype=torch.float64)
    if not B.numel() or not A.numel():
        return Spectrum(s, "factors", 0.0)
    triangles, unit, bound = [], 0, 1.0
    for name, X in (("the factor B", B), ("the factor A, transposed,", A.T)):
        size = _size(X, name)
        X = X.detach().to(torch.float64)
        exponent = _exponent(size)
        triangles.append(torch.linalg.qr(X * math.ldexp(1.0, -exponent), mode="r").R)
        bound *= torch.linalg.matrix_norm(triangles[-1]).item()
        unit += exponent
    values = torch.linalg.svdvals((triangles[0] @ triangles[1].T).cpu())
    s[: len(values)] = values
    floor = max(m, k, r) * EPS * bound
    s = torch.where(s > floor, s, 0.0)
    return Spectrum(_scale(s, unit), "factors", floor * math.ldexp(1.0, unit))


def eigenvectors(
    rows: Slices, shape: tuple[int, int] | None = None, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """(s (j,), vectors (n, j)) of the smaller side n = min(m, k), leading first, on the device:
    right singular vectors of a tall or square matrix, left ones of a wide one, those above the Gram
    floor. Arguments and errors as for `spectrum`."""
    shape = _checked_shape(rows, shape)
    n = min(shape)
    G, unit = _gram(_columns(rows, shape, device, GRAM_CHUNK), n, device)
    energy, vectors = torch.linalg.eigh(G)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    j = int((energy > n * EPS * (energy[0].item() if n else 0.0)).sum())
    return _scale(energy[:j].sqrt(), unit), vectors[:, :j]


# -- slices ----------------------------------------------------------------------------------------


def _checked_shape(rows: Slices, shape: tuple[int, int] | None) -> tuple[int, int]:
    if isinstance(rows, Tensor):
        if rows.dim() != 2:
            raise ValueError(f"expected a matrix, got shape {tuple(rows.shape)}")
        if shape is not None and tuple(rows.shape) != tuple(shape):
            raise ValueError(f"the matrix is {tuple(rows.shape)}, not {tuple(shape)}")
        return rows.shape[0], rows.shape[1]
    if shape is None:
        raise ValueError("slices of rows need shape=(m, k)")
    return shape[0], shape[1]


def _columns(
    rows: Slices, shape: tuple[int, int], device: str | torch.device, chunk: tuple[int, int]
) -> Iterator[tuple[float, Tensor]]:
    """The matrix, with its smaller side n first, in pieces (n, c) in float64, and the largest
    value, without sign, of what a piece was cut from. chunk: n c at most, unless c would be less
    than the second."""
    m, k = shape
    values, least = chunk
    step = max(least, values // max(1, min(m, k)))
    if m >= k:
        for size, X in _slices(rows, shape, device):
            for part in X.split(step):
                yield size, part.to(torch.float64).T
        return
    held = torch.empty(0)
    start, size = 0, 0.0
    for largest, X in _slices(rows, shape, device):
        if len(X) == m:
            held = X
        else:
            if start == 0:
                held = X.new_empty(m, k)
            held[start : start + len(X)] = X
        start, size = start + len(X), max(size, largest)
    if m:
        for part in held.split(step, dim=1):
            yield size, part.to(torch.float64)


def _slices(
    rows: Slices, shape: tuple[int, int], device: str | torch.device
) -> Iterator[tuple[float, Tensor]]:
    """Each slice on the device, and its largest value without sign; errors for what is no part
    of a finite matrix of this shape."""
    m, k = shape
    iterator = iter([rows] if isinstance(rows, Tensor) else rows)
    start = 0
    for X in iterator:
        if X.dim() != 2 or X.shape[1] != k or start + len(X) > m:
            raise ValueError(f"rows {start} on are {tuple(X.shape)}, of a matrix {tuple(shape)}")
        if X.numel():
            X = X.detach().to(device)
            yield _size(X, "the matrix", start, iterator), X
        start += len(X)
    if start != m:
        raise ValueError(f"the slices have {start} rows, the matrix {m}")


def _size(X: Tensor, what: str, start: int = 0, rest: Iterable[Tensor] = ()) -> float:
    """The largest value without sign; NonFiniteError, which counts in `rest` too, if it is none."""
    low, high = (x.item() for x in X.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    nans = infs = 0
    first: tuple[int, int] | None = None
    for part in itertools.chain([X], rest):
        nans, infs = nans + int(part.isnan().sum()), infs + int(part.isinf().sum())
        if first is None:
            row, column = (~part.isfinite()).nonzero()[0].tolist()
            first = (start + row, column)
    assert first is not None
    raise NonFiniteError(what, nans, infs, first)


# -- accumulating ----------------------------------------------------------------------------------


def _gram(
    columns: Iterator[tuple[float, Tensor]], n: int, device: str | torch.device
) -> tuple[Tensor, int]:
    """(G, unit): the lower triangle of the Gram matrix (n, n) of the matrix over 2^unit."""
    G = torch.zeros(n, n, dtype=torch.float64, device=device)
    unit = 0
    for Y, factor, unit in _scaled(columns):  # noqa: B007, it is what is returned
        if factor != 1:
            G.mul_(factor * factor)
        _add_lower(G, Y)
    return G, unit


def _add_lower(G: Tensor, Y: Tensor) -> None:
    """G += Y Y^T in the lower triangle, by halves: little more than half the work of the whole."""
    n = len(G)
    if n <= LEAF:
        G.addmm_(Y, Y.T)
        return
    half = n // 2
    _add_lower(G[:half, :half], Y[:half])
    G[half:, :half].addmm_(Y[half:], Y[:half].T)
    _add_lower(G[half:, half:], Y[half:])


def _triangle(
    columns: Iterator[tuple[float, Tensor]], n: int, device: str | torch.device
) -> tuple[Tensor, int]:
    """(R, unit): the triangle of a QR of the matrix, tall side down, over 2^unit."""
    R, unit = torch.zeros(0, n, dtype=torch.float64, device=device), 0
    for Y, factor, unit in _scaled(columns):  # noqa: B007, it is what is returned
        R = torch.linalg.qr(torch.cat([factor * R, Y.T]), mode="r").R
    return R, unit


def _scaled(columns: Iterator[tuple[float, Tensor]]) -> Iterator[tuple[Tensor, float, int]]:
    """(piece over 2^unit, factor, unit): a piece that is too large for the unit so far begins a
    larger one, and the factor brings what was made of the pieces before to it."""
    unit: int | None = None
    for size, Y in columns:
        factor = 1.0
        needed = _exponent(size, 256) if size else None
        if needed is not None and (unit is None or needed > unit):
            factor = 1.0 if unit is None else math.ldexp(1.0, unit - needed)
            unit = needed
        yield (Y * math.ldexp(1.0, -unit) if unit else Y), factor, unit or 0


def _exponent(size: float, step: int = 1) -> int:
    """The power of two near a size, a multiple of `step`, such that 2^-exponent is finite. With
    steps of 256 it is 0, and nothing need be scaled, for every normal float32."""
    exponent = step * round(math.frexp(size)[1] / step) if size else 0
    return min(max(exponent, -768), 768)


def _spectrum(s: Tensor, method: str, relative: float, unit: int) -> Spectrum:
    floor = relative * s[0].item() if len(s) else 0.0
    s = torch.where(s > floor, s, 0.0)
    return Spectrum(_scale(s, unit), method, floor * math.ldexp(1.0, unit))


def _scale(s: Tensor, unit: int) -> Tensor:
    return s * math.ldexp(1.0, unit) if unit else s
