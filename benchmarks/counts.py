"""What every op has to compute and to move, and the ratio to the frozen linear that follows.

    python benchmarks/counts.py                       a table at 790 TFLOP/s and 4.3 TB/s
    python benchmarks/counts.py --tflops 800 --tbs 4 --results docs/results/gpu_NAME.json

Counted, not measured: stages that wait for each other, each as long as the longer of its
arithmetic and its memory traffic. No launches and no caches. A number is 2 bytes, a sum over parts
of a split in fp32 is 4.

Bytes are read and written once per kernel as ours are; an operand that tiles share is read once.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structadapt.kernels import reference

STRIPE = 256  # columns of dY that a program of the one pass over it takes
SPLIT_RANK = 64  # the largest rank that this pass can do
TFLOPS, TBS = 790.0, 4.3


@dataclass(frozen=True)
class Stage:
    """One kernel."""

    flops: float
    bytes: float

    def seconds(self, tflops: float, tbs: float) -> float:
        return max(self.flops / (tflops * 1e12), self.bytes / (tbs * 1e12))


Stages = list[Stage]


def seconds(stages: Stages, tflops: float, tbs: float) -> float:
    return sum(stage.seconds(tflops, tbs) for stage in stages)


def flops(stages: Stages) -> float:
    return sum(stage.flops for stage in stages)


def moved(stages: Stages) -> float:
    return sum(stage.bytes for stage in stages)


# -- the ops ---------------------------------------------------------------------------------------


def product(M: int, N: int, K: int, onto: bool = False) -> Stage:
    """(M, K) times (K, N); `onto`: added to what the output holds."""
    return Stage(2 * M * N * K, 2 * (M * K + N * K + (2 if onto else 1) * M * N))


def linear(M: int, N: int, K: int) -> Stages:
    """The frozen linear, forward or backward to x."""
    return [product(M, N, K)]


def low_rank_product(M: int, N: int, K: int, r: int, plan: str) -> Stages:
    """x w + s b: in one kernel, or the low-rank product first and cuBLAS onto it."""
    if plan == "triton":
        return [
            Stage(2 * M * N * (K + r), 2 * (M * K + N * K + M * N + M * r + N * r)),
        ]
    return [product(M, N, r), product(M, N, K, onto=True)]


def lora_forward(M: int, N: int, K: int, r: int, plan: str = "triton") -> Stages:
    return [product(M, r, K), *low_rank_product(M, N, K, r, plan)]


def _from_dy(M: int, N: int, r: int, columns_again: int = 0) -> Stages:
    """dS and dB: one pass over dY with a part of dS for each stripe, two where r is large."""
    again = 2 * columns_again * M * N  # what DoRA's pass also reads and writes
    if r > SPLIT_RANK:
        extra = [Stage(0, 2 * M * N + again)] if columns_again else []
        return [*extra, product(M, r, N), product(N, r, M)]
    parts = 4 * math.ceil(N / STRIPE) * M * r
    return [
        Stage(4 * M * N * r, 2 * M * N + again + parts + 2 * (M * r + N * r) + 4 * N * r),
        Stage(0, parts + 2 * M * r),  # the sum over the stripes
    ]


def lora_backward(M: int, N: int, K: int, r: int, plan: str = "triton") -> Stages:
    """Gradients of x, A and B."""
    return [*_from_dy(M, N, r), *low_rank_product(M, K, N, r, plan), product(K, r, M)]


def dora_forward(M: int, N: int, K: int, r: int, plan: str = "triton") -> Stages:
    """With the norm, whose product of A and B is three of their digits in bf16."""
    digits = Stage(0, (4 + 2 * 2) * (N + K) * r)
    norm = Stage(3 * 2 * N * K * r, 2 * N * K + 2 * 2 * (N + K) * r)
    if plan == "triton":
        return [digits, norm, *lora_forward(M, N, K, r)]
    epilogue = Stage(2 * M * N * r, 2 * (2 * M * N + M * r + N * r))
    return [digits, norm, product(M, r, K), product(M, N, K), epilogue]


def dora_backward(M: int, N: int, K: int, r: int, plan: str = "triton") -> Stages:
    """The pass over dY also reads y and writes g dY."""
    dy = _from_dy(M, N, r, columns_again=2)
    return [*dy, *low_rank_product(M, K, N, r, plan), product(K, r, M)]


def _gates(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int]]:
    """(outputs, inputs, other numbers of a token) of every gate, in order of application."""
    found = []
    shapes = reference.quanta_gate_shapes(tuple(after), tuple(before))
    for pair, old, new in reference.quanta_steps(tuple(shapes)):
        inputs = math.prod(old[axis] for axis in pair)
        outputs = math.prod(new[axis] for axis in pair)
        found.append((outputs, inputs, math.prod(old) // inputs))
    return found


def _on_chip(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether one kernel runs the whole chain: 16 x 16 x 16 and 8 x 8 x 8 x 8."""
    return tuple(before) == tuple(after) and tuple(before) in ((16,) * 3, (8,) * 4)


