"""What the example prints and draws."""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from structadapt import terminal
from structadapt.spectra import plots
from structadapt.spectra.drawing import COLOURS, new_figure, written

OF_UPDATES = {  # measures of the monitor, and what the picture calls them
    "relative_spectral": r"$s_1(\Delta W)\,/\,s_1(W)$",
    "topk_energy": "energy of the first direction",
    "of_null": "participation ratio / random",
}
NO_GRADIENT = (
    "\n{}, all rewards of every group are equal: every advantage and so the\n"
    "gradient is exactly zero, and nothing is learned."
)


class Progress:
    """Progress on standard error: a bar on a terminal with tqdm installed, else a few lines."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.began = 0.0
        self.dead = False
        self.alarms: set[str] = set()  # kinds that were told

    def say(self, line: str) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            terminal.tell(line)

    def cold_start(self, step: int, loss: float, accuracy: float | None, target: float) -> None:
        if accuracy is not None and (step % 25 == 0 or accuracy >= target):
            self.say(
                f"cold start, step {step}: loss {loss:.3f}, held-out sampled accuracy "
                f"{accuracy:.3f} of {target:.2f}"
            )

    def step(self, record: dict[str, Any], total: int) -> None:
        """One GRPO step; says in words when the gradient vanishes for the first time."""
        if self.quiet:
            return
        if not self.began:
            self.began = time.perf_counter() - record["rollout_seconds"] - record["update_seconds"]
            self.bar = _bar(total)
        if record["updates"] == 0 and not self.dead:
            self.dead = True
            self.say(
                f"step {record['step']}: all rewards of every group are equal (mean "
                f"{record['reward']:.3f}), so all advantages and the gradient are exactly zero"
            )
        for alarm in record["alarms"]:
            kind = alarm.split(":")[0]
            if kind not in self.alarms:
                self.alarms.add(kind)
                self.say(f"step {record['step']}: {alarm}")
        if self.bar is not None:
            held_out = record["held_out"]
            shown = {} if held_out is None else {"held-out": f"{held_out:.2f}"}
            self.bar.set_postfix(reward=f"{record['reward']:.2f}", **shown, refresh=False)
            self.bar.update()
        elif record["held_out"] is not None:
            done = record["step"] + 1
            left = (time.perf_counter() - self.began) / done * (total - done)
            self.say(
                f"GRPO, step {done}/{total}: reward {record['reward']:.3f}, held-out sampled "
                f"accuracy {record['held_out']:.3f}, {left:.0f} s left"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _bar(total: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="GRPO", unit="step", file=sys.stderr, dynamic_ncols=True)


def result(summary: dict[str, Any], out: Path) -> str:
    """The screen at the end of a run: accuracy before and after, the update's spectra."""
    lines = ["", f"{summary['adapter']}, {summary['parameters']:,} trained parameters", ""]
    if summary["failure"]:
        lines += [f"{red('Diverged')}: {summary['failure']}. The last good adapter is saved."]
    else:
        lines += _accuracy(summary["before"], summary["after"])
    lines += [collapse(summary), "", "The update, layer by layer:", ""]
    lines += spectra(summary["spectra"])
    memory = summary["peak_memory_mib"]
    seconds = summary["seconds"]
    lines += [
        "",
        f"cold start {seconds['cold_start']:.0f} s, GRPO and evaluation {seconds['grpo']:.0f} s"
        + (f", {memory:,.0f} MiB at most" if memory else ""),
        f"results in {out}",
    ]
    return "\n".join(line for line in lines if line is not None)


def red(word: str) -> str:
    """A word that should not be overlooked."""
    return terminal.paint(word, "red", sys.stdout)


def _accuracy(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    if before is None or after is None:
        return ["Stopped early: the adapter as it was is saved, not evaluated."]
    title = f"{before['problems']} held-out problems"
    lines = [f"{title:28}{'before':>24}{'after':>24}"]
    for kind in ("greedy", "sampled"):
        cells = []
        for when in (before, after):
            low, high = when[f"{kind}_interval"]
            cells.append(f"{when[kind]:.1%} ({low:.1%} to {high:.1%})")
        lines.append(f"{kind + ' accuracy (95 %)':28}{cells[0]:>24}{cells[1]:>24}")
    return lines


def collapse(summary: dict[str, Any]) -> str | None:
    """In words, whether the policy collapsed or never got a gradient."""
    steps, dead, since = summary["steps"], summary["dead_steps"], summary["collapsed_at"]
    if since is None:
        return NO_GRADIENT.format("In every step") if steps and len(dead) == steps else None
    dead = [step for step in dead if step >= since]
    text = f"\n{red('Collapsed')} at step {since}: "
    text += "the reward stays under a tenth of what it was at step 0."
    if dead:
        text += NO_GRADIENT.format(f"In {len(dead)} of {steps - dead[0]} steps from {dead[0]} on")
    return text + "\nA lower --lr, or a lower --alpha at the same rank, takes smaller first steps."


def collapsed_at(steps: list[dict[str, Any]]) -> int | None:
    """The step from which on the reward stayed under a tenth of step 0's, or None.

    At least three steps to the end of the run have to lie under it. A run that never had a reward
    has not collapsed.
    """
    if not steps or steps[0]["reward"] == 0:
        return None
    alive = [s["step"] for s in steps if s["reward"] >= steps[0]["reward"] / 10]
    return alive[-1] + 1 if len(steps) - alive[-1] > 3 else None


def spectra(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the update, one line a matrix and their medians."""
    rows = [row for row in rows if row["kind"] != "direction"]  # the whole update stands beside it
    columns = (
        ("relative_norm", "|dW|/|W|"),
        ("effective_rank", "eff. rank"),
        ("effective_rank_energy", "of energy"),
        ("participation_ratio", "particip."),
        ("stable_rank", "stable rank"),
        ("topk_energy", "top-1 energy"),
    )
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'layer':{width}}  {'out x in':>9}" + "".join(f"{head:>14}" for _, head in columns)]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        cells = "".join(f"{_number(row[key]):>14}" for key, _ in columns)
        lines.append(f"{row['name']:{width}}  {shape:>9}{cells}")
    middle = [[row[key] for row in rows if row[key] is not None] for key, _ in columns]
    cells = "".join(f"{_number(median(values) if values else None):>14}" for values in middle)
    return [*lines, f"{'median':{width}}  {'':>9}{cells}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def curves(
    steps: list[dict[str, Any]], readings: list[dict[str, Any]], path: Path, title: str
) -> str:
    """Draw reward and held-out accuracy over the steps, and below what the monitor saw, if there
    was one, to a PNG; returns a line to print."""
    try:
        figure = new_figure(7, 7 if readings else 4)
    except ImportError:
        return "no picture: pip install 'structadapt[plot]' draws curves.png"
    axes, *below = figure.subplots(2 if readings else 1, sharex=True, squeeze=False).flatten()
    looks = [s for s in steps if s["held_out"] is not None]
    for records, key, label, style in (
        (steps, "reward", "reward of the rollout", {"color": "#999999", "linewidth": 1}),
        (looks, "held_out", "held-out sampled accuracy", {"color": COLOURS[0], "marker": "o"}),
    ):
        axes.plot([s["step"] for s in records], [s[key] for s in records], label=label, **style)
    axes.set(ylabel="share of right answers", ylim=(-0.03, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    for axes in below:
        plots.of_updates(axes, readings, OF_UPDATES)
        axes.set(ylabel="the updates, layer by layer", ylim=(0, None))
        axes.legend(loc="best", fontsize="small")
    axes.set_xlabel("GRPO step")
    return f"picture: {written(figure, path)}"
