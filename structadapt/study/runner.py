"""Work through the cells of a grid.

The folders are the queue. A worker takes the first cell that is neither done, nor failed, nor held
by another process, runs it, and looks again; so any number of workers, also on several machines
that share the folder, started together or one after another, do every cell once.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from structadapt.study import distributed, folders
from structadapt.study.cell import Cell
from structadapt.study.distributed import StoppedError
from structadapt.study.folders import ERROR, SUMMARY, Status, folder_of
from structadapt.study.runs import run

TRIES = 3  # deaths of a process in a row, without a new state of its cell
ENDED = (folders.DONE, folders.FAILED)


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

    A cell whose process died is tried again, `TRIES` times unless it gets further in between.
    """
    failed = 0
    for cell in cells:
        folder = folder_of(out, cell)
        if _has_ended(folder):
            continue
        with folders.claimed(folder) as lock:
            if lock is None or _has_ended(folder):
                continue
            with folders.held(folder) as deaths:
                try:
                    if deaths >= TRIES:
                        raise RuntimeError(f"its process died {deaths} times; out of memory?")
                    if cell.processes > 1:
                        threads = torch.get_num_threads()
                        distributed.launch(cell, folder, lock, threads, save, stop)
                    else:
                        run(cell, folder, stop=stop, tell=partial(tell, cell), save=save)
                except StoppedError:
                    raise
                except Exception as error:  # the others go on
                    told = f"{type(error).__name__}: {error}"
                    folders.fail(folder, told, traceback.format_exc())
                    failed += 1
        if stop():
            raise StoppedError("between two cells")
    return failed


def _has_ended(folder: Path) -> bool:
    return (folder / SUMMARY).exists() or (folder / ERROR).exists()


# -- local workers ---------------------------------------------------------------------------------


def workers(
    command: Sequence[str], cells: Sequence[Cell], out: Path, devices: Sequence[str | None],
    tell: Callable[[list[Status]], None], seconds: float = 2.0,
) -> None:  # fmt: skip
    """Run a process of one command for each of `devices` until all end, telling the status now and
    then.

    devices: CUDA_VISIBLE_DEVICES of each; None: as it is. A worker that is killed is replaced, and
    its cell tried again, a few times (see `work`). KeyboardInterrupt is passed on: the workers end
    after their step.
    """
    alive = {_start(command, device): device for device in devices}
    left, ended, fruitless = list(cells), [], 0
    try:
        while alive:
            time.sleep(seconds)
            found = folders.status(left, out)
            news = [s for s in found if s.state in ENDED]
            ended += news
            left = [s.cell for s in found if s.state not in ENDED]
            fruitless = 0 if news else fruitless
            for worker in [w for w in alive if w.poll() is not None]:
                device = alive.pop(worker)
                if worker.returncode < 0 and fruitless < TRIES * len(devices):
                    fruitless += 1
                    alive[_start(command, device)] = device
            tell([*ended, *(s for s in found if s not in news)])
    except KeyboardInterrupt:
        _end(list(alive), signal.SIGINT)
        raise
    except BaseException:
        _end(list(alive), signal.SIGKILL)
        raise


def devices_for(cells: Sequence[Cell], count: int | None) -> Sequence[str | None]:
    """What each local worker sees of the GPUs: as many as a cell has processes, and no other
    worker the same. ValueError for a cell that needs more than there are."""
    processes = max(cell.processes for cell in cells)
    if not any(cell.device == "cuda" for cell in cells):
        cores = os.cpu_count() or 1
        return [None] * min(count or max(min(cores // processes, 8), 1), len(cells))
    gpus = torch.cuda.device_count()
    if gpus < processes:
        raise ValueError(f"a cell needs {processes} GPUs, and there are {gpus}")
    most = gpus // processes
    shares = [range(i * processes, (i + 1) * processes) for i in range(min(count or most, most))]
    return [",".join(map(str, share)) for share in shares][: len(cells)]


def _start(command: Sequence[str], device: str | None) -> subprocess.Popen[bytes]:
    group = 0 if os.name == "posix" else None  # of its own: Ctrl-C comes to us alone
    seen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, process_group=group,
        env={**os.environ, **seen},
    )  # fmt: skip


def _end(alive: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in alive:
        with suppress(ProcessLookupError):
            worker.send_signal(number)
    for worker in alive:
        worker.wait()


def orphaned(parent: int) -> bool:
    """Whether the process that started this one is gone."""
    return os.getppid() != parent
