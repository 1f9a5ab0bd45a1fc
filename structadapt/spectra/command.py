"""Spectra of any checkpoint, adapter or pair of checkpoints.

What was read and what was left out comes first, then the modules that use the fewest directions
beside a random matrix of the same shape, findings with their evidence, and a table of module types.

    structadapt spectra model.safetensors                     one checkpoint
    structadapt spectra tuned/ --base base/                   what changed between two
    structadapt spectra runs/q --html page.html               a run of structadapt grpo
    structadapt spectra adapter/ --base base/ --fail-on collapsed     in CI

exit codes:
    0    done
    2    bad input, or an output that could not be written
    3    some matrices could not be analysed, or not beside the base, or not judged for --fail-on
    4    a finding that --fail-on names, also where 3 holds
    130  Ctrl-C

A DoRA for which no base was given is analysed in part, which is no failure.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from structadapt import terminal
from structadapt.bounds import few
from structadapt.files import write_atomically
from structadapt.spectra import analysis, evidence, maturity, page, plots, tables
from structadapt.spectra.drawing import new_figure
from structadapt.spectra.progress import Meter
from structadapt.spectra.report import NothingToShowError, Report
from structadapt.spectra.rows import FAULTS

MONITOR = "monitor.jsonl"  # of a training run
BAD_INPUT, PARTIAL, FINDING = 2, 3, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        help="a safetensors, .pt or .bin file, or a folder: a checkpoint, "
        "shards, a PEFT adapter, a training run",
    )
    parser.add_argument(
        "--base", metavar="PATH", help="what it started from, in any of these forms"
    )
    _output(parser)
    _analysis(parser)
    _findings(parser)


def _output(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("output")
    out.add_argument("--csv", metavar="FILE", help="write every measure, one line a matrix")
    out.add_argument("--markdown", metavar="FILE", help="write the same as a Markdown table")
    out.add_argument("--plots", metavar="DIR", help="draw pictures into this folder")
    out.add_argument("--html", metavar="FILE", help="write all of it as one page")
    out.add_argument(
        "--maturity",
        action="store_true",
        help="also print how the frozen weights differ from random ones",
    )
    out.add_argument("--json", action="store_true", help="print the result as JSON, not text")
    out.add_argument("--quiet", action="store_true", help="no progress and no notes, errors alone")


def _analysis(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is analysed, and how")
    what.add_argument("--include", metavar="RE", action="append", help="only modules with this")
    what.add_argument("--exclude", metavar="RE", action="append", help="no modules with this")
    what.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out what the base lacks, instead of stopping",
    )
    what.add_argument(
        "--strict", action="store_true", help="stop at the first matrix that cannot be analysed"
    )
    what.add_argument(
        "--no-relations",
        action="store_true",
        help="leave out how updates lie to W: most of the time of a large base",
    )
    what.add_argument(
        "--method",
        choices=("auto", "gram", "svd"),
        default="auto",
        help="svd: exact for tiny singular values too, but slower (default: auto)",
    )
    what.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    what.add_argument("--workers", type=int, metavar="N", help="matrices at a time")


def _findings(parser: argparse.ArgumentParser) -> None:
    defaults = evidence.Limits()
    fail = parser.add_argument_group("findings")
    fail.add_argument(
        "--fail-on",
        metavar="FINDING",
        action="append",
        default=[],
        choices=(*evidence.RULES, "any"),
        help=f"exit code 4 for one of {', '.join(evidence.RULES)} or any",
    )
    fail.add_argument(
        "--concentrated",
        type=float,
        metavar="X",
        default=defaults.concentrated,
        help="top-1 energy from which an update is concentrated (default: %(default)s)",
    )
    fail.add_argument(
        "--oversized",
        type=float,
        metavar="X",
        default=defaults.oversized,
        help="s_1(dW) / s_1(W) from which it is oversized (default: %(default)s)",
    )
    fail.add_argument(
        "--intruders",
        type=int,
        metavar="N",
        default=defaults.intruders,
        help="intruder dimensions from which they are a finding (default: %(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    try:
        _check_outputs(options)
        report = _analysed(options)
        t = evidence.Limits(options.concentrated, options.oversized, options.intruders)
        found = evidence.findings(report, t)
    except (*FAULTS, ImportError) as error:
        terminal.say("structadapt spectra", "error", error)
        return BAD_INPUT
    if not _shown(report, found, options):
        return BAD_INPUT
    if evidence.failing(found, options.fail_on):
        return FINDING
    if unjudged := evidence.unjudged(report, options.fail_on):
        names = f"{', '.join(options.fail_on)} of {few(unjudged)}"
        terminal.say(
            "structadapt spectra", "error",
            f"--fail-on cannot judge {names}: without its base the size of an update says nothing; "
            "give --base",
        )  # fmt: skip
        return PARTIAL
    return PARTIAL if evidence.incomplete(report) else 0


def _analysed(options: argparse.Namespace) -> Report:
    meter = Meter(visible=not terminal.is_quiet(options))
    try:
        return analysis.analyze(
            options.path,
            options.base,
            method=options.method,
            include=options.include,
            exclude=options.exclude,
            device=options.device,
            workers=options.workers,
            allow_missing=options.allow_missing,
            strict=options.strict,
            relations=not options.no_relations,
            progress=meter,
        )
    finally:
        meter.close()


def _check_outputs(options: argparse.Namespace) -> None:
    """What would fail after the work is refused before it."""
    for name in ("csv", "markdown", "html"):
        path = getattr(options, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name}: there is no folder {Path(path).parent}")
        if path is not None and Path(path).is_dir():
            raise IsADirectoryError(f"--{name}: {path} is a folder, give the name of a file")
        if path is not None and not os.access(Path(path).absolute().parent, os.W_OK):
            raise PermissionError(f"--{name}: the folder {Path(path).parent} cannot be written to")
    if options.plots is not None:
        new_figure(1, 1)
        if Path(options.plots).exists() and not Path(options.plots).is_dir():
            raise NotADirectoryError(f"--plots: {options.plots} is a file, give a folder")
    if not 0 < options.concentrated <= 1:
        raise ValueError(
            f"--concentrated must be above 0 and at most 1, got {options.concentrated}"
        )
    if not options.oversized > 0:
        raise ValueError(f"--oversized must be above 0, got {options.oversized}")
    if options.intruders < 1:
        raise ValueError(f"--intruders must be at least 1, got {options.intruders}")


def _shown(report: Report, found: list[evidence.Finding], options: argparse.Namespace) -> bool:
    """Print the report, then write the files, each whatever became of the others; whether all of
    them are there."""
    statistics: list[dict[str, Any]] | None = None
    if options.maturity:
        try:
            statistics = maturity.frozen_weights(report)
        except NothingToShowError as error:
            _note(str(error), options)
    lines = [] if statistics is None else maturity.lines(statistics)
    if options.json:
        whole = {**report.to_dict(), "findings": [f.as_dict() for f in found]}
        if statistics is not None:
            whole["maturity"] = statistics
        terminal.show(json.dumps(whole, allow_nan=False))
    else:
        screen = tables.screen(report, found, terminal.in_colour(sys.stdout))
        terminal.show("\n".join([screen, *([""] if lines else []), *lines]))
    complete = True
    for what, path, write in _outputs(report, found, lines, options):
        try:
            write()
            if not options.json:
                terminal.show(f"{what} in {path}")
        except NothingToShowError as error:
            _note(f"no {what}: {error}", options)
        except Exception as error:  # whatever it is, the other outputs do not suffer from it
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            terminal.say("structadapt spectra", "error", f"no {what} in {path}: {reason}")
            complete = False
    return complete


def _outputs(
    report: Report, found: list[evidence.Finding], lines: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(what, where, how) of each file or folder that was asked for."""
    monitor = Path(options.path) / MONITOR
    log = monitor if monitor.exists() else None
    if options.csv is not None:
        yield "rows", options.csv, lambda: report.to_csv(options.csv)
    if options.markdown is not None:
        text = f"{report.to_markdown()}\n".encode("utf-8", "backslashreplace")
        yield "table", options.markdown, lambda: write_atomically(Path(options.markdown), text)
    if options.plots is not None:
        yield "pictures", options.plots, lambda: plots.draw(report, options.plots)
    if options.plots is not None and log is not None:
        picture = Path(options.plots) / "training.png"
        yield "curves of the run", str(picture), lambda: _curves(log, picture)
    if options.html is not None:
        yield "page", options.html, lambda: page.write(report, options.html, found, lines, log)


def _curves(log: Path, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)  # where there was nothing else to draw
    plots.training(log, picture)


def _note(words: str, options: argparse.Namespace) -> None:
    if not options.quiet:
        terminal.say("structadapt spectra", "note", words)
