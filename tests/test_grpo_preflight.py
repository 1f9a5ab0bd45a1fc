"""Preflight says what the loop's first step will do, and leaves no trace."""

import copy
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import preflight_table as benchmark
import pytest
import torch
from stopped_runs import noisy_reward
from test_grpo_train import EOS, PROMPTS, Plain, assert_same_bits, count_fives, state

import structadapt as sa
from structadapt.grpo import trial, undo
from structadapt.grpo.sizes import spectral_norm
from structadapt.study.statistics import limits

ROOT = Path(__file__).parents[1]
CONFIG = sa.grpo.Config(eos_token_id=EOS, max_new_tokens=6, group_size=4, prompts_per_step=5)


class Counting(Plain):
    """A buffer that every forward changes, and weights that are frozen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.embed.weight.requires_grad_(False)
        self.drop.p = 0.2

    def forward(self, ids, mask, position_ids):
        self.calls += 1
        return super().forward(ids, mask, position_ids)


def subject(adapter=None, lr=0.01):
    """A model, AdamW, a schedule."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Counting()
    if adapter is not None:
        sa.adapt(model, adapter, target=["up", "head"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 40)


def snapshot(model, optimizer, scheduler):
    """Every bit of what preflight may change, as plain values."""
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "optimizer": copy.deepcopy([dict(optimizer.state), optimizer.state_dict()]),
        "scheduler": copy.deepcopy(scheduler.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "python": random.getstate(),
        "numpy": copy.deepcopy(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }


def differences(left, right):
    def same(a, b):
        if isinstance(a, torch.Tensor | np.ndarray):
            return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool(
                (a == b).all()
            )  # fmt: skip
        if isinstance(a, dict):
            # the keys of an optimizer's state are tensors, which deepcopy replaced
            return len(a) == len(b) and all(map(same, a.values(), b.values()))
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    return {name for name in left if not same(left[name], right[name])}


def look(model, optimizer, scheduler, reward=noisy_reward, config=CONFIG, **options):
    return sa.grpo.preflight(model, optimizer, PROMPTS, reward, config, scheduler=scheduler,
                             **options)  # fmt: skip


def trained_for_a_step(model, optimizer, scheduler, config=CONFIG, reward=noisy_reward):
    return next(sa.grpo.train(model, optimizer, PROMPTS, reward, config, scheduler=scheduler))


def disturbed(model):
    """Not the state of a fresh model: modes, gradients, generators."""
    model.up.eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 == 0 else None
    random.random(), np.random.rand(), torch.rand(1)


KINDS = [None, sa.LoRA(rank=2), sa.DoRA(rank=2), sa.QuanTA()]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("steps", [0, 2], ids=["no optimizer state", "some optimizer state"])
def test_everything_is_as_it_was(kind, steps):
    parts = subject(kind, lr=0.3)
    for _ in range(steps):
        trained_for_a_step(*parts)
    disturbed(parts[0])
    grads = [p.grad for p in parts[0].parameters()]
    moments = [t for s in parts[1].state.values() for t in s.values()]
    before = snapshot(*parts)
    report = look(*parts, config=replace(CONFIG, minibatches=2))
    assert report.updates == 2 and report.kl > 0
    assert not differences(before, snapshot(*parts))
    assert all(g is p.grad for g, p in zip(grads, parts[0].parameters(), strict=True))
    now = [t for s in parts[1].state.values() for t in s.values()]
    assert len(now) == len(moments) and all(a is b for a, b in zip(now, moments, strict=True))


PIECES = {"parameters", "buffers", "optimizer", "scheduler", "gradients", "modes"}


@pytest.mark.parametrize("piece", [None, *sorted(PIECES), "python", "numpy", "torch"])
def test_every_piece_is_needed(piece, monkeypatch):
    """Not put back, it is noticed."""
    parts = subject(lr=0.3)
    model = parts[0]
    disturbed(model)
    whole, put_random = undo.pieces, undo.put_random_state
    if piece in PIECES:
        monkeypatch.setattr(undo, "pieces", lambda *a: {**whole(*a), piece: lambda: None})
    elif piece:
        monkeypatch.setattr(
            undo, "put_random_state",
            lambda stored: put_random({**stored, piece: undo.random_state()[piece]}),
        )  # fmt: skip

    def reward(prompt, completion):
        model.drop.eval()
        return noisy_reward(prompt, completion)

    before = snapshot(*parts)
    look(*parts, reward)
    found = differences(before, snapshot(*parts))
    assert (piece in found) == (piece is not None)
    if piece is None:
        assert not found


@pytest.mark.parametrize("where", ["reward", "step", "look", "weights"])
def test_an_error_leaves_everything_as_it_was(where, monkeypatch):
    parts = subject()
    disturbed(parts[0])
    before, options = snapshot(*parts), {}

    def fail(*_, **__):
        raise KeyboardInterrupt

    if where == "reward":
        options["reward"] = fail
    elif where == "weights":
        options["weights"] = lambda: (
            fail() if parts[1].state else x for x in [("a", *[torch.ones(2, 2)] * 2)]
        )
    else:
        owner = {"step": parts[1], "look": trial.Trial}[where]
        monkeypatch.setattr(owner, {"step": "step", "look": "_kl_after"}[where], fail)
    with pytest.raises(KeyboardInterrupt):
        look(*parts, **options)
    monkeypatch.undo()
    assert not differences(before, snapshot(*parts))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("minibatches", [1, 2])
def test_it_is_what_the_loop_does(kind, minibatches):
    """The same numbers, bit for bit, and the loop after it takes the step it would have taken."""
    config = replace(CONFIG, minibatches=minibatches)
    parts = subject(kind, lr=0.1)
    report = look(*parts, config=config)
    step = trained_for_a_step(*parts, config=config)
    alone = subject(kind, lr=0.1)
    expected = trained_for_a_step(*alone, config=config)
    assert_same_bits(state(parts[0]), state(alone[0]))
    assert step.kl == expected.kl and report.reward == step.reward
    assert report.equal_groups == step.zero_std_fraction and report.updates == step.updates
    if minibatches == 1:
        assert report.kl == report.first.kl_step == step.kl
    else:
        assert report.kl < report.first.kl_step


def test_a_suggestion_was_measured(monkeypatch):
    """And a preflight at that rate finds the same."""
    monkeypatch.setattr(trial, "SAFE_KL", 1e-3)
    monkeypatch.setattr(trial, "COLLAPSE_KL", 2e-3)
    report = look(*subject(lr=0.3))
    assert report.verdict == "will collapse" and 1 <= len(report.tries) <= 3
    best = report.suggestion
    assert best is not None and best == report.tries[-1] and 0 < best.kl <= 1e-3
    assert best.lr == pytest.approx(0.3 * best.factor) and best.factor < 1
    again = look(*subject(lr=best.lr))
    assert again.verdict == "safe" and not again.tries and again.suggestion is None
    assert again.kl == pytest.approx(best.kl, rel=1e-6)
    text = str(report)
    assert f"suggestion         learning rate {best.lr:.3g}, measured KL {best.kl:.3g}" in text
    assert look(*subject(lr=0.3), tries=0).tries == ()


def test_without_a_safe_rate_nothing_is_suggested(monkeypatch):
    monkeypatch.setattr(trial, "verdict_of", lambda kl: "uncertain")
    report = look(*subject(lr=0.3), count_fives, tries=2)
    assert len(report.tries) == 2 and report.suggestion is None
    rates = [0.3, *(t.lr for t in report.tries)]
    assert rates == sorted(rates, reverse=True)


def test_equal_rewards_say_nothing():
    model, optimizer, scheduler = subject()
    report = look(model, optimizer, scheduler, lambda p, c: 0.25)
    assert report.verdict == "no signal" and report.kl == 0 and report.equal_groups == 1
    assert "no signal" in str(report) and "mean reward 0.25" in str(report)


def test_verdicts():
    assert trial.SAFE_KL <= trial.COLLAPSE_KL
    between = (trial.SAFE_KL + trial.COLLAPSE_KL) / 2
    values = [0.0, trial.SAFE_KL, between, trial.COLLAPSE_KL, float("inf")]
    assert [trial.verdict_of(v) for v in values] == [
        "safe", "safe", "uncertain", "will collapse", "will collapse",
    ]  # fmt: skip


def test_an_update_that_breaks_the_policy():
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    for minibatches in (1, 2):  # the second update finds no finite gradient
        config = replace(CONFIG, minibatches=minibatches)
        report = sa.grpo.preflight(model, optimizer, PROMPTS, count_fives, config, tries=1)
        assert report.verdict == "will collapse" and report.first.kl_step == float("inf")
    for parameter in model.parameters():
        parameter.register_hook(lambda g: g * float("nan"))
    for policy in ("stop", "skip"):
        config = replace(CONFIG, nonfinite=policy)
        with pytest.raises(FloatingPointError):
            sa.grpo.preflight(model, optimizer, PROMPTS, count_fives, config)


def test_what_is_refused():
    model, optimizer, _ = subject()
    with pytest.raises(ValueError, match="the scheduler has no state_dict"):
        look(model, optimizer, object())
    with pytest.raises(ValueError, match="no prompts"):
        sa.grpo.preflight(model, optimizer, [], count_fives, CONFIG)
    with pytest.raises(ValueError, match="needs a reference policy"):
        look(model, optimizer, None, config=replace(CONFIG, kl_coef=0.1))


def test_a_warm_up_is_pointed_out():
    model, optimizer, _ = subject(lr=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
    report = look(model, optimizer, warm_up, count_fives)
    assert report.first.lr == pytest.approx(0.001) and report.warming_up == pytest.approx(0.01)
    assert "the schedule goes on to 0.01: try that rate as well" in str(report)


# -- the size of the update ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("earlier", [0, 2])
def test_sizes_are_those_of_the_first_update(kind, earlier):
    """Not of what the adapter had learned before."""
    parts = subject(kind, lr=0.05)
    model = parts[0]
    for _ in range(earlier):
        trained_for_a_step(*parts, reward=count_fives)
    layers = {"up": model.up, "head": model.head}

    def effective():
        deltas = dict(sa.delta_weights(model)) if kind else {}
        found = {n: layer.weight.detach() + deltas.get(n, 0) for n, layer in layers.items()}
        return {n: W.double().clone() for n, W in found.items()}

    weights = lambda: ((n, layers[n].weight, dW) for n, dW in sa.delta_weights(model))  # noqa: E731
    report = look(*parts, count_fives, weights=weights if kind else None)
    old = effective()
    trained_for_a_step(*parts, reward=count_fives)
    new = effective()
    for size, order in ((report.relative, "fro"), (report.spectral, 2)):
        ratios = {
            n: float(torch.linalg.matrix_norm(new[n] - old[n], order))
            / float(torch.linalg.matrix_norm(old[n], order))
            for n in old
        }
        assert size.where.removesuffix(".weight") == max(ratios, key=ratios.get)
        assert size.largest == pytest.approx(max(ratios.values()), rel=1e-2)
        assert size.median == pytest.approx(sum(ratios.values()) / 2, rel=1e-2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 30), (200, 300)])
@pytest.mark.parametrize("scale", [1e-25, 1.0])
def test_spectral_norm(shape, scale):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    exact = torch.linalg.matrix_norm(W.double(), 2).item()
    assert spectral_norm(W).item() == pytest.approx(exact, rel=0.01)
    assert spectral_norm(W).item() <= exact * (1 + 1e-5)
    assert spectral_norm(torch.zeros(shape)).item() == 0


# -- the table that the verdicts rest on -----------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return json.loads(benchmark.RESULTS.read_text())


def test_the_limits_are_those_of_the_measured_runs(results):
    rows = [row for row in results["rows"] if row["protocol"] == "1 update"]
    assert len(rows) >= 40
    found = limits(benchmark.points(rows))
    assert (found.safe, found.collapse) == (trial.SAFE_KL, trial.COLLAPSE_KL)
    for row in rows:
        verdict = trial.verdict_of(row["kl"])
        assert verdict != ("safe" if row["collapsed"] else "will collapse"), row


def test_the_documented_table_is_the_measured_one(results):
    text = (ROOT / "docs" / "preflight.md").read_text()
    assert f"\n\n{benchmark.table(results)}\n" in text
    assert f"\n\n{benchmark.conclusion(results)}\n\n" in text


def test_every_measured_run_is_one_of_the_script_and_once(results):
    keys = [benchmark.key(row) for row in results["rows"]]
    cases = {(p.name, seed, name, lr) for name, lr, seed, p in benchmark.cases()}
    assert len(keys) == len(set(keys)) and set(keys) <= cases
    assert results["protocols"] == json.loads(
        json.dumps({p.name: vars(p) for p in benchmark.PROTOCOLS})
    )


def test_the_script_runs_and_goes_on(tmp_path):
    """In a process of its own: it sets the number of threads."""
    out = tmp_path / "smoke.json"
    command = [sys.executable, benchmark.__file__, "--smoke", "--out", out]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 and printed.count("\n| 1 |") == 2
    assert all(row["steps"] == 3 for row in rows)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert not again.stderr and json.loads(out.read_text())["rows"] == rows
    assert subprocess.run([*command[:3]], capture_output=True).returncode == 2
