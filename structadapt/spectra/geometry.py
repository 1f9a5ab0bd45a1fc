"""How an update lies to its weight: by the singular vectors of W and of W' = W + dW, which arrive
in slices of rows and are never held whole.

The principal directions are the leading k = min(512, n / 8) on each side, at least one: 512 at
n = 4096, as in arXiv 2511.08567. Intruders are the dimensions of Shuttleworth et al. 2024, arXiv
2410.21228: leading left vectors of W' whose cosine to every one of W is below a threshold.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from structadapt.spectra import engine, relations
from structadapt.spectra.reading import Matrix, Rows

LARGEST, SHARE = 512, 8  # of the directions that are principal
INTRUDERS, SIMILAR = 10, 0.5  # leading vectors of W' that are looked at, and when one is known


def principal(shape: tuple[int, int]) -> int:
    """How many directions of a matrix of this shape are principal."""
    return max(1, min(LARGEST, min(shape) // SHARE))


class Vectors:
    """The singular vectors of a matrix (m, k), those of the smaller side all at once."""

    def __init__(self, rows: Rows, shape: tuple[int, int], device: torch.device) -> None:
        self.rows, self.shape, self.device = rows, shape, device
        self.s, self.small = engine.eigenvectors(rows(), shape, device)
        self.tall = shape[0] >= shape[1]

    @property
    def values(self) -> Tensor:
        """All min(m, k) singular values, 0 below the floor, on the CPU."""
        s = torch.zeros(min(self.shape), dtype=torch.float64)
        s[: len(self.s)] = self.s.cpu()
        return s

    @cached_property
    def leading(self) -> tuple[Tensor, Tensor]:
        """The principal left and right vectors, U (m, j) and V (k, j)."""
        j = min(principal(self.shape), len(self.s))
        small, s = self.small[:, :j], self.s[:j]
        large = times(self.rows(), small) if self.tall else transposed_times(self.rows(), small)
        large = torch.linalg.qr(large / s).Q if j else large
        return (large, small) if self.tall else (small, large)

    def leading_left(self, count: int) -> Tensor:
        """The first left vectors, (m, j), j at most `count`."""
        small, s = self.small[:, :count], self.s[:count]
        return times(self.rows(), small) / s if self.tall else small

    def similarity(self, U: Tensor) -> Tensor:
        """(j,): for every column of U (m, j), the largest |u_i . u| over ALL left vectors u_i."""
        if self.tall:  # u_i = W v_i / s_i
            products = self.small.T @ transposed_times(self.rows(), U) / self.s[:, None]
        else:
            products = self.small.T @ U
        return products.abs().amax(0)


def lies(matrix: Matrix, W: Vectors, device: torch.device) -> dict[str, Any]:
    """NSS drift, principal angles, off-principal energy and intruders of an update over W."""
    tuned = Vectors(_whole(matrix), matrix.shape, device)
    drift = relations.nss_drift(tuned.values, W.values)  # infinite over a weight of zeros
    found: dict[str, Any] = {"nss_drift": drift if math.isfinite(drift) else None}
    (U, V), (after_U, after_V) = W.leading, tuned.leading
    if not U.shape[1] or not after_U.shape[1]:
        return found
    for side, before, after in (("left", U, after_U), ("right", V, after_V)):
        angles = relations.principal_angles(before, after)
        found[f"angle_{side}_max"] = angles.max().item()
        found[f"angle_{side}_median"] = angles.quantile(0.5).item()
    found["intruders"] = int((W.similarity(tuned.leading_left(INTRUDERS)) < SIMILAR).sum())
    off = _off_principal(matrix, U, V)
    if off is not None:
        for side in ("left", "right", "both"):
            value, null = getattr(off, side), getattr(off, f"{side}_random")
            found[f"off_principal_{side}"] = value
            found[f"off_principal_{side}_null"] = null
            found[f"off_principal_{side}_ratio"] = value / null if null else None
    return found


def _whole(matrix: Matrix) -> Rows:
    """The rows of W'."""
    if matrix.tuned is not None:
        return matrix.tuned.rows
    base = matrix.base
    assert base is not None

    def rows() -> Iterator[Tensor]:
        for W, delta in zip(base.rows(), matrix.rows(), strict=True):
            yield W.double() + delta

    return rows


def _off_principal(matrix: Matrix, U: Tensor, V: Tensor) -> relations.OffPrincipal | None:
    """`relations.off_principal_energy`, of factors as they are, else slice by slice."""
    if matrix.factors is not None:
        B, A = matrix.factors()
        return relations.off_principal_energy((B.to(U), A.to(U)), U, V)
    whole = right = 0.0
    start = 0
    inside = V.new_zeros(U.shape[1], matrix.shape[1])
    for part in matrix.rows():
        dW = part.to(V)
        inside += U[start : start + len(dW)].T @ dW
        whole += dW.square().sum().item()
        right += (dW @ V).square().sum().item()
        start += len(dW)
    return relations.off_principal_of(
        whole, inside.square().sum().item(), right, (inside @ V).square().sum().item(), U, V
    )


def times(rows: Iterator[Tensor], X: Tensor) -> Tensor:
    """W X for W (m, k) in slices, X (k, j): (m, j)."""
    return torch.cat([part.to(X) @ X for part in rows])


def transposed_times(rows: Iterator[Tensor], X: Tensor) -> Tensor:
    """W^T X for W (m, k) in slices, X (m, j): (k, j)."""
    total, start = torch.zeros(0), 0
    for part in rows:
        product = part.to(X).T @ X[start : start + len(part)]
        total = product if start == 0 else total.add_(product)
        start += len(part)
    return total
