"""Reports against what they report on, and what is shown of them against the rows."""

import copy
import csv
import io
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import structadapt as sa
from structadapt.layers import find_adapted
from structadapt.spectra import drawing, engine, maturity, page, plots, tables
from structadapt.spectra.columns import COLUMNS, MEASURES, NULLED, head, meaning, title
from structadapt.spectra.evidence import RULES, failing, incomplete
from structadapt.spectra.geometry import principal
from structadapt.spectra.places import places_of
from structadapt.spectra.progress import Meter, duration, flops
from structadapt.spectra.report import Report

PURE = (
    sa.spectra.effective_rank,
    sa.spectra.effective_rank_energy,
    sa.spectra.participation_ratio,
    sa.spectra.stable_rank,
    sa.spectra.topk_energy,
)


def whole(report):
    """The rows of whole updates or weights by name: what has two rows has its direction first."""
    return {row["name"]: row for row in report.rows}


def assert_same(left, right, rel=1e-12, but=("seconds",)):
    """Two rows, up to `but`."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        if key not in but:
            close = isinstance(value, float)
            assert right[key] == (pytest.approx(value, rel=rel, abs=1e-12) if close else value), key


def random_pair(shape=(29, 21), size=0.05, seed=0):
    """A weight, and the same with an update that is not small."""
    generator = torch.Generator().manual_seed(seed)
    W, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return W, W + size * noise


# -- rows ------------------------------------------------------------------------------------------


def test_a_report_on_a_model(net, adapter, train_a_little):
    train_a_little(sa.adapt(net, adapter))
    report = sa.spectra.analyze(net)
    rows, deltas = whole(report), dict(sa.delta_weights(net))
    assert list(rows) == list(deltas)
    for name, delta in deltas.items():
        row, W = rows[name], net.get_submodule(name).weight
        s = torch.linalg.svdvals(delta.double())
        for measure in PURE:
            assert row[measure.__name__] == pytest.approx(measure(s), rel=1e-5)
        assert row["frobenius_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert row["relative_norm"] == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)
        assert row["shape"] == tuple(delta.shape) and (row["status"], row["reason"]) == ("ok", "")
        assert tuple(row) == COLUMNS and None not in (
            row["null" if 0 else "seconds"],
            row["method"],
        )
        np.testing.assert_allclose(report.spectrum(name), s, rtol=1e-4, atol=1e-6)
    with sa.merged(net):
        for before, merged in zip(report.rows, sa.spectra.analyze(net).rows, strict=True):
            assert_same(before, merged)
    two = isinstance(adapter, sa.DoRA)
    kinds = {"direction", "effective"} if two else {"update"}
    assert {row["kind"] for row in report.rows} == kinds
    assert len(report.rows) == (2 if two else 1) * len(deltas)
    if two:
        layer = net.get_submodule(name)
        s = torch.linalg.svdvals(layer.adapter.scale * layer.B.double() @ layer.A.double())
        direction = report.spectrum(name, "direction")
        np.testing.assert_allclose(direction[:3], s[:3].detach(), rtol=1e-6)
        drift = (layer.m.double() / layer.matrix().double().norm(dim=1) - 1).abs().detach()
        assert rows[name]["magnitude_mean"] == pytest.approx(drift.mean().item())
        assert rows[name]["magnitude_max"] == pytest.approx(drift.max().item())


def test_a_model_less_its_base_is_the_update_of_its_adapters(net, adapter, train_a_little):
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, adapter))
    differences = whole(sa.spectra.analyze(net, base))
    for row in whole(sa.spectra.analyze(net)).values():
        for key in ("effective_rank", "frobenius_norm", "relative_norm", "nss_drift", "intruders"):
            assert differences[row["name"]][key] == pytest.approx(row[key], rel=1e-5), key


def test_a_report_on_a_file_is_the_one_on_its_model(net, adapter, tmp_path, train_a_little):
    base = copy.deepcopy(net)
    train_a_little(sa.adapt(net, adapter))
    sa.save(net, tmp_path / "a.safetensors")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    of_model = sa.spectra.analyze(net).rows
    for weights in (base, base.state_dict(), tmp_path / "base.safetensors", net):
        of_file = sa.spectra.analyze(tmp_path / "a.safetensors", weights).rows
        for left, right in zip(of_model, of_file, strict=True):
            assert_same(left, right, rel=1e-6, but=("seconds", "source"))
    alone = sa.spectra.analyze(tmp_path / "a.safetensors")
    for row in alone.rows:
        assert row["relative_norm"] is None and row["nss_drift"] is None
        partial = isinstance(adapter, sa.DoRA)
        assert row["status"] == ("partial" if partial else "ok")
        assert ("pass base=" in row["reason"]) == partial
    assert not incomplete(alone)


@pytest.mark.parametrize("shape", [(29, 21), (21, 29), (40, 16), (1, 5)], ids=str)
def test_every_relation_is_that_of_full_decompositions(shape):
    W, tuned = random_pair(shape, size=0.6)
    W[0], tuned[0, 0] = 1.0, W[0, 0]
    row = whole(sa.spectra.analyze({"l.weight": tuned}, {"l.weight": W}))["l"]
    before, after = (np.linalg.svd(X.numpy(), full_matrices=False) for X in (W, tuned))
    dW = (tuned - W).numpy()
    drift = np.linalg.norm(after[1] - before[1]) / np.linalg.norm(before[1])
    assert row["nss_drift"] == pytest.approx(drift)
    size = np.linalg.norm(dW, 2) / before[1][0]
    assert row["relative_spectral"] == pytest.approx(size)
    k = principal(shape)
    U, V = before[0][:, :k], before[2][:k].T
    for side, old, new in (("left", U, after[0][:, :k]), ("right", V, after[2][:k].T)):
        cosines = np.linalg.svd(old.T @ new, compute_uv=False).clip(max=1)
        angle = np.degrees(np.arccos(cosines.min()))
        assert row[f"angle_{side}_max"] == pytest.approx(angle, abs=1e-5)
        middle = np.median(np.degrees(np.arccos(cosines)))
        assert row[f"angle_{side}_median"] == pytest.approx(middle, abs=1e-5)
    whole_energy = (dW**2).sum()
    for side, part in (("left", U.T @ dW), ("right", dW @ V), ("both", U.T @ dW @ V)):
        off = 1 - (part**2).sum() / whole_energy
        assert row[f"off_principal_{side}"] == pytest.approx(off, abs=1e-12)
    assert row["off_principal_left_null"] == pytest.approx(1 - k / shape[0])
    similar = np.abs(before[0].T @ after[0][:, :10]).max(0)
    assert row["intruders"] == (similar < 0.5).sum()
    kept = (np.abs(dW) <= 1e-3 * np.maximum(np.abs(W.numpy()), np.abs(tuned.numpy()))).mean()
    assert row["sparsity"] == pytest.approx(kept) and row["sparsity"] > 0


def test_intruders_that_were_planted():
    def basis(m, k, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q

    W = (basis(60, 40, 0) * torch.linspace(3, 1, 40)) @ basis(50, 40, 1).T
    left = torch.linalg.svd(W, full_matrices=False)[0][:, :40]
    extra = torch.randn(60, 3, dtype=torch.float64)
    outside = torch.linalg.qr(torch.cat([left, extra], 1)).Q[:, -3:]
    for count in (0, 1, 3):
        tuned = W + 10 * outside[:, :count] @ basis(50, 3, 3)[:, :count].T
        (row,) = sa.spectra.analyze({"l.weight": tuned}, {"l.weight": W}).rows
        assert row["intruders"] == count


def test_relations_can_be_left_out():
    W, tuned = random_pair()
    row = sa.spectra.analyze({"l.weight": tuned}, {"l.weight": W}, relations=False).rows[0]
    assert row["nss_drift"] is row["intruders"] is row["angle_left_max"] is None
    ratio = ((tuned - W).norm() / W.norm()).item()
    assert row["relative_norm"] == pytest.approx(ratio) and row["sparsity"] is not None


def test_value_null_and_ratio_stand_beside_each_other():
    W, _ = random_pair((64, 64))
    (row,) = sa.spectra.analyze({"l.weight": W}).rows
    assert row["kind"] == "weight" and row["relative_norm"] is None
    for name in NULLED:
        value, null, ratio = row[name], row[f"{name}_null"], row[f"{name}_ratio"]
        assert ratio == (None if value is None else pytest.approx(value / null)), name
    for name in ("effective_rank", "participation_ratio", "stable_rank", "alpha_median"):
        assert row[f"{name}_ratio"] == pytest.approx(1, abs=0.1), "noise beside noise"


def test_an_update_in_factors_has_a_null_of_its_rank(net):
    generator = torch.Generator().manual_seed(0)
    sa.adapt(net, sa.LoRA(rank=8))
    with torch.no_grad():
        for parameter in sa.adapter_parameters(net):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for row in sa.spectra.analyze(net).rows:
        m, k = row["shape"]
        assert row["max_rank"] == 8
        assert row["participation_ratio_null"] == pytest.approx(
            1 / (1 / 8 + 1 / m + 1 / k), rel=0.05
        )
        assert row["participation_ratio_ratio"] == pytest.approx(1, abs=0.25)


def test_rounding_looks_like_rank_and_is_cut():
    """A merge in bfloat16 of an update of rank 4: raw ranks are those of rounding."""
    generator = torch.Generator().manual_seed(0)
    W = (0.02 * torch.randn(160, 120, generator=generator)).bfloat16()
    B, A = (torch.randn(s, generator=generator) for s in [(160, 4), (4, 120)])
    delta = B @ A
    delta *= 1e-2 * W.float().norm() / delta.norm()
    tuned = (W.float() + delta).bfloat16()
    report = sa.spectra.analyze({"l.weight": tuned}, {"l.weight": W})
    (row,) = report.rows
    assert row["precision"] == "difference of bfloat16" and row["noise_edge"] > 0
    assert row["rank_above_noise"] == 4 and row["effective_rank_cut"] < 4.001
    assert row["numerical_rank"] > 100 and row["effective_rank"] > 20
    assert any("rank_above_noise" in note for note in report.notes)
    (finding,) = sa.spectra.findings(report)
    assert finding.kind == "rounding" and "4 values above the edge" in finding.evidence


def test_weights_differences_and_what_does_not_fit(net, tmp_path):
    base = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.blocks[0]["up"].weight[0] += 1.0
    rows = whole(sa.spectra.analyze(net, base))
    assert rows["blocks.0.up"]["stable_rank"] == pytest.approx(1)
    zero = rows["blocks.1.up"]
    assert zero["stable_rank"] == 0.0 and zero["status"] == "ok" and "embed" in rows
    assert zero["effective_rank_ratio"] is None and zero["relative_norm"] == 0.0
    plain = whole(sa.spectra.analyze(net))
    assert plain["embed"]["kind"] == "weight" and plain["embed"]["shape"] == (32, 11)
    with pytest.raises(ValueError, match="the base has no matrix"):
        sa.spectra.analyze(net, {"embed.weight": base["embed.weight"]})
    with pytest.raises(ValueError, match="no matrix"):
        sa.spectra.analyze({"b": torch.ones(3)}, {})
    root = nn.Linear(4, 4)
    assert sa.spectra.analyze({"weight": torch.eye(4)}, root).rows[0]["name"] == ""
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="cut.safetensors"):
        sa.spectra.analyze(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        sa.spectra.analyze(tmp_path / "missing.safetensors")
    for settings, words in (
        ({"method": "fast"}, "method must be one of"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"device": "nothing"}, "device 'nothing' cannot be used"),
        ({"device": "meta"}, "^device 'meta' holds no values"),
    ):
        with pytest.raises(ValueError, match=words):
            sa.spectra.analyze(net, **settings)


def test_one_bad_matrix_is_a_row_and_the_others_go_on(net, tmp_path):
    with torch.no_grad():
        net.blocks[0]["attn"].weight[3, 2] = torch.nan
    report = sa.spectra.analyze(net)
    rows = whole(report)
    bad = rows.pop("blocks.0.attn")
    assert bad["status"] == "skipped" and "not finite" in bad["reason"] and incomplete(report)
    assert bad["effective_rank"] is None and "blocks.0.attn" not in report.spectra
    assert all(row["status"] == "ok" for row in rows.values()) and len(rows) == 7
    assert [f.kind for f in sa.spectra.findings(report)] == ["nonfinite"]
    with pytest.raises(ValueError, match="not finite"):
        sa.spectra.analyze(net, strict=True)
    sa.adapt(net, sa.LoRA(rank=2), "attn")
    first, second = sa.spectra.analyze(net).rows
    assert first["status"] == "partial" and first["reason"].startswith("without its base: ")
    assert first["effective_rank"] == 0.0 and second["status"] == "ok"
    assert incomplete(sa.spectra.analyze(net)), "as with a base that cannot be used"
    base = {n: t.to(torch.int8) if "0.attn" in n else t for n, t in net.state_dict().items()}
    for adapter in (sa.LoRA(rank=2), sa.DoRA(rank=2)):
        sa.save(sa.adapt(type(net)(), adapter, "attn"), tmp_path / "a.safetensors")
        report = sa.spectra.analyze(tmp_path / "a.safetensors", base)
        first = report.rows[0]
        assert first["status"] == "partial" and incomplete(report)
        assert first["reason"].startswith("without its base: the base's blocks.0.attn cannot be")


def test_no_memory_for_one_matrix_is_no_end(net, monkeypatch):
    def allocate(rows, shape, *settings):
        if shape == (64, 32):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator")
        return spectrum(rows, shape, *settings)

    spectrum = engine.spectrum
    monkeypatch.setattr(engine, "spectrum", allocate)
    rows = sa.spectra.analyze(net).rows
    failed = [row["name"] for row in rows if row["status"] == "skipped"]
    assert failed == ["blocks.0.up", "blocks.1.up"] and len(rows) == 8


def test_a_rank_that_the_gram_matrix_cannot_see_is_not_told():
    """In float64, values from s_1 max(m, k) eps to s_1 sqrt(n eps) are lost to it."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 9, generator=generator, dtype=torch.float64)).Q
            for n in (40, 30))  # fmt: skip
    W = (U * torch.logspace(0, -11, 9, dtype=torch.float64)) @ V.T
    (row,) = sa.spectra.analyze({"l.weight": W}).rows
    assert row["numerical_rank"] is None and row["status"] == "partial"
    assert "method svd" in row["reason"] and not incomplete(Report([row]))
    (row,) = sa.spectra.analyze({"l.weight": W}, method="svd").rows
    assert (row["numerical_rank"], row["status"]) == (9, "ok")
    full = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    (row,) = sa.spectra.analyze({"l.weight": full}).rows
    assert (row["numerical_rank"], row["status"]) == (30, "ok"), "all of them are above the floor"
    (row,) = sa.spectra.analyze({"l.weight": W.float()}).rows
    s = torch.linalg.svdvals(W.float().double())
    assert row["numerical_rank"] == (s > s[0] * 40 * 2**-23).sum() and row["status"] == "ok"
    report = sa.spectra.analyze({"l.weight": full + W}, {"l.weight": full})
    assert report.rows[0]["numerical_rank"] is None and not report.notes


