"""The report of a study: tables in the paper's layout, pictures, claims, as HTML and as Markdown.

It reads the folders of the runs and nothing else, or the study.json that an earlier report made of
them.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from structadapt import markup
from structadapt.files import write_atomically
from structadapt.study import collect, figures
from structadapt.study.claims import BATCHES, PAPER_R64, judged
from structadapt.study.figures import batch_line, follows, scale_name, scales_of, setting_name
from structadapt.study.statistics import Limits, Row, errors, final, grouped, limits, mean_of

TITLE = "Which update survives GRPO"
PICTURES = "figures"
CELLS = (
    "Means over seeds with 95 % intervals (Student's t), sampled held-out accuracy in percent; "
    "(k/n): k of n runs collapsed."
)
COLLAPSED = (
    "Collapsed: an end below a tenth of the first accuracy, or below it after eight steps in a "
    "row without a gradient (which end a run), or not finite."
)
CAPTIONS = {
    "cliff": "LoRA: accuracy against rank, by scaling rule. Dots are runs, grey is the start.",
    "size": "LoRA: accuracy against scale x rank x learning rate.",
    "batches": "Accuracy against batch size, by rule of the learning rate. Grey: the start.",
    "supervised": "Supervised: accuracy while it trains.",
    "spectra": "Singular values of the updates beside the largest, medians over matrices and runs "
    "(their number in brackets).",
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
    rows, failed = collect.rows_of(out)
    pictures = to / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    blocks = list(blocks_of(rows, failed, pictures))
    content = {
        "claims": [asdict(claim) for claim in judged(rows)],
        "limits": _strict(_limits(rows)),
        "failed": failed,
        "runs": rows,
    }
    paths = [to / "report.html", to / "report.md", to / collect.FIGURES]
    write_atomically(paths[0], markup.document(TITLE, map(_html, blocks)))
    write_atomically(paths[1], "\n\n".join(map(_markdown, blocks)).encode() + b"\n")
    runs = ",\n".join(json.dumps(row) for row in content.pop("runs"))
    head = json.dumps(content, indent=1).removesuffix("\n}")
    write_atomically(paths[2], f'{head},\n "runs": [\n{runs}\n]}}\n'.encode())
    return {**content, "runs": rows}, paths


def _strict(found: Limits | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {k: v if v != float("inf") else None for k, v in asdict(found).items()}


# -- what it says ----------------------------------------------------------------------------------


def blocks_of(
    rows: Sequence[Row], failed: Sequence[dict[str, str]], folder: Path
) -> Iterable[Block]:
    """The blocks; the pictures are drawn into `folder`."""
    yield Block("title", TITLE)
    collapsed = sum(row["collapsed"] for row in rows)
    counts = f"{len(rows)} runs, {collapsed} of them collapsed, {len(failed)} failed."
    yield Block("text", f"{counts} {COLLAPSED}")
    if failed:
        yield Block("table", [["failed", "error"], *([f["id"], f["error"]] for f in failed)])
    yield Block("head", "The paper's claims")
    table = [["claim", "here", "figures"]]
    yield Block("table", [*table, *([c.text, c.verdict, c.evidence] for c in judged(rows))])
    for number, (key, part) in enumerate(parts(rows).items()):
        yield from _part(key, part, folder, number)
    yield from _kl(rows, folder)
    yield Block("head", "Settings")
    yield Block("table", _settings(rows))
    yield Block("folded", _every(rows), f"All {len(rows)} runs")


def parts(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Runs that are compared with each other: of one model, task, method and length."""
    names = ("model", "task", "method", "prompts", "min_difficulty", "minibatches", "schedule")
    return grouped(rows, lambda r: (*(r[n] for n in names), bool(r["stop_absorbed"])))


def _part(key: Any, rows: list[Row], folder: Path, number: int) -> Iterable[Block]:
    model, task, method, prompts, *_, stops = key
    batch = sorted({row["batch"] for row in rows})
    title = f"{model}, {task}: {prompts} prompts once, {_and(batch)} a step"
    title += {"grpo": "", "sft": ", supervised"}[method] + ("" if stops else ", to the last prompt")
    yield Block("head", title)
    start = mean_of([row["before"]["sampled"] for row in rows]).mean
    seeds = sorted({row["seed"] for row in rows})
    yield Block(
        "text", f"{len(rows)} runs, seeds {_and(seeds)}; they begin at {start:.1%}. {CELLS}"
    )

    def picture(name: str, draw: Callable[[Sequence[Row], Path], Path | None]) -> Iterable[Block]:
        path = draw(rows, folder / f"{number}-{name}.png")
        if path is not None:
            yield Block("picture", path, CAPTIONS[name])

    if method == "sft":
        yield Block("table", _by_rate(rows))
        yield from picture("supervised", figures.supervised)
        return
    if len(batch) > 1:
        yield from _batches(rows)
        yield from picture("batches", figures.batches)
    else:
        yield Block("table", _by_rate(rows))
        yield from picture("cliff", figures.cliff)
        yield from picture("size", figures.size_of_step)
    yield Block("table", _spectra(rows))
    yield from picture("spectra", figures.spectra)
    yield from picture("traces", figures.traces)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    found = mean_of([100 * final(row) for row in rows])
    half = "" if found.half is None else f" ± {found.half:.0f}"
    dead = sum(row["collapsed"] for row in rows)
    return f"{found.mean:.1f}{half}" + (f" ({dead}/{found.count})" if dead else "")


