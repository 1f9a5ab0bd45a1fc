"""Comparisons of a tuned matrix with its base against closed forms and direct computations."""

import math

import pytest
import torch

from structadapt.spectra import relations as compare
from structadapt.spectra.geometry import Vectors


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(m, k, seed=0):
    return torch.linalg.qr(random(m, k, seed=seed)).Q


# -- values ----------------------------------------------------------------------------------------


def test_spectral_drift_and_relative_size():
    assert compare.nss_drift([3.0, 4.5], [4.0, 3.0]) == pytest.approx(0.5 / 5)
    assert compare.nss_drift([0.0], [0.0]) == 0 and compare.nss_drift([1.0], [0.0]) == math.inf
    W, dW = random(20, 30), 0.1 * random(20, 30, seed=1)
    s, moved, of_update = (torch.linalg.svdvals(X) for X in (W, W + dW, dW))
    size = compare.relative_size(of_update, s)
    assert 0 < compare.nss_drift(moved, s) <= size["relative_norm"]
    assert size["relative_norm"] == pytest.approx((dW.norm() / W.norm()).item())
    assert size["relative_spectral"] == pytest.approx((of_update[0] / s[0]).item())
    Q = torch.linalg.qr(random(20, 20, seed=2)).Q
    assert compare.nss_drift(torch.linalg.svdvals(Q @ W), s) < 1e-14
    assert compare.relative_size([], []) == {"relative_norm": 0, "relative_spectral": 0}
    with pytest.raises(ValueError, match="2 singular values and 1"):
        compare.nss_drift([1.0, 2.0], [1.0])


# -- subspaces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_principal_angles_that_were_made(swap):
    degrees = torch.tensor([0.0, 1e-8, 1e-4, 0.3, 44.0, 46.0, 89.9, 90.0], dtype=torch.float64)
    n, Q = len(degrees), basis(50, 20)
    start, other = Q[:, :n], Q[:, n : 2 * n]
    radians = degrees.deg2rad()
    turned = (start * radians.cos() + other * radians.sin()) @ basis(n, n, seed=3)
    mixed = start @ random(n, n, seed=5)  # not orthonormal: made so
    pair = (turned, mixed) if swap else (mixed, turned)
    torch.testing.assert_close(compare.principal_angles(*pair), degrees, rtol=1e-6, atol=1e-12)
    more = torch.cat([start, Q[:, 2 * n :]], 1)  # of other sizes: the smaller has the angles
    pair = (turned, more) if swap else (more, turned)
    torch.testing.assert_close(compare.principal_angles(*pair), degrees, rtol=1e-6, atol=1e-12)


def test_angles_of_a_small_update_are_seen():
    """Turned by 1e-4 degrees, ten thousand times below the floor of cosines in float32."""
    W = (basis(60, 40) * torch.linspace(3, 1, 40)) @ basis(50, 40, seed=1).T
    angle = math.radians(1e-4)
    U = basis(60, 40)
    extra = torch.linalg.qr(torch.cat([U, random(60, 1, seed=2)], 1)).Q[:, -1]
    turn = torch.outer(extra, U[:, 0]) - torch.outer(U[:, 0], extra)
    turned = torch.matrix_exp(angle * turn) @ W
    a, b = (Vectors(lambda X=X: iter([X]), (60, 50), torch.device("cpu")) for X in (W, turned))
    sides = zip(a.leading, b.leading, strict=True)
    angles = [compare.principal_angles(X[:, :5], Y[:, :5]) for X, Y in sides]
    assert angles[0][-1].item() == pytest.approx(1e-4, rel=1e-4)
    assert angles[0][:-1].max() < 1e-9 and angles[1].max() < 1e-9


def test_angles_of_nothing_and_of_other_spaces():
    assert compare.principal_angles(torch.zeros(5, 0), basis(5, 2)).shape == (0,)
    with pytest.raises(ValueError, match="subspaces of 5 and of 6 dimensions"):
        compare.principal_angles(basis(5, 2), basis(6, 2))


