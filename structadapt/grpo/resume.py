"""Keep the whole state of a run on disk, and go on from it bit for bit."""

import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from structadapt.files import whole_folder, write_atomically
from structadapt.grpo import processes
from structadapt.grpo.config import Step
from structadapt.grpo.guard import Guard, Observer
from structadapt.grpo.rewards import Record
from structadapt.grpo.update import Learner

TENSORS, STATE, FINISHED = "tensors.safetensors", "state.json", "finished"
logger = logging.getLogger("structadapt")


@dataclass(frozen=True)
class Checkpoints:
    """A folder with the last states of a run; ValueError for `every` or `keep` below 1.

    A state is the folder step-N: everything that the next step depends on, that is what the
    optimizer trains, the model's buffers, the optimizer, the scheduler, the guard, what observers
    keep, the data's position and the random number generators of Python, NumPy and torch. (The
    sampler has none: its noise is keyed by what it is for.) Frozen weights are not in it; a
    fingerprint of them is. It is written beside its place and moved there when all of it is on the
    disk, and older ones go only then; a state whose content does not match its hash is passed over.
    """

    folder: Path
    every: int = 10  # steps
    keep: int = 2  # states

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every and keep must be at least 1, got {self.every}, {self.keep}")

    def save(
        self, learner: Learner, guard: Guard, records: Sequence[Record], step: Step, last: bool,
        observers: Sequence[Observer] = (),
    ) -> None:  # fmt: skip
        """Write the state after a step, if it is one of every `every` or the last."""
        if not last and (step.step + 1) % self.every:
            return
        state, tensors = flatten(_state(learner, guard, observers))
        random_states = processes.gather(_random_state())
        identity = identify(learner, guard, records, observers)

        def write() -> None:
            if learner.rank == 0:
                self._write(step, {"identity": identity, "state": state}, tensors, random_states)

        processes.whole(write)

    def _write(
        self, step: Step, known: dict[str, Any], tensors: dict[str, Tensor],
        random_states: list[Any],
    ) -> None:  # fmt: skip
        generators, more = flatten(random_states, "random")
        data = safetensors.torch.save({k: t.contiguous() for k, t in (tensors | more).items()})
        content = {
            "step": asdict(step), **known, "random": generators,
            "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(self.folder / f"step-{step.step:08}", lambda name: True) as new:
            (new / TENSORS).write_bytes(data)
            (new / STATE).write_text(json.dumps(content))
        self._prune(f"step-{step.step:08}")

    def _prune(self, newest: str) -> None:
        """Remove old states, and damaged ones after the newest; the newest without an alarm stays,
        so that a run that collapsed can go on from before."""
        states = self._states()
        older = [folder for folder in states if folder.name <= newest]
        kept = older[: self.keep]
        kept += [folder for folder in older if _is_good(folder)][:1]
        for folder in states:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Mark the run as finished: it is not gone on with."""
        if processes.rank_and_size()[0] == 0 and self.folder.is_dir():
            write_atomically(self.folder / FINISHED, b"")

    def reopen(self) -> None:
        """Take the mark back, for a caller who does more before it calls a run finished."""
        (self.folder / FINISHED).unlink(missing_ok=True)

    def _states(self) -> list[Path]:
        """The folders of states, the newest first."""
        if not self.folder.is_dir():
            return []
        named = [p for p in self.folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name)]
        return sorted(named, reverse=True)

    def restore(
        self, learner: Learner, guard: Guard, records: Sequence[Record],
        observers: Sequence[Observer] = (),
    ) -> Step | None:  # fmt: skip
        """Put the newest whole state back; its step, or None if there is none.

        Every process reads it, so all have to see the folder. Raises ValueError for the state of a
        finished run, or of another one, and says what differs.
        """
        if (self.folder / FINISHED).exists():
            raise ValueError(f"the run in {self.folder} is finished: give another folder")
        found = next((f for f in map(_read, self._states()) if f is not None), None)
        steps = processes.gather(None if found is None else found[0]["step"]["step"])
        if any(step != steps[0] for step in steps):
            raise ValueError(
                f"the processes find different states in {self.folder} (steps {steps}): it has to "
                "be one folder that all of them see"
            )
        if learner.rank == 0 and self.folder.is_dir():
            for unfinished in self.folder.glob(".step-*"):  # of a save that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
        if found is None:
            return None
        content, tensors = found
        here = json.loads(json.dumps(identify(learner, guard, records, observers)))
        stored = {"observers": []} | content["identity"]  # of states from before there were any
        other = [name for name in here if stored.get(name) != here[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"the run in {self.folder} is another one: its {name} is "
                f"{_short(stored.get(name))}, and here {_short(here[name])}"
            )
        state = unflatten(content["state"], tensors)
        _put(learner, guard, state)
        for observer, kept in zip(observers, state.get("observers", []), strict=True):
            observer.load_state_dict(kept)
        _put_random_state(unflatten(content["random"], tensors)[learner.rank])
        step = content["step"]
        return Step(**{**step, "alarms": tuple(step["alarms"])})


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A state, or None for one that is not whole."""
    try:
        content = json.loads((folder / STATE).read_text())
        data = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged, and passed over: %s", folder, error)
        return None
    if hashlib.sha256(data).hexdigest() != content.get("sha256"):
        logger.warning("%s is damaged, and passed over", folder)
        return None
    return content, safetensors.torch.load(data)


def _is_good(folder: Path) -> bool:
    try:
        return not json.loads((folder / STATE).read_text())["step"]["alarms"]
    except (OSError, ValueError, KeyError):
        return False


# -- what a run is, and its state ------------------------------------------------------------------


def identify(
    learner: Learner, guard: Guard, records: Sequence[Record], observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    told = json.dumps([(record.ids, record.meta) for record in records], default=repr)
    prompts = hashlib.sha256(told.encode()).hexdigest()
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        | {"lr": group.get("initial_lr", group["lr"])}
        for group in learner.optimizer.param_groups
    ]
    frozen = hashlib.sha256()
    for name, p in learner.model.named_parameters():
        if name not in learner.parameters:
            frozen.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
            if not learner.collective:  # of those every process has some, and not always the same
                some = p.detach().flatten()[:: max(p.numel() // 64, 1)].to("cpu", torch.float64)
                frozen.update(some.numpy().tobytes())
    return {
        **{f"config.{name}": value for name, value in asdict(learner.config).items()},
        "prompts": prompts,
        "trained parameters": [
            [n, [*p.shape], str(p.dtype)] for n, p in learner.parameters.items()
        ],
        "frozen weights": frozen.hexdigest(),
        "optimizer": type(learner.optimizer).__name__,
        "optimizer's options": json.loads(json.dumps(groups, default=repr)),
        "scheduler": type(learner.scheduler).__name__,
        "guard's limits": [guard.patience, guard.max_kl, guard.length_factor],
        "number of processes": learner.size,
        "observers": [type(observer).__name__ for observer in observers],
    }


def _state(learner: Learner, guard: Guard, observers: Sequence[Observer] = ()) -> dict[str, Any]:
    scheduler = learner.scheduler
    return {
        "parameters": dict(learner.parameters),
        "buffers": dict(learner.model.named_buffers()),
        "optimizer": learner.optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
        "nonfinite": learner.nonfinite,
        "guard": {"equal": guard.equal, "lengths": guard.lengths},
        "observers": [observer.state_dict() for observer in observers],
    }


@torch.no_grad()
def _put(learner: Learner, guard: Guard, state: dict[str, Any]) -> None:
    targets = learner.parameters | dict(learner.model.named_buffers())
    for name, value in (state["parameters"] | state["buffers"]).items():
        targets[name].copy_(_like(targets[name], value))
    optimizer = state["optimizer"]
    held = list(learner.parameters.values())
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == held[index].shape:
                values[name] = _like(held[index], value)
    learner.optimizer.load_state_dict(optimizer)
    if state["scheduler"] is not None:
        learner.scheduler.load_state_dict(state["scheduler"])
    learner.nonfinite = state["nonfinite"]
    vars(guard).update(state["guard"])


def _like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as the target is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # its import is felt

    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _put_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


# -- nested values as JSON and tensors -------------------------------------------------------------


def flatten(value: Any, prefix: str = "t") -> tuple[Any, dict[str, Tensor]]:
    """(what JSON can hold, tensors by name) of nested dicts, lists and tensors."""
    tensors: dict[str, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = getattr(value, "full_tensor", lambda: value)()
            name = f"{prefix}{len(tensors)}"
            tensors[name] = whole.detach().cpu().clone()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[visit(k), visit(v)] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            return [visit(v) for v in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} in the state of a run cannot be kept: {value!r}")

    return visit(value), tensors


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `flatten` took; tuples come back as lists."""
    if isinstance(value, list):
        return [unflatten(v, tensors) for v in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value["dict"]}
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
