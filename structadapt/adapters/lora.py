"""LoRA: W' = W + s B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt import ops
from structadapt.adapters.base import Adapter, uniform

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "constant")
LARGEST_RANK, LARGEST_ALPHA = 2**20, 1e9  # beyond any use; keeps what fp32 computes finite


@dataclass(frozen=True)
class LoRA(Adapter):
    """W' = W + s B A with A (rank, in) kaiming-uniform and B (out, rank) zero.

    s is alpha / rank; alpha / sqrt(rank) with scaling="alpha/sqrt(r)" (rsLoRA, Kalajdzievski
    2023); alpha itself with scaling="constant".

    Raises ValueError for a rank that is not an integer from 1 to 2^20, an alpha that is not a
    positive number up to 1e9, or an unknown scaling.
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: str = "alpha/r"  # or "alpha/sqrt(r)", "constant"

    def __post_init__(self) -> None:
        name = type(self).__name__
        whole = isinstance(self.rank, Integral) and not isinstance(self.rank, bool)
        if not whole or not 0 < self.rank <= LARGEST_RANK:
            raise ValueError(
                f"{name}: rank must be a positive integer, got {self.rank!r} (at most 2^20)"
            )
        number = isinstance(self.alpha, Real) and not isinstance(self.alpha, bool)
        if not number or not 0 < self.alpha <= LARGEST_ALPHA:
            raise ValueError(
                f"{name}: alpha must be a positive number, got {self.alpha!r} (at most 1e9)"
            )
        object.__setattr__(self, "rank", int(self.rank))  # numpy's numbers too
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.scaling not in SCALINGS:
            expected = ", ".join(map(repr, SCALINGS))
            raise ValueError(f"{name}: scaling must be one of {expected}, got {self.scaling!r}")

    @property
    def scale(self) -> float:
        """s in W + s B A."""
        divisor = {"alpha/r": self.rank, "alpha/sqrt(r)": math.sqrt(self.rank), "constant": 1}
        return self.alpha / divisor[self.scaling]

    def init(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        out_features, in_features = W.shape
        bound = 1 / math.sqrt(in_features)  # kaiming-uniform with a = sqrt(5)
        A = uniform((self.rank, in_features), bound, W, generator)
        # A header can describe 20,000 layers, and new_zeros takes long on the meta device.
        B = torch.empty(out_features, self.rank, dtype=A.dtype, device=A.device).zero_()
        return {"A": A, "B": B}

    def weight(self, W: Tensor, p: dict[str, Tensor]) -> Tensor:
        return ops.lora_weight(W, p["A"], p["B"], self.scale).to(W.dtype)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        return ops.lora_linear(x, W, bias, p["A"], p["B"], self.scale)

    def held(self, out_features: int, in_features: int) -> int:
        return self.rank  # x A^T

    def onto(
        self,
        y: Tensor,
        x: Tensor,
        W: Callable[[], Tensor],
        bias: Tensor | None,
        p: dict[str, Tensor],
    ) -> Tensor:
        return y + ops.low_rank(x.to(y.dtype), p["A"], p["B"], self.scale)

    def lookup(
        self, y: Tensor, ids: Tensor, W: Tensor, p: dict[str, Tensor], padding_idx: int | None
    ) -> Tensor:
        return y + self._looked_up(y, ids, p, padding_idx)

    def _looked_up(
        self, y: Tensor, ids: Tensor, p: dict[str, Tensor], padding_idx: int | None
    ) -> Tensor:
        """The low-rank product for one-hot x."""
        with ops.no_autocast(y.device):
            h = F.embedding(ids, p["A"].T, padding_idx)
            return F.linear(h, self.scale * p["B"]).to(y.dtype)
