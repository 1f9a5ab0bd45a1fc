"""kill -9 in training and in saving, and resuming from a state of which a piece is another one.

moments  A GRPO run with dropout, a DoRA, AdamW, a schedule and every generator is killed at random
         times and started again until it ends, over and over until it was killed 50 times. The
         weights, the optimizer and the last record are those of a run that nothing stopped, bit for
         bit.
saving   The same, killed once in one of its calls that write, fsync, rename, make or remove: 50 of
         them, evenly over all that a run makes. A file that is being written is left half written.
pieces   Each number, text and tensor of a saved state is altered, and each is dropped. As it would
         be on a disk, the state must be passed over. With its hashes made again, the resumed run
         must differ, or be refused; where neither is so, the piece is listed.

The machinery is tests/stopped_runs.py, which the tests use as well.
"""

import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stopped_runs

SEED = 0


def measure_kills(
    so_far: dict[str, Any] | None, kills: int, keep: Callable[[Any], None]
) -> dict[str, Any]:
    """{kind: {"kills", "runs", "equal"}}, in as many runs as it takes."""
    kinds = ("moments", "saving")
    found = so_far or {kind: {"kills": 0, "runs": 0, "equal": 0} for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        expected, seconds, calls = stopped_runs.whole(Path(scratch) / "whole")
        for kind, totals in found.items():
            while totals["kills"] < kills:
                if kind == "moments":
                    rng = random.Random(f"{SEED} {totals['runs']}")
                    totals["kills"] += stopped_runs.killed_at_moments(out, rng, seconds)
                else:
                    at = 1 + totals["runs"] * calls // kills
                    stopped_runs.killed_in_saving(out, at)
                    totals["kills"] += 1
                final = stopped_runs.outcome(out)
                totals["equal"] += final.keys() == expected.keys() and all(
                    torch.equal(final[name], value) for name, value in expected.items()
                )
                totals["runs"] += 1
                shutil.rmtree(out)
                keep(found)
        found["saving"]["calls"] = calls
    return found


def measure_pieces(some: Callable[[int], bool] = lambda number: True) -> dict[str, Any]:
    """{"on the disk" or "resealed": {verdict: [pieces]}}"""
    found: dict[str, Any] = {}
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # every state that is passed over is told
    for name, seal in (("on the disk", False), ("resealed", True)):
        with tempfile.TemporaryDirectory() as scratch:
            verdicts = stopped_runs.mutated_states(Path(scratch), seal, some)
        sorted_by: dict[str, list[str]] = {}
        for piece, verdict in verdicts.items():
            sorted_by.setdefault(verdict.partition(":")[0], []).append(piece)
        found[name] = sorted_by
    logging.disable(level)
    return found


def kill_rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    words = {"moments": "kill -9 in training", "saving": "kill -9 in saving"}
    return [
        (
            words[kind],
            "all runs equal, bit for bit",
            f"{t['kills']} kills in {t['runs']} runs: {t['equal']} equal",
            t["equal"] == t["runs"],
        )
        for kind, t in found.items()
    ]


def piece_rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    disk, resealed = found["on the disk"], found["resealed"]
    count, passed = sum(map(len, disk.values())), len(disk.get("passed over", []))
    same = len(resealed.get("the same", []))
    return [
        ("a saved state with one piece altered or dropped", "all passed over",
         f"{passed} of {count}", passed == count),
        ("the same with its hashes made again", "differs or refused, others listed",
         f"{sum(map(len, resealed.values())) - same} of {count}; {same} change nothing here", True),
    ]  # fmt: skip
