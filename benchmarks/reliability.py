"""How much it takes: damaged and hostile files, kills, full disks, leaks, drift, and sheer size.

    python benchmarks/reliability.py                        everything, some hours; writes the JSON
    python benchmarks/reliability.py --only kills pieces    some of it
    python benchmarks/reliability.py --smoke                a little of each, to see that it runs
    python benchmarks/reliability.py --table                docs/reliability.md's table, of the JSON

A figure that is there is not made again (`--again` does); one that was stopped goes on where it
was. docs/reliability.md says how each is counted. Linux alone: memory is read from /proc.

mutations  1,000,000 mutated adapter files through the loader        about 20 minutes
attacks    some 1,200 files built to attack, through every entry     about 20 minutes
leak       6,000 training steps, and again with a leak               two minutes
merges     1,000 merges of every adapter in fp32 and bf16            two minutes
kills      50 kill -9 in training, and 50 in saving                  half an hour
pieces     a saved state with each of its pieces altered or dropped  some minutes
stream     a checkpoint of the size of an 8B model, 16 GB of disk    some minutes
disks      saving to full disks and read-only folders                a minute
savers     two processes saving to one place                         a minute
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the library as it lies here

import machine  # noqa: E402
import reliability_attacks as attacks  # noqa: E402
import reliability_disk as disk  # noqa: E402
import reliability_kills as kills  # noqa: E402
import reliability_mutations as mutations  # noqa: E402
import reliability_stream as stream  # noqa: E402
import reliability_training as training  # noqa: E402
import script  # noqa: E402
import torch  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "reliability.json"
PACKAGES = ("structadapt", "torch", "safetensors", "transformers", "numpy")
Rows = list[tuple[str, str, str, bool]]  # (what, target, measured, met)
Keep = Callable[[Any], None]  # takes what is there so far


@dataclass(frozen=True)
class Figure:
    """measure(so far, smoke, keep): goes on, and gives keep what to write meanwhile."""

    name: str  # in the table, as long as it is not measured
    target: str
    measure: Callable[[Any, bool, Keep], Any]
    rows: Callable[[Any], Rows]


FIGURES = {
    "mutations": Figure(
        "mutated adapter files", "0 foreign exceptions, 0 models changed, 0 accepted",
        lambda so_far, smoke, keep: mutations.measure(so_far, 400 if smoke else 1_000_000, keep),
        mutations.rows,
    ),
    "attacks": Figure(
        "files built to attack, through every entry", "refused, 2 s, 200 MiB",
        lambda so_far, smoke, keep: attacks.measure(so_far, 60 if smoke else 1, keep),
        attacks.rows,
    ),
    "leak": Figure(
        "memory over training steps", "< 1,000 bytes a step, a leak is found",
        lambda so_far, smoke, keep: so_far or training.measure_leak(
            400 if smoke else 6000, 200 if smoke else training.WARM_UP),
        training.leak_rows,
    ),
    "merges": Figure(
        "merge and unmerge, fp32 and bf16", "0 bits",
        lambda so_far, smoke, keep: training.measure_merges(so_far, 5 if smoke else 1000, keep),
        training.merge_rows,
    ),
    "kills": Figure(
        "kill -9 in training and in saving", "all runs equal, bit for bit",
        lambda so_far, smoke, keep: kills.measure_kills(so_far, 1 if smoke else 50, keep),
        kills.kill_rows,
    ),
    "pieces": Figure(
        "a saved state with one piece altered or dropped", "all passed over",
        lambda so_far, smoke, keep: so_far or kills.measure_pieces(
            lambda number: not smoke or number % 40 == 0),
        kills.piece_rows,
    ),
    "stream": Figure(
        "spectra of the size of an 8B model", "0.6 GiB",
        lambda so_far, smoke, keep: so_far or stream.measure(32 if smoke else 1),
        stream.rows,
    ),
    "disks": Figure(
        "saving to full disks and read-only folders", "the old one whole, one OSError",
        lambda so_far, smoke, keep: so_far or disk.measure_disks(
            ("save", "export_merged") if smoke else disk.WRITERS),
        disk.disk_rows,
    ),
    "savers": Figure(
        "two processes saving to one place", "one of the two, whole",
        lambda so_far, smoke, keep: so_far or disk.measure_savers(5 if smoke else 200),
        disk.saver_rows,
    ),
}  # fmt: skip


def measure(names: list[str], smoke: bool, again: bool, out: Path | None) -> dict[str, Any]:
    """The figures of these names; written to `out` as they come."""
    results: dict[str, Any] = {}
    if out is not None and out.exists():
        results = json.loads(out.read_text())
    for name in names:
        before = {} if again else results.get(name, {})

        def keep(found: Any, name: str = name) -> None:
            here = machine.record(PACKAGES) | {"threads": torch.get_num_threads()}
            results[name] = {"machine": here, "result": found}
            if out is not None:
                script.write(out, results)

        print(name, file=sys.stderr)
        found = FIGURES[name].measure(before.get("result"), smoke, keep)
        if found != before.get("result") or not before:
            keep(found)
    return results


def table(results: dict[str, Any]) -> str:
    """One line a figure."""
    lines = ["| what | target | measured | met |", "|---|---|---|---|"]
    for name, figure in FIGURES.items():
        if name not in results:
            lines.append(f"| {figure.name} | {figure.target} | not measured yet | |")
            continue
        for what, target, measured, met in figure.rows(results[name]["result"]):
            lines.append(f"| {what} | {target} | {measured} | {('no', 'yes')[met]} |")
    return "\n".join(lines)


def main() -> None:
    parser = script.parser(__doc__, RESULTS)
    parser.add_argument("--only", nargs="+", choices=tuple(FIGURES), default=[*FIGURES])
    parser.add_argument("--again", action="store_true", help="make figures that are there again")
    options = parser.parse_args()
    if options.table:
        there = options.out.exists()
        print(table(json.loads(options.out.read_text()) if there else {}))
        return
    torch.set_num_threads(1)
    out = None if options.smoke and options.out == RESULTS else options.out
    print(table(measure(options.only, options.smoke, options.again, out)))


if __name__ == "__main__":
    main()
