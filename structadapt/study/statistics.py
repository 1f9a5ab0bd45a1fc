"""Means over seeds with their intervals, and the limit of the first step's KL."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    return Mean(fmean(values), t * stdev(values) / math.sqrt(n), n)


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """The rows of each key, in the order of the keys' first rows."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def final(row: Row) -> float:
    """Sampled accuracy at the end; 0 for a run that diverged."""
    return row["after"]["sampled"] if row["after"] else 0.0


@dataclass(frozen=True)
class Limits:
    """Which KL of the first step tells the runs that collapse."""

    safe: float  # the largest of a run that lived and below every one that died, rounded down
    collapse: float  # the smallest that died and above every one that lived, rounded up
    largest_lived: float
    smallest_died: float
    best: float  # the one limit with the fewest errors, in the geometric middle of its gap
    errors: int  # runs on its wrong side
    count: int


def limits(points: Sequence[tuple[float, bool]]) -> Limits:
    """Of (KL, collapsed) of each run. ValueError if all lived, or none did."""
    lived = sorted(kl for kl, collapsed in points if not collapsed)
    died = sorted(kl for kl, collapsed in points if collapsed)
    if not lived or not died:
        raise ValueError("every run lived, or none did: nothing to choose from")
    edges = [math.sqrt(a * b) for a, b in pairwise(sorted([*lived, *died]))]
    best = min(edges, key=lambda limit: errors(points, limit))
    below = [kl for kl in lived if kl < died[0]]
    above = [kl for kl in died if kl > lived[-1]]
    return Limits(
        two_digits(max(below), math.floor) if below else 0.0,
        two_digits(min(above), math.ceil) if above else math.inf,
        lived[-1], died[0], best, errors(points, best), len(points),
    )  # fmt: skip


def errors(points: Iterable[tuple[float, bool]], limit: float) -> int:
    """Runs that lived from the limit on, or died below it."""
    return sum((kl >= limit) != collapsed for kl, collapsed in points)


def two_digits(value: float, towards: Callable[[float], int]) -> float:
    """Rounded to two digits, up or down. 0 stays."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{towards(value / unit) * unit:.2g}")
