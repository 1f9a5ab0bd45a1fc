"""Power law p(e) ~ e^-alpha, e >= xmin, of the eigenvalues e = s^2 of W^T W.

alpha of the Kolmogorov-Smirnov fit is unstable: it jumps when a few of the largest eigenvalues
are left out, and pure noise has one too (8 to 19 by shape). Read it with its tail size, D, sigma,
clip range, and beside `alpha_median` and the null of the same shape.
"""

from dataclasses import dataclass

import numpy as np
import torch

LEAST = 10  # eigenvalues: a fit to fewer says nothing
CLIPPED = 9  # at most so many of the largest are left out for the clip range
PROBES = 48  # places at which a tail is looked at before it is looked at everywhere

Eigenvalues = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class PowerLaw:
    """p(e) ~ e^-alpha for e >= xmin."""

    alpha: float
    sigma: float  # standard error of alpha, (alpha - 1) / sqrt(n_tail)
    D: float  # Kolmogorov-Smirnov distance of the tail
    xmin: float
    n_tail: int


def fit(eigenvalues: Eigenvalues, threshold: float | None = None) -> PowerLaw | None:
    """The continuous maximum-likelihood fit of Clauset, Shalizi & Newman (2009, section 3).

    Every eigenvalue e_i but the largest is tried as xmin: alpha = 1 + n / sum ln(e_j / e_i) over
    the n values from e_i up, D = max |1 - (e_j / e_i)^(1 - alpha) - (j - i) / n|, and the xmin
    with the smallest D wins.

    threshold: eigenvalues up to it are left out. None, n eps e_1: what cannot be told from
        rounding, at any scale of the matrix. WeightWatcher 0.7.7 has 1e-5, whatever the scale.
    None if fewer than ten eigenvalues are above it, or all are equal.
    """
    log = _log_above(eigenvalues, threshold)
    return _fit(log) if len(log) >= LEAST else None


def clip_range(
    eigenvalues: Eigenvalues, threshold: float | None = None
) -> tuple[float, float] | None:
    """(least, largest) alpha of the fits without the 1, 2, ... CLIPPED largest eigenvalues: wide
    if a few of them make the fit. `threshold` and None as for `fit`."""
    log = _log_above(eigenvalues, threshold)
    clipped = (log[:-drop] for drop in range(1, CLIPPED + 1) if len(log) - drop >= LEAST)
    alphas = [law.alpha for law in map(_fit, clipped) if law]
    return (min(alphas), max(alphas)) if alphas else None


def alpha_median(eigenvalues: Eigenvalues, threshold: float | None = None) -> float | None:
    """alpha with the median eigenvalue as xmin (AlphaDecay, TempBalance): no search, so steadier.
    `threshold` and None as for `fit`."""
    log = _log_above(eigenvalues, threshold)
    if len(log) < LEAST:
        return None
    tail = log[len(log) // 2 :]
    excess = (tail - tail[0]).sum()
    return float(1 + len(tail) / excess) if excess > 0 else None


def summary(s: Eigenvalues) -> dict[str, float | int | None]:
    """Everything of this file, from singular values s, by the names that a report uses."""
    eigenvalues = np.square(_array(s))
    law = fit(eigenvalues)
    low, high = clip_range(eigenvalues) or (None, None)
    return {
        "alpha": law and law.alpha,
        "alpha_n_tail": law and law.n_tail,
        "alpha_D": law and law.D,
        "alpha_sigma": law and law.sigma,
        "alpha_clip_low": low,
        "alpha_clip_high": high,
        "alpha_median": alpha_median(eigenvalues),
    }


def _array(values: Eigenvalues) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _log_above(eigenvalues: Eigenvalues, threshold: float | None) -> np.ndarray:
    """Logarithms of the eigenvalues above the threshold, ascending."""
    e = np.sort(_array(eigenvalues))
    rounding = len(e) * np.finfo(np.float64).eps * e[-1] if len(e) else 0.0
    return np.log(e[e > max(0.0, rounding if threshold is None else threshold)])


def _fit(log: np.ndarray) -> PowerLaw | None:
    """The fit to ascending logarithms. Only the tails are looked at everywhere whose distance at
    a few places, a lower bound, is below the least that was found: a few dozen of thousands."""
    N = len(log)
    n = np.arange(N, 0, -1)  # size of the tail from i up
    gaps = np.diff(log)
    excess = np.append(
        np.cumsum((n[1:] * gaps)[::-1])[::-1], 0.0
    )  # sum ln(e_j / e_i), no cancelling
    # Of equal eigenvalues the first alone is tried: the tail of an xmin has all of them.
    tried = np.flatnonzero((excess > 0) & np.append(True, gaps > 0))
    if not len(tried):
        return None
    alpha = 1 + n[tried] / excess[tried]
    bounds = _bounds(log, tried, n[tried], alpha)
    best, least = 0, np.inf
    for at in np.argsort(bounds, kind="stable"):
        if bounds[at] > least:
            break
        tail = log[tried[at] :]
        theory = -np.expm1((1 - alpha[at]) * (tail - tail[0]))
        D = np.abs(theory - np.arange(len(tail)) / len(tail)).max()
        if (D, at) < (least, best):
            best, least = at, D
    i = tried[best]
    sigma = (alpha[best] - 1) / np.sqrt(n[i])
    xmin = float(np.exp(log[i]))
    return PowerLaw(float(alpha[best]), float(sigma), float(least), xmin, int(n[i]))


def _bounds(log: np.ndarray, tried: np.ndarray, n: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The distance of each tail at evenly spaced places of it: at most the distance everywhere."""
    steps = (n[:, None] * np.arange(PROBES) // PROBES).clip(max=n[:, None] - 1)
    steps[:, 0] = n - 1  # the first place has distance 0 by definition
    theory = -np.expm1((1 - alpha)[:, None] * (log[tried[:, None] + steps] - log[tried, None]))
    return np.abs(theory - steps / n[:, None]).max(1)
