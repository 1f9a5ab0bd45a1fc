"""Size and concentration of updates without a singular value decomposition, many at once.

With singular values s and energies e = s^2 of an update dW, all that is worked out here is

    F = sum e,   D_2 = F^2 / sum e^2,   p_1 = max e / F

from a symmetric S whose eigenvalues are those of dW^T dW, zeros aside: a small core made of the
factors, or the Gram matrix of the smaller side. Only products of matrices are used: on CUDA nothing
waits for the device. Where there is neither a factor nor a small side, a few probes go through the
update as it acts on vectors.

Everything is computed in float64 and returned as (3, ...): F, D_2, p_1; all 0 for an update of
zeros, NaN for one that is not finite.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SQUARINGS = 20  # p_1 is a mean of energies weighed by their 2^20th power
SKETCH, PROBES = 8, 16  # vectors for what is concentrated, and for the rest
ROUNDS = 3  # of subspace iteration
NORM_ROUNDS, NORM_BLOCK = 6, 8  # the same, and its vectors, for one norm
Linear = Callable[[Tensor], Tensor]  # x (n, in) -> x dW^T (n, out)


def of_core(S: Tensor) -> Tensor:
    """F, D_2, p_1 of symmetric positive S (..., q, q) in float64.

    p_1 = tr(S P) / F with P = S^n / tr S^n by repeated squaring, n = 2^20: never above the true
    value, and at most (q - 1) / (e n) of it below, for a second value that close to the first.
    """
    F = S.diagonal(dim1=-2, dim2=-1).sum(-1)
    N = S / torch.where(F == 0, 1.0, F)[..., None, None]
    square = N.square().sum((-2, -1))
    D_2 = torch.where(F == 0, 0.0, 1 / square)
    P = N
    for _ in range(SQUARINGS):
        P = P @ P
        trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)
        P = P / torch.where(trace == 0, 1.0, trace)[..., None, None]
    return torch.stack([F, D_2, (P * N).sum((-2, -1))])


def of_factors(B: Tensor, A: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """F, D_2, p_1 of scale B A for B (..., out, r), A (..., r, in) and scale (...).

    With L L^T = A A^T, S = scale^2 L^T (B^T B) L is r x r and has the energies of the update. For
    r above the smaller side S is the Gram matrix of the product instead. Both in float64: a core in
    float32 loses every value below 3e-4 of the largest.
    """
    B, A = B.double(), A.double()
    if A.shape[-2] > min(B.shape[-2], A.shape[-1]):
        return of_dense(B @ A, scale)
    G = A @ A.mT
    size = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    # A's rows may depend on each other; an inner edge of this size moves nothing that is reported.
    edge = torch.where(size == 0, 1.0, size * 1e-14)[..., None, None]
    inner = G + edge * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L = torch.linalg.cholesky_ex(inner).L * (size != 0)[..., None, None]  # 0 for A = 0
    core = L.mT @ (B.mT @ B) @ L
    return _scaled(of_core(core), scale)


def of_dense(matrix: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """F, D_2, p_1 of scale M for M (..., out, in), from the Gram matrix of its smaller side."""
    M = matrix.double()
    S = M @ M.mT if M.shape[-2] <= M.shape[-1] else M.mT @ M
    return _scaled(of_core(S), scale)


def of_action(apply: Linear, probes: Tensor) -> Tensor:
    """F, D_2, p_1 of an update that is only known by what it does, estimated.

    apply: x (n, in) -> x dW^T (n, out), linear and differentiable: its gradient is the action of
    dW^T. probes: (SKETCH + n, in) of independent +-1. The first SKETCH begin a subspace iteration
    (Halko, Martinsson & Tropp 2011) that ends in an orthonormal Q (SKETCH, in); with G = dW^T dW

        F = tr Q G Q^T + E x' G x'^T,   sum e^2 = |Q G|^2 + E |x' G|^2,   x' = x - x Q^T Q

    (Hutch++, Meyer et al. 2021): what is concentrated is in Q, and exact; the rest is estimated by
    the other probes x. p_1 is the largest Ritz value of Q, never above the true one but for the
    error of F. Up to SKETCH directions are exact; for D_2 in the hundreds, errors of 2 to 3 %.
    """
    y, z = _there_and_back(apply, probes)
    x, y, z, first = probes[SKETCH:].double(), y[SKETCH:], z[SKETCH:], z[:SKETCH]
    Q, there = first, first
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(first.T).Q.T  # (SKETCH, in), rows orthonormal
        there, first = _there_and_back(apply, Q.to(probes.dtype))
    inside = x @ Q.T  # (n, SKETCH)
    y, z = y - inside @ there, z - inside @ first  # by linearity, those of x'
    n = len(x)
    F = there.square().sum() + y.square().sum() / n
    square = first.square().sum() + z.square().sum() / n
    H = first @ Q.T  # Q G Q^T
    ritz = of_core((H + H.T) / 2)
    D_2 = torch.where(F == 0, 0.0, F * F / torch.where(square == 0, 1.0, square))
    p_1 = ritz[2] * ritz[0] / torch.where(F == 0, 1.0, F)
    return torch.stack([F, torch.where(F == 0, 0.0, D_2.clamp(min=1.0)), p_1.clamp(max=1.0)])


def _there_and_back(apply: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """x dW^T and that times dW: the gradient of |x dW^T|^2 / 2."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = apply(x)
        (z,) = torch.autograd.grad(y, x, y.detach())
    return y.detach().double(), z.double()


def _scaled(found: Tensor, scale: Tensor | float) -> Tensor:
    F, D_2, p_1 = found
    return torch.stack([F * scale * scale, D_2, p_1])


def null(rank: int, out_features: int, in_features: int) -> float:
    """D_2 of B A for Gaussian B (out, rank) and A (rank, in): 1 / (1 / rank + 1 / out + 1 / in).

    With rank = infinity, that of a Gaussian matrix.
    """
    return 1 / (1 / rank + 1 / out_features + 1 / in_features)


def spectral_norm(W: Tensor) -> Tensor:
    """The largest singular value of W (out, in), a scalar in fp32 or float64 on its device.

    Subspace iteration from a seeded Gaussian block: never above the true value, and 2 % below it
    for a Gaussian matrix, whose first values are all but equal.
    """
    W = W if W.dtype in (torch.float32, torch.float64) else W.float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(min(NORM_BLOCK, *W.shape), W.shape[1], generator=generator).to(W)
    for _ in range(NORM_ROUNDS):  # as rows: on a CPU W^T times a few columns is ten times slower
        y = torch.linalg.qr((x @ W.T).T).Q.T.contiguous()
        x = y @ W
    F, _, p_1 = of_core(x.double() @ x.double().T)
    return (F * p_1).sqrt()
