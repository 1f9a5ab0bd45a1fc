"""Keep the whole state of a run on disk, and go on from it bit for bit."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from structadapt.bounds import quoted
from structadapt.files import UNSEALED, has_seal, sealed, whole_folder, write_atomically
from structadapt.grpo import processes, sharded
from structadapt.grpo.config import Step
from structadapt.grpo.generators import put_random_state, random_state
from structadapt.grpo.guard import Guard, Observer
from structadapt.grpo.nested import flatten, unflatten
from structadapt.grpo.rewards import Record
from structadapt.grpo.rollout import Rollout
from structadapt.grpo.update import Learner

TENSORS, STATE, FINISHED = "tensors.safetensors", "state.json", "finished"
FORMAT = 2  # the first one had no seal, and no name
logger = logging.getLogger("structadapt")


@dataclass(frozen=True)
class Checkpoints:
    """A folder with the last states of a run; ValueError for `every` or `keep` below 1, TypeError
    for a folder that is no path.

    A state is the folder step-N: everything that the next step depends on, that is what the
    optimizer trains, the model's buffers, the optimizer, the scheduler, the guard, what observers
    keep, the data's position and the random number generators of Python, NumPy and torch. (The
    sampler has none: its noise is keyed by what it is for.) Frozen weights are not in it; a
    fingerprint of them is. It is written beside its place and moved there when all of it is on the
    disk, and older ones go only then; a state whose content does not match its hashes is passed
    over.
    What is sharded over the processes (DTensors) is written by each of them, with
    torch.distributed.checkpoint: never whole in one place.
    """

    folder: str | os.PathLike[str]
    every: int = 10  # steps
    keep: int = 2  # states

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every and keep must be at least 1, got {self.every}, {self.keep}")
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(f"folder must be a path, got {self.folder!r}: pass a str or a Path")

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def save(
        self, learner: Learner, guard: Guard, records: Sequence[Record], step: Step, last: bool,
        observers: Sequence[Observer] = (),
    ) -> None:  # fmt: skip
        """Write the state after a step, if it is one of every `every` or the last."""
        if not last and (step.step + 1) % self.every:
            return
        state, tensors = flatten(_state(learner, guard, observers))
        random_states = processes.gather(random_state())
        known = {"identity": identify(learner, guard, records, observers), "state": state}
        shards = {n: tensors.pop(n) for n in [*tensors] if sharded.is_sharded(tensors[n])}
        with ExitStack() as unfinished:
            new = processes.whole(lambda: learner.rank or self._begin(step, unfinished))
            new = processes.gather(new)[0]
            if shards:
                known["shards"] = sharded.write(shards, new / sharded.FOLDER)

            def finish() -> None:
                if learner.rank == 0:
                    _write(new, step, known, tensors, random_states)
                    unfinished.close()
                    self._prune(f"step-{step.step:08}")

            processes.whole(finish)

    def _begin(self, step: Step, unfinished: ExitStack) -> Path:
        """A folder beside the state's place, which it takes when `unfinished` is closed."""
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"step-{step.step:08}"
        return unfinished.enter_context(whole_folder(target, lambda name: True))

    def keep_batch(self, step: int, rollout: Rollout, advantages: Tensor) -> None:
        """Write the minibatch whose gradient was not finite, to look at: every field of `Rollout`
        that it has, and the advantages, in a safetensors file of each process."""
        fields = {k: v for k, v in vars(rollout).items() if v is not None}
        tensors = {k: v.detach().cpu().contiguous() for k, v in fields.items()}
        tensors["advantages"] = advantages.detach().cpu().contiguous()
        self.path.mkdir(parents=True, exist_ok=True)
        rank = processes.rank_and_size()[0]
        path = self.path / f"nonfinite-step-{step:08}-process-{rank}.safetensors"
        write_atomically(path, safetensors.torch.save(tensors))
        logger.error("the minibatch whose gradient is not finite is in %s", path)

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
        if processes.rank_and_size()[0] == 0 and self.path.is_dir():
            write_atomically(self.path / FINISHED, b"")

    def reopen(self) -> None:
        """Take the mark back, for a caller who does more before it calls a run finished."""
        (self.path / FINISHED).unlink(missing_ok=True)

    def _states(self) -> list[Path]:
        """The folders of states, the newest first."""
        if not self.path.is_dir():
            return []
        named = [p for p in self.path.iterdir() if re.fullmatch(r"step-\d{8}", p.name)]
        return sorted(named, reverse=True)

    def restore(
        self, learner: Learner, guard: Guard, records: Sequence[Record],
        observers: Sequence[Observer] = (),
    ) -> Step | None:  # fmt: skip
        """Put the newest whole state back; its step, or None if there is none.

        Every process reads it, so all have to see the folder. Raises ValueError for the state of a
        finished run, or of another one, and says what differs.
        """
        if (self.path / FINISHED).exists():
            raise ValueError(f"the run in {self.path} is finished: give another folder")
        states = self._states()
        seen = processes.gather([folder.name for folder in states])
        if any(names != seen[0] for names in seen):
            raise ValueError(
                f"the processes find different states in {self.path} ({seen}): it has to be one "
                "folder that all of them see"
            )
        found = next((pair for pair in map(_read, states) if pair is not None), None)
        if learner.rank == 0 and self.path.is_dir():
            for unfinished in self.path.glob(".step-*"):  # of a save that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
        if found is None:
            return None
        content, tensors, folder = found
        here = json.loads(json.dumps(identify(learner, guard, records, observers)))
        stored = content["identity"]
        other = [name for name in here if stored.get(name) != here[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"the run in {self.path} is another one: its {name} is "
                f"{quoted(stored.get(name))}, and here {quoted(here[name])}"
            )
        state = unflatten(content["state"], tensors)
        _put(learner, guard, state, folder / sharded.FOLDER)
        _put_observers(observers, state["observers"], folder / sharded.FOLDER)
        put_random_state(unflatten(content["random"], tensors)[learner.rank])
        step = content["step"]
        return Step(**{**step, "alarms": tuple(step["alarms"])})


def _write(
    new: Path, step: Step, known: dict[str, Any], tensors: dict[str, Tensor],
    random_states: list[Any],
) -> None:  # fmt: skip
    generators, more = flatten(random_states, "random")
    data = safetensors.torch.save({k: t.contiguous() for k, t in (tensors | more).items()})
    content = {
        "format": FORMAT, "seal": UNSEALED, "step": asdict(step), **known, "random": generators,
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (new / TENSORS).write_bytes(data)
    (new / STATE).write_bytes(sealed(json.dumps(content).encode()))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path] | None:
    """A state, or None for one that is not whole for every process."""
    found, reason = None, ""
    try:
        text = (folder / STATE).read_bytes()
        content = json.loads(text)
        data = (folder / TENSORS).read_bytes()
        digest, shards = content.get("sha256"), content.get("shards", {})
        altered = {"format", "seal"} & content.keys() and not has_seal(text, content.get("seal"))
    except (OSError, ValueError, AttributeError) as error:
        reason = f": {error}"
    else:
        good = hashlib.sha256(data).hexdigest() == digest and not altered
        if good and sharded.is_whole(folder / sharded.FOLDER, shards):
            found = content, safetensors.torch.load(data), folder
    if processes.any_of(found is None):
        logger.warning("%s is damaged, and passed over%s", folder, reason)
        return None
    return found


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
        "nonfinite": [learner.nonfinite, learner.left_out, learner.attempts],
        "guard": {"equal": guard.equal, "lengths": guard.lengths},
        "observers": [observer.state_dict() for observer in observers],
    }


