"""The monitor: its numbers against singular value decompositions, its states against histories."""

import copy
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import monitor_table
import numpy as np
import pytest
import torch
from stopped_runs import CONFIG, TIMES, noisy_reward
from test_grpo_train import PROMPTS, Plain, assert_same_bits, state
from torch import nn

import structadapt as sa
from structadapt.spectra import Monitor, Thresholds, moments, states
from structadapt.spectra.states import Judge, Row

SHAPES = [(37, 23), (5, 61), (64, 64), (1, 7), (1, 1)]
ADAPTERS = [
    sa.LoRA(rank=3),
    sa.LoRA(rank=40, alpha=7.0, scaling="alpha/sqrt(r)"),  # above the smaller side of some
    sa.DoRA(rank=2),
]


class Layers(nn.Module):
    """Linear layers of odd shapes."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(i, o) for o, i in shapes)


def moved(model, size=0.3, seed=1):
    """The adapters' tensors off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)
    return model


def exact(matrix):
    """F, D_2, p_1 by numpy's singular values."""
    e = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False) ** 2
    return [e.sum(), e.sum() ** 2 / (e**2).sum(), e.max() / e.sum()]


def check_row(row, delta, W, tolerance=1e-5):
    """All that a row says, against the dense update."""
    F, D_2, p_1 = exact(delta)
    w = np.linalg.svd(np.asarray(W, dtype=np.float64), compute_uv=False)
    n = np.linalg.norm(W.double().numpy())
    expected = [D_2, p_1, math.sqrt(F) / n, math.sqrt(F * p_1)]
    found = [row.participation_ratio, row.topk_energy, row.relative_norm,
             row.relative_spectral * moments.spectral_norm(W).item()]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=tolerance)
    np.testing.assert_allclose(moments.spectral_norm(W).item(), w[0], rtol=0.05)


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS, ids=repr)
def test_low_rank_rows_are_those_of_the_singular_values(kind):
    model = moved(sa.adapt(Layers(), kind))
    (reading,) = [Monitor(model, every=1).step()]
    layers = dict(model.named_modules())
    assert [row.name for row in reading.rows] == [f"layers.{i}" for i in range(len(SHAPES))]
    for row in reading.rows:
        layer = layers[row.name]
        p = {n: t.detach() for n, t in layer.tensors().items()}
        W, delta = layer.weight.detach(), kind.direction(row.shape, p).detach()
        check_row(row, delta, W)
        r = min(kind.rank, *row.shape)
        m, k = row.shape
        null = 1 / (1 / r + 1 / m + 1 / k)
        assert row.of_null == pytest.approx(row.participation_ratio / null)
        if isinstance(kind, sa.DoRA):
            drift = np.abs(p["m"].numpy() / np.linalg.norm(W.numpy(), axis=1) - 1)
            assert row.magnitude_mean == pytest.approx(drift.mean(), rel=1e-4)
            assert row.magnitude_max == pytest.approx(drift.max(), rel=1e-4)
        else:
            assert row.magnitude_mean == row.magnitude_max == 0
            np.testing.assert_allclose(delta, layer.delta_weight().detach(), atol=1e-5)
    for name in states.MEASURES:
        column = [getattr(row, name) for row in reading.rows]
        np.testing.assert_allclose(reading.bands[name], np.quantile(column, [0.1, 0.5, 0.9]))


@pytest.mark.parametrize("init", ["identity", "paper", "zero_last"])
def test_small_quanta_is_exact(init):
    model = moved(sa.adapt(Layers([(36, 24), (64, 64)]), sa.QuanTA(3, init)))
    for row, (_, delta) in zip(
        Monitor(model, every=1).step().rows, sa.delta_weights(model), strict=True
    ):
        check_row(row, delta, dict(model.named_modules())[row.name].weight.detach(), 1e-4)


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_large_quanta_is_estimated_by_probes_through_the_gates(init):
    model = moved(sa.adapt(Layers([(270, 288)]), sa.QuanTA(3, init)), 0.1)
    row = Monitor(model, every=1).step().rows[0]
    (_, delta), *_ = sa.delta_weights(model)
    F, D_2, p_1 = exact(delta)
    assert row.participation_ratio == pytest.approx(D_2, rel=0.1)
    assert 0.8 * p_1 < row.topk_energy < 1.05 * p_1
    n = torch.linalg.vector_norm(model.layers[0].weight).item()
    assert row.relative_norm == pytest.approx(math.sqrt(F) / n, rel=0.05)


