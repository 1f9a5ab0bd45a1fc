"""What the monitor says of GRPO runs, and when, beside the step at which the reward died.

    python benchmarks/monitor_table.py               every run; those already in the JSON are kept
    python benchmarks/monitor_table.py --limit 1     at most one run more, for a busy machine
    python benchmarks/monitor_table.py --smoke       a tiny run of two settings, in seconds
    python benchmarks/monitor_table.py --table       the table of docs/monitor.md, from the JSON
    python benchmarks/monitor_table.py --study DIR   other limits, on runs of `structadapt study`

A run is that of `structadapt grpo` (64 prompts x 8 completions a step, four updates a step, AdamW,
rate falling linearly to 0) with 4096 prompts: 64 steps. The JSON holds what the monitor measured of
every layer after every step; states come from it by `spectra.states`, so that other thresholds can
be tried without another run. The reward died at the step from which on it stays below a tenth of
what it was at step 0 (more than three steps to the end); any other lived, and the words name those
of them whose reward ended below half of its first. A run whose rewards were all equal for
eight steps in a row is stopped there.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import machine
import safetensors.torch
import script
import torch

import structadapt as sa
from structadapt.adapters import Adapter
from structadapt.examples import tiny_lm
from structadapt.examples.grpo import collapsed_at
from structadapt.examples.process import read_json, read_log, strict
from structadapt.files import write_atomically
from structadapt.spectra import Thresholds, states, updates
from structadapt.spectra.states import STATES
from structadapt.study.folders import CELL, MONITOR, STEPS, SUMMARY

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "monitor.json"
STUDY = RESULTS.with_name("monitor_study.json")  # what was replayed of docs/study
SETTINGS: dict[str, tuple[Adapter | None, float]] = {
    "LoRA r=8, lr 2e-3": (sa.LoRA(8, 16.0), 2e-3),
    "LoRA r=256, lr 2e-3": (sa.LoRA(256, 512.0), 2e-3),
    "DoRA r=16, lr 2e-3": (sa.DoRA(16, 32.0), 2e-3),
    "LoRA r=8, lr 2e-2": (sa.LoRA(8, 16.0), 2e-2),
    "LoRA r=128, lr 2e-3": (sa.LoRA(128, 256.0), 2e-3),
    "LoRA r=8, lr 6e-3": (sa.LoRA(8, 16.0), 6e-3),
    "QuanTA, lr 2e-2": (sa.QuanTA(3), 2e-2),
    "full, lr 3e-3": (None, 3e-3),
    "LoRA r=64, lr 2e-3": (sa.LoRA(64, 128.0), 2e-3),
    "DoRA r=16, lr 1e-2": (sa.DoRA(16, 32.0), 1e-2),
    "LoRA r=1, lr 2e-3": (sa.LoRA(1, 2.0), 2e-3),
    "LoRA r=256, lr 5e-4": (sa.LoRA(256, 512.0), 5e-4),
    "full, lr 3e-4": (None, 3e-4),
    "QuanTA, lr 2e-3": (sa.QuanTA(3), 2e-3),
    "LoRA r=64, alpha 16, lr 2e-3": (sa.LoRA(64, 16.0), 2e-3),
    "LoRA r=2, lr 5e-3": (sa.LoRA(2, 4.0), 5e-3),
}
SEEDS = (0, 1)
PROMPTS, COLD_START = 4096, 0.2


def config(seed: int) -> sa.grpo.Config:
    return sa.grpo.Config(
        eos_token_id=tiny_lm.EOS, pad_token_id=tiny_lm.EOS, minibatches=4, share_prompts=True,
        max_new_tokens=tiny_lm.ANSWER_TOKENS, seed=seed,
    )  # fmt: skip


def started(seed: int, target: float, kept: Path | None) -> tiny_lm.TinyLM:
    """The cold-started model of a seed, from a file if there is one."""
    torch.manual_seed(seed)
    model = tiny_lm.TinyLM()
    path = kept and kept / f"base-{seed}.safetensors"
    if path and path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model
    rng = random.Random("held out, curve")
    held_out = list(islice(tiny_lm.problems(rng, held_out=True), 300))

    def accuracy() -> float:
        return sa.grpo.evaluate(
            model, held_out, sa.grpo.exact_match, config(seed), seed=seed,
            tokenizer=tiny_lm.CharTokenizer(),
        ).mean  # fmt: skip

    lessons = tiny_lm.lessons(seed)
    for _ in tiny_lm.cold_start(model, accuracy, target, lessons, max_steps=400 if target else 0):
        pass
    if path:
        path.write_bytes(safetensors.torch.save(model.state_dict()))
    return model


def measure(name: str, seed: int, base: tiny_lm.TinyLM, count: int) -> dict[str, Any]:
    """One run, with every measure of every layer after every step."""
    model, (adapter, lr), began = copy.deepcopy(base), SETTINGS[name], time.perf_counter()
    if adapter is not None:
        sa.adapt(model, adapter, seed=seed)
    trained = list(model.parameters() if adapter is None else sa.adapter_parameters(model))
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    watched, _ = updates.find(model, snapshots=adapter is None)
    bases = [updates.base_of(update) for update in watched]
    norms = {u.name: b[1] for u, b in zip(watched, bases, strict=True) if b[1] is not None}
    problems = tiny_lm.problems(random.Random(f"grpo {seed}"), held_out=False)
    prompts = list(islice(problems, count))
    total = sa.grpo.steps_in(count, config(seed)) * 4
    context: dict[str, Any] = {
        "tokenizer": tiny_lm.CharTokenizer(),
        "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total),
    }
    if adapter is not None:
        context["rollout_context"] = lambda: sa.merged_if_exact(model)
    steps, seen, failure = [], [], None
    run = sa.grpo.train(model, optimizer, prompts, sa.grpo.exact_match, config(seed), **context)
    try:
        for step in run:
            steps.append({"step": step.step, "reward": step.reward, "kl": step.kl})
            table = updates.measure(watched, norms)
            seen.append([[float(f"{v:.3g}") for v in row] for row in table.tolist()])
            if any(alarm.startswith("absorbing") for alarm in step.alarms):
                break
    except FloatingPointError as error:
        failure = str(error)
    return {
        "setting": name, "adapter": repr(adapter), "lr": lr, "seed": seed,
        "died_at": collapsed_at(steps), "failure": failure,
        "reward": [rounded(s["reward"]) for s in steps], "kl": [rounded(s["kl"]) for s in steps],
        "layers": [
            [u.name, u.shape, u.rank, rounded(b[0].frobenius), rounded(b[0].spectral)]
            for u, b in zip(watched, bases, strict=True)
        ],
        "measures": seen, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def fill(path: Path, names: list[str], count: int, cold: float, limit: int, kept: Any) -> int:
    """Run what is not there yet, writing after every run; how many are left."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    results.pop("versions", None)  # where files had them before there was a machine's record
    results["machine"] = machine.record(("torch",)) | {"threads": torch.get_num_threads()}
    there = {(r["setting"], r["seed"]) for r in results["runs"]}
    cases = [(name, seed) for seed in SEEDS for name in names]
    missing = [case for case in cases if case not in there]
    for name, seed in missing[:limit]:
        run = measure(name, seed, started(seed, cold, kept), count)
        results["runs"].append(run)
        write_atomically(path, (json.dumps(results, separators=(",", ":")) + "\n").encode())
        fate = f"died at {run['died_at']}, last reward {run['reward'][-1]:.3f}"
        print(f"{name}, seed {seed}: {fate}, {run['seconds']} s", file=sys.stderr)
    return max(len(missing) - limit, 0)


