"""Pictures of reports, written to files. They need matplotlib (the extra `plot`).

Singular values and cumulative energy against random matrices, heat maps of layer by module type,
several adapters on one scale, and the curves of a training run. Nothing is shown on a screen, and
no global setting of matplotlib is touched.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from structadapt.spectra.columns import title
from structadapt.spectra.drawing import (
    COLOURS,
    DASHES,
    EDGE,
    GREY,
    LEGEND,
    Lines,
    at_shares,
    curve,
    drawable,
    few_types,
    grid,
    label,
    layers_of,
    named,
    new_figure,
    null_words,
    plain_log,
    positions,
    random_bands,
    thin_lines,
    written,
)
from structadapt.spectra.report import NothingToShowError, Record, Report, by_type

Where = str | os.PathLike[str]
WIDEST, TALLEST = 14, 30  # inches of a picture, of a heat map without its names
OF_UPDATES = ("participation_ratio_ratio", "topk_energy", "relative_norm")
SHADES = {"concentrated": "#F0E442", "collapsing": "#E69F00", "collapsed": "#CC79A7"}  # states
OF_WEIGHTS = ("effective_rank_ratio", "stable_rank_ratio", "alpha_median_ratio")


def draw(report: Report, folder: Where) -> list[Path]:
    """All pictures of one report, into a folder that is made: the paths. NothingToShowError (a
    ValueError) if no row has anything to draw."""
    if not drawable(report):
        raise NothingToShowError("nothing to draw: every matrix is zero or was left out")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        singular_values(report, folder / "singular_values.png"),
        energy(report, folder / "energy.png"),
        heatmap({"": report}, folder / "heatmap.png"),
    ]


def singular_values(report: Report, path: Where) -> Path:
    """s_i / s_1, both axes logarithmic, with the band of random matrices and the noise edge."""
    rows = few_types({"": drawable(report)})[""]
    figure, axes, x_of = _curves(rows)
    random = _random(axes, rows, x_of)
    found = [curve(report, row) for row in rows]
    handles = _lines(axes, rows, found, x_of)
    edges = [r["noise_edge"] / r["spectral_norm"] for r in rows if r["noise_edge"]]
    if edges:
        edge = axes.axhline(float(np.median(edges)), color=EDGE, linewidth=1.2, linestyle="-.")
        edge.set_label("noise edge of rounding" + (" (median)" if len(edges) > 1 else ""))
        handles.append(edge)
    bottom = min((np.nanmin(c) for c in found if np.isfinite(c).any()), default=1e-3)
    axes.set(yscale="log", ylim=(max(bottom / 2, 1e-7), 1.6))
    axes.set(ylabel="s_i / s_1", title="Singular values")
    _legend(axes, [random, *handles])
    return written(figure, path)


def energy(report: Report, path: Where) -> Path:
    """The share of the energy in the i largest singular values, with k90 and k99."""
    rows = few_types({"": drawable(report)})[""]
    figure, axes, x_of = _curves(rows)
    found = []
    for row in rows:
        e = np.nan_to_num(curve(report, row)) ** 2
        found.append(e.cumsum() / e.sum())
    handles = _lines(axes, rows, found, x_of)
    _counts(axes, rows, found, x_of)
    axes.plot([], [], "o", color="#555555", label="k90, 90 % of the energy")
    axes.plot([], [], "D", color="#555555", label="k99, 99 %")
    ticks = [0, 0.25, 0.5, 0.75, 0.9, 0.99]
    axes.set(ylim=(0, 1.03), yticks=ticks, ylabel="share of the energy")
    axes.set_title("Energy in the i largest singular values")
    _legend(axes, [*handles, *axes.get_lines()[-2:]])
    return written(figure, path)


def heatmap(reports: Mapping[str, Report], path: Where) -> Path:
    """Layer by module type, one picture a measure and report; one scale for all reports. Of several
    a DoRA shows its direction, as a LoRA has nothing else."""
    whole = len(reports) == 1
    rows = few_types({name: drawable(report, whole) for name, report in reports.items()})
    every = [row for group in rows.values() for row in group]
    if not every:
        raise NothingToShowError("nothing to draw: every matrix is zero or was left out")
    kinds = {row["kind"] for row in every}
    measures = OF_WEIGHTS if kinds == {"weight"} else OF_UPDATES
    wanted = [m for m in measures if any(row[m] is not None for row in every)]
    types, layers = list(by_type(every)), layers_of(every)
    wide = max(2.6, 0.62 * len(types)) + 1.3
    tall = min(max(1.6, 0.24 * len(layers)), TALLEST) + 0.9 + 0.075 * max(map(len, types))
    below = len(rows) == 1 and wide * len(wanted) > WIDEST  # one picture below the other
    down, across = (len(wanted), 1) if below else (len(rows), len(wanted))
    figure = new_figure(wide * across, tall * down)
    panels = figure.subplots(down, across, squeeze=False)
    panels = panels.T if below else panels
    for j, measure in enumerate(wanted):
        grids = [grid(layers, types, group, measure) for group in rows.values()]
        low, high = np.nanmin(np.stack(grids)), np.nanmax(np.stack(grids))
        images = []
        for i, (name, values) in enumerate(zip(rows, grids, strict=True)):
            images.append(_heat(panels[i, j], values, layers, types, low, high))
            words = [title(measure), label(name, 24) if name else ""]
            words += [null_words(rows[name])] if measure.endswith("_ratio") and not whole else []
            panels[i, j].set_title("\n".join(filter(None, words)))
        figure.colorbar(images[0], ax=list(panels[:, j]), fraction=0.06, aspect=30)
    return written(figure, path)


def comparison(reports: Mapping[str, Report], path: Where) -> Path:
    """Several adapters or models on one scale: every matrix a dot, median and 10-90 % a bar; of a
    DoRA its direction."""
    rows = {name: drawable(report, len(reports) == 1) for name, report in reports.items()}
    every = [row for group in rows.values() for row in group]
    if not every:
        raise NothingToShowError("nothing to draw: every matrix is zero or was left out")
    wanted = ["effective_rank", "participation_ratio", "topk_energy", "relative_norm"]
    if not any(row["relative_norm"] is not None for row in every):
        wanted[-1] = "frobenius_norm"
    figure = new_figure(11, 1.7 + 0.55 * len(rows))
    panels = figure.subplots(1, len(wanted), sharey=True)
    for axes, measure in zip(panels, wanted, strict=True):
        for i, group in enumerate(rows.values()):
            values = np.array([row[measure] for row in group if row[measure] is not None])
            if len(values):
                _strip(axes, values, len(rows) - 1 - i, COLOURS[i % len(COLOURS)])
        axes.set(xlabel=title(measure), ylim=(-0.6, len(rows) - 0.4))
        if measure != "topk_energy":
            plain_log(axes)
        else:
            axes.set_xlim(-0.03, 1.03)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [label(name, 28) for name in reversed(rows)])
    directions = any(row["kind"] == "direction" for row in every)
    words = "; of a DoRA the direction s B A" if directions else ""
    figure.suptitle(f"every matrix a dot; median and 10-90 % a bar{words}")
    return written(figure, path)


def training(path: Where, picture: Where) -> Path:
    """The curves of a run from its monitor.jsonl, a picture for each measure. NothingToShowError
    for a file that is no log of a monitor."""
    records = _records(path)
    figure = new_figure(9, 6)
    panels = list(figure.subplots(2, 2).flat)
    wanted = ("participation_ratio", "topk_energy", "relative_norm", "relative_spectral")
    for axes, name in zip(panels, wanted, strict=True):
        of_updates(axes, records, {name: "median, 10-90 %"})
        if name.startswith("relative") and math.isfinite(axes.dataLim.minposy):
            plain_log(axes, "y")
        axes.set(xlabel="step", title=title(name))
    panels[-1].legend(loc="lower right", fontsize=8)
    return written(figure, picture)


def of_updates(
    axes: Any, readings: Sequence[Mapping[str, Any]], measures: Mapping[str, str]
) -> None:
    """Onto `axes`, what a monitor saw: medians over the modules with bands of 10 to 90 %, and its
    states as a shade behind.

    readings: as a line of monitor.jsonl has them. measures: what the legend says, by the measure.
    """
    steps = [reading["step"] for reading in readings]
    for (name, words), colour, dash in zip(measures.items(), COLOURS, DASHES * 3, strict=False):
        bands = [reading["bands"].get(name) or (None, None, None) for reading in readings]
        low, middle, high = np.array(bands, dtype=np.float64).T  # None becomes NaN
        axes.plot(steps, middle, color=colour, linestyle=dash, linewidth=2, label=words)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    words = {state: f"state: {state}" for state in SHADES}
    for reading, end in zip(readings, [*steps[1:], steps[-1] + 1], strict=True):
        if (state := reading["state"]) in SHADES:
            shade = {"color": SHADES[state], "alpha": 0.25, "linewidth": 0}
            axes.axvspan(reading["step"], end, **shade, label=words[state])
            words[state] = "_"  # in the legend once
    axes.grid(alpha=0.3)


def _records(path: Where) -> list[dict[str, Any]]:
    """The readings of a monitor; the last line may be torn."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            found.append({key: record[key] for key in ("step", "state", "bands")})
        except (ValueError, KeyError, TypeError):
            break
    if not found:
        raise NothingToShowError(f"{path} holds no reading of a monitor")
    return found