def test_no_spikes_of_factors_and_no_drift_over_zeros(net, train_a_little):
    for row in sa.spectra.analyze(net).rows:
        assert row["mp_spikes"] is not None
    with torch.no_grad():
        net.blocks[0]["attn"].weight.zero_()
    base = copy.deepcopy(net)
    rows = sa.spectra.analyze(train_a_little(sa.adapt(net, sa.LoRA(rank=4)))).rows
    for row in rows:
        assert row["mp_spikes"] is row["mp_spike_energy"] is None and row["topk_energy"] > 0
    with sa.merged(net):
        tuned = {n: t.clone() for n, t in net.state_dict().items() if n.endswith("weight")}
    for row in (*rows, *sa.spectra.analyze(tuned, base).rows):
        zero = row["name"] == "blocks.0.attn"
        assert (row["nss_drift"] is None) == zero and (row["relative_norm"] is None) == zero
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_masks_and_buffers_are_no_loss(net):
    net.register_buffer("mask", torch.ones(4, 4))
    report = sa.spectra.analyze(net)
    assert [s["reason"] for s in report.skipped if s["name"] == "mask"] == ["a buffer, no weight"]
    assert not incomplete(report)
    state = {"l.weight": torch.eye(3), "l.bias": torch.ones(1, 1, 3, 3), "t": torch.ones(1, 1, 3)}
    assert not incomplete(sa.spectra.analyze(state))


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (0, 4), (3, 0)], ids=str)
def test_the_smallest_matrices_have_rows(shape):
    W = torch.full(shape, 2.0)
    state = {"l.weight": W, "m.weight": torch.eye(3)}
    for base in (None, {"l.weight": W / 2, "m.weight": torch.eye(3) * 2}):
        report = sa.spectra.analyze(state, base)
        names = {row["name"]: row["status"] for row in report.rows}
        assert names["m"] == "ok"
        assert names.get("l") == ("ok" if W.numel() else None)
        assert bool(report.skipped) == (not W.numel())
        json.dumps(report.to_dict(), allow_nan=False)