def test_a_concentrated_update_is_exact_by_probes():
    """What lies in few directions is in the sketch, and costs no accuracy."""
    torch.manual_seed(0)
    D = torch.randn(300, 2) @ torch.randn(2, 290) + 1e-3 * torch.randn(300, 290)
    x = (2 * torch.randint(0, 2, (moments.SKETCH + moments.PROBES, 290)) - 1).float()
    np.testing.assert_allclose(moments.of_action(lambda x: x @ D.T, x), exact(D), rtol=1e-3)


def test_a_random_update_has_the_participation_ratio_of_the_null():
    generator = torch.Generator().manual_seed(0)
    for r, m, k in ((16, 300, 200), (64, 100, 400), (200, 150, 170)):
        B = torch.randn(40, m, r, generator=generator)
        A = torch.randn(40, r, k, generator=generator)
        found = moments.of_factors(B, A)[1].mean().item()
        assert found == pytest.approx(moments.null(r, m, k), rel=0.02)


def test_degenerate_factors():
    B, A = torch.zeros(2, 5, 3), torch.ones(2, 3, 7)
    assert moments.of_factors(B, A).eq(0).all()
    B[1, 0, 0] = 2.0  # A has rank 1, so has B A
    np.testing.assert_allclose(moments.of_factors(B, A)[:, 1], [28, 1, 1], rtol=1e-9)
    none = moments.of_factors(torch.ones(2, 5, 3), torch.stack([torch.zeros(3, 7), A[1]]))
    np.testing.assert_allclose(none, [[0, 315], [0, 1], [0, 1]], rtol=1e-9)
    assert moments.of_factors(torch.full((5, 3), math.nan), torch.zeros(3, 7))[0].isnan()
    B[0, 0, 0] = math.nan
    assert moments.of_factors(B, A)[:, 0].isnan().all()
    tiny = moments.of_factors(1e-18 * torch.eye(4), torch.eye(4), 2.0)
    np.testing.assert_allclose(tiny, [16e-36, 4, 0.25], rtol=1e-6)
    assert moments.spectral_norm(torch.zeros(3, 4)) == 0
    assert moments.of_action(lambda x: x @ torch.zeros(4, 3).T, torch.ones(24, 3)).eq(0).all()


