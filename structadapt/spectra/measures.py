"""How many directions a matrix uses: pure functions of its singular values.

Every measure takes singular values s >= 0 in any order, as a 1-D tensor, array or sequence, and
returns a float or a count. With e = s^2 and p = e / sum(e), most of them are Hill numbers of p,
D_q = (sum p^q)^(1 / (1 - q)), and they are ordered

    rank D_0 >= effective_rank_energy D_1 >= participation_ratio D_2 >= stable_rank D_inf >= 1

and effective_rank >= D_1. All are free of transposition, and all but the norms of scale; the Hill
numbers and the energies are free of zero padding too. "Energy" is the square of a singular value,
"amplitude" the value itself: papers on the effective rank use both, and both are here. A matrix
of zeros uses no direction: every measure is 0 for it. ValueError for values that are negative,
not finite, or not 1-D.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from structadapt.spectra import engine

SingularValues = Tensor | np.ndarray | Sequence[float]
Number = TypeVar("Number", float, int)
SHARED = """\
    s: (n,) singular values in any order, a tensor, array or sequence of any dtype; 0 for a matrix
    of zeros. ValueError for values that are negative, not finite, or not 1-D."""


def _values(s: SingularValues) -> Tensor:
    """Singular values in float64 on the CPU, checked."""
    values = s if isinstance(s, Tensor) else torch.as_tensor(s, dtype=torch.float64)
    values = values.detach().to("cpu", torch.float64)
    if values.dim() != 1:
        raise ValueError(f"singular values must be 1-D, got shape {tuple(values.shape)}")
    if not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values must be finite and not negative")
    return values


def _measure(function: Callable[..., Number]) -> Callable[..., Number]:
    """Check the singular values, hand them on over the largest, and answer 0 for a zero matrix."""

    @wraps(function)
    def checked(s: SingularValues, *args: Any, **kwargs: Any) -> Number:
        values = _values(s)
        largest = values.max().item() if len(values) else 0.0
        if largest == 0:  # asked of 1, so that the arguments are checked all the same
            return type(function(values.new_ones(1), *args, **kwargs))(0)
        return function(values / largest, *args, **kwargs)

    checked.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n{SHARED}"
    return checked


# -- Hill numbers ----------------------------------------------------------------------------------


@_measure
def effective_rank(s: Tensor) -> float:
    """exp(-sum a ln a) with a = s / sum(s), the amplitudes (Roy & Vetterli 2007).

    >>> effective_rank([2.0, 2.0, 0.0])
    2.0
    """
    return torch.special.entr(s / s.sum()).sum().exp().item()


@_measure
def effective_rank_energy(s: Tensor) -> float:
    """exp(-sum p ln p) with p = s^2 / sum(s^2), the energies: the Hill number D_1."""
    return torch.special.entr(_energy(s)).sum().exp().item()


@_measure
def participation_ratio(s: Tensor) -> float:
    """1 / sum(p^2) = (sum s^2)^2 / sum s^4: the Hill number D_2 (Bell & Dean 1970), the inverse of
    Simpson's index (1949)."""
    return 1 / _energy(s).square().sum().item()


@_measure
def stable_rank(s: Tensor) -> float:
    """sum(s^2) / max(s)^2, squared Frobenius over squared spectral norm (Rudelson & Vershynin
    2007): the Hill number D_inf.

    >>> stable_rank([2.0, 1.0, 1.0])
    1.5
    """
    return 1 / _energy(s).max().item()


@_measure
def hill_number(s: Tensor, q: float) -> float:
    """D_q = (sum p^q)^(1 / (1 - q)) over p > 0, for any order q from 0 to infinity (Hill 1973).

    0 counts the values that are not 0, 1 is `effective_rank_energy`, 2 `participation_ratio`,
    math.inf `stable_rank`. ValueError for q < 0.
    """
    if not q >= 0:
        raise ValueError(f"q must not be negative, got {q}")
    p = _energy(s)
    p = p[p > 0]
    if q == 1:
        return torch.special.entr(p).sum().exp().item()
    if q == math.inf:
        return 1 / p.max().item()
    # Over the largest, which a high power of p would lose: D = (M^q S)^(1 / (1 - q)).
    largest = p.max().item()
    log = q * math.log(largest) + math.log((p / largest).pow(q).sum().item())
    return math.exp(log / (1 - q))


# -- energy ----------------------------------------------------------------------------------------


@_measure
def topk_energy(s: Tensor, k: int = 1) -> float:
    """Share of sum(s^2) in the k largest singular values, from 0 to 1. ValueError for k < 1.

    >>> topk_energy([2.0, 2.0, 0.0], k=1)
    0.5
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _energy(s).topk(min(k, len(s))).values.sum().item()


@_measure
def energy_count(s: Tensor, share: float) -> int:
    """The least number of singular values that hold this share of sum(s^2): k50, k90, k95, k99.
    ValueError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    held = s.sort(descending=True).values.square().cumsum(0)
    # A whole count must not be missed by the rounding of a sum: 3 of 4 equal values hold .75.
    return min(int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1, len(s))


