"""The spectral monitor in the example."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import structadapt as sa
from structadapt.examples.process import append, read_log, write_log


def watch(model: nn.Module, every: int, full: bool) -> sa.spectra.Monitor | None:
    """A monitor of the model, or None for every = 0. `full`: all the weights train."""
    return sa.spectra.Monitor(model, every, snapshots=full) if every else None


@dataclass
class ReadingLog:
    """The readings of a monitor, a line of JSON each, also of a run that was stopped."""

    monitor: sa.spectra.Monitor | None
    path: Path
    written: int | None = None  # readings; None: the file is as an earlier process left it

    def write(self) -> None:
        """Append the readings that are new. The first time, the file gets those of the monitor's
        history, which may end before its own last lines or after them; of old readings the file
        has more than the history."""
        if self.monitor is None or not self.monitor.history:
            return
        readings = self.monitor.history
        if self.written is None:
            there = {record["step"]: record for record in read_log(self.path)}
            write_log(self.path, (there.get(r.step, r.to_dict()) for r in readings))
        else:
            append(self.path, [reading.to_dict() for reading in readings[self.written :]])
        self.written = len(readings)


def history(monitor: sa.spectra.Monitor | None) -> list[dict[str, Any]]:
    """Every reading so far, as JSON has it."""
    return [reading.to_dict() for reading in monitor.history] if monitor else []


def summary(monitor: sa.spectra.Monitor | None) -> dict[str, Any] | None:
    """The last state with its evidence, and the first step of each state that there was."""
    if monitor is None or not monitor.history:
        return None
    last, first = monitor.history[-1], {}
    for reading in monitor.history:
        first.setdefault(reading.state, reading.step)
    return {"state": last.state, "evidence": last.evidence, "first": first}
