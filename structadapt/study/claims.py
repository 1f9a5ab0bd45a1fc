"""The claims of "Structure Over Scale" (ICML 2026 FoGen workshop), and what a study says of each.

Only the abstract's numbers are known here, and alpha is not among them. Each claim is put as a
criterion on the runs of one model and task; where the runs that it needs are not there, it is "not
testable here".
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
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
ROOT: Scaling = (5.657, "alpha/sqrt(r)")  # rsLoRA, as the grids have it
CLEAR = 0.75  # of the pairs of runs: one kind has larger values than the other
LEAST = 3  # runs of each fate, for a claim on what tells them apart


def judged(rows: Sequence[Row]) -> list[Claim]:
    """The paper's claims, on the runs of one model and task."""
    found = evidence_of(rows)
    sweep = found.sweep or found.batches
    return [
        _cliff(sweep),
        *(_falls(found.batches, rule) for rule in RULES),
        *(_stays(found.batches, rule) for rule in RULES),
        *(_train_on(found.batches, rule) for rule in RULES),
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
    return Claim(text, verdict_of(good), joined(_said_of(found)))


def _said_of(found: dict[tuple[float, int], dict[int, list[Row]]]) -> list[str]:
    """What came of the runs of each base learning rate, by batch size."""
    return [f"lr {lr:g} at {base}: " + ", ".join(f"batch {b} {died(r)}" for b, r in runs.items())
            for (lr, base), runs in found.items()]  # fmt: skip


def _falls(rows: Sequence[Row], rule: str) -> Claim:
    text = ("Rank 64 learns at batch 64 and falls to near the floor at 128 and 256 (paper: 73.1 %, "
            f"8.7 %, 6.0 %); learning rate {RULES[rule]}")  # fmt: skip
    return _by_batch(text, lora(rows, SWEPT), rule, {64: False, 128: True, 256: True})


def _stays(rows: Sequence[Row], rule: str) -> Claim:
    text = ("Ranks 128 and 256 stay near the floor at batch 64, 128 and 256; learning rate "
            f"{RULES[rule]}")  # fmt: skip
    runs = {rank: lora(rows, rank) for rank in HIGH}
    runs = {rank: own for rank, own in runs.items() if _at_batches(own, rule)}
    every = [row for own in runs.values() for row in own]
    found = _by_batch(text, every, rule, dict.fromkeys(BATCHES, True))
    missing = [rank for rank in HIGH if rank not in runs] if runs else []
    said = "".join(f" ({rank} was not run at these batch sizes)" for rank in missing)
    return replace(found, evidence=found.evidence + said)


RULES = {"fixed": "fixed", "sqrt": "with the batch's square root", "linear": "with the batch"}


def _train_on(rows: Sequence[Row], rule: str) -> Claim:
    text = ("LoRA r=8, DoRA r=16 and QuanTA with 3 axes train on at every batch size; learning "
            f"rate {RULES[rule]}")  # fmt: skip
    named = {
        "LoRA r=8": lora(rows, 8),
        "DoRA r=16": [r for r in rows if r["adapter"] == "dora" and r["rank"] == 16],
        "QuanTA 3 axes": [r for r in rows if r["adapter"] == "quanta" and str(r["axes"]) == "3"],
    }
    found = {name: _at_batches(runs, rule) for name, runs in named.items()}
    if not all(found.values()):
        return Claim(text, NOT_TESTABLE, "no runs of the three at batch 64, 128 and 256")
    good, said = [], []
    for name, rates in found.items():
        good.append(any(all(all_of(r, False) for r in own.values()) for own in rates.values()))
        said += [f"{name}, {text}" for text in _said_of(rates)]
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


def _fates(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Runs that collapsed, and that lived."""
    rows = list(rows)
    return [r for r in rows if r["collapsed"]], [r for r in rows if not r["collapsed"]]


def _above(pairs: Sequence[tuple[Row, Row]], name: str) -> float:
    """The share of pairs in which the first has the larger value."""
    values = [(a["spectra"][name], b["spectra"][name]) for a, b in pairs]
    return sum((a > b) + (a == b) / 2 for a, b in values) / len(values)


def _concentrated(rows: Sequence[Row]) -> Claim:
    text = "With alpha = 2r, collapsed LoRA updates put their energy into fewer directions"
    fates = {rank: _fates(_with_spectra(lora(rows, rank))) for rank in (SWEPT, *HIGH)}
    fates = {rank: both for rank, both in fates.items() if all(both)}  # ranks differ by themselves
    bad, good = (sum(len(both[i]) for both in fates.values()) for i in (0, 1))
    if min(bad, good) < LEAST:
        return Claim(text, NOT_TESTABLE, "ranks of 64 to 256 that have both: collapsed runs "
                     f"{bad}, that lived {good}, needed {LEAST} of each")  # fmt: skip
    pairs = [(a, b) for died, lived in fates.values() for a in died for b in lived]
    energy, stable, effective = (
        _above(pairs, name) for name in ("topk_energy", "stable_rank", "effective_rank")
    )
    counts = [f"r={rank} {len(a)} and {len(b)}" for rank, (a, b) in fates.items()]
    said = (f"{len(pairs)} pairs of a collapsed run and one that lived, of one rank (runs: "
            f"{', '.join(counts)}); the collapsed one has the larger top-1 energy in {energy:.0%}, "
            f"stable rank in {stable:.0%}, effective rank in {effective:.0%}. Criterion: the top-1 "
            f"energy larger and the stable rank smaller in {CLEAR:.0%} of the pairs")  # fmt: skip
    if effective > 1 / 2:
        said += ". The effective rank goes the other way: collapsed updates have the larger one"
    return Claim(text, verdict_of(energy >= CLEAR and stable <= 1 - CLEAR), said)


def _separates(rows: Sequence[Row]) -> Claim:
    text = "Concentration tells runs that collapsed from those that live, whatever the scale"
    runs = _with_spectra(r for r in rows if r["adapter"] == "lora" and r["rank"] > 1)
    points = [(r["spectra"]["topk_energy"], r["collapsed"]) for r in runs]
    count = sum(collapsed for _, collapsed in points)
    base = min(count, len(points) - count)
    if base < LEAST:
        return Claim(text, NOT_TESTABLE, f"{count} of {len(points)} runs of LoRA collapsed: "
                     f"{LEAST} of each fate are needed")  # fmt: skip
    wrong = limits(points).errors
    said = (f"the best limit of top-1 energy is wrong for {wrong} of {len(points)} runs; always "
            f"saying the more frequent fate is wrong for {base}")  # fmt: skip
    return Claim(text, verdict_of(wrong <= base / 2), said)


def _milder(rows: Sequence[Row]) -> Claim:
    text = "Full fine-tuning shows a milder form: more concentrated than QuanTA, less than LoRA"
    lived = _fates(_with_spectra(rows))[1]
    full, quanta = ([r for r in lived if r["adapter"] == kind] for kind in ("full", "quanta"))
    ranks = {rank: own for rank in (SWEPT, *HIGH) if (own := lora(lived, rank))}
    if not (full and quanta and ranks):
        return Claim(text, NOT_TESTABLE, "no runs of all three that lived (LoRA: ranks 64 to 256)")
    least, most = _medians(quanta, "topk_energy"), _medians(full, "topk_energy")
    named = {"QuanTA": quanta, "full": full}
    named |= {f"LoRA r={rank}": own for rank, own in ranks.items()}
    said = [f"{name} {_medians(own, 'topk_energy'):.3g} ({len(own)})"
            for name, own in named.items()]  # fmt: skip
    good = all(least < most < _medians(own, "topk_energy") for own in ranks.values())
    words = f"median top-1 energy of the runs that lived (runs), LoRA with {in_words(PAPER)}: "
    return Claim(text, verdict_of(good), words + ", ".join(said))


# -- beyond the paper ------------------------------------------------------------------------------


def _scale_decides(rows: Sequence[Row]) -> Claim:
    text = ("Not the rank but the update's scale makes the cliff: with one alpha for every rank "
            "the learning rate of the edge is the same for all")  # fmt: skip
    paper, same, root = (_edges(rows, scaling) for scaling in (PAPER, SAME, ROOT))
    if len(same) < 3 or not any(paper.values()):
        return Claim(text, NOT_TESTABLE, "no three ranks with both rules at the same rates")
    paper = {rank: found for rank, found in paper.items() if rank in same}
    edges = {PAPER: paper, SAME: same} | ({ROOT: root} if len(root) > 2 else {})
    said = [
        f"{in_words(rule)}: "
        + ", ".join(f"r={k} {'none' if v is None else f'{v:g}'}" for k, v in found.items())
        for rule, found in edges.items()
    ]
    words = "lowest rate at which most runs collapse. " + joined(said)
    if not any(same.values()):
        return Claim(text, NOT_TESTABLE, f"{words}: with one alpha no edge was reached")
    good = len(set(same.values())) < len(set(paper.values())) and len(set(same.values())) <= 2
    return Claim(text, verdict_of(good), words)


def _edges(rows: Sequence[Row], scaling: Scaling) -> dict[int, float | None]:
    """The edge of each rank that was run by a rule at the rates that the paper's was run at."""
    found = {}
    for rank in sorted({r["rank"] for r in rows if r["adapter"] == "lora"} - {1}):
        paper, own = lora(rows, rank), lora(rows, rank, scaling)
        if own and {r["rate"] for r in own} == {r["rate"] for r in paper}:
            found[rank] = edge(own)
    return found
