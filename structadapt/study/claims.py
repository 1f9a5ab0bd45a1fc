"""The claims of "Structure Over Scale" (ICML 2026 FoGen workshop), and what a study says of each.

Only the abstract's numbers are known here. Each claim is put as a criterion on the runs of one
model and task; where the runs that it needs are not there, it is "not testable here".
"""

from collections.abc import Iterable, Sequence
from statistics import median

from structadapt.study.evidence import (
    NOT_TESTABLE,
    Claim,
    all_of,
    died,
    edge,
    evidence_of,
    joined,
    lora,
    pairs_of,
    verdict_of,
)
from structadapt.study.statistics import (
    PAPER,
    Row,
    Scaling,
    final,
    following,
    grouped,
    in_words,
    limits,
)

HIGH, SWEPT = (128, 256), 64  # ranks that stay near the floor; the one that falls with the batch
BATCHES = (64, 128, 256)
PAPER_R64 = {64: 0.731, 128: 0.087, 256: 0.060}  # accuracy of rank 64 by batch size
SAME: Scaling = (16.0, "alpha/r")  # one alpha for every rank
CLEAR = 0.75  # of all pairs of runs: one kind has larger values than the other


def judged(rows: Sequence[Row]) -> list[Claim]:
    """The paper's claims, on the runs of one model and task."""
    found = evidence_of(rows)
    sweep = found.sweep or found.batches
    return [
        _cliff(sweep),
        *(_falls(found.batches, rule) for rule in RULES),
        *(_stays(found.batches, rule) for rule in RULES),
        _train_on(found.batches),
        _irrecoverable(found.endless),
        _not_in_sft(found.supervised, sweep),
        _concentrated(sweep),
        _separates(sweep),
        _milder(sweep),
        Claim(
            "Spectra of the frozen weights correlate with which adapter does well (Model Maturity "
            "Hypothesis)", NOT_TESTABLE,
            "needs several base models of one family on one task; `structadapt spectra --maturity` "
            "prints the statistics of one",
        ),
    ]  # fmt: skip


def beyond(rows: Sequence[Row]) -> list[Claim]:
    """What the paper does not say, on the runs of one model and task."""
    found = evidence_of(rows)
    sweep = found.sweep or found.batches
    return [_scale_decides(sweep), _dips(found.supervised, sweep)]


# -- the cliff -------------------------------------------------------------------------------------


def _cliff(rows: Sequence[Row]) -> Claim:
    text = ("LoRA has a cliff in rank: with alpha = 2r there is a learning rate at which rank 8 "
            "learns and ranks 128 and 256 stay near the floor")  # fmt: skip
    found, said = [], []
    for rate in sorted({row["rate"] for row in rows}):
        here = [row for row in rows if row["rate"] == rate]
        low, *high = (lora(here, rank) for rank in (8, *HIGH))
        if low and all(high):
            learns = all(final(r) > r["before"]["sampled"] for r in low)
            every = [r for runs in high for r in runs]
            found.append(learns and all_of(every, True))
            said.append(f"lr {rate:g}: r=8 {died(low)}; r=128 and 256 {died(every)}")
    if not found:
        return Claim(text, NOT_TESTABLE, "no runs of ranks 8, 128 and 256 at one learning rate")
    return Claim(text, verdict_of(any(found)), joined(said))


def _at_batches(rows: Sequence[Row], rule: str) -> dict[tuple[float, int], dict[int, list[Row]]]:
    """{(lr, batch of reference): {batch: runs}} where there are runs at all of BATCHES."""
    found = {}
    for lr, base in dict.fromkeys((row["lr"], row["lr_batch"]) for row in rows):
        own = grouped(following(rows, lr, rule, base), lambda row: row["batch"])
        if all(own.get(batch) for batch in BATCHES):
            found[lr, base] = {batch: own[batch] for batch in BATCHES}
    return found


def _by_batch(text: str, rows: Sequence[Row], rule: str, collapse: dict[int, bool]) -> Claim:
    """Whether the runs at each batch size collapse as said, at any of the base learning rates."""
    found = _at_batches(rows, rule)
    if not found:
        return Claim(text, NOT_TESTABLE, "no runs of it at batch 64, 128 and 256")
    good = any(all(all_of(runs[b], c) for b, c in collapse.items()) for runs in found.values())
    said = [f"lr {lr:g} at {base}: " + ", ".join(f"batch {b} {died(r)}" for b, r in runs.items())
            for (lr, base), runs in found.items()]  # fmt: skip
    return Claim(text, verdict_of(good), joined(said))


