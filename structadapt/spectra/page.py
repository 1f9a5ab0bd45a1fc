"""A report as one HTML file: no script, nothing fetched, pictures within, every name escaped."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from structadapt import markup
from structadapt.files import write_atomically
from structadapt.spectra import plots, tables
from structadapt.spectra.columns import COLUMNS, head, meaning
from structadapt.spectra.evidence import RULES, Finding
from structadapt.spectra.report import (
    NothingToShowError,
    Record,
    Report,
    Where,
    by_kind,
    path_shown,
    shown,
)

CAPTIONS = {
    "singular_values": "Singular values beside the largest. Grey: random matrices of the same "
    "shapes (and the same rank, of updates in factors). Dash-dotted: below this edge a difference "
    "of two stored checkpoints is rounding.",
    "energy": "Share of the squared Frobenius norm in the i largest singular values. Dots: k90, "
    "diamonds: k99, medians where a line stands for several matrices.",
    "heatmap": "Layer by module type.",
    "training": "The training run: medians over modules with bands from 10 to 90 %.",
}


def write(
    report: Report,
    path: Where,
    found: Sequence[Finding] = (),
    maturity: Sequence[str] = (),
    monitor: Where | None = None,
) -> None:
    """Write the page.

    found: what `findings` gave. maturity: lines of text to show as they are. monitor: the
    monitor.jsonl of a run, for its curves. Without matplotlib the page says so.
    """
    title = f"Spectra of {shown(report.about.get('source'))}"
    parts = [f"<h1>{_text(title)}</h1>", *map(_paragraph, tables.read(report)[:20])]
    parts += [_coverage(report), *(_paragraph(f"Note: {shown(note)}") for note in report.notes)]
    parts += [_findings(found), *_worst(report.rows), *_types(report)]
    if maturity:
        parts.append(f"<h2>Frozen weights</h2><div class=wide><pre>{_lines(maturity)}</pre></div>")
    parts += ["<h2>Pictures</h2>", *_pictures(report, monitor), *_modules(report.rows)]
    parts += [_glossary(report.rows), _origin(report)]
    write_atomically(Path(path), markup.document(shown(title), parts))


def _text(value: Any) -> str:
    return escape(shown(value))


def _lines(lines: Iterable[str]) -> str:
    return escape("\n".join(shown(line) for line in lines))


def _paragraph(line: str) -> str:
    return markup.paragraph(shown(line))


def _table(rows: Sequence[Sequence[Any]], kind: str = "", heads: int = 1) -> str:
    return markup.table([[shown(cell) for cell in row] for row in rows], kind, heads)


def _coverage(report: Report) -> str:
    first, *rest = tables.coverage(report)
    items = "".join(f"<li>{_text(line.strip())}</li>" for line in rest)
    return f"<p><strong>{_text(first.capitalize())}</strong></p>" + (
        f"<ul>{items}</ul>" * bool(items)
    )


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return "<h2>Findings</h2><p>None of those that are looked for.</p>"
    few = [["finding", "module", "evidence"]]
    few += [[f.kind, path_shown(f.name), f.evidence] for f in found[:20]]
    rest = [["finding", "module", "evidence"]]
    rest += [[f.kind, path_shown(f.name), f.evidence] for f in found[20:]]
    more = ""
    if len(rest) > 1:
        more = markup.folded(f"{len(rest) - 1} more", _table(rest, "text"))
    kinds = "; ".join(f"{k}: {RULES[k][0]}" for k in RULES if any(f.kind == k for f in found))
    title = f"<h2>Findings: {_text(tables.counts(found))}</h2>"
    quiet = f'<p class="quiet">{_text(kinds)}. Evidence, not verdicts.</p>'
    return title + _table(few, "text") + more + quiet


def _worst(rows: Sequence[Record]) -> list[str]:
    parts = []
    for kind, group in by_kind(rows).items():
        title = f"{tables.PLURALS[kind]}: worst of {len(group)}".capitalize()
        parts.append(f"<h2>{_text(title)}</h2>" + _table(tables.worst_cells(group)))
    return parts


def _types(report: Report) -> list[str]:
    return [
        f"<h2>{_text(tables.PLURALS[kind].capitalize())} by module type</h2>"
        + _table(cells, heads=2)
        for kind, cells in tables.type_cells(report)
    ]


def _pictures(report: Report, monitor: Where | None) -> list[str]:
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        ways: list[Callable[[], list[Path]]] = [lambda: plots.draw(report, folder)]
        if monitor is not None:
            ways.append(lambda: [plots.training(monitor, Path(folder) / "training.png")])
        for draw in ways:
            try:
                parts += [_figure(path) for path in draw()]
            except (ImportError, NothingToShowError) as error:
                parts.append(_paragraph(f"No pictures: {error}"))
    return list(dict.fromkeys(parts))


def _figure(path: Path) -> str:
    return markup.figure(path, CAPTIONS[path.stem])


def _modules(rows: Sequence[Record]) -> list[str]:
    columns = _filled(rows)
    cells = [list(map(head, columns))]
    cells += [[shown(row[column]) for column in columns] for row in rows]
    what = f"All {len(rows)} matrices, all measures"
    return ["<h2>Modules</h2>" + markup.folded(what, _table(cells))]


def _glossary(rows: Sequence[Record]) -> str:
    cells = [["field", "column", "meaning"]]
    cells += [[name, head(name), meaning(name)] for name in _filled(rows)]
    intro = (
        "s_1 >= ... >= s_n: singular values; e = s^2, p = e / sum e, a = s / sum s; "
        "W' = W + dW; angles in degrees, shares from 0 to 1."
    )
    table = _paragraph(intro) + _table(cells, "text")
    return markup.folded("What the columns mean", table)


def _filled(rows: Sequence[Record]) -> list[str]:
    """The columns in which something stands; with `name` first."""
    return [c for c in COLUMNS if any(row[c] not in (None, "") for row in rows)] or ["name"]


def _origin(report: Report) -> str:
    about = report.about
    files = [["file", "size", "SHA-256"]]
    files += [
        [file["path"], tables.in_bytes(file["bytes"]), file["sha256"] or ""]
        for file in about.get("files", [])
    ]
    versions = ", ".join(
        f"{name} {about[name]}" for name in ("structadapt", "torch") if name in about
    )
    return "<h2>Files</h2>" + _table(files, "text") + f'<p class="quiet">{_text(versions)}</p>'
