"""Power-law fit to the tail of an eigenvalue distribution."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """p(e) ~ e^-alpha for e >= xmin."""

    alpha: float
    sigma: float  # standard error of alpha, (alpha - 1) / sqrt(n_tail)
    D: float  # Kolmogorov-Smirnov distance of the tail
    xmin: float
    n_tail: int


def fit(eigenvalues: np.ndarray) -> PowerLaw | None:
    """The continuous maximum-likelihood fit of Clauset, Shalizi & Newman (2009, section 3).

    Every eigenvalue e_i but the largest is tried as xmin: alpha = 1 + n / sum ln(e_j / e_i) over
    the n values from e_i up, and the xmin with the smallest Kolmogorov-Smirnov distance wins.
    None if fewer than ten eigenvalues are positive: a fit to fewer says nothing.
    """
    e = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    e = e[e > 0]
    if len(e) < 10:
        return None
    log = np.log(e)
    n = np.arange(len(e), 0, -1)
    excess = np.cumsum(log[::-1])[::-1] - n * log  # sum over the tail of ln(e_j / e_i)
    best: PowerLaw | None = None
    for i in range(len(e) - 1):
        if excess[i] <= 0:
            continue
        alpha = 1 + n[i] / excess[i]
        theory = 1 - np.exp((1 - alpha) * (log[i:] - log[i]))
        D = np.abs(theory - np.arange(n[i]) / n[i]).max()
        if best is None or D < best.D:
            sigma = (alpha - 1) / np.sqrt(n[i])
            best = PowerLaw(float(alpha), float(sigma), float(D), float(e[i]), int(n[i]))
    return best