def _curves(rows: Sequence[Record]) -> tuple[Any, Any, Any]:
    """(figure, axes, x of row): by index where all have one rank, else by share of the rank."""
    same = len({row["max_rank"] for row in rows}) == 1
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    plain_log(axes)
    axes.set_xlabel("i" if same else "i / n, the share of all directions")
    axes.grid(alpha=0.3)
    return figure, axes, _index if same else _share


def _index(row: Record, indices: np.ndarray) -> np.ndarray:
    return indices + 1


def _share(row: Record, indices: np.ndarray) -> np.ndarray:
    return (indices + 1) / row["max_rank"]


def _lines(axes: Any, rows: Sequence[Record], found: Sequence[np.ndarray], x_of: Any) -> list[Any]:
    """One line a matrix; of many, thin ones and the median of each type. The legend's handles."""
    groups = named(rows)
    style, handles = Lines(groups), []
    values = {id(row): c for row, c in zip(rows, found, strict=True)}
    for name, group in groups.items():
        own = {**style[name], "zorder": 3, "label": label(name)}
        if len(group) == 1:
            at = positions(group[0]["max_rank"])
            marker = "." if len(at) < 3 else ""
            x, y = x_of(group[0], at), values[id(group[0])][at]
            handles += axes.plot(x, y, marker=marker, linewidth=1.6, **own)
            continue
        axes.add_collection(thin_lines(group, values, x_of, own["color"]))
        shortest = min(row["max_rank"] for row in group)
        shares = (positions(shortest) + 1) / shortest
        middle = np.median([at_shares(values[id(row)], shares) for row in group], 0)
        x = shares * shortest if x_of is _index else shares
        handles += axes.plot(x, middle, linewidth=2, **own)
    if len(handles) > LEGEND:
        words = f"and {len(handles) - LEGEND + 1} more"
        handles = handles[: LEGEND - 1] + axes.plot([], [], linestyle="", label=words)
    return handles


