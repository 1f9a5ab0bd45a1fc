"""Pictures of a study, written to files. They need matplotlib (the extra `plot`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from structadapt.spectra.drawing import COLOURS, DASHES, GREY, new_figure, written
from structadapt.study.statistics import Limits, Row, final, grouped, mean_of

MARKS = "osD^vP*X"
LIVED, DIED = COLOURS[0], COLOURS[1]


def scale_name(row: Row) -> str:
    """How alpha was chosen, in words, of a run of LoRA or DoRA."""
    if row["alpha"] == "2r" or row["alpha"] == 2 * row["rank"]:
        return "alpha = 2r"
    scaling = row["scaling"] or "alpha/r"
    return f"alpha = {row['alpha']:g}" + ("" if scaling == "alpha/r" else f", {scaling}")


def setting_name(row: Row) -> str:
    """A row of a table: the adapter and its size."""
    name = {"lora": "LoRA", "dora": "DoRA", "quanta": "QuanTA", "full": "full fine-tuning"}
    text = name[row["adapter"]]
    if row["rank"] is not None:
        text += f" r={row['rank']}"
    if row["axes"] is not None:
        text += f" {row['axes']} axes"
    if row["init"] not in (None, "identity"):
        text += f", init {row['init']}"
    return text


def cliff(rows: Sequence[Row], path: Path) -> Path | None:
    """Accuracy against rank, a line a learning rate, a panel a scaling rule. LoRA only."""
    rows = [row for row in rows if row["adapter"] == "lora"]
    scales = scales_of(rows)
    ranks = sorted({row["rank"] for row in rows})
    if len(ranks) < 3:
        return None
    figure = new_figure(4.2 * len(scales) + 0.6, 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(scales), sharey=True))
    rates = sorted({row["rate"] for row in rows})
    for panel, (name, found) in zip(axes, scales.items(), strict=True):
        for i, rate in enumerate(rates):
            here = [row for row in found if row["rate"] == rate]
            _means(panel, here, lambda row: row["rank"], f"lr {rate:g}", i)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [f"{rank}" for rank in ranks])
        panel.set(title=name, xlabel="rank", ylim=(-0.02, top(rows)))
        _floor(panel, rows)
    axes[0].set_ylabel("sampled held-out accuracy")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return written(figure, path)


def size_of_step(rows: Sequence[Row], path: Path) -> Path | None:
    """Accuracy against scale x rank x learning rate, which dW of the first Adam step goes with."""
    rows = [row for row in rows if row["adapter"] == "lora"]
    if len({row["rank"] for row in rows}) < 3:
        return None
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for i, (name, found) in enumerate(scales_of(rows, common=False).items()):
        x = [row["scale"] * row["rank"] * row["rate"] for row in found]
        axes.scatter(x, [final(row) for row in found], s=22, marker=MARKS[i], alpha=0.75,
                     color=COLOURS[i], label=name)  # fmt: skip
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
                marker=MARKS[i],
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
    if len({row["batch"] for row in rows}) < 2:
        return None
    rules = [rule for rule in ("fixed", "sqrt", "linear") if any(r == rule for r in _rules(rows))]
    figure = new_figure(4.2 * len(rules) + 1.6, 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(rules), sharey=True))
    settings = list(grouped(rows, batch_line))
    for panel, rule in zip(axes, rules, strict=True):
        for i, name in enumerate(settings):
            found = [r for r in rows if batch_line(r) == name and follows(r, rule)]
            _means(panel, found, lambda row: row["batch"], name, i)
        panel.set_xscale("log", base=2)
        sizes = sorted({row["batch"] for row in rows})
        panel.set_xticks(sizes, [f"{size}" for size in sizes])
        panel.set(title=f"learning rate: {rule}", xlabel="prompts a step", ylim=(-0.02, top(rows)))
        _floor(panel, rows)
    axes[0].set_ylabel("sampled held-out accuracy")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return written(figure, path)


def spectra(rows: Sequence[Row], path: Path) -> Path | None:
    """Singular values of the updates, beside the largest: medians over modules and runs."""
    rows = [row for row in rows if row["curve"]]
    ranks = sorted({row["rank"] for row in rows if row["adapter"] == "lora" and row["rank"] > 1})
    shown = {ranks[0], ranks[len(ranks) // 2], ranks[-1]} if ranks else set()  # of many ranks
    rows = [row for row in rows if row["adapter"] != "lora" or row["rank"] in shown]
    if not rows:
        return None
    figure = new_figure(10.4, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for i, (name, found) in enumerate(sorted(grouped(rows, batch_line).items())):
        for panel, died in zip(axes, (False, True), strict=True):
            curves = [dict(row["curve"]) for row in found if row["collapsed"] == died]
            if curves:
                x = sorted(set.intersection(*(set(curve) for curve in curves)))
                y = [np.median([curve[n] for curve in curves]) for n in x]
                panel.plot(x, y, linewidth=1.4, label=name, **style(i))
    for panel, title in zip(axes, ("lived", "collapsed"), strict=True):
        panel.set(xscale="log", yscale="log", ylim=(1e-3, 1.3), xlabel="i", title=title)
    axes[0].set_ylabel("s_i / s_1")
    known = {line.get_label(): line for panel in axes for line in panel.get_lines()}
    axes[1].legend(known.values(), known, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
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
    """Held-out accuracy of the supervised control while it trains."""
    if not rows:
        return None
    figure = new_figure(7.4, 4.0)
    axes = figure.subplots()
    for i, (name, found) in enumerate(grouped(rows, sft_line).items()):
        for j, row in enumerate(found):
            points = [(s + 1, r) for s, r in enumerate(row["rewards"]) if r is not None]
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                color=COLOURS[i % len(COLOURS)],
                linewidth=1.1,
                alpha=0.8,
                linestyle=DASHES[i // len(COLOURS) % 3],
                label=name if j == 0 else None,
            )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="step", ylabel="sampled held-out accuracy", ylim=(-0.02, top(rows)))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return written(figure, path)


# -- what lines stand for --------------------------------------------------------------------------


def scales_of(rows: Sequence[Row], common: bool = True) -> dict[str, list[Row]]:
    """The runs of each scaling rule. A rank at which two rules say the same scale is one run: with
    `common` it is in both."""
    found = grouped(rows, scale_name)
    if not common:
        return found
    by_run: dict[str, list[Row]] = {}
    for name, own in found.items():
        have = {(r["rank"], r["rate"], r["seed"]) for r in own}
        more = [r for r in rows if scale_name(r) != name
                and (r["rank"], r["rate"], r["seed"]) not in have
                and abs(r["scale"] - rule_scale(name, r["rank"])) < 1e-3 * r["scale"]]  # fmt: skip
        by_run[name] = own + more
    return by_run


def rule_scale(name: str, rank: int) -> float:
    """The scale that a rule gives a rank."""
    if name == "alpha = 2r":
        return 2.0
    alpha, _, scaling = name.removeprefix("alpha = ").partition(", ")
    divisor = {"": rank, "alpha/sqrt(r)": rank**0.5, "constant": 1}[scaling]
    return float(alpha) / divisor


def follows(row: Row, rule: str) -> bool:
    """Whether a run's rate is that of a rule; at the batch of reference all rules agree."""
    return row["lr_rule"] == rule or row["batch"] == row["lr_batch"]


def _rules(rows: Sequence[Row]) -> set[str]:
    return {row["lr_rule"] for row in rows}


def batch_line(row: Row) -> str:
    return setting_name(row) + (f", {scale_name(row)}" if row["rank"] is not None else "")


def sft_line(row: Row) -> str:
    return f"{batch_line(row)}, lr {row['rate']:g}"


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


def style(i: int) -> dict[str, str]:
    """A colour and a dash for the i-th line."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % 3]}


def top(rows: Sequence[Row]) -> float:
    """The upper end of an axis of accuracies."""
    return min(1.02, 1.1 * max(max(final(row), row["before"]["sampled"]) for row in rows))


def _floor(axes: Any, rows: Sequence[Row]) -> None:
    """Where the runs began."""
    start = mean_of([row["before"]["sampled"] for row in rows]).mean
    axes.axhline(start, color=GREY, linewidth=1, zorder=0)
