"""What the frozen weights of a model look like beside random ones, by module type.

The Model Maturity Hypothesis says that such statistics tell how far a base model can be taken by
reinforcement learning. It is a hypothesis: this prints the figures and no verdict.
"""

from collections.abc import Sequence
from typing import Any

from structadapt.spectra.columns import head
from structadapt.spectra.report import (
    NothingToShowError,
    Report,
    by_type,
    middle,
    path_shown,
    quartiles,
    shown,
    usable,
)
from structadapt.spectra.tables import TYPES, aligned

RATIOS = ("effective_rank_ratio", "stable_rank_ratio", "alpha_median_ratio")
SPIKES = ("mp_spikes", "mp_spike_energy")
TAIL = ("alpha", "alpha_n_tail", "alpha_D", "alpha_sigma", "alpha_clip_low", "alpha_clip_high")


def frozen_weights(report: Report) -> list[dict[str, Any]]:
    """For every module type of the frozen weights: {module_type, count, shapes, and for each
    statistic its quartiles}. NothingToShowError if the report has no weight."""
    rows = [row for row in report.rows if row["kind"] == "weight" and usable(row)]
    if not rows:
        raise NothingToShowError(
            "maturity looks at frozen weights, and this source has none: give the base model alone"
        )
    return [
        {
            "module_type": name,
            "count": len(group),
            "shapes": sorted({row["shape"] for row in group}),
            **{column: quartiles(group, column) for column in (*RATIOS, *SPIKES, *TAIL)},
        }
        for name, group in by_type(rows).items()
    ]


def lines(statistics: Sequence[dict[str, Any]]) -> list[str]:
    """Two tables: beside a random matrix of the same shape, and the tail of the eigenvalues."""
    first = [["type", "n", "out x in", *(head(c) for c in (*RATIOS, *SPIKES))]]
    second = [["type", "n", *(head(c) for c in TAIL)]]
    few = sorted(statistics, key=lambda entry: -entry["count"])[:TYPES]
    left = len(statistics) - len(few)
    for entry in statistics if not left else few:
        name = middle(path_shown(entry["module_type"]), 30)
        shape = shown(entry["shapes"][0]) + ("*" if len(entry["shapes"]) > 1 else "")
        cells = [_range(entry[column]) for column in (*RATIOS, *SPIKES)]
        first.append([name, str(entry["count"]), shape, *cells])
        second.append([name, str(entry["count"]), *(_range(entry[column]) for column in TAIL)])
    many = any(len(entry["shapes"]) > 1 for entry in statistics)
    return [
        "frozen weights beside Gaussian ones of the same shape: median (quartiles)",
        *aligned(first),
        *(["  * and other shapes"] if many else []),
        *([f"  and {left} smaller types: --json has all"] if left else []),
        "",
        "power law of the eigenvalue tail: median (quartiles); low and high: with up to 9 top "
        "values left out",
        *aligned(second),
    ]


def _range(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    if found["q25"] == found["q75"]:
        return shown(found["median"], 3)
    return f"{shown(found['median'], 3)} ({shown(found['q25'], 2)}-{shown(found['q75'], 2)})"