def test_full_weights_are_named_or_watched_by_a_snapshot():
    model = Layers([(7, 5), (270, 300)])
    with pytest.raises(ValueError, match="no adapted layer.*snapshots=True"):
        Monitor(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    monitor = Monitor(model, every=1, snapshots=True)
    assert monitor.not_watched.keys() == {"layers.0.bias", "layers.1.bias"}
    with torch.no_grad():
        model.layers[0].weight.add_(torch.randn(7, 5))
        model.layers[1].weight.add_(torch.randn(270, 1) @ torch.randn(1, 300))
    for row, layer in zip(monitor.step().rows, model.layers, strict=True):
        W = start[f"{row.name}.weight"]
        check_row(row, layer.weight.detach() - W, W, 1e-3)
    sa.adapt(model, sa.LoRA(2), target="layers.0")
    model.layers[1].weight.requires_grad_()
    assert "snapshots=True" in Monitor(model).not_watched["layers.1.weight"]
    assert len(Monitor(model, snapshots=True).updates) == 2


def test_frozen_adapters_are_named_and_count_in_no_share():
    model = sa.adapt(Layers(SHAPES[:3]), sa.LoRA(2))
    for layer in model.layers[1:]:
        layer.A.requires_grad_(False)
        layer.B.requires_grad_(False)
    model.layers[2].B.requires_grad_()  # half of one trains: it does
    monitor = Monitor(model, every=1)
    assert [update.name for update in monitor.updates] == ["layers.0", "layers.2"]
    assert monitor.not_watched == {"layers.1": "its adapter is frozen"}
    with torch.no_grad():
        model.layers[0].B.fill_(9.0)
    assert monitor.step().state == "collapsed", "one of two is half"
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every adapter is frozen"):
        Monitor(model)


def test_adapters_that_come_later_are_named_with_one_warning():
    model = sa.adapt(Layers(SHAPES[:4]), sa.LoRA(2), target=["layers.0", "layers.1", "layers.2"])
    for tensor in model.layers[2].trained_tensors():
        tensor.requires_grad_(False)
    monitor = Monitor(nn.Sequential(model), every=2)
    monitor.step()
    monitor.step()  # and no warning, which would be an error
    assert monitor.not_watched == {"0.layers.2": "its adapter is frozen"}
    sa.adapt(model, sa.LoRA(2), target="layers.3")  # lets the frozen one train as well
    model.layers[0] = copy.deepcopy(model.layers[0])
    model.layers[1] = nn.Linear(61, 5)
    assert monitor.step() is None
    with pytest.warns(
        UserWarning, match=r"not watch 0\.layers\.0, 0\.layers\.1, .* \(and 1 more\)"
    ):
        assert [row.name for row in monitor.step().rows] == ["0.layers.0", "0.layers.1"]
    assert monitor.not_watched.keys() == {f"0.layers.{i}" for i in range(4)}
    assert "left the model" in monitor.not_watched["0.layers.1"]
    assert all("replaced" in monitor.not_watched[f"0.layers.{i}"] for i in (0, 2, 3))
    monitor.step()
    assert monitor.step() is not None  # said once


# -- what it leaves alone --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ADAPTERS, sa.QuanTA(3)], ids=repr)
def test_nothing_is_touched(kind):
    model = moved(sa.adapt(Layers([(64, 64), (270, 288)]), kind))
    before = copy.deepcopy(model.state_dict())
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    monitor = Monitor(model, every=1)
    first, second = monitor.step(), monitor.step()
    assert_same_bits(model.state_dict(), before)
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])
    assert all(p.grad is None for p in model.parameters())
    assert [asdict(row) for row in first.rows] == [asdict(row) for row in second.rows]


def test_every_and_the_delay_of_a_device():
    model = moved(sa.adapt(Layers(), sa.LoRA(2)))
    plain, delayed = Monitor(model, every=3), Monitor(model, every=3)
    delayed.delayed = True  # as on CUDA
    seen, late = [], []
    for step in range(10):
        moved(model, 0.1, step)
        seen.append(plain.step(reward=torch.tensor(0.5), kl=0.25))
        late.append(delayed.step(reward=0.5, kl=0.25))
    assert [i for i, r in enumerate(seen) if r] == [2, 5, 8] == [r.step for r in seen if r]
    assert [i for i, r in enumerate(late) if r] == [5, 8]
    last = delayed.finish()
    assert delayed.finish() is None
    assert [asdict(r) for r in seen if r] == [asdict(r) for r in late if r] + [asdict(last)]
    assert last.reward == 0.5 and last.kl == 0.25 and delayed.history == plain.history
    for every in (0, -1, 1.5, "3", True, None):
        with pytest.raises(ValueError, match=f"every must be an integer.* got {every!r}"):
            Monitor(model, every=every)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = sa.adapt(Layers(), sa.LoRA(2))
    with pytest.raises(ValueError, match=r"layers\.0 is on the meta device"):
        Monitor(model)


# -- the states ------------------------------------------------------------------------------------

ONE = Row("blocks.0.q", (64, 64), "LoRA", 8.0, 0.5, 0.3, 0.1, 0.1, 0.0, 0.0)


