"""What an adapter is: a frozen dataclass of hyper-parameters with three pure functions.

W is the frozen weight (out, in) of one layer, p the adapter's tensors for that layer.

    init(W, generator)        fresh p; the adapted layer starts as the frozen one, bit for bit
    weight(W, p)              the adapted weight W' (out, in): the definition
    forward(x, W, bias, p)    (..., in) -> (..., out): the fast path

They are tied by one law, tested for every adapter: forward(x, W, b, p) equals
F.linear(x, weight(W, p), b), values and gradients. A new adapter is one file with `init` and
`weight` and one line in `adapters/__init__.py`; it is correct before it has a `forward`, or the two
faster ways beside it: `onto`, where the frozen layer runs by itself (a quantised one), and
`lookup`, where x is one-hot (an embedding).
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt import ops


class Adapter:
    """Base of all adapters. Subclasses are frozen dataclasses; see the module's docstring.

    Tensors in p are trained, except those whose name starts with `frozen_`. They are fp32 over a
    base of lower precision and float64 over a float64 base.
    """

    registry: ClassVar[dict[str, type["Adapter"]]] = {}
    additive: ClassVar[bool] = True  # W' - W does not depend on W
    no_decay: ClassVar[tuple[str, ...]] = ()  # prefixes of tensors that weight decay would harm

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Adapter.registry[cls.__name__] = cls

    def init(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Fresh tensors for W (out, in). The same generator state gives the same tensors; without
        one, a new generator with seed 0 is used, never the global one."""
        raise NotImplementedError

    def weight(self, W: Tensor, p: dict[str, Tensor]) -> Tensor:
        """W' (out, in), computed in at least fp32 and rounded once to the dtype of W."""
        raise NotImplementedError

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, p: dict[str, Tensor]) -> Tensor:
        """The adapted linear layer, x (..., in) -> (..., out), in the dtype of x and W."""
        return F.linear(x, self.weight(W, p), bias)

    def onto(
        self,
        y: Tensor,
        x: Tensor,
        W: Callable[[], Tensor],
        bias: Tensor | None,
        p: dict[str, Tensor],
    ) -> Tensor:
        """The adapted output (..., out) from the frozen one, y = F.linear(x, W(), bias) however
        computed, in the dtype of y. W() is dense (out, in) and may take long: call it if needed."""
        dense = W()
        return y + F.linear(x, self.weight(dense, p) - dense)

    def lookup(
        self, y: Tensor, ids: Tensor, W: Tensor, p: dict[str, Tensor], padding_idx: int | None
    ) -> Tensor:
        """The adapted output (..., out) of an embedding from the frozen one, y = W^T[ids], for ids
        (...) of integers; no gradient goes to row padding_idx of W^T."""
        return F.embedding(ids, self.weight(W, p).T, padding_idx)

    def derived(self, W: Tensor, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `forward` works out of W and p alone, without a gradient. A layer adds it to p and
        keeps it until one of them is written to; without it, `forward` works it out itself."""
        return {}

    def held(self, out_features: int, in_features: int) -> int:
        """How many numbers the backward of `forward` keeps for every token, beside x."""
        return 0

    def resolved(self, out_features: int, in_features: int) -> "Adapter":
        """This adapter with every choice that depends on the layer's shape written down."""
        return self

    def direction(self, shape: tuple[int, int], p: dict[str, Tensor]) -> Tensor:
        """The part of W' - W (out, in) that needs no W: all of it for an additive adapter."""
        some = next(iter(p.values()))
        return self.weight(torch.zeros(shape, dtype=some.dtype, device=some.device), p)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this adapter again."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, layer name): the same on every rank and in any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def uniform(
    shape: tuple[int, ...], bound: float, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """U(-bound, bound) in the adapter dtype over `like`.

    Drawn in fp32 on the CPU, so that every device and base dtype starts from the same numbers.
    On the meta device nothing is drawn.
    """
    dtype = ops.wide_dtype(like.dtype)
    if like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = generator or torch.Generator().manual_seed(0)
    fresh = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    return fresh.to(device=like.device, dtype=dtype)
