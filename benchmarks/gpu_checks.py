"""Every kernel against float64 on the device, twice for determinism; and compute-sanitizer.

What fails here is not timed. Full sizes in bf16 and fp16, both plans of a product, bias, gains near
zero, chains on chip and gate by gate, and more than 2^31 numbers where memory allows. The sanitizer
runs a process of its own over tiny sizes.
"""

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from counts import Case
from gpu_cases import (
    SAMPLE,
    SCALE,
    Bound,
    Problem,
    Tensors,
    float64,
    gate_by_gate,
    judge,
    kernels,
    planned,
)
from gpu_results import Budget, Cell, Results
from gpu_timing import brief, sync

from structadapt.kernels import dora, reference

# Of an output rounded once or twice, sums in fp32; kernel_checks.py of the tests has the same.
ROUNDING = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOGP = 2e-5  # of log-probabilities near -12: products of bf16 are summed by tensor cores
NORM = 1e-5  # the largest relative error of a row norm


@dataclass(frozen=True)
class Check:
    case: Case
    dtype: torch.dtype = torch.bfloat16
    plan: str = ""
    bias: bool = False
    chain: bool = True  # QuanTA: on chip where it can be
    twins: bool = False
    huge: bool = False  # more than 2^31 numbers

    def __str__(self) -> str:
        words = [self.case.op, str(self.case), SHORT[self.dtype], self.plan]
        words += ["bias"] * self.bias + ["gate by gate"] * (not self.chain)
        words += ["twins"] * self.twins
        return " ".join(w for w in words if w)


def checks(smoke: bool) -> list[Check]:
    return _small_checks() if smoke else _full_checks()


def _full_checks() -> list[Check]:
    bf16, fp16 = torch.bfloat16, torch.float16
    found = []
    for op in ("lora", "dora"):
        sizes = [(8192, 4096, 4096, 16), (2048, 14336, 4096, 64), (2041, 4096, 14336, 256)]
        for plan in ("triton", "cublas"):
            found += [Check(Case(op, *size), bf16, plan, bias=plan == "triton") for size in sizes]
            found.append(Check(Case(op, 4096, 1024, 4096, 24), fp16, plan, True))
    cube, eight, wide = (16,) * 3, (8,) * 4, (16, 16, 56)
    square = Case("quanta", 2048, 4096, 4096, 0, cube, cube)
    found += [Check(square), Check(square, chain=False), Check(square, fp16)]
    found += [Check(square, twins=True), Check(square, twins=True, chain=False)]
    found.append(Check(replace(square, M=1001, before=eight, after=eight)))
    found.append(Check(replace(square, M=1001, before=eight, after=eight), chain=False))
    found.append(Check(Case("quanta", 1024, 14336, 4096, 0, cube, wide)))
    found.append(Check(Case("quanta", 1024, 4096, 14336, 0, wide, cube)))
    found += [Check(Case("head", 1000, 152064, 4096), d, bias=b)
              for d, b in ((bf16, False), (bf16, True), (fp16, False))]  # fmt: skip
    for op in ("lora", "dora"):  # last: they are the slowest
        found.append(Check(Case(op, 600_000, 4096, 4096, 16), huge=True))
    return found


def _small_checks() -> list[Check]:
    bf16, fp16 = torch.bfloat16, torch.float16
    found = [
        Check(Case(op, 33, 64, 96, r), dtype, plan, True)
        for op in ("lora", "dora")
        for r, dtype, plan in ((8, bf16, "triton"), (72, fp16, "cublas"))
    ]
    four, two = (4,) * 3, (2,) * 4
    found += [Check(Case("quanta", 17, 64, 64, 0, four, four), chain=c, twins=t)
              for c, t in ((True, False), (False, True))]  # fmt: skip
    found.append(Check(Case("quanta", 9, 16, 16, 0, two, two)))
    found.append(Check(Case("quanta", 9, 96, 64, 0, four, (4, 4, 6))))
    found.append(Check(Case("head", 9, 100, 64), bias=True))
    return found


def bounds(check: Check) -> Callable[[str], Bound]:
    """Of every output. Gates in a row round one by one; y of DoRA is divided by gains."""
    base = ROUNDING[check.dtype]

    def bound(name: str) -> Bound:
        if name == "y" and check.case.op == "head":
            return Bound(LOGP)
        if check.case.op == "quanta":
            gates = len(check.case.before) * (len(check.case.before) - 1) / 2
            return Bound(base * (1 + gates) ** 0.5 * (3 if check.twins else 1), 6)
        if name == "g":
            return Bound(10 * base, 20)
        return Bound(base if name == "y" else 1.4 * base)

    return bound


def launch(check: Check, problem: Problem) -> Tensors:
    x, dy = problem.sets[0]
    with planned(check.plan), gate_by_gate(not check.chain):
        return kernels(problem, x, dy)


def problem_of(check: Check, device: torch.device) -> Problem:
    gains = check.case.op == "dora"
    return Problem(check.case, device, 1, check.dtype, check.bias, gains, check.twins, seed=1)