def history(*checks, modules=4, every=1, limits=None, rewards=None):
    """The model's states for (size, of_null, topk_energy) of every check, all modules alike."""
    names = [f"blocks.{i}.{'qkvo'[i % 4]}" for i in range(modules)]
    judge = Judge(limits or Thresholds(), every, dict.fromkeys(names, 0.0))
    found = []
    for i, (size, u, p_1) in enumerate(checks):
        rows = [replace(ONE, name=n, relative_spectral=size, of_null=u, topk_energy=p_1)
                for n in names]  # fmt: skip
        found.append(judge.look(rows, [rewards[i]] if rewards else [])[1])
    return found


def ramp(steps, size, u=0.5, p_1=0.3):
    """A steady growth up to a size."""
    return [(size * (i + 1) / steps, u, p_1) for i in range(steps)]


def test_a_slow_growth_is_healthy_also_beyond_the_weights():
    assert set(history(*ramp(40, 2.0))) == {"healthy"}


def test_a_rank_1_target_is_concentrated_and_no_more():
    checks = [
        (0.9 * min(i / 20, 1), max(0.6 - i / 25, 0.03), min(0.2 + i / 20, 1)) for i in range(60)
    ]
    found = history(*checks)
    assert found[0] == "healthy" and found[-1] == "concentrated"
    assert set(found) == {"healthy", "concentrated"}


def test_a_jump_is_collapsed_and_stays_so_while_nothing_moves():
    found = history((1.0, 0.08, 0.42), *[(1.0, 0.08, 0.42)] * 30)
    assert set(found) == {"collapsed"}
    assert set(history((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))) == {"healthy"}  # nothing moved yet


def test_the_speed_is_by_the_square_root_of_the_steps():
    assert history((1.0, 0.5, 0.3), every=1) == ["collapsed"]
    assert history((1.0, 0.5, 0.3), every=16) == ["collapsing"]
    assert history((1.0, 0.5, 0.3), every=36) == ["healthy"]


def test_a_spectrum_that_falls_while_the_update_grows_is_collapsing_then_collapsed():
    start = ramp(10, 0.5, 0.5)
    few = [(0.5 + 0.09 * i, 0.2, 0.4) for i in range(1, 10)]
    one = [(few[-1][0] + 0.05 * i, 0.03, 0.9) for i in range(1, 10)]
    found = history(*start, *few, *one)
    assert set(found[:10]) == {"healthy"}
    assert found[18] == "collapsing" and found[-1] == "collapsed"
    shrinks = [(0.5, u, p) for _, u, p in few + one]  # the same spectra without the growth
    assert "collapsing" not in (found := history(*start, *shrinks)) and "collapsed" not in found


def test_one_check_does_not_bring_a_better_state_back():
    jump, calm = (1.0, 0.5, 0.3), [(1.0 + 0.01 * i, 0.5, 0.3) for i in range(1, 9)]
    settle = Thresholds().settle
    found = history(jump, *calm)
    assert found[: settle - 1] == ["collapsed"] * (settle - 1)
    assert found[-1] == "healthy"
    slow = history(jump, *calm, limits=Thresholds(rise=2))
    assert set(slow) == {"healthy"}, "one check in a row is not two"


def test_the_model_has_the_state_of_enough_modules():
    def state(*worse, of):
        rows = [replace(ONE, state=s) for s in [*worse, *["healthy"] * (of - len(worse))]]
        return states.said_of_model(rows, Thresholds())

    assert state("collapsed", "collapsing", of=5) == "healthy"
    assert state("collapsed", "collapsing", "concentrated", of=5) == "concentrated"
    assert state("collapsed", "collapsing", "collapsing", of=5) == "collapsing"
    assert state("collapsed", "collapsed", of=4) == "collapsed"