def _random(axes: Any, rows: Sequence[Record], x_of: Any) -> Any:
    """The bands of random matrices; the legend's handle."""
    bands, words = random_bands(rows)
    drawn = None
    for low, high in bands:
        at = positions(len(low))
        x = x_of({"max_rank": len(low)}, at)
        # Of a large shape the band is as thin as a line: it has a width of its own.
        style = {"color": GREY, "linewidth": 3, "joinstyle": "round", "label": words, "zorder": 1}
        drawn = axes.fill_between(x, low[at], high[at], **style)
    return drawn


def _counts(axes: Any, rows: Sequence[Record], found: Sequence[np.ndarray], x_of: Any) -> None:
    """k90 and k99 as dots on the curves of `_lines`."""
    groups = named(rows)
    style = Lines(groups)
    values = {id(row): c for row, c in zip(rows, found, strict=True)}
    for level, column, marker in ((0.9, "k90", "o"), (0.99, "k99", "D")):
        axes.axhline(level, color=GREY, linewidth=0.8, zorder=0)
        for name, group in groups.items():
            shares = [row[column] / row["max_rank"] for row in group if row[column]]
            if not shares:
                continue
            share = np.median(shares)
            y = np.nanmedian([at_shares(values[id(row)], share) for row in group])
            x = share * group[0]["max_rank"] if x_of is _index else share
            axes.plot(x, y, marker, color=style[name]["color"], markersize=6, clip_on=False)


def _legend(axes: Any, handles: Sequence[Any]) -> None:
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _heat(axes: Any, values: np.ndarray, layers: Any, types: Any, low: float, high: float) -> Any:
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=low, vmax=high)
    axes.set_facecolor("#EEEEEE")
    every = max(1, math.ceil(len(layers) / 40))
    names = ["none" if layer is None else str(layer) for layer in layers]
    axes.set_yticks(range(0, len(layers), every), names[::every], fontsize=8)
    axes.set_xticks(range(len(types)), [label(t, 24) for t in types], fontsize=8, rotation=60,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axes.set_ylabel("layer")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value) and 0.2 * len(layers) < TALLEST:  # else it would not fit
            light = high > low and (value - low) / (high - low) < 0.5
            axes.text(j, i, f"{value:#.2g}".rstrip("."), ha="center", va="center", fontsize=7,
                      color="white" if light else "black")  # fmt: skip
    return image


def _strip(axes: Any, values: np.ndarray, y: int, colour: str) -> None:
    jitter = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
    axes.plot(values, y + jitter, ".", color=colour, alpha=0.35, markersize=4, zorder=2)
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    axes.plot([low, high], [y, y], color=colour, linewidth=4, alpha=0.7, zorder=3)
    axes.plot(middle, y, "|", color="black", markersize=14, markeredgewidth=2, zorder=4)
