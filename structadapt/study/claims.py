"""The claims of "Structure Over Scale" (ICML 2026 FoGen workshop), and what a study says of each.

Only the abstract's numbers are known here. Each claim is put as a criterion on the runs; where the
runs that it needs are not in a study, it is "not testable here".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from structadapt.study.figures import follows, rule_scale
from structadapt.study.statistics import Row, final, grouped, mean_of

AGREES, DISAGREES, NOT_TESTABLE = "agrees", "disagrees", "not testable here"
PAPER = "alpha = 2r"
HIGH, SWEPT = (128, 256), 64  # ranks that stay near the floor; the one that falls with the batch
BATCHES = (64, 128, 256)
CLEAR = 0.75  # of all pairs of runs: one kind has larger values than the other
PAPER_R64 = {64: 0.731, 128: 0.087, 256: 0.060}  # accuracy of rank 64 by batch size


@dataclass(frozen=True)
class Claim:
    """One claim, what the study says, and the figures behind it."""

    text: str
    verdict: str
    evidence: str


def judged(rows: Sequence[Row]) -> list[Claim]:
    """Every claim, judged on the runs of the embedded model's first task (or of the only model)."""
    main = main_part(rows)
    grpo = [row for row in main if row["method"] == "grpo" and row["stop_absorbed"]]
    sweep = [row for row in grpo if row["batch"] == _common_batch(grpo)]
    by_batch = [row for row in grpo if row["batch"] in BATCHES]
    return [
        _cliff(sweep),
        *(_falls(by_batch, rule) for rule in ("fixed", "sqrt", "linear")),
        *(_stays(by_batch, rule) for rule in ("fixed", "sqrt", "linear")),
        _train_on(by_batch, sweep),
        _irrecoverable(main),
        _not_in_sft(main, sweep),
        _concentrated(sweep),
        _separates(sweep),
        _milder(sweep),
        Claim(
            "Spectra of the frozen weights correlate with which adapter does well (Model Maturity "
            "Hypothesis)", NOT_TESTABLE,
            "needs several base models of one family on one task; `structadapt spectra --maturity` "
            "prints the statistics of one",
        ),
        _scale_decides(sweep),
    ]  # fmt: skip


def main_part(rows: Sequence[Row]) -> list[Row]:
    """The runs of the model and task that most runs are of."""
    groups = grouped(rows, lambda row: (row["model"], row["task"]))
    return max(groups.values(), key=len, default=[])


def _common_batch(rows: Sequence[Row]) -> int:
    groups = grouped(rows, lambda row: row["batch"])
    return max(groups, key=lambda batch: len(groups[batch]), default=0)


def lora(rows: Sequence[Row], rank: int, rule: str = PAPER) -> list[Row]:
    """Runs of LoRA of a rank at the scale that a rule gives it."""
    scale = rule_scale(rule, rank)
    return [r for r in rows if r["adapter"] == "lora" and r["rank"] == rank
            and abs(r["scale"] - scale) < 1e-3 * scale]  # fmt: skip


def died(rows: Sequence[Row]) -> str:
    """How many collapsed, and the mean accuracy."""
    if not rows:
        return "no run"
    mean = mean_of([final(row) for row in rows]).mean
    return f"{sum(r['collapsed'] for r in rows)} of {len(rows)} collapsed, {mean:.1%}"


def _all(rows: Sequence[Row], collapsed: bool) -> bool:
    return bool(rows) and all(row["collapsed"] == collapsed for row in rows)


def _verdict(agrees: bool) -> str:
    return AGREES if agrees else DISAGREES


def _cliff(rows: Sequence[Row]) -> Claim:
    text = ("LoRA has a cliff in rank: with alpha = 2r there is a learning rate at which rank 8 "
            "learns and ranks 128 and 256 stay near the floor")  # fmt: skip
    found, said = [], []
    for rate in sorted({row["rate"] for row in rows}):
        here = [row for row in rows if row["rate"] == rate]
        low, high = lora(here, 8), [r for rank in HIGH for r in lora(here, rank)]
        if low and high:
            learns = all(final(r) > r["before"]["sampled"] for r in low)
            found.append(learns and _all(high, True))
            said.append(f"lr {rate:g}: r=8 {died(low)}; r>=128 {died(high)}")
    return Claim(text, _verdict(any(found)) if found else NOT_TESTABLE, _joined(said))


