"""What is tuned: every kernel of the tables, on the sizes that matter, and the tiles to try."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from counts import Case
from gpu_cases import SCALE, Problem, Sizes, gate_by_gate, near_identity, planned
from torch import Tensor

from structadapt.kernels import _launch, dora, lean_logprob, logprob, lora, quanta, reference

Tile = dict[str, Any]
Call = Callable[[int, Tile], list[Tensor]]  # with the number of a set of inputs

# Changes to the tile of the architecture's table, which is always tried too.
CHANGES: dict[str, list[Tile]] = {
    "narrow": [
        {"by": "cublas"}, {"BK": 64}, {"num_stages": 3}, {"BK": 64, "num_stages": 5},
    ],
    "gemm": [
        {"num_stages": 3}, {"EPILOGUE": 1, "num_stages": 3}, {"GROUP_M": 4},
        {"BM": 256, "BN": 128}, {"GROUP_M": 16},
    ],
    "dy_pass": [
        {"by": "cublas"}, {"waves": 1}, {"BM": 32}, {"BM": 128}, {"num_stages": 2},
        {"BM": 32, "waves": 1}, {"BM": 32, "BN": 128, "num_warps": 4, "waves": 1},
        {"BM": 16, "num_warps": 4}, {"BM": 64, "BN": 128}, {"BM": 64, "BN": 128, "waves": 1},
    ],
    "over_rows": [
        {"by": "cublas"}, {"BM": 64}, {"BC": 64}, {"num_stages": 4}, {"BM": 32, "num_stages": 4},
    ],
    "dora_norm": [
        {"waves": 4}, {"waves": 1}, {"BK": 64}, {"BN": 128, "num_warps": 8}, {"num_stages": 2},
        {"BK": 64, "waves": 4}, {"BK": 64, "num_stages": 4}, {"BN": 32}, {"num_warps": 8},
    ],
    "dora_epilogue": [
        {"BM": 128}, {"BN": 64}, {"BM": 32}, {"num_warps": 8}, {"BM": 128, "num_warps": 8},
        {"BN": 256, "num_warps": 8},
    ],
    "gate": [
        {"TMA": 0}, {"BM": 64, "BN": 128}, {"BN": 128}, {"num_stages": 4}, {"BM": 256, "BN": 128},
        {"BM": 64, "BN": 128, "TMA": 0}, {"BN": 128, "num_warps": 4},
    ],
    "chain3": [{"BT": 2}, {"TMA": 0}, {"num_warps": 4}],
    "chain4": [{"BT": 1}, {"TMA": 0}, {"BT": 4, "num_warps": 4}],
    "logprob": [{"BLOCK": 2048}, {"BLOCK": 8192}, {"BLOCK": 1024, "num_warps": 4},
                {"BLOCK": 8192, "num_warps": 16}, {"num_warps": 4},
                {"BLOCK": 16384, "num_warps": 16}],
}  # fmt: skip
# For the interpreter, whose tiles are small: one change each, to have a choice.
SMALL: dict[str, Tile] = {
    "narrow": {"BM": 16}, "gemm": {"BN": 64}, "dy_pass": {"BN": 64}, "over_rows": {"BM": 64},
    "dora_norm": {"BK": 64}, "dora_epilogue": {"BN": 64}, "gate": {"BM": 32},
    "chain3": {"BT": 1}, "chain4": {"BT": 2}, "logprob": {"BLOCK": 128},
}  # fmt: skip
PLANS = ("lora_forward", "lora_backward", "dora_forward")
INPUTS = ("inputs3", "inputs4")


@dataclass(frozen=True)
class Tunable:
    """A kernel on one size. `make(n)` gives the call over n sets of inputs."""

    kernel: str
    sizes: dict[str, int]
    make: Callable[[torch.device, int], Call]
    nbytes: int  # of a set of inputs
    label: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        return " ".join(f"{self.kernel} {self.label} {sizes}".split())

    def candidates(self, device: torch.device, smoke: bool) -> list[Tile]:
        """The first is the table's."""
        if self.kernel in PLANS:
            return [{"plan": "cublas"}, {"plan": "triton"}]
        if self.kernel in INPUTS:
            return [{"plan": "chain"}, {"plan": "gates"}]
        base = _launch.tile(self.kernel, device, **self.sizes)
        changes = [SMALL[self.kernel]] if smoke else CHANGES[self.kernel]
        found = [base]
        for change in changes:  # a key that the base lacks belongs to another kind of kernel
            known = change.keys() <= base.keys() | {"waves"}
            if "by" in change:
                known = self.sizes.get("gain") != 2  # which cuBLAS has nothing for
            tile = {**base, **change} if known else base
            if tile not in found:
                found.append(tile)
        return found


