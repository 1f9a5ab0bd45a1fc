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
from structadapt.spectra.nulls import triangle
from structadapt.spectra.report import NAMELESS, Record, Report, by_type, middle, usable

# Okabe & Ito (2008), yellow left out: it is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
GREY, EDGE = "#BBBBBB", "#7A0000"
TYPES, OTHERS = 40, "others"  # module types that a picture tells apart, and the rest
LEGEND = 20  # of its entries
POINTS = 256  # of a drawn curve
LARGEST_NULL = 384  # side of the random matrices that are drawn


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


def drawable(report: Report) -> list[Record]:
    """The rows with a spectrum that is not all 0; the whole update of a module, where there is
    one, and not its direction too."""
    rows = {}
    for row in report.rows:
        if usable(row) and row["frobenius_norm"]:
            rows[row["name"]] = row  # the later one is the whole update
    return list(rows.values())


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
    """Indices of a curve of n values, evenly spaced on a logarithmic axis."""
    return np.unique(np.geomspace(1, n, min(n, POINTS)).round().astype(int)) - 1


def at_shares(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """A curve of n values at shares i / n, interpolated."""
    own = (np.arange(len(values)) + 1) / len(values)
    return np.interp(shares, own, values, left=np.nan)


def random_curves(rows: Sequence[Record]) -> list[np.ndarray]:
    """s_i of random matrices like those of the rows: a few draws for each kind of shape."""
    kinds: dict[tuple[tuple[int, int], int], None] = {}
    for row in rows:
        kinds[row["shape"], row["max_rank"]] = None
    return [_random(shape, rank, seed) for shape, rank in list(kinds)[:8] for seed in range(3)]


@lru_cache(maxsize=64)
def _random(shape: tuple[int, int], rank: int, seed: int) -> np.ndarray:
    """Singular values of a Gaussian matrix, or of B A for Gaussian factors of a lower rank, by
    `nulls.triangle`. A large matrix is drawn smaller, with the same ratio of its sides."""
    generator = np.random.default_rng((seed, *shape, rank))
    if rank < min(shape):
        left, right = (triangle(generator, size, rank) for size in shape)
        return np.linalg.svd(left @ right.T, compute_uv=False)
    n = min(min(shape), LARGEST_NULL)
    longer = n * max(shape) / min(shape)
    return np.linalg.svd(triangle(generator, longer, n), compute_uv=False)


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
