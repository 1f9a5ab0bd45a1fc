"""A report on a terminal: what was read, what was left out and why, the worst, then the types."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from structadapt.bounds import few
from structadapt.spectra.columns import head
from structadapt.spectra.evidence import Finding
from structadapt.spectra.report import (
    Record,
    Report,
    by_kind,
    by_type,
    is_matrix,
    middle,
    path_shown,
    quartiles,
    shown,
    usable,
)

WORST = 5  # modules that are named
NAMES = 3  # named of many that were left out for one reason
TYPES = 40  # rows of a table of types on a terminal
REASONS = 12  # lines of reasons: some name a place in a file, and there are as many as matrices


class Measure(NamedTuple):
    """A column of the table of types, and which end of it is worth a look."""

    name: str
    worst: str  # "low" or "high"


OF_UPDATES = (
    Measure("participation_ratio_ratio", "low"),
    Measure("topk_energy", "high"),
    Measure("relative_norm", "high"),
    Measure("frobenius_norm", "high"),
)
OF_WEIGHTS = (
    Measure("effective_rank_ratio", "low"),
    Measure("stable_rank_ratio", "low"),
    Measure("alpha_median_ratio", "low"),
)
EVIDENCE = {  # columns of the table of the worst modules
    True: (
        "effective_rank",
        "effective_rank_cut",
        "participation_ratio",
        "participation_ratio_ratio",
        "topk_energy",
        "relative_norm",
        "relative_spectral",
    ),
    False: (
        "effective_rank",
        "effective_rank_ratio",
        "stable_rank_ratio",
        "topk_energy",
        "mp_spikes",
        "alpha_median_ratio",
    ),
}


def screen(report: Report, found: Sequence[Finding], colour: bool = False) -> str:
    """All of a report that fits a screen, in the order in which it should be read."""
    lines = [*read(report), *coverage(report), *(f"note: {shown(n)}" for n in report.notes)]
    if found:
        lines += ["", bold(f"findings: {counts(found)}", colour), *named(found)]
    kinds = by_kind(report.rows)
    for kind, rows in kinds.items():
        title = bold(f"{PLURALS[kind]}: worst of {len(rows)}", colour)
        lines += ["", title, *aligned(worst_cells(rows))]
    for kind, table in type_cells(report, TYPES):
        lines += ["", bold(f"{PLURALS[kind]} by module type", colour), *aligned(table)]
        left = len(by_type(kinds[kind])) + 2 - len(table)
        lines += [f"  and {left} smaller types: --csv and --html have all"] if left else []
    return "\n".join(lines)


PLURALS = {
    "weight": "weights",
    "update": "updates",
    "direction": "directions s B A",
    "effective": "whole updates W' - W",
}


def read(report: Report) -> list[str]:
    """What was read, and how its values came about."""
    about = report.about
    sizes = sum(file["bytes"] for file in about.get("files", []))
    size = f" ({in_bytes(sizes)})" if sizes else ""
    base = f", base {shown(about['base'])}" if about.get("base") else ""
    what = f": {about['what']}" if about.get("what") else ""
    lines = [f"{shown(about.get('source'))}{base}{what}{size}"]
    for kind, rows in by_kind(report.rows).items():
        paths = _counted((row["precision"], row["method"]) for row in rows)
        ways = ", ".join(f"{count} from {how} by {by}" for (how, by), count in paths.items())
        lines.append(f"{PLURALS[kind]}: {ways}")
    return lines


def coverage(report: Report) -> list[str]:
    """How many matrices were analysed of how many, and why the others were not."""
    done = {row["name"] for row in report.rows if usable(row)}
    failed = [row for row in report.rows if not usable(row)]
    others = {s["name"] for s in report.skipped if is_matrix(s)}
    total = done | others | {row["name"] for row in failed}
    lines = [f"coverage: {len(done)} of {len(total)} matrices"]
    groups: dict[str, list[str]] = defaultdict(list)
    for entry in [*failed, *report.skipped]:
        groups[entry["reason"]].append(f"{path_shown(entry['name'])} ({shown(entry['shape'])})")
    for reason, names in list(groups.items())[:REASONS]:
        lines.append(f"  left out: {shown(few(names, NAMES))}: {shown(reason)}")
    if len(groups) > REASONS:
        rest = list(groups.values())[REASONS:]
        lines.append(f"  left out: {sum(map(len, rest))} more for {len(rest)} other reasons")
    partial = _counted(
        row["reason"]
        for row in report.rows
        if row["status"] == "partial" and row["kind"] != "direction"  # a note says that
    )
    reasons = list(partial.items())
    lines += [f"  in part: {count} rows: {shown(why)}" for why, count in reasons[:REASONS]]
    if rest := reasons[REASONS:]:
        count = sum(count for _, count in rest)
        lines.append(f"  in part: {count} more rows for {len(rest)} other reasons")
    return lines


def worst_cells(rows: Sequence[Record]) -> list[list[str]]:
    """The modules that use the fewest directions beside a random matrix, with the figures."""
    updates = rows[0]["kind"] != "weight"
    columns = [c for c in EVIDENCE[updates] if any(row[c] is not None for row in rows)]
    order = "participation_ratio_ratio" if updates else "effective_rank_ratio"
    first = sorted(rows, key=lambda row: np.inf if row[order] is None else row[order])[:WORST]
    table = [["module", "out x in", *map(head, columns)]]
    for row in first:
        cells = [shown(row[column], 3) or "-" for column in columns]
        table.append([middle(path_shown(row["name"])), shown(row["shape"]), *cells])
    return table


def named(found: Sequence[Finding]) -> list[str]:
    """A few findings of each kind, with the evidence."""
    lines = []
    for kind in dict.fromkeys(f.kind for f in found):
        of_kind = [f for f in found if f.kind == kind]
        for f in of_kind[:NAMES]:
            lines.append(f"  {kind:13} {middle(path_shown(f.name))}: {f.evidence}")
        if len(of_kind) > NAMES:
            lines.append(f"  {kind:13} and {len(of_kind) - NAMES} more")
    return lines


def counts(found: Sequence[Finding]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in _counted(f.kind for f in found).items())


def type_cells(report: Report, most: int = 2**31) -> list[tuple[str, list[list[str]]]]:
    """(kind, rows of cells, two of them heads): module type x median, IQR and worst layer, of so
    many types at most, those with the most matrices."""
    tables = []
    for kind, rows in by_kind(report.rows).items():
        wanted = OF_WEIGHTS if kind == "weight" else OF_UPDATES
        measures = [m for m in wanted if any(row[m.name] is not None for row in rows)][:3]
        table = [["", "", *(cell for m in measures for cell in (head(m.name), "", ""))]]
        ends = {"low": "lowest", "high": "highest"}
        table.append(
            ["type", "n", *(cell for m in measures for cell in ("median", "IQR", ends[m.worst]))]
        )
        for name, group in largest(by_type(rows), most).items():
            cells = [cell for m in measures for cell in _spread(group, *m)]
            table.append([middle(path_shown(name), 30), str(len(group)), *cells])
        tables.append((kind, table))
    return tables


def largest(groups: Mapping[str, list[Record]], most: int) -> dict[str, list[Record]]:
    """The groups of the most rows, at most so many, in the order they came in."""
    first = set(sorted(groups, key=lambda name: -len(groups[name]))[:most])
    return {name: rows for name, rows in groups.items() if name in first}


def _spread(rows: list[Record], name: str, end: str) -> list[str]:
    """[median, interquartile range, worst with its layer] of one measure."""
    with_value = [row for row in rows if row[name] is not None]
    if not with_value:
        return ["-", "", ""]
    q = quartiles(with_value, name)
    assert q is not None
    row = (max if end == "high" else min)(with_value, key=lambda row: row[name])
    layer = "" if row["layer"] is None else f" L{row['layer']}"
    spread = f"{shown(q['q25'], 2)}-{shown(q['q75'], 2)}" if len(with_value) > 1 else ""
    return [shown(q["median"], 3), spread, f"{shown(row[name], 3)}{layer}"]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def in_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _counted(values: Iterable[Any]) -> dict[Any, int]:
    found: dict[Any, int] = defaultdict(int)
    for value in values:
        found[value] += 1
    return dict(found)
