"""The report of a study: tables in the paper's layout, pictures, claims, as HTML and as Markdown.

It reads the folders of the runs and nothing else, or the study.json that an earlier report made of
them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from structadapt import markup
from structadapt.examples.process import strict
from structadapt.files import write_atomically
from structadapt.study import collect, figures, tables
from structadapt.study.claims import beyond, judged
from structadapt.study.evidence import Claim
from structadapt.study.statistics import Row, grouped, mean_of, parts

Judgements = dict[str, tuple[list[Claim], list[Claim]]]  # of a subject: the paper's, and ours

TITLE = "Which update survives GRPO"
PICTURES = "figures"
ALPHA = (
    "Of the paper only the numbers of its abstract are known here, and alpha is not among them: "
    "where a claim says alpha = 2r, that is this study's choice."
)
CELLS = (
    "Means over seeds with 95 % intervals (Student's t), sampled held-out accuracy in percent; "
    "(k/n): k of n runs collapsed."
)
CAPTIONS = {
    "cliff": "LoRA: accuracy against rank, by scaling rule. Dots are runs, grey is the start.",
    "rates": "LoRA: accuracy against learning rate, by scaling rule. Grey is the start.",
    "size": "LoRA: accuracy against scale x rank x learning rate.",
    "batches": "Accuracy against batch size, by rule of the learning rate. Grey: the start.",
    "supervised": "Supervised: accuracy while it trains, by scaling rule.",
    "spectra": "Singular values of the updates beside the largest, medians over matrices and runs.",
    "traces": "What the monitor saw: medians over the matrices, a line a run.",
    "first-kl": "Accuracy at the end beside that at the start, against the KL of the first step. "
    "Grey: no gain.",
}


@dataclass(frozen=True)
class Block:
    """A piece of the report."""

    kind: Literal["title", "head", "text", "table", "picture", "folded"]
    content: Any  # text; rows of cells, the first one the head; a path; a table
    words: str = ""  # of a picture, or over what is folded


def write(out: Path, to: Path) -> tuple[dict[str, Any], list[Path]]:
    """Write report.html, report.md, study.json and figures/ into `to`: the figures, and the paths.

    Raises ValueError for a folder without a finished run; ImportError without matplotlib.
    """
    found = collect.collected(out)
    rows = found["runs"]
    pictures = to / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for old in _pictured(to / "report.md"):
        (pictures / old).unlink(missing_ok=True)
    judgements = _judgements(rows)
    blocks = list(blocks_of(rows, judgements, found["failed"], found["planned"], pictures))
    best = tables.limits_of(tables.judgeable(rows), tables.first_kl)
    told = {
        "claims": [{"of": name, **asdict(claim)} for name, both in judgements.items()
                   for claims in both for claim in claims],
        "limits": json.loads(strict(best and asdict(best))),
        "failed": found["failed"],
        "planned": found["planned"],
    }  # fmt: skip
    paths = [to / "report.html", to / "report.md", to / collect.FIGURES]
    write_atomically(paths[0], markup.document(TITLE, map(_html, blocks)))
    write_atomically(paths[1], "\n\n".join(map(_markdown, blocks)).encode() + b"\n")
    runs = ",\n".join(json.dumps(row) for row in rows)  # a line each: a change is seen in a diff
    head = json.dumps(told, indent=1).removesuffix("\n}")
    write_atomically(paths[2], f'{head},\n "runs": [\n{runs}\n]}}\n'.encode())
    return {**told, "runs": rows}, paths


def _pictured(path: Path) -> list[str]:
    """The pictures that an earlier report shows. What else lies beside them stays."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return re.findall(rf"\]\({PICTURES}/([^()/\\]+\.png)\)", text)


# -- what it says ----------------------------------------------------------------------------------


def _judgements(rows: Sequence[Row]) -> Judgements:
    """Of each model and task, those with the most runs first."""
    found = grouped(rows, lambda row: f"{row['model']}, {row['task']}")
    subjects = sorted(found.items(), key=lambda item: -len(item[1]))
    return {name: (judged(own), beyond(own)) for name, own in subjects}


