"""A run that is stopped anywhere goes on as if it had not been, bit for bit."""

import json
import os
import random
from dataclasses import replace

import pytest
import stopped_runs
import torch
from stopped_runs import CONFIG, Run, without_times
from test_grpo_train import PROMPTS, assert_same_bits, state

import structadapt as sa
from structadapt.grpo import resume

KILLS = int(os.environ.get("STRUCTADAPT_KILLS", "2"))


@pytest.mark.parametrize(
    "kind", [None, sa.LoRA(rank=2), sa.DoRA(rank=2), sa.QuanTA(init="paper")], ids=repr
)
@pytest.mark.parametrize("every", [1, 3])
def test_it_goes_on_bit_for_bit(tmp_path, kind, every):
    whole = Run(kind, tmp_path / "whole", every)
    expected = whole.records()
    assert len(expected) == 10
    for stop in (1, 4, 9):
        first = Run(kind, tmp_path / str(stop), every)
        seen = first.records(stop)
        second = Run(kind, tmp_path / str(stop), every)
        rest = second.records()
        saved = stop // every * every  # steps; the record of the last comes again
        together = seen[: max(saved - 1, 0)] + rest
        assert without_times(together) == without_times(expected)
        assert_same_bits(state(second.model), state(whole.model))
        for left, right in zip(
            whole.optimizer.state.values(), second.optimizer.state.values(), strict=True
        ):
            assert all(
                torch.equal(torch.as_tensor(left[k]), torch.as_tensor(right[k])) for k in left
            )


PIECES = ["parameters", "optimizer", "scheduler", "python", "numpy", "torch", "position"]


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_of_the_state_is_needed(tmp_path, monkeypatch, piece):
    """Left out, it is noticed: the check above can fail."""
    whole = Run(None)
    expected = whole.records()
    Run(None, tmp_path).records(4)
    put, put_random = resume._put, resume.put_random_state
    if piece in ("python", "numpy", "torch"):

        def forget(stored):
            fresh = resume.unflatten(*resume.flatten(resume.random_state()))
            put_random({**stored, piece: fresh[piece]})

        monkeypatch.setattr(resume, "put_random_state", forget)
    elif piece != "position":

        def skip(learner, guard, stored, folder):
            fresh = resume.unflatten(*resume.flatten(resume._state(learner, guard)))
            put(learner, guard, {**stored, piece: fresh[piece]}, folder)

        monkeypatch.setattr(resume, "_put", skip)
    second = Run(None, tmp_path)
    if piece == "position":
        restore = sa.grpo.Checkpoints.restore
        monkeypatch.setattr(
            sa.grpo.Checkpoints, "restore",
            lambda *a: (lambda s: s and replace(s, prompts=s.prompts - 2))(restore(*a)),
        )  # fmt: skip
    rest = second.records()
    same = without_times(rest) == without_times(expected[3:])
    assert not same or any(
        not torch.equal(a, b) for a, b in zip(
            state(second.model).values(), state(whole.model).values(), strict=True)
    )  # fmt: skip


def test_a_damaged_state_is_passed_over(tmp_path):
    expected = Run(None).records()
    Run(None, tmp_path).records(5)
    newest = max(tmp_path.iterdir())
    assert newest.name == "step-00000004" and len(list(tmp_path.iterdir())) == 2
    data = bytearray((newest / resume.TENSORS).read_bytes())
    data[-1] ^= 1
    (newest / resume.TENSORS).write_bytes(bytes(data))
    assert without_times(Run(None, tmp_path).records()) == without_times(expected[3:])
    (tmp_path / resume.FINISHED).unlink()
    for folder in tmp_path.iterdir():
        (folder / resume.STATE).write_text("{")
    assert without_times(Run(None, tmp_path).records()) == without_times(expected)


