"""Watch the updates of a model while it trains, and say when they are about to ruin it."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from structadapt.adapted import sharded_as
from structadapt.bounds import few
from structadapt.files import write_atomically
from structadapt.spectra import states, updates
from structadapt.spectra.report import plain
from structadapt.spectra.states import MEASURES, NOT_JUDGED, Judge, Row, Thresholds

ROWS_KEPT = 20_000  # of the history; older readings keep medians and bands
# Step, values, what to wait for, rewards and KLs since the check before.
Check = tuple[int, Tensor, Any, list[Any], list[Any]]


@dataclass(frozen=True)
class Reading:
    """What one check found.

    A reading is of the moment after the call of `Monitor.step` with number `step`, counted from 0.
    `bands` has the 10 % quantile, median and 90 % quantile over the judged modules of each measure
    of `states.MEASURES`. `rows` has the modules one by one; old readings in a history have none.
    """

    step: int
    state: str  # of the model: one of `states.STATES`
    evidence: str  # one sentence that says why
    bands: dict[str, tuple[float, float, float]]
    rows: tuple[Row, ...]
    reward: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reading as JSON has it; None for what is not finite."""
        return plain(asdict(self))


class _Step(Protocol):
    """What the monitor takes from a step of `grpo.train`."""

    @property
    def reward(self) -> float: ...
    @property
    def kl(self) -> float: ...


