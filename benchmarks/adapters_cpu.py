"""Time, memory and one-token decoding of adapted layers on a CPU, over the frozen nn.Linear.

    python benchmarks/adapters_cpu.py               every case, about five minutes; writes the JSON
    python benchmarks/adapters_cpu.py --smoke       tiny layers, two rounds, to see that it runs
    python benchmarks/adapters_cpu.py --only DoRA   the cases whose name has DoRA in it; no JSON
    python benchmarks/adapters_cpu.py --table       the table of docs/adapters.md from the JSON

Needs PEFT (pip install peft). A case is one adapter over one frozen weight; every provider of it
has the same numbers, and nothing is timed before the output and the gradients of each agree with
the formula in float64.

step    Forward and backward to x and to the adapter's tensors, which were written to before each
        call, as by an optimizer: nothing derived from them can be kept.
again   The same without the write: a second micro-batch, gradient accumulation.
decode  One token under inference_mode, tensors unchanged.
held    Bytes of the allocator that live on after the forward, the output among them, beyond those
        of the frozen linear. Parameters and x lie outside.
peak    The largest number of bytes alive in forward and backward, beyond the frozen linear's.
init    Largest difference of the first output, fresh adapter, from that of the frozen linear.

The providers of a case take turns, in random order, once a round; each time is divided by that of
the frozen linear in the same round, and the table shows median and quartiles of these ratios. A
round in which another program took a core from this one (an involuntary context switch) tells
nothing: two threads that wait for each other then stand still. Rounds go on until enough were
quiet, up to twice as many; those with the fewest switches are kept.

The ratios are of wall time. CPU time, which the JSON has too, is the noisier of the two: it counts
a worker thread that spins while it waits, and Linux may account it in ticks of milliseconds.
"""

import argparse
import itertools
import json
import random
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import structadapt as sa

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "adapters_cpu.json"
THREADS, TOKENS, ROUNDS, SEED = 2, 512, 31, 0
PASSES = 3  # over all cases: what slows the machine for a minute meets one of them
SAMPLE_MS = 10  # short calls are repeated to about this long
RANK, SCALE = 16, 2.0
SIZES = {2048: (16, 16, 8), 1024: (16, 8, 8), 64: (4, 4, 4)}  # of QuanTA's axes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # |error| / |value| of outputs and gradients
MIB = 2**20

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    adapter: str
    width: int
    dtype: str

    def __str__(self) -> str:
        kind = "QuanTA 3 axes" if self.adapter == "QuanTA" else f"{self.adapter} r={RANK}"
        return f"{kind}, {self.dtype} {self.width}"


CASES = [
    Case(adapter, width, dtype)
    for adapter in ("LoRA", "DoRA", "QuanTA")
    for width in (2048, 1024)
    for dtype in ("bf16", "fp32")
]
SMOKE_CASES = [Case(adapter, 64, "bf16") for adapter in ("LoRA", "DoRA", "QuanTA")]
TARGETS = {  # at most this, in bf16 at width 2048
    ("LoRA", "step"): 1.12,
    ("DoRA", "step"): 1.50,
    ("QuanTA", "step"): 1.66,
    ("LoRA", "held"): 0.2,
    ("DoRA", "held"): 2.2,
    ("QuanTA", "held"): 0.0,
    ("DoRA", "decode"): 1.3,
    ("LoRA", "init"): 0.0,
    ("DoRA", "init"): 0.0,
    ("QuanTA", "init"): 0.0,
}


# -- providers -------------------------------------------------------------------------------------