def test_workers_and_methods_find_the_same(net):
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1).add_(0.01)
    one, two = (sa.spectra.analyze(tuned, net, workers=n) for n in (1, 3))
    exact = sa.spectra.analyze(tuned, net, method="svd")
    for left, right, svd in zip(one.rows, two.rows, exact.rows, strict=True):
        assert_same(left, right)
        assert (left["method"], svd["method"]) == ("gram", "svd")
        assert left["effective_rank"] == pytest.approx(svd["effective_rank"], rel=1e-6)
        assert left["name"] == right["name"]


def test_include_exclude_and_the_run_folder(net, tmp_path, train_a_little):
    report = sa.spectra.analyze(net, include="blocks", exclude=["up$", "down$"])
    assert [row["name"] for row in report.rows] == ["blocks.0.attn", "blocks.1.attn"]
    safetensors.torch.save_file(net.state_dict(), tmp_path / "base.safetensors")
    sa.save(train_a_little(sa.adapt(net, sa.LoRA(rank=2))), tmp_path / "adapter.safetensors")
    (tmp_path / "metrics.jsonl").touch()
    report = sa.spectra.analyze(tmp_path)
    assert all(row["relative_norm"] for row in report.rows), "the run's own base is its base"
    assert report.about["base"] == str(tmp_path / "base.safetensors")


