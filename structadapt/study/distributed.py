"""One cell on several processes of one machine: adapters replicated, a base that trains sharded.

`structadapt study run` starts them with torchrun for a cell with processes > 1 (see `one_cell`).
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from structadapt.adapted import whole
from structadapt.grpo import processes
from structadapt.study import folders
from structadapt.study.cell import Cell

STOP = ".stop"  # in the cell's folder: the processes end after their step


class StoppedError(Exception):
    """The run was asked to stop, and goes on from its last state the next time."""


def device_of(cell: Cell) -> str:
    """Each process of a cell has a GPU of its own."""
    if cell.device == "cuda" and dist.is_initialized():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return cell.device


def shard(model: nn.Module) -> None:
    """`fully_shard` every block of the model, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for block in module:
            fully_shard(block)
    fully_shard(model)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole and on the CPU of the first process; tied ones once. Collective where
    it is sharded."""
    found = {}
    for name, p in model.named_parameters():
        value = whole(p.detach())
        if processes.rank_and_size()[0] == 0:
            found[name] = value.to("cpu", copy=True)
    return found


def launch(
    cell: Cell, folder: Path, lock: IO[str], threads: int, save: bool, stop: Callable[[], bool]
) -> None:
    """Run a cell in processes of its own, and wait.

    lock: of the folder, which they hold too. Raises StoppedError if `stop` says so, RuntimeError if
    they end without a result.
    """
    folders.note(cell, folder)
    (folder / STOP).unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={cell.processes}", "-m", "structadapt.study.one_cell", str(folder),
        "--threads", str(threads), "--launcher", str(os.getpid()), *["--no-save"] * (not save),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()],
                               process_group=0)  # fmt: skip
    try:
        while process.poll() is None:
            if stop():
                (folder / STOP).touch()
            time.sleep(0.2)
    except BaseException:
        process.terminate()  # torchrun ends its processes
        process.wait()
        raise
    if (folder / folders.SUMMARY).exists():
        return
    if (folder / STOP).exists() and not process.returncode:
        (folder / STOP).unlink()
        raise StoppedError(cell.id)
    raise RuntimeError(f"torchrun ended with {process.returncode}; its output says why")


@contextmanager
def group(cell: Cell) -> Iterator[None]:
    """The process group of a cell, in a process that torchrun started."""
    if cell.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if cell.device == "cuda" else "gloo"
    # torchrun ends them all when one dies; a long wait is for another cell's look at the base.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_alive(process: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
