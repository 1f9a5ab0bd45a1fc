"""What stands out of noise: the Marchenko-Pastur law and Tracy-Widom edges.

For a matrix (m, k) of independent entries of variance sigma^2, N = max(m, k) and M = min(m, k),
the eigenvalues of W^T W (M of them that are not 0) over sigma^2 N follow the law of ratio
beta = M / N, with support (1 - sqrt beta)^2 to (1 + sqrt beta)^2 (Marchenko & Pastur 1967).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from structadapt.spectra.measures import SingularValues, spectral_norm

# Of the Tracy-Widom law of real matrices (beta = 1): Bejan 2005, table 2.
TRACY_WIDOM = {0.95: 0.9793, 0.99: 2.0234, 0.999: 3.2724}
ESTIMATORS = ("elementwise", "median")
GRID = 20_000  # places at which the law is integrated


@dataclass(frozen=True)
class Spikes:
    """Eigenvalues above the edge of noise."""

    count: int
    energy: float  # their share of sum(s^2), 0 to 1
    edge: float  # in eigenvalues s^2
    sigma: float  # standard deviation of an entry
    estimator: str  # how sigma was found


def spikes(
    s: SingularValues,
    shape: tuple[int, int],
    estimator: str = "elementwise",
    quantile: float = 0.99,
) -> Spikes:
    """Eigenvalues that the largest of a random matrix of this shape exceeds with 1 - quantile.

    The edge is sigma^2 (mu + q scale) with mu = (sqrt(N - 1) + sqrt M)^2, scale = (sqrt(N - 1) +
    sqrt M) (1 / sqrt(N - 1) + 1 / sqrt M)^(1/3) and q the quantile of the Tracy-Widom law
    (Johnstone 2001). A planted direction is seen from about sigma (m k)^(1/4) up (Baik, Ben Arous
    & Peche 2005).

    estimator: "elementwise", sigma^2 = sum(s^2) / (m k), the noise that a shuffle of all entries
        is: the spikes' own energy raises the edge. "median", sigma^2 = median(s^2) / (N times the
        median of the law), as Gavish & Donoho 2014 have it: untouched by few spikes, but on
        trained square matrices it finds two to four times as many.
    quantile: 0.95, 0.99 or 0.999.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if quantile not in TRACY_WIDOM:
        raise ValueError(f"quantile must be one of {', '.join(map(str, TRACY_WIDOM))}")
    N, M = max(shape), min(shape)
    largest = spectral_norm(s)
    if M == 0 or largest == 0:
        return Spikes(0, 0.0, 0.0, 0.0, estimator)
    e = (torch.as_tensor(s, dtype=torch.float64).cpu() / largest).square().numpy()
    if estimator == "elementwise":
        variance = e.sum() / (N * M)
    else:
        padded = np.concatenate([e, np.zeros(max(0, M - len(e)))])
        variance = np.median(padded) / (N * float(quantiles(M / N, np.array([0.5]))[0]))
    root = math.sqrt(max(N - 1, 1)), math.sqrt(M)
    scale = sum(root) * (1 / root[0] + 1 / root[1]) ** (1 / 3)
    edge = variance * (sum(root) ** 2 + TRACY_WIDOM[quantile] * scale)
    above = e > edge
    return Spikes(
        int(above.sum()),
        float(e[above].sum() / e.sum()),
        float(edge) * largest**2,
        math.sqrt(variance) * largest,
        estimator,
    )


def summary(s: SingularValues, shape: tuple[int, int]) -> dict[str, float | int | None]:
    """`spikes` by the names that a report uses."""
    found = spikes(s, shape)
    return {"mp_spikes": found.count, "mp_spike_energy": found.energy}


def quantiles(ratio: float, q: np.ndarray) -> np.ndarray:
    """The quantiles q, 0 to 1, of the Marchenko-Pastur law of ratio beta, 0 < beta <= 1."""
    x, cumulated = _law(ratio)
    return np.interp(q, cumulated, x)


@lru_cache(maxsize=256)
def _law(ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalue, share of the law up to it) on a grid.

    With x = (1 - sqrt beta)^2 + 4 sqrt beta sin^2(t / 2), t from 0 to pi, the density
    sqrt((b - x)(x - a)) / (2 pi beta x) dx is 2 sin^2(t) / (pi x) dt, smooth at both ends.
    """
    root = math.sqrt(ratio)
    t = np.linspace(0, math.pi, GRID + 1)
    x = (1 - root) ** 2 + 4 * root * np.sin(t / 2) ** 2
    middle = (t[1:] + t[:-1]) / 2
    density = np.sin(middle) ** 2 / ((1 - root) ** 2 + 4 * root * np.sin(middle / 2) ** 2)
    cumulated = np.concatenate([[0.0], np.cumsum(density)])
    return x, cumulated / cumulated[-1]
