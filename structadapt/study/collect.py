"""What the folders of a study's runs hold, one flat record a run, small enough to commit."""

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from structadapt.examples.process import read_json, read_log
from structadapt.spectra import Report
from structadapt.spectra.drawing import curve, drawable
from structadapt.study import folders, grid
from structadapt.study.cell import ADAPTERS, OPTIONS

Row = dict[str, Any]  # a run: the fields of its Cell, and what came out
FIGURES = "study.json"
SPECTRAL = (
    "effective_rank", "effective_rank_ratio", "stable_rank", "stable_rank_ratio", "topk_energy",
    "participation_ratio", "relative_norm", "relative_spectral", "frobenius_norm",
)  # fmt: skip
WATCHED = ("of_null", "topk_energy", "relative_norm", "relative_spectral")
POINTS = 24  # of a curve of singular values
TRACE = 33  # readings of a trace, at most


def collected(out: Path) -> dict[str, Any]:
    """{"runs": finished runs, "failed": {id, error} of those that failed, "planned": cells of the
    grid and of those before it}, from a study's folder, or from the study.json of an earlier
    report. ValueError for a folder with neither, or with a damaged file."""
    cells = sorted(path.parent for path in out.glob(f"{folders.CELLS}/*/{folders.CELL}"))
    if not cells:
        whole = read_json(out / FIGURES)
        if not isinstance(whole, dict) or not {"runs", "failed", "planned"} <= whole.keys():
            raise ValueError(f"{out} holds no run of a study")
        try:
            sorted(whole["runs"], key=_order)  # as they are: it needs what names a run
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{out / FIGURES} is damaged: {error!r} in a run") from None
        return {name: whole[name] for name in ("runs", "failed", "planned")}
    rows = [_row(folder) for folder in cells if (folder / folders.SUMMARY).exists()]
    if not rows:
        raise ValueError(f"no run in {out} is finished")
    failed = [{"id": folder.name, "error": error["error"]} for folder in cells
              if (error := read_json(folder / folders.ERROR))]  # fmt: skip
    path = out / folders.GRID
    planned = {folder.name for folder in cells}  # also of grids that were run here before
    planned |= {cell.id for cell in grid.read(path).cells} if path.exists() else set()
    return {"runs": sorted(rows, key=_order), "failed": failed, "planned": len(planned)}


def _order(row: Row) -> tuple[Any, ...]:
    number = [row[name] or 0 for name in ("rank", "scale")]
    kind = list(ADAPTERS).index(row["adapter"])
    texts = [str(row[name]) for name in ("axes", "init")]
    return (row["model"], row["task"], row["method"], row["prompts"], kind, *number, *texts,
            row["batch"], row["rate"], row["seed"])  # fmt: skip


def _row(folder: Path) -> Row:
    cell = folders.cell_in(folder)
    summary = folders.summary_in(folder) or {}
    steps = read_log(folder / folders.STEPS)
    own = {k: summary[k] for k in summary if k not in ("id", "monitor", "cold_start")}
    own["seconds"] = round(own["seconds"], 1)
    own["cold_start_steps"] = (summary["cold_start"] or {}).get("steps")
    state, plain = summary["monitor"], cell.plain()
    report = None
    if (folder / folders.SPECTRA).is_dir():
        report = Report.load(folder / folders.SPECTRA)
    return {
        "id": folder.name,
        **asdict(cell),
        **{name: getattr(plain, name) for name in OPTIONS},
        "rate": cell.rate,
        "scale": cell.scale,
        **own,
        "state": state and state["state"],
        "alarm_at": _first_alarm(state),
        "rewards": [_short(s.get("reward", s.get("held_out"))) for s in steps],
        "spectra": report and _spectra(report),
        "curve": report and _curve(report),
        "trace": _trace(folder),
    }


def _first_alarm(state: Row | None) -> int | None:
    """The step at which the monitor first saw a collapse coming."""
    first = state["first"] if state else {}
    return min((first[s] for s in ("collapsing", "collapsed") if s in first), default=None)


def _spectra(report: Report) -> dict[str, float]:
    """Medians over the modules."""
    rows = drawable(report)
    values = {n: [r[n] for r in rows if r[n] is not None] for n in SPECTRAL}
    return {name: _short(median(v)) for name, v in values.items() if v}


def _curve(report: Report) -> list[list[float]]:
    """[i, median over the modules of s_i / s_1], at some of the i, while most modules have one."""
    curves = [c[~np.isnan(c)] for c in (curve(report, row) for row in drawable(report))]
    longest = int(median(map(len, curves))) if curves else 0
    if not longest:
        return []
    places = np.unique(np.geomspace(1, longest, POINTS).round().astype(int))
    middle = [median(float(s[i - 1]) if i <= len(s) else 0.0 for s in curves) for i in places]
    return [[int(i), _short(y)] for i, y in zip(places, middle, strict=True)]


def _trace(folder: Path) -> dict[str, list[Any]] | None:
    """Medians over the modules, of the readings while it trained."""
    readings = read_log(folder / folders.MONITOR)
    readings = readings[:: max(-(-len(readings) // TRACE), 1)]
    if not readings:
        return None
    trace: dict[str, list[Any]] = {"step": [r["step"] for r in readings]}
    for name in WATCHED:
        trace[name] = [_short(r["bands"][name][1]) if name in r["bands"] else None
                       for r in readings]  # fmt: skip
    return trace


def _short(value: Any) -> Any:
    """Four digits."""
    return value if value is None or isinstance(value, bool) else float(f"{value:.4g}")
