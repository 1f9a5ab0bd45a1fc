"""DoRA: magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

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
    """

    rank: int = 16
    alpha: float = 32.0

    additive: ClassVar[bool] = False

    def init(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        p = super().init(W, generator)
        # The norm of V as the forward computes it, so that m / ||V|| is exactly 1.
        with torch.no_grad():
            return {**p, "m": ops.row_norm(ops.lora_weight(W, p["A"], p["B"], self.scale))}

    def weight(self, W: Tensor, p: dict[str, Tensor]) -> Tensor:
        return ops.dora_weight(W, p["A"], p["B"], p["m"], self.scale).to(W.dtype)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        return ops.dora_linear(x, W, bias, p["A"], p["B"], p["m"], self.scale)

    def direction(self, shape: tuple[int, int], p: dict[str, Tensor]) -> Tensor:
        """s B A: where V moves, without the magnitudes."""
        return LoRA(self.rank, self.alpha, self.scaling).direction(shape, p)