def _falls(rows: Sequence[Row], rule: str) -> Claim:
    text = ("Rank 64 learns at batch 64 and falls to near the floor at 128 and 256 (paper: 73.1 %, "
            f"8.7 %, 6.0 %); learning rate {RULES[rule]}")  # fmt: skip
    return _by_batch(text, lora(rows, SWEPT), rule, {64: False, 128: True, 256: True})


def _stays(rows: Sequence[Row], rule: str) -> Claim:
    text = f"Rank 128 stays near the floor at batch 64, 128 and 256; learning rate {RULES[rule]}"
    return _by_batch(text, lora(rows, 128), rule, dict.fromkeys(BATCHES, True))


RULES = {"fixed": "fixed", "sqrt": "with the batch's square root", "linear": "with the batch"}


def _train_on(rows: Sequence[Row]) -> Claim:
    text = "LoRA r=8, DoRA r=16 and QuanTA with 3 axes train on at every batch size (rate fixed)"
    named = {
        "LoRA r=8": lora(rows, 8),
        "DoRA r=16": [r for r in rows if r["adapter"] == "dora" and r["rank"] == 16],
        "QuanTA 3 axes": [r for r in rows if r["adapter"] == "quanta" and str(r["axes"]) == "3"],
    }
    found = {name: _at_batches(runs, "fixed") for name, runs in named.items()}
    if not all(found.values()):
        return Claim(text, NOT_TESTABLE, "no runs of the three at batch 64, 128 and 256")
    good, said = [], []
    for name, rates in found.items():
        every = [[r for runs in sizes.values() for r in runs] for sizes in rates.values()]
        good.append(any(all_of(runs, False) for runs in every))
        said += [f"{name}, lr {lr:g}: {died(r)}" for (lr, _), r in zip(rates, every, strict=True)]
    return Claim(text, verdict_of(all(good)), joined(said))


def _irrecoverable(rows: Sequence[Row]) -> Claim:
    text = "The collapse is irrecoverable under GRPO"
    runs = [r for r in rows if r["absorbed_at"] is not None and r["collapsed"]]
    if not runs:
        return Claim(text, NOT_TESTABLE, "no run went on after it was absorbed")
    back = [r for r in runs if final(r) >= r["before"]["sampled"] / 2]
    said = (f"{len(runs)} runs went on to the last prompt after eight steps in a row without a "
            f"gradient: {len(back)} ended at half of their first accuracy or more, the best at "
            f"{max(map(final, runs)):.1%}")  # fmt: skip
    return Claim(text, verdict_of(not back), said)


# -- supervised training ---------------------------------------------------------------------------


def _not_in_sft(supervised: Sequence[Row], sweep: Sequence[Row]) -> Claim:
    text = "The cliff is a matter of RL: supervised, the same settings end well"
    pairs = pairs_of(supervised, sweep)
    if not pairs:
        return Claim(text, NOT_TESTABLE, "no supervised runs of settings that collapse under GRPO")
    back = [runs for runs in pairs if all(final(r) > r["before"]["sampled"] for r in runs)]
    said = (f"{len(back)} of {len(pairs)} settings that collapse under GRPO with every seed end "
            "above their start with every seed when supervised")  # fmt: skip
    return Claim(text, verdict_of(len(back) == len(pairs)), said)


def _dips(supervised: Sequence[Row], sweep: Sequence[Row]) -> Claim:
    text = "The large first step ruins a supervised policy too, which then comes back"
    runs = [r for runs in pairs_of(supervised, sweep) for r in runs]
    seen = [[v for v in r["rewards"] if v is not None] for r in runs]
    runs = [(r, v) for r, v in zip(runs, seen, strict=True) if v]
    if not runs:
        return Claim(text, NOT_TESTABLE, "no supervised runs of settings that collapse under GRPO")
    down = [(r, v) for r, v in runs if min(v) < r["before"]["sampled"] / 10]
    back = [r for r, _ in down if final(r) > r["before"]["sampled"]]
    said = (f"{len(down)} of {len(runs)} such runs fall below a tenth of their start on the way, "
            f"and {len(back)} of these end above it")  # fmt: skip
    good = len(down) > len(runs) / 2 and len(back) > len(down) / 2
    return Claim(text, verdict_of(good), said)


# -- spectra ---------------------------------------------------------------------------------------


def _with_spectra(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["spectra"]]


def _medians(rows: Sequence[Row], name: str) -> float:
    return median(row["spectra"][name] for row in rows)


