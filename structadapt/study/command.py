"""Rerun the question of "Structure Over Scale": which adapter, rank and scale survive GRPO.

    structadapt study run small --out runs/small         96 runs, 7 minutes on two CPU cores
    structadapt study status runs/small                  what is done, and what failed
    structadapt study report runs/small                  report.html and report.md in that folder

A grid is a TOML file, or a shipped one: small, full (docs/study.md), smollm and paper (three 8B
models).
Every run of it has a folder of its own. The same command goes on where it was stopped: what is
done is left alone, and a run that was killed goes on from its last state.

exit codes:
    0    done
    1    some runs failed, or were not run
    2    bad input, nothing was begun
    130  Ctrl-C
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from structadapt import terminal
from structadapt.examples.process import first_interrupt, strict
from structadapt.spectra.progress import duration
from structadapt.study import folders, grid, runner
from structadapt.study.cell import Cell
from structadapt.study.distributed import StoppedError
from structadapt.study.folders import Status
from structadapt.study.grid import Grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `structadapt study`."""
    parser.set_defaults(parser=parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    run = actions.add_parser("run", help="run the cells of a grid", description=RUN)
    run.add_argument("grid", help=f"a .toml file, or one of {', '.join(grid.shipped())}")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    run.add_argument("--cell", metavar="K", help="only this one: a name, or a number from 0")
    run.add_argument("--workers", type=int, metavar="N", help=WORKERS)
    run.add_argument("--threads", type=int, default=1, metavar="N", help="of each (default: 1)")
    run.add_argument("--retry", action="store_true", help="cells that failed, too")
    run.add_argument("--no-save", action="store_true", help="keep no trained weights")
    run.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    run.add_argument("--engine", choices=("local", *grid.ENGINES), default="local", help=ENGINE)
    run.add_argument("--cluster", metavar="NAME", help=CLUSTER)
    _output(run)
    run.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)

    show = actions.add_parser("status", help="where every cell stands", description=STATUS)
    show.add_argument("out", type=Path, metavar="DIR", help="folder of the study")
    show.add_argument("--all", action="store_true", help="every cell, not only the unfinished")
    _output(show)

    report = actions.add_parser("report", help="tables and pictures of it", description=REPORT)
    report.add_argument("out", type=Path, metavar="DIR", help="folder of the study")
    report.add_argument("--to", type=Path, metavar="DIR", help="where to (default: the same)")
    _output(report)


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, not text")
    parser.add_argument("--quiet", action="store_true", help="no progress, errors alone")


RUN = """Run the cells of a grid that are not done.

    structadapt study run small --out runs/small                  a grid that comes with it
    structadapt study run mine.toml --out runs/mine --dry-run     what it would run, and its memory
    structadapt study run small --out runs/small --cell 3         one cell
    structadapt study run small --out runs/small --retry          failed cells too

Ctrl-C ends the steps that are under way; the same command goes on.

exit codes:
    0    all cells are done, or run elsewhere
    1    some failed, or were not run; of --dry-run: one is larger than its memory_gib
    2    bad input, nothing was begun
    130  Ctrl-C
"""
STATUS = """Say where every cell of a study stands: done, failed, running, stopped or waiting.

    structadapt study status runs/small            the counts, and each cell that has begun
    structadapt study status runs/small --all      every cell
    structadapt study status runs/small --json     the same for a program

exit codes:
    0    no cell failed
    1    one failed
    2    no study is there
"""
REPORT = """Write report.html, report.md, study.json and pictures of a study, as far as it is done.

    structadapt study report runs/small                    into the folder of the study
    structadapt study report runs/small --to reports       into another one
    structadapt study report runs/small --json | jq .claims

exit codes:
    0    written
    2    no finished run is there, or no report could be written
"""
WORKERS = "processes at a time (default: one a core, at most 8, or what the GPUs allow)"
DRY_RUN = "check the grid, list its cells and their memory, run nothing"
ENGINE = "submitit: jobs of Slurm; ray: tasks of a Ray cluster (default: local)"
CLUSTER = (
    "of submitit: slurm or local (default: what is there); of ray: an address, or auto (default: "
    "a cluster of its own on this machine)"
)


def main(args: argparse.Namespace) -> int:
    """Run `structadapt study`. Returns the exit code."""
    if args.action is None:
        args.parser.print_help(sys.stderr)
        return 2
    try:
        return {"run": _run, "status": _status, "report": _report}[args.action](args)
    except (ValueError, OSError, ImportError) as error:
        terminal.say(f"structadapt study {args.action}", "error", error)
        return 2


def _run(args: argparse.Namespace) -> int:
    found = grid.read(args.grid)
    cells = [found.cell(args.cell)] if args.cell is not None else list(found.cells)
    if args.threads < 1 or (args.workers is not None and args.workers < 1):
        raise ValueError("--workers and --threads must be at least 1")
    if args.dry_run:
        from structadapt.study import dry_run

        folders.check(args.out)  # as a run would
        return dry_run.main(found, cells, args.json)
    if args.worker:
        return _work(cells, args)
    folders.prepare(found, args.out)
    if args.retry:
        folders.forget_failures(cells, args.out)
    try:
        if args.engine != "local":
            _on_cluster(args, found, cells)
        elif args.cell is not None:
            _work(cells, args)
        else:
            _locally(args, cells)
    except (StoppedError, KeyboardInterrupt):
        _say(args, "\nstopped: the same command goes on")
        return 130
    return _end(args, cells)


