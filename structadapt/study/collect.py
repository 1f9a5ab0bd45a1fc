"""What the folders of a study's runs hold, one flat record a run, small enough to commit."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from structadapt.spectra import Report
from structadapt.study.runs import CELL, ERROR, MONITOR, SPECTRA, STEPS, SUMMARY

Row = dict[str, Any]  # a run: the fields of its Cell, and what came out
FIGURES = "study.json"
SPECTRAL = (
    "effective_rank", "effective_rank_ratio", "stable_rank", "stable_rank_ratio", "topk_energy",
    "participation_ratio", "relative_norm", "relative_spectral", "frobenius_norm",
)  # fmt: skip
WATCHED = ("of_null", "topk_energy", "relative_norm", "relative_spectral")
POINTS = 24  # of a curve of singular values
TRACE = 33  # readings of a trace, at most


def rows_of(out: Path) -> tuple[list[Row], list[dict[str, str]]]:
    """(finished runs, {id, error} of those that failed), from a study's folder, or from the
    study.json of an earlier report. ValueError for a folder with neither."""
    folders = sorted(path.parent for path in out.glob(f"cells/*/{CELL}"))
    if not folders:
        if not (out / FIGURES).is_file():
            raise ValueError(f"{out} holds no run of a study")
        whole = json.loads((out / FIGURES).read_text())
        return whole["runs"], whole["failed"]
    rows = [_row(folder) for folder in folders if (folder / SUMMARY).exists()]
    failed = [
        {"id": folder.name, "error": json.loads((folder / ERROR).read_text())["error"]}
        for folder in folders
        if (folder / ERROR).exists()
    ]
    if not rows and not failed:
        raise ValueError(f"no run in {out} is finished")
    return rows, failed


def _row(folder: Path) -> Row:
    cell = json.loads((folder / CELL).read_text())
    summary = json.loads((folder / SUMMARY).read_text())
    del cell["parts"]
    steps = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
    own = {k: summary[k] for k in summary if k not in ("id", "monitor", "cold_start")}
    own["seconds"] = round(own["seconds"], 1)
    own["cold_start"] = (summary["cold_start"] or {}).get("steps")
    state = summary["monitor"]
    return {
        **cell,
        **own,
        "state": state and state["state"],
        "alarm_at": _first_alarm(state),
        "rewards": [_short(s.get("reward", s.get("held_out"))) for s in steps],
        "spectra": _spectra(folder),
        "curve": _curve(folder),
        "trace": _trace(folder),
    }


def _first_alarm(state: Row | None) -> int | None:
    """The step at which the monitor first saw a collapse coming."""
    steps = [state["first"][s] for s in ("collapsing", "collapsed") if s in state["first"]] \
        if state else []  # fmt: skip
    return min(steps, default=None)


def _whole(folder: Path) -> tuple[Report, list[Row]] | None:
    """The spectra of the update, each module once: the whole update where there are two."""
    if not (folder / SPECTRA).is_dir():
        return None
    report = Report.load(folder / SPECTRA)
    rows = {row["name"]: row for row in report.rows if row["frobenius_norm"]}
    return report, list(rows.values())


def _spectra(folder: Path) -> dict[str, float] | None:
    """Medians over the modules."""
    found = _whole(folder)
    if found is None or not found[1]:
        return None
    values = {n: [r[n] for r in found[1] if r[n] is not None] for n in SPECTRAL}
    return {name: _short(median(v)) for name, v in values.items() if v}


def _curve(folder: Path) -> list[list[float]] | None:
    """[i, median over the modules of s_i / s_1], at some of the i, while most modules have one."""
    found = _whole(folder)
    if found is None or not found[1]:
        return None
    report, rows = found
    curves = [np.asarray(report.spectrum(row["name"], row["kind"])) for row in rows]
    curves = [s[s > 0] / s[0] for s in curves]
    longest = int(median(map(len, curves)))
    places = np.unique(np.geomspace(1, longest, POINTS).round().astype(int))
    middle = [median(s[i - 1] if i <= len(s) else 0.0 for s in curves) for i in places]
    return [[int(i), _short(y)] for i, y in zip(places, middle, strict=True)]


def _trace(folder: Path) -> dict[str, list[Any]] | None:
    """Medians over the modules, of the readings while it trained."""
    path = folder / MONITOR
    if not path.exists():
        return None
    readings = [json.loads(line) for line in path.read_text().splitlines()]
    readings = readings[:: max(-(-len(readings) // TRACE), 1)]
    trace: dict[str, list[Any]] = {"step": [r["step"] for r in readings]}
    for name in WATCHED:
        trace[name] = [_short(r["bands"][name][1]) if name in r["bands"] else None
                       for r in readings]  # fmt: skip
    return trace


def _short(value: Any) -> Any:
    """Four digits."""
    return value if value is None or isinstance(value, bool) else float(f"{value:.4g}")