def run_check(check: Check, device: torch.device) -> Cell:
    """The cell of one check: "ok" or "failed" with what is wrong."""
    need = 8 * 2 * check.case.M * max(check.case.N, check.case.K)
    if check.huge and device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < need:
        return {"status": "left out", "wrong": f"{need / 2**30:.0f} GiB are not free"}
    problem = problem_of(check, device)
    x, dy = problem.sets[0]
    found = launch(check, problem)
    again = launch(check, problem)
    changed = [k for k, t in found.items() if not torch.equal(t, again[k])]
    del again
    rows = None
    if check.huge:  # the ends, and some between
        some = torch.randint(len(x), (4 * SAMPLE,), device=device)
        rows = torch.cat([some, torch.arange(SAMPLE, device=device), len(x) - 1 - torch.arange(
            SAMPLE, device=device)]).unique()  # fmt: skip
        found |= {k: found[k][rows] for k in ("y", "dx")}
    params = {k: t for k, t in problem.params.items() if k != "m"}
    if check.case.op == "dora":
        params["g"] = problem.gain()
    if check.case.op == "quanta":
        problem.W = torch.zeros_like(problem.W)  # the kernels give the update alone
    right = float64(problem, x, dy, params, rows)
    wrong, errors = judge(found, right, bounds(check))
    if check.case.op == "dora":
        wrong = "; ".join(filter(None, [wrong, _norm(problem)]))
    if changed:
        wrong = "; ".join(filter(None, [wrong, f"two runs differ in {', '.join(changed)}"]))
    return {"status": "failed" if wrong else "ok", "wrong": wrong, "errors": errors}


def _norm(problem: Problem) -> str:
    A, B = (problem.params[k].detach() for k in "AB")
    right = reference.row_norm(problem.W.double() + SCALE * B.double() @ A.double())
    off = float(((dora.dora_norm(problem.W, A, B, SCALE) - right) / right).abs().max())
    return "" if off <= NORM else f"a norm is {off:.1e} off"


def attempt(run: Callable[[], Cell]) -> Cell:
    """A cell, or the error that came instead."""
    try:
        return run()
    except Exception as failure:
        return {"status": "error", "wrong": brief(failure)}


def check_part(results: Results, budget: Budget, smoke: bool, op: str = "") -> None:
    """Every check, or those of an op."""
    for check in checks(smoke):
        key = f"check/{check}"
        if results.done(key) or (op and check.case.op != op):
            continue
        if budget.over:
            results.put(key, {"op": check.case.op, "status": "not reached"})
            continue
        cell = attempt(functools.partial(run_check, check, results.device))
        results.put(key, {"op": check.case.op, **cell})
        print(f"{key}: {cell['status']} {cell.get('wrong', '')}", flush=True)
        if results.device.type == "cuda":
            torch.cuda.empty_cache()


def refusal(results: Results, op: str) -> str:
    """Why an op is not to be timed, or "". An op with nothing checked is not timed either."""
    own = [c for c in results.of("check").values() if c.get("op") == op]
    bad = [c["wrong"] for c in own if c["status"] in ("failed", "error")]
    if bad:
        return f"a check failed: {bad[0]}"
    return "" if any(c["status"] == "ok" for c in own) else "no check was reached"


# -- compute-sanitizer -----------------------------------------------------------------------------


def tiny(device: torch.device) -> list[Callable[[], Any]]:
    """Calls that launch every kernel, on sizes with tails everywhere."""
    jobs: list[Callable[[], Any]] = []
    for check in _small_checks():
        case = check.case
        if case.op in ("lora", "dora"):  # 16-byte loads want multiples of 8
            case = replace(case, M=65, N=144, K=80)
        for plan in ("triton", "cublas") if case.rank else ("",):
            jobs.append(functools.partial(_once, replace(check, case=case, plan=plan), device))
    for sizes in ((16,) * 3, (8,) * 4):  # on chip
        case = Case("quanta", 5, 4096, 4096, 0, sizes, sizes)
        jobs.append(functools.partial(_once, Check(case), device))
    return jobs


def _once(check: Check, device: torch.device) -> None:
    launch(check, problem_of(check, device))
    sync(device)


def sanitizer() -> str | None:
    """Where compute-sanitizer is, or None."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "compute-sanitizer"
    for place in ("compute-sanitizer", bundled, "/usr/local/cuda/bin/compute-sanitizer"):
        found = shutil.which(str(place))
        if found:
            return found
    return None


def sanitize_part(results: Results, budget: Budget, smoke: bool) -> None:
    tool = None if smoke else sanitizer()
    for index, kind in enumerate(("memcheck", "racecheck")):
        key = f"sanitize/{kind}"
        if results.done(key):
            continue
        if smoke and not index:  # at least that they run
            for job in tiny(results.device):
                job()
        cell: dict[str, Any] = {"status": "not installed"}
        if tool and budget.over:
            cell = {"status": "not reached"}
        elif tool:
            cell = attempt(functools.partial(_sanitize, tool, kind, budget.left / (2 - index)))
        results.put(key, cell)
        print(f"{key}: {cell['status']} {cell.get('wrong', '')}", flush=True)


def _sanitize(tool: str, kind: str, seconds: float) -> Cell:
    script = Path(__file__).parent / "gpu.py"
    command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, script, "--warm"]
    try:
        done = subprocess.run(
            [*map(str, command), "tiny:0:1"], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"status": "not reached", "wrong": f"took more than {seconds:.0f} s"}
    tail = (done.stdout + done.stderr)[-1500:]
    status = {0: "ok", 9: "failed"}.get(done.returncode, "error")
    return {"status": status, "wrong": "" if status == "ok" else tail}