def _by_rate(rows: Sequence[Row]) -> list[list[str]]:
    """A line a setting, a column a learning rate."""
    rates = sorted({row["rate"] for row in rows})
    lines = [["adapter", "scale rule", "scale", *(f"lr {rate:g}" for rate in rates)]]
    lora_rows = [row for row in rows if row["adapter"] == "lora"]
    settings: list[tuple[str, str, list[Row]]] = []
    for rule, found in scales_of(lora_rows).items():
        by_rank = grouped(sorted(found, key=lambda row: row["rank"]), lambda row: row["rank"])
        settings += [(f"LoRA r={rank}", rule, own) for rank, own in by_rank.items()]
    others = [row for row in rows if row["adapter"] != "lora"]
    for name, own in grouped(others, setting_name).items():
        settings.append((name, scale_name(own[0]) if own[0]["rank"] is not None else "", own))
    for name, rule, own in settings:
        scale = own[0]["scale"]
        cells = [_cell([row for row in own if row["rate"] == rate]) for rate in rates]
        lines.append([name, rule, "" if scale is None else f"{scale:.3g}", *cells])
    return lines


def _batches(rows: Sequence[Row]) -> Iterable[Block]:
    """The paper's layout: a line an adapter, a column a batch size; for each learning-rate rule."""
    sizes = sorted({row["batch"] for row in rows})
    paper = {b: f"{PAPER_R64[b]:.1%}" for b in BATCHES}
    lines = [["learning rate", "adapter", *(f"batch {b}" for b in sizes)]]
    lines.append(["the paper's", "LoRA r=64, alpha = 2r", *(paper.get(b, "") for b in sizes)])
    lines.append(["the paper's", "LoRA r=128 and r=256",
                  *("near floor" if b in paper else "" for b in sizes)])  # fmt: skip
    for rule in ("fixed", "sqrt", "linear"):
        for name, own in grouped(rows, batch_line).items():
            cells = [_cell([r for r in own if r["batch"] == b and follows(r, rule)]) for b in sizes]
            if any(cells):
                lines.append([rule, name, *cells])
    base = sorted({(r["lr"], r["lr_batch"]) for r in rows})
    said = " and ".join(f"{lr:g} at batch {b}" for lr, b in base)
    yield Block("text", f"Learning rates are {said}, and with the batch size stay fixed, or grow "
                "with its square root, or in proportion.")  # fmt: skip
    yield Block("table", lines)


def _spectra(rows: Sequence[Row]) -> list[list[str]]:
    """The updates at the end, runs that lived and that collapsed apart."""
    names = ("effective_rank", "effective_rank_ratio", "stable_rank", "topk_energy",
             "relative_norm", "relative_spectral")  # fmt: skip
    heads = ("effective rank", "beside random", "stable rank", "top-1 energy", "|dW|/|W| F",
             "|dW|/|W| 2")  # fmt: skip
    lines = [["update of", "fate", "runs", *heads]]
    rows = [row for row in rows if row["spectra"]]
    for name, own in grouped(rows, batch_line).items():
        for dead in (False, True):
            found = [row["spectra"] for row in own if row["collapsed"] == dead]
            if found:
                means = [mean_of([f[n] for f in found if n in f] or [0.0]).mean for n in names]
                lines.append([name, "collapsed" if dead else "lived", str(len(found)),
                              *(f"{mean:.3g}" for mean in means)])  # fmt: skip
    return lines


def _limits(rows: Sequence[Row]) -> Limits | None:
    points = _points(rows)
    return limits(points) if len({died for _, died in points}) == 2 else None


def _points(rows: Iterable[Row]) -> list[tuple[float, bool]]:
    return [
        (r["first_kl"], r["collapsed"])
        for r in rows
        if r["method"] == "grpo" and r["first_kl"] is not None and r["first_kl"] > 0
    ]


