"""W' - W of two stored matrices, and the rounding that is in it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from structadapt.spectra.reading.matrix import PIECE, Matrix, Stored, rows_of, weight

# of the bits of a floating point number: as an integer, bits of the fraction, bias of the exponent
LAYOUTS = {
    torch.float64: (torch.int64, 52, 1023),
    torch.float32: (torch.int32, 23, 127),
    torch.bfloat16: (torch.int16, 7, 127),
    torch.float16: (torch.int16, 10, 15),
}


def difference(name: str, tuned: Stored, base: Stored) -> Matrix:
    """W' - W of two stored matrices of the same shape, row by row in float64, where the difference
    of two numbers of lower precision is exact unless one is 2^29 times the other or more."""
    total: list[float] = []

    def rows() -> Iterator[Tensor]:
        squares, count = 0.0, 0
        for high, low in zip(rows_of(tuned), rows_of(base), strict=True):
            part, own = _subtracted(high, low)
            squares += own
            count += part.numel()
            yield part
        total[:] = [(squares / count) ** 0.5 if count else 0.0]

    def rounding() -> float:
        if not total:
            for _ in rows():
                pass
        return total[0]

    both = tuned.dtype if tuned.dtype == base.dtype else f"{tuned.dtype} and {base.dtype}"
    precision = f"difference of {both}" if tuned.rounded else f"adapted weights less {base.dtype}"
    return Matrix(
        name,
        "update",
        tuned.matrix_shape(),
        tuned.dtype,
        tuned.source,
        precision,
        rows,
        base=weight(name, base),
        tuned=weight(name, tuned),
        rounding=rounding if tuned.rounded else None,
    )


def _subtracted(tuned: Tensor, base: Tensor) -> tuple[Tensor, float]:
    """The difference in float64 and the sum of the squared ulps, piece by piece: at once, it would
    take several times the memory."""
    result = torch.empty(tuned.shape, dtype=torch.float64)
    squares = 0.0
    pieces = (t.reshape(-1).split(PIECE) for t in (result, tuned, base))
    for difference, high, low in zip(*pieces, strict=True):
        difference.copy_(high).sub_(low.double())
        squares += _sum_of_ulp_squares(high, low)
    return result, squares


def _sum_of_ulp_squares(tuned: Tensor, base: Tensor) -> float:
    """Sum of the squared ulps of what was rounded: of both where both are below float32, for the
    base may be a copy of a finer master too; else of the coarser one."""
    exponents = ulp_exponents(tuned)
    if {tuned.dtype, base.dtype} <= {torch.bfloat16, torch.float16}:
        return _sum_of_squares(exponents) + _sum_of_squares(ulp_exponents(base))
    if base.dtype != tuned.dtype and torch.finfo(base.dtype).eps > torch.finfo(tuned.dtype).eps:
        exponents = torch.maximum(exponents, ulp_exponents(base))
    return _sum_of_squares(exponents)


def _sum_of_squares(exponents: Tensor) -> float:
    """sum 2^(2 e)."""
    if not exponents.numel():
        return 0.0
    lowest = int(exponents.min())
    counts = torch.bincount((exponents - lowest).flatten()).double()
    powers = torch.arange(lowest, lowest + len(counts), dtype=torch.float64)
    return (counts * torch.exp2(2 * powers)).sum().item()


def ulp_exponents(x: Tensor) -> Tensor:
    """log2 of the distance from |x| to the next larger number of its dtype, as int32.

    With e the biased exponent and f the bits of the fraction: max(e, 1) - bias - f.
    """
    integers, fraction, bias = LAYOUTS[x.dtype]
    bits = x.contiguous().view(integers)
    exponents = (bits >> fraction) & (2 * bias + 1)
    return exponents.to(torch.int32).clamp_(min=1) - (bias + fraction)