def _falls(rows: Sequence[Row], rule: str) -> Claim:
    text = ("Rank 64 learns at batch 64 and falls to near the floor at 128 and 256 (paper: 73.1 %, "
            f"8.7 %, 6.0 %); learning rate {rule} in the batch")  # fmt: skip
    found = {b: [r for r in lora(rows, SWEPT) if r["batch"] == b and follows(r, rule)]
             for b in BATCHES}  # fmt: skip
    if not all(found.values()):
        return Claim(text, NOT_TESTABLE, "no runs of rank 64 at three batch sizes")
    good = _all(found[64], False) and _all(found[128], True) and _all(found[256], True)
    return Claim(text, _verdict(good), _joined(f"batch {b}: {died(r)}" for b, r in found.items()))


def _stays(rows: Sequence[Row], rule: str) -> Claim:
    text = f"Rank 128 stays near the floor at batch 64, 128 and 256; learning rate {rule}"
    found = {b: [r for r in lora(rows, 128) if r["batch"] == b and follows(r, rule)]
             for b in BATCHES}  # fmt: skip
    if not all(found.values()):
        return Claim(text, NOT_TESTABLE, "no runs of rank 128 at three batch sizes")
    good = all(_all(runs, True) for runs in found.values())
    return Claim(text, _verdict(good), _joined(f"batch {b}: {died(r)}" for b, r in found.items()))


def _train_on(by_batch: Sequence[Row], sweep: Sequence[Row]) -> Claim:
    text = "LoRA r=8, DoRA r=16 and QuanTA with 3 axes train on at every batch size"
    rows = by_batch or sweep
    named = {
        "LoRA r=8": lora(rows, 8),
        "DoRA r=16": [r for r in rows if r["adapter"] == "dora" and r["rank"] == 16],
        "QuanTA 3 axes": [r for r in rows if r["adapter"] == "quanta" and r["axes"] == 3],
    }
    if not by_batch or not all(named.values()):
        return Claim(text, NOT_TESTABLE, "no runs of the three at several batch sizes")
    said = [f"{name}: {died(runs)}" for name, runs in named.items()]
    fixed = [r for runs in named.values() for r in runs if follows(r, "fixed")]
    said.append(f"at a fixed rate: {died(fixed)}")
    return Claim(text, _verdict(_all(fixed, False)), _joined(said))


def _irrecoverable(rows: Sequence[Row]) -> Claim:
    text = "The collapse is irrecoverable under GRPO"
    runs = [r for r in rows if r["method"] == "grpo" and not r["stop_absorbed"]]
    runs = [r for r in runs if r["absorbed_at"] is not None]
    if not runs:
        return Claim(text, NOT_TESTABLE, "no run went on after it was absorbed")
    back = [r for r in runs if final(r) >= r["before"]["sampled"] / 2]
    said = (f"{len(runs)} runs went on to the last prompt after eight steps in a row without a "
            f"gradient: {len(back)} ended at half of their first accuracy or more, the best at "
            f"{max(map(final, runs)):.1%}")  # fmt: skip
    return Claim(text, _verdict(not back), said)


def _not_in_sft(rows: Sequence[Row], sweep: Sequence[Row]) -> Claim:
    text = "The cliff is a matter of RL: supervised training does not show it"
    pairs = []
    sft = grouped([r for r in rows if r["method"] == "sft"], _setting)
    for key, found in grouped(sweep, _setting).items():
        if key in sft and _all(found, True):
            pairs.append((found, sft[key]))
    if not pairs:
        return Claim(text, NOT_TESTABLE, "no supervised runs of settings that collapse under GRPO")
    back = [s for _, s in pairs if all(final(r) > r["before"]["sampled"] for r in s)]
    dips = [r for _, s in pairs for r in s if min(v for v in r["rewards"] if v is not None)
            < r["before"]["sampled"] / 10]  # fmt: skip
    total = sum(len(s) for _, s in pairs)
    said = (f"of {len(pairs)} settings that collapse under GRPO with every seed, {len(back)} end "
            f"above their start with every seed when supervised; {len(dips)} of these {total} "
            "supervised runs fall below a tenth of their start on the way")  # fmt: skip
    return Claim(text, _verdict(len(back) > len(pairs) / 2), said)


def _setting(row: Row) -> tuple[object, ...]:
    scale = row["scale"] and float(f"{row['scale']:.3g}")
    return row["adapter"], row["rank"], scale, row["axes"], row["init"], row["rate"]


def _medians(rows: Sequence[Row], name: str) -> float:
    return median(row["spectra"][name] for row in rows)


def _above(some: Sequence[Row], others: Sequence[Row], name: str) -> float:
    """The share of pairs in which the first has the larger value."""
    pairs = [(a["spectra"][name], b["spectra"][name]) for a in some for b in others]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def _with_spectra(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["spectra"]]


