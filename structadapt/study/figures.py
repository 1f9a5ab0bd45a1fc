"""Pictures of a study, written to files. They need matplotlib (the extra `plot`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from structadapt.spectra.drawing import COLOURS, GREY, new_figure, style, written
from structadapt.study.cell import RULES
from structadapt.study.statistics import (
    Limits,
    Row,
    by_scaling,
    final,
    following,
    grouped,
    in_words,
    mean_of,
    scaling_of,
    setting,
    whole_setting,
)

MARKS = "osD^vP*X"
LIVED, DIED = COLOURS[0], COLOURS[1]


def cliff(rows: Sequence[Row], path: Path) -> Path | None:
    """Accuracy against rank, a line a learning rate (and batch size), a panel a scaling rule."""

    def line(row: Row) -> str:
        batch = f"batch {row['batch']}, " if len(sizes) > 1 else ""
        return f"{batch}lr {row['rate']:.3g}"

    sizes = {row["batch"] for row in rows}
    return _panels(rows, path, lambda row: row["rank"], "rank", line, 2)


def rates(rows: Sequence[Row], path: Path) -> Path | None:
    """Accuracy against learning rate, a line a rank, a panel a scaling rule."""
    if len({row["batch"] for row in rows}) > 1 or len({row["rate"] for row in rows}) < 3:
        return None
    return _panels(rows, path, lambda row: row["rate"], "learning rate", setting, 10)


def _panels(
    rows: Sequence[Row], path: Path, x: Callable[[Row], float], label: str,
    line: Callable[[Row], str], base: int,
) -> Path | None:  # fmt: skip
    """LoRA of three ranks and more: a panel a scaling rule."""
    rows = [row for row in rows if row["adapter"] == "lora"]
    if len({row["rank"] for row in rows}) < 3:
        return None
    rules = by_scaling(rows)
    ordered = sorted(rows, key=lambda row: (row["rank"], row["rate"]))
    names = list(dict.fromkeys(map(line, ordered)))
    figure = new_figure(4.2 * len(rules) + 1.2, 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(rules), sharey=True))
    for panel, (rule, found) in zip(axes, rules.items(), strict=True):
        for i, name in enumerate(names):
            _means(panel, [row for row in found if line(row) == name], x, name, i)
        panel.set_xscale("log", base=base)
        ticks = sorted({x(row) for row in rows})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()  # a range below a decade would label these too
        panel.set(title=rule, xlabel=label, ylim=(-0.02, top(rows)))
        _floor(panel, rows)
    axes[0].set_ylabel("sampled held-out accuracy")
    _legend(axes)
    return written(figure, path)


def size_of_step(rows: Sequence[Row], path: Path) -> Path | None:
    """Accuracy against scale x rank x learning rate, which dW of the first Adam step goes with."""
    rows = [row for row in rows if row["adapter"] == "lora"]
    if len({row["rank"] for row in rows}) < 3:
        return None
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    rules = grouped(rows, lambda row: in_words(scaling_of(row)))
    for i, (name, found) in enumerate(rules.items()):
        x = [row["scale"] * row["rank"] * row["rate"] for row in found]
        mark = {"marker": MARKS[i % len(MARKS)], "color": COLOURS[i % len(COLOURS)]}
        axes.scatter(x, list(map(final, found)), s=22, alpha=0.75, label=name, **mark)
    axes.set(xscale="log", xlabel="scale x rank x learning rate", ylim=(-0.02, top(rows)),
             ylabel="sampled held-out accuracy")  # fmt: skip
    _floor(axes, rows)
    axes.legend(fontsize=8)
    return written(figure, path)


def first_kl(rows: Sequence[Row], limits: Limits | None, path: Path) -> Path | None:
    """Accuracy at the end over that at the start, against the KL of the first step."""
    rows = [row for row in rows if row["first_kl"]]
    if not rows:
        return None
    figure = new_figure(6.8, 4.2)
    axes = figure.subplots()
    for i, (name, found) in enumerate(grouped(rows, lambda row: row["adapter"]).items()):
        for died in (False, True):
            some = [row for row in found if row["collapsed"] == died]
            x = [max(row["first_kl"], 1e-5) for row in some]
            y = [final(row) / max(row["before"]["sampled"], 1e-3) for row in some]
            axes.scatter(
                x,
                y,
                s=22,
                marker=MARKS[i % len(MARKS)],
                alpha=0.7,
                color=DIED if died else LIVED,
                label=f"{name}, {'collapsed' if died else 'lived'}" if some else None,
            )
    axes.axhline(1.0, color=GREY, linewidth=1)
    if limits is not None:
        axes.axvline(
            limits.best,
            color="#000000",
            linewidth=1,
            linestyle="--",
            label=f"best limit {limits.best:.2g}: {limits.errors} of {limits.count} wrong",
        )
    axes.set(xscale="log", xlabel="KL of the first step, nats a token",
             ylabel="accuracy at the end / at the start")  # fmt: skip
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return written(figure, path)


def batches(rows: Sequence[Row], path: Path) -> Path | None:
    """Accuracy against batch size, a panel for each rule of the learning rate."""
    sizes = sorted({row["batch"] for row in rows})
    rules = [rule for rule in RULES if any(row["lr_rule"] == rule for row in rows)]
    if len(sizes) < 2:
        return None
    figure = new_figure(4.2 * len(rules) + 1.6, 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(rules), sharey=True))
    bases = grouped(rows, lambda row: (whole_setting(row), row["lr"], row["lr_batch"]))
    for panel, rule in zip(axes, rules, strict=True):
        for i, (name, lr, batch) in enumerate(bases):
            own = [row for row in rows if whole_setting(row) == name]
            found = following(own, lr, rule, batch)
            _means(panel, found, lambda row: row["batch"], f"{name}, lr {lr:g} at {batch}", i)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{size}" for size in sizes])
        panel.set(title=f"learning rate: {rule}", xlabel="prompts a step", ylim=(-0.02, top(rows)))
        _floor(panel, rows)
    axes[0].set_ylabel("sampled held-out accuracy")
    _legend(axes)
    return written(figure, path)


def spectra(rows: Sequence[Row], path: Path) -> Path | None:
    """Singular values of the updates, beside the largest: medians over modules and runs."""
    rows = [row for row in rows if row["curve"]]
    ranks = sorted({row["rank"] for row in rows if row["adapter"] == "lora" and row["rank"] > 1})
    shown = {ranks[0], ranks[len(ranks) // 2], ranks[-1]} if ranks else set()  # of many ranks
    rows = [row for row in rows if row["adapter"] != "lora" or row["rank"] in shown]
    if not rows:
        return None
    fates = sorted({row["collapsed"] for row in rows})
    figure = new_figure(2.4 + 4.0 * len(fates), 4.2)
    axes = np.atleast_1d(figure.subplots(1, len(fates), sharey=True))
    for i, (name, found) in enumerate(grouped(rows, whole_setting).items()):
        for panel, died in zip(axes, fates, strict=True):
            curves = [dict(row["curve"]) for row in found if row["collapsed"] == died]
            if curves:
                x = sorted(set.intersection(*(set(curve) for curve in curves)))
                y = [np.median([curve[n] for curve in curves]) for n in x]
                panel.plot(x, y, linewidth=1.4, label=name, **style(i))
    for panel, died in zip(axes, fates, strict=True):
        title = "collapsed" if died else "lived"
        panel.set(xscale="log", yscale="log", ylim=(1e-3, 1.3), xlabel="i", title=title)
    axes[0].set_ylabel("s_i / s_1")
    _legend(axes)
    return written(figure, path)


def traces(rows: Sequence[Row], path: Path) -> Path | None:
    """What the monitor saw while it trained: runs that lived and runs that collapsed."""
    rows = [row for row in rows if row["trace"] and row["trace"]["step"] and row["rank"] != 1]
    if not rows:
        return None
    names = {"topk_energy": "top-1 energy", "of_null": "participation ratio / random",
             "relative_spectral": "|dW|_2 / |W|_2"}  # fmt: skip
    figure = new_figure(4.0 * len(names), 3.6)
    axes = figure.subplots(1, len(names))
    for panel, (name, title) in zip(axes, names.items(), strict=True):
        for row in sorted(rows, key=lambda row: row["collapsed"]):
            values = [np.nan if v is None else v for v in row["trace"][name]]
            panel.plot(row["trace"]["step"], values, linewidth=0.7, alpha=0.5,
                       color=DIED if row["collapsed"] else LIVED)  # fmt: skip
        panel.plot([], [], color=LIVED, label="lived")
        panel.plot([], [], color=DIED, label="collapsed")
        panel.set(xlabel="step", title=title)
        if name == "relative_spectral" and any(v for row in rows for v in row["trace"][name]):
            panel.set_yscale("log")
    axes[-1].legend(fontsize=8)
    return written(figure, path)


def supervised(rows: Sequence[Row], path: Path) -> Path | None:
    """Held-out accuracy of the supervised control while it trains, a panel a scaling rule."""
    rows = [row for row in rows if any(reward is not None for reward in row["rewards"])]
    if not rows:
        return None
    panels = grouped(rows, lambda row: in_words(scaling_of(row)) if row["rank"] else setting(row))
    figure = new_figure(3.6 * len(panels) + 1.6, 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    names = list(grouped(rows, lambda row: f"{setting(row)}, lr {row['rate']:g}"))
    for panel, (title, found) in zip(axes, panels.items(), strict=True):
        for row in found:
            name = f"{setting(row)}, lr {row['rate']:g}"
            points = [(s + 1, r) for s, r in enumerate(row["rewards"]) if r is not None]
            x, y = zip(*points, strict=True)
            panel.plot(x, y, linewidth=1.1, alpha=0.8, label=name, **style(names.index(name)))
        panel.set_xscale("log", base=2)
        panel.set(xlabel="step", ylim=(-0.02, 1.02), title=title)
    axes[0].set_ylabel("sampled held-out accuracy")
    _legend(axes)
    return written(figure, path)


# -- what lines stand for --------------------------------------------------------------------------


def _legend(axes: Any) -> None:
    """Every line of all panels, once, beside the last one."""
    lines = [line for panel in axes for line in panel.get_lines()]
    known = {line.get_label(): line for line in lines if line.get_label()[0] != "_"}
    axes[-1].legend(known.values(), known, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _means(axes: Any, rows: Sequence[Row], key: Callable[[Row], float], label: str, i: int) -> None:
    """A line through the means over seeds, and a dot for each run."""
    groups = sorted(grouped(rows, key).items())
    if not groups:
        return
    x = [k for k, _ in groups]
    y = [mean_of([final(row) for row in found]).mean for _, found in groups]
    axes.plot(x, y, marker=MARKS[i % len(MARKS)], markersize=5, label=label, **style(i))
    x = [key(row) for row in rows]
    axes.scatter(x, list(map(final, rows)), s=7, color=style(i)["color"], alpha=0.5)


def top(rows: Sequence[Row]) -> float:
    """The upper end of an axis of accuracies."""
    return min(1.02, 1.1 * max(max(final(row), row["before"]["sampled"]) for row in rows))


def _floor(axes: Any, rows: Sequence[Row]) -> None:
    """Where the runs began."""
    start = mean_of([row["before"]["sampled"] for row in rows]).mean
    axes.axhline(start, color=GREY, linewidth=1, zorder=0)
