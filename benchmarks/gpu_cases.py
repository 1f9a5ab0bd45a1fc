"""The numbers of a case, what float64 makes of them, and how far an output may be from it.

Weights and adapters are rounded to the dtype of the case first, scales are powers of two: what an
output is off is the rounding of whoever made it. x and dy are N(0, 1), W is N(0, 1 / K), B is not
zero. The head's dy is the gradient of the log-probabilities.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from counts import Case
from torch import Tensor

from structadapt.kernels import dora, logprob, lora, quanta, reference

SCALE = 2.0
CHUNK = 2048  # rows of a float64 reference at a time
SAMPLE = 64  # rows that a provider is checked on
Tensors = dict[str, Tensor]
Sizes = tuple[int, ...]


class Problem:
    """Inputs of a case on a device."""

    def __init__(
        self, case: Case, device: torch.device, sets: int = 1, dtype: torch.dtype = torch.bfloat16,
        bias: bool = False, small_gains: bool = False, twins: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.case, self.device, self.dtype = case, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        M, N, K = case.M, case.N, case.K
        self.W = self.normal(N, K, scale=K**-0.5)
        self.bias = self.normal(N) if bias else None
        self.params: Tensors = {}  # of the adapter, fp32
        self.twins: list[Tensor] = []
        if case.op in ("lora", "dora"):
            self.params["A"] = self.normal(case.rank, K, scale=K**-0.5).float()
            self.params["B"] = self.normal(N, case.rank, scale=0.5 * case.rank**-0.5).float()
        if case.op == "dora":
            # A magnitude near the norm, so that g is near 1; or also some that are hardly there.
            norm = (self.W.float() + SCALE * self.params["B"] @ self.params["A"]).norm(dim=1)
            g = 1 + 0.2 * self.normal(N).float()
            if small_gains:
                g[1::97], g[2::97], g[3::97] = 0.0, 1e-3, -g[3::97]
            self.params["m"] = norm * g
        if case.op == "quanta":
            gates = near_identity(case.before, case.after, self.normal)
            self.params |= {f"gate{k}": g for k, g in enumerate(gates)}
            if twins:
                self.twins = near_identity(case.before, case.after, self.normal)
        if case.op == "head":
            self.ids = torch.randint(N, (M,), device=device, generator=self.generator)
        self.sets = [self.inputs() for _ in range(sets)]
        for t in self.params.values():
            t.requires_grad_(case.op != "head")

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(shape, device=self.device, generator=self.generator, dtype=torch.float32)
        return t.mul_(scale).to(self.dtype)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """(x, dy)."""
        M, N, K = self.case.M, self.case.N, self.case.K
        x = self.normal(M, K).requires_grad_()
        return x, self.normal(M).float() if self.case.op == "head" else self.normal(M, N)

    def gain(self) -> Tensor:
        """g of DoRA, from the norm as the kernel computes it."""
        A, B, m = (self.params[k].detach() for k in "ABm")
        return reference.dora_gain(m, dora.dora_norm(self.W, A, B, SCALE))

    def plain(self, x: Tensor, p: Tensors, rows: Any = slice(None)) -> Tensor:
        """The formula for some rows, in the dtype of x. The norm of DoRA is a constant in it."""
        W, bias = self.W.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        op, n = self.case.op, self.case.N
        if op == "lora":
            return reference.lora_linear(x, W, bias, p["A"], p["B"], SCALE)
        if op == "dora":
            if "g" in p:
                g = p["g"]
            else:
                g = reference.dora_gain(p["m"], reference.dora_norm(W, p["A"], p["B"], SCALE))
            y = F.linear(x, W) + reference.low_rank(x, p["A"], p["B"], SCALE)
            return g * y if bias is None else g * y + bias
        if op == "quanta":
            gates = [t for name, t in p.items() if name.startswith("gate")]
            update = reference.quanta_update(x, gates, n, not self.twins)
            if self.twins:
                twins = [t.to(x.dtype) for t in self.twins]
                update = update - reference.quanta_update(x, twins, n, False)
            return F.linear(x, W, bias) + update
        return reference.token_logprobs(F.linear(x, W, bias), self.ids[rows], 1.0)[0]


def near_identity(before: Sizes, after: Sizes, normal: Callable[..., Tensor]) -> list[Tensor]:
    """fp32 gates; G and G - E are exact in bf16."""
    found = []
    for shape in reference.quanta_gate_shapes(after, before):
        noise = normal(*shape, scale=0.4 / (shape[2] * shape[3]) ** 0.5).float()
        noise = noise.clamp(-0.2, 0.2).mul(512).round().div(512)
        found.append(reference.eye_gate(noise) + noise)
    return found


def float64(
    problem: Problem, x: Tensor, dy: Tensor, params: Tensors, rows: Tensor | None = None,
    gradients: bool = True,
) -> Tensors:  # fmt: skip
    """y and dx of all rows, or of some; the gradients of the parameters from all rows."""
    p = {k: t.detach().double().requires_grad_(gradients) for k, t in params.items()}
    every = torch.arange(len(x), device=x.device)
    wanted = every if rows is None else rows
    passes = every if gradients else wanted
    found: dict[str, list[Tensor]] = {"y": [], "dx": []}
    kept = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    kept[wanted] = True
    for at in passes.split(CHUNK):
        part = x.detach()[at].double().requires_grad_()
        y = problem.plain(part, p, at)
        y.backward(dy[at].double())
        assert part.grad is not None
        keep = kept[at]
        found["y"].append(y.detach()[keep])
        found["dx"].append(part.grad[keep])
    out = {name: torch.cat(parts) for name, parts in found.items()}
    return out | {name: t.grad for name, t in p.items() if t.grad is not None}


# -- the kernels, called by hand -------------------------------------------------------------------


@contextmanager
def planned(plan: str) -> Iterator[None]:
    """Both plans of a product can be asked for, whatever the table says. "" asks for none."""
    before = lora.plan, dora.plan
    if plan:
        lora.plan = dora.plan = lambda *_: plan  # type: ignore[assignment]
    try:
        yield
    finally:
        lora.plan, dora.plan = before


@contextmanager
def gate_by_gate(asked: bool = True) -> Iterator[None]:
    """QuanTA without the kernel that runs a chain on chip."""
    before = dict(quanta.ON_CHIP)
    if asked:
        quanta.ON_CHIP.clear()
    try:
        yield
    finally:
        quanta.ON_CHIP.update(before)


def kernels(problem: Problem, x: Tensor, dy: Tensor) -> Tensors:
    """y, dx and the gradients of the parameters, by the functions of `kernels/`."""
    x, W, bias, op = x.detach(), problem.W, problem.bias, problem.case.op
    p = {name: t.detach() for name, t in problem.params.items()}
    if op == "lora":
        A, B = p["A"], p["B"]
        y, h = lora.lora_forward(x, W, bias, A, B, SCALE)
        needs = (True, False, False, True, True)
        dx, _, _, dA, dB = lora.lora_backward(dy, x, h, W, A, B, SCALE, needs)
        return {"y": y, "dx": dx, "A": dA, "B": dB}  # type: ignore[dict-item]
    if op == "dora":
        A, B, g = p["A"], p["B"], problem.gain()
        y, h, held = dora.dora_forward(x, W, bias, A, B, g, SCALE)
        needs = (True, False, False, True, True, True)
        found = dora.dora_backward(dy, x, h, held, W, bias, A, B, g, SCALE, needs)
        return {"y": y, "dx": found[0], "A": found[3], "B": found[4], "g": found[5]}  # type: ignore[dict-item]
    if op == "quanta":
        gates, minus_eye = [*p.values()], not problem.twins
        y = quanta.quanta_forward(x, gates, problem.twins, W.shape[0], minus_eye)
        dx, grads = quanta.quanta_backward(dy, x, gates, problem.twins, minus_eye, True)
        # The update alone is compared: W x would drown it.
        return {"y": y, "dx": dx, **dict(zip(p, grads, strict=True))}  # type: ignore[dict-item]
    logp, entropy, u = logprob.head_logprobs_forward(x, W, bias, problem.ids, 1.0, True)
    assert u is not None
    return {"y": logp, "entropy": entropy, "dx": (u * dy[:, None]).to(x.dtype)}


# -- how far off -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    whole: float  # ||found - right|| / ||right||
    lines: float = 4.0  # so many times as far in any row or column, where a wrong edge shows


def error(found: Tensor, right: Tensor) -> tuple[float, float]:
    """(as a whole, in the worst row or column); infinite where `found` is not finite."""
    found, right = found.detach().double(), right.double()
    if found.shape != right.shape or not bool(torch.isfinite(found).all()):
        return float("inf"), float("inf")
    wrong = found - right
    norm = right.norm().clamp(min=1e-300)
    worst = 0.0
    for dim in range(right.dim() if right.dim() > 1 else 0):
        others = [d for d in range(right.dim()) if d != dim]
        typical = norm / right.shape[dim] ** 0.5
        size = torch.linalg.vector_norm(right, dim=others).clamp(min=0.1 * float(typical))
        worst = max(worst, float((torch.linalg.vector_norm(wrong, dim=others) / size).max()))
    return float(wrong.norm() / norm), worst


def judge(found: Tensors, right: Tensors, bounds: Callable[[str], Bound]) -> tuple[str, Tensors]:
    """("" or what is wrong, {name: error}) of outputs against float64."""
    faults, errors = [], {}
    for name, value in found.items():
        if name not in right:
            continue
        bound = bounds(name)
        whole, worst = errors[name] = error(value, right[name])
        if not whole <= bound.whole:
            faults.append(f"{name} is {whole:.1e} off, {bound.whole:.1e} allowed")
        elif not worst <= bound.lines * bound.whole:
            faults.append(f"{name} is {worst:.1e} off in a row or column")
    shown: Any = {k: [float(f"{e:.3g}") for e in pair] for k, pair in errors.items()}
    return "; ".join(faults), shown