@torch.no_grad()
def _put(learner: Learner, guard: Guard, state: dict[str, Any], folder: Path) -> None:
    """folder: of the sharded tensors."""
    shards: dict[str, Tensor] = {}
    targets = learner.parameters | dict(learner.model.named_buffers())
    new = {n: _like(targets[n], value, shards)
           for n, value in (state["parameters"] | state["buffers"]).items()}  # fmt: skip
    optimizer = state["optimizer"]
    held = list(learner.parameters.values())
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            values[name] = _like(held[index], value, shards)
    if shards:
        sharded.read(shards, folder)
    for name, value in new.items():
        targets[name].copy_(value)
    learner.optimizer.load_state_dict(optimizer)
    if state["scheduler"] is not None:
        learner.scheduler.load_state_dict(state["scheduler"])
    learner.nonfinite, learner.left_out, learner.attempts = state["nonfinite"]
    vars(guard).update(state["guard"])


def _put_observers(observers: Sequence[Observer], kept: list[Any], folder: Path) -> None:
    """What an observer holds sharded is read in the layout that it has it in now."""
    shards: dict[str, Tensor] = {}

    def filled(value: Any, here: Any) -> Any:
        if isinstance(value, dict) and isinstance(here, dict):
            return {k: filled(v, here.get(k)) for k, v in value.items()}
        return _like(here, value, shards)

    states = [
        filled(state, observer.state_dict())
        for observer, state in zip(observers, kept, strict=True)
    ]
    if shards:
        sharded.read(shards, folder)
    for observer, state in zip(observers, states, strict=True):
        observer.load_state_dict(state)


def _like(target: Tensor, value: Any, shards: dict[str, Tensor]) -> Any:
    """What `target` is filled with: a sharded tensor is empty, and stands in `shards`."""
    if not isinstance(value, sharded.Sharded):
        return value
    shards[value.name] = torch.empty_like(target, dtype=value.dtype)
    return shards[value.name]