def bf16(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(torch.bfloat16)


def tunables(smoke: bool) -> list[Tunable]:
    """The most important first."""
    m = 32 if smoke else 8192
    sides = [(64, 64)] if smoke else [(4096, 4096), (14336, 4096), (4096, 14336)]
    ranks = [8] if smoke else [16, 64, 256]
    found = []
    for r in ranks:
        found += [_gemm(m, N, K, r) for N, K in sides[:1]]
        found += [_narrow(m, sides[0][1], r), _over_rows(m, sides[0][1], r)]
    found += [_gemm(m, N, K, r) for N, K in sides[1:] for r in ranks]
    if not smoke:
        found += [_narrow(2048, 4096, 16), _gemm(2048, 4096, 4096, 16), _gemm(2048, 4096, 4096, 64)]
    found += [_dy_pass(m, sides[0][0], r, gain) for r in ranks[:2] for gain in (1, 2)]
    found += [_norm(*sides[0], r) for r in ranks[::2]]
    found += [_epilogue(m, sides[0][0], r) for r in ranks[::2]]
    cube, eight = (16,) * 3, (8,) * 4
    tokens = 3 if smoke else 4096  # as many as a chunk has
    found += [_chain(tokens, sizes, *flags) for sizes in (cube, eight)
              for flags in ((True, False), (True, True), (False, False))]  # fmt: skip
    if smoke:
        found += [_gate(9, (4,) * 3, (4,) * 3, 1, True)]
    else:
        found += [_over_rows(16 * tokens, 256, 256), _over_rows(64 * tokens, 64, 64)]
        for before, after in ((cube, cube), (eight, eight), (cube, (16, 16, 56)),
                              ((16, 16, 56), cube)):  # fmt: skip
            found += [_gate(tokens, before, after, 1, total) for total in (True, False)]
        widest = tokens, (16, 16, 56), cube, 0
        found += [_gate(*widest, total) for total in (True, False)]
    found.append(_logprob(*((9, 200) if smoke else (288, 152064))))
    return found


def plans(smoke: bool) -> list[Tunable]:
    if smoke:
        chains = [_inputs(3, (4,) * 3), _inputs(3, (2,) * 4)]
        return [_plan(name, 32, 64, 64, 8) for name in PLANS] + chains
    shapes = ((4096, 4096), (14336, 4096), (4096, 14336))
    found = [(8192, *nk, r) for nk in shapes for r in (16, 64, 256)]
    found += [(2048, 4096, 4096, r) for r in (16, 256)]
    chains = [_inputs(8192, sizes) for sizes in ((16,) * 3, (8,) * 4)]
    return [_plan(name, *size) for size in found for name in PLANS] + chains


# -- the calls -------------------------------------------------------------------------------------


def _narrow(M: int, K: int, r: int) -> Tunable:
    def make(device: torch.device, n: int) -> Call:
        x, A = [bf16(device, M, K) for _ in range(n)], bf16(device, r, K)
        return lambda i, tile: [lora.narrow(x[i], A.T, tile)]

    return Tunable("narrow", {"rank": r, "M": M, "K": K}, make, 2 * M * K)


def _gemm(M: int, N: int, K: int, r: int) -> Tunable:
    """Both ways that W is read: for y it is (N, K), for dx of the transposed layer (K, N)."""

    def make(device: torch.device, n: int) -> Call:
        x, s = [bf16(device, M, K) for _ in range(n)], bf16(device, M, r)
        W, B = bf16(device, N, K, scale=K**-0.5), bf16(device, N, r)
        W2, A = bf16(device, K, N, scale=K**-0.5), bf16(device, r, N)
        return lambda i, tile: [
            lora.gemm(x[i], W.T, s, B.T, tile=tile), lora.gemm(x[i], W2, s, A, tile=tile),
        ]  # fmt: skip

    return Tunable("gemm", {"rank": r, "M": M, "N": N, "K": K}, make, 2 * M * K)


def _dy_pass(M: int, N: int, r: int, gain: int) -> Tunable:
    """LoRA's, or with a `gain` of 2 DoRA's, which also reads y and writes g dY."""

    def make(device: torch.device, n: int) -> Call:
        dY, b, h = [bf16(device, M, N) for _ in range(n)], bf16(device, N, r), bf16(device, M, r)
        y, g = bf16(device, M, N), torch.full((N,), 0.5, device=device)
        more = (g, y) if gain == 2 else ()

        def call(i: int, tile: Tile) -> list[Tensor]:
            if gain == 1:
                every = lora.low_gradients(dY[i], b, h, SCALE, True, True, tile)
            else:
                found = lora.dy_pass(dY[i], b, h, SCALE, *more, tile=tile)
                every = found.dS, found.dB, found.gdY, found.parts_g
            return [t for t in every if t is not None]

        return call

    sizes = {"rank": r, "M": M, "N": N, "gain": gain}
    return Tunable("dy_pass", sizes, make, 2 * gain * M * N)


def _over_rows(M: int, C: int, r: int) -> Tunable:
    def make(device: torch.device, n: int) -> Call:
        z, h = [bf16(device, M, C) for _ in range(n)], bf16(device, M, r)
        out = torch.empty(r, C, device=device)
        return lambda i, tile: [lora.over_rows(z[i], h, out, transposed=True, tile=tile)]

    return Tunable("over_rows", {"rank": r, "M": M, "K": C}, make, 2 * M * C)


def _norm(N: int, K: int, r: int) -> Tunable:
    def make(device: torch.device, n: int) -> Call:
        W = [bf16(device, N, K, scale=K**-0.5) for _ in range(n)]
        A, B = torch.randn(r, K, device=device) * K**-0.5, torch.randn(N, r, device=device)
        return lambda i, tile: [dora.dora_norm(W[i], A, B, SCALE, tile)]

    return Tunable("dora_norm", {"rank": r, "N": N, "K": K}, make, 2 * N * K)


def _epilogue(M: int, N: int, r: int) -> Tunable:
    def make(device: torch.device, n: int) -> Call:
        base = [bf16(device, M, N) for _ in range(n)]
        h, b, g = bf16(device, M, r), bf16(device, N, r), torch.full((N,), 0.5, device=device)

        # On a copy, which is timed too: in place, every call would have other numbers.

        def call(i: int, tile: Tile) -> list[Tensor]:
            return [dora.dora_epilogue(base[i].clone(), h, b, None, g, tile)]

        return call

    return Tunable("dora_epilogue", {"rank": r, "M": M, "N": N}, make, 2 * M * N)


def _steps(before: Sizes, after: Sizes, device: torch.device, minus_eye: bool = True) -> Any:
    """The gates of a chain."""

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, device=device) * scale

    gates = near_identity(before, after, normal)
    return quanta.chain_of(gates, torch.bfloat16, minus_eye)


