"""What a check of the spectral monitor costs beside a training step, on a CPU.

    python benchmarks/monitor_cpu.py            about two minutes and 4 GiB; writes the JSON
    python benchmarks/monitor_cpu.py --smoke    small layers, to see that it runs
    python benchmarks/monitor_cpu.py --table    the table of docs/monitor.md from the JSON

The 224 linear layers of an 8B model (32 blocks of q, o 4096x4096, k, v 1024x4096, gate, up
14336x4096, down 4096x14336), each with an adapter of its own. The frozen weights of all blocks are
those of the first: the monitor reads them once, at the start, and that cost stands apart.

check   Monitor.step of all layers, with the states.
step    Forward and backward of the seven layers of one block over 512 tokens, to their inputs and
        to the adapters' tensors, times 32. Attention, norms and the optimizer are left out.
low     The same of the adapters' low-rank products alone, without the frozen weights.
start   The norms of the frozen weights, once: those of one block, times 32.

Check, step and low take turns, and the ratios are medians over the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import script
import torch
from torch import Tensor, nn

import structadapt as sa
from structadapt.adapters import Adapter
from structadapt.layers import find_adapted
from structadapt.spectra import updates

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "monitor_cpu.json"
BLOCKS, TOKENS, ROUNDS = 32, 512, 3
SHAPES = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
ADAPTERS: dict[str, Adapter] = {
    "LoRA r=16": sa.LoRA(16, 32.0),
    "DoRA r=16": sa.DoRA(16, 32.0),
    "QuanTA 3 axes": sa.QuanTA(3),
}


def model_of(adapter: Adapter, weights: dict[str, Tensor]) -> nn.Module:
    """Every block has the same frozen weights and adapters of its own, moved off their start."""
    blocks = nn.ModuleList()
    for _ in range(BLOCKS):
        block = nn.ModuleDict()
        for name, weight in weights.items():
            block[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            block[name].weight = nn.Parameter(weight)
        blocks.append(block)
    sa.adapt(blocks, adapter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sa.adapter_parameters(blocks):
            p.add_(torch.randn(p.shape, generator=generator), alpha=1e-3)
    return blocks


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def started(model: nn.Module) -> tuple[sa.spectra.Monitor, float]:
    """A monitor, and the seconds that the norms of the frozen weights of all blocks take: those of
    the first block, times the number of blocks."""
    known: dict[int, Any] = {}
    seconds: list[float] = []
    real = updates.base_of

    def once(update: updates.Tracked) -> Any:
        assert update.layer is not None
        key = update.layer.frozen_weight.data_ptr()
        if key not in known:
            seconds.append(timed(lambda: known.__setitem__(key, real(update))))
        return known[key]

    with mock.patch.object(updates, "base_of", once):
        monitor = sa.spectra.Monitor(model, every=1)
    return monitor, BLOCKS * sum(seconds)


def measure(name: str, weights: dict[str, Tensor], tokens: int, rounds: int) -> dict[str, Any]:
    adapter = ADAPTERS[name]
    model = model_of(adapter, weights)
    monitor, start = started(model)
    layers = list(find_adapted(model).values())[: len(weights)]
    inputs = [torch.randn(tokens, layer.matrix().shape[1]) for layer in layers]

    def step() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            y = layer(x.requires_grad_())
            y.backward(torch.ones_like(y))

    def low() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            y = (x.requires_grad_() @ layer.tensors()["A"].T) @ layer.tensors()["B"].T
            y.backward(torch.ones_like(y))

    monitor.step()
    rows = []
    for _ in range(rounds):
        row = {"check": timed(monitor.step), "step": BLOCKS * timed(step)}
        rows.append(
            row | ({"low": BLOCKS * timed(low)} if "LoRA" in name or "DoRA" in name else {})
        )
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    ratio = statistics.median(row["check"] / row["step"] for row in rows)
    count = len(monitor.updates)
    return {
        "adapter": name,
        "modules": count,
        "start": start,
        **found,
        "ratio": ratio,
        "rounds": rows,
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| adapter | check, s | step, s | check / step | every N for 1 % | start, s |"]
    lines.append("|" + "---|" * 6)
    for row in results["rows"]:
        every = max(1, -(-row["ratio"] // 0.01))
        lines.append(
            f"| {row['adapter']} | {row['check']:.2f} | {row['step']:.0f} | {row['ratio']:.3%} | "
            f"{every:.0f} | {row['start']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    shrink = 32 if args.smoke else 1
    shapes = {name: (o // shrink, i // shrink) for name, (o, i) in SHAPES.items()}
    weights = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    there = json.loads(RESULTS.read_text())["rows"] if args.only and RESULTS.exists() else []
    names = [name for name in ADAPTERS if args.only in name]
    rows = [measure(name, weights, TOKENS // shrink, ROUNDS) for name in names]
    rows = sorted([r for r in there if r["adapter"] not in names] + rows,
                  key=lambda r: list(ADAPTERS).index(r["adapter"]))  # fmt: skip
    results = {
        "rows": rows, "blocks": BLOCKS, "tokens": TOKENS, "dtype": "float32",
        "machine": machine.record(("torch",)) | {"threads": torch.get_num_threads()},
    }  # fmt: skip
    print(table(results))
    if not args.smoke:
        script.write(RESULTS, results)


if __name__ == "__main__":
    main()