# -- names -----------------------------------------------------------------------------------------


def test_places_are_read_from_names():
    bert = [f"encoder.layer.3.{t}" for t in
            ("attention.self.query", "attention.output.dense", "output.dense")]  # fmt: skip
    assert list(places_of([*bert, "pooler.dense", "embed"]).values()) == [
        (3, "query"),
        (3, "attention.output.dense"),
        (3, "output.dense"),
        (None, "pooler.dense"),
        (None, "embed"),
    ]
    moe = [f"model.layers.7.mlp.experts.{i}.w1" for i in range(2)]
    assert set(places_of(moe).values()) == {(7, "w1")}
    t5 = ["encoder.block.2.q", "decoder.block.2.q"]
    assert list(places_of(t5).values()) == [(2, "encoder.q"), (2, "decoder.q")]
    assert places_of(["0", "mlp.2", ""]) == {"0": (0, "layer"), "mlp.2": (2, "mlp"), "": (None, "")}


def test_every_column_has_a_meaning():
    for name in COLUMNS:
        assert meaning(name) and head(name) and title(name)
    assert head("participation_ratio") == "particip." and head("gini_ratio") == "Gini/null"
    assert len(set(COLUMNS)) == len(COLUMNS) and "participation" not in COLUMNS
    with pytest.raises(KeyError):
        meaning("nothing")


# -- formats ---------------------------------------------------------------------------------------

HOSTILE = 'a|b\n\x1b[31m<script>$x$\u4e2d,"'


@pytest.fixture
def report(net, train_a_little):
    return sa.spectra.analyze(train_a_little(sa.adapt(net, sa.LoRA(rank=4)), scale=0.3))


