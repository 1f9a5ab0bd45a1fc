"""What the size and the concentration of updates say: healthy, concentrated, collapsing, collapsed.

Concentration alone is no failure: a target of rank 1 is reached with an update of rank 1. What
ruins a policy is an update that grows too fast beside the weights, or one that grows while it
loses its directions. So two axes are read, and their history.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

STATES = ("healthy", "concentrated", "collapsing", "collapsed")
ALARMS = ("collapsing", "collapsed")
MEASURES = (
    "participation_ratio", "of_null", "topk_energy", "relative_norm", "relative_spectral",
)  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """Where states begin. The defaults come from the runs of docs/monitor.md on one small model;
    they are no constants of nature."""

    concentrated_energy: float = 0.5  # topk_energy from which an update is concentrated
    concentrated_null: float = 0.1  # or of_null up to which it is, for an update with factors
    collapsing_speed: float = 0.1  # rise of relative_spectral a step
    collapsed_speed: float = 0.3
    fall: float = 0.5  # of_null beside its highest; with
    growth: float = 2.0  # relative_spectral that grew so many times since then, and
    large: float = 1.0  # is at least this
    window: int = 3  # checks that such a fall lasts
    share: float = 0.25  # of the modules, or all (2 or more) of one type, for the model's state
    rise: int = 1  # checks in a row that bring a worse state
    settle: int = 5  # checks in a row that bring a better one


@dataclass(frozen=True)
class Row:
    """One module at one check; fields as in a `Report`, norms beside the frozen weight's."""

    name: str
    shape: tuple[int, int]  # (out, in)
    kind: str  # the adapter's class, or "weight"
    participation_ratio: float  # D_2; 0.0 for an update of zeros
    of_null: float  # D_2 over that of a random update of the same shape and rank
    topk_energy: float  # share of the largest singular value, k = 1
    relative_norm: float  # |dW|_F / |W|_F; inf beside a W of zeros
    relative_spectral: float  # s_1(dW) / s_1(W)
    magnitude_mean: float  # of DoRA: mean and largest |m / |W|_row - 1|
    magnitude_max: float
    state: str = "healthy"


def row_of(update: Any, base: Any, F: float, D_2: float, p_1: float, *drift: float) -> Row:
    """A row of an `updates.Update` and its `updates.Base`, from what `updates.measure` found."""
    norm, top = math.sqrt(F), math.sqrt(F * p_1)
    return Row(
        update.name, update.shape, update.kind, D_2, D_2 / update.null, p_1,
        _ratio(norm, base.frobenius), _ratio(top, base.spectral), *drift,
    )  # fmt: skip


def _ratio(size: float, base: float) -> float:
    return 0.0 if size == 0 else size / base if base else math.inf


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """10 % quantile, median and 90 % quantile."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.1, 0.5, 0.9)).tolist()
    return low, middle, high


# -- one module ------------------------------------------------------------------------------------


@dataclass
class Past:
    """What is remembered of one module, or of the model."""

    state: str = "healthy"
    recent: list[str] = field(default_factory=list)  # what each of the last checks said by itself
    sizes: list[float] = field(default_factory=list)  # relative_spectral
    peak: float = 0.0  # highest of_null, and the size it had there
    size_at_peak: float = 0.0
    falling: int = 0  # checks in a row

    def settle(self, said: str, limits: Thresholds) -> str:
        """The state after one more check: worse states after `rise` in a row, better ones after
        `settle`."""
        self.recent = [*self.recent, said][-max(limits.rise, limits.settle) :]
        ranks = [STATES.index(state) for state in self.recent]
        now = STATES.index(self.state)
        if len(ranks) >= limits.rise and min(ranks[-limits.rise :]) > now:
            now = min(ranks[-limits.rise :])
        elif len(ranks) >= limits.settle and max(ranks[-limits.settle :]) < now:
            now = max(ranks[-limits.settle :])
        self.state = STATES[now]
        return self.state
