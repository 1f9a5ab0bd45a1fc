"""Work through the cells of a grid: which are done, and workers that take the next one.

The folders are the queue. A worker takes the first cell that is neither done, nor failed, nor held
by another process, runs it, and looks again; so any number of workers, also on several machines
that share the folder, started together or one after another, do every cell once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from structadapt.files import write_atomically
from structadapt.study import distributed
from structadapt.study.cell import Cell
from structadapt.study.grid import Grid
from structadapt.study.runs import (
    CELL,
    ERROR,
    STEPS,
    SUMMARY,
    StoppedError,
    claimed,
    held,
    note,
    run,
    write,
)

GRID, CELLS = "grid.toml", "cells"
TRIES = 3  # deaths of a process at the same step of a cell
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


def prepare(grid: Grid, out: Path) -> None:
    """Make the folder of a study, or add this grid's cells to the one that is there.

    FileExistsError for a folder that holds something else.
    """
    if out.exists() and not (out / GRID).is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and holds no study: choose another name")
    (out / CELLS).mkdir(parents=True, exist_ok=True)
    write_atomically(out / GRID, grid.text.encode())


def status(cells: Iterable[Cell], out: Path) -> list[Status]:
    """Where every cell stands, from its folder alone."""
    return [_status(cell, folder_of(out, cell)) for cell in cells]


def _status(cell: Cell, folder: Path) -> Status:
    steps = -(-cell.prompts // cell.batch)
    if (summary := _json(folder / SUMMARY)) is not None:
        after = summary["after"]
        said = f"{after['sampled']:.3f}" if after else str(summary["failure"])
        said += ", collapsed" if summary["collapsed"] else ""
        return Status(cell, DONE, summary["steps"], steps, said)
    if (error := _json(folder / ERROR)) is not None:
        return Status(cell, FAILED, _lines(folder / STEPS), steps, error["error"])
    if not (folder / CELL).exists():
        return Status(cell, WAITING, 0, steps)
    with claimed(folder) as free:
        return Status(cell, HALTED if free else RUNNING, _lines(folder / STEPS), steps)


def forget_failures(cells: Iterable[Cell], out: Path) -> int:
    """Let cells that failed be tried again, from their last state; how many."""
    count = 0
    for cell in cells:
        path = folder_of(out, cell) / ERROR
        count += path.exists()
        path.unlink(missing_ok=True)
    return count


def work(
    cells: Sequence[Cell],
    out: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[Cell, dict[str, Any], int], None] = lambda cell, record, total: None,
    save: bool = True,
) -> int:
    """Run cells until none is left to take; how many failed here. Their errors are in their
    folders. Raises StoppedError if `stop` says so.

    A cell whose process died is tried again; after `TRIES` deaths without a step in between it has
    failed.
    """
    failed = 0
    for cell in cells:
        folder = folder_of(out, cell)
        if (folder / SUMMARY).exists() or (folder / ERROR).exists():
            continue
        with claimed(folder) as mine:
            if not mine or (folder / SUMMARY).exists() or (folder / ERROR).exists():
                continue
            with held(folder) as deaths:
                if deaths >= TRIES:
                    told = f"its process died {deaths} times at one step; out of memory?"
                    write(folder / ERROR, {"error": told, "traceback": ""})
                    failed += 1
                    continue
                try:
                    if cell.processes > 1:
                        note(cell, folder)
                        distributed.launch(cell, folder, torch.get_num_threads(), save)
                    else:
                        run(cell, folder, stop=stop, tell=partial(tell, cell), save=save)
                except StoppedError:
                    raise
                except Exception:  # it stands in error.json; the others go on
                    failed += 1
        if stop():
            raise StoppedError("between two cells")
    return failed


# -- local workers ---------------------------------------------------------------------------------


def workers(
    command: Sequence[str], cells: Sequence[Cell], out: Path, count: int,
    tell: Callable[[list[Status]], None], seconds: float = 2.0,
) -> None:  # fmt: skip
    """Run `count` processes of one command until they end, telling the status now and then.

    A worker that is killed is replaced; its cell is tried again, a few times (see `work`).
    KeyboardInterrupt is passed on: the workers end after their step.
    """
    alive = [_start(command) for _ in range(count)]
    try:
        while alive:
            time.sleep(seconds)
            for worker in [w for w in alive if w.poll() is not None]:
                alive.remove(worker)
                if worker.returncode < 0:
                    alive.append(_start(command))
            tell(status(cells, out))
    except KeyboardInterrupt:
        _end(alive, signal.SIGINT)
        raise
    except BaseException:
        _end(alive, signal.SIGKILL)
        raise


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    group = 0 if os.name == "posix" else None  # of its own: Ctrl-C comes to us alone
    program = [sys.executable, "-m", *command]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, process_group=group)


def _end(alive: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in alive:
        with suppress(ProcessLookupError):
            worker.send_signal(number)
    for worker in alive:
        worker.wait()


def orphaned(parent: int) -> bool:
    """Whether the process that started this one is gone."""
    return os.getppid() != parent


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
