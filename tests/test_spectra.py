"""Measures against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

import structadapt as sa
from structadapt.spectra import powerlaw

MEASURES = (
    sa.spectra.effective_rank,
    sa.spectra.effective_rank_energy,
    sa.spectra.participation_ratio,
    sa.spectra.stable_rank,
)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)
def test_k_equal_values_are_k_directions(measure):
    for k in (1, 2, 7):
        assert measure([3.0] * k + [0.0] * 5) == pytest.approx(k)
    assert measure([]) == measure([0.0, 0.0]) == 0.0
    assert measure([1e200, 1e200]) == measure([1e-320, 1e-320]) == pytest.approx(2)
    for bad in ([1.0, -1.0], [math.nan], [math.inf, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="singular values must be"):
            measure(bad)


def test_closed_forms_of_two_values():
    s = torch.tensor([2.0, 1.0])  # amplitudes 2/3, 1/3; energies 4/5, 1/5
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert sa.spectra.effective_rank(s) == pytest.approx(math.exp(entropy))
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert sa.spectra.effective_rank_energy(s) == pytest.approx(math.exp(entropy))
    assert sa.spectra.participation_ratio(s) == pytest.approx(25 / 17)
    assert sa.spectra.stable_rank(s) == pytest.approx(5 / 4)
    assert sa.spectra.topk_energy(s) == pytest.approx(0.8)
    assert sa.spectra.topk_energy(s, 2) == sa.spectra.topk_energy(s, 9) == pytest.approx(1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        sa.spectra.topk_energy(s, 0)


SPECTRA = nst.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-3, 1e3))


@given(s=SPECTRA, scale=st.floats(1e-30, 1e30))
def test_order_and_invariances(s, scale):
    erank, d1, d2, d_inf = (measure(s) for measure in MEASURES)
    assert len(s) * (1 + 1e-9) >= d1 >= d2 * (1 - 1e-9) and d2 >= d_inf * (1 - 1e-9)
    assert d_inf >= 1 - 1e-9 and erank >= d1 * (1 - 1e-9)
    changed = np.concatenate([s[::-1] * scale, np.zeros(3)])
    for measure in MEASURES:
        assert measure(changed) == pytest.approx(measure(s), rel=1e-9)
    assert sa.spectra.topk_energy(s) == pytest.approx(1 / d_inf)


@pytest.mark.parametrize("shape", [(30, 30), (12, 50), (50, 12), (1, 9), (3, 1)])
def test_singular_values_are_those_of_an_svd(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(sa.spectra.singular_values(W), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sa.spectra.singular_values(W.T), expected, rtol=1e-9, atol=1e-12)


def test_singular_values_of_a_low_rank_matrix_end_in_exact_zeros():
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(60, 4), (4, 80)]]
    s = sa.spectra.singular_values(factors[0] @ factors[1])
    assert (s[:4] > 0).all() and not s[4:].any()
    assert not sa.spectra.singular_values(torch.zeros(4, 3)).any()
    for scale in (1e-170, 1e200):
        s = sa.spectra.singular_values(factors[0] @ factors[1] * scale)
        assert (s[:4] > 0).all() and not s[4:].any() and torch.isfinite(s).all()
    assert sa.spectra.singular_values(torch.zeros(0, 3)).shape == (0,)
    with pytest.raises(ValueError, match="expected a matrix"):
        sa.spectra.singular_values(torch.zeros(3))
    with pytest.raises(ValueError, match="the matrix is not finite"):
        sa.spectra.singular_values(torch.full((2, 2), torch.nan))


def test_power_law_of_a_pareto_sample():
    uniform = np.random.default_rng(0).random(5_000)
    for alpha in (2.0, 3.5):
        fit = powerlaw.fit((1 - uniform) ** (-1 / (alpha - 1)))
        assert fit.alpha == pytest.approx(alpha, rel=0.08) and fit.D < 0.03
        assert fit.sigma == pytest.approx((fit.alpha - 1) / math.sqrt(fit.n_tail))
    assert powerlaw.fit(np.ones(9)) is None and powerlaw.fit(np.ones(50)) is None
    values = (1 - uniform[:500]) ** -1.0
    assert powerlaw.fit(values * 1e-12).alpha == pytest.approx(powerlaw.fit(values).alpha)