def _gate_by_gate(M: int, gates: list[tuple[int, int, int]], total: bool) -> Stages:
    """A gate reads its input, with a `total` that one too but for the first; and writes both, the
    last one the total alone."""
    last = len(gates) - 1
    return [
        Stage(
            2 * M * others * out * inputs,
            2 * M * others * (inputs * (1 + (total and k > 0)) + out * (1 + (total and k < last))),
        )
        for k, (out, inputs, others) in enumerate(gates)
    ]


def _chip(M: int, gates: list[tuple[int, int, int]], kept: int, out: bool = True) -> Stages:
    """The same in one kernel, which also writes what goes into `kept` of the gates."""
    width = gates[0][1] * gates[0][2]
    work = sum(2 * M * others * out * inputs for out, inputs, others in gates)
    return [Stage(work, 2 * M * width * (1 + out + kept))]


def quanta_forward(M: int, before: Sequence[int], after: Sequence[int]) -> Stages:
    """The chain into the output, and cuBLAS adds x W^T onto it."""
    gates = _gates(before, after)
    chain = _chip(M, gates, 0) if _on_chip(before, after) else _gate_by_gate(M, gates, True)
    return [*chain, product(M, math.prod(after), math.prod(before), onto=True)]


def quanta_backward(M: int, before: Sequence[int], after: Sequence[int]) -> Stages:
    """The gates' inputs again, the transposed chain, each gate's gradient, and dY W onto it."""
    gates, on_chip = _gates(before, after), _on_chip(before, after)
    way_back = [(i, o, others) for o, i, others in reversed(gates)]
    if on_chip and len(before) == 4:
        again = _chip(M, gates[:-1], len(gates) - 1, out=False)
    else:
        again = _gate_by_gate(M, gates[:-1], False)
    if on_chip:
        back = _chip(M, way_back, len(gates))  # dY too, as the last gate's gradient takes it
    else:
        back = [Stage(0, 2 * 2 * M * math.prod(after)), *_gate_by_gate(M, way_back, True)]
    grads = [
        Stage(2 * M * others * out * inputs, 2 * M * others * (out + inputs))
        for out, inputs, others in gates
    ]
    dx = product(M, math.prod(before), math.prod(after), onto=True)
    return [*again, *back, *grads, dx]


def head_forward(M: int, V: int, H: int) -> Stages:
    """Logits in fp32, read twice; D = onehot - softmax written in bf16; D W. Two units in all."""
    logits = Stage(2 * M * V * H, 2 * (M * H + V * H) + 4 * M * V)
    return [logits, Stage(0, (2 * 4 + 2) * M * V), product(M, H, V)]


def head_backward(M: int, V: int, H: int) -> Stages:
    """g u, for a frozen head."""
    return [Stage(M * H, 2 * 2 * M * H)]


# -- by name ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One op on one size: N x K is the weight, V x H the head's."""

    op: str  # "lora", "dora", "quanta", "head"
    M: int
    N: int
    K: int
    rank: int = 0
    before: tuple[int, ...] = ()  # QuanTA's axes
    after: tuple[int, ...] = ()

    def __str__(self) -> str:
        kind = f"r{self.rank}" if self.rank else "x".join(map(str, self.before))
        if self.before != self.after:
            kind += "-" + "x".join(map(str, self.after))
        return " ".join(f"M{self.M} {self.N}x{self.K} {kind}".split())


def forward(case: Case, plan: str = "triton") -> Stages:
    M, N, K, r = case.M, case.N, case.K, case.rank
    if case.op == "quanta":
        return quanta_forward(M, case.before, case.after)
    if case.op == "head":
        return head_forward(M, N, K)
    return {"lora": lora_forward, "dora": dora_forward}[case.op](M, N, K, r, plan)


def backward(case: Case, plan: str = "triton") -> Stages:
    M, N, K, r = case.M, case.N, case.K, case.rank
    if case.op == "quanta":
        return quanta_backward(M, case.before, case.after)
    if case.op == "head":
        return head_backward(M, N, K)
    return {"lora": lora_backward, "dora": dora_backward}[case.op](M, N, K, r, plan)


