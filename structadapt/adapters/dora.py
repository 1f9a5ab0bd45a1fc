"""DoRA: magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structadapt import ops
from structadapt.adapters.lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = diag(m / ||V||_row) V with V = W + s B A, and m (out,) starting as ||W||_row.

    The norm is taken per output row and detached in the gradient (section 4.3 of the paper); the
    bias is not scaled; m and the norm are fp32. A row of V that is exactly zero is a zero row of
    W', with the gradients of LoRA, so that B can move it. Errors as for LoRA.

    In bf16 and fp16 under torch.compile without the kernels, the gradient of m has the rounding of
    W x + bias, which tells little of W x beside a bias far larger; else such rows are worked out
    again.
    """

    rank: int = 16
    alpha: float = 32.0

    additive: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ("m",)

    def init(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        p = super().init(W, generator)
        if W.is_meta:  # shapes alone: torch takes milliseconds for a norm of nothing
            return {**p, "m": torch.empty(W.shape[0], dtype=p["B"].dtype, device="meta")}
        # The norm of V as the forward computes it, so that m / ||V|| is exactly 1.
        return {**p, "m": self.derived(W, p)["norm"].clone()}

    def derived(self, W: Tensor, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """norm (out,), that of the rows of V, and gain (out,) = m / norm for when no gradient is
        wanted; in at least fp32."""
        norm = ops.dora_norm(W, p["A"], p["B"], self.scale)
        if "m" not in p:
            return {"norm": norm}
        with torch.inference_mode(False), torch.no_grad():
            return {"norm": norm, "gain": ops.dora_gain(p["m"], norm)}

    def gain(self, W: Callable[[], Tensor], p: dict[str, Tensor]) -> Tensor:
        """m / ||V||_row (out,) in at least fp32, with a gradient to m alone."""
        if "gain" in p and not torch.is_grad_enabled():
            return p["gain"]
        return ops.dora_gain(p["m"], p["norm"] if "norm" in p else self.derived(W(), p)["norm"])

    def weight(self, W: Tensor, p: dict[str, Tensor]) -> Tensor:
        V = ops.lora_weight(W, p["A"], p["B"], self.scale)
        return (self.gain(lambda: W, p)[:, None] * V).to(W.dtype)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        g = self.gain(lambda: W, p)
        return ops.dora_linear(x, W, bias, p["A"], p["B"], g, self.scale)

    def held(self, out_features: int, in_features: int) -> int:
        return self.rank + out_features  # x A^T and the output before the magnitude

    def onto(
        self,
        y: Tensor,
        x: Tensor,
        W: Callable[[], Tensor],
        bias: Tensor | None,
        p: dict[str, Tensor],
    ) -> Tensor:
        low = ops.low_rank(x.to(y.dtype), p["A"], p["B"], self.scale)
        return ops.dora_onto(y, low, bias, self.gain(W, p))

    def lookup(
        self, y: Tensor, ids: Tensor, W: Tensor, p: dict[str, Tensor], padding_idx: int | None
    ) -> Tensor:
        low = self._looked_up(y, ids, p, padding_idx)
        return ops.dora_onto(y, low, None, self.gain(lambda: W, p))

    def direction(self, shape: tuple[int, int], p: dict[str, Tensor]) -> Tensor:
        """s B A (out, in): where V moves, without the magnitudes."""
        return LoRA(self.rank, self.alpha, self.scaling).direction(shape, p)
