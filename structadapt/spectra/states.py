"""What the size and the concentration of updates say: healthy, concentrated, collapsing, collapsed.

Concentration alone is no failure: a target of rank 1 is reached with an update of rank 1. What
ruins a policy is an update that grows too fast beside the weights, or one that grows while it
loses its directions. So two axes are read, and their history.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

STATES = ("healthy", "concentrated", "collapsing", "collapsed")
ALARMS = ("collapsing", "collapsed")
NOT_JUDGED = "not judged"  # of a module beside whose weight nothing can be measured
MEASURES = (
    "participation_ratio", "of_null", "topk_energy", "relative_norm", "relative_spectral",
)  # fmt: skip


def refuse_not_positive(limits: Any) -> None:
    """ValueError for a field of a dataclass of limits that is not positive, or NaN."""
    for name, value in vars(limits).items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Thresholds:
    """Where states begin. The defaults come from the runs of docs/monitor.md on one small model;
    they are no constants of nature. ValueError for one that is not positive, or a share above 1."""

    concentrated_energy: float = 0.5  # topk_energy from which an update is concentrated
    concentrated_null: float = 0.25  # and of_null up to which it is
    collapsing_speed: float = 0.2  # rise of relative_spectral over the square root of the steps
    collapsed_speed: float = 0.36
    fall: float = 0.5  # of_null beside its highest; with
    growth: float = 2.0  # relative_spectral that grew so many times since then, and
    large: float = 1.0  # is at least this
    lost: float = 0.1  # share of its highest below which a reward is lost; that is collapsed where
    moving_speed: float = 0.05  # updates rose so fast before,
    moving_kl: float = 0.5  # or the policy moved so far in one step, in nats a token
    window: int = 3  # checks that such a fall lasts
    share: float = 0.5  # of the modules that make the model's state
    rise: int = 1  # checks in a row that bring a worse state
    settle: int = 5  # checks in a row that bring a better one

    def __post_init__(self) -> None:
        refuse_not_positive(self)
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {self.share}")


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
    state: str = "healthy"  # one of STATES, or NOT_JUDGED over a W of zeros


def row_of(update: Any, base: Any, F: float, D_2: float, p_1: float, *drift: float) -> Row:
    """A row of an `updates.Tracked` and its `updates.Base`, from what `updates.measure` found."""
    norm, top = math.sqrt(F), math.sqrt(F * p_1)
    state = "healthy" if base.frobenius and base.spectral else NOT_JUDGED
    return Row(
        update.name, update.shape, update.kind, D_2, D_2 / update.null, p_1,
        _ratio(norm, base.frobenius), _ratio(top, base.spectral), drift[0], drift[1],
        state,
    )  # fmt: skip


def _ratio(size: float, base: float) -> float:
    return 0.0 if size == 0 else size / base if base else math.inf


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """10 % quantile, median and 90 % quantile; NaN of no values."""
    if not values:
        return math.nan, math.nan, math.nan
    with np.errstate(invalid="ignore"):  # inf - inf
        low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.1, 0.5, 0.9))
    return float(low), float(middle), float(high)


# -- the history -----------------------------------------------------------------------------------


@dataclass
class Past:
    """What is remembered of one module."""

    state: str = "healthy"
    recent: list[str] = field(default_factory=list)  # what each of the last checks said by itself
    sizes: list[float] = field(default_factory=list)  # relative_spectral of the last checks
    peak: float = 0.0  # highest of_null that was seen
    size_at_peak: float = 0.0  # relative_spectral there
    falling: int = 0  # checks in a row with a fallen of_null
    fastest: float = 0.0  # highest speed that was seen

    def settle(self, said: str, limits: Thresholds) -> str:
        """The state after one more check: worse ones after `rise` in a row that say so, better
        ones after `settle`."""
        self.recent = [*self.recent, said][-max(limits.rise, limits.settle) :]
        ranks = [STATES.index(state) for state in self.recent]
        now = STATES.index(self.state)
        if len(ranks) >= limits.rise:
            now = max(now, min(ranks[-limits.rise :]))
        if len(ranks) >= limits.settle:
            now = min(now, max(ranks[-limits.settle :]))
        self.state = STATES[now]
        return self.state


class Judge:
    """The states of the modules and of the model, from one check to the next.

    every: calls of `Monitor.step` from one check to the next. start: relative_spectral of every
    module before the first, by name.

    Rewards count where their highest is above 0: a share of a number that is not positive says
    nothing. While the last is below `Thresholds.lost` of the highest, the model's state gets no
    better, and is "collapsed" if it was "collapsing", if enough of the updates ever moved at
    `Thresholds.moving_speed`, or the policy by `Thresholds.moving_kl`. A lost reward alone makes no
    state.
    """

    def __init__(self, limits: Thresholds, every: int, start: dict[str, float]) -> None:
        self.limits, self.every = limits, every
        self.state = "healthy"  # of the model
        self.modules = {name: Past(sizes=[size]) for name, size in start.items()}
        self.best_reward = self.highest_kl = -math.inf

    def look(
        self, rows: Sequence[Row], rewards: Sequence[float] = (), kls: Sequence[float] = ()
    ) -> tuple[tuple[Row, ...], str, str]:
        """The rows with their states, the model's state, and one sentence that says why.

        rewards, kls: those since the last check. What is not judged has no part in the model's
        state.
        """
        whys: dict[str, str] = {}
        seen = []
        for row in rows:
            if row.state != NOT_JUDGED or not _finite(row.participation_ratio, row.topk_energy):
                past = self.modules[row.name]
                said, whys[row.name] = said_of(past, row, self.every, self.limits)
                row = replace(row, state=past.settle(said, self.limits))
            seen.append(row)
        judged = [row for row in seen if row.state != NOT_JUDGED]
        said = said_of_model(judged, self.limits)
        self.best_reward = max([self.best_reward, *rewards])
        self.highest_kl = max([self.highest_kl, *kls])
        last = rewards[-1] if rewards else math.inf
        lost = self.best_reward > 0 and last < self.limits.lost * self.best_reward
        if lost:
            said = max(said, self.state, key=STATES.index)
            if said == "collapsing" or self._moved(judged):
                said = "collapsed"
        self.state = said
        why = _evidence(judged, said, whys)
        if lost and said in ALARMS:
            why = f"the reward fell from {self.best_reward:.2g} to {last:.2g}; {why}"
        return tuple(seen), said, why

    def _moved(self, rows: Sequence[Row]) -> bool:
        """Whether the policy, or enough of the updates, ever moved as one that can be ruined."""
        if self.highest_kl >= self.limits.moving_kl:
            return True
        speeds = [self.modules[row.name].fastest for row in rows]
        moved = sum(speed >= self.limits.moving_speed for speed in speeds)
        return bool(moved) and moved >= self.limits.share * len(rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is remembered, as dicts, lists, numbers and texts."""
        modules = {name: dict(vars(past)) for name, past in self.modules.items()}
        told = {"best_reward": self.best_reward, "highest_kl": self.highest_kl}
        return {"state": self.state, "modules": modules, **told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.state = state["state"]
        self.modules = {name: Past(**past) for name, past in state["modules"].items()}
        self.best_reward, self.highest_kl = state["best_reward"], state["highest_kl"]


def said_of(past: Past, row: Row, every: int, limits: Thresholds) -> tuple[str, str]:
    """What one check says of a module by itself, and why; `past` goes one check on."""
    size, before = row.relative_spectral, past.sizes[-1]
    if not _finite(row.topk_energy, row.relative_norm, row.participation_ratio):
        return "collapsed", "its update, or its weight, is not finite"
    past.sizes = [*past.sizes, size][-2:]
    if size == before and past.recent:  # nothing moved, so nothing can be better than it was
        return past.recent[-1], f"its update stands still at {size:.2g} times its weight"
    if row.of_null > past.peak:
        past.peak, past.size_at_peak = row.of_null, size
    fallen = row.of_null <= limits.fall * past.peak and size >= limits.growth * past.size_at_peak
    past.falling = past.falling + 1 if fallen and size >= limits.large else 0
    speed = (size - before) / every**0.5  # steps in random directions add up so
    past.fastest = max(past.fastest, speed)
    steps = "one step" if every == 1 else f"{every} steps"
    grew = f"its update grew by {size - before:.2g} of its weight in {steps}"
    few = f"{row.topk_energy:.0%} of its update's energy is in one direction"
    if speed >= limits.collapsed_speed:
        return "collapsed", grew
    if past.falling >= limits.window and row.topk_energy >= limits.concentrated_energy:
        return "collapsed", f"{few}, {size:.2g} times its weight"
    if past.falling >= limits.window:
        left = f"it has {row.of_null / past.peak:.0%} of the directions it had"
        return "collapsing", f"{left}, and grew to {size:.2g} times its weight"
    if speed >= limits.collapsing_speed:
        return "collapsing", grew
    few_of_null = 0 < row.of_null <= limits.concentrated_null
    if few_of_null and row.topk_energy >= limits.concentrated_energy:
        return "concentrated", few
    return "healthy", f"its update is {size:.2g} times its weight"


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def said_of_model(rows: Sequence[Row], limits: Thresholds) -> str:
    """The worst state that enough of the modules have, or a worse one; "healthy" of none."""
    for rank in range(len(STATES) - 1, 0, -1):
        worse = sum(STATES.index(row.state) >= rank for row in rows)
        if worse and worse >= limits.share * len(rows):
            return STATES[rank]
    return STATES[0]


def _evidence(rows: Sequence[Row], state: str, whys: dict[str, str]) -> str:
    """How many modules, and the worst of them."""
    if not rows:
        return "no module is judged: their weights are 0, so there is nothing to compare with"
    there = [row for row in rows if STATES.index(row.state) >= STATES.index(state)]
    if state == "healthy" or not there:
        sizes = [row.relative_spectral for row in rows]
        middle = band(sizes)[1]
        return f"the updates of {len(rows)} modules are {middle:.2g} times their weights (median)"
    worst = max(there, key=lambda row: row.relative_spectral)
    return (
        f"{len(there)} of {len(rows)} modules; the largest, {worst.name}: {whys[worst.name]} "
        "(spectral norms)"
    )
