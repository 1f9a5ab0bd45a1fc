"""What the pictures share: colours that colour-blind readers tell apart, a figure without pyplot,
names that a font can show, and curves of random matrices to compare with."""

import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from structadapt.files import write_atomically
from structadapt.spectra.nulls import null_spectrum, triangle
from structadapt.spectra.report import NAMELESS, Record, Report, by_type, middle, usable

# Okabe & Ito (2008), yellow left out: it is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
GREY, EDGE = "#BBBBBB", "#7A0000"
TYPES, OTHERS = 40, "others"  # module types that a picture tells apart, and the rest
FEW = 12  # matrices that get a line of their own
LEGEND = 20  # of its entries
POINTS, TAIL = 512, 256  # of a curve: as many values are all drawn, and of those beyond so many
LARGEST_NULL = 384  # side of the random matrices that are drawn by chance
SHAPES, TINY = 8, 16  # random shapes in a picture; values of one too short to stand beside others


def style(i: int) -> dict[str, Any]:
    """A colour and a dash for the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
    }


class Lines:
    """A colour and a dash for each name, the same in every picture of a report."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))

    def __getitem__(self, name: str) -> dict[str, Any]:
        return style(self.names.index(name))


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that no window ever shows. ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'structadapt[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def written(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Save a figure as the ending of the path says; the path."""
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    write_atomically(path, image.getvalue())
    return path


def plain_log(axes: Any, which: str = "x") -> None:
    """A logarithmic axis with few numbers, such as 20 and 0.003."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis=which, labelsize=8)


def thin_lines(
    group: Sequence[Record], values: Mapping[int, np.ndarray], x_of: Any, colour: str
) -> Any:
    """The curves of many matrices, faint, as one object of matplotlib."""
    from matplotlib.collections import LineCollection

    lines = []
    for row in group:
        at = positions(row["max_rank"])
        lines.append(np.column_stack([x_of(row, at), values[id(row)][at]]))
    return LineCollection(lines, colors=colour, linewidths=0.5, alpha=0.25, zorder=2)


def label(name: Any, width: int = 40) -> str:
    """A name that any font shows, that is no formula, and not too long."""
    text = str(name).encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text if text.strip() else NAMELESS  # matplotlib would make up another one
    text = f" {text}" if text.startswith("_") else text  # which a legend leaves out
    return middle(text, width).replace("$", r"\$")


def curve(report: Report, row: Record) -> np.ndarray:
    """s_i / s_1 of one row, i from 1 to its largest possible rank; NaN for what is 0."""
    s = np.asarray(report.spectrum(row["name"], row["kind"]), dtype=np.float64)[: row["max_rank"]]
    if not len(s) or s[0] <= 0:
        return np.full(len(s), np.nan)
    return np.where(s > 0, s / s[0], np.nan)


def drawable(report: Report, whole: bool = True) -> list[Record]:
    """The rows with a spectrum that is not all 0, one a module: where it has its direction and the
    whole update, the whole or, with whole=False, the direction."""
    rows = {}
    for row in report.rows:
        if usable(row) and row["frobenius_norm"]:
            rows[row["name"]] = row if whole else rows.get(row["name"], row)  # the whole is later
    return list(rows.values())


def named(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Each matrix by itself where they are few, else by module type."""
    return {row["name"]: [row] for row in rows} if len(rows) <= FEW else by_type(rows)


def null_words(rows: Sequence[Record]) -> str:
    """Which random matrices the ratios of these rows are over."""
    ranks = {row["max_rank"] for row in rows if row["max_rank"] < min(row["shape"])}
    if any(row["max_rank"] == min(row["shape"]) for row in rows):
        return "random of full rank" if not ranks else "random of full rank and of factors"
    span = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    return f"random of rank {span}"


def few_types(reports: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """The rows of each report, with at most TYPES module types in all: where there are more, those
    of the fewest matrices are one, "others"."""
    every = by_type(row for rows in reports.values() for row in rows)
    kept = set(sorted(every, key=lambda name: -len(every[name]))[: TYPES - 1])
    kept = set(every) if len(every) <= TYPES else kept
    return {
        name: [r if r["module_type"] in kept else {**r, "module_type": OTHERS} for r in rows]
        for name, rows in reports.items()
    }


def positions(n: int) -> np.ndarray:
    """Indices of a curve of n values: the first all, those beyond evenly on a logarithmic axis."""
    if n <= POINTS:
        return np.arange(n)
    tail = np.geomspace(POINTS, n, TAIL).round().astype(int) - 1
    return np.unique(np.concatenate([np.arange(POINTS), tail]))


def at_shares(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """A curve of n values at shares i / n, interpolated."""
    own = (np.arange(len(values)) + 1) / len(values)
    return np.interp(shares, own, values, left=np.nan)


Band = tuple[np.ndarray, np.ndarray]  # lowest and highest s_i / s_1 of random matrices, i from 1


def random_bands(rows: Sequence[Record]) -> tuple[list[Band], str]:
    """Random matrices like those of the rows, a band a shape, and what a legend says of them.

    Shapes of few values are left out where others have more: of i / n they have a corner alone.
    Of many shapes, SHAPES are taken evenly by size.
    """
    kinds = {(row["max_rank"], *sorted(row["shape"])) for row in rows}
    long = sorted(kind for kind in kinds if kind[0] >= TINY) or sorted(kinds)
    at = np.unique(np.linspace(0, len(long) - 1, SHAPES).round().astype(int))
    words = "same shapes" if len(at) == len(kinds) else f"{len(at)} of {len(kinds)} shapes"
    return [_band(*long[i]) for i in at], f"random, {words}"


@lru_cache(maxsize=64)
def _band(rank: int, n: int, longer: int) -> Band:
    """Over a few draws; of a large Gaussian matrix, whose draws a picture cannot tell apart, the
    expected singular values."""
    if rank == n > LARGEST_NULL:
        draws = [null_spectrum((n, longer)).numpy()]
    else:
        draws = [_random(rank, n, longer, seed) for seed in range(3)]
    curves = np.stack([s / s[0] for s in draws])
    return curves.min(0), curves.max(0)


def _random(rank: int, n: int, longer: int, seed: int) -> np.ndarray:
    """Singular values of a Gaussian matrix (longer, n), or of B A for Gaussian factors of a lower
    rank, by `nulls.triangle`."""
    generator = np.random.default_rng((seed, longer, n, rank))
    if rank == n:
        return np.linalg.svd(triangle(generator, longer, n), compute_uv=False)
    left, right = (triangle(generator, size, rank) for size in (longer, n))
    return np.linalg.svd(left @ right.T, compute_uv=False)


def grid(
    layers: Sequence[Any], types: Sequence[str], rows: Sequence[Record], name: str
) -> np.ndarray:
    """(layers, types) of the median of one measure; NaN where there is none."""
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row[name] is not None and row["layer"] in layers and row["module_type"] in types:
            place = layers.index(row["layer"]), types.index(row["module_type"])
            cells[place].append(row[name])
    values = np.full((len(layers), len(types)), math.nan)
    for place, found in cells.items():
        values[place] = np.median(found)
    return values


def layers_of(rows: Sequence[Record]) -> list[Any]:
    """The layers in order, None first for what is in no layer."""
    return sorted({row["layer"] for row in rows}, key=lambda n: -1 if n is None else n)
