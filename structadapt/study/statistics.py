"""Means over seeds with their intervals, runs that may be compared, and the best limit of a number
that tells runs that collapse."""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from structadapt.adapters import LoRA
from structadapt.study.cell import NO_FIGURE, OPTIONS, Cell, rate_by

Row = dict[str, Any]
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.959964
VARIED = {"adapter", *OPTIONS, "dtype", "lr", "lr_rule", "lr_batch", "batch", "seed"}
SAME_FIGURE = {"micro_batch", "slots", *NO_FIGURE}
PROTOCOL = tuple(f.name for f in fields(Cell) if f.name not in VARIED | SAME_FIGURE)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval (Student's t; no interval for one seed)."""

    mean: float
    half: float | None  # of the interval
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """ValueError for no values."""
    if not values:
        raise ValueError("no values")
    n = len(values)
    if n == 1:
        return Mean(values[0], None, 1)
    return Mean(fmean(values), student(n - 1) * stdev(values) / math.sqrt(n), n)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (beyond 10 degrees of freedom the series of Fisher and
    Cornish)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """The rows of each key, in the order of the keys' first rows."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def parts(rows: Iterable[Row]) -> list[list[Row]]:
    """Runs that may be compared: alike in all but adapter, learning rate, batch size and seed. The
    largest part first."""
    groups = grouped(rows, lambda row: json.dumps([row[name] for name in PROTOCOL]))
    return sorted(groups.values(), key=len, reverse=True)


def final(row: Row) -> float:
    """Sampled accuracy at the end; 0 for a run that diverged."""
    return row["after"]["sampled"] if row["after"] else 0.0


@dataclass(frozen=True)
class Limits:
    """Which values of a number tell the runs that collapse."""

    safe: float  # the largest of a run that lived and below every one that died, rounded down
    collapse: float  # the smallest that died and above every one that lived, rounded up
    largest_lived: float
    smallest_died: float
    best: float  # the one limit with the fewest errors, in the geometric middle of its gap
    errors: int  # runs on its wrong side
    count: int


def limits(points: Sequence[tuple[float, bool]]) -> Limits:
    """Of (value, collapsed) of each run; values are positive. ValueError if all lived, or none
    did."""
    lived = sorted(value for value, collapsed in points if not collapsed)
    died = sorted(value for value, collapsed in points if collapsed)
    if not lived or not died:
        raise ValueError("every run lived, or none did: nothing to choose from")
    values = sorted([*lived, *died])
    edges = [math.sqrt(a * b) for a, b in pairwise(values)]
    edges += [values[0], math.nextafter(values[-1], math.inf)]  # all die, none does
    best = min(edges, key=lambda limit: errors(points, limit))
    below = [value for value in lived if value < died[0]]
    above = [value for value in died if value > lived[-1]]
    return Limits(
        two_digits(max(below), math.floor) if below else 0.0,
        two_digits(min(above), math.ceil) if above else math.inf,
        lived[-1], died[0], best, errors(points, best), len(points),
    )  # fmt: skip


def errors(points: Iterable[tuple[float, bool]], limit: float) -> int:
    """Runs that lived from the limit on, or died below it."""
    return sum((value >= limit) != collapsed for value, collapsed in points)


def two_digits(value: float, towards: Callable[[float], int]) -> float:
    """Rounded to two digits, up or down. 0 stays."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{towards(value / unit) * unit:.2g}")


# -- settings, and rules that they follow ----------------------------------------------------------

Scaling = tuple[float | str, str]  # (alpha or "2r", how the scale comes of it)
PAPER: Scaling = ("2r", "alpha/r")


def setting(row: Row) -> str:
    """An adapter and its size, in words."""
    name = {"lora": "LoRA", "dora": "DoRA", "quanta": "QuanTA", "full": "full fine-tuning"}
    text = name[row["adapter"]]
    if row["rank"] is not None:
        text += f" r={row['rank']}"
    if row["axes"] is not None:
        text += f" {row['axes']}" + (" axes" if str(row["axes"]).isdigit() else "")
    if row["init"] not in (None, "identity"):
        text += f", init {row['init']}"
    return text + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def whole_setting(row: Row) -> str:
    """And its scale."""
    return setting(row) + (f", {in_words(scaling_of(row))}" if row["rank"] is not None else "")


def scaling_of(row: Row) -> Scaling:
    """How the scale of a run with a rank was chosen."""
    twice = row["scaling"] == "alpha/r" and row["alpha"] == 2 * row["rank"]
    return PAPER if twice else (row["alpha"], row["scaling"])


def in_words(scaling: Scaling) -> str:
    alpha, how = scaling
    text = f"alpha = {alpha}" if isinstance(alpha, str) else f"alpha = {alpha:g}"
    return text if how == "alpha/r" else f"{text}, {how}"


def scale_by(scaling: Scaling, rank: int) -> float:
    """The scale that a rule gives a rank."""
    alpha, how = scaling
    return LoRA(rank, 2.0 * rank if isinstance(alpha, str) else alpha, how).scale


def with_scaling(rows: Iterable[Row], scaling: Scaling) -> list[Row]:
    """The runs with a rank that have the scale a rule gives it, however it was said."""
    return [r for r in rows if r["rank"] is not None
            and math.isclose(r["scale"], scale_by(scaling, r["rank"]), rel_tol=1e-3)]  # fmt: skip


def by_scaling(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each rule; one at a rank where two rules agree is in both."""
    rules = list(dict.fromkeys(scaling_of(row) for row in rows))
    return {in_words(rule): with_scaling(rows, rule) for rule in rules}


def following(rows: Iterable[Row], lr: float, rule: str, lr_batch: int) -> list[Row]:
    """The runs whose rate is the one that a rule makes of `lr` at `lr_batch` prompts a step."""
    return [
        r for r in rows
        if math.isclose(r["rate"], rate_by(rule, lr, r["batch"], lr_batch), rel_tol=1e-6)
    ]  # fmt: skip