def frozen(W: Tensor) -> nn.Linear:
    """nn.Linear without bias around W."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    return linear


class EinsumQuanTA(nn.Module):
    """y = (W - S) x + T x as the official code writes it, one einsum a gate."""

    equations = ("zabc,efbc->zaef", "zaef,diaf->zdei", "zdei,ghde->zghi")

    def __init__(self, W: Tensor, sizes: tuple[int, ...], start: Tensors) -> None:
        super().__init__()
        self.sizes = sizes
        for name, gate in start.items():
            self.register_parameter(name, nn.Parameter(gate.clone()))
        with torch.no_grad():
            S = self.chain(torch.eye(W.shape[1])).T
            self.frozen_weight = (W.float() - S).to(W.dtype)

    def chain(self, x: Tensor) -> Tensor:
        u = x.reshape(-1, *self.sizes)
        for equation, gate in zip(self.equations, self.parameters(), strict=True):
            u = torch.einsum(equation, u, gate.to(x.dtype))
        return u.reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.frozen_weight) + self.chain(x)


def linear(case: Case, W: Tensor, start: Tensors) -> tuple[nn.Module, Tensors]:
    return frozen(W), {}


def ours(case: Case, W: Tensor, start: Tensors) -> tuple[nn.Module, Tensors]:
    adapters = {
        "LoRA": sa.LoRA(RANK, SCALE * RANK),
        "DoRA": sa.DoRA(RANK, SCALE * RANK),
        "QuanTA": sa.QuanTA(SIZES[case.width]),
    }
    layer = sa.adapt(nn.Sequential(frozen(W)), adapters[case.adapter]).get_submodule("0")
    return layer, {name: p for name, p in layer.named_parameters() if p.requires_grad}


def peft(case: Case, W: Tensor, start: Tensors, wide: bool = True) -> tuple[nn.Module, Tensors]:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential()
    model.add_module("linear", frozen(W))
    dora = case.adapter == "DoRA"
    config = LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["linear"], use_dora=dora
    )
    adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]
    layer = adapted.base_model.model.linear
    tensors = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
    if dora:
        tensors["m"] = layer.lora_magnitude_vector.default.weight
    return layer, tensors


def peft_narrow(case: Case, W: Tensor, start: Tensors) -> tuple[nn.Module, Tensors]:
    return peft(case, W, start, wide=False)


def einsum(case: Case, W: Tensor, start: Tensors) -> tuple[nn.Module, Tensors]:
    layer = EinsumQuanTA(W, SIZES[case.width], start)
    return layer, dict(layer.named_parameters())


Provider = Callable[[Case, Tensor, Tensors], tuple[nn.Module, Tensors]]


def providers(case: Case) -> dict[str, Provider]:
    """What is compared in a case, the frozen linear first."""
    if case.adapter == "QuanTA":
        return {"linear": linear, "ours": ours, "einsum": einsum}
    narrow = {"peft_narrow": peft_narrow} if case.dtype != "fp32" else {}
    return {"linear": linear, "ours": ours, "peft": peft, **narrow}


# -- numbers that every provider gets, and the formula ---------------------------------------------


@dataclass(frozen=True)
class Data:
    """Inputs of a case; `start` and `trained` hold the adapter's tensors, fp32."""

    x: Tensor
    dy: Tensor
    W: Tensor
    start: Tensors
    trained: Tensors


def data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(SEED)
    n, dtype = case.width, DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, dy = normal(TOKENS, n).to(dtype), normal(TOKENS, n).to(dtype)
    W = (normal(n, n) / n**0.5).to(dtype)
    if case.adapter == "QuanTA":
        a, b, c = SIZES[n]
        pairs = [(b, c), (a, c), (a, b)]
        start = {f"gate_{i}": torch.eye(p * q).view(p, q, p, q) for i, (p, q) in enumerate(pairs)}
        spread = 0.02
    else:
        start = {"A": normal(RANK, n) / n**0.5, "B": torch.zeros(n, RANK)}
        if case.adapter == "DoRA":
            start["m"] = W.float().norm(dim=1)
        spread = 0.05
    trained = {k: t + spread * normal(*t.shape) for k, t in start.items()}
    return Data(x, dy, W, start, trained)


def formula(case: Case, d: Data, x: Tensor, p: Tensors) -> Tensor:
    """The output for x and the adapter's tensors p, all in float64; without p, W x."""
    W = d.W.double()
    if case.adapter == "QuanTA" and p:
        u = x.view(-1, *SIZES[case.width])
        for equation, gate in zip(EinsumQuanTA.equations, p.values(), strict=True):
            u = torch.einsum(equation, u, gate)
        return F.linear(x, W) + u.reshape(x.shape) - x
    V = W + SCALE * p["B"] @ p["A"] if p else W
    if case.adapter == "DoRA" and p:
        V = (p["m"] / V.norm(dim=1).detach())[:, None] * V
    return F.linear(x, V)


