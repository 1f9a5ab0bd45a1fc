"""One cell on several processes of one machine: adapters replicated, a base that trains sharded.

    torchrun --standalone --nproc-per-node=8 -m structadapt.study.distributed FOLDER

FOLDER is the cell's, with its cell.json. `structadapt study run` starts this for a cell with
processes > 1.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from structadapt.study.cell import Cell


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
    """Every parameter, whole and on the CPU; tied ones once. Collective where it is sharded."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, p in model.named_parameters():
        value = p.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            found[name] = whole.to("cpu", copy=True)
    return found


def launch(cell: Cell, folder: Path, threads: int, save: bool) -> None:
    """Run a cell in processes of its own, and wait. RuntimeError if they end without a result."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={cell.processes}", "-m", "structadapt.study.distributed", str(folder),
        "--threads", str(threads), *["--no-save"] * (not save),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode and not (folder / "error.json").exists():
        raise RuntimeError(f"torchrun ended with {done.returncode}; its output says why")


@contextmanager
def group(cell: Cell) -> Iterator[None]:
    """The process group of a cell, where torchrun started this process."""
    if "RANK" not in os.environ:
        with nullcontext():
            yield
        return
    cuda = cell.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> int:
    from structadapt.study.runs import CELL, run  # which imports this module

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stored: dict[str, Any] = json.loads((args.folder / CELL).read_text())
    names = {f.name for f in fields(Cell)}
    cell = Cell(**{k: v for k, v in stored.items() if k in names})
    with group(cell):
        run(cell, args.folder, save=not args.no_save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
