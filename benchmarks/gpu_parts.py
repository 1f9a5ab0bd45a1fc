"""The timed parts: layers of LoRA, DoRA and QuanTA, the head, ceilings.

A cell is one size. Everyone in it is checked on sampled rows against float64, then all take turns,
round by round; a ratio is over the frozen linear of the same round (over one product for the head).
Forward runs without autograd; the step is forward and backward; "bwd" is their difference, round by
round. Peak memory is of one step, beyond what was alive before.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import counts
import torch
from counts import Case
from gpu_cases import SAMPLE, Problem, Tensors, error, float64
from gpu_checks import attempt, check_part, refusal
from gpu_peers import NotInstalledError, Provider, providers
from gpu_results import Budget, Cell, Results
from gpu_timing import (
    Call,
    Timer,
    brief,
    ceilings,
    graph_pool,
    in_turns,
    input_sets,
    peak_bytes,
    ratios,
    spread,
)

# Of y and dx against float64. A peer may round W less E, or B times a scale.
TOLERANCE = {"ours": 6e-3, "peer": 3e-2}
LEAST_ROUNDS = 10
COMPILED = ((8192, 4096, 4096), 16)  # where torch.compile takes part: it takes half a minute


@dataclass(frozen=True)
class Settings:
    rounds: int = 20
    smoke: bool = False
    seconds_a_cell: float = 4.0  # of rounds, once there are enough

    @property
    def least(self) -> int:
        return min(LEAST_ROUNDS, self.rounds)


def cases(op: str, smoke: bool) -> list[Case]:
    if not smoke:
        return counts.cases(op)
    four, two = (4,) * 3, (2,) * 4
    return {
        "lora": [Case(op, 32, 64, 64, 8), Case(op, 64, 128, 64, 16)],
        "dora": [Case(op, 32, 64, 64, 8), Case(op, 64, 64, 128, 16)],
        "quanta": [
            Case(op, 32, 64, 64, 0, four, four),
            Case(op, 64, 96, 64, 0, four, (4, 4, 6)),
            Case(op, 32, 16, 16, 0, two, two),
        ],
        "head": [Case(op, 32, 200, 64)],
    }[op]


# -- one cell --------------------------------------------------------------------------------------


def fault(name: str, provider: Provider, problem: Problem, expected: Tensors, rows: Any) -> str:
    """What is wrong with a provider's output and dx, or ""."""
    limit = TOLERANCE["ours" if name.startswith(("ours", "torch")) else "peer"]
    x, dy = problem.sets[0]
    if name == "frozen":
        x64, dy64, W = x[rows].detach().double(), dy[rows].double(), problem.W.double()
        expected = {"y": x64 @ W.T}
        if not provider.forward_only:
            expected["dx"] = dy64 @ W
    if provider.scaled:  # of a loss: the gradient of the sum of logp, but for a factor
        dy = torch.ones_like(dy)
    y, dx = provider.step(x, dy)
    if provider.forward_only:
        off = error(y[rows], expected["y"])[0]
        return "" if off <= limit else f"y is {off:.1e} off"
    pairs = {"dx": (dx[rows], expected["dx"])}
    if provider.scaled:
        right = float64(problem, x, dy, problem.params, rows, gradients=False)["dx"]
        found = dx[rows].double()
        factor = (found * right).sum() / (found * found).sum().clamp(min=1e-300)
        pairs["dx"] = (found * factor, right)
    else:
        pairs["y"] = (y[rows], expected["y"])
    off = {k: error(found, right)[0] for k, (found, right) in pairs.items()}
    return "; ".join(f"{k} is {e:.1e} off" for k, e in off.items() if not e <= limit)


def time_case(case: Case, settings: Settings, device: torch.device, ceiling: Any) -> Cell:
    """Everyone of one case."""
    layer = case.op != "head"
    # The head's W alone is many times the cache.
    sets = input_sets(2 * case.M * (case.K + case.N), device) if layer else 1
    problem = Problem(case, device, sets)
    x, dy = problem.sets[0]
    rows = torch.randperm(case.M, device=device)[: min(SAMPLE, case.M)]
    expected = float64(problem, x, dy, problem.params, rows, gradients=False)
    with_compile = settings.smoke or ((case.M, case.N, case.K), case.rank or 16) == COMPILED
    entries: dict[str, Cell] = {}
    calls: dict[str, dict[str, Call]] = {}
    for name, build in providers(case.op, with_compile and case.before in ((), (16,) * 3)).items():
        try:
            provider = build(problem)
            wrong = fault(name, provider, problem, expected, rows)
            if wrong:
                entries[name] = {"status": "failed", "wrong": wrong}
                continue
            calls[name] = _calls(provider, problem)
            entries[name] = {"status": "ok"}
        except NotInstalledError as missing:
            entries[name] = {"status": "not installed", "wrong": str(missing)}
        except Exception as failure:  # out of memory, say: the others go on
            entries[name] = {"status": "error", "wrong": brief(failure)}
    run_round_robin(calls, entries, sets, settings, device, backward=layer)
    stages = {"fwd": counts.forward(case), "bwd": counts.backward(case)}
    stages["step"] = stages["fwd"] + stages["bwd"]
    return {
        **verdict(entries),
        "case": asdict(case),
        "sets": sets,
        "providers": entries,
        "count": {k: size_of(s) for k, s in stages.items()},
        "predicted": rounded(counts.ratios(case, *ceiling)) if ceiling else None,
        "target": counts.target(case),
    }