def _gate(M: int, before: Sizes, after: Sizes, number: int, total: bool) -> Tunable:
    """A gate of a chain, with a total or without."""
    sizes = _gate_sizes(before, after, number, total)

    def make(device: torch.device, n: int) -> Call:
        step, following = _steps(before, after, device)[number : number + 2]
        K, N = step.matrix.shape[1], math.prod(step.after)
        t, d = (
            [bf16(device, M * math.prod(step.before) // K, K) for _ in range(n)] for _ in range(2)
        )
        t_out, d_out = bf16(device, M, N), bf16(device, M, N)

        def call(i: int, tile: Tile) -> list[Tensor]:
            more = (d[i], t_out, d_out) if total else (None, t_out, None)
            quanta.gate(t[i], step, *more, plus=True, then=following.pair, tile=tile)
            return [t_out, d_out] if total else [t_out]

        return call

    nbytes = (1 + total) * 2 * M * math.prod(before)
    return Tunable("gate", sizes, make, nbytes, _axes(before, after))


def _axes(before: Sizes, after: Sizes) -> str:
    return "-".join("x".join(map(str, s)) for s in dict.fromkeys((before, after)))


def _gate_sizes(before: Sizes, after: Sizes, number: int, total: bool) -> dict[str, int]:
    """Of one gate: (N, K), as the tables are asked for them."""
    n_b, n_a, b, a = reference.quanta_gate_shapes(after, before)[number]
    return {"N": n_b * n_a, "K": b * a, "sources": 1 + total}


def _chain(M: int, sizes: Sizes, minus_eye: bool, keep: bool) -> Tunable:
    width = math.prod(sizes)

    def make(device: torch.device, n: int) -> Call:
        steps = _steps(sizes, sizes, device, minus_eye)
        x, out = [bf16(device, M, width) for _ in range(n)], bf16(device, M, width)

        def call(i: int, tile: Tile) -> list[Tensor]:
            return [out, *quanta.chain(x[i], steps, out, minus_eye, keep, tile)]

        return call

    case = {"sources": 1 + minus_eye, "keep": 1 + keep}
    return Tunable(f"chain{len(sizes)}", case, make, 2 * M * width)


def _inputs(M: int, sizes: Sizes) -> Tunable:
    """What goes into every gate, for its gradient: by the chain on chip or gate by gate."""
    width = math.prod(sizes)

    def make(device: torch.device, n: int) -> Call:
        steps = _steps(sizes, sizes, device)
        x = [bf16(device, M, width) for _ in range(n)]

        def call(i: int, tile: Tile) -> list[Tensor]:
            with gate_by_gate(tile["plan"] == "gates"):
                if tile["plan"] == "gates" or quanta.ON_CHIP.get(len(sizes)) != sizes[0]:
                    return quanta._run(steps, x[i], None, True, keep=True)
                return quanta.chain(x[i], steps, None, True, keep=True)

        return call

    return Tunable(f"inputs{len(sizes)}", {"M": M}, make, 2 * M * width)


def _logprob(C: int, V: int) -> Tunable:
    stride = -(-V // lean_logprob.PAD) * lean_logprob.PAD

    def make(device: torch.device, n: int) -> Call:
        Z = [3 * torch.randn(C, stride, device=device)[:, :V] for _ in range(n)]
        D, ids = bf16(device, C, stride)[:, :V], torch.randint(V, (C,), device=device)

        def call(i: int, tile: Tile) -> list[Tensor]:
            return [*logprob.rows(Z[i], None, ids, 1.0, D, 1.0, None, tile), D.clone()]

        return call

    return Tunable("logprob", {"V": V}, make, 4 * C * V)


def _plan(op: str, M: int, N: int, K: int, r: int) -> Tunable:
    """A whole forward or backward with either plan, on the tiles of the table."""

    def make(device: torch.device, n: int) -> Call:
        problem = Problem(Case("dora", M, N, K, r), device, n)
        W, (A, B) = problem.W, (problem.params[k].detach() for k in "AB")
        g, h = problem.gain(), bf16(device, M, r)
        needs = (True, False, False, True, True)

        def call(i: int, tile: Tile) -> list[Tensor]:
            x, dy = problem.sets[i]
            x = x.detach()
            with planned(tile["plan"]):
                if op == "lora_forward":
                    return [lora.lora_forward(x, W, None, A, B, SCALE)[0]]
                if op == "dora_forward":
                    return [dora.dora_forward(x, W, None, A, B, g, SCALE)[0]]
                found = lora.lora_backward(dy, x, h, W, A, B, SCALE, needs)
                return [t for t in found if t is not None]

        return call

    return Tunable(op, {"rank": r, "M": M, "N": N, "K": K}, make, 2 * M * (K + N))


@functools.cache
def everything(smoke: bool) -> tuple[Tunable, ...]:
    return (*tunables(smoke), *plans(smoke))