@_measure
def gini(s: Tensor) -> float:
    """Gini coefficient sum (2 i - n - 1) s_(i) / (n sum s), s ascending: 0 if all are equal,
    1 - 1/n if one is all. It meets all six demands on a measure of sparsity of Hurley & Rickard
    2009."""
    n = len(s)
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return (weights @ s.sort().values / (n * s.sum())).item()


@_measure
def hoyer(s: Tensor) -> float:
    """Sparseness (sqrt n - sum s / sqrt(sum s^2)) / (sqrt n - 1): 0 if all are equal, 1 if one is
    all (Hoyer 2004). 0.0 for a single value."""
    root = math.sqrt(len(s))
    if len(s) == 1:
        return 0.0
    return ((root - s.sum() / s.square().sum().sqrt()) / (root - 1)).item()


def _energy(s: Tensor) -> Tensor:
    energy = s.square()
    return energy / energy.sum()


# -- size ------------------------------------------------------------------------------------------


def spectral_norm(s: SingularValues) -> float:
    """The largest singular value. (WeightWatcher's column of this name is its square.)"""
    values = _values(s)
    return values.max().item() if len(values) else 0.0


def frobenius_norm(s: SingularValues) -> float:
    """sqrt(sum s^2), the root of the sum of all squared entries."""
    values, largest = _values(s), spectral_norm(s)
    return largest * torch.linalg.vector_norm(values / largest).item() if largest else 0.0


def nuclear_norm(s: SingularValues) -> float:
    """sum s."""
    return _values(s).sum().item()


@_measure
def condition(s: Tensor) -> float:
    """Largest over smallest singular value; infinity if the smallest is 0, as it is when it lies
    below the floor of the method (Golub & Van Loan 2013)."""
    smallest = s.min().item()
    return 1 / smallest if smallest else math.inf


# -- rank ------------------------------------------------------------------------------------------


@_measure
def numerical_rank(s: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """How many values exceed s_1 max(m, k) eps(dtype), the rule of numpy's and torch's
    `matrix_rank` (Golub & Van Loan 2013). It counts rounding as rank: see `rank_above_noise`."""
    return int((s > max(shape) * torch.finfo(dtype).eps).sum())


def noise_edge(step: float, shape: tuple[int, int]) -> float:
    """The largest singular value that rounding alone gives: sqrt(step^2 / 12) (sqrt m + sqrt k).

    step: root mean square of the spacing of the rounded values, `Matrix.step`. Their errors are
    as good as independent and uniform over one spacing, variance step^2 / 12, and the largest
    singular value of such a matrix is known (Bai & Yin 1988). Where an update moves few weights
    by a spacing at all, the edge is too high: what it counts is there.
    """
    return step / math.sqrt(12) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def rank_above_noise(s: SingularValues, edge: float) -> int:
    """How many singular values exceed the noise edge: the rank that survived rounding."""
    return len(above_noise(s, edge))


def above_noise(s: SingularValues, edge: float) -> Tensor:
    """The singular values above the noise edge, for any measure after the cut."""
    values = _values(s)
    return values[values > edge]


# -- all of them -----------------------------------------------------------------------------------


def summary(
    s: SingularValues, shape: tuple[int, int], dtype: torch.dtype = torch.float32, edge: float = 0.0
) -> dict[str, float | int | None]:
    """Every measure of this file by name, of a matrix of this shape.

    dtype: of `numerical_rank`. edge: the noise edge; without one, the measures after the cut are
    None.
    """
    cut = above_noise(s, edge) if edge else None
    return {
        "effective_rank": effective_rank(s),
        "effective_rank_energy": effective_rank_energy(s),
        "participation_ratio": participation_ratio(s),
        "stable_rank": stable_rank(s),
        "topk_energy": topk_energy(s),
        "k50": energy_count(s, 0.50),
        "k90": energy_count(s, 0.90),
        "k95": energy_count(s, 0.95),
        "k99": energy_count(s, 0.99),
        "numerical_rank": numerical_rank(s, shape, dtype),
        "rank_above_noise": None if cut is None else len(cut),
        "noise_edge": edge or None,
        "effective_rank_cut": None if cut is None else effective_rank(cut),
        "spectral_norm": spectral_norm(s),
        "frobenius_norm": frobenius_norm(s),
        "nuclear_norm": nuclear_norm(s),
        "condition": condition(s),
        "gini": gini(s),
        "hoyer": hoyer(s),
    }


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix (m, k), largest first, in float64: `engine.spectrum`.

    Values below s_1 sqrt(n eps) cannot be told from rounding and are returned as exactly 0.
    ValueError for what is not a matrix, or not finite.
    """
    return engine.spectrum(matrix).s