def _work(cells: list[Cell], args: argparse.Namespace) -> int:
    """Be a worker: of this process's own, or of the one that started it."""
    torch.set_num_threads(args.threads)
    parent = os.getppid()

    def tell(cell: Cell, record: dict[str, Any], total: int) -> None:
        if not args.worker:
            shown = record.get("reward", record.get("held_out"))
            _say(args, f"{cell.id}: step {record['step'] + 1}/{total}" + _value(shown))

    with first_interrupt(args.worker or terminal.is_quiet(args)) as interrupted:

        def stop() -> bool:
            return interrupted() or (args.worker and runner.orphaned(parent))

        try:
            return min(runner.work(cells, args.out, stop=stop, tell=tell, save=not args.no_save), 1)
        except StoppedError:
            if args.worker:
                return 130
            raise


def _value(reward: float | None) -> str:
    return "" if reward is None else f", reward {reward:.3f}"


def _locally(args: argparse.Namespace, cells: list[Cell]) -> None:
    """Workers of this machine, watched."""
    left = _left(args, cells)
    if not left:
        return
    devices = runner.devices_for(left, args.workers)
    _say(args, f"{len(left)} of {len(cells)} cells to run, {len(devices)} at a time, in {args.out}")
    command = [
        "structadapt.cli", "study", "run", str(args.out / folders.GRID), "--out", str(args.out),
        "--worker", "--threads", str(args.threads), *["--no-save"] * args.no_save,
    ]  # fmt: skip
    runner.workers(command, left, args.out, devices, Told(args, len(cells), len(left)))


def _on_cluster(args: argparse.Namespace, found: Grid, cells: list[Cell]) -> None:
    from structadapt.study import engines

    left = _left(args, cells)
    job = engines.Job(found.text, args.out, args.threads, not args.no_save)
    told = Told(args, len(cells), len(left))
    options = found.cluster.get(args.engine, {})
    engines.run(args.engine, args.cluster, options, left, args.out, job, args.workers, told)


def _left(args: argparse.Namespace, cells: list[Cell]) -> list[Cell]:
    return [s.cell for s in folders.status(cells, args.out) if s.state not in runner.ENDED]


class Told:
    """Tells of every cell once it has ended, with the time left."""

    def __init__(self, args: argparse.Namespace, whole: int, left: int) -> None:
        self.args, self.whole, self.before = args, whole, whole - left
        self.began, self.seen = time.monotonic(), set[str]()

    def __call__(self, statuses: list[Status]) -> None:
        for s in statuses:
            if s.state in runner.ENDED and s.cell.id not in self.seen:
                self.seen.add(s.cell.id)
                count = self.before + len(self.seen)
                pace = (time.monotonic() - self.began) / len(self.seen)
                left = f"  ({duration(pace * (self.whole - count))} left)"
                line = f"{count}/{self.whole}  {s.cell.id}: {s.result}"
                _say(self.args, line + left * (count < self.whole))


def _end(args: argparse.Namespace, cells: list[Cell]) -> int:
    statuses = folders.status(cells, args.out)
    told = f"{_table(statuses, everything=False)}\n\nstructadapt study report {args.out}"
    terminal.show(_json(statuses) if args.json else told)
    return 0 if all(s.state in (folders.DONE, folders.RUNNING) for s in statuses) else 1


def _status(args: argparse.Namespace) -> int:
    path = args.out / folders.GRID
    if not path.is_file():
        raise FileNotFoundError(f"{args.out} holds no study")
    statuses = folders.status(grid.read(path).cells, args.out)
    terminal.show(_json(statuses) if args.json else _table(statuses, args.all))
    return 1 if any(s.state == folders.FAILED for s in statuses) else 0


def _report(args: argparse.Namespace) -> int:
    from structadapt.study import report

    figures, paths = report.write(args.out, args.to or args.out)
    terminal.show(strict(figures) if args.json else "\n".join(map(str, paths)))
    return 0


def _table(statuses: list[Status], everything: bool) -> str:
    """The counts, then the cells that are not done, or all."""
    counts = Counter(s.state for s in statuses)
    lines = [f"{len(statuses)} cells: " + ", ".join(f"{n} {name}" for name, n in counts.items())]
    for s in statuses:
        if everything or s.state not in (folders.DONE, folders.WAITING):
            state = f"{s.state:8}"
            state = terminal.paint(state, "red", sys.stdout) if s.state == folders.FAILED else state
            lines.append(f"{state} {s.cell.id:52} step {s.step}/{s.steps}  {s.result}")
    return "\n".join(lines)


def _json(statuses: list[Status]) -> str:
    return json.dumps([
        {"id": s.cell.id, "state": s.state, "step": s.step, "steps": s.steps, "result": s.result}
        for s in statuses
    ])  # fmt: skip


def _say(args: argparse.Namespace, line: str) -> None:
    if not terminal.is_quiet(args):
        terminal.tell(line)
