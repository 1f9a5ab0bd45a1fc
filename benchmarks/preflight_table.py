"""Does the KL of the first update tell which GRPO runs collapse? On the embedded task.

    python benchmarks/preflight_table.py            every setting; rows already there are kept
    python benchmarks/preflight_table.py --smoke    a tiny run of two settings, in seconds
    python benchmarks/preflight_table.py --table    the table of docs/preflight.md, from the JSON

A row is one run: `grpo.preflight` on a cold-started model with a fresh adapter and AdamW, then the
run itself with the same arguments, constant learning rate. Collapsed is a run whose sampled
held-out accuracy at the end is below a tenth of that at its start, or that the guard calls
absorbing (the rewards of every group equal for eight steps in a row; it is stopped there).
The runs of protocol "1 update" choose the thresholds; those of "4 updates", which take four
optimizer steps on each rollout as `structadapt grpo` does, test them.
"""

import copy
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import machine
import script
import torch

import structadapt as sa
from structadapt.adapters import Adapter
from structadapt.examples import evaluating, tiny_lm
from structadapt.grpo.trial import verdict_of
from structadapt.study.statistics import errors, limits

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "preflight.json"
RSLORA = {
    "scaling": "alpha/sqrt(r)",
    "alpha": 16 / 8**0.5,
}  # the scale of LoRA r=8, alpha=16 at r=8
SETTINGS: dict[str, Adapter | None] = {
    "LoRA r=8": sa.LoRA(8, 16.0),
    "LoRA r=32": sa.LoRA(32, 64.0),
    "LoRA r=64": sa.LoRA(64, 128.0),
    "LoRA r=128": sa.LoRA(128, 256.0),
    "LoRA r=256": sa.LoRA(256, 512.0),
    "LoRA r=64, alpha 16": sa.LoRA(64, 16.0),
    "LoRA r=128, alpha 16": sa.LoRA(128, 16.0),
    "LoRA r=256, alpha 16": sa.LoRA(256, 16.0),
    "rsLoRA r=128": sa.LoRA(128, **RSLORA),
    "DoRA r=16": sa.DoRA(16, 32.0),
    "QuanTA 3 axes": sa.QuanTA(3),
    "full fine-tuning": None,
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
EDGE = [  # where runs begin to collapse; with other seeds too
    ("LoRA r=128", 1e-3), ("LoRA r=64", 3e-3), ("LoRA r=32", 3e-3), ("rsLoRA r=128", 3e-3),
    ("LoRA r=256", 1e-3), ("full fine-tuning", 1e-3), ("LoRA r=64, alpha 16", 1e-2),
    ("LoRA r=256, alpha 16", 1e-2), ("DoRA r=16", 3e-3), ("LoRA r=8", 1e-2),
    ("QuanTA 3 axes", 3e-3), ("full fine-tuning", 5e-4), ("LoRA r=64", 1.5e-3),
    ("LoRA r=64", 2e-3), ("LoRA r=256", 5e-4), ("LoRA r=64, alpha 16", 5e-3), ("DoRA r=16", 5e-3),
]  # fmt: skip
FOUR = [  # with four updates a rollout
    ("LoRA r=128", 1e-3), ("LoRA r=64", 2e-3), ("LoRA r=8", 2e-3), ("full fine-tuning", 3e-4),
]  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How a run goes, and how it is judged."""

    name: str = "1 update"
    prompts: int = 1024
    prompts_per_step: int = 32
    minibatches: int = 1
    cold_start: float = 0.2  # sampled held-out accuracy that ends the cold start
    problems: int = 500  # held-out, before and after

    def config(self, seed: int) -> sa.grpo.Config:
        return sa.grpo.Config(
            eos_token_id=tiny_lm.EOS, pad_token_id=tiny_lm.EOS, share_prompts=True, seed=seed,
            max_new_tokens=tiny_lm.ANSWER_TOKENS, prompts_per_step=self.prompts_per_step,
            minibatches=self.minibatches,
        )  # fmt: skip


PROTOCOLS = (Protocol(), Protocol("4 updates", 2048, 64, 4))
SMOKE = Protocol(prompts=96, cold_start=0.0, problems=20)


# -- one row ---------------------------------------------------------------------------------------


def accuracy(model: torch.nn.Module, protocol: Protocol, seed: int) -> dict[str, Any]:
    """On held-out problems."""
    held_out = tiny_lm.problems(random.Random("held out, end"), held_out=True)
    return evaluating.accuracy(
        model, list(islice(held_out, protocol.problems)), sa.grpo.exact_match,
        protocol.config(seed), tokenizer=tiny_lm.CharTokenizer(),
    )  # fmt: skip


@cache
def started(seed: int, protocol: Protocol) -> tuple[tiny_lm.TinyLM, dict[str, Any]]:
    """The cold-started model of a seed, and how well it does."""
    torch.manual_seed(seed)
    model = tiny_lm.TinyLM()
    quick = replace(protocol, problems=min(protocol.problems, 300))
    steps = tiny_lm.cold_start(
        model, lambda: accuracy(model, quick, seed)["sampled"], protocol.cold_start,
        tiny_lm.lessons(seed),
        max_steps=400 if protocol.cold_start else 0,
    )  # fmt: skip
    for _ in steps:
        pass
    return model, accuracy(model, protocol, seed)


def measure(name: str, lr: float, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Preflight, then the run."""
    base, before = started(
        seed, replace(protocol, name="", prompts=0, prompts_per_step=1, minibatches=1)
    )
    model, adapter, began = copy.deepcopy(base), SETTINGS[name], time.perf_counter()
    if adapter is not None:
        sa.adapt(model, adapter, seed=seed)
    trained = list(model.parameters() if adapter is None else sa.adapter_parameters(model))
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    problems = tiny_lm.problems(random.Random(f"grpo {seed}"), held_out=False)
    prompts = list(islice(problems, protocol.prompts))
    run = model, optimizer, prompts, sa.grpo.exact_match, protocol.config(seed)
    context: dict[str, Any] = {"tokenizer": tiny_lm.CharTokenizer()}
    if adapter is not None:
        context["rollout_context"] = lambda: sa.merged(model)
    report = sa.grpo.preflight(*run, **context, weights=weights_of(model, adapter), tries=0)
    steps, absorbed = [], None
    for step in sa.grpo.train(*run, **context):
        steps.append(step)
        if any(alarm.startswith("absorbing") for alarm in step.alarms):
            absorbed = step.step
            break
    assert protocol.minibatches > 1 or steps[0].kl == report.kl, "the trial is not the first step"
    after = accuracy(model, protocol, seed)
    return {
        "setting": name, "lr": lr, "seed": seed, "protocol": protocol.name,
        "kl": report.kl, "kl_step": report.first.kl_step, "reward": report.reward,
        "relative": report.relative and asdict(report.relative),
        "spectral": report.spectral and asdict(report.spectral),
        "before": before, "after": after, "absorbed_at": absorbed, "steps": len(steps),
        "lowest_reward": min(step.reward for step in steps),
        "collapsed": absorbed is not None or after["sampled"] < before["sampled"] / 10,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def weights_of(model: torch.nn.Module, adapter: Adapter | None) -> Any:
    """What `preflight` takes for an adapted model; None for one that is trained as it is."""
    if adapter is None:
        return None
    layers = dict(model.named_modules())
    return lambda: ((n, layers[n].weight, dW) for n, dW in sa.delta_weights(model))


def cases() -> list[tuple[str, float, int, Protocol]]:
    """(setting, rate, seed, protocol) of every row."""
    one, four_updates = PROTOCOLS
    grid = [(name, lr, 0, one) for lr in RATES for name in SETTINGS]
    edge = [(name, lr, seed, one) for seed in (1, 0, 2) for name, lr in EDGE]
    four = [(name, lr, 0, four_updates) for name, lr in FOUR]
    return list(dict.fromkeys([*grid, *edge[: 2 * len(EDGE)], *four, *edge]))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["protocol"], row["seed"], row["setting"], row["lr"]


def fill(path: Path, cases: list[tuple[str, float, int, Protocol]]) -> None:
    """Measure what is not there yet, writing after every row."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results["protocols"] = {case[3].name: asdict(case[3]) for case in cases}
    results["adapters"] = {name: repr(adapter) for name, adapter in SETTINGS.items()}
    results["optimizer"] = "AdamW, constant learning rate, no weight decay, gradient norm 1.0"
    results.pop("versions", None)  # where files had them before there was a machine's record
    results["machine"] = machine.record(("torch",)) | {"threads": torch.get_num_threads()}
    there = {key(row) for row in results["rows"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, lr, seed, protocol in cases:
        if (protocol.name, seed, name, lr) in there:
            continue
        row = measure(name, lr, seed, protocol)
        results["rows"] = sorted([*results["rows"], row], key=lambda r: (r["protocol"], r["kl"]))
        script.write(path, results)
        fate = "collapsed" if row["collapsed"] else "lived"
        print(f"{protocol.name}, seed {seed}, {name}, lr {lr:g}: KL {row['kl']:.3g}, {fate}, "
              f"{row['after']['sampled']:.3f}, {row['seconds']} s", file=sys.stderr)  # fmt: skip


# -- what the rows say -----------------------------------------------------------------------------


def points(rows: list[dict[str, Any]]) -> list[tuple[float, bool]]:
    """(KL of the first update, whether it collapsed) of each run."""
    return [(row["kl"], row["collapsed"]) for row in rows]


def conclusion(results: dict[str, Any]) -> str:
    """In words, what the rows say of the limits and of the hypothesis they set out to test."""
    rows = [row for row in results["rows"] if row["protocol"] == PROTOCOLS[0].name]
    found, count = limits(points(rows)), len(rows)
    first = [row for row in rows if row["seed"] == 0]
    others = [row for row in rows if row["seed"] != 0]
    limit = limits(points(first)).best
    wrong = [r for r in rows if (r["collapsed"] and r["kl"] <= 0.42)
             or (not r["collapsed"] and r["kl"] >= 0.7)]  # fmt: skip
    between = sum(found.safe < row["kl"] < found.collapse for row in rows)
    lines = [
        f"- {count} runs of one update a rollout, {sum(r['collapsed'] for r in rows)} of them "
        f"collapsed. The largest KL that lived is {found.largest_lived:.3g}, the smallest that "
        f"died {found.smallest_died:.3g}.",
        f"- Limits from these runs: safe up to {found.safe:.2g}, collapse from "
        f"{found.collapse:.2g}; {between} runs lie between.",
        f"- The best single limit, {found.best:.2g}, is wrong for {found.errors} of {count} "
        f"({found.errors / count:.1%}). The one that seed 0 alone chooses, {limit:.2g}, is "
        f"wrong for {errors(points(others), limit)} of the {len(others)} runs with other seeds.",
        "- The hypothesis (from 0.7 on all die, up to 0.42 all live) "
        + (f"fails for {len(wrong)} of {count} runs." if wrong else "holds for all of them."),
    ]
    lost = [
        r for r in rows if not r["collapsed"] and r["after"]["sampled"] < r["before"]["sampled"]
    ]
    if lost:
        lines.append(
            f"- {len(lost)} runs lived and still ended below where they began; the smallest KL of "
            f"these is {min(r['kl'] for r in lost):.2g}."
        )
    tests = [row for row in results["rows"] if row["protocol"] != PROTOCOLS[0].name]
    if tests:
        sure = [r for r in tests if not found.safe < r["kl"] < found.collapse]
        bad = errors(points(sure), found.collapse)
        lines.append(
            f"- {len(tests)} runs of four updates a rollout, which chose nothing: a verdict other "
            f"than uncertain for {len(sure)}, wrong for {bad}."
        )
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """One line a run, by protocol and KL."""
    lines = [
        "| updates | KL | setting | learning rate | seed | preflight | before | after | greedy | "
        "fate |",
        "|--:|--:|---|--:|--:|---|--:|--:|--:|---|",
    ]
    for row in results["rows"]:
        before, after = row["before"], row["after"]
        fate = "lived"
        if row["collapsed"]:
            absorbed = row["absorbed_at"] is not None
            fate = "**collapsed**" + (f", absorbed by step {row['absorbed_at']}" * absorbed)
        lines.append(
            f"| {row['protocol'].split()[0]} | {row['kl']:.2g} | {row['setting']} | {row['lr']:g} "
            f"| {row['seed']} | {verdict_of(row['kl'])} | {before['sampled']:.1%} "
            f"| {after['sampled']:.1%} | {after['greedy']:.1%} | {fate} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = script.parser(__doc__, RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke and options.out == RESULTS:
        parser.error("--smoke writes numbers that mean nothing: give it another --out")
    if options.smoke:
        fill(options.out, [("LoRA r=8", 1e-3, 0, SMOKE), ("full fine-tuning", 1e-2, 0, SMOKE)])
    elif not options.table:
        fill(options.out, cases())
    results = json.loads(options.out.read_text())
    print(table(results))
    if not options.smoke:
        print(f"\n{conclusion(results)}")


if __name__ == "__main__":
    main()
