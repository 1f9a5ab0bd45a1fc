"""One cell on several processes of one machine: adapters replicated, a base that trains sharded.

    torchrun --standalone --nproc-per-node=8 -m structadapt.study.distributed FOLDER --launcher PID

FOLDER is the cell's, with its cell.json. `structadapt study run` starts this for a cell with
processes > 1, and these processes end when the one that started them does.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from structadapt.study import folders
from structadapt.study.cell import Cell

STOP = ".stop"  # in the cell's folder: the processes end after their step


class StoppedError(Exception):
    """The run was asked to stop, and goes on from its last state the next time."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(flag: bool) -> bool:
    """Whether any process says so: all of them stop, or none does."""
    if not dist.is_initialized():
        return flag
    flags: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


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
    from torch.distributed.tensor import DTensor

    found = {}
    for name, p in model.named_parameters():
        value = p.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            found[name] = whole.to("cpu", copy=True)
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
        f"--nproc-per-node={cell.processes}", "-m", "structadapt.study.distributed", str(folder),
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if cell.device == "cuda" else "gloo")
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


def main() -> int:
    from structadapt.study.runs import run  # which imports this module

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--launcher", type=int, default=os.getpid(), help="ends when this one does")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cell = folders.cell_in(args.folder)

    def stop() -> bool:
        return (args.folder / STOP).exists() or not is_alive(args.launcher)

    with group(cell):
        try:
            run(cell, args.folder, stop=stop, save=not args.no_save)
        except StoppedError:  # no failure, or torchrun would call it one
            (args.folder / STOP).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