class Subject:
    """One provider's layer in a case, and what can be measured of it."""

    def __init__(self, name: str, case: Case, d: Data, provider: Provider) -> None:
        self.name, self.case, self.data = name, case, d
        self.layer, self.tensors = provider(case, d.W, d.start)
        self.x = d.x.clone().requires_grad_()

    def init_difference(self) -> float:
        with torch.no_grad():
            return (self.layer(self.x) - F.linear(self.x, self.data.W)).abs().max().item()

    def train(self) -> None:
        """From here on the adapter's tensors are not those of the start."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(self.data.trained[name])

    def write(self) -> None:
        """What an optimizer does to the adapter's tensors, as far as anyone can tell."""
        with torch.no_grad():
            for tensor in self.tensors.values():
                tensor.mul_(1)

    def forget(self) -> None:
        for tensor in (self.x, *self.tensors.values()):
            tensor.grad = None

    def check(self) -> None:
        """Raises AssertionError unless output and gradients are those of the formula."""
        x, *trained = (
            t.detach().double().requires_grad_()
            for t in (self.x, *(self.data.trained[name] for name in self.tensors))
        )
        expected = formula(self.case, self.data, x, dict(zip(self.tensors, trained, strict=True)))
        expected.backward(self.data.dy.double())
        y = self.layer(self.x)
        y.backward(self.data.dy)
        pairs = {"output": (y, expected), "gradient of x": (self.x.grad, x.grad)}
        for name, t in zip(self.tensors, trained, strict=True):
            pairs[f"gradient of {name}"] = (self.tensors[name].grad, t.grad)
        for what, (found, right) in pairs.items():
            assert found is not None and right is not None, f"{self.case}: no {what}, {self.name}"
            error = ((found.detach().double() - right).norm() / right.norm()).item()
            if not error <= TOLERANCE[self.case.dtype]:
                raise AssertionError(f"{self.case}: {what} of {self.name} is {error:.1e} off")
        self.forget()

    def pass_(self) -> None:
        self.layer(self.x).backward(self.data.dy)

    def time(self, calls: int, written: bool) -> tuple[float, float]:
        """Wall and CPU milliseconds of one forward and backward, mean of some calls."""
        wall = cpu = 0.0
        for _ in range(calls):
            self.forget()
            if written:
                self.write()
            before = time.perf_counter(), time.process_time()
            self.pass_()
            wall, cpu = (
                wall + time.perf_counter() - before[0],
                cpu + time.process_time() - before[1],
            )
        return round(1e3 * wall / calls, 4), round(1e3 * cpu / calls, 4)

    def time_decode(self, calls: int) -> tuple[float, float]:
        """Wall and CPU milliseconds of one token."""
        with torch.inference_mode():
            token = self.data.x[:1].clone()
            before = time.perf_counter(), time.process_time()
            for _ in range(calls):
                self.layer(token)
            wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        return round(1e3 * wall / calls, 4), round(1e3 * cpu / calls, 4)

    def memory(self) -> tuple[int, int]:
        """Bytes alive after the forward; the most alive in forward and backward."""
        self.forget()
        y, forward = allocations(lambda: self.layer(self.x))
        _, backward = allocations(lambda: y.backward(self.data.dy))
        held = sum(forward)
        return held, max(largest_sum(forward), held + largest_sum(backward))