class Monitor:
    """Size and concentration of every adapted layer's update, and what they say, as it trains.

        monitor = sa.spectra.Monitor(model, every=10)
        for batch in batches:
            ...  # the optimizer steps
            reading = monitor.step()
            if reading is not None and reading.state == "collapsed":
                print(reading.evidence)

    For `grpo.train` pass observers=[monitor]: what it finds joins the alarms of the steps.

    model: adapted, perhaps wrapped or sharded. Watched are the updates of its adapters: LoRA from
        its factors; DoRA's direction s B A from its factors, with the drift of the magnitudes
        beside it; QuanTA by seeded probes that go through the gates (exactly where a side is at
        most 256); any other adapter from its dense direction. `not_watched` names frozen adapters
        and the other parameters that train, and why not. What is watched is settled here: of
        adapters added, replaced or unfrozen later the next check warns, once, and names them there.
    every: check after so many calls of `step`; calls between checks do nothing.
    thresholds: where the states begin (see `states.Thresholds`).
    snapshots: keep a copy of every matrix that trains without an adapter, and watch its change.

    The norms of the frozen weights are worked out here, and so is where the updates stand: make the
    monitor before the first step. Neither the model nor a global random number generator is
    touched. On CUDA a check only queues work: its numbers are copied to the host meanwhile and read
    at the next check, so that `step` returns the reading of the check before; `finish` gives the
    last one. On a CPU there is no delay.

    With torch.distributed every process makes the same calls. Each works the readings out itself,
    from parameters that are equal; of sharded ones the whole values are gathered one by one. Only
    the first writes files.

    Raises ValueError for `every` that is no integer or below 1, a model in which nothing can be
    watched, or one that has no values yet.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        *,
        thresholds: Thresholds | None = None,
        snapshots: bool = False,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer and at least 1, got {every!r}")
        self.every, self.delayed = every, any(p.is_cuda for p in model.parameters())
        self._model = model
        self.updates, self.not_watched = updates.find(model, snapshots)
        if not self.updates:
            if updates.FROZEN in self.not_watched.values():
                raise ValueError("nothing to watch: every adapter is frozen; let one train first")
            raise ValueError(
                "nothing to watch: the model has no adapted layer; call structadapt.adapt or load "
                "first, or pass snapshots=True to watch the matrices that train by themselves"
            )
        empty = [update.name for update in self.updates if any(t.is_meta for t in update.tensors)]
        if empty:
            raise ValueError(f"{empty[0]} is on the meta device and has no values yet: load first")
        bases = [updates.base_of(update) for update in self.updates]
        self._bases = [base for base, _ in bases]
        rows = zip(self.updates, bases, strict=True)
        self._row_norms = {u.name: norms for u, (_, norms) in rows if norms is not None}
        sizes = {row.name: row.relative_spectral for row in self._rows(self._measure())}
        self.judge = Judge(thresholds or Thresholds(), every, sizes)
        self.history: list[Reading] = []
        self._steps = 0
        self._rewards: list[Any] = []  # since the last check
        self._kls: list[Any] = []
        self._pending: Check | None = None

    # -- in the loop -------------------------------------------------------------------------------

    def step(self, reward: Any = None, kl: Any = None) -> Reading | None:
        """Call after each optimizer step, on every process: a reading, if there is a new one.

        reward, kl: numbers, or tensors with one element, that go into the reading; the KL is that
        of the step, in nats a token. The highest of all steps count, so pass them at every one.
        """
        step, self._steps = self._steps, self._steps + 1
        self._rewards += [] if reward is None else [reward]
        self._kls += [] if kl is None else [kl]
        if self._steps % self.every:
            return None
        self._note_unseen()
        check = (step, *_to_host(self._measure()), self._rewards, self._kls)
        self._rewards, self._kls = [], []
        return self._next(check)

    def after(self, step: _Step) -> Sequence[str]:
        """`step` for `grpo.train`: an alarm while the model's state is one that ruins it."""
        reading = self.step(step.reward, step.kl)
        if reading is None or reading.state not in states.ALARMS:
            return ()
        return (f"{reading.state}: {reading.evidence}",)

    def finish(self) -> Reading | None:
        """The reading that still waits on the device, if there is one."""
        return self._next(None)

    def _next(self, check: Check | None) -> Reading | None:
        if self.delayed:
            self._pending, check = check, self._pending
        if check is None:
            return None
        step, values, copied, rewards, kls = check
        if copied is not None:
            copied.synchronize()
        reading = self._read(step, values, _numbers(rewards), _numbers(kls))
        self.history.append(reading)
        old = len(self.history) - max(ROWS_KEPT // len(self.updates), 1) - 1
        if old >= 0:
            self.history[old] = replace(self.history[old], rows=())
        return reading

    def _note_unseen(self) -> None:
        """Adapters that came or went since the start, into `not_watched`; warns of new ones."""
        unseen = updates.unseen(self._model, self.updates)
        new = [name for name, why in unseen.items() if self.not_watched.get(name) != why]
        self.not_watched.update(unseen)
        if new:
            warnings.warn(
                f"the monitor does not watch {few(new)}: {unseen[new[0]]} (see not_watched)",
                stacklevel=3,
            )

    @torch.inference_mode(False)
    def _measure(self) -> Tensor:
        with torch.autocast(self.updates[0].tensors[0].device.type, enabled=False):
            return updates.measure(self.updates, self._row_norms)

    def _rows(self, values: Tensor) -> list[Row]:
        every = zip(self.updates, self._bases, values.tolist(), strict=True)
        return [states.row_of(update, base, *seen) for update, base, seen in every]

    def _read(self, step: int, values: Tensor, rewards: list[float], kls: list[float]) -> Reading:
        rows, state, evidence = self.judge.look(self._rows(values), rewards, kls)
        reward, kl = (told[-1] if told else None for told in (rewards, kls))
        judged = [row for row in rows if row.state != NOT_JUDGED]
        bands = {name: states.band([getattr(row, name) for row in judged]) for name in MEASURES}
        return Reading(step, state, evidence, bands, rows, reward, kl)

    # -- keeping -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if there had been no break: dicts, lists,
        numbers, texts and tensors. Waits for a check that is still on the device."""
        pending = None
        if self._pending is not None:
            step, values, copied, rewards, kls = self._pending
            if copied is not None:
                copied.synchronize()
            pending = [step, values, _numbers(rewards), _numbers(kls)]
        return {
            "every": self.every,
            "modules": [update.name for update in self.updates],
            "steps": self._steps,
            "told": [_numbers(self._rewards), _numbers(self._kls)],
            "judge": self.judge.state_dict(),
            "history": [asdict(reading) for reading in self.history],
            "pending": pending,
            "starts": {u.name: u.start for u in self.updates if u.start is not None},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a state. ValueError for that of a monitor with other modules or checks."""
        here = {"every": self.every, "modules": [update.name for update in self.updates]}
        for name, value in here.items():
            if state[name] != value:
                raise ValueError(
                    f"the state is of another monitor: its {name} is {state[name]!r}, and here "
                    f"{value!r}"
                )
        for update in self.updates:
            if update.start is not None:
                start = state["starts"][update.name].to(update.start.device)
                update.start.copy_(sharded_as(update.start, start))
        self._bases = [
            base if update.start is None else updates.base_of(update)[0]
            for update, base in zip(self.updates, self._bases, strict=True)
        ]
        self._steps = state["steps"]
        self._rewards, self._kls = map(list, state["told"])
        self.judge.load_state_dict(state["judge"])
        self.history = [_reading(kept) for kept in state["history"]]
        pending = state["pending"]
        self._pending = None
        if pending is not None:
            step, values, rewards, kls = pending
            self._pending = (step, values, None, rewards, kls)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the history, one JSON object a reading, on the first process. The file is replaced
        at once."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            lines = [json.dumps(reading.to_dict(), allow_nan=False) for reading in self.history]
            write_atomically(Path(path), "".join(f"{line}\n" for line in lines).encode())


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """The values on the host, and what to wait for before they are read."""
    if not values.is_cuda:
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _reading(kept: dict[str, Any]) -> Reading:
    rows = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in kept["rows"])
    bands = {name: (band[0], band[1], band[2]) for name, band in kept["bands"].items()}
    return Reading(**{**kept, "rows": rows, "bands": bands})
