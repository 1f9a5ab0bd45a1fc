"""Grids, tiles and the tuned tables; importable without triton.

A table is `configs/<name>.json`: for every kernel a list of entries, each with the case it was made
for and the tile to use there,

    {"kernels": {"gemm": [{"case": {"rank": 16, "M": 8192, "N": 4096, "K": 4096},
                           "tile": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, ...}}]}}

A device has a table by its name, else one by its architecture (sm_80, sm_90, sm_100), else that of
the closest older architecture. The nearest entry wins, by the ratios of the sizes that it names; a
missing size matches any. There is no autotuning at run time: `benchmarks/gpu.py` writes the tables.
"""

import functools
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIGS = Path(__file__).parent / "configs"
ARCHITECTURES = (80, 90, 100)  # with a table of their own
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of the largest part; an upper bound for splits
Tile = dict[str, Any]
logger = logging.getLogger("structadapt")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


# -- tables ----------------------------------------------------------------------------------------


@functools.cache
def architecture(device: torch.device) -> int:
    """80 for sm_80 and so on: the newest one with a table that the device can run; 0 for a CPU."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:  # consumer Blackwell: less shared memory, and neither wgmma nor tcgen05
        return 80
    able = [arch for arch in ARCHITECTURES if arch <= 10 * major + minor]
    return max(able, default=0)


@functools.cache
def table(device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """{kernel: entries} of a device."""
    arch = architecture(device)
    if arch == 0:
        return read_table("interpreter")
    name = table_name(torch.cuda.get_device_name(device))
    if (CONFIGS / f"{name}.json").is_file():
        return read_table(name)
    logger.info("no tuned table for %s: the tiles of sm_%d are used", name, arch)
    return read_table(f"sm_{arch}")


def table_name(device_name: str) -> str:
    """The file name of a device's table: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def read_table(name: str) -> dict[str, list[dict[str, Any]]]:
    """{kernel: entries}; what a tuned table leaves out comes from its architecture's."""
    content = json.loads((CONFIGS / f"{name}.json").read_text())
    kernels: dict[str, list[dict[str, Any]]] = content["kernels"]
    if "inherits" in content:
        kernels = {**read_table(content["inherits"]), **kernels}
    return kernels


def tile(kernel: str, device: torch.device, **sizes: int) -> Tile:
    """The tile of the nearest entry to these sizes (rank, M, N, K, ...)."""
    return dict(_nearest(kernel, device, tuple(sorted(sizes.items()))))


@functools.cache
def _nearest(kernel: str, device: torch.device, sizes: tuple[tuple[str, int], ...]) -> Tile:
    return nearest(table(device)[kernel], dict(sizes))


def nearest(entries: list[dict[str, Any]], wanted: dict[str, int]) -> Tile:
    """The tile of the entry whose case is the closest, by the ratios of the sizes it names."""

    def distance(entry: dict[str, Any]) -> float:
        case = entry.get("case", {})
        named = [k for k in case if k in wanted]
        return sum(abs(math.log2(max(case[k], 1) / max(wanted[k], 1))) for k in named)

    found: Tile = min(entries, key=distance)["tile"]
    return found


def split(tile: Tile) -> tuple[Tile, dict[str, int]]:
    """A tile as (what the kernel takes, what the launch takes)."""
    launch = {k: v for k, v in tile.items() if k in ("num_warps", "num_stages")}
    return {k: v for k, v in tile.items() if k.isupper()}, launch


def splits(rows: int, block: int, others: int, device: torch.device, waves: int = 2) -> int:
    """Into how many parts to split a sum over `rows` so that `others` programs fill the device.

    A function of shapes and the architecture alone: the order of a sum never depends on the load.
    """
    fill = waves * MULTIPROCESSORS.get(architecture(device), 2)
    return max(1, min(cdiv(rows, block), fill // max(others, 1), 64))


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the tensors, which may not be the current one."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


# -- what a kernel can take ------------------------------------------------------------------------


def misfit(*tensors: Tensor | None) -> str | None:
    """Why tensors cannot be read in 16-byte pieces along the last dimension, or None."""
    for t in tensors:
        if t is None:
            continue
        if t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"a tensor {tuple(t.shape)} has strides {t.stride()}: the last has to be 1"
        numbers = 16 // t.element_size()
        if any(
            s % numbers or (not s and n > 1)
            for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True)
        ):
            return (
                f"a tensor {tuple(t.shape)} has strides {t.stride()}: all but the last have to be "
                f"positive multiples of {numbers} numbers (16 bytes)"
            )
        if not torch.compiler.is_compiling() and t.data_ptr() % 16:
            return f"a tensor {tuple(t.shape)} does not start at a multiple of 16 bytes"
    return None
