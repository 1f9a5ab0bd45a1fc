"""Several adapters or checkpoints beside each other, on one scale."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from structadapt.spectra import plots, similarity
from structadapt.spectra.analysis import analyze
from structadapt.spectra.columns import head
from structadapt.spectra.reading import Source
from structadapt.spectra.report import Report, by_kind, shown, spread, usable

COMPARED = (
    "effective_rank",
    "effective_rank_cut",
    "effective_rank_energy",
    "participation_ratio",
    "stable_rank",
    "topk_energy",
    "k90",
    "k99",
    "relative_norm",
    "nss_drift",
    "off_principal_both",
    "intruders",
    "sparsity",
)


@dataclass(frozen=True)
class Comparison:
    """Reports by name, what stands against comparing them, and of adapters how far they use the
    same directions, as `similarity.between` has it."""

    reports: dict[str, Report]
    notes: list[str] = field(default_factory=list)
    similarity: list[dict[str, Any]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One record a name and kind: {name, kind, count, and for each measure its median, q25,
        q75, low and high over the matrices that all reports have}."""
        shared = self.shared()
        return [
            {"name": name, "kind": kind, "count": len(rows), **spread(rows)}
            for name, report in self.reports.items()
            for kind, rows in by_kind(r for r in report.rows if r["name"] in shared).items()
        ]

    def shared(self) -> set[str]:
        """The names of the matrices that every report has."""
        return set.intersection(*(_names(report) for report in self.reports.values()))

    def to_markdown(self) -> str:
        """The medians as a Markdown table, and one of the similarity of adapters."""
        rows = self.rows()
        columns = [m for m in COMPARED if any(m in row for row in rows)]
        heads = (head(m).replace("|", "\\|") for m in columns)
        lines = ["| " + " | ".join(["name", "kind", "matrices", *heads]) + " |"]
        lines.append("|---|---|" + "--:|" * (len(columns) + 1))
        for row in rows:
            medians = [shown(row[m]["median"]) if m in row else "" for m in columns]
            cells = [shown(row["name"]).replace("|", "\\|"), row["kind"], str(row["count"])]
            lines.append("| " + " | ".join([*cells, *medians]) + " |")
        if self.similarity:
            lines += ["", *similarity.lines(self.similarity)]
        return "\n".join([*lines, *(f"\nNote: {note}" for note in self.notes)])

    def plot(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Draw comparison.png and heatmap.png, one scale for all, into a folder that is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            plots.comparison(self.reports, folder / "comparison.png"),
            plots.heatmap(self.reports, folder / "heatmap.png"),
        ]


def compare(
    sources: Mapping[str, Source], base: Source | None = None, **settings: Any
) -> Comparison:
    """Analyse several sources for a comparison on one scale.

    sources: what `analyze` takes, by the name it shall have. base: the weights that all of them
    started from. settings: as for `analyze`.

    Ranks of differences of rounded checkpoints and of factors are not comparable; the notes say
    where they would be. Raises as `analyze`, and ValueError for no source, or for sources without
    a matrix in common.
    """
    if not sources:
        raise ValueError("nothing to compare: pass {name: source, ...}")
    reports = {name: analyze(source, base, **settings) for name, source in sources.items()}
    comparison = Comparison(reports, _notes(reports))
    if not comparison.shared():
        raise ValueError(f"no matrix is in all of {', '.join(reports)}")
    chosen = {key: settings.get(key) for key in ("include", "exclude")}
    return replace(comparison, similarity=similarity.between(sources, **chosen))


def _names(report: Report) -> set[str]:
    return {row["name"] for row in report.rows if usable(row)}


def _notes(reports: Mapping[str, Report]) -> list[str]:
    """Where two sides were not measured in the same way."""
    notes = []
    ways = {n: {r["precision"] for r in rep.rows if usable(r)} for n, rep in reports.items()}
    cut = {n for n, rep in reports.items() if any(r["noise_edge"] for r in rep.rows)}
    for (left, one), (right, other) in itertools.combinations(ways.items(), 2):
        edge = not cut.isdisjoint((left, right))
        # Without an edge, the whole of a DoRA beside its direction is no reason to warn of a LoRA.
        if one != other if edge else one.isdisjoint(other):
            advice = ": compare ranks after the cut at the noise edge" if edge else ""
            notes.append(
                f"{left} ({'; '.join(sorted(one))}) and {right} ({'; '.join(sorted(other))}) came "
                f"about in different ways{advice}"
            )
    every = [_names(report) for report in reports.values()]
    if any(names != every[0] for names in every):
        shared = len(set.intersection(*every))
        notes.append(f"medians are over the {shared} matrices that all of them have")
    return notes
