"""Who is timed: the frozen linear, ours with either plan and on torch, and the peers.

A provider is a forward of x with the tensors that it trains. Its step gives the gradients of x and
of those; a gradient of a frozen weight is never asked for. PEFT and Liger are used where they are
installed.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import SCALE, Problem, planned
from torch import Tensor, nn

import structadapt as sa
from structadapt import head, ops
from structadapt.kernels import lean_logprob, logprob, reference


class NotInstalledError(Exception):
    """A package that a provider needs is not there."""


@dataclass
class Provider:
    forward: Callable[[Tensor], Tensor]
    trained: list[Tensor] = field(default_factory=list)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaled: bool = False  # dx is that of another loss, some number times ours; y is a loss
    forward_only: bool = False  # the unit of the head: a product

    def infer(self, x: Tensor) -> Tensor:
        with self.context(), torch.no_grad():
            return self.forward(x)

    def step(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """y and dx; the gradients of the trained tensors are made and dropped."""
        if self.forward_only:
            return self.infer(x), x
        with self.context():
            y = self.forward(x)
            dx, *_ = torch.autograd.grad(y, [x, *self.trained], None if self.scaled else dy)
        return y.detach(), dx


Build = Callable[[Problem], Provider]


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotInstalledError(package)


def on(backend: str, plan: str = "") -> Callable[[], AbstractContextManager[Any]]:
    """A backend, and a plan of a product instead of the table's."""

    def enter() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(sa.backend(backend))
        stack.enter_context(planned(plan))
        return stack

    return enter


# -- layers ----------------------------------------------------------------------------------------


def frozen(problem: Problem) -> Provider:
    return Provider(lambda x: F.linear(x, problem.W))


def ours(backend: str, plan: str = "") -> Build:
    """DoRA's norm is worked out in every call, as after an optimizer's step."""

    def build(problem: Problem) -> Provider:
        W, p = problem.W, problem.params

        def forward(x: Tensor) -> Tensor:
            if problem.case.op == "lora":
                return ops.lora_linear(x, W, None, p["A"], p["B"], SCALE)
            if problem.case.op == "dora":
                g = ops.dora_gain(p["m"], ops.dora_norm(W, p["A"], p["B"], SCALE))
                return ops.dora_linear(x, W, None, p["A"], p["B"], g, SCALE)
            return ops.quanta_linear(x, W, None, [*p.values()], [], True)

        return Provider(forward, [*p.values()], on(backend, plan))

    return build


class _AddmmOrder(torch.autograd.Function):
    """The usual fast path on torch: out = x W^T, then addmm_ of the low-rank product; x A^T again
    in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, W, A, B)
        return (x @ W.T).addmm_(x @ A.T, B.T, alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B = ctx.saved_tensors
        dS = dy @ B
        dA = (dS.T @ x).mul_(SCALE)
        dB = (dy.T @ (x @ A.T)).mul_(SCALE)
        return (dy @ W).addmm_(dS, A, alpha=SCALE), None, dA, dB


def addmm(problem: Problem) -> Provider:
    A, B = (problem.params[k].detach().to(problem.dtype).requires_grad_() for k in "AB")
    return Provider(lambda x: _AddmmOrder.apply(x, problem.W, A, B), [A, B])  # type: ignore[arg-type]


def linear_of(W: Tensor) -> nn.Linear:
    """nn.Linear without bias around W."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    return linear


def peft(wide: bool) -> Build:
    """PEFT's layer, its adapter in fp32 (the default) or in the dtype of the weight."""

    def build(problem: Problem) -> Provider:
        _needs("peft")
        from peft import LoraConfig, get_peft_model

        model = nn.Sequential()
        model.add_module("linear", linear_of(problem.W))
        config = LoraConfig(
            r=problem.case.rank, lora_alpha=int(SCALE * problem.case.rank),
            target_modules=["linear"], use_dora=problem.case.op == "dora",
        )  # fmt: skip
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]
        layer = adapted.base_model.model.linear
        tensors = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
        if problem.case.op == "dora":
            tensors["m"] = layer.lora_magnitude_vector.default.weight
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(problem.params[name])
        return Provider(layer, [*tensors.values()])

    return build


def compiled(problem: Problem) -> Provider:
    """torch.compile of the formula."""
    p = [*problem.params.values()]
    names = [*problem.params]
    backend = "inductor" if problem.device.type == "cuda" else "aot_eager"
    # The formula alone: an op of ours would become an opaque one.

    def formula(x: Tensor, *tensors: Tensor) -> Tensor:
        return problem.plain(x, dict(zip(names, tensors, strict=True)))

    function: Any = torch.compile(formula, dynamic=False, backend=backend)
    return Provider(lambda x: function(x, *p), p)


