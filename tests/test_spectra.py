"""Measures against closed forms, reports against what they report on."""

import copy
import csv
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from torch import nn

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


# -- reports ---------------------------------------------------------------------------------------


def test_a_report_on_a_model(net, adapter, train_a_little):
    train_a_little(sa.adapt(net, adapter))
    report = sa.spectra.analyze(net)
    assert [row["name"] for row in report.rows] == [n for n, _ in sa.delta_weights(net)]
    for row, (name, delta) in zip(report.rows, sa.delta_weights(net), strict=True):
        s = torch.linalg.svdvals(delta.double())
        for measure in (*MEASURES, sa.spectra.topk_energy):
            assert row[measure.__name__] == pytest.approx(measure(s), rel=1e-5)
        W = net.get_submodule(name).weight
        assert row["frobenius_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert row["relative_norm"] == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)
        assert row["shape"] == tuple(delta.shape) and (row["status"], row["reason"]) == ("ok", "")
    with sa.merged(net):
        again = sa.spectra.analyze(net)
        assert untimed(again.rows) == untimed(report.rows)
    fit = powerlaw.fit(sa.spectra.singular_values(delta).square().numpy())
    assert row["alpha"] == (fit and pytest.approx(fit.alpha))
    assert bool(fit) == (report.rows[-1]["effective_rank"] > 10)
    base = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in sa.adapter_parameters(net):
            parameter.add_(0.1)
    differences = {r["name"]: r for r in sa.spectra.analyze(net, base=base).rows}
    for row in sa.spectra.analyze(net).rows:
        assert_same_row(row, differences[row["name"]], rel=1e-5)
    assert differences["embed"]["frobenius_norm"] == 0.0


def assert_same_row(left, right, rel):
    assert left.keys() == right.keys()
    for key, value in left.items():
        close = isinstance(value, float)
        assert right[key] == (pytest.approx(value, rel=rel) if close else value), key


def test_a_report_on_a_file_is_the_one_on_its_model(net, adapter, tmp_path, train_a_little):
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, adapter))
    sa.save(net, tmp_path / "a.safetensors")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    of_model = sa.spectra.analyze(net).rows
    for weights in (base, base.state_dict(), tmp_path / "base.safetensors", net):
        of_file = sa.spectra.analyze(tmp_path / "a.safetensors", weights).rows
        for left, right in zip(of_model, of_file, strict=True):
            assert_same_row(left, right, rel=1e-6)
    alone = sa.spectra.analyze(tmp_path / "a.safetensors").rows
    for left, right in zip(of_model, alone, strict=True):
        assert right["relative_norm"] is None
        if isinstance(adapter, sa.DoRA):
            assert right["status"] == "partial" and "pass base=" in right["reason"]
            layer = net.get_submodule(right["name"])
            s = torch.linalg.svdvals(layer.B.double() @ layer.A.double())
            assert right["effective_rank"] == pytest.approx(sa.spectra.effective_rank(s))
        else:
            left, right = {**left, "relative_norm": 0}, {**right, "relative_norm": 0}
            assert_same_row(left, right, rel=1e-4)


def test_a_report_on_two_sets_of_weights(net, tmp_path):
    base = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.blocks[0]["up"].weight[0] += 1.0
    report = sa.spectra.analyze(net, base)
    rows = {row["name"]: row for row in report.rows}
    assert rows["blocks.0.up"]["stable_rank"] == pytest.approx(1)
    assert rows["blocks.1.up"]["stable_rank"] == 0.0 and "embed" in rows
    with pytest.raises(ValueError, match="no adapted layer|nothing to compare"):
        sa.spectra.analyze(net)
    with pytest.raises(ValueError, match="the base has no matrix blocks.0.attn"):
        sa.spectra.analyze(net, {"embed.weight": base["embed.weight"]})
    with pytest.raises(ValueError, match=r"embed is \(11, 32\) in the source and \(2, 2\)"):
        sa.spectra.analyze(net, {**base, "embed.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="the source has no matrix"):
        sa.spectra.analyze({"b": torch.ones(3)}, {})
    root = nn.Linear(4, 4)
    assert sa.spectra.analyze({"weight": torch.eye(4)}, root).rows[0]["name"] == ""
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="cut.safetensors is truncated"):
        sa.spectra.analyze(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        sa.spectra.analyze(tmp_path / "missing.safetensors")


def test_a_matrix_that_is_not_finite_is_a_row_with_a_reason(net):
    sa.adapt(net, sa.LoRA(rank=2), "attn")
    with torch.no_grad():
        net.blocks[0]["attn"].B[0, 0] = torch.nan
    first, second = sa.spectra.analyze(net).rows
    assert (first["status"], first["reason"]) == ("skipped", "the update is not finite")
    assert second["status"] == "ok" and second["effective_rank"] == 0.0


def test_formats(net, tmp_path, train_a_little):
    train_a_little(sa.adapt(net, sa.LoRA(rank=2)))
    report = sa.spectra.analyze(net)
    report.to_json(tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert rows == [{**row, "shape": list(row["shape"])} for row in report.rows]
    report.to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        read = list(csv.DictReader(file))
    assert [r["name"] for r in read] == [r["name"] for r in report.rows]
    assert read[0]["shape"] == "32x32"
    assert float(read[0]["stable_rank"]) == report.rows[0]["stable_rank"]
    lines = report.to_markdown().splitlines()
    assert len(lines) == 2 + len(report.rows) and len({line.count("|") for line in lines}) == 1
