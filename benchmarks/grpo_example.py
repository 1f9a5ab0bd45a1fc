"""Run the embedded GRPO example over adapters and seeds; write what came out as JSON.

    python benchmarks/grpo_example.py            all settings, seeds 0 to 2, about 12 minutes
    python benchmarks/grpo_example.py --smoke    a few steps of each, to see that it runs
    python benchmarks/grpo_example.py --table    the README's table from the committed JSON

Nothing else should run on the machine meanwhile: the seconds are part of the result.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import script

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "grpo_example.json"
SEEDS = (0, 1, 2)
SETTINGS = {
    "LoRA r=8": [],
    "DoRA r=16": ["--adapter", "dora"],
    "QuanTA 3 axes": ["--adapter", "quanta"],
    "full fine-tuning": ["--adapter", "full"],
    "LoRA r=256, alpha 512": ["--rank", "256", "--alpha", "512"],
    "LoRA r=256, alpha 16": ["--rank", "256", "--alpha", "16"],
}


def run(options: list[str], folder: Path) -> dict[str, Any]:
    """One run of the example in a process of its own: its config and its summary."""
    program = [sys.executable, "-m", "structadapt.examples.grpo"]
    subprocess.run([*program, *options, "--quiet", "--json", "--out", folder], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    del summary["spectra"]  # a hundred columns a layer, of which the table has none
    return {"config": config, **summary}


def measure(smoke: bool) -> dict[str, Any]:
    """Every setting with every seed."""
    fast = ["--prompts", "128", "--cold-start", "0"] if smoke else []
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in SETTINGS.items():
            for seed in SEEDS[:1] if smoke else SEEDS:
                folder = Path(scratch) / f"{len(runs)}"
                result = run([*options, "--seed", str(seed), *fast], folder)
                result["config"]["settings"].pop("out")
                runs.append({"setting": name, "seed": seed, **result})
                print(f"{name}, seed {seed}: {result['after']['sampled']:.3f}", file=sys.stderr)
    return {"machine": machine.record(("structadapt", "torch")), "runs": runs}


def table(results: dict[str, Any]) -> str:
    """The README's table: one line a setting, its seeds side by side."""
    lines = [
        "| adapter | trained parameters | sampled accuracy before | after | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in SETTINGS:
        runs = [r for r in results["runs"] if r["setting"] == name]
        before, after = (
            ", ".join(f"{r[when]['sampled']:.1%}" for r in runs) for when in ("before", "after")
        )
        seconds = max(sum(r["seconds"].values()) for r in runs)
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {before} | {after} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    options = script.parser(__doc__, RESULTS).parse_args()
    script.show(options, RESULTS, lambda: measure(options.smoke), table)


if __name__ == "__main__":
    main()