def _concentrated(rows: Sequence[Row]) -> Claim:
    text = "With alpha = 2r, collapsed LoRA updates put their energy into fewer directions"
    runs = _with_spectra([r for rank in (64, 128, 256) for r in lora(rows, rank)])
    bad, good = (_with_spectra([r for r in runs if r["collapsed"] == c]) for c in (True, False))
    if not bad or not good:
        return Claim(text, NOT_TESTABLE, "all of ranks 64 to 256 collapsed, or none")
    names = {"topk_energy": "top-1 energy", "stable_rank": "stable rank",
             "effective_rank": "effective rank"}  # fmt: skip
    above = {key: _above(bad, good, key) for key in names}
    said = [f"{name}: collapsed {_medians(bad, key):.3g}, lived {_medians(good, key):.3g} "
            f"(larger in {above[key]:.0%} of pairs)" for key, name in names.items()]  # fmt: skip
    agrees = above["topk_energy"] >= CLEAR and above["stable_rank"] <= 1 - CLEAR
    return Claim(text, _verdict(agrees), _joined(said) + f"; {len(bad)} and {len(good)} runs")


def _separates(rows: Sequence[Row]) -> Claim:
    text = "Concentration tells runs that collapsed from those that live, whatever the scale"
    runs = _with_spectra([r for r in rows if r["adapter"] == "lora"])
    bad, good = ([r for r in runs if r["collapsed"] == c] for c in (True, False))
    if not bad or not good:
        return Claim(text, NOT_TESTABLE, "all runs of LoRA collapsed, or none")
    edge = sorted(r["spectra"]["topk_energy"] for r in runs)
    wrong = min(sum((r["spectra"]["topk_energy"] >= e) != r["collapsed"] for r in runs)
                for e in edge)  # fmt: skip
    base = min(len(bad), len(good))
    said = (f"the best limit of top-1 energy is wrong for {wrong} of {len(runs)} runs; always "
            f"saying the more frequent is wrong for {base}")  # fmt: skip
    return Claim(text, _verdict(wrong <= base / 2), said)


def _milder(rows: Sequence[Row]) -> Claim:
    text = "Full fine-tuning shows a milder form: more concentrated than QuanTA, less than LoRA"
    kinds = {
        "QuanTA": [r for r in rows if r["adapter"] == "quanta"],
        "full": [r for r in rows if r["adapter"] == "full"],
        "LoRA": [r for r in rows if r["adapter"] == "lora"],
    }
    kinds = {k: _with_spectra([r for r in v if not r["collapsed"]]) for k, v in kinds.items()}
    if not all(kinds.values()):
        return Claim(text, NOT_TESTABLE, "no runs of all three that lived")
    top = {name: _medians(found, "topk_energy") for name, found in kinds.items()}
    said = [f"{n}: top-1 energy {top[n]:.3g}, effective rank {_medians(f, 'effective_rank'):.3g}"
            for n, f in kinds.items()]  # fmt: skip
    return Claim(text, _verdict(top["QuanTA"] < top["full"] < top["LoRA"]),
                 _joined(said) + " (medians of the runs that lived)")  # fmt: skip


def _scale_decides(rows: Sequence[Row]) -> Claim:
    text = ("Not the rank but the update's scale makes the cliff: with one alpha for every rank "
            "the learning rate of the edge is the same for all")  # fmt: skip
    edges: dict[str, dict[int, float | None]] = {}
    for rule in (PAPER, "alpha = 16"):
        ranks = sorted({r["rank"] for r in rows if r["adapter"] == "lora"} - {1})
        edges[rule] = {rank: edge(lora(rows, rank, rule)) for rank in ranks if rank >= 8}
    if any(len(found) < 3 for found in edges.values()):
        return Claim(text, NOT_TESTABLE, "no ranks at both rules")
    said = [
        f"{rule}: " + ", ".join(f"r={k} {'none' if v is None else f'{v:g}'}" for k, v in e.items())
        for rule, e in edges.items()
    ]
    paper, same = (set(edges[rule].values()) for rule in edges)
    return Claim(text, _verdict(len(same) < len(paper) and len(same) <= 2),
                 "lowest rate at which most runs collapse. " + _joined(said))  # fmt: skip


def edge(rows: Sequence[Row]) -> float | None:
    """The lowest learning rate at which most runs collapse; None if there is none."""
    for rate, found in sorted(grouped(rows, lambda row: row["rate"]).items()):
        if sum(row["collapsed"] for row in found) > len(found) / 2:
            return rate
    return None


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(parts)
