"""Runs that are stopped: killed at any moment or while they save, or gone on with from a state of
which a piece is another one. For tests, and for benchmarks/reliability.py.

    python stopped_runs.py DIR          run in DIR, from where it stands, to the end
    python stopped_runs.py DIR 17       the same, but be killed in the middle of its 17th write
"""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from test_grpo_train import EOS, PROMPTS, Plain, state

import structadapt as sa
from structadapt.files import UNSEALED, sealed
from structadapt.grpo import resume

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


# -- killed ----------------------------------------------------------------------------------------


def main(out: Path, fatal: int) -> None:
    """A run in `out`; its `fatal`-th call that writes is begun, and then the process is killed."""
    torch.set_num_threads(1)
    calls = _killed_at(fatal)
    run = Run(sa.DoRA(rank=2), out / "states", every=2)
    records = run.records()
    torch.save(
        {**state(run.model), **_of_optimizer(run), "records": _bits(records)}, out / "final.pt"
    )
    (out / "calls").write_text(str(len(calls)))


def _of_optimizer(run: Run) -> dict[str, torch.Tensor]:
    held = run.optimizer.state.values()
    return {f"{i}.{k}": torch.as_tensor(v) for i, own in enumerate(held) for k, v in own.items()}


def _bits(records: list[dict[str, Any]]) -> torch.Tensor:
    """The last step as it is told, which a resumed run tells again."""
    return torch.tensor([*json.dumps(without_times(records)[-1]).encode()], dtype=torch.uint8)


def _killed_at(fatal: int) -> list[str]:
    """The calls that write, as they are made; the fatal one writes half of what it should."""
    calls: list[str] = []

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == fatal:
                if name in ("write_bytes", "write_text"):
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, name, call)

    for owner, names in {
        os: ("fsync", "rename", "replace", "mkdir"),
        shutil: ("rmtree",),
        Path: ("write_bytes", "write_text", "mkdir", "unlink"),
    }.items():
        for name in names:
            watched(owner, name)
    return calls


def started(out: Path, fatal: int = 0) -> subprocess.Popen[bytes]:
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, __file__, str(out), str(fatal)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it was killed; AssertionError if it failed."""
    _, error = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), error.decode()
    return process.returncode != 0


def whole(out: Path) -> tuple[dict[str, torch.Tensor], float, int]:
    """(what a run that nothing stops comes to, seconds, calls that write)"""
    began = time.perf_counter()
    assert not _ended(started(out))
    return outcome(out), time.perf_counter() - began, int((out / "calls").read_text())


def outcome(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "final.pt")


def killed_at_moments(out: Path, rng: random.Random, seconds: float) -> int:
    """Started and killed until it comes to its end; how often it was killed."""
    killed = 0
    while not (out / "final.pt").exists():
        process = started(out)
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        killed += _ended(process)
    return killed


def killed_in_saving(out: Path, fatal: int) -> None:
    """Killed in one of its calls that write, then run to the end."""
    assert _ended(started(out, fatal))
    assert not _ended(started(out))


# -- with another state ----------------------------------------------------------------------------

LONG = 20  # numbers in a row that are one piece, as the state of a generator is


def pieces(folder: Path) -> list[tuple[str, str]]:
    """(name, way) of every piece of a saved state, and of how it can be another one."""
    content = json.loads((folder / resume.STATE).read_text())
    return [
        (name, way) for name, node, key in _leaves(content, "")
        for way in ("altered", "dropped") if way == "altered" or isinstance(node, dict | list)
        if not (way == "dropped" and isinstance(key, int) and not _is_pair(node))
    ]  # fmt: skip


def _is_pair(node: Any) -> bool:
    return isinstance(node, list) and bool(node) and isinstance(node[0], list) and len(node[0]) == 2


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(name, container, key) of what is no container: a number, a text, a tensor."""
    if isinstance(node, dict) and node.keys() == {"dict"}:
        for i, (key, value) in enumerate(node["dict"]):
            yield from _within(node["dict"], i, value, f"{name}.{key}")
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _within(node, key, value, f"{name}.{key}" if name else key)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _within(node, i, value, f"{name}.{i}")


def _within(node: Any, key: Any, value: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    simple = not isinstance(value, dict | list) or (isinstance(value, dict) and "tensor" in value)
    if simple or not value or (isinstance(value, list) and len(value) > LONG):
        yield name, node, key
    else:
        yield from _leaves(value, name)


def change(folder: Path, piece: tuple[str, str], seal: bool) -> None:
    """Alter or drop one piece of a saved state, with hashes made again or left as they were."""
    name, way = piece
    content = json.loads((folder / resume.STATE).read_text())
    tensors = safetensors.torch.load((folder / resume.TENSORS).read_bytes())
    node, key = next((node, key) for found, node, key in _leaves(content, "") if found == name)
    if way == "dropped":
        del node[key]
    elif _is_pair(node):
        node[key][1] = _other(node[key][1], tensors)
    else:
        node[key] = _other(node[key], tensors)
    if seal:
        data = safetensors.torch.save(tensors)
        (folder / resume.TENSORS).write_bytes(data)
        if "sha256" in content and name != "sha256":
            content["sha256"] = resume.hashlib.sha256(data).hexdigest()
        if "seal" in content and name != "seal":
            content["seal"] = UNSEALED
    text = json.dumps(content).encode()
    (folder / resume.STATE).write_bytes(sealed(text) if seal else text)
    if not seal:
        (folder / resume.TENSORS).write_bytes(safetensors.torch.save(tensors))


def _other(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Another value of the same kind."""
    if isinstance(value, dict) and "tensor" in value:
        tensor = tensors[value["tensor"]].clone()
        flat = tensor.view(-1)
        if tensor.dtype == torch.uint8:  # the words of a generator, its place in them as it was
            flat[100:4000] ^= 1
        else:
            flat[-1] += 0.5 if tensor.is_floating_point() else 1
        tensors[value["tensor"]] = tensor
        return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list) and value:
        return [v ^ 1 for v in value[:-1]] + value[-1:]
    return 1


def verdict(
    folder: Path, piece: tuple[str, str], seal: bool, expected: tuple[list[Any], Any]
) -> str:
    """What becomes of a run that goes on from a changed state: "passed over", "refused: why",
    "differs" or "the same"."""
    records, final = expected
    newest = max(p for p in folder.iterdir() if p.name.startswith("step-"))
    change(newest, piece, seal)
    run = Run(None, folder)
    try:
        rest = without_times(run.records())
    except Exception as error:
        return f"refused: {type(error).__name__}: {error!s:.100}"
    if len(rest) == len(records):  # from the start
        return "passed over"
    same = rest == records[-len(rest) :] and all(
        torch.equal(a, b) for a, b in zip(state(run.model).values(), final.values(), strict=True)
    )
    return "the same" if same else "differs"


def mutated_states(scratch: Path, seal: bool, some: Callable[[int], bool]) -> dict[str, str]:
    """{piece, way: verdict} of every piece whose number is among `some`."""
    run = Run(None)
    expected = without_times(run.records()), state(run.model)
    stopped = Run(None, scratch / "stopped")
    stopped.records(4)
    for folder in sorted((scratch / "stopped").iterdir())[:-1]:
        shutil.rmtree(folder)  # so that one passed over is one begun again
    (newest,) = (scratch / "stopped").iterdir()
    found = {}
    for number, piece in enumerate(pieces(newest)):
        if some(number):
            shutil.copytree(scratch / "stopped", scratch / "changed")
            found[" ".join(piece)] = verdict(scratch / "changed", piece, seal, expected)
            shutil.rmtree(scratch / "changed")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
