"""The part of a run's state that is spread over processes, whatever its size: DTensors in files of
torch.distributed.checkpoint, of which each process writes and reads its own part."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structadapt.grpo import processes

FOLDER = "shards"


@dataclass(frozen=True)
class Sharded:
    """A tensor that stands in these files."""

    name: str
    dtype: torch.dtype


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def write(tensors: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Write every process's part to an empty folder that all of them see; {file: sha256} of all
    files. All processes call this together."""
    from torch.distributed.checkpoint.state_dict_saver import save  # its import is felt

    rank, size = processes.rank_and_size()
    save(tensors, checkpoint_id=folder, no_dist=size == 1)
    own = {p.name: _digest(p) for p in sorted(folder.iterdir())[rank::size]}
    return {name: digest for some in processes.gather(own) for name, digest in some.items()}


def is_whole(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether this process's share of the files is as it was written."""
    rank, size = processes.rank_and_size()
    own = sorted(digests)[rank::size]
    try:
        return all(_digest(folder / name) == digests[name] for name in own)
    except OSError:
        return False


def read(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill DTensors with what was written, however it was sharded then. A collective call."""
    from torch.distributed.checkpoint.state_dict_loader import load

    load(tensors, checkpoint_id=folder, no_dist=processes.rank_and_size()[1] == 1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
