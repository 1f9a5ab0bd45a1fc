"""Measures, power law, spikes and nulls against closed forms, references and planted structure."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

from structadapt.spectra import engine, marchenko_pastur, measures, nulls, powerlaw

SPECTRA = nst.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-3, 1e3))
SHAPE = (40, 70)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- measures --------------------------------------------------------------------------------------


def test_closed_forms():
    s = [4.0, 2.0, 2.0, 1.0]  # energies 16, 4, 4, 1 of 25
    assert measures.spectral_norm(s) == 4 and measures.nuclear_norm(s) == 9
    assert measures.frobenius_norm(s) == pytest.approx(5) and measures.condition(s) == 4
    assert [measures.energy_count(s, q) for q in (0.5, 0.64, 0.65, 0.8, 0.96, 0.97, 1)] == [
        1, 1, 2, 2, 3, 4, 4,
    ]  # fmt: skip
    assert measures.energy_count([1.0] * 4, 0.75) == measures.energy_count([0.1] * 10, 0.3) == 3
    assert measures.gini(s) == pytest.approx((-3 * 1 - 2 + 2 + 3 * 4) / (4 * 9))
    assert measures.hoyer(s) == pytest.approx((2 - 9 / 5) / (2 - 1))
    assert measures.gini([1.0, 0, 0, 0]) == pytest.approx(0.75)
    assert measures.gini([3.0] * 5) == measures.hoyer([3.0]) == 0 and measures.hoyer([2.0, 0]) == 1
    assert measures.condition([1.0, 0.0]) == math.inf
    assert measures.hill_number(s, 3) == pytest.approx(
        (sum((e / 25) ** 3 for e in (16, 4, 4, 1))) ** (-1 / 2)
    )


@given(s=SPECTRA, scale=st.floats(1e-30, 1e30))
def test_hill_numbers_are_the_named_measures_and_fall_with_the_order(s, scale):
    named = {1: measures.effective_rank_energy, 2: measures.participation_ratio}
    named[math.inf] = measures.stable_rank
    for q, measure in named.items():
        assert measures.hill_number(s * scale, q) == pytest.approx(measure(s), rel=1e-9)
    numbers = [measures.hill_number(s, q) for q in (0, 0.5, 1, 1.5, 2, 7, 300, math.inf)]
    assert numbers[0] == pytest.approx(len(s))
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(numbers))
    assert measures.hill_number(s, 1 + 1e-7) == pytest.approx(measures.hill_number(s, 1), rel=1e-5)
    for measure in (measures.gini, measures.hoyer, measures.condition):
        assert measure(s[::-1] * scale) == pytest.approx(measure(s), rel=1e-9, abs=1e-9)
    assert 0 <= measures.gini(s) < 1 and -1e-9 <= measures.hoyer(s) <= 1 + 1e-9


def test_arguments_and_degenerate_spectra():
    for call in (
        lambda s: measures.hill_number(s, -1),
        lambda s: measures.energy_count(s, 0),
        lambda s: measures.energy_count(s, 1.1),
        lambda s: measures.topk_energy(s, 0),
    ):
        for s in ([2.0, 1.0], [0.0]):
            with pytest.raises(ValueError, match="must"):
                call(s)
    for s in ([], [0.0, 0.0]):
        found = measures.summary(s, SHAPE, edge=1.0)
        assert found.pop("noise_edge") == 1.0 and not any(found.values())
    found = measures.summary([2.0], (1, 1))
    ones = ("effective_rank", "participation_ratio", "stable_rank", "topk_energy", "k50", "k99")
    assert all(found[name] == 1 for name in (*ones, "numerical_rank", "condition"))
    assert found["noise_edge"] is found["rank_above_noise"] is found["effective_rank_cut"] is None
    with pytest.raises(ValueError, match="singular values must be finite"):
        measures.frobenius_norm([math.inf])


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numerical_rank_is_the_rank_of_torch_and_numpy(rank, dtype):
    for seed in range(5):
        W = (random(40, rank, seed=seed) @ random(rank, 70, seed=seed + 9)).to(dtype)
        s = torch.linalg.svdvals(W)
        found = measures.numerical_rank(s, (40, 70), dtype)
        assert found == torch.linalg.matrix_rank(W) == np.linalg.matrix_rank(W.numpy()) == rank


def test_summary_does_not_change_with_transpose_rotation_and_scale():
    W = random(*SHAPE)
    Q = torch.linalg.qr(random(40, 40, seed=1)).Q
    expected = measures.summary(engine.spectrum(W).s, SHAPE)
    for changed, scale in ((W.T, 1), (Q @ W, 1), (W * 1e-150, 1e-150), (W.flip(0), 1)):
        found = measures.summary(engine.spectrum(changed).s, tuple(changed.shape))
        for name, value in expected.items():
            if value is not None:
                factor = scale if name.endswith("_norm") else 1
                assert found[name] == pytest.approx(value * factor, rel=1e-9), name


# -- rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "raw", "effective"), [(1e-1, 22.4, 7.98), (1e-2, 263.6, 7.99), (1e-3, 677, 7.96)]
)
def test_an_update_of_rank_8_merged_into_bfloat16(size, raw, effective):
    """Rounding looks like full rank; above its edge are the eight directions of the update."""
    W = (0.02 * random(1024, 1024)).bfloat16()
    B, A = torch.linalg.qr(random(1024, 8, seed=1)).Q, torch.linalg.qr(random(1024, 8, seed=2)).Q
    dW = B @ A.T
    dW *= size * W.double().norm() / dW.norm()
    merged = (W.double() + dW).bfloat16()
    s = engine.spectrum(merged.double() - W.double()).s
    ulp = torch.nextafter(merged.abs(), torch.tensor(math.inf).bfloat16()).double() - merged.abs()
    edge = measures.noise_edge(ulp.square().mean().sqrt().item(), (1024, 1024))
    found = measures.summary(s, (1024, 1024), edge=edge)
    assert found["rank_above_noise"] == 8
    assert found["effective_rank_cut"] == pytest.approx(effective, abs=0.05)
    assert found["effective_rank"] == pytest.approx(raw, rel=0.1)
    assert found["numerical_rank"] > 900
    noise = s[8].item()
    assert noise < edge and (size < 1e-2 or noise == pytest.approx(edge, rel=0.03))
    assert measures.rank_above_noise(s, edge) == len(measures.above_noise(s, edge)) == 8


# -- power law -------------------------------------------------------------------------------------


def direct(e):
    """The fit by its definition, everywhere: (alpha, D, n)."""
    log, best = np.log(np.sort(e)), (0.0, np.inf, 0)
    for i in range(len(e) - 1):
        n = len(e) - i
        alpha = 1 + n / (log[i:].sum() - n * log[i])
        D = np.abs(1 - np.exp((1 - alpha) * (log[i:] - log[i])) - np.arange(n) / n).max()
        best = min(best, (alpha, D, n), key=lambda fit: fit[1])
    return best


@pytest.mark.parametrize("n", [10, 11, 60, 400])
def test_the_fit_is_the_one_of_the_definition(n):
    generator = np.random.default_rng(n)
    for e in (
        generator.pareto(1.5, n) + 1,
        generator.lognormal(0, 2, n),
        np.linalg.svd(generator.standard_normal((n, 2 * n)), compute_uv=False) ** 2,
    ):
        fit = powerlaw.fit(e, threshold=0.0)
        assert (fit.alpha, fit.D, fit.n_tail) == pytest.approx(direct(e), rel=1e-9)
        assert fit.xmin == pytest.approx(np.sort(e)[-fit.n_tail])
        assert powerlaw.fit(torch.from_numpy(e), 0.0) == fit
        clipped = [direct(np.sort(e)[:-k])[0] for k in range(1, 10) if n - k >= 10]
        expected = pytest.approx((min(clipped), max(clipped))) if clipped else None
        assert powerlaw.clip_range(e, 0.0) == expected


def test_the_fit_has_no_scale_unless_a_threshold_gives_it_one():
    e = np.random.default_rng(0).pareto(1.5, 200) + 1
    for scale in (1e-30, 1e-5, 1e30):
        assert powerlaw.fit(e * scale).alpha == pytest.approx(powerlaw.fit(e).alpha)
        median = powerlaw.alpha_median(e * scale)
        assert median == pytest.approx(powerlaw.alpha_median(e))
    below = np.concatenate([e, np.full(50, 1e-17)])  # rounding of a Gram matrix
    assert powerlaw.fit(below) == powerlaw.fit(e)
    assert powerlaw.fit(e * 1e-7, threshold=1e-5) is None
    assert powerlaw.fit(e, threshold=2.0) == powerlaw.fit(e[e > 2.0], threshold=0.0)


def test_the_median_estimates_the_exponent_of_a_pareto_sample():
    uniform = np.random.default_rng(0).random(4000)
    for alpha in (2.0, 4.0):
        e = (1 - uniform) ** (-1 / (alpha - 1))
        assert powerlaw.alpha_median(e) == pytest.approx(alpha, rel=0.05)


def test_power_laws_of_too_little():
    for e in (np.ones(50), np.zeros(30), np.arange(1.0, 10.0), np.zeros(0)):
        assert powerlaw.fit(e) is powerlaw.clip_range(e) is powerlaw.alpha_median(e) is None
        assert set(powerlaw.summary(np.sqrt(e)).values()) == {None}
    ties = np.repeat([1.0, 2.0, 4.0, 8.0], 5)
    assert powerlaw.fit(ties).n_tail in (20, 15, 10)  # all of the equal ones, or none


# -- spikes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", marchenko_pastur.ESTIMATORS)
@pytest.mark.parametrize("shape", [(120, 120), (100, 400), (300, 90)])
def test_spikes_that_were_planted(shape, estimator):
    m, k = shape
    threshold = 0.3 * (m * k) ** 0.25  # sigma (m k)^(1/4)
    false = found = hidden = 0
    for seed in range(10):
        noise = 0.3 * random(m, k, seed=seed)
        u, v = (torch.nn.functional.normalize(random(n, seed=seed + 50), dim=0) for n in shape)
        of_noise = marchenko_pastur.spikes(torch.linalg.svdvals(noise), shape, estimator)
        assert of_noise.sigma == pytest.approx(0.3, rel=0.06)
        false += of_noise.count
        for strength in (2.0, 0.8):
            s = torch.linalg.svdvals(noise + strength * threshold * torch.outer(u, v))
            spikes = marchenko_pastur.spikes(s, shape, estimator)
            if strength == 2.0:
                found += spikes.count
                energy = s.square() / s.square().sum()
                assert spikes.energy == pytest.approx(energy[: spikes.count].sum().item())
            else:
                hidden += spikes.count
    assert (found, false, hidden) == (10, 0, 0) or (10 <= found <= 11 and false + hidden <= 2)


def test_the_law_of_marchenko_and_pastur():
    q = np.linspace(0, 1, 5)
    square = marchenko_pastur.quantiles(1.0, q)
    assert square[[0, -1]] == pytest.approx([0, 4]) and square[2] == pytest.approx(0.652778, 1e-4)
    s = torch.linalg.svdvals(random(300, 1200)).square().numpy() / 1200
    assert np.quantile(s, q[1:-1]) == pytest.approx(
        marchenko_pastur.quantiles(0.25, q[1:-1]), rel=0.01
    )
    mean = marchenko_pastur.quantiles(0.3, (np.arange(9999) + 0.5) / 9999)
    assert mean.mean() == pytest.approx(1, rel=1e-4)
    assert (mean**2).mean() == pytest.approx(1.3, rel=1e-4)
    for s, shape in (([], (0, 5)), ([0.0, 0.0], (2, 5))):
        assert marchenko_pastur.spikes(s, shape).count == 0
    assert marchenko_pastur.spikes([2.0], (1, 1)).count == 0
    assert marchenko_pastur.spikes([1e-200] * 9, (9, 9)).count == 0
    with pytest.raises(ValueError, match="estimator must be one of"):
        marchenko_pastur.spikes([1.0], (1, 1), "mode")
    with pytest.raises(ValueError, match="quantile must be one of"):
        marchenko_pastur.spikes([1.0], (1, 1), quantile=0.5)


# -- nulls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 9), (30, 45), (200, 200), (300, 300), (320, 960)])
def test_a_null_is_the_mean_over_gaussian_matrices(shape):
    null = nulls.null(shape)
    assert null == nulls.null(shape[::-1])
    draws = []
    for seed in range(6 if min(shape) > 100 else 200):
        s = torch.linalg.svdvals(random(*shape, seed=seed + 1000))
        draws.append({**measures.summary(s / s.norm(), shape), **powerlaw.summary(s)})
    exact = ("effective_rank", "effective_rank_energy", "participation_ratio", "k50", "k90", "k99")
    for name in (*exact, "gini", "hoyer", "nuclear_norm", "stable_rank", "topk_energy"):
        mean = np.mean([draw[name] for draw in draws])
        rel = 0.04 if name in ("stable_rank", "topk_energy") else 0.02  # of a single value
        assert null[name] == pytest.approx(mean, rel=rel, abs=1e-12), name
    if null["alpha_median"] is not None:
        assert null["alpha_median"] == pytest.approx(
            np.mean([draw["alpha_median"] for draw in draws]), rel=0.05
        )
    g = min(shape) / max(shape)
    assert null["frobenius_norm"] == pytest.approx(1)
    if min(shape) > 100:
        assert null["participation_ratio"] == pytest.approx(min(shape) / (1 + g), rel=0.005)
        assert null["stable_rank"] == pytest.approx(min(shape) / (1 + g**0.5) ** 2, rel=0.04)


def test_the_null_of_an_adapter_is_a_product_of_factors():
    for shape, rank in (((300, 500), 16), ((64, 90), 40), ((50, 20), 64)):
        r = min(rank, *shape)
        draws = []
        for seed in range(40):
            B, A = random(shape[0], r, seed=seed), random(r, shape[1], seed=seed + 99)
            draws.append(measures.summary(engine.factor_spectrum(B, A).s, shape))
        null = nulls.null(shape, rank)
        for name in ("effective_rank", "participation_ratio", "stable_rank", "k90"):
            mean = np.mean([draw[name] for draw in draws])
            assert null[name] == pytest.approx(mean, rel=0.03), name
        expected = r / (1 + r / shape[0] + r / shape[1])
        assert null["participation_ratio"] == pytest.approx(expected, rel=0.05)


def test_nulls_of_nothing_leave_the_random_state():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert not any(nulls.null((0, 7)).values())
    assert nulls.null((1, 1))["effective_rank"] == 1
    found = nulls.null((3, 5))
    found["effective_rank"] = -1.0  # a copy
    assert nulls.null((3, 5))["effective_rank"] > 1
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match="rank must be at least 1"):
        nulls.null((3, 5), 0)
    assert nulls.null_spectrum((0, 2)).shape == (0,)
    s = torch.linalg.svdvals(random(400, 600))
    expected = nulls.null_spectrum((600, 400))
    torch.testing.assert_close(expected[:380], s[:380], rtol=0.02, atol=0)
