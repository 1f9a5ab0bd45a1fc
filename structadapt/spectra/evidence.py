"""What in a report is worth a look: a small set of findings, each with the figures it rests on.

A finding is evidence, not a verdict. Concentration alone is no collapse: a task that needs one
direction gives an update of one, and it is right.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from structadapt.spectra.report import WITHOUT_BASE, Record, Report, is_matrix, shown
from structadapt.spectra.states import refuse_not_positive

FINE = (  # reasons to leave a tensor out that are no loss
    "the same storage as",
    "another tensor",
    "trained whole beside the adapters",
    "a buffer",
    "no matrix",
)
UPDATES = ("update", "effective", "direction")


@dataclass(frozen=True)
class Limits:
    """Where a finding begins. These are defaults of this library, not of a paper. ValueError for
    one that is not positive."""

    concentrated: float = 0.5  # top-1 energy of an update
    oversized: float = 1.0  # s_1(dW) / s_1(W)
    intruders: int = 1  # intruder dimensions among the ten largest

    def __post_init__(self) -> None:
        refuse_not_positive(self)


@dataclass(frozen=True)
class Finding:
    """One finding for one matrix."""

    kind: str
    name: str
    evidence: str  # the figures, in words
    weight: float  # to sort by: 1 at the threshold

    def as_dict(self) -> dict[str, str]:
        """For JSON: all but the weight, whose order the list has."""
        return {"kind": self.kind, "name": self.name, "evidence": self.evidence}


Rule = Callable[[Record, Limits], tuple[str, float] | None]  # (evidence, weight)


def _nonfinite(row: Record, t: Limits) -> tuple[str, float] | None:
    return (row["reason"], 1e9) if "not finite" in row["reason"] else None


def _concentrated(row: Record, t: Limits) -> tuple[str, float] | None:
    top = row["topk_energy"]
    if top is None or top < t.concentrated or row["max_rank"] < 3 or not row["frobenius_norm"]:
        return None
    words = f"{top:.1%} of the energy in one direction of {row['max_rank']}"
    return words + _beside(row, "topk_energy", "{:.1%}"), top / max(t.concentrated, 1e-9)


def _oversized(row: Record, t: Limits) -> tuple[str, float] | None:
    size = row["relative_spectral"]
    if size is None or size < t.oversized:
        return None
    return f"s_1(dW) is {shown(size, 3)} times s_1(W)", size / max(t.oversized, 1e-9)


def _collapsed(row: Record, t: Limits) -> tuple[str, float] | None:
    one, other = _concentrated(row, t), _oversized(row, t)
    if one is None or other is None:
        return None
    return f"{one[0]}; {other[0]}", 10 * max(one[1], other[1])


def _intruders(row: Record, t: Limits) -> tuple[str, float] | None:
    count = row["intruders"]
    if count is None or count < t.intruders or not count:
        return None
    return f"{count} of the top 10 left vectors of W' are like none of W", count / 10


def _rounding(row: Record, t: Limits) -> tuple[str, float] | None:
    raw, cut = row["effective_rank"], row["effective_rank_cut"]
    if raw is None or cut is None or raw <= 2 * cut or not row["frobenius_norm"]:
        return None
    above = row["rank_above_noise"]
    words = f"effective rank {shown(raw, 3)}, {shown(cut, 3)} without what rounding made"
    return f"{words} ({above} values above the edge)", 0.5


RULES: dict[str, tuple[str, Rule, tuple[str, ...]]] = {  # meaning, rule, kinds of rows
    "nonfinite": ("NaN or infinity in a tensor", _nonfinite, ("weight", *UPDATES)),
    "collapsed": ("concentrated and oversized at once", _collapsed, UPDATES),
    "oversized": ("an update as large as its weight, in the spectral norm", _oversized, UPDATES),
    "concentrated": ("half of an update's energy in one direction", _concentrated, UPDATES),
    "intruders": ("top vectors of W' that are like none of W", _intruders, UPDATES),
    "rounding": ("ranks that are those of rounding: read the cut ones", _rounding, UPDATES),
}


def findings(report: Report, limits: Limits | None = None) -> list[Finding]:
    """All findings of a report, the worst first, one a matrix and kind.

    A matrix that is `collapsed` is not named again as concentrated and oversized, nor the direction
    of an update of which there is the whole.
    """
    t, found = limits or Limits(), []
    for row in _judgeable(report):
        kinds: set[str] = set()
        for kind, (_, rule, where) in RULES.items():
            implied = "collapsed" in kinds and kind in ("oversized", "concentrated")
            hit = None if implied or row["kind"] not in where else rule(row, t)
            if hit is not None:
                kinds.add(kind)
                found.append(Finding(kind, row["name"], *hit))
    return sorted(found, key=lambda f: -f.weight)


def _judgeable(report: Report) -> list[Record]:
    """The rows, but for the direction of an update of which there is the whole."""
    whole = {row["name"] for row in report.rows if row["kind"] == "effective"}
    return [r for r in report.rows if r["kind"] != "direction" or r["name"] not in whole]


def failing(found: Iterable[Finding], asked: Iterable[str]) -> list[Finding]:
    """Those that were asked for; `concentrated` and `oversized` are met by `collapsed` too.

    ValueError for a finding that there is not.
    """
    asked = set(asked)
    for name in asked - {"any", *RULES}:
        raise ValueError(f"no finding {name!r}: choose from {', '.join(RULES)} or any")
    if asked & {"concentrated", "oversized"}:
        asked = asked | {"collapsed"}
    return [f for f in found if f.kind in asked or "any" in asked]


BESIDE = ("collapsed", "oversized", "intruders")  # findings that need the base


def unjudged(report: Report, asked: Iterable[str]) -> list[str]:
    """The updates of which nothing can be said for the findings that were asked for: their size
    beside a base is not known, or it is a base of zeros."""
    if not {"any", *BESIDE} & set(asked):
        return []
    return [
        row["name"]
        for row in _judgeable(report)
        if row["kind"] in UPDATES and row["relative_spectral"] is None and row["frobenius_norm"]
    ]


def incomplete(report: Report) -> bool:
    """Whether a matrix of floats was left out that should have been looked at, or not beside its
    base where one was asked for: not what is tied to another, no weight, or only needs a base."""
    left_out = [entry["reason"] for entry in report.skipped if is_matrix(entry)]
    failed = any(
        row["status"] == "skipped" or row["reason"].startswith(WITHOUT_BASE) for row in report.rows
    )
    return failed or any(not reason.startswith(FINE) for reason in left_out)


def _beside(row: Record, measure: str, form: str) -> str:
    null = row.get(f"{measure}_null")
    return "" if null is None else f" (random: {form.format(null)})"
