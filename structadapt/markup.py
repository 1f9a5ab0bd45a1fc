"""One HTML file that stands alone: no script, nothing fetched, pictures within, text escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 13px; margin-bottom: 1rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th { background: #f3f3f3; font-weight: 600; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; overflow-wrap: break-word; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption, .quiet { color: #555; font-size: 13px; } summary { cursor: pointer; margin: .6rem 0; }
@media print { details { display: block; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Iterable[str]) -> bytes:
    """The whole page, as UTF-8."""
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    return page.encode("utf-8", "xmlcharrefreplace")


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(rows: Sequence[Sequence[Any]], kind: str = "", heads: int = 1) -> str:
    """The first `heads` rows are heads. kind: "text" for cells that may break."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if i < heads else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in row) + "</tr>")
    classes = f' class="{kind}"' if kind else ""
    return f"<div class=wide><table{classes}>{''.join(lines)}</table></div>"


def folded(summary: str, inside: str) -> str:
    """What a click shows."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def figure(path: Path, words: str) -> str:
    """A picture, within the page, and what it shows."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"