# -- runs of a study -------------------------------------------------------------------------------


Looks = list[tuple[int, list[states.Row]]]  # step, and its rows without their states


@dataclass(frozen=True)
class Watched:
    """A run of GRPO in the folder of a study."""

    id: str
    collapsed: bool
    every: int  # steps between looks
    rewards: list[float]  # of every step
    kls: list[float]
    looks: Looks


def watched_runs(study: Path) -> list[Watched]:
    """Every finished run of GRPO that ended when it was absorbed, if it was."""
    found = []
    for folder in sorted((study / "cells").iterdir()):
        cell, summary = read_json(folder / CELL), read_json(folder / SUMMARY)
        if not summary or cell["method"] != "grpo":
            continue
        steps, readings = read_log(folder / STEPS), read_log(folder / MONITOR)
        if not readings or not cell["stop_absorbed"]:
            continue
        looks = [(r["step"], [blank(row) for row in r["rows"]]) for r in readings]
        told = [step["reward"] for step in steps], [step["kl"] for step in steps]
        found.append(Watched(folder.name, summary["collapsed"], cell["monitor"], *told, looks))
    return found


def blank(row: dict[str, Any]) -> states.Row:
    """A row that is still to be judged; null in JSON is what was not finite."""
    values: dict[str, Any] = {n: math.inf if v is None else v for n, v in row.items()}
    kept = states.NOT_JUDGED if row["state"] == states.NOT_JUDGED else "healthy"
    return states.Row(**values | {"shape": tuple(row["shape"]), "state": kept})


