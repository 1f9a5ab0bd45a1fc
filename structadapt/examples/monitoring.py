"""The spectral monitor in the example."""

from pathlib import Path
from typing import Any

from torch import nn

import structadapt as sa


def watch(model: nn.Module, every: int, full: bool) -> sa.spectra.Monitor | None:
    """A monitor of the model, or None for every = 0. `full`: all the weights train."""
    return sa.spectra.Monitor(model, every, snapshots=full) if every else None


def write(monitor: sa.spectra.Monitor | None, out: Path) -> None:
    """Every reading so far to monitor.jsonl."""
    if monitor is not None:
        monitor.to_jsonl(out / "monitor.jsonl")


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
