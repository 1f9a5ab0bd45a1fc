"""How large an update is beside the matrix it changes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from structadapt.grpo.update import Learner

Weights = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]  # (name, W, dW), as they are now
Sizes = dict[str, tuple[float, float]]  # ||dW||_F / ||W||_F, ||dW||_2 / ||W||_2


@dataclass(frozen=True)
class Size:
    """A ratio of norms, over matrices."""

    median: float
    largest: float
    where: str  # the matrix that has the largest

    def __str__(self) -> str:
        return f"median {self.median:.3g}, largest {self.largest:.3g} ({self.where})"


def trained_matrices(learner: Learner) -> Weights:
    """The two-dimensional parameters of the optimizer: as they are now, and what they gain."""

    def whole(p: Tensor) -> Tensor:
        return getattr(p, "full_tensor", lambda: p)().detach()

    matrices = {n: p for n, p in learner.parameters.items() if p.dim() == 2}
    start = {name: whole(p).clone() for name, p in matrices.items()}
    return lambda: ((name, W, whole(matrices[name]).float() - W) for name, W in start.items())


def measurement(weights: Weights) -> Callable[[], Sizes]:
    """A function for after an update: (||dW||_F / ||W||_F, ||dW||_2 / ||W||_2) by name, dW being
    the change since now. A matrix of zeros is left out."""
    before = {name: dW.clone() for name, _, dW in weights() if dW.any()}  # none of fresh adapters

    @torch.no_grad()
    def measure() -> Sizes:
        found = {}
        for name, W, dW in weights():
            W, dW = W.float(), dW.float()
            base, change = (W + before[name], dW - before[name]) if name in before else (W, dW)
            if base.any():
                parts = change.norm() / base.norm(), spectral_norm(change) / spectral_norm(base)
                found[name] = (float(parts[0]), float(parts[1]))
        return found

    return measure


def size_of(sizes: Sizes, which: int) -> Size | None:
    values = {name: pair[which] for name, pair in sizes.items()}
    if not values:
        return None
    where = max(values, key=lambda name: values[name])
    return Size(median(values.values()), values[where], where)


def spectral_norm(W: Tensor, vectors: int = 8, rounds: int = 12) -> Tensor:
    """||W||_2 of a matrix, from below: subspace iteration on W^T W (Halko et al. 2011, 4.4), fp32.

    Off by less than 1 % unless more than `vectors` singular values lie that close together.
    """
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(W.shape[1], min(vectors, *W.shape), generator=generator).to(W.device)
    scale = W.abs().max()
    if scale == 0 or not scale.isfinite():
        return scale
    W = W / scale  # the squares of tiny updates are not even subnormal
    for _ in range(rounds):
        Q = torch.linalg.qr(W.T @ (W @ Q)).Q
    return torch.linalg.matrix_norm(W @ Q, ord=2) * scale
