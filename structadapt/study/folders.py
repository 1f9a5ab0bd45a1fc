"""The folder of a study and those of its cells: what is in them, and where each cell stands.

grid.toml        the grid, as it was last run
bases/           cold-started models and their accuracy, shared by the cells
cells/NAME/      one a cell:
    cell.json        what decides the result
    metrics.jsonl    one record a step
    monitor.jsonl    the spectra of the update while it trained
    spectra/         those of the update at the end (`spectra.Report.load`)
    adapter.safetensors    what was trained; model.safetensors of full fine-tuning
    states/          of a run that is not finished
    summary.json     written last: the cell is done
    error.json       in its place: what ended a run that failed
    .lock, .held     of the process that works on it
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from structadapt.examples.process import read_json, strict
from structadapt.files import is_locked, locked, write_atomically
from structadapt.study.cell import Cell
from structadapt.study.grid import Grid

GRID, CELLS, BASES, JOBS = "grid.toml", "cells", "bases", "jobs"
CELL, STEPS, MONITOR, SPECTRA = "cell.json", "metrics.jsonl", "monitor.jsonl", "spectra"
SUMMED = (  # what a summary says at least
    "before", "after", "collapsed", "absorbed_at", "failure", "steps", "first_kl", "cold_start",
    "monitor", "seconds", "versions", "python", "threads",
)  # fmt: skip
SUMMARY, ERROR, STATES = "summary.json", "error.json", "states"
LOCK, HELD = ".lock", ".held"
DONE, FAILED, RUNNING, HALTED, WAITING = "done", "failed", "running", "stopped", "waiting"


@dataclass(frozen=True)
class Status:
    """Where a cell stands."""

    cell: Cell
    state: str  # done, failed, running, stopped (goes on from its last state), or waiting
    step: int = 0  # steps taken, of those written
    steps: int = 0
    result: str = ""  # accuracy at the end, or the error


def folder_of(out: Path, cell: Cell) -> Path:
    """Where a cell's files are."""
    return out / CELLS / cell.id


def check(out: Path) -> None:
    """NotADirectoryError or FileExistsError for what cannot become the folder of a study."""
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, and a study is a folder: choose another name")
    own = {GRID, CELLS, BASES, JOBS}
    if out.is_dir() and not (out / GRID).is_file():
        others = sorted(p.name for p in out.iterdir() if p.name not in own and p.name[0] != ".")
        if others:
            raise FileExistsError(
                f"{out} exists and holds no study ({', '.join(others[:3])}): choose another name"
            )


def prepare(grid: Grid, out: Path) -> None:
    """Make the folder of a study, or add this grid's cells to the one that is there. Raises what
    `check` raises."""
    check(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / GRID, grid.text.encode())
    (out / CELLS).mkdir(exist_ok=True)


def note(cell: Cell, folder: Path) -> None:
    """Make the folder of a cell and write down what it is. ValueError for one that holds another
    cell."""
    folder.mkdir(parents=True, exist_ok=True)
    here = json.loads(strict(cell.describe()))
    if (folder / CELL).exists():
        stored = (read_json(folder / CELL) or {}).get("parts", {})
        for name in here:
            if stored.get(name) != here[name]:
                raise ValueError(
                    f"{folder} holds another cell: its {name} is {stored.get(name)!r}, here "
                    f"{here[name]!r}"
                )
    write(folder / CELL, {"id": cell.id, **asdict(cell), "parts": here})


def cell_in(folder: Path) -> Cell:
    """The cell of a folder. ValueError for a cell.json that holds none."""
    stored = read_json(folder / CELL) or {}
    try:
        return Cell(**{k: stored[k] for k in Cell.__dataclass_fields__ if k in stored})
    except TypeError as error:
        raise ValueError(f"{folder / CELL}: {error}") from None


def summary_in(folder: Path) -> dict[str, Any] | None:
    """What came of the run of a folder, or None while it has not ended. ValueError for a
    summary.json that does not say it."""
    path = folder / SUMMARY
    if (found := read_json(path)) is None:
        return None
    missing = [name for name in SUMMED if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}")
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """A file of strict JSON."""
    write_atomically(path, f"{strict(content, indent=1)}\n".encode())


def fail(folder: Path, error: str, traceback: str = "") -> None:
    """Say what ended a run. The first cause stands: others come of it."""
    if not (folder / ERROR).exists():
        write(folder / ERROR, {"error": error, "traceback": traceback})


# -- where cells stand -----------------------------------------------------------------------------


def status(cells: Iterable[Cell], out: Path) -> list[Status]:
    """Where every cell stands, from its folder alone."""
    return [status_of(cell, folder_of(out, cell)) for cell in cells]


def status_of(cell: Cell, folder: Path) -> Status:
    """Where one cell stands."""
    steps = -(-cell.prompts // cell.batch)
    if (summary := summary_in(folder)) is not None:
        after = summary["after"]
        said = f"{after['sampled']:.3f}" if after else str(summary["failure"])
        said += ", collapsed" if summary["collapsed"] else ""
        return Status(cell, DONE, summary["steps"], steps, said)
    taken = _lines(folder / STEPS)
    if (error := read_json(folder / ERROR)) is not None:
        return Status(cell, FAILED, taken, steps, error["error"])
    if is_locked(folder / LOCK):
        return Status(cell, RUNNING, taken, steps)
    started = (folder / CELL).exists()
    return Status(cell, HALTED if started else WAITING, taken, steps)


def forget_failures(cells: Iterable[Cell], out: Path) -> int:
    """Let cells that failed be tried again, from their last state; how many."""
    count = 0
    for cell in cells:
        path = folder_of(out, cell) / ERROR
        count += path.exists()
        path.unlink(missing_ok=True)
        (path.parent / HELD).unlink(missing_ok=True)
    return count


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# -- who works on them -----------------------------------------------------------------------------


def claimed(folder: Path) -> AbstractContextManager[IO[str] | None]:
    """The lock of a cell's folder if this process holds it now, else None; while it does, no other
    one can."""
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / LOCK, wait=False)


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Note in a claimed folder that its run goes on, until it ends by itself: how many processes
    have died meanwhile without a new state in between."""
    path = folder / HELD
    newest = max((p.name for p in (folder / STATES).glob("s*")), default="")
    before = read_json(path) or {"deaths": -1, "newest": newest}
    deaths = before["deaths"] + 1 if before["newest"] == newest else 0
    write(path, {"deaths": deaths, "newest": newest})
    try:
        yield deaths
    finally:
        path.unlink(missing_ok=True)