def test_the_reward_holds_a_state_and_confirms_it():
    jump, calm = (1.0, 0.5, 0.3), [(1.0 + 0.01 * i, 0.5, 0.3) for i in range(1, 20)]
    dead = [0.2, *[0.0] * 19]
    assert set(history(jump, *calm, rewards=dead)) == {"collapsed"}
    alive = [0.2, *[0.3] * 19]
    assert history(jump, *calm, rewards=alive)[-1] == "healthy"
    assert set(history(*ramp(20, 0.9), rewards=dead)) == {"healthy"}, (
        "the reward alone says nothing"
    )
    some = Thresholds(collapsed_speed=9.0)
    assert history(jump, *calm, limits=some, rewards=alive)[0] == "collapsing"
    assert history(calm[0], (1.5, 0.5, 0.3), limits=some, rewards=[0.2, 0.0])[1] == "collapsed"


def test_a_lost_reward_is_collapsed_once_the_updates_moved():
    steps = [(0.1 * i, 0.5, 0.3) for i in range(1, 6)]  # each too slow for an alarm
    assert set(history(*steps)) == {"healthy"}
    rewards = [0.3, 0.4, 0.03, 0.0, 0.2]
    assert history(*steps, rewards=rewards) == [*["healthy"] * 2, *["collapsed"] * 2, "healthy"]
    slow = [(0.04 * i, 0.5, 0.3) for i in range(1, 6)]
    assert set(history(*slow, rewards=rewards)) == {"healthy"}
    still = [(0.06, 0.5, 0.3)] * 5  # what moved long ago counts too
    assert history(*still, rewards=rewards)[2] == "collapsed"


def test_a_lost_reward_is_collapsed_once_the_policy_moved():
    """As in a pretrained model, whose updates are far smaller than its weights."""
    names = ["blocks.0.q", "blocks.1.q"]

    def states_of(kls, rewards):
        judge = Judge(Thresholds(), 1, dict.fromkeys(names, 0.0))
        rows = [replace(ONE, name=name, relative_spectral=1e-3) for name in names]
        told = zip(kls, rewards, strict=True)
        return [judge.look(rows, [reward], [kl])[1] for kl, reward in told]

    lost = [0.5, 0.4, 0.02, 0.0]
    assert states_of([0.9, 0.1, 0.0, 0.0], lost) == [*["healthy"] * 2, *["collapsed"] * 2]
    assert set(states_of([0.4, 0.1, 0.0, 0.0], lost)) == {"healthy"}
    assert set(states_of([0.9, 0.1, 0.0, 0.0], [0.5] * 4)) == {"healthy"}, "it moved, and no more"


def test_enough_modules_must_have_moved():
    def state(*sizes):
        names = [f"layers.{i}" for i in range(len(sizes))]
        judge = Judge(Thresholds(), 1, dict.fromkeys(names, 0.0))
        pairs = zip(names, sizes, strict=True)
        rows = [replace(ONE, name=name, relative_spectral=size) for name, size in pairs]
        return judge.look(rows, [0.5, 0.0])[1:]

    assert state(0.1, 0.01, 0.01)[0] == "healthy"
    found, why = state(0.1, 0.1, 0.01)
    assert found == "collapsed"
    assert why.startswith("the reward fell from 0.5 to 0; the updates of 3 modules are 0.1 times")


def test_rewards_between_checks_count():
    def states_of(rewards):
        model = sa.adapt(Layers([(64, 64)] * 2), sa.LoRA(2, alpha=4.0))
        monitor = Monitor(model, every=3)
        moved(model, 0.02)  # to 0.2 of the weights, too slow for an alarm
        found = [monitor.step(reward) for reward in rewards]
        return [(reading.reward, reading.state) for reading in found if reading is not None]

    assert states_of([None, 1.0, 0.05]) == [(0.05, "collapsed")]
    assert states_of([None, 0.1, 0.05]) == [(0.05, "healthy")]
    assert states_of([None] * 3) == [(None, "healthy")]