def test_a_kill_after_the_last_state_loses_nothing(tmp_path):
    """The last record is saved with its state before anyone has it."""
    expected = Run(None).records()
    Run(None, tmp_path).records(10)  # it was yielded, and nothing after it asked for
    last = Run(None, tmp_path)
    assert without_times(last.records()) == without_times(expected[9:])
    with pytest.raises(ValueError, match="is finished: give another folder"):
        Run(None, tmp_path).records()
    sa.grpo.Checkpoints(tmp_path).reopen()
    assert len(Run(None, tmp_path).records()) == 1


def test_states_from_before_a_collapse_are_kept(tmp_path, monkeypatch):
    look = sa.grpo.Guard.look
    monkeypatch.setattr(
        sa.grpo.Guard, "look", lambda self, step: ("kl: x",) if step.step > 2 else look(self, step)
    )
    Run(None, tmp_path).records(8)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (2, 6, 7)]


def test_what_is_refused(tmp_path):
    Run(None, tmp_path).records(3)
    other = replace(CONFIG, temperature=0.5)
    with pytest.raises(ValueError, match=r"another one: its config.temperature is 1.0, and here"):
        Run(None, tmp_path, config=other).records()
    with pytest.raises(ValueError, match="another one: its prompts is"):
        Run(None, tmp_path, prompts=PROMPTS * 3).records()
    run = Run(None, tmp_path)
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(ValueError, match="another one: its optimizer's options is"):
        run.records()
    with pytest.raises(ValueError, match="another one: its trained parameters is"):
        Run(sa.LoRA(rank=2), tmp_path).records()
    run = Run(None, tmp_path / "lora")
    with pytest.raises(ValueError, match="another one: its frozen weights is"):
        Run(sa.LoRA(rank=2), tmp_path / "a").records(2)
        run = Run(sa.LoRA(rank=2), tmp_path / "a")
        run.model.embed.weight.data[0] += 1
        run.records()
    Run(None, tmp_path).records()
    with pytest.raises(ValueError, match="is finished: give another folder"):
        Run(None, tmp_path).records()
    for wrong in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="every and keep must be at least 1"):
            sa.grpo.Checkpoints(tmp_path, **wrong)


def test_a_folder_may_be_text(tmp_path):
    assert sa.grpo.Checkpoints(str(tmp_path)).path == tmp_path
    with pytest.raises(TypeError, match="folder must be a path, got None: pass a str or a Path"):
        sa.grpo.Checkpoints(None)


def test_nested_values_come_back():
    value = {"a": [1, 2.5, None, True, "x"], 3: {"t": torch.arange(3)}, "inf": float("inf")}
    json_like, tensors = resume.flatten(value)
    back = resume.unflatten(json.loads(json.dumps(json_like)), tensors)
    assert torch.equal(back[3].pop("t"), torch.arange(3)) and value[3].pop("t") is not None
    assert back == value
    with pytest.raises(TypeError, match="a object in the state of a run cannot be kept"):
        resume.flatten([object()])


@pytest.mark.slow
def test_kill_minus_nine_at_any_moment(tmp_path):
    """STRUCTADAPT_KILLS=50 for the whole campaign."""
    stopped_runs.whole(tmp_path / "first")  # reads libraries from the disk, which takes its time
    expected, seconds, _ = stopped_runs.whole(tmp_path / "whole")
    rng, killed = random.Random(0), 0
    for i in range(5 * KILLS):  # a run may come to its end before its moment
        killed += stopped_runs.killed_at_moments(tmp_path / f"run{i}", rng, seconds) > 0
        assert_same_bits(stopped_runs.outcome(tmp_path / f"run{i}"), expected)
        if killed >= KILLS:
            return
    pytest.fail(f"{killed} of {KILLS} runs were killed before their end")


@pytest.mark.slow
def test_kill_minus_nine_while_it_saves(tmp_path):
    expected, _, calls = stopped_runs.whole(tmp_path / "whole")
    assert calls > 50
    for i in range(KILLS):
        stopped_runs.killed_in_saving(tmp_path / f"run{i}", 1 + (i + 1) * calls // (KILLS + 1))
        assert_same_bits(stopped_runs.outcome(tmp_path / f"run{i}"), expected)