def strict(text):
    """JSON without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_csv_markdown_pandas(report, tmp_path):
    report.rows[0]["condition"] = math.inf
    report.to_json(tmp_path / "r.json")
    found = strict((tmp_path / "r.json").read_text())
    assert found["schema"] == 1 and found["torch"] == torch.__version__
    assert {"conventions", "structadapt", "files", "method", "skipped"} <= found.keys()
    assert found["rows"][0]["condition"] is None
    rest = [{**row, "shape": list(row["shape"])} for row in report.rows[1:]]
    assert found["rows"][1:] == rest
    report.to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["name"] for r in read] == [r["name"] for r in report.rows]
    assert tuple(read[0]) == COLUMNS and read[0]["shape"] == "32x32"
    assert float(read[0]["stable_rank"]) == report.rows[0]["stable_rank"]
    assert read[0]["sparsity"] == ""
    lines = report.to_markdown().splitlines()
    assert len(lines) == 2 + len(report.rows) and len({line.count("|") for line in lines}) == 1
    assert "sparsity" not in lines[0] and "effective_rank_ratio" in lines[0]
    for name in ("=1+1", "+a", "-a", "@a"):
        report.rows[0].update(name=name, module_type=name)
        report.to_csv(tmp_path / "r.csv")
        assert f"\n'{name},0,'{name}," in (tmp_path / "r.csv").read_text().replace("\r", "")
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and tuple(frame.columns) == COLUMNS
    assert frame["stable_rank"].tolist() == [row["stable_rank"] for row in report.rows]


def test_saved_and_loaded(report, tmp_path):
    report.rows[0]["name"] = HOSTILE
    report.spectra[HOSTILE] = report.spectra.pop("blocks.0.attn")
    report.save(tmp_path / "saved")
    report.save(tmp_path / "saved")  # over an older one
    again = Report.load(tmp_path / "saved")
    assert (again.rows, again.skipped, again.notes) == (report.rows, report.skipped, report.notes)
    assert again.about == json.loads(json.dumps(report.about))
    for name, s in report.spectra.items():
        np.testing.assert_array_equal(again.spectra[name], s)
    path = tmp_path / "saved" / "report.json"
    for text in (path.read_text().replace('"schema": 1', '"schema": 2'), "{}", "[]", "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no report that can be read"):
            Report.load(tmp_path / "saved")
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="mine"):
        report.save(tmp_path / "other")
    with pytest.raises(KeyError, match="near: blocks.0.up"):
        report.spectrum("0.up")


def test_summary_is_that_of_numpy(report):
    by_type = {entry["module_type"]: entry for entry in report.summary()}
    assert set(by_type) == {"attn", "up", "down"}
    values = [r["stable_rank"] for r in report.rows if r["module_type"] == "up"]
    found = by_type["up"]["stable_rank"]
    assert by_type["up"]["count"] == 2
    assert found["median"] == np.median(values) and found["low"] == min(values)
    assert found["q25"] == pytest.approx(np.quantile(values, 0.25))
    assert [entry["layer"] for entry in report.summary(by="layer")] == [0, 1]
    with pytest.raises(KeyError, match="is no column"):
        report.summary(by="colour")


# -- findings --------------------------------------------------------------------------------------


def row_of(**values):
    row = dict.fromkeys(COLUMNS)
    row.update(name="l", kind="update", shape=(64, 64), max_rank=16, status="ok", reason="")
    return {**row, "frobenius_norm": 1.0, "module_type": "l", "precision": "p", **values}


@pytest.mark.parametrize(
    "values, kinds",
    [
        ({"topk_energy": 0.49, "relative_spectral": 0.99, "intruders": 0}, []),
        ({"topk_energy": 0.5}, ["concentrated"]),
        ({"topk_energy": 0.9, "max_rank": 2}, []),  # a rank of two has half in one, always
        ({"topk_energy": 0.9, "kind": "weight"}, []),
        ({"relative_spectral": 1.0}, ["oversized"]),
        ({"topk_energy": 0.6, "relative_spectral": 1.5}, ["collapsed"]),
        ({"intruders": 1}, ["intruders"]),
        ({"effective_rank": 20.0, "effective_rank_cut": 8.0, "rank_above_noise": 9}, ["rounding"]),
        ({"effective_rank": 20.0, "effective_rank_cut": 11.0, "rank_above_noise": 12}, []),
        ({"status": "skipped", "reason": "l is not finite: 1 NaN"}, ["nonfinite"]),
    ],
)
def test_findings(values, kinds):
    found = sa.spectra.findings(Report([row_of(**values)]))
    assert [f.kind for f in found] == kinds and all(f.evidence for f in found)
    assert set(kinds) <= set(RULES)


def test_thresholds_and_what_fails():
    report = Report([row_of(topk_energy=0.6, relative_spectral=1.5), row_of(topk_energy=0.7)])
    found = sa.spectra.findings(report)
    assert [f.kind for f in found] == ["collapsed", "concentrated"], "the worst first"
    assert len(failing(found, ["concentrated"])) == 2 and len(failing(found, ["oversized"])) == 1
    assert not failing(found, ["intruders"]) and len(failing(found, ["any"])) == 2
    both = Report([row_of(topk_energy=0.9, kind=kind) for kind in ("direction", "effective")])
    assert [f.kind for f in sa.spectra.findings(both)] == ["concentrated"], "once a module"
    high = sa.spectra.Limits(concentrated=0.65, oversized=2.0)
    assert [f.kind for f in sa.spectra.findings(report, high)] == ["concentrated"]
    with pytest.raises(ValueError, match="no finding 'bad'"):
        failing(found, ["bad"])


# -- screens ---------------------------------------------------------------------------------------


def test_the_screen_has_coverage_then_the_worst_then_types(report):
    report.skipped.append(
        {
            "name": "lm_head",
            "shape": (9, 9),
            "dtype": "float8_e4m3fn",
            "source": "",
            "reason": "fp8",
        }
    )
    text = tables.screen(report, sa.spectra.findings(report))
    lines = text.splitlines()
    assert "coverage: 6 of 7 matrices" in lines and incomplete(report)
    assert any(line.startswith("  left out: lm_head (9x9)") and "fp8" in line for line in lines)
    places = [text.index(w) for w in ("coverage", "left out", "worst of 6", "by module type")]
    assert places == sorted(places)
    assert "\x1b" not in text and "\x1b[1m" in tables.screen(report, [], colour=True)
    (line,) = [line for line in lines if line.startswith("  up ")]
    values = [r["topk_energy"] for r in report.rows if r["module_type"] == "up"]
    assert f"{np.median(values):.3g}" in line and f"{max(values):.3g} L" in line
    order = [r["name"] for r in sorted(report.rows, key=lambda r: r["participation_ratio_ratio"])]
    first = lines.index("updates: worst of 6") + 2
    assert [line.split()[0] for line in lines[first : first + 5]] == order[:5]


def test_many_reasons_are_some_lines():
    rows = [row_of(name=f"l.{i}", status=s, reason=f"{s} {i}", frobenius_norm=None)
            for s in ("skipped", "partial") for i in range(40)]  # fmt: skip
    lines = tables.coverage(Report(rows))
    assert len(lines) == 1 + 2 * (tables.REASONS + 1)
    assert "  left out: 28 more for 28 other reasons" in lines
    assert lines[-1] == "  in part: 28 more rows for 28 other reasons"


def test_names_of_strangers_stay_on_their_line():
    row = row_of(name=HOSTILE, module_type=HOSTILE, topk_energy=0.9, reason=HOSTILE)
    report = Report([row], [], [HOSTILE], {HOSTILE: np.ones(16)}, {"source": HOSTILE})
    found = sa.spectra.findings(report)
    text = tables.screen(report, found)
    assert "\x1b" not in text and "b\n" not in text
    assert len(report.to_markdown().splitlines()) == 3
    assert "a\\|b" in report.to_markdown()


def test_maturity_is_medians_without_a_verdict(net, report):
    with pytest.raises(ValueError, match="this source has none"):
        maturity.frozen_weights(report)
    torch.manual_seed(0)
    weights = sa.spectra.analyze(
        nn.ModuleList(nn.ModuleDict({"up": nn.Linear(40, 24)}) for _ in "abc")
    )
    (entry,) = maturity.frozen_weights(weights)
    values = [row["alpha_median_ratio"] for row in weights.rows]
    assert (entry["module_type"], entry["count"]) == ("up", 3)
    assert entry["alpha_median_ratio"]["median"] == np.median(values)
    text = "\n".join(maturity.lines([entry]))
    assert "24x40" in text and f"{np.median(values):.3g}" in text
    for word in ("over", "under", "trained", "mature", "good", "bad", "ready"):
        assert word not in text.lower().replace("others", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_goes_up_to_one_and_shows_on_a_terminal_alone(net, monkeypatch):
    told = []
    sa.spectra.analyze(net, workers=2, progress=lambda *what: told.append(what))
    assert [t[0] for t in told] == list(range(1, 9)) and {t[1] for t in told} == {8}
    shares = [t[2] for t in told]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    narrow = Terminal()
    monkeypatch.setenv("COLUMNS", "40")
    Meter(narrow)(4, 4, 1.0, "x" * 200)
    assert len(narrow.getvalue().removeprefix("\r\x1b[K")) == 39
    monkeypatch.setenv("COLUMNS", "100")
    quiet, terminal = io.StringIO(), Terminal()
    for stream in (quiet, terminal):
        meter = Meter(stream)
        meter.began -= 30
        meter.last -= 1
        meter(1, 4, 0.25, "layers.0.q\x1b[31m")
        meter.close()
    assert not quiet.getvalue()
    shown = terminal.getvalue()
    assert "1/4   25%" in shown and "1 min 30 s left" in shown and shown.endswith("\r\x1b[K")
    assert "\x1b[31m" not in shown
    assert flops((4096, 14336)) > 3 * flops((4096, 4096)) / 2
    assert [duration(s) for s in (3.2, 90, 3720)] == ["3 s", "1 min 30 s", "1 h 2 min"]


# -- pictures and the page -------------------------------------------------------------------------


def is_png(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5_000


def many(layers=32, seed=0):
    """A report of 224 small matrices of seven types."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (12, 12), "k": (4, 12), "v": (4, 12), "o": (12, 12), "gate": (30, 12),
              "up": (30, 12), "down": (12, 30)}  # fmt: skip
    state = {
        f"model.layers.{i}.{name}.weight": torch.randn(shape, generator=generator)
        for i in range(layers)
        for name, shape in shapes.items()
    }
    return sa.spectra.analyze(state)


