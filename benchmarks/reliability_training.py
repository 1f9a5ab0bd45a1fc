"""Memory over thousands of training steps, and merging over thousands of cycles.

leak    A small model with LoRA, DoRA and QuanTA layers is trained with AdamW, on merged weights
        now and then, watched by a spectral monitor's checks at the end of each stretch, saved and
        loaded; the resident memory after every 100 steps, from 1,000 on, has a slope (least
        squares). It must be below 1 kB a step. The same with a list that keeps 4 kB of every step
        must be found: a measure that cannot find a leak proves nothing. Each in its own process.
merges  Every adapter in fp32 and bf16, moved before each of 1,000 cycles of merge and unmerge: the
        bytes of every frozen weight after each cycle are those before the first.
"""

import gc
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from every_adapter import ADAPTERS

import structadapt as sa
from structadapt.adapters import Adapter

LIMIT = 1000.0  # bytes a step
WARM_UP, EVERY = 1000, 100  # steps
LEAK = 4096  # bytes a step, seeded


def model_of(*adapters: Adapter) -> nn.Module:
    """One block for each adapter."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in adapters]
    model = nn.Sequential(*blocks)
    for i, adapter in enumerate(adapters):
        sa.adapt(model, adapter, rf"{i}\.\d")
    return model


# -- leak ------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares, bytes a step."""
    n = len(points)
    x, y = (sum(column) / n for column in zip(*points, strict=True))
    over = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / over


def train(steps: int, warm_up: int, leak: int) -> dict[str, Any]:
    """Memory while a model is trained; `leak` bytes of every step are kept."""
    torch.set_num_threads(1)
    model = model_of(sa.LoRA(rank=4), sa.DoRA(rank=4), sa.QuanTA(axes=3))
    optimizer = torch.optim.AdamW(sa.adapter_parameters(model), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    kept: list[bytearray] = []
    points: list[tuple[int, int]] = []
    objects: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        for step in range(1, warm_up + steps + 1):
            x = torch.randn(16, 32, generator=generator)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                with torch.no_grad(), sa.merged(model):
                    model(x)
            if step % EVERY == 0:
                sa.save(model, path)
                sa.load(model, path)
                sa.spectra.Monitor(model, every=1).step()
            if leak:
                kept.append(bytearray(b"x" * leak))
            if step >= warm_up and step % EVERY == 0:
                gc.collect()
                points.append((step, resident()))
                objects.append(len(gc.get_objects()))
    return {
        "steps": steps, "warm_up": warm_up, "leak": leak, "bytes_a_step": slope(points),
        "resident_mib": points[-1][1] / 2**20, "objects": objects[-1] - objects[0],
    }  # fmt: skip


def measure_leak(steps: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Without a leak and with one, each in a process of its own."""
    return {
        name: _child("train", steps, warm_up, leak)
        for name, leak in (("clean", 0), ("seeded", LEAK))
    }


def _child(name: str, *arguments: int) -> Any:
    program = [sys.executable, __file__, name, *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- merges ----------------------------------------------------------------------------------------


def digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def merge_cycles(adapter: Adapter, dtype: torch.dtype, cycles: int) -> int:
    """In how many of the cycles a bit of a frozen weight, or of an output, was another one."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32, bias=False)).to(dtype)
    model = sa.adapt(base, adapter)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = digest(frozen)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    drifted = 0
    with torch.no_grad():
        with sa.disabled(model):
            expected = digest([model(x)])
        for _ in range(cycles):
            for p in sa.adapter_parameters(model):
                p.add_(torch.randn(p.shape, generator=generator), alpha=1e-3)
            sa.merge(model, force=True)
            model(x)
            sa.unmerge(model)
            with sa.disabled(model):
                same = digest([model(x)]) == expected
            drifted += digest(frozen) != before or not same
    return drifted


def measure_merges(
    so_far: dict[str, Any] | None, cycles: int, keep: Callable[[Any], None]
) -> dict[str, Any]:
    found = so_far or {"cycles": cycles, "drifted": {}, "seconds": 0.0}
    for adapter in ADAPTERS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{adapter}, {dtype}"
            if name not in found["drifted"]:
                began = time.perf_counter()
                found["drifted"][name] = merge_cycles(adapter, dtype, found["cycles"])
                found["seconds"] += time.perf_counter() - began
                keep(found)
    return found


# -- the table -------------------------------------------------------------------------------------


def leak_rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    clean, seeded = found["clean"], found["seeded"]
    said = (
        f"{clean['bytes_a_step']:,.0f} bytes a step over {clean['steps']:,} steps; with a leak of "
        f"{seeded['leak']:,} bytes a step, {seeded['bytes_a_step']:,.0f}"
    )
    met = clean["bytes_a_step"] < LIMIT < seeded["bytes_a_step"]
    return [("memory over training steps", "< 1,000 bytes a step, a leak is found", said, met)]


def merge_rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    drifted = sum(found["drifted"].values())
    said = (
        f"{len(found['drifted'])} adapters and dtypes, {found['cycles']:,} cycles each: "
        f"{drifted} with another bit"
    )
    return [("merge and unmerge, fp32 and bf16", "0 bits", said, not drifted)]


if __name__ == "__main__":
    print(json.dumps(train(*map(int, sys.argv[2:]))))