def allocations(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What a function returns, and the bytes it took (> 0) and gave back (< 0) in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        result = function()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events: list[Any] = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def largest_sum(changes: list[int]) -> int:
    return max(itertools.accumulate(changes, initial=0))


# -- measuring -------------------------------------------------------------------------------------


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """Everything about one case, raw."""
    d = data(case)
    subjects = [Subject(name, case, d, provider) for name, provider in providers(case).items()]
    results: dict[str, dict[str, Any]] = {s.name: {"init": s.init_difference()} for s in subjects}
    for s in subjects:
        s.train()
        s.check()
    kinds: dict[str, Callable[[Subject, int], tuple[float, float]]] = {
        "step": lambda s, calls: s.time(calls, written=True),
        "decode": lambda s, calls: s.time_decode(calls),
    }
    if case.adapter == "DoRA":  # the only one with something to keep
        kinds["again"] = lambda s, calls: s.time(calls, written=False)
    order = random.Random(SEED)
    switches = {}
    for kind, sample in kinds.items():
        calls = {s: repeats(min(sample(s, 1)[0] for _ in range(3))) for s in subjects}
        tried: list[tuple[int, dict[str, tuple[float, float]]]] = []
        while len(tried) < 2 * rounds and sum(not n for n, _ in tried) < rounds:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            times = {s.name: sample(s, calls[s]) for s in order.sample(subjects, len(subjects))}
            tried.append((resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before, times))
        kept = sorted(tried, key=lambda t: t[0])[:rounds]
        switches[kind] = [n for n, _ in kept]
        for s in subjects:
            wall, cpu = zip(*(times[s.name] for _, times in kept), strict=True)
            results[s.name][kind] = {"wall_ms": wall, "cpu_ms": cpu}
    for s in subjects:
        results[s.name]["held"], results[s.name]["peak"] = s.memory()
    return {**asdict(case), "switches": switches, "providers": results}


def repeats(ms: float) -> int:
    """How many calls of so many milliseconds make one sample."""
    return max(1, min(200, round(SAMPLE_MS / ms)))


def measure(smoke: bool = False, only: str = "") -> dict[str, Any]:
    """Every case whose name has `only` in it. Raises AssertionError if a provider is wrong."""
    torch.set_num_threads(THREADS)
    cases = [c for c in (SMOKE_CASES if smoke else CASES) if only.lower() in str(c).lower()]
    passes = []
    for i in range(1 if smoke else PASSES):
        passes.append([])
        for case in cases:
            passes[-1].append(measure_case(case, 2 if smoke else ROUNDS))
            busy = sum(n > 0 for n in passes[-1][-1]["switches"]["step"])
            note = f", {busy} rounds disturbed: is the machine idle?" if busy else ""
            ratio = time_ratio(passes[-1][-1], "ours", "step")
            print(f"pass {i + 1}, {case}: {ratio}{note}", file=sys.stderr)
    results = [pooled(parts) for parts in zip(*passes, strict=True)]
    settings = {
        "threads": THREADS,
        "tokens": TOKENS,
        "rounds": 2 if smoke else ROUNDS,
        "passes": len(passes),
        "seed": SEED,
        "rank": RANK,
        "scale": SCALE,
    }
    return {"machine": machine.record(("torch", "peft")), "settings": settings, "cases": results}


def pooled(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One case from all passes: the rounds of all, the rest from the first."""
    case = parts[0]
    for kind in case["switches"]:
        case["switches"][kind] = [n for part in parts for n in part["switches"][kind]]
        for name, provider in case["providers"].items():
            for clock in provider[kind]:
                provider[kind][clock] = [
                    ms for part in parts for ms in part["providers"][name][kind][clock]
                ]
    return case


# -- showing ---------------------------------------------------------------------------------------

PEERS = ("peft", "peft_narrow", "einsum")


def ratios(case: dict[str, Any], provider: str, kind: str, clock: str = "wall_ms") -> list[float]:
    """The provider's time over the frozen linear's, one ratio a round."""
    one, base = (case["providers"][name][kind][clock] for name in (provider, "linear"))
    return [a / b for a, b in zip(one, base, strict=True)]


def time_ratio(case: dict[str, Any], provider: str, kind: str) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios(case, provider, kind), n=4, method="inclusive")
    digits = 2 if middle < 10 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def extra_mib(case: dict[str, Any], provider: str, kind: str) -> float:
    """Bytes beyond the frozen linear's, in MiB."""
    return (case["providers"][provider][kind] - case["providers"]["linear"][kind]) / MIB


ROWS = {  # kind of measurement: label, value, text
    "step": ("forward + backward", None),
    "again": ("the same, tensors unchanged", None),
    "decode": ("one-token decode", None),
    "held": ("held for the backward, MiB", "{:.1f}"),
    "peak": ("peak, MiB", "{:.1f}"),
    "init": ("first output off by", "{:.1g}"),
}


def table(results: dict[str, Any]) -> str:
    """One line a case and kind of measurement. Times are ratios to the frozen linear."""
    lines = [
        "| case | measured | ours | PEFT | PEFT, adapters in bf16 | einsum | target | met |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for case in results["cases"]:
        name = str(Case(case["adapter"], case["width"], case["dtype"]))
        main = (case["width"], case["dtype"]) == (2048, "bf16")
        for kind, (label, _) in ROWS.items():
            if kind in case["providers"]["ours"] and (main or kind == "step"):
                cells = [cell(case, provider, kind) for provider in ("ours", *PEERS)]
                verdict = judged(case, kind) if main else ("", "")
                lines.append(f"| {' | '.join((name, label, *cells, *verdict))} |")
    return "\n".join(lines)


def value(case: dict[str, Any], provider: str, kind: str) -> float:
    """The number that a target is about."""
    if kind in ("held", "peak"):
        return extra_mib(case, provider, kind)
    if kind == "init":
        return case["providers"][provider]["init"]
    return statistics.median(ratios(case, provider, kind))


def cell(case: dict[str, Any], provider: str, kind: str) -> str:
    if provider not in case["providers"]:
        return ""
    text = ROWS[kind][1]
    return text.format(value(case, provider, kind)) if text else time_ratio(case, provider, kind)


def judged(case: dict[str, Any], kind: str) -> tuple[str, str]:
    """The target and whether it is met, to the digits that are shown."""
    target = TARGETS.get((case["adapter"], kind))
    if target is None:
        return "", ""
    digits = {"held": 1, "init": 9}.get(kind, 2)
    return f"{target:g}", "yes" if round(value(case, "ours", kind), digits) <= target else "no"


def dumps(results: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    options = parser.parse_args()
    if not options.table:
        capability = torch.backends.cpu.get_cpu_capability()
        if capability in ("DEFAULT", "AVX2") and not options.smoke and "fp32" not in options.only:
            parser.error(  # there a bf16 product takes 400 times as long as one in fp32
                f"torch has no bf16 matrix product for this processor ({capability}): "
                "use one with AVX-512, or --only fp32"
            )
        results = measure(options.smoke, options.only)
        if not (options.smoke or options.only) or options.out != RESULTS:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(dumps(results))
        print(table(results))
    else:
        print(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
