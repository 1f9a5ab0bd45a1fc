"""The tables of a study's report, as rows of cells, the first one the head."""

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields

import torch

from structadapt.study.cell import RULES, Cell, config
from structadapt.study.claims import BATCHES, HIGH, PAPER_R64, SWEPT
from structadapt.study.statistics import (
    PAPER,
    Limits,
    Row,
    by_scaling,
    errors,
    final,
    following,
    grouped,
    limits,
    mean_of,
    parts,
    scaling_of,
    setting,
    whole_setting,
)

Table = list[list[str]]
NEAR, ON = "near floor", ("LoRA r=8", "DoRA r=16", "QuanTA 3 axes")  # the paper's words
IN_THE_PAPER = {  # of a setting at its smallest batch
    f"LoRA r={SWEPT}": f"{PAPER_R64[BATCHES[0]]:.1%}",
    **{f"LoRA r={rank}": NEAR for rank in HIGH},
    **dict.fromkeys(ON, "trains on"),
}


def cell(rows: Sequence[Row]) -> str:
    """The mean over seeds in percent, its interval, and how many collapsed."""
    if not rows:
        return ""
    found = mean_of([100 * final(row) for row in rows])
    half = "" if found.half is None else f" ± {found.half:.0f}"
    dead = sum(row["collapsed"] for row in rows)
    return f"{found.mean:.1f}{half}" + (f" ({dead}/{found.count})" if dead else "")


def by_rate(rows: Sequence[Row]) -> Table:
    """A line a setting, a column a learning rate, and what the paper found. One batch size."""
    rates = sorted({row["rate"] for row in rows})
    last = f"paper, batch {BATCHES[0]}"
    lines = [["adapter", "scale rule", "scale", *(f"lr {rate:g}" for rate in rates), last]]
    ranked = [row for row in rows if row["rank"] is not None]
    settings: list[tuple[str, list[Row]]] = []
    for rule, found in by_scaling(ranked).items():
        settings += [(rule, own) for own in grouped(found, setting).values()]
    others = [row for row in rows if row["rank"] is None]
    settings += [("", own) for own in grouped(others, setting).values()]
    for rule, own in settings:
        scale = own[0]["scale"]
        cells = [cell([row for row in own if row["rate"] == rate]) for rate in rates]
        scale = "" if scale is None else f"{scale:.3g}"
        lines.append([setting(own[0]), rule, scale, *cells, _in_the_paper(own[0])])
    return lines if any(line[-1] for line in lines[1:]) else [line[:-1] for line in lines]


def _in_the_paper(row: Row) -> str:
    """What the paper's abstract says of a setting with GRPO at its smallest batch."""
    if row["method"] != "grpo" or not row["stop_absorbed"]:
        return ""
    if row["rank"] is not None and scaling_of(row) != PAPER:
        return ""
    return IN_THE_PAPER.get(setting(row), "")


def by_batch(rows: Sequence[Row]) -> Table:
    """The paper's layout: a line an adapter, a column a batch size; for each learning-rate rule."""
    sizes = sorted({row["batch"] for row in rows})
    paper = {batch: f"{PAPER_R64[batch]:.1%}" for batch in BATCHES}
    lines = [
        ["learning rate", "adapter", *(f"batch {size}" for size in sizes)],
        ["the paper's", f"LoRA r={SWEPT}", *(paper.get(size, "") for size in sizes)],
        ["the paper's", "LoRA r=128, r=256", *(NEAR * (s in paper) for s in sizes)],
        ["the paper's", ", ".join(ON), *("trains on" * (s in paper) for s in sizes)],
    ]
    rules = [rule for rule in RULES if any(row["lr_rule"] == rule for row in rows)]
    bases = grouped(rows, lambda row: (whole_setting(row), row["lr"], row["lr_batch"]))
    for rule in rules:
        for name, lr, base in bases:
            found = following([r for r in rows if whole_setting(r) == name], lr, rule, base)
            at = grouped(found, lambda row: row["batch"])
            cells = [cell(at.get(size, [])) for size in sizes]
            lines.append([f"{lr:g} at {base}, {rule}", name, *cells])
    return lines


SPECTRA = {
    "effective_rank": "effective rank", "effective_rank_ratio": "beside random",
    "stable_rank": "stable rank", "topk_energy": "top-1 energy", "relative_norm": "|dW|/|W| F",
    "relative_spectral": "|dW|/|W| 2",
}  # fmt: skip


def spectra(rows: Sequence[Row]) -> Table:
    """The updates at the end, runs that lived and that collapsed apart: means over the runs of
    medians over the matrices."""
    lines = [["update of", "fate", "runs", *SPECTRA.values()]]
    rows = [row for row in rows if row["spectra"]]
    for name, own in grouped(rows, whole_setting).items():
        for dead in (False, True):
            found = [row["spectra"] for row in own if row["collapsed"] == dead]
            if found:
                values = ([f[n] for f in found if n in f] for n in SPECTRA)
                means = [f"{mean_of(v).mean:.3g}" if v else "" for v in values]
                lines.append([name, "collapsed" if dead else "lived", str(len(found)), *means])
    return lines


# -- what tells a collapse -------------------------------------------------------------------------


def judgeable(rows: Iterable[Row]) -> list[Row]:
    """GRPO runs with a KL of the first step, each setting once: those that went on after they were
    absorbed began as their twins did."""
    return [r for r in rows if r["method"] == "grpo" and r["stop_absorbed"] and r["first_kl"]]


def limits_of(rows: Iterable[Row], value: Callable[[Row], float | None]) -> Limits | None:
    """The best limit of a number, or None where all lived or none did."""
    points = [(found, row["collapsed"]) for row in rows if (found := value(row))]
    return limits(points) if len({died for _, died in points}) == 2 else None