def alarmed(run: Watched, limits: Thresholds) -> bool:
    """Whether the monitor would have called it collapsing or collapsed."""
    found = judged(run.looks, limits, run.every, run.rewards, run.kls)
    return any(state in states.ALARMS for _, state, _ in found)


def replayed(study: Path) -> dict[str, Any]:
    """Which runs of a study an alarm would have been raised for, for several limits."""
    runs, found = watched_runs(study), []
    for moving, kl in ((math.inf, math.inf), (0.05, math.inf), (0.08, math.inf),
                       (math.inf, 0.5), (0.05, 0.25), (0.05, 0.5), (0.05, 1.0)):  # fmt: skip
        for speed in (0.14, 0.2, 0.25, 0.36):
            some = {"collapsing_speed": speed, "moving_speed": moving, "moving_kl": kl}
            limits = replace(Thresholds(), **some)
            told = json.loads(strict(some))  # null: no limit
            found.append({**told, "alarmed": [run.id for run in runs if alarmed(run, limits)]})
    return {
        "machine": machine.record(("structadapt", "torch")),
        "collapsed": {run.id: run.collapsed for run in runs},
        "limits": found,
    }


def study_table(results: dict[str, Any]) -> str:
    """Right and false alarms for each set of limits."""
    collapsed = results["collapsed"]
    died = sum(collapsed.values())
    lines = [
        "| `collapsing_speed` | `moving_speed` | `moving_kl` | "
        f"found of {died} | false of {len(collapsed) - died} |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in results["limits"]:
        right = sum(collapsed[run] for run in row["alarmed"])
        chosen = (row["collapsing_speed"], row["moving_speed"], row["moving_kl"])
        cells = (*map(_dash, chosen), right, len(row["alarmed"]) - right)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# -- what the monitor says of them -----------------------------------------------------------------


def judged(
    looks: Looks, limits: Thresholds, every: int, rewards: list[float], kls: list[float]
) -> Iterator[tuple[int, str, str]]:
    """(step, state, evidence) of every look. rewards, kls: of every step, or none."""
    names = [row.name for row in looks[0][1]] if looks else []
    judge = states.Judge(limits, every, dict.fromkeys(names, 0.0))
    for step, rows in looks:
        last = slice(step + 1 - every, step + 1)
        yield step, *judge.look(rows, rewards[last], kls[last])[1:]


def said(run: dict[str, Any], limits: Thresholds, every: int, reward: bool) -> list[tuple]:
    """(step, state, evidence) of every check of a run."""
    layers = [
        (updates.Tracked(name, tuple(shape), "", rank), updates.Base(*base))
        for name, shape, rank, *base in run["layers"]
    ]
    looks = []
    for step in range(every - 1, len(run["measures"]), every):
        seen = zip(layers, run["measures"][step], strict=True)
        looks.append((step, [states.row_of(*layer, *values) for layer, values in seen]))
    told = (run["reward"], run["kl"]) if reward else ([], [])
    return list(judged(looks, limits, every, *told))


def verdict(run: dict[str, Any], limits: Thresholds, every: int = 1, reward: bool = False) -> dict:
    """The first step of each state, the last state, and whether the alarm was right."""
    found = said(run, limits, every, reward)
    first = {state: next((step for step, s, _ in found if s == state), None) for state in STATES}
    result = {"first": first, "last": found[-1][1] if found else None}
    return result | {"alarm": first_of(states.ALARMS, result)}


def table(results: dict[str, Any]) -> str:
    """Every run: what the monitor said, at every step and every tenth."""
    head = ("run", "seed", "reward: first, lowest, last", "died at", "`collapsing`", "`collapsed`",
            "last state", "told the reward", "every=10: alarm, last")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in sorted(
        results["runs"], key=lambda r: (r["died_at"] is None, r["setting"], r["seed"])
    ):
        one, ten = verdict(run, Thresholds()), verdict(run, Thresholds(), 10)
        told = verdict(run, Thresholds(), reward=True)
        rewards = run["reward"][0], min(run["reward"]), run["reward"][-1]
        cells = (
            run["setting"], run["seed"], " ".join(f"{reward:.2f}" for reward in rewards),
            run["died_at"], one["first"]["collapsing"], one["first"]["collapsed"], one["last"],
            told["last"],
            "run was over" if ten["last"] is None else f"{_dash(ten['alarm'])}, {ten['last']}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(_dash, cells)) + " |")
    return "\n".join(lines)


def words(results: dict[str, Any]) -> str:
    """Right and wrong alarms, counted."""
    runs = results["runs"]
    died = [run for run in runs if run["died_at"] is not None]
    lived = [run for run in runs if run["died_at"] is None]
    lines = [f"- {fates(runs)}"]
    for every in (1, 10):
        for worse in (states.ALARMS, states.ALARMS[1:]):
            at = {id(run): first_of(worse, verdict(run, Thresholds(), every)) for run in runs}
            found = [run for run in died if at[id(run)] is not None]
            early = [run for run in found if at[id(run)] < run["died_at"]]
            false = [run for run in lived if at[id(run)] is not None]
            lines.append(
                f"- every={every}, {' or '.join(f'`{state}`' for state in worse)}: {len(found)} of "
                f"the {len(died)} that died, {len(early)} of them before the reward did; false "
                f"for {len(false)} of the {len(lived)} that lived ({names_of(false)})."
            )
    missed = [run for run in died if verdict(run, Thresholds())["alarm"] is None]
    lines.append(f"- No alarm at every=1 in these that died: {names_of(missed)}.")
    calm = [run for run in lived if verdict(run, Thresholds())["last"] not in states.ALARMS]
    lines.append(f"- Of the {len(lived)} that lived {len(calm)} end without an alarm.")
    return "\n".join(lines)


def fates(runs: list[dict[str, Any]]) -> str:
    """How many died and how many lived, and which of these lost most of their reward."""
    lived = [run for run in runs if run["died_at"] is None]
    lost = [run for run in lived if run["reward"][-1] < run["reward"][0] / 2]
    named = [f"{names_of([r])}: {r['reward'][0]:.2f} to {r['reward'][-1]:.2f}" for r in lost]
    return (
        f"{len(runs)} runs; the reward died in {len(runs) - len(lived)}. The other {len(lived)} "
        f"count as lived; of these the reward still fell by more than half, from first to last, in "
        f"{len(lost)}{' (' * bool(lost)}{'; '.join(named)}{')' * bool(lost)}."
    )


def first_of(worse: tuple[str, ...], found: dict[str, Any]) -> int | None:
    steps = [found["first"][state] for state in worse]
    return min((step for step in steps if step is not None), default=None)


def names_of(runs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{run['setting']}, seed {run['seed']}" for run in runs) or "none"


def _dash(value: Any) -> str:
    return "-" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--limit", type=int, default=10**6)
    parser.add_argument("--kept", type=Path, help="folder for the cold-started models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--study", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.study:
        results = replayed(args.study)
        script.write(STUDY if args.out == RESULTS else args.out, results)
        print(study_table(results))
        return
    if args.table:
        results = json.loads(args.out.read_text())
        print(words(results), table(results), sep="\n\n")
        return
    if args.smoke:
        fill(args.out, list(SETTINGS)[:2], 128, 0.0, 2, None)
        return
    print("left:", fill(args.out, list(SETTINGS), PROMPTS, COLD_START, args.limit, args.kept))


if __name__ == "__main__":
    main()
