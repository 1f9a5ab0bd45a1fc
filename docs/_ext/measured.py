"""`{measured}`: the tables of measured numbers, from docs/results/*.json and by the functions of
the benchmarks, so that no number is typed.

    ```{measured} adapters_cpu
    ```
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
Results = dict[str, Any]


def benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


# -- tables that no benchmark makes ----------------------------------------------------------------


GPU_ROWS = {  # of benchmarks/gpu.py at 8192 tokens, 4096 x 4096
    "LoRA r=16": "lora/M8192 4096x4096 r16",
    "LoRA r=256": "lora/M8192 4096x4096 r256",
    "DoRA r=16": "dora/M8192 4096x4096 r16",
    "QuanTA 16 x 16 x 16": "quanta/M8192 4096x4096 16x16x16",
    "block, LoRA r=16": "block/LoRA M8192 r16",
    "block, DoRA r=16": "block/DoRA M8192 r16",
}
GPU_COLUMNS = {
    "ours": "structadapt",
    "peft bf16": "PEFT, bf16",
    "peft": "PEFT, fp32",
    "compile": "torch.compile",
    "einsum": "einsum",
}


def gpu(results: Results) -> str:
    """Forward / backward over the frozen linear, and how many MiB more than it at the peak."""
    lines = [
        f"| layer | measured | {' | '.join(GPU_COLUMNS.values())} |",
        f"|---|---|{'--:|' * len(GPU_COLUMNS)}",
    ]
    for label, key in GPU_ROWS.items():
        providers = results["cells"].get(key, {}).get("providers", {})
        for what, cell in (("time", time_over), ("memory, MiB", memory_over)):
            cells = [cell(providers, name) for name in GPU_COLUMNS]
            if any(cells):
                lines.append(f"| {label} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_over(providers: Results, name: str) -> str:
    ratio = providers.get(name, {}).get("ratio")
    return " / ".join(f"{ratio[way]['median']:.2f}" for way in ("fwd", "bwd")) if ratio else ""


def memory_over(providers: Results, name: str) -> str:
    if not providers.get(name, {}).get("peak_bytes"):
        return ""
    return f"{(providers[name]['peak_bytes'] - providers['frozen']['peak_bytes']) / 2**20:+.0f}"


def compiled(results: Results) -> str:
    return benchmark("aot").summary(results["kernels"])


def of_script(name: str, *more: str) -> Callable[[Results], str]:
    """The table of a benchmark script, and what else it writes above it."""

    def made(results: Results) -> str:
        module = benchmark(name)
        return "\n\n".join(getattr(module, f)(results) for f in (*more, "table"))

    return made


def replayed(results: Results) -> str:
    return benchmark("monitor_table").study_table(results)


def counted(results: Results) -> str:
    return benchmark("counts").table(results=results)


# name: (results file, what makes the table of it)
TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "adapters_cpu": ("adapters_cpu.json", of_script("adapters_cpu")),
    "gpu": ("gpu_nvidia_h200.json", gpu),
    "counts": ("gpu_nvidia_h200.json", counted),
    "aot": ("aot.json", compiled),
    "grpo_example": ("grpo_example.json", of_script("grpo_example")),
    "grpo_cpu": ("grpo_cpu.json", of_script("grpo_cpu")),
    "smollm": ("smollm.json", of_script("smollm")),
    "preflight": ("preflight.json", of_script("preflight_table", "conclusion")),
    "monitor": ("monitor.json", of_script("monitor_table", "words")),
    "monitor_study": ("monitor_study.json", replayed),
    "monitor_cpu": ("monitor_cpu.json", of_script("monitor_cpu")),
    "spectra_cpu": ("spectra_cpu.json", of_script("spectra_cpu")),
    "reliability": ("reliability.json", of_script("reliability")),
}


def made_on(results: Results) -> str:
    """Machine, versions, date and commits, as far as a results file names them."""
    parts = [v["machine"] for v in results.values() if isinstance(v, dict) and "machine" in v]
    parts = parts or [results.get("machine", {})]  # of one that was made in parts, each has its own
    machine, run = parts[0], next(iter(results.get("runs", [])), {})
    said = [machine.get("device") or machine.get("processor", "")]
    if "cores" in machine:
        said.append(f"{machine['cores']} cores")
    for versions in (m.get("versions") for m in (machine, results, run)):
        if versions:
            said += [f"{k} {v}" for k, v in versions.items()]
            break
    said += [f"triton {results['triton']}" if "triton" in results else ""]
    said.append(str(machine.get("date") or results.get("date", "")))
    commits = dict.fromkeys(part["commit"] for part in parts if "commit" in part)
    said += [f"commit {commit}" for commit in commits]
    changed = len(machine.get("changed", []))
    said.append(f"with uncommitted changes in {changed} files" if changed else "")
    return ", ".join(text for text in said if text)


class Measured(SphinxDirective):
    """The table of a name of TABLES, and a line on where it is from."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        file, make = TABLES[self.arguments[0]]
        self.env.note_dependency(str(RESULTS / file))
        results = json.loads((RESULTS / file).read_text())
        source = self.env.docname.count("/") * "../" + f"results/{file}"
        text = f"{make(results)}\n\nRaw numbers: [{file}]({source})"
        where = made_on(results)
        return self.parse_text_to_nodes(text + (f" ({where})." if where else "."))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
