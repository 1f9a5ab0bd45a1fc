"""How many directions a matrix uses: pure functions of its singular values.

Every measure takes singular values s >= 0 in any order, as a 1-D tensor, array or sequence, and
returns a float. With e = s^2 and p = e / sum(e), most of them are Hill numbers of p,
D_q = (sum p^q)^(1 / (1 - q)), and they are ordered

    rank D_0 >= effective_rank_energy D_1 >= participation_ratio D_2 >= stable_rank D_inf >= 1

All are free of scale, of transposition and of zero padding. A matrix of zeros uses no direction:
every measure is 0.0 for it. ValueError for values that are negative, not finite, or not 1-D.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

Spectrum = Tensor | np.ndarray | Sequence[float]


def _measure(function: Callable[..., float]) -> Callable[..., float]:
    """Check the singular values, hand them on in float64, and answer 0.0 for a zero matrix."""

    @wraps(function)
    def checked(s: Spectrum, *args: Any, **kwargs: Any) -> float:
        values = s if isinstance(s, Tensor) else torch.as_tensor(s, dtype=torch.float64)
        values = values.detach().to("cpu", torch.float64)
        if values.dim() != 1:
            raise ValueError(f"singular values must be 1-D, got shape {tuple(values.shape)}")
        if not torch.isfinite(values).all() or (values < 0).any():
            raise ValueError("singular values must be finite and not negative")
        largest = values.max().item() if len(values) else 0.0
        return function(values / largest, *args, **kwargs) if largest > 0 else 0.0

    return checked


@_measure
def effective_rank(s: Tensor) -> float:
    """exp(-sum a ln a) with a = s / sum(s), the amplitudes (Roy & Vetterli 2007)."""
    return torch.special.entr(s / s.sum()).sum().exp().item()


@_measure
def effective_rank_energy(s: Tensor) -> float:
    """exp(-sum p ln p) with p = s^2 / sum(s^2), the energies: the Hill number D_1."""
    return torch.special.entr(_energy(s)).sum().exp().item()


@_measure
def participation_ratio(s: Tensor) -> float:
    """1 / sum(p^2) = (sum s^2)^2 / sum s^4: the Hill number D_2."""
    return 1 / _energy(s).square().sum().item()


@_measure
def stable_rank(s: Tensor) -> float:
    """sum(s^2) / max(s)^2, squared Frobenius over squared spectral norm (Rudelson & Vershynin
    2007): the Hill number D_inf."""
    return 1 / _energy(s).max().item()


@_measure
def topk_energy(s: Tensor, k: int = 1) -> float:
    """Share of sum(s^2) in the k largest singular values, from 0 to 1. ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _energy(s).topk(min(k, len(s))).values.sum().item()


def _energy(s: Tensor) -> Tensor:
    energy = s.square()
    return energy / energy.sum()


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix (m, n), largest first, in float64.

    From the eigenvalues of the Gram matrix of the smaller side, formed in float64: several times
    faster than an SVD. Values below about 1e-7 of the largest cannot be told from rounding and
    are returned as exactly 0. ValueError for what is not a matrix, or not finite.
    """
    if matrix.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(matrix.shape)}")
    X = matrix.detach().to(torch.float64)
    if not torch.isfinite(X).all():
        raise ValueError("the matrix is not finite")
    size = X.abs().max() if X.numel() else X.new_zeros(())
    if size == 0:
        return X.new_zeros(min(X.shape))
    X = (X if X.shape[0] >= X.shape[1] else X.T) / size  # so that no square over- or underflows
    energy = torch.linalg.eigvalsh(X.T @ X).flip(0)
    floor = len(energy) * torch.finfo(torch.float64).eps * energy[0]
    return torch.where(energy > floor, energy, 0.0).sqrt() * size