@pytest.mark.parametrize("reward", [-1.0, 0.0])
def test_rewards_that_are_not_positive_hold_and_confirm_nothing(reward):
    jump, calm = (1.0, 0.5, 0.3), [(1.0 + 0.01 * i, 0.5, 0.3) for i in range(1, 20)]
    same = [reward] * 20
    assert history(jump, *calm, rewards=same) == history(jump, *calm)
    assert history(jump, *calm, rewards=same)[-1] == "healthy"
    some = Thresholds(collapsed_speed=9.0)
    assert history(jump, limits=some, rewards=same) == ["collapsing"]


def over_zeros(*which):
    """LoRA over three layers, some of which have a weight of zeros."""
    model = Layers(SHAPES[:3])
    with torch.no_grad():
        for i in which:
            model.layers[i].weight.zero_()
    return sa.adapt(model, sa.LoRA(2))


def test_an_adapter_over_a_weight_of_zeros_is_not_judged():
    model = over_zeros(0, 2)
    monitor = Monitor(model, every=1)
    for size in (0.0, 1e-3, 1e-3):
        moved(model, size)
        reading = monitor.step()
        assert [row.state for row in reading.rows] == ["not judged", "healthy", "not judged"]
        assert reading.state == "healthy" and "of 1 modules" in reading.evidence
        for name in states.MEASURES:
            assert reading.bands[name] == pytest.approx((getattr(reading.rows[1], name),) * 3)
    assert math.isinf(reading.rows[0].relative_norm)
    with torch.no_grad():
        model.layers[0].B[0, 0] = math.nan
        model.layers[1].B.fill_(9.0)
    reading = monitor.step()
    assert [row.state for row in reading.rows] == ["collapsed", "collapsed", "not judged"]
    assert reading.state == "collapsed" and "2 of 2 modules" in reading.evidence


def test_with_no_weight_to_compare_with_there_is_no_alarm():
    model = over_zeros(0, 1, 2)
    monitor = Monitor(model, every=1)
    moved(model)
    reading = monitor.step()
    assert reading.state == "healthy" and "no module is judged" in reading.evidence
    json.dumps(reading.to_dict(), allow_nan=False)
    assert set(reading.to_dict()["bands"]["relative_norm"]) == {None}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_collapsed(value):
    model = moved(sa.adapt(Layers(), sa.LoRA(2)))
    monitor = Monitor(model, every=1)
    with torch.no_grad():
        for layer in model.layers:
            layer.B[0, 0] = value
    reading = monitor.step()
    assert reading.state == "collapsed" and "not finite" in reading.evidence
    json.dumps(reading.to_dict(), allow_nan=False)


# -- in a run --------------------------------------------------------------------------------------


def test_a_state_goes_on_as_if_there_had_been_no_break(tmp_path):
    def run(breaks, delayed):
        model = sa.adapt(Layers(), sa.DoRA(2))
        monitor = Monitor(model, every=2)
        monitor.delayed = delayed
        for step in range(30):
            moved(model, 0.05, step)
            monitor.step(reward=0.1 * step, kl=0.01 * step)
            if step in breaks:
                kept = json.loads(json.dumps(sa.grpo.resume.flatten(monitor.state_dict())[0]))
                tensors = sa.grpo.resume.flatten(monitor.state_dict())[1]
                monitor = Monitor(model, every=2)
                monitor.delayed = delayed
                monitor.load_state_dict(sa.grpo.resume.unflatten(kept, tensors))
        monitor.finish()
        return monitor

    for delayed in (False, True):
        whole, broken = run((), delayed), run((0, 7, 8, 21), delayed)
        assert broken.history == whole.history and len(whole.history) == 15
        assert broken.state_dict()["judge"] == whole.state_dict()["judge"]
    whole.to_jsonl(tmp_path / "m.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 30, 2))
    assert lines[3]["rows"][0]["name"] == "layers.0"
    with pytest.raises(ValueError, match="its every is 2, and here 3"):
        Monitor(sa.adapt(Layers(), sa.DoRA(2)), every=3).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="its modules is"):
        other = Monitor(sa.adapt(Layers(SHAPES[:2]), sa.DoRA(2)), every=2)
        other.load_state_dict(whole.state_dict())


