"""A run that is stopped anywhere goes on as if it had not been, bit for bit."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_grpo_train import EOS, PROMPTS, Plain, assert_same_bits, state

import structadapt as sa
from structadapt.grpo import resume

KILLS = int(os.environ.get("STRUCTADAPT_KILLS", "2"))
CONFIG = sa.grpo.Config(
    eos_token_id=EOS, max_new_tokens=6, group_size=4, prompts_per_step=2, minibatches=2, epochs=2,
    kl_coef=0.01, nonfinite="skip",
)  # fmt: skip
TIMES = ("tokens_per_second", "rollout_seconds", "update_seconds")


def noisy_reward(prompt, completion):
    """Depends on every generator that a reward may use."""
    return completion.count(5) / 6 + 0.1 * random.random() + 0.1 * float(np.random.rand())


class Run:
    """A model with dropout, an adapter, AdamW, a schedule: all that has a state."""

    def __init__(self, adapter=None, folder=None, every=1, config=CONFIG, prompts=PROMPTS * 4):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = Plain()
        self.model.drop.p = 0.2
        if adapter is not None:
            sa.adapt(self.model, adapter, target=["up", "head"])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, 40)
        self.checkpoints = folder and sa.grpo.Checkpoints(folder, every=every, keep=2)
        reference = copy.deepcopy(self.model).requires_grad_(False)
        self.steps = sa.grpo.train(
            self.model, self.optimizer, prompts, noisy_reward, config, scheduler=self.schedule,
            reference=lambda: swapped(self.model, reference), checkpoints=self.checkpoints,
        )  # fmt: skip

    def records(self, count=None):
        return [asdict(step) for _, step in zip(range(count or 99), self.steps, strict=False)]


class swapped:  # noqa: N801
    """The trained weights are those of another model meanwhile."""

    def __init__(self, model, other):
        self.pairs = list(zip(model.parameters(), other.parameters(), strict=True))

    def __enter__(self):
        self.kept = [p.detach().clone() for p, _ in self.pairs]
        for p, q in self.pairs:
            p.data.copy_(q)

    def __exit__(self, *_):
        for (p, _), kept in zip(self.pairs, self.kept, strict=True):
            p.data.copy_(kept)


def without_times(records):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


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


def test_nested_values_come_back():
    value = {"a": [1, 2.5, None, True, "x"], 3: {"t": torch.arange(3)}, "inf": float("inf")}
    json_like, tensors = resume.flatten(value)
    back = resume.unflatten(json.loads(json.dumps(json_like)), tensors)
    assert torch.equal(back[3].pop("t"), torch.arange(3)) and value[3].pop("t") is not None
    assert back == value
    with pytest.raises(TypeError, match="a object in the state of a run cannot be kept"):
        resume.flatten([object()])


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_grpo_resume import Run, sa, state
out = Path(sys.argv[1])
run = Run(sa.DoRA(rank=2), out / "states", every=2)
for record in run.records():
    print(record["step"], flush=True)
torch.save(state(run.model), out / "final.pt")
"""


@pytest.mark.slow
def test_kill_minus_nine_at_any_moment(tmp_path):
    """STRUCTADAPT_KILLS=50 for the whole campaign."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))

    def start(out):
        out.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(script), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    began = time.perf_counter()
    process = start(tmp_path / "whole")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    seconds = time.perf_counter() - began
    expected = torch.load(tmp_path / "whole" / "final.pt")
    rng, killed = random.Random(0), 0
    for i in range(KILLS):
        out = tmp_path / f"run{i}"
        while not (out / "final.pt").exists():
            process = start(out)
            try:
                process.wait(rng.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
            _, error = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), error
        assert_same_bits(torch.load(out / "final.pt"), expected)
    assert killed >= KILLS // 2
