"""The seven linears of a decoder layer of an 8B model as adapted modules, attention left out."""

import functools
from dataclasses import dataclass
from typing import Any

import counts
import torch
from counts import Case
from gpu_cases import SAMPLE, SCALE, Tensors, error
from gpu_parts import (
    TOLERANCE,
    Settings,
    allowed,
    measured_ceiling,
    record,
    rounded,
    run_round_robin,
    size_of,
    verdict,
)
from gpu_peers import NotInstalledError, block_modules
from gpu_results import Budget, Cell, Results
from gpu_timing import brief, input_sets

# What the results call them, and `block_modules`.
PROVIDERS = {"frozen": "frozen", "ours": "ours", "torch twin": "torch", "peft bf16": "peft"}
WIDTH, KEYS, INNER = 4096, 1024, 14336


def block_shapes(smoke: bool) -> dict[str, tuple[int, int]]:
    """(N, K) of the linears of a decoder layer of an 8B model."""
    d, k, f = (64, 16, 96) if smoke else (WIDTH, KEYS, INNER)
    return {"q_proj": (d, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, d),
            "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}  # fmt: skip


def block_part(results: Results, budget: Budget, settings: Settings) -> None:
    sizes = [(32, 8)] if settings.smoke else [(8192, 16), (2048, 16), (8192, 64)]
    for adapter in ("LoRA", "DoRA"):
        if not allowed(results, budget, settings, adapter.lower()):
            continue
        for M, rank in sizes:
            work = functools.partial(time_block, adapter, M, rank, settings, results.device,
                                     measured_ceiling(results))  # fmt: skip
            record(results, budget, f"block/{adapter} M{M} r{rank}", work)


@dataclass
class Linears:
    """The layers of one provider, and what is timed of them."""

    layers: Any
    trained: list[torch.Tensor]
    context: Any  # to run them in
    inputs: list[tuple[torch.Tensor, torch.Tensor]]  # of all but down_proj, and its own
    dy: dict[int, torch.Tensor]  # by width

    def outputs(self, i: int) -> list[torch.Tensor]:
        if self.trained:  # as an optimizer does: nothing derived from them may be kept
            torch.autograd.graph.increment_version(self.trained)
        x, z = self.inputs[i]
        return [layer(z if name == "down_proj" else x) for name, layer in self.layers.items()]

    def forward(self, i: int) -> None:
        with self.context(), torch.no_grad():
            self.outputs(i)

    def step(self, i: int) -> None:
        with self.context():
            y = self.outputs(i)
            given = [self.dy[t.shape[1]] for t in y]
            torch.autograd.grad(y, [*self.inputs[i], *self.trained], given)


def time_block(
    adapter: str, M: int, rank: int, settings: Settings, device: torch.device, ceiling: Any
) -> Cell:
    """Forward and backward of all seven layers as adapted modules, attention left out."""
    shapes = block_shapes(settings.smoke)
    d, f = shapes["down_proj"]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        t = torch.randn(shape, device=device, generator=generator)
        return t.mul_(scale).to(torch.bfloat16)

    weights = {shape: normal(*shape, scale=shape[1] ** -0.5) for shape in {*shapes.values()}}
    n = input_sets(2 * M * (d + f), device)
    inputs = [(normal(M, d).requires_grad_(), normal(M, f).requires_grad_()) for _ in range(n)]
    dy = {shape[0]: normal(M, shape[0]) for shape in shapes.values()}
    entries: dict[str, Cell] = {}
    calls: dict[str, Any] = {}
    right: Tensors = {}
    for label, name in PROVIDERS.items():
        name = name if name == "frozen" else f"{name} {adapter}"
        try:
            layers, context = block_modules(name, shapes, weights, rank)
            trained = [p for p in layers.parameters() if p.requires_grad]

            made = Linears(layers, trained, context, inputs, dy)
            with context(), torch.no_grad():
                y = layers["q_proj"](inputs[0][0][:SAMPLE].detach())
            wrong = _block_fault(right, name, layers, y, inputs[0][0][:SAMPLE])
            entries[label] = {"status": "failed" if wrong else "ok", "wrong": wrong}
            if not wrong:
                calls[label] = {"fwd": made.forward, "step": made.step}
        except NotInstalledError as missing:
            entries[label] = {"status": "not installed", "wrong": str(missing)}
        except Exception as failure:
            entries[label] = {"status": "error", "wrong": brief(failure)}
    run_round_robin(calls, entries, n, settings, device)
    each = [Case(adapter.lower(), M, N, K, rank) for N, K in shapes.values()]
    return {
        **verdict(entries),
        "case": {"op": "block", "adapter": adapter, "M": M, "rank": rank},
        "sets": n,
        "providers": entries,
        "count": _block_count(each),
        "predicted": _block_ratio(each, *ceiling) if ceiling else None,
        "target": {},
    }


def _block_fault(right: Tensors, name: str, layers: Any, y: torch.Tensor, x: torch.Tensor) -> str:
    """What is off in the output of the first layer."""
    layer = layers["q_proj"]
    if name == "frozen":
        right["W"] = layer.weight.detach().double()
        expected = x.double() @ right["W"].T
    else:
        found = {k.split(".")[0].removeprefix("lora_"): t.detach().double()
                 for k, t in layer.named_parameters() if t.requires_grad}  # fmt: skip
        V = right["W"] + SCALE * found["B"] @ found["A"]
        for name in found.keys() - {"A", "B"}:  # DoRA's magnitude, whatever it is called
            V = V * (found[name] / V.norm(dim=1))[:, None]
        expected = x.double() @ V.T
    off = error(y, expected.detach())[0]
    return "" if off <= TOLERANCE["peer"] else f"an output is {off:.1e} off"


def _block_count(each: list[Case]) -> Any:
    found = {}
    for kind, of in (("fwd", counts.forward), ("bwd", counts.backward)):
        stages = [stage for case in each for stage in of(case)]
        found[kind] = size_of(stages)
    found["step"] = {k: found["fwd"][k] + found["bwd"][k] for k in ("flops", "bytes")}
    return found


def _block_ratio(each: list[Case], tflops: float, tbs: float) -> dict[str, float]:
    """The ratios of all layers together."""
    base = [counts.seconds(counts.linear(c.M, c.N, c.K), tflops, tbs) for c in each]
    all_ratios = [counts.ratios(c, tflops, tbs) for c in each]
    total = {kind: sum(r[kind] * b for r, b in zip(all_ratios, base, strict=True)) / sum(base)
             for kind in ("fwd", "bwd", "step")}  # fmt: skip
    return rounded(total)