def einsum(problem: Problem) -> Provider:
    """QuanTA as the official code writes it: W less E once, then an einsum a gate."""
    gates, (N, K) = [*problem.params.values()], problem.W.shape
    eye = torch.eye(K, device=problem.device, dtype=torch.float32)
    E = reference.quanta_update(eye, [reference.eye_gate(g.detach()) for g in gates], N, False).T
    W = (problem.W.float() - E).to(problem.dtype)
    del eye, E
    return Provider(lambda x: F.linear(x, W) + reference.quanta_update(x, gates, N, False), gates)


# -- the head --------------------------------------------------------------------------------------


def one_product(problem: Problem) -> Provider:
    """hidden W^T in bf16: the unit of the head."""
    return Provider(lambda x: x @ problem.W.T, forward_only=True)


def our_head(kernels: Any) -> Build:
    def build(problem: Problem) -> Provider:
        def forward(x: Tensor) -> Tensor:
            return head.head_logprobs(kernels, x, problem.W, None, problem.ids, 1.0)[0]

        return Provider(forward)

    return build


def naive_head(problem: Problem) -> Provider:
    """Logits, log_softmax of them in fp32, the chosen one."""

    def forward(x: Tensor) -> Tensor:
        logp = torch.log_softmax(F.linear(x, problem.W).float(), -1)
        return logp.gather(1, problem.ids[:, None]).squeeze(1)

    return Provider(forward)


def liger_cross_entropy(problem: Problem) -> Provider:
    """Liger's fused linear cross-entropy: the sum of -logp."""
    _needs("liger_kernel")
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return Provider(lambda x: loss(problem.W, x, problem.ids), scaled=True)


def liger_grpo(problem: Problem) -> Provider:
    """Liger's chunked GRPO loss on one sequence, first step, without a reference model."""
    _needs("liger_kernel")
    from liger_kernel.chunked_loss import (  # type: ignore[import-not-found]
        LigerFusedLinearGRPOLoss,
    )

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    ids = problem.ids[None]
    mask, advantages = torch.ones_like(ids), torch.ones(1, device=ids.device)

    def forward(x: Tensor) -> Tensor:
        out = loss(x[None], problem.W, ids, mask, advantages)
        return out[0] if isinstance(out, tuple) else out

    return Provider(forward, scaled=True)


def providers(op: str, with_compile: bool) -> dict[str, Build]:
    """Everyone who is timed for an op, the base of the ratios first."""
    if op == "head":
        return {
            "frozen": one_product,
            "ours": our_head(logprob),
            "torch twin": our_head(lean_logprob),
            "naive": naive_head,
            "liger FLCE": liger_cross_entropy,
            "liger GRPO": liger_grpo,
        }
    found: dict[str, Build] = {"frozen": frozen, "ours": ours("triton")}
    if op != "quanta":
        found |= {"ours cublas": ours("triton", "cublas"), "ours triton": ours("triton", "triton")}
    found["torch twin"] = ours("torch")
    if op == "lora":
        found["addmm"] = addmm
    if op == "quanta":
        found["einsum"] = einsum
    else:
        found |= {"peft bf16": peft(False), "peft": peft(True)}
    return found | ({"compile": compiled} if with_compile else {})


# -- the seven linears of a block ------------------------------------------------------------------


def block_modules(
    name: str, shapes: dict[str, tuple[int, int]], weights: dict[tuple[int, int], Tensor], rank: int
) -> tuple[Any, Any]:
    """(the layers by name, the context to run them in)."""
    layers: Any = nn.ModuleDict({k: linear_of(weights[shape]) for k, shape in shapes.items()})
    kind, _, adapter = name.partition(" ")
    if kind == "peft":
        _needs("peft")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=[*shapes],
                            use_dora=adapter == "DoRA")  # fmt: skip
        layers = get_peft_model(layers, config, autocast_adapter_dtype=False).base_model.model
    elif kind in ("ours", "torch"):
        given = {
            "LoRA": lambda: sa.LoRA(rank, SCALE * rank),
            "DoRA": lambda: sa.DoRA(rank, SCALE * rank),
        }[adapter]()
        layers = sa.adapt(layers, given)
    with torch.no_grad():
        for parameter_name, t in layers.named_parameters():
            if t.requires_grad and t.dim() == 2:
                seed = sum(map(ord, parameter_name.split(".")[0])) + t.shape[0]
                generator = torch.Generator(t.device).manual_seed(seed)
                noise = torch.randn(t.shape, device=t.device, generator=generator)
                t.copy_(noise.mul_(t.shape[1] ** -0.5))
    return layers, {"ours": on("triton"), "torch": on("torch")}.get(kind, nullcontext)