def verdict(entries: dict[str, Cell]) -> Cell:
    """Status of a cell: of the worst of ours and the frozen linear. Peers may fail."""
    bad = {k: e for k, e in entries.items() if k.startswith(("ours", "frozen"))
           and e["status"] != "ok"}  # fmt: skip
    states = {e["status"] for e in bad.values()}
    wrong = "; ".join(f"{k}: {e['wrong']}" for k, e in bad.items())
    return {"status": "failed" if "failed" in states else "error" if bad else "ok", "wrong": wrong}


def size_of(stages: counts.Stages) -> dict[str, float]:
    return {"flops": counts.flops(stages), "bytes": counts.moved(stages)}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in values.items()}


def _calls(provider: Provider, problem: Problem) -> dict[str, Call]:
    """What is timed, by kind. A loss of Liger's works out its gradients in the forward."""

    def forward(i: int) -> Any:
        provider.infer(problem.sets[i][0])

    def step(i: int) -> Any:
        provider.step(*problem.sets[i])

    return {"step": step} if provider.scaled else {"fwd": forward, "step": step}


def run_round_robin(
    calls: dict[str, dict[str, Call]], entries: dict[str, Cell], sets: int, settings: Settings,
    device: torch.device, backward: bool = True,
) -> None:  # fmt: skip
    """Time everyone in turns; into the entries. `backward`: the base has one."""
    pool = graph_pool(device)
    timers: dict[str, Timer] = {}
    for name, kinds in calls.items():
        try:
            peak = peak_bytes(functools.partial(kinds["step"], 0), device)
            own = {k: Timer(call, sets, device, pool).prepare() for k, call in kinds.items()}
        except Exception as failure:
            entries[name] = {"status": "error", "wrong": brief(failure)}
            continue
        timers |= {f"{name}|{kind}": timer for kind, timer in own.items()}
        entries[name] |= {
            "peak_bytes": peak,
            "mode": {kind: timer.mode for kind, timer in own.items()},
            "note": "; ".join(dict.fromkeys(t.note for t in own.values() if t.note)),
        }
    if "frozen|fwd" not in timers:
        return
    ms = in_turns(timers, settings.rounds, settings.least, settings.seconds_a_cell)
    for name in {key.split("|")[0] for key in timers}:
        entries[name] |= _summary(ms, name, backward)


def _summary(ms: dict[str, list[float]], name: str, backward: bool) -> Cell:
    """Times and ratios of one provider from those of all."""

    def times(who: str) -> dict[str, list[float]]:
        found = {k: ms[f"{who}|{k}"] for k in ("fwd", "step") if f"{who}|{k}" in ms}
        if backward and "fwd" in found:
            pairs = zip(found["fwd"], found["step"], strict=True)
            found["bwd"] = [both - fwd for fwd, both in pairs]
        return found

    own, base = times(name), times("frozen")
    found: Cell = {"ms": {}, "ratio": {}, "rounds": len(own["step"])}
    for kind, values in own.items():
        found["ms"][kind] = spread(values)
        if min(base[kind]) > 0:  # a difference of noise has no ratio
            found["ratio"][kind] = spread(ratios(values, base[kind]), 4)
    found["rounds_ms"] = {k: [round(v, 5) for v in own[k]] for k in own if k != "bwd"}
    return found


# -- parts -----------------------------------------------------------------------------------------


def measured_ceiling(results: Results) -> tuple[float, float] | None:
    """(TFLOP/s, TB/s) of this device, the first ones measured."""
    for key in ("ceilings/start", "ceilings/end"):
        cell = results.cells.get(key, {})
        if cell.get("status") == "ok":
            return cell["tflops"], cell["tbs"]
    return None


def layer_part(results: Results, budget: Budget, settings: Settings, op: str) -> None:
    """Every size of an op, the most important first."""
    if not allowed(results, budget, settings, op):
        return
    for case in cases(op, settings.smoke):
        work = functools.partial(
            time_case, case, settings, results.device, measured_ceiling(results)
        )
        record(results, budget, f"{op}/{case}", work)


def allowed(results: Results, budget: Budget, settings: Settings, op: str) -> bool:
    """Whether the checks of an op were made and passed; a cell says so if not."""
    if not any(c.get("op") == op for c in results.of("check").values()):
        check_part(results, budget, settings.smoke, op)
    wrong = refusal(results, op)
    if wrong:
        results.put(f"{op}/not timed", {"status": "error", "wrong": wrong})
        print(f"{op}: not timed, {wrong}", flush=True)
    else:
        results.cells.pop(f"{op}/not timed", None)
    return not wrong


def record(results: Results, budget: Budget, key: str, work: Callable[[], Cell]) -> None:
    if results.done(key):
        return
    if budget.over:
        results.put(key, {"status": "not reached"})
        return
    cell = attempt(work)
    results.put(key, cell)
    if results.device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"{key}: {cell['status']} {cell.get('wrong', '')} {shown(cell)}", flush=True)


def shown(cell: Cell) -> str:
    """Ratios of a cell in a line."""
    words = []
    for name, entry in cell.get("providers", {}).items():
        ratio = {k: v["median"] for k, v in entry.get("ratio", {}).items()}
        if ratio and name != "frozen":
            words.append(name + " " + "/".join(f"{ratio[k]:.2f}" for k in ratio))
    return ", ".join(words)


def ceilings_part(results: Results, budget: Budget, settings: Settings, when: str) -> None:
    def work() -> Cell:
        return ceilings(results.device, settings.smoke)

    record(results, budget, f"ceilings/{when}", work)
    cell = results.cells[f"ceilings/{when}"]
    if cell["status"] == "ok":
        print(f"ceilings, {when}: {cell['tflops']} TFLOP/s, {cell['tbs']} TB/s", flush=True)