@pytest.mark.slow
def test_pictures_of_one_some_and_many(report, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    one = Report(report.rows[:1], [], [], report.spectra, report.about)
    for name, some in (("one", one), ("six", report), ("many", many())):
        paths = plots.draw(some, tmp_path / name)
        assert [p.name for p in paths] == ["singular_values.png", "energy.png", "heatmap.png"]
        assert all(map(is_png, paths))
    assert dict(matplotlib.rcParams) == before
    zero = sa.spectra.analyze({"l.weight": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw(zero, tmp_path / "zero")
    report.rows[0].update(name=HOSTILE, module_type=HOSTILE)
    report.spectra[HOSTILE] = report.spectra["blocks.0.attn"]
    assert all(map(is_png, plots.draw(report, tmp_path / "hostile")))


def test_names_that_are_empty_long_or_private_are_drawn(tmp_path):
    long = "model.layers.0.mlp.experts.{}.of.a.very.long.path.that.is.cut.down_proj.weight"
    state = {long.format(i): torch.randn(9, 7) for i in (1234, 5678)}
    assert len({drawing.label(name) for name in state}) == 1
    for tensors in (torch.eye(5), {**state, "_stem.weight": torch.randn(6, 5)}):
        named = {"weight": tensors} if isinstance(tensors, torch.Tensor) else tensors
        report = sa.spectra.analyze(named)
        assert all(map(is_png, plots.draw(report, tmp_path / "p")))
    (row,) = sa.spectra.analyze({"weight": torch.eye(5)}).rows
    report = Report([row], spectra={"": np.ones(5)})
    found = [sa.spectra.Finding("nonfinite", "", "evidence", 1.0)]
    assert tables.screen(report, found).count("(no name)") == 3
    page.write(report, tmp_path / "r.html", found)
    assert (tmp_path / "r.html").read_text().count("(no name)") == 3
    plots.energy(sa.spectra.analyze({"_stem.weight": torch.eye(5)}), tmp_path / "e.svg")
    assert "_stem" in (tmp_path / "e.svg").read_text()


def test_the_noise_edge_and_random_matrices_are_in_the_picture(tmp_path):
    W, _ = random_pair((60, 40), size=0)
    W = W.bfloat16()
    tuned = (W.float() + 0.01).bfloat16()
    report = sa.spectra.analyze({"l.weight": tuned}, {"l.weight": W})
    path = tmp_path / "s.svg"
    plots.singular_values(report, path)
    figure = path.read_text()
    assert "noise edge of rounding" in figure and "random, same shapes" in figure


@pytest.mark.parametrize("n", [1, 2, 8, 16, 300, 512])
def test_every_value_of_a_short_curve_is_drawn(n):
    assert drawing.positions(n).tolist() == list(range(n))


def test_the_tail_of_a_long_curve_is_thinned():
    at = drawing.positions(4096)
    assert at[:512].tolist() == list(range(512)) and at[-1] == 4095 and len(at) <= 768
    assert (np.diff(at) > 0).all() and np.diff(np.log(at[512:])).max() < 0.02


def rows_of(*shapes):
    return [{"shape": shape, "max_rank": min(shape)} for shape in shapes]


def test_bands_of_random_matrices_begin_at_the_first_value_and_are_as_long_as_the_shape():
    rng = np.random.default_rng(1)
    for shape in ((900, 700), (60, 40)):
        ((low, high),), words = drawing.random_bands(rows_of(shape, shape[::-1]))
        assert words == "random, same shapes"
        assert len(low) == len(high) == min(shape) and low[0] == high[0] == 1
        s = np.linalg.svd(rng.standard_normal(shape), compute_uv=False)
        assert abs((low + high) / 2 - s / s[0]).max() < (0.02 if min(shape) > 512 else 0.1)
    ((low, _),), _ = drawing.random_bands([{"shape": (4096, 1024), "max_rank": 8}])
    assert len(low) == 8 and low[-1] > 0.8


def test_bands_leave_tiny_shapes_out_beside_larger_ones():
    bands, words = drawing.random_bands(rows_of((2, 384), (384, 384), (96, 384)))
    assert sorted(len(low) for low, _ in bands) == [96, 384] and words == "random, 2 of 3 shapes"
    bands, words = drawing.random_bands(rows_of((2, 384), (3, 384)))
    assert [len(low) for low, _ in bands] == [2, 3] and words == "random, same shapes"


def test_bands_of_many_shapes_are_some_of_every_size():
    bands, words = drawing.random_bands(rows_of(*((n, 200) for n in range(20, 120))))
    sizes = [len(low) for low, _ in bands]
    assert words == "random, 8 of 100 shapes" and sizes[0] == 20 and sizes[-1] == 119
    assert len(sizes) == 8 and max(np.diff(sizes)) <= 15


@pytest.mark.parametrize("ranks", [(8,), (8, 13)], ids=str)
def test_dots_of_k90_lie_on_their_curves(ranks):
    state = {f"l{n}.weight": torch.randn(n, 40) for n in ranks}
    report = sa.spectra.analyze(state)
    rows = drawing.drawable(report)
    _, axes, x_of = plots._curves(rows)
    energies = []
    for row in rows:
        e = drawing.curve(report, row) ** 2
        energies.append(e.cumsum() / e.sum())
    curves = plots._lines(axes, rows, energies, x_of)
    plots._counts(axes, rows, energies, x_of)
    dots = [line for line in axes.get_lines() if line.get_marker() in ("o", "D")]
    assert len(dots) == 2 * len(rows)
    for i, dot in enumerate(dots):
        ((x, y),) = dot.get_xydata()
        drawn = curves[i % len(rows)].get_xydata()
        assert abs(drawn - (x, y)).max(1).min() < 1e-12 and y >= (0.9, 0.99)[i // len(rows)]


def test_many_types_are_drawn_below_each_other(tmp_path):
    """So that the numbers in the cells can be read in a page."""
    state = {f"layers.{i}.type_{j}.weight": torch.randn(6, 5) for i in range(3) for j in range(14)}
    report = sa.spectra.analyze(state)
    data = plots.heatmap({"": report}, tmp_path / "h.png").read_bytes()
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width < 14 * 120 and height > width / 2


@pytest.mark.slow
def test_very_many_types_are_one_on_pictures_and_some_on_screens(tmp_path):
    state = {f"part_{i}.weight": torch.randn(4, 3) for i in range(300)}
    state |= {f"layers.{i}.up.weight": torch.randn(4, 3) for i in range(200)}
    report = sa.spectra.analyze(state)
    few = drawing.few_types({"a": report.rows, "b": report.rows[:10]})
    types = [row["module_type"] for row in few["a"]]
    assert len(set(types)) == 40 and types.count("others") == 262 and types.count("up") == 200
    assert {row["module_type"] for row in few["b"]} <= set(types)
    small = sa.spectra.analyze({"l.weight": torch.eye(3)})
    assert drawing.few_types({"": small.rows})[""][0] is small.rows[0]
    for path in plots.draw(report, tmp_path / "p"):
        data = path.read_bytes()
        sides = [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)]
        assert max(sides) < 14_000, path
    text = plots.energy(report, tmp_path / "e.svg").read_text()
    assert "and 21 more" in text and text.count("<!-- part_") == 19
    lines = tables.screen(report, []).splitlines()
    assert len(lines) < 60 and "  and 261 smaller types: --csv and --html have all" in lines
    assert any(line.startswith("  up ") for line in lines)
    lines = maturity.lines(maturity.frozen_weights(report))
    assert len(lines) < 100 and "  and 261 smaller types: --json has all" in lines


def test_training_curves(tmp_path):
    log, picture = tmp_path / "monitor.jsonl", tmp_path / "t.png"
    for text in ("", "{", '{"step": 1}', "[]"):
        log.write_text(text)
        with pytest.raises(ValueError, match="holds no reading of a monitor"):
            plots.training(log, picture)
    names = ("participation_ratio", "topk_energy", "relative_norm")
    records = [
        {"step": i, "state": state, "bands": {name: [0.1 * i, 0.2, None] for name in names}}
        for i, state in enumerate(["healthy", "healthy", "concentrated"])
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    assert is_png(plots.training(log, picture))


def test_the_page_holds_all_and_fetches_nothing(report, tmp_path):
    report.rows[0].update(name=HOSTILE)
    report.spectra[HOSTILE] = report.spectra["blocks.0.attn"]
    path = tmp_path / "r.html"
    page.write(report, path, sa.spectra.findings(report), ["frozen <b>"])
    text = path.read_text()
    assert text.count('src="data:image/png;base64,') == 3 and text.count("src=") == 3
    for word in ("http:", "https:", "<script", "href=", "url(", "@import", "<b>", "\x1b"):
        assert word not in text, word
    assert "&lt;script&gt;" in text and "Coverage: 6 of 6 matrices" in text
    for row in report.rows[1:]:
        assert row["name"] in text
    for column in MEASURES:
        if report.rows[0][column.name] is not None:
            assert column.name in text


# -- comparisons -----------------------------------------------------------------------------------


def test_several_on_one_scale(net, tmp_path, train_a_little):
    base, models = copy.deepcopy(net), {}
    for rank in (2, 8):
        model = sa.adapt(
            copy.deepcopy(base), sa.LoRA(rank=rank), "blocks.*" if rank == 2 else "attn"
        )
        models[f"r={rank}"] = train_a_little(model, scale=0.2)
    comparison = sa.spectra.compare(models, relations=False)
    names = {"blocks.0.attn", "blocks.1.attn"}
    assert comparison.shared() == names
    assert any("medians are over the 2 matrices" in note for note in comparison.notes)
    small, large = comparison.rows()
    values = [r["effective_rank"] for r in comparison.reports["r=2"].rows if r["name"] in names]
    assert (small["name"], small["count"]) == ("r=2", 2)
    assert small["effective_rank"]["median"] == pytest.approx(np.median(values))
    assert large["effective_rank"]["median"] > small["effective_rank"]["median"]
    table = comparison.to_markdown().replace("\\|", "").splitlines()[:4]
    assert table[3].startswith("| r=8 | update | 2 |")
    assert len({line.count("|") for line in table}) == 1
    assert all(map(is_png, comparison.plot(tmp_path)))
    other = sa.spectra.compare({"factors": models["r=2"], "stored": models["r=8"].state_dict()})
    assert any("came about in different ways" in note for note in other.notes)
    assert not other.similarity, "differences have no factors"
    with pytest.raises(ValueError, match="nothing to compare"):
        sa.spectra.compare({})
    with pytest.raises(ValueError, match="no matrix is in all of"):
        sa.spectra.compare({"a": {"x.weight": torch.eye(3)}, "b": {"y.weight": torch.eye(3)}})


def test_a_dora_beside_a_lora_shows_its_direction_and_which_null(net, tmp_path, train_a_little):
    """The whole update of a DoRA has a null of full rank, over which any looks collapsed."""
    for name, adapter in (("lora", sa.LoRA(rank=4)), ("dora", sa.DoRA(rank=4))):
        model = train_a_little(sa.adapt(copy.deepcopy(net), adapter), scale=0.2)
        sa.save(model, tmp_path / name)
    sources = {name: tmp_path / name for name in ("lora", "dora")}
    comparison = sa.spectra.compare(sources, base=net)
    dora = comparison.reports["dora"]
    assert {row["kind"] for row in drawing.drawable(dora)} == {"effective"}
    shown = drawing.drawable(dora, whole=False)
    assert {row["kind"] for row in shown} == {"direction"}
    assert drawing.null_words(shown) == "random of rank 4"
    assert drawing.null_words(drawing.drawable(dora)) == "random of full rank"
    assert drawing.null_words(dora.rows) == "random of full rank and of factors"
    assert "random of rank 4" in plots.heatmap(comparison.reports, tmp_path / "h.svg").read_text()
    text = plots.comparison(comparison.reports, tmp_path / "c.svg").read_text()
    assert "of a DoRA the direction" in text
    assert not comparison.notes, "neither has a noise edge"


def test_the_cut_is_advised_where_there_is_one(net):
    tuned = {name: (W + 0.01 * W.std()).bfloat16() for name, W in net.state_dict().items()}
    base = {name: W.bfloat16() for name, W in net.state_dict().items()}
    model = sa.adapt(copy.deepcopy(net), sa.LoRA(rank=2))
    with torch.no_grad():
        for layer in find_adapted(model).values():
            layer.B.normal_()
    (note,) = sa.spectra.compare({"a": tuned, "b": model}, base=base).notes
    assert note.endswith("in different ways: compare ranks after the cut at the noise edge")


def test_the_same_directions_and_others(net, tmp_path, train_a_little):
    """phi of adapters whose factors are made: the same inputs, half of the outputs."""
    models = {}
    axes = torch.eye(32)
    for name, columns in (("a", (0, 1, 2, 3)), ("b", (2, 3, 4, 5))):
        models[name] = sa.adapt(copy.deepcopy(net), sa.LoRA(rank=4), "attn")
        with torch.no_grad():
            for layer in find_adapted(models[name]).values():
                layer.A.copy_(torch.tensor([2.0, 1.0, 0.5, 3.0])[:, None] * axes[:4])
                layer.B.copy_(axes[:, columns].flip(1))
    models["c"] = train_a_little(sa.adapt(copy.deepcopy(net), sa.DoRA(rank=2), "attn"))
    models["zero"] = sa.adapt(copy.deepcopy(net), sa.LoRA(rank=2), "attn")
    sa.save(models["b"], tmp_path / "b.safetensors")
    comparison = sa.spectra.compare({**models, "b": tmp_path / "b.safetensors"}, base=net)
    found = {(r["one"], r["other"], r["name"]): r for r in comparison.similarity}
    names = ("blocks.0.attn", "blocks.1.attn")
    assert found.keys() == {(*p, n) for p in ("ab", "ac", "bc") for n in names}
    for name in names:
        same = found["a", "b", name]
        assert (same["left"], same["right"]) == (pytest.approx(0.5), pytest.approx(1))
        assert same["left_null"] == same["right_null"] == 4 / 32
        layer = find_adapted(models["c"])[name]
        Q = torch.linalg.qr(layer.B.detach().double()).Q
        expected = Q[:4].square().sum().item() / 2
        assert found["a", "c", name]["left"] == pytest.approx(expected, rel=1e-6)
    text = comparison.to_markdown()
    assert "| a and b | 2 | 0.5 | 0.125 | 1 | 0.125 |" in text
    one = sa.spectra.compare(models, include="0.attn", relations=False)
    assert {r["name"] for r in one.similarity} == {"blocks.0.attn"}