def test_snapshots_go_on_from_the_first_start():
    model = Layers([(7, 5)])
    first = Monitor(model, every=1, snapshots=True)
    with torch.no_grad():
        model.layers[0].weight.mul_(1.5)
    second = Monitor(model, every=1, snapshots=True)
    second.load_state_dict(first.state_dict())
    assert second.step().rows == first.step().rows


def test_old_readings_keep_their_bands_alone(monkeypatch):
    monkeypatch.setattr(sa.spectra.monitor, "ROWS_KEPT", 12)
    model = moved(sa.adapt(Layers(), sa.LoRA(2)))
    monitor = Monitor(model, every=1)
    for _ in range(6):
        monitor.step()
    assert [len(reading.rows) for reading in monitor.history] == [0, 0, 0, 0, 5, 5]
    assert monitor.history[0].bands == monitor.history[-1].bands


class Run:
    """A GRPO run with dropout, an adapter, a schedule and a monitor."""

    def __init__(self, folder, lr=0.05):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = Plain()
        self.model.drop.p = 0.2
        sa.adapt(self.model, sa.LoRA(rank=2), target=["up", "head"])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
        self.monitor = Monitor(self.model, every=2)
        self.steps = sa.grpo.train(
            self.model, optimizer, PROMPTS * 4, noisy_reward,
            replace(CONFIG, kl_coef=0.0), observers=[self.monitor],
            checkpoints=folder and sa.grpo.Checkpoints(folder, every=1),
        )  # fmt: skip

    def records(self, count=99):
        kept = []
        for _, step in zip(range(count), self.steps, strict=False):
            kept.append({k: v for k, v in asdict(step).items() if k not in TIMES})
        return kept


def test_grpo_goes_on_with_its_monitor_bit_for_bit(tmp_path):
    whole = Run(None)
    expected = whole.records()
    for stop in (1, 4):
        seen = Run(tmp_path / str(stop)).records(stop)
        rest = Run(tmp_path / str(stop))
        assert seen[:-1] + rest.records() == expected
        assert_same_bits(state(rest.model), state(whole.model))
        assert rest.monitor.history == whole.monitor.history
    assert [reading.step for reading in whole.monitor.history] == [1, 3, 5, 7, 9]
    rewards = [record["reward"] for record in expected]
    assert [reading.reward for reading in whole.monitor.history] == rewards[1::2]


def test_what_it_finds_joins_the_alarms():
    said = [step["alarms"] for step in Run(None, lr=3.0).records()]
    assert not any(a.startswith("collaps") for a in said[0]), "a check is every second step"
    assert any(a.startswith("collapsed: ") and "modules" in a for a in said[1])


def test_a_run_with_other_observers_is_another_one(tmp_path):
    Run(tmp_path).records(2)
    run = Run(None)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    steps = sa.grpo.train(
        run.model, torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1), PROMPTS * 4,
        noisy_reward, replace(CONFIG, kl_coef=0.0), observers=[run.monitor, run.monitor],
        checkpoints=sa.grpo.Checkpoints(tmp_path, every=1),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"its observers is \['Monitor'\], and here \['Monitor', 'M"
    ):
        next(steps)


# -- what the documentation says of runs -----------------------------------------------------------

ROOT = Path(__file__).parents[1]


def test_a_run_that_lived_but_lost_its_reward_is_named():
    runs = json.loads((ROOT / "docs" / "results" / "monitor.json").read_text())["runs"]
    said = monitor_table.fates(runs)
    assert "in 1 (LoRA r=256, lr 5e-4, seed 0: 0.23 to 0.04)" in said
    assert f"- {said}\n" in (ROOT / "docs" / "monitor.md").read_text()
    assert monitor_table.fates([run for run in runs if "256" not in run["setting"]]).endswith(
        "in 0."
    )