def test_subspace_similarity():
    Q = basis(40, 12)
    assert compare.subspace_similarity(Q[:, :3], Q[:, :7]) == pytest.approx(1)
    assert compare.subspace_similarity(Q[:, :3], Q[:, 3:7]) == pytest.approx(0)
    assert compare.subspace_similarity(Q[:, :4], Q[:, 2:8]) == pytest.approx(0.5)
    assert compare.subspace_similarity(Q[:, :0], Q) == 0
    pairs = [(basis(64, 4, seed=i), basis(64, 8, seed=i + 100)) for i in range(60)]
    mean = sum(compare.subspace_similarity(*pair) for pair in pairs) / len(pairs)
    assert mean == pytest.approx(8 / 64, rel=0.1)
    turned = basis(12, 12, seed=3)
    assert compare.subspace_similarity(Q @ turned, Q) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_off_principal_energy(scale):
    Q, V = basis(30, 8), basis(20, 6, seed=1)
    U = Q[:, :6]
    inner = random(6, 6, seed=2)
    off_left, off_right = Q[:, 6:] @ random(2, 6, seed=3), random(6, 20, seed=4)
    on = U @ inner @ V.T
    found = compare.off_principal_energy(on * scale, U, V)
    assert (found.left, found.right, found.both) == pytest.approx((0, 0, 0), abs=1e-12)
    left = off_left @ V.T  # right within, left outside
    found = compare.off_principal_energy(left * scale, U, V)
    assert (found.left, found.right, found.both) == pytest.approx((1, 0, 1), abs=1e-12)
    B, A = random(30, 3, seed=5), random(3, 20, seed=6)
    for update in (B @ A, U @ off_right, random(30, 20, seed=7)):
        whole = update.square().sum()
        expected = [
            1 - ((part.square().sum()) / whole).item()
            for part in (U.T @ update, update @ V, U.T @ update @ V)
        ]
        found = compare.off_principal_energy(update * scale, U, V)
        assert (found.left, found.right, found.both) == pytest.approx(expected, abs=1e-12)
    factors = compare.off_principal_energy((B * scale, A), U, V)
    dense = compare.off_principal_energy(B @ A, U, V)
    assert factors.left == pytest.approx(dense.left) and factors.both == pytest.approx(dense.both)
    assert factors.right == pytest.approx(dense.right)


def test_off_principal_energy_of_noise_and_of_nothing():
    U, V = basis(60, 10), basis(40, 10, seed=1)
    found = compare.off_principal_energy(random(60, 40, seed=2), U, V)
    assert found.left_random == pytest.approx(1 - 10 / 60)
    assert found.right_random == pytest.approx(1 - 10 / 40)
    assert found.both_random == pytest.approx(1 - 100 / 2400)
    for side in ("left", "right", "both"):
        random_one = getattr(found, f"{side}_random")
        assert getattr(found, side) == pytest.approx(random_one, abs=0.03)
    assert compare.off_principal_energy(torch.zeros(60, 40), U, V) is None
    assert compare.off_principal_energy((torch.zeros(60, 2), random(2, 40)), U, V) is None


# -- entries ---------------------------------------------------------------------------------------


def test_update_sparsity_of_known_changes():
    base = torch.ones(4, 5)
    tuned = base.clone()
    tuned[0, 0], tuned[1, 1], tuned[2, 2] = 1.0005, 1.002, -1.0
    assert compare.update_sparsity(tuned, base) == pytest.approx(18 / 20)
    assert compare.update_sparsity(tuned, base, eta=0) == pytest.approx(17 / 20)
    assert compare.update_sparsity(tuned.split(3), base.split(3)) == pytest.approx(18 / 20)
    small = compare.update_sparsity(1e-6 * tuned, 1e-6 * base)  # relative to the weight
    assert small == pytest.approx(18 / 20)
    zero = torch.tensor([[0.0, 0.0, torch.nan]])
    assert compare.changed(torch.tensor([[0.0, 1e-30, 0.0]]), zero).tolist() == [
        [False, True, True]
    ]
    for dtype in (torch.bfloat16, torch.float16):  # the next value of bfloat16 is a change
        W = torch.linspace(1, 1.9, 50).to(dtype).view(5, 10)
        step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
        moved = compare.update_sparsity(W + step, W)
        assert moved == (0 if dtype == torch.bfloat16 else 1), dtype
        assert compare.update_sparsity(W + step, W, eta=0) == 0
    assert compare.update_sparsity(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    with pytest.raises(ValueError, match=r"shapes \(4, 5\) and \(5, 4\) differ"):
        compare.update_sparsity(base, base.T)
    with pytest.raises(ValueError, match="eta must not be negative"):
        compare.update_sparsity(base, base, eta=-1)
    with pytest.raises(ValueError, match="argument"):
        compare.update_sparsity(base.split(1), base[:2].split(1))
