"""What every measure is for a matrix of independent Gaussian entries of the same shape.

Raw values compare shapes as much as they compare matrices: pure noise has an effective rank of
0.81 n if it is square and 0.97 n if it is four times as long. Hence the null, and the ratio.

Up to 256 singular values the null is the mean over seeded draws, of a matrix that has the same
singular values and is small whatever the shape: the triangle R of the QR of a Gaussian matrix
has normal entries above and chi-distributed ones on its diagonal. Beyond, the draws differ by
parts in a thousand, and the quantiles of the Marchenko-Pastur law stand for all of them. The
participation ratio n / (1 + g) and the stable rank n / (1 + sqrt g)^2, g = n / max(m, k), are
what both come to. alpha of the Kolmogorov-Smirnov fit has no such limit: it differs between draws
by half of itself. Up to 256 values its null is their mean, beyond it is that of the one spectrum of
quantiles, an example; compare `alpha_median`.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from structadapt.spectra import marchenko_pastur, measures, powerlaw

DRAWN = 256  # singular values: up to this the null is drawn
WORK = 2_000  # singular values drawn in all, in at least 4 and at most 64 draws
SEED = 0

Values = dict[str, float | None]

# Without a null: they depend on a threshold that is the caller's. Marchenko-Pastur spikes have
# none either: they are counted against this very null, which has 0.01 of them.
WITHOUT = ("numerical_rank", "rank_above_noise", "noise_edge", "effective_rank_cut")


def null(shape: tuple[int, int], rank: int | None = None) -> Values:
    """The measures of `measures` and `powerlaw` by name, for Gaussian noise.

    shape: (m, k). rank: of a product of two Gaussian factors (m, rank) and (rank, k) instead,
    what an adapter of that rank is without any preference among its directions; its
    participation ratio is near r / (1 + r / m + r / k).

    Norms are those of a matrix of Frobenius norm 1: multiply by the one at hand. None where
    there is no value, such as alpha of few eigenvalues; all are 0 for a matrix without entries.
    Kept by shape; no random state outside is read or changed. ValueError for rank < 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    M, N = sorted(shape)
    return dict(_null(M, N, rank if rank is None else min(rank, M)))


@lru_cache(maxsize=1024)
def _null(M: int, N: int, rank: int | None) -> Values:
    draws = [_summary(s, (M, N)) for s in _spectra(M, N, rank)]
    means = {}
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        known = [float(v) for v in values if v is not None]
        # A condition has no mean for square matrices: its median.
        middle = np.median if name == "condition" else np.mean
        means[name] = float(middle(known)) if len(known) == len(values) else None
    return means


def _summary(s: Tensor, shape: tuple[int, int]) -> Values:
    norm = measures.frobenius_norm(s)
    s = s / norm if norm else s
    everything = {**measures.summary(s, shape), **powerlaw.summary(s)}
    return {name: value for name, value in everything.items() if name not in WITHOUT}


def _spectra(M: int, N: int, rank: int | None) -> Iterator[Tensor]:
    """Singular values of one or several nulls (M, N), M <= N."""
    n = M if rank is None else rank
    if n > DRAWN and rank is None:
        yield null_spectrum((M, N))
        return
    random = np.random.default_rng([SEED, M, N, rank or 0])
    draws = min(64, max(4, WORK // max(n, 1))) if n else 1
    for _ in range(draws):
        if rank is None:
            s = np.linalg.svd(triangle(random, N, M), compute_uv=False) if n else np.zeros(0)
        else:
            core = triangle(random, M, rank) @ triangle(random, N, rank).T
            s = np.zeros(M)
            s[:rank] = np.linalg.svd(core, compute_uv=False)
        yield torch.from_numpy(s)


def triangle(random: np.random.Generator, m: float, k: int) -> np.ndarray:
    """R (k, k) of the QR of a Gaussian matrix (m, k), m >= k (Bartlett 1933): it has the same
    singular values."""
    R = np.triu(random.standard_normal((k, k)), 1)
    R[np.diag_indices(k)] = np.sqrt(random.chisquare(m - np.arange(k)))
    return R


def null_spectrum(shape: tuple[int, int]) -> Tensor:
    """The expected singular values of a Gaussian matrix (m, k) of unit variance, largest first:
    the square roots of N times the quantiles of the Marchenko-Pastur law. For plots, and exact as
    min(m, k) grows: the largest is a few parts in min(m, k)^(2/3) off, and the smallest too."""
    M, N = sorted(shape)
    if M == 0:
        return torch.zeros(0, dtype=torch.float64)
    q = (M - np.arange(M) - 0.5) / M
    return torch.from_numpy(math.sqrt(N) * np.sqrt(marchenko_pastur.quantiles(M / N, q)))
