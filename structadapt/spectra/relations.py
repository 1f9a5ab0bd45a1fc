"""How a tuned matrix W+ = W + dW differs from its base W, and two updates from each other.

U, V are orthonormal columns of singular vectors: U (m, j) on the side of the
outputs, V (k, j) of the inputs. Everything is computed in float64: angles after reinforcement
learning are below half a degree, and single precision has a floor of 1e-2 degrees by cosines.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from structadapt.spectra.measures import SingularValues

Delta = Tensor | tuple[Tensor, Tensor]  # dW (m, k), or its factors B (m, r), A (r, k)


def nss_drift(tuned: SingularValues, base: SingularValues) -> float:
    """Normalised spectral shift |s(W+) - s(W)|_2 / |s(W)|_2, values matched by size (Zhu et al.
    2025, arXiv 2511.08567).

    At most |dW|_F / |W|_F (Mirsky 1960). Infinity over a base of zeros, unless both are.
    ValueError if the numbers of values differ.
    """
    a, b = (torch.as_tensor(s, dtype=torch.float64).sort(descending=True).values
            for s in (tuned, base))  # fmt: skip
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} singular values and {len(b)}: matrices of different shapes?")
    return _ratio((a - b).norm().item(), b.norm().item())


def relative_size(update: SingularValues, base: SingularValues) -> dict[str, float]:
    """{"relative_norm": |dW|_F / |W|_F, "relative_spectral": s_1(dW) / s_1(W)}."""
    a, b = (torch.as_tensor(s, dtype=torch.float64) for s in (update, base))
    tops = [s.max().item() if len(s) else 0.0 for s in (a, b)]
    return {
        "relative_norm": _ratio(a.norm().item(), b.norm().item()),
        "relative_spectral": _ratio(*tops),
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 0.0)


# -- subspaces -------------------------------------------------------------------------------------


def principal_angles(U0: Tensor, U1: Tensor) -> Tensor:
    """The angles between two subspaces, in degrees, ascending: (min(i, j),), float64.

    U0 (m, i), U1 (m, j): bases, made orthonormal here. The cosines are the singular values of
    U0^T U1; below 45 degrees the angles come from the sines, the singular values of
    (1 - U0 U0^T) U1, which lose nothing there (Bjorck & Golub 1973).
    """
    U0, U1 = _orthonormal(U0), _orthonormal(U1)
    if U0.shape[0] != U1.shape[0]:
        raise ValueError(f"subspaces of {U0.shape[0]} and of {U1.shape[0]} dimensions")
    if U0.shape[1] < U1.shape[1]:
        U0, U1 = U1, U0
    overlap = U0.T @ U1
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)  # largest first: smallest angle first
    sines = torch.linalg.svdvals(U1 - U0 @ overlap).clamp(max=1).flip(0)
    angles = torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())
    return angles.rad2deg().sort().values


def subspace_similarity(U0: Tensor, U1: Tensor) -> float:
    """phi = |U0^T U1|_F^2 / min(i, j), 0 to 1, of orthonormal bases (m, i) and (m, j) (Hu et al.
    2021, section 7.2). Independent random subspaces have max(i, j) / m."""
    if 0 in (U0.shape[1], U1.shape[1]):
        return 0.0
    overlap = U0.double().T @ U1.double()
    return (overlap.square().sum() / min(overlap.shape)).item()


def _orthonormal(U: Tensor) -> Tensor:
    U = U.detach().double()
    off = U.T @ U - torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return torch.linalg.qr(U).Q if U.numel() and off.abs().max() > 1e-13 else U


@dataclass(frozen=True)
class OffPrincipal:
    """Shares of |dW|_F^2 outside the principal subspaces of the base, 0 to 1, and what an update
    of independent random entries has."""

    left: float  # 1 - |U^T dW|^2 / |dW|^2; random: 1 - j / m
    right: float  # 1 - |dW V|^2 / |dW|^2; random: 1 - j / k
    both: float  # 1 - |U^T dW V|^2 / |dW|^2; random: 1 - j^2 / (m k)
    left_random: float
    right_random: float
    both_random: float


def off_principal_energy(update: Delta, U: Tensor, V: Tensor) -> OffPrincipal | None:
    """How much of an update lies off the leading singular vectors U (m, j), V (k, j) of its base
    (of the family of arXiv 2511.08567). With the trailing vectors instead, one minus it is what
    lies on them. None for an update of zeros."""
    U, V = U.detach().double(), V.detach().double()
    if isinstance(update, tuple):
        B, A = (_unit(factor) for factor in update)
        triangles = [torch.linalg.qr(X, mode="r").R for X in (B, A.T)]
        whole = _energy(triangles[0] @ triangles[1].T)
        inner = U.T @ B, A @ V
        parts = inner[0] @ A, B @ inner[1], inner[0] @ inner[1]
    else:
        dW = _unit(update)
        whole = _energy(dW)
        inside = U.T @ dW
        parts = inside, dW @ V, inside @ V
    left, right, both = (_energy(part) for part in parts)
    return off_principal_of(whole, left, right, both, U, V)


def off_principal_of(
    whole: float, left: float, right: float, both: float, U: Tensor, V: Tensor
) -> OffPrincipal | None:
    """The same from the energies |dW|^2, |U^T dW|^2, |dW V|^2 and |U^T dW V|^2."""
    if not whole:
        return None
    (m, j), (k, i) = U.shape, V.shape
    left, right, both = (min(1.0, max(0.0, 1 - part / whole)) for part in (left, right, both))
    return OffPrincipal(left, right, both, 1 - j / m, 1 - i / k, 1 - i * j / (m * k))


def _unit(X: Tensor) -> Tensor:
    """In float64 over its largest value, so that no square under- or overflows."""
    X = X.detach().double()
    largest = X.abs().max().item() if X.numel() else 0.0
    return X / largest if largest else X


def _energy(X: Tensor) -> float:
    return X.square().sum().item()


# -- entries ---------------------------------------------------------------------------------------


def changed(tuned: Tensor, base: Tensor, eta: float = 1e-3) -> Tensor:
    """Mask of the entries with |w+ - w| > eta max(|w|, |w+|); with eta=0, of all that differ.

    ValueError for different shapes, or eta < 0. NaN counts as changed.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"shapes {tuple(tuned.shape)} and {tuple(base.shape)} differ")
    if not eta >= 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    wide = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    a, b = tuned.detach().to(wide), base.detach().to(wide)
    return ~((a == b) | ((a - b).abs() <= eta * torch.maximum(a.abs(), b.abs())))


def update_sparsity(
    tuned: Tensor | Iterable[Tensor], base: Tensor | Iterable[Tensor], eta: float = 1e-3
) -> float:
    """Share of the entries that an update leaves as they were, 0 to 1, of matrices or of their
    slices in step.

    eta: an entry changed if |w+ - w| > eta max(|w|, |w+|). 1e-3 (arXiv 2511.08567) lies below the
    spacing of bfloat16, 2^-8 to 2^-7 of a value, and above that of float32 and float16: it asks
    whether a bfloat16 copy could have changed. 0 is the exact share (arXiv 2505.11711).
    0.0 for matrices without entries.
    """
    pairs = [(tuned,), (base,)] if isinstance(tuned, Tensor) else [tuned, base]
    count = total = 0
    for a, b in zip(*pairs, strict=True):
        count += int(changed(a, b, eta).sum())
        total += a.numel()
    return 1 - count / total if total else 0.0