def first_kl(row: Row) -> float:
    return row["first_kl"]


def by_part(rows: Sequence[Row], limit: float) -> Table:
    """How the one limit does on the runs of each protocol, beside their own best."""
    lines = [["runs of", "runs", "collapsed", "wrong by that limit", "own best limit", "wrong"]]
    for part in parts(judgeable(rows)):
        points, own = [(first_kl(row), row["collapsed"]) for row in part], limits_of(part, first_kl)
        wrong, count = errors(points, limit), len(points)
        lines.append([
            in_short(part), str(count), str(sum(dead for _, dead in points)),
            f"{wrong} ({wrong / count:.1%})", "" if own is None else f"{own.best:.2g}",
            "" if own is None else str(own.errors),
        ])  # fmt: skip
    return lines


TOLD_BY: dict[str, Callable[[Row], float | None]] = {
    "KL of the first step": first_kl,
    "scale x rank x learning rate": lambda row: row["scale"] * row["rank"] * row["rate"],
    "rank x learning rate": lambda row: row["rank"] * row["rate"],
    "learning rate": lambda row: row["rate"],
    "rank": lambda row: row["rank"],
    "top-1 energy of the update": lambda row: (row["spectra"] or {}).get("topk_energy"),
    "stable rank of the update": lambda row: (row["spectra"] or {}).get("stable_rank"),
}


def told_by(rows: Sequence[Row]) -> Table:
    """By which number the runs of LoRA (of two ranks and more) that collapse are told best, each
    with its best limit."""
    lines = [["LoRA: collapse told by", "best limit", "wrong", "runs"]]
    runs = [row for row in judgeable(rows) if row["adapter"] == "lora" and row["rank"] > 1]
    for name, value in TOLD_BY.items():
        if (best := limits_of(runs, value)) is not None:
            share = f"{best.errors} ({best.errors / best.count:.1%})"
            lines.append([name, f"{best.best:.3g}", share, str(best.count)])
    return lines


# -- what was run ----------------------------------------------------------------------------------


def in_short(rows: Sequence[Row]) -> str:
    """The model, task, length and batch sizes of runs that may be compared."""
    row, sizes = rows[0], sorted({row["batch"] for row in rows})
    text = f"{row['model']}, {row['task']}: {row['prompts']} prompts, {together(sizes)} a step"
    text += ", supervised" if row["method"] == "sft" else ""
    return text + ("" if row["stop_absorbed"] else ", absorbed or not to the last prompt")


def together(values: Sequence[object]) -> str:
    """1, 2 and 3"""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


SETTINGS = (
    "model", "task", "data", "min_difficulty", "method", "target", "prompts", "batch", "lr_rule",
    "lr_batch", "group", "minibatches", "micro_batch", "slots", "new_tokens", "schedule",
    "weight_decay", "cold_start", "cold_start_steps", "problems", "samples", "stop_absorbed",
    "monitor", "device", "dtype", "processes", "grpo", "threads", "versions", "python",
)  # fmt: skip


FROM_CELLS = {  # fields of grpo.Config: those of the cells by another name, and the model's
    "eos_token_id", "pad_token_id", "group_size", "prompts_per_step", "max_new_tokens", "slots",
    "minibatches", "micro_batch_size", "seed",
}  # fmt: skip


def settings(rows: Sequence[Row]) -> Table:
    """Every setting with the values that it takes."""
    lines = [["setting", "values"]]
    for name in SETTINGS:
        values = dict.fromkeys(json.dumps(row[name]) for row in rows)
        if list(values) not in (["null"], ["{}"]):
            lines.append([name, ", ".join(values).replace('"', "")])
    lines += _objective(rows)
    lines.append(["optimizer", _optimizer()])
    hours = sum(row["seconds"] for row in rows) / 3600
    lines.append(["time", f"{hours:.1f} hours, of the processes that ended the runs"])
    return lines


def _objective(rows: Iterable[Row]) -> Table:
    """What else grpo.Config says of the runs with GRPO, beside the fields of their cells."""
    names = [f.name for f in fields(Cell)]
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["method"] == "grpo":
            cell = Cell(**{name: row[name] for name in names if name in row})
            for name, value in asdict(config(cell, 0, 0, 1)).items():
                if name not in FROM_CELLS:
                    found.setdefault(f"grpo: {name}", {})[json.dumps(value)] = None
    return [[name, ", ".join(values).replace('"', "")] for name, values in found.items()]


def _optimizer() -> str:
    default = inspect.signature(torch.optim.AdamW).parameters
    first, second = default["betas"].default
    return f"AdamW, betas {first:g} and {second:g}, eps {default['eps'].default:g}"


def every(rows: Sequence[Row]) -> Table:
    """A line a run."""
    lines = [["run", "lr", "seed", "first KL", "before", "after", "greedy", "fate", "monitor"]]
    for row in rows:
        after = row["after"] or {"sampled": 0.0, "greedy": 0.0}
        fate = "collapsed" if row["collapsed"] else "lived"
        fate += f", absorbed by step {row['absorbed_at']}" if row["absorbed_at"] is not None else ""
        kl = "" if row["first_kl"] is None else f"{row['first_kl']:.2g}"
        lines.append([
            f"{row['method']} {row['model']} {row['task']} b{row['batch']} {whole_setting(row)}",
            f"{row['rate']:.3g}", str(row["seed"]), kl, f"{row['before']['sampled']:.1%}",
            f"{after['sampled']:.1%}", f"{after['greedy']:.1%}", fate, row["state"] or "",
        ])  # fmt: skip
    return lines