def blocks_of(
    rows: Sequence[Row], judgements: Judgements, failed: Sequence[dict[str, str]], planned: int,
    folder: Path,
) -> Iterable[Block]:  # fmt: skip
    """The blocks; the pictures are drawn into `folder`."""
    yield Block("title", TITLE)
    collapsed = sum(row["collapsed"] for row in rows)
    counts = f"{len(rows)} runs of {planned} planned, {collapsed} of them collapsed"
    counts += f", {len(failed)} failed." if failed else "."
    stops = tables.together(sorted({r["stop_absorbed"] for r in rows if r["stop_absorbed"]} or {8}))
    yield Block(
        "text",
        f"{counts} Collapsed: an end below a tenth of the first accuracy, or below it after "
        f"{stops} steps in a row without a gradient (which end a run), or not finite.",
    )
    yield Block("text", ALPHA)
    if failed:
        yield Block("table", [["failed", "error"], *([f["id"], f["error"]] for f in failed)])
    for name, (papers, ours) in judgements.items():
        yield Block("head", f"The paper's claims: {name}")
        yield Block("table", _claims(papers))
        yield Block("head", f"Beyond the paper: {name}")
        yield Block("table", _claims(ours))
    for part in parts(rows):
        yield from _part(part, folder)
    yield from _kl(rows, folder)
    yield Block("head", "Settings")
    yield Block("table", tables.settings(rows))
    yield Block("folded", tables.every(rows), f"All {len(rows)} runs")


def _claims(found: Sequence[Claim]) -> tables.Table:
    return [["claim", "here", "figures"], *([c.text, c.verdict, c.evidence] for c in found)]


def _part(rows: list[Row], folder: Path) -> Iterable[Block]:
    """The runs that may be compared."""
    yield Block("head", tables.in_short(rows))
    start = mean_of([row["before"]["sampled"] for row in rows]).mean
    seeds = tables.together(sorted({row["seed"] for row in rows}))
    said = f"{len(rows)} runs, seeds {seeds}; they begin at {start:.1%}. {CELLS}"
    yield Block("text", said)
    several = len({row["batch"] for row in rows}) > 1
    yield Block("table", tables.by_batch(rows) if several else tables.by_rate(rows))
    drawn = {"batches": figures.batches, "cliff": figures.cliff, "rates": figures.rates,
             "size": figures.size_of_step, "spectra": figures.spectra,
             "traces": figures.traces}  # fmt: skip
    if rows[0]["method"] == "sft":
        drawn = {"supervised": figures.supervised}
    else:
        yield Block("table", tables.spectra(rows))
    for name, draw in drawn.items():
        path = draw(rows, folder / f"{_slug(rows)}-{name}.png")
        if path is not None:
            yield Block("picture", path, CAPTIONS[name])


def _slug(rows: Sequence[Row]) -> str:
    """A name for the pictures of a part, which does not change as others come."""
    text = tables.in_short(rows)
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def _kl(rows: Sequence[Row], folder: Path) -> Iterable[Block]:
    """First-step KL against what came of the run."""
    runs = tables.judgeable(rows)
    found = tables.limits_of(runs, tables.first_kl)
    yield Block("head", "The KL of the first step")
    if found is not None:
        yield Block(
            "text",
            f"Over {found.count} runs of GRPO the largest KL that lived is "
            f"{found.largest_lived:.3g} nats a token, the smallest that died "
            f"{found.smallest_died:.3g}. The best single limit, {found.best:.2g}, is wrong for "
            f"{found.errors} ({found.errors / found.count:.1%}).",
        )
        yield Block("table", tables.by_part(rows, found.best))
        if len(told := tables.told_by(rows)) > 1:
            yield Block("table", told)
    path = figures.first_kl(runs, found, folder / "first-kl.png")
    if path is not None:
        yield Block("picture", path, CAPTIONS["first-kl"])


# -- two ways to write it --------------------------------------------------------------------------


def _html(block: Block) -> str:
    if block.kind == "title":
        return f"<h1>{escape(block.content)}</h1>"
    if block.kind == "head":
        return f"<h2>{escape(block.content)}</h2>"
    if block.kind == "text":
        return markup.paragraph(block.content)
    if block.kind == "picture":
        return markup.figure(block.content, block.words)
    wordy = any(len(str(cell)) > 60 for row in block.content for cell in row)
    table = markup.table(block.content, "text" if wordy else "")
    return markup.folded(block.words, table) if block.kind == "folded" else table


def _markdown(block: Block) -> str:
    if block.kind in ("title", "head"):
        return ("# " if block.kind == "title" else "## ") + block.content
    if block.kind == "text":
        return block.content
    if block.kind == "picture":
        return f"![{block.words}]({PICTURES}/{block.content.name})\n\n{block.words}"
    head, *rest = (
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in block.content
    )
    lines = [head, ["---"] * len(head), *rest]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if block.kind == "folded":
        return f"<details><summary>{block.words}</summary>\n\n{table}\n\n</details>"
    return table
