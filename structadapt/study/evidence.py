"""The runs that speak of a claim, and how it is judged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from structadapt.study.statistics import (
    PAPER,
    Row,
    Scaling,
    final,
    grouped,
    mean_of,
    parts,
    whole_setting,
    with_scaling,
)

AGREES, DISAGREES, NOT_TESTABLE = "agrees", "disagrees", "not testable here"


@dataclass(frozen=True)
class Claim:
    """One claim, what the study says, and the figures behind it."""

    text: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Evidence:
    """The runs of one model and task, by what they are for."""

    sweep: list[Row]  # ranks and rates at one batch size
    batches: list[Row]  # several batch sizes
    endless: list[Row]  # that went on after they were absorbed
    supervised: list[Row]


def evidence_of(rows: Sequence[Row]) -> Evidence:
    """Of the runs of one model and task: the largest part for each purpose."""
    found: dict[str, list[Row]] = {"sweep": [], "batches": [], "endless": [], "supervised": []}
    for part in parts(rows):
        if part[0]["method"] == "sft":
            name = "supervised"
        elif not part[0]["stop_absorbed"]:
            name = "endless"
        else:
            name = "sweep" if len({row["batch"] for row in part}) == 1 else "batches"
        found[name] = found[name] or part
    return Evidence(**found)


def lora(rows: Iterable[Row], rank: int, scaling: Scaling = PAPER) -> list[Row]:
    """Runs of LoRA of a rank at the scale that a rule gives it."""
    return with_scaling((r for r in rows if r["adapter"] == "lora" and r["rank"] == rank), scaling)


def died(rows: Sequence[Row]) -> str:
    """How many collapsed, and the mean accuracy."""
    if not rows:
        return "no run"
    mean = mean_of([final(row) for row in rows]).mean
    return f"{sum(r['collapsed'] for r in rows)} of {len(rows)} collapsed, {mean:.1%}"


def all_of(rows: Sequence[Row], collapsed: bool) -> bool:
    return bool(rows) and all(row["collapsed"] == collapsed for row in rows)


def verdict_of(agrees: bool) -> str:
    return AGREES if agrees else DISAGREES


def pairs_of(supervised: Sequence[Row], sweep: Sequence[Row]) -> list[list[Row]]:
    """Supervised runs of each setting that collapses under GRPO with every seed."""

    def key(row: Row) -> tuple[str, float, int]:
        return whole_setting(row), row["rate"], row["batch"]

    sft = grouped(supervised, key)
    return [sft[k] for k, found in grouped(sweep, key).items() if k in sft and all_of(found, True)]


def edge(rows: Sequence[Row]) -> float | None:
    """The lowest learning rate at which most runs collapse; None if there is none."""
    for rate, found in sorted(grouped(rows, lambda row: row["rate"]).items()):
        if sum(row["collapsed"] for row in found) > len(found) / 2:
            return rate
    return None


def joined(parts: Iterable[str]) -> str:
    return "; ".join(parts)
