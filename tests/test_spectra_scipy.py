"""Measures of spectra against scipy, which computes them by other code."""

import numpy as np
import pytest
import torch

from structadapt.spectra import engine, marchenko_pastur, measures, powerlaw, relations

linalg = pytest.importorskip("scipy.linalg")
stats = pytest.importorskip("scipy.stats")
integrate = pytest.importorskip("scipy.integrate")

SHAPES = [(40, 40), (90, 30), (30, 90), (1, 7)]


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def gaussian(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values(shape):
    W = gaussian(*shape)
    expected = linalg.svdvals(W)
    assert measures.singular_values(torch.from_numpy(W)).tolist() == close(expected.tolist())
    B, A = gaussian(shape[0], 5, seed=1), gaussian(5, shape[1], seed=2)
    found = engine.spectrum(torch.from_numpy(B @ A)).s.numpy()
    expected = linalg.svdvals(B @ A)[:5]
    assert found[: len(expected)].tolist() == close(expected.tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_of_entropies_and_norms(shape):
    W = gaussian(*shape)
    s = linalg.svdvals(W)
    assert measures.effective_rank(s) == close(np.exp(stats.entropy(s)))
    assert measures.effective_rank_energy(s) == close(np.exp(stats.entropy(s**2)))
    assert measures.hill_number(s, 1) == close(np.exp(stats.entropy(s**2)))
    for name, order in (("frobenius_norm", "fro"), ("spectral_norm", 2), ("nuclear_norm", "nuc")):
        expected = linalg.norm(W, order) if order != "nuc" else np.linalg.norm(W, "nuc")
        assert getattr(measures, name)(s) == close(expected)


@pytest.mark.parametrize("columns", [(3, 3), (2, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-7])
def test_angles_between_subspaces(columns, apart):
    """Bases that share directions up to a disturbance, so that some angles are tiny."""
    i, j = columns
    U0 = gaussian(40, i)
    U1 = np.hstack([U0, gaussian(40, 6, seed=1)])[:, :j] + apart * gaussian(40, j, seed=2)
    expected = np.rad2deg(np.sort(linalg.subspace_angles(U0, U1)))
    found = relations.principal_angles(torch.from_numpy(U0), torch.from_numpy(U1))
    assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("n", [20, 301])
def test_the_power_law_is_the_likeliest_and_its_distance_is_that_of_the_tail(n):
    e = np.sort(1 + np.random.default_rng(n).pareto(1.7, n))
    law = powerlaw.fit(e)
    assert law is not None
    tail = e[e >= law.xmin * (1 - 1e-12)]
    shape, _, _ = stats.pareto.fit(tail, floc=0, fscale=law.xmin)
    assert len(tail) == law.n_tail and law.alpha == close(1 + shape)
    # D is taken below each step of the empirical distribution, as Clauset et al. have it.
    theory = stats.pareto.cdf(tail, law.alpha - 1, scale=law.xmin)
    below = np.arange(len(tail)) / len(tail)
    assert abs(law.D - abs(theory - below).max()) < 1e-9


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.05])
def test_the_marchenko_pastur_law(ratio):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    edges = marchenko_pastur.quantiles(ratio, np.array([0.0, 1.0]))
    assert edges.tolist() == close([low, high])
    q = np.array([0.1, 0.5, 0.9])

    def density(x):
        return np.sqrt((high - x) * (x - low)) / (2 * np.pi * ratio * x)

    for share, x in zip(q, marchenko_pastur.quantiles(ratio, q), strict=True):
        above, _ = integrate.quad(density, x, high, epsabs=1e-12, epsrel=1e-12, limit=200)
        assert 1 - above == pytest.approx(share, abs=1e-8)  # the law lies on a grid