def _kl(rows: Sequence[Row], folder: Path) -> Iterable[Block]:
    """First-step KL against what came of the run."""
    grpo = [row for row in rows if row["method"] == "grpo"]
    found = _limits(grpo)
    yield Block("head", "The KL of the first step")
    if found is not None:
        yield Block("text", f"Over {found.count} runs the largest KL that lived is "
                    f"{found.largest_lived:.3g} nats a token, the smallest that died "
                    f"{found.smallest_died:.3g}. The best single limit, {found.best:.2g}, is wrong "
                    f"for {found.errors} ({found.errors / found.count:.1%}).")  # fmt: skip
        lines = [["runs of", "runs", "collapsed", "wrong by that limit", "own best limit", "wrong"]]
        for key, part in parts(grpo).items():
            own, points = _limits(part), _points(part)
            wrong, count = errors(points, found.best), len(points)
            lines.append([
                f"{key[0]}, {key[1]}, {key[3]} prompts", str(count),
                str(sum(dead for _, dead in points)), f"{wrong} ({wrong / max(count, 1):.1%})",
                "" if own is None else f"{own.best:.2g}", "" if own is None else str(own.errors),
            ])  # fmt: skip
        yield Block("table", lines)
        yield Block("table", _told_by(grpo))
    path = figures.first_kl(grpo, found, folder / "first-kl.png")
    if path is not None:
        yield Block("picture", path, CAPTIONS["first-kl"])


TOLD_BY: dict[str, Callable[[Row], float | None]] = {
    "KL of the first step": lambda row: row["first_kl"],
    "scale x rank x learning rate": lambda row: row["scale"] * row["rank"] * row["rate"],
    "rank x learning rate": lambda row: row["rank"] * row["rate"],
    "learning rate": lambda row: row["rate"],
    "rank": lambda row: row["rank"],
    "top-1 energy of the update": lambda row: (row["spectra"] or {}).get("topk_energy"),
}


def _told_by(rows: Sequence[Row]) -> list[list[str]]:
    """By which number the runs of LoRA that collapse are told best, each with its best limit."""
    lines = [["LoRA: collapse told by", "best limit", "wrong", "runs"]]
    runs = [row for row in rows if row["adapter"] == "lora"]
    for name, value in TOLD_BY.items():
        points = [(found, row["collapsed"]) for row in runs if (found := value(row))]
        if len({died for _, died in points}) == 2:
            best = limits(points)
            share = f"{best.errors} ({best.errors / best.count:.1%})"
            lines.append([name, f"{best.best:.3g}", share, str(best.count)])
    return lines


SETTINGS = (
    "model", "task", "data", "method", "target", "prompts", "batch", "group", "minibatches",
    "new_tokens", "schedule", "weight_decay", "cold_start", "problems", "samples", "stop_absorbed",
    "monitor", "device", "dtype", "grpo", "threads", "versions", "python",
)  # fmt: skip


def _settings(rows: Sequence[Row]) -> list[list[str]]:
    """Every setting with the values that it takes."""
    lines = [["setting", "values"]]
    for name in SETTINGS:
        values = dict.fromkeys(json.dumps(row[name]) for row in rows)
        if list(values) not in (["null"], ["{}"]):
            lines.append([name, ", ".join(values).replace('"', "")])
    lines.append(["optimizer", "AdamW, gradient norm at most 1"])
    seconds = sum(row["seconds"] for row in rows)
    lines.append(["time", f"{seconds / 3600:.1f} hours of one process, all runs together"])
    return lines


def _every(rows: Sequence[Row]) -> list[list[str]]:
    lines = [["run", "lr", "seed", "first KL", "before", "after", "greedy", "fate", "monitor"]]
    for row in rows:
        after = row["after"] or {"sampled": 0.0, "greedy": 0.0}
        fate = "collapsed" if row["collapsed"] else "lived"
        fate += f", absorbed by step {row['absorbed_at']}" if row["absorbed_at"] is not None else ""
        kl = "" if row["first_kl"] is None else f"{row['first_kl']:.2g}"
        lines.append([
            f"{row['method']} {row['model']} {row['task']} b{row['batch']} {batch_line(row)}",
            f"{row['rate']:.3g}", str(row["seed"]), kl, f"{row['before']['sampled']:.1%}",
            f"{after['sampled']:.1%}", f"{after['greedy']:.1%}", fate, row["state"] or "",
        ])  # fmt: skip
    return lines


def _and(values: Sequence[Any]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


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
    head, *rest = ([str(cell).replace("|", "\\|") for cell in row] for row in block.content)
    lines = [head, ["---"] * len(head), *rest]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if block.kind == "folded":
        return f"<details><summary>{block.words}</summary>\n\n{table}\n\n</details>"
    return table
