"""Ratio bars and a roofline from the results of benchmarks/gpu.py, as PNG and SVG.

    python benchmarks/plot.py docs/results/gpu_nvidia_h200.json
    python benchmarks/plot.py RESULT.json --out DIR --rows 2048

Needs matplotlib (pip install structadapt[plot]) and nothing but the JSON. Bars are medians over the
frozen linear of the same round, with the 20th and 80th percentile; a bar that leaves the picture
has its number on it. A line over "ours" is the target, a cross what was counted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import counts

plt: Any = None
lines: Any = None
ticker: Any = None
try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines as _lines
    from matplotlib import pyplot as _pyplot
    from matplotlib import ticker as _ticker

    plt, lines, ticker = _pyplot, _lines, _ticker
except ImportError:
    pass

COLOURS = {
    "ours": "#0b4f9e", "ours cublas": "#4a90d9", "ours triton": "#9cc3ee", "torch twin": "#6b6b6b",
    "addmm": "#b0b0b0", "compile": "#8e6bbf", "peft bf16": "#e08a1e", "peft": "#c0392b",
    "einsum": "#17a2a2", "naive": "#7f1d1d", "liger FLCE": "#2e8b57", "liger GRPO": "#8fc9a5",
}  # fmt: skip
OPS = {"lora": "LoRA", "dora": "DoRA", "quanta": "QuanTA", "head": "head", "block": "block"}
KINDS = {"fwd": "forward", "bwd": "backward", "step": "forward + backward"}
OP_COLOURS = dict(zip(OPS, ("#0b4f9e", "#c0392b", "#2e8b57", "#8e6bbf", "#e08a1e"), strict=True))
HIGHEST = 3.0  # of a ratio in the picture
Record = dict[str, Any]


def timed(results: Record, op: str) -> list[tuple[str, Record]]:
    """(name, cell) of an op, those with a ratio."""
    found = []
    for key, cell in results["cells"].items():
        part, _, name = key.partition("/")
        if part == op and any(e.get("ratio") for e in cell.get("providers", {}).values()):
            found.append((name, cell))
    return found


def title(results: Record) -> str:
    made = results["machine"]
    used = made["versions"]
    name = f"{made['device']}, torch {used['torch']}, triton {used['triton']}, {made['commit']}"
    return f"smoke, not a measurement: {name}" if results["smoke"] else name


def rows_shown(results: Record, wanted: int) -> int:
    """The M of the picture: what is asked for, else 8192 where that was timed, else the first."""
    found = [c["case"]["M"] for op in OPS for _, c in timed(results, op)]
    if wanted or not found:
        return wanted
    return 8192 if 8192 in found else found[0]


# -- ratios ----------------------------------------------------------------------------------------


def panels(results: Record, M: int) -> list[tuple[str, str, list[tuple[str, Record]]]]:
    """(op, kind, cells) of every panel that has something to show."""
    found = []
    for op in OPS:
        cells = [(k, c) for k, c in timed(results, op) if c["case"]["M"] == M]
        for kind in ("step",) if op == "head" else ("fwd", "bwd"):
            if any(kind in e.get("ratio", {}) for _, c in cells for e in c["providers"].values()):
                found.append((op, kind, cells))
    return found


def bars(axis: Any, op: str, kind: str, cells: list[tuple[str, Record]]) -> None:
    """One panel: a group a cell, a bar a provider."""
    names = [n for n in COLOURS if any(kind in c["providers"].get(n, {}).get("ratio", {})
                                       for _, c in cells)]  # fmt: skip
    width, top = 0.8 / max(len(names), 1), HIGHEST
    values = [c["providers"][n]["ratio"][kind]["median"] for _, c in cells for n in names
              if kind in c["providers"].get(n, {}).get("ratio", {})]  # fmt: skip
    if values and op == "head":
        top = min(40.0, max(HIGHEST, 1.1 * max(values)))
    for g, (_, cell) in enumerate(cells):
        for i, name in enumerate(names):
            ratio = cell["providers"].get(name, {}).get("ratio", {}).get(kind)
            if ratio is None:
                continue
            x, y = g + (i + 0.5) * width - 0.4, ratio["median"]
            axis.bar(x, min(max(y, 0), top), 0.92 * width, color=COLOURS[name], zorder=2)
            if y <= top:
                spread = [[max(0, y - ratio["p20"])], [max(0, min(ratio["p80"], top) - y)]]
                axis.errorbar(x, y, spread, color="#222222", linewidth=0.8, zorder=3)
            else:
                axis.text(x, 0.97 * top, f"{y:.3g}", rotation=90, ha="center", va="top",
                          fontsize=7, color="white", zorder=4)  # fmt: skip
        first, last = g - 0.44, g + 0.44
        aim, counted = cell["target"].get(kind), (cell["predicted"] or {}).get(kind)
        if aim:
            axis.hlines(aim, first, last, color="black", linewidth=1.6, zorder=5)
        if counted and "ours" in names and counted <= top:
            at = g + (names.index("ours") + 0.5) * width - 0.4
            axis.plot(at, counted, "x", color="white", markeredgewidth=3.0, markersize=6, zorder=6)
            axis.plot(at, counted, "x", color="black", markeredgewidth=1.2, markersize=5, zorder=7)
    axis.axhline(1, color="#444444", linewidth=0.9, linestyle="--", zorder=1)
    axis.set_ylim(0, 1.03 * top)
    axis.set_xlim(-0.55, max(len(cells), 3) - 0.45)
    axis.set_xticks(range(len(cells)), [label(k) for k, _ in cells], fontsize=8)
    unit = "one product of hidden and W" if op == "head" else "the frozen linear"
    axis.set_title(f"{OPS[op]}, {KINDS[kind]}, over {unit}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def label(key: str) -> str:
    """The name of a cell without its M, in two lines where there is more to say."""
    words = [w for w in key.split() if not (w[0] == "M" and w[1:].isdigit())]
    return "\n".join((words[0], " ".join(words[1:]))) if len(words) > 1 else words[0]


def draw_ratios(results: Record, M: int) -> Any:
    shown = panels(results, M)
    height = 2.5 * max(len(shown), 1) + 1.3
    figure, axes = plt.subplots(max(len(shown), 1), 1, figsize=(13, height), squeeze=False)
    for axis, (op, kind, cells) in zip(axes[:, 0], shown, strict=False):
        bars(axis, op, kind, cells)
    used = [n for n in COLOURS if any(n in c["providers"] and c["providers"][n].get("ratio")
                                      for _, _, cells in shown for _, c in cells)]  # fmt: skip
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[n]) for n in used]
    handles.append(lines.Line2D([], [], color="black", linewidth=1.6))
    handles.append(lines.Line2D([], [], color="black", marker="x", linestyle="none"))
    figure.suptitle(f"{title(results)}, M = {M}", fontsize=11, x=0.01, y=1 - 0.1 / height,
                    ha="left", va="top")  # fmt: skip
    figure.legend(
        handles, [*used, "target", "counted"], ncols=min(8, len(handles)), frameon=False,
        fontsize=9, loc="upper left", bbox_to_anchor=(0.005, 1 - 0.35 / height),
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.95 / height), h_pad=1.2)
    return figure


# -- roofline --------------------------------------------------------------------------------------


def points(results: Record, provider: str) -> list[tuple[str, str, float, float]]:
    """(op, kind, FLOP per byte, TFLOP/s) of every timed cell."""
    found = []
    for op in OPS:
        for _, cell in timed(results, op):
            ms = cell["providers"].get(provider, {}).get("ms", {})
            for kind in ("fwd", "bwd"):
                size = cell["count"][kind]
                if provider == "frozen":
                    case = cell["case"]
                    if "N" not in case or (op == "head" and kind == "bwd"):
                        continue
                    stages = counts.linear(case["M"], case["N"], case["K"])
                    size = {"flops": counts.flops(stages), "bytes": counts.moved(stages)}
                elif op == "head":  # what the forward leaves to the backward is one multiplication
                    kind, size = "step", cell["count"]["step"]
                if ms.get(kind, {}).get("median", 0) > 0:
                    speed = size["flops"] / ms[kind]["median"] / 1e9
                    found.append((op, kind, size["flops"] / size["bytes"], speed))
    return list(dict.fromkeys(found))


def draw_roofline(results: Record) -> Any:
    figure, axis = plt.subplots(figsize=(10, 6.2))
    ours, base = points(results, "ours"), points(results, "frozen")
    every = [*ours, *base]
    low, high = (f([p[2] for p in every], default=d) for f, d in ((min, 10.0), (max, 1000.0)))
    low, high = 0.5 * low, 2 * high
    for when, style in (("start", "-"), ("end", ":")):
        cell = results["cells"].get(f"ceilings/{when}", {})
        if cell.get("status") != "ok":
            continue
        peak, memory = cell["tflops"], cell["tbs"]
        bend = peak / memory
        low, high = min(low, 0.5 * bend), max(high, 2 * bend)
        name = f"measured ceilings, {when}: {peak:.3g} TFLOP/s, {memory:.3g} TB/s"
        axis.plot([low, bend, high], [memory * low, peak, peak], style, color="#444444", label=name)
    markers = {"fwd": "o", "bwd": "s", "step": "D"}
    for group, filled, who in ((base, False, "frozen"), (ours, True, "ours")):
        drawn = set()
        for op, kind, intensity, speed in group:
            colour = OP_COLOURS[op] if filled else "#888888"
            text = f"{OPS[op]}, {KINDS[kind]}" if filled else f"{who}, {KINDS[kind]}"
            axis.plot(intensity, speed, markers[kind], color=colour, markersize=7,
                      markerfacecolor=colour if filled else "none", alpha=0.8, linestyle="none",
                      label=None if text in drawn else text)  # fmt: skip
            drawn.add(text)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        one.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("FLOP per byte, counted")
    axis.set_ylabel("TFLOP/s, counted FLOP over measured time")
    axis.set_title(title(results), fontsize=10, loc="left")
    axis.grid(which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    return figure


def save(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the JSON")
    parser.add_argument("--rows", type=int, default=0, help="M of the ratio bars (8192)")
    options = parser.parse_args(arguments)
    if plt is None:
        print("plot.py needs matplotlib: pip install structadapt[plot]", file=sys.stderr)
        return 2
    results = json.loads(options.result.read_text())
    M = rows_shown(results, options.rows)
    if not panels(results, M):
        print(f"{options.result} has no timed cell with M = {M}", file=sys.stderr)
        return 1
    folder = options.out or options.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    for figure, kind in ((draw_ratios(results, M), "ratios"), (draw_roofline(results), "roofline")):
        for path in save(figure, folder / f"{options.result.stem}_{kind}"):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