def _above(some: Sequence[Row], others: Sequence[Row], name: str) -> float:
    """The share of pairs in which the first has the larger value."""
    pairs = [(a["spectra"][name], b["spectra"][name]) for a in some for b in others]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def _concentrated(rows: Sequence[Row]) -> Claim:
    text = "With alpha = 2r, collapsed LoRA updates put their energy into fewer directions"
    runs = _with_spectra(r for rank in (64, 128, 256) for r in lora(rows, rank))
    bad, good = ([r for r in runs if r["collapsed"] == c] for c in (True, False))
    if not bad or not good:
        return Claim(text, NOT_TESTABLE, "all of ranks 64 to 256 collapsed, or none")
    names = {"topk_energy": "top-1 energy", "stable_rank": "stable rank",
             "effective_rank": "effective rank"}  # fmt: skip
    above = {key: _above(bad, good, key) for key in names}
    said = [f"{name}: collapsed {_medians(bad, key):.3g}, lived {_medians(good, key):.3g} "
            f"(larger in {above[key]:.0%} of pairs)" for key, name in names.items()]  # fmt: skip
    agrees = above["topk_energy"] >= CLEAR and above["stable_rank"] <= 1 - CLEAR
    return Claim(text, verdict_of(agrees), joined(said) + f"; {len(bad)} and {len(good)} runs")


def _separates(rows: Sequence[Row]) -> Claim:
    text = "Concentration tells runs that collapsed from those that live, whatever the scale"
    runs = _with_spectra(r for r in rows if r["adapter"] == "lora" and r["rank"] > 1)
    points = [(r["spectra"]["topk_energy"], r["collapsed"]) for r in runs]
    count = sum(collapsed for _, collapsed in points)
    if count in (0, len(points)):
        return Claim(text, NOT_TESTABLE, "all runs of LoRA collapsed, or none")
    wrong, base = limits(points).errors, min(count, len(points) - count)
    said = (f"the best limit of top-1 energy is wrong for {wrong} of {len(points)} runs; always "
            f"saying the more frequent fate is wrong for {base}")  # fmt: skip
    return Claim(text, verdict_of(wrong <= base / 2), said)


def _milder(rows: Sequence[Row]) -> Claim:
    text = "Full fine-tuning shows a milder form: more concentrated than QuanTA, less than LoRA"
    kinds = {"QuanTA": "quanta", "full": "full", "LoRA": "lora"}
    lived = [r for r in _with_spectra(rows) if not r["collapsed"] and r["rank"] != 1]
    found = {name: [r for r in lived if r["adapter"] == kind] for name, kind in kinds.items()}
    if not all(found.values()):
        return Claim(text, NOT_TESTABLE, "no runs of all three that lived")
    top = {name: _medians(runs, "topk_energy") for name, runs in found.items()}
    said = [f"{n}: top-1 energy {top[n]:.3g}, effective rank {_medians(f, 'effective_rank'):.3g}"
            for n, f in found.items()]  # fmt: skip
    good = top["QuanTA"] < top["full"] < top["LoRA"]
    return Claim(text, verdict_of(good), joined(said) + " (medians of the runs that lived)")


# -- beyond the paper ------------------------------------------------------------------------------


def _scale_decides(rows: Sequence[Row]) -> Claim:
    text = ("Not the rank but the update's scale makes the cliff: with one alpha for every rank "
            "the learning rate of the edge is the same for all")  # fmt: skip
    edges: dict[str, dict[int, float | None]] = {in_words(PAPER): {}, in_words(SAME): {}}
    for rank in sorted({r["rank"] for r in rows if r["adapter"] == "lora"} - {1}):
        both = [lora(rows, rank, scaling) for scaling in (PAPER, SAME)]
        if all(both) and {r["rate"] for r in both[0]} == {r["rate"] for r in both[1]}:
            for found, runs in zip(edges.values(), both, strict=True):
                found[rank] = edge(runs)
    paper, same = edges.values()
    if len(paper) < 3 or not any(paper.values()):
        return Claim(text, NOT_TESTABLE, "no three ranks with both rules at the same rates")
    said = [
        f"{rule}: " + ", ".join(f"r={k} {'none' if v is None else f'{v:g}'}" for k, v in e.items())
        for rule, e in edges.items()
    ]
    good = len(set(same.values())) < len(set(paper.values())) and len(set(same.values())) <= 2
    words = "lowest rate at which most runs collapse. "
    return Claim(text, verdict_of(good), words + joined(said))