def ratios(case: Case, tflops: float, tbs: float) -> dict[str, float]:
    """Forward, backward and both over the frozen linear, each with the better plan.

    The head is over one product of hidden and W, backward and all.
    """
    one = seconds(linear(case.M, case.N, case.K), tflops, tbs)
    fwd, bwd = (
        min(seconds(stages(case, plan), tflops, tbs) for plan in ("triton", "cublas"))
        for stages in (forward, backward)
    )
    step = (fwd + bwd) / (one if case.op == "head" else 2 * one)
    return {"fwd": fwd / one, "bwd": bwd / one, "step": step}


# At most these over the frozen linear, at M = 8192 and 4096 x 4096; the head in products.
TARGETS: dict[tuple[str, int], dict[str, float]] = {
    ("lora", 16): {"fwd": 1.06, "bwd": 1.12},
    ("lora", 256): {"fwd": 1.15, "bwd": 1.28},
    ("dora", 16): {"fwd": 1.09, "bwd": 1.22},
    ("quanta", 0): {"fwd": 1.25, "bwd": 1.60},
    ("head", 0): {"step": 2.3},
}


def target(case: Case) -> dict[str, float]:
    """What is to be reached, or nothing where nothing was set."""
    if case.op == "head":
        return TARGETS["head", 0] if case.N > 100_000 else {}
    if (case.M, case.N, case.K) != (8192, 4096, 4096):
        return {}
    if case.op == "quanta" and case.before != (16, 16, 16):
        return {}
    return TARGETS.get((case.op, case.rank), {})


# Rank by rank and M by M; the sizes of layers in models of 8 billion parameters.
MS, SHAPES, RANKS = (8192, 2048, 32768), ((4096, 4096), (14336, 4096), (4096, 14336)), (16, 64, 256)
AXES = {4096: (16, 16, 16), 14336: (16, 16, 56)}
VOCABULARY, HIDDEN = 152064, 4096


def cases(op: str) -> list[Case]:
    """Every case of an op, those that a target is about first."""
    if op == "head":
        return [Case(op, M, VOCABULARY, HIDDEN) for M in MS[:2]]
    if op == "quanta":
        found = [Case(op, M, N, K, 0, AXES[K], AXES[N]) for M in MS for N, K in SHAPES]
        return [*found, *(Case(op, M, 4096, 4096, 0, (8,) * 4, (8,) * 4) for M in MS)]
    found = [Case(op, M, N, K, r) for M in MS for N, K in SHAPES for r in RANKS]
    # What is most important first: the M and the square of the targets.
    return sorted(found, key=lambda c: (c.M != 8192) + (c.N != c.K))


def table(tflops: float = TFLOPS, tbs: float = TBS, results: dict[str, Any] | None = None) -> str:
    """Markdown: FLOPs and bytes of forward and backward together, the ratios that follow, the
    targets of the design, and what `gpu.py` measured. Of the head, in products with W, the sum."""
    lines = [
        "| op | M | N | K | rank or axes | GFLOP | MB | counted | target | measured |",
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    measured = _measured(results or {})
    for op in ("lora", "dora", "quanta", "head"):
        for case in cases(op):
            stages = [*forward(case), *backward(case)]
            found = ratios(case, tflops, tbs)
            counted = {k: found[k] for k in (("step",) if op == "head" else ("fwd", "bwd"))}
            kind = str(case.rank) if case.rank else "x".join(map(str, case.after))
            columns = [
                op, case.M, case.N, case.K, kind,
                f"{flops(stages) / 1e9:.0f}", f"{moved(stages) / 1e6:.0f}",
                *(" / ".join(f"{v:.2f}" for v in d.values()) for d in (counted, target(case))),
                measured.get(case, "not measured yet"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def _measured(results: dict[str, Any]) -> dict[Case, str]:
    """{case: the ratios of ours in a results file of gpu.py}."""
    found = {}
    for cell in results.get("cells", {}).values():
        ours = cell.get("providers", {}).get("ours", {}).get("ratio")
        if ours and "N" in cell.get("case", {}):  # a block is no case
            fields: Any = {
                k: tuple(v) if isinstance(v, list) else v for k, v in cell["case"].items()
            }
            parts = ("step",) if fields["op"] == "head" else ("fwd", "bwd")
            known = [ours[k]["median"] for k in parts if k in ours]
            found[Case(**fields)] = " / ".join(f"{v:.2f}" for v in known)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Counts of every op, and the ratios that follow.")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of a large bf16 product")
    parser.add_argument("--tbs", type=float, default=TBS, help="TB/s of memory")
    parser.add_argument("--results", type=Path, help="a JSON file of gpu.py, for what it measured")
    options = parser.parse_args()
    content = json.loads(options.results.read_text()) if options.results else None
    print(table(options.tflops, options.tbs, content))
