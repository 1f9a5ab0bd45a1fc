"""What adapters cost, counted on the meta device: no weight is touched."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from structadapt.adapted import Adapted
from structadapt.adapters.base import Adapter
from structadapt.layers import is_linear, matrix_shape
from structadapt.ops import wide_dtype


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a `Plan`."""

    name: str
    shape: tuple[int, int]  # (out, in)
    adapter: Adapter
    parameters: int  # trained
    flops: int  # added to one token's forward; 0 for a convolution, whose kernel alone is adapted
    training_bytes: int  # the tensors, their gradients and Adam's two moments
    held_bytes: int  # kept for the backward for every token, beside x; of a kernel, per call, 0
    tensors: dict[str, tuple[int, ...]]  # shape of each of the adapter's tensors


@dataclass(frozen=True)
class Plan:
    """Which layers an adapter takes and what it costs. Iterate over it, or print it."""

    layers: list[LayerPlan]
    base_parameters: int

    @property
    def parameters(self) -> int:
        """Trained parameters in all."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        """FLOPs added to one token's forward in all."""
        return sum(layer.flops for layer in self.layers)

    @property
    def training_bytes(self) -> int:
        """Memory of the adapters, their gradients and Adam's moments in all."""
        return sum(layer.training_bytes for layer in self.layers)

    @property
    def held_bytes(self) -> int:
        """Memory kept for the backward for every token in all, beside each layer's input."""
        return sum(layer.held_bytes for layer in self.layers)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{'layer':{width}}  {'out x in':>13}  {'parameters':>11}  {'FLOPs/token':>12}  "
            f"{'training KiB':>12}  {'held B/token':>12}"
        ]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.parameters:>11,}  {layer.flops:>12,}"
                f"  {layer.training_bytes / 1024:>12,.1f}  {layer.held_bytes:>12,}  {layer.adapter}"
            )
        share = self.parameters / max(self.base_parameters, 1)
        lines.append(
            f"{len(self)} layers, {self.parameters:,} trained parameters "
            f"({share:.2%} of {self.base_parameters:,}), {self.flops:,} FLOPs a token added, "
            f"{self.training_bytes / 2**20:,.1f} MiB to train, {self.held_bytes:,} B a token held"
        )
        return "\n".join(lines)


def layer_plan(name: str, adapter: Adapter, layer: nn.Module) -> LayerPlan:
    """The row of a layer that carries this adapter, or would."""
    shape = matrix_shape(layer)
    weight = cast(Tensor, layer.weight)
    linear, embedding = is_linear(layer), isinstance(layer, nn.Embedding)
    tensors = layer.tensors() if isinstance(layer, Adapted) else _tensors(adapter, *shape)
    trained = sum(t.numel() for key, t in tensors.items() if not key.startswith("frozen_"))
    fixed = sum(t.numel() for t in tensors.values()) - trained
    held = 0
    if linear:
        held = adapter.held(*shape) * weight.dtype.itemsize
    elif embedding:
        held = _held_by_lookup(adapter, *shape, weight.dtype)
    return LayerPlan(
        name=name,
        shape=shape,
        adapter=adapter,
        parameters=trained,
        flops=_flops(adapter, *shape, embedding) if linear or embedding else 0,
        training_bytes=wide_dtype(weight.dtype).itemsize * (4 * trained + fixed),
        held_bytes=held,
        tensors={key: tuple(t.shape) for key, t in tensors.items()},
    )


@lru_cache(maxsize=4096)
def _tensors(adapter: Adapter, out_features: int, in_features: int) -> dict[str, Tensor]:
    """An adapter's tensors on the meta device."""
    return adapter.init(torch.empty(out_features, in_features, device="meta"))


@lru_cache(maxsize=4096)
def _flops(adapter: Adapter, out_features: int, in_features: int, embedding: bool) -> int:
    """What one more token costs."""
    W = torch.empty(out_features, in_features, device="meta")
    tensors = _tensors(adapter, out_features, in_features)

    def flops(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if embedding:
                y = torch.empty(tokens, out_features, device="meta")
                ids = torch.empty(tokens, dtype=torch.int64, device="meta")
                adapter.lookup(y, ids, W, tensors, None)
            else:
                adapter.forward(torch.empty(tokens, in_features, device="meta"), W, None, tensors)
        return counter.get_total_flops()

    frozen = 0 if embedding else 2 * out_features * in_features
    return flops(2) - flops(1) - frozen


@lru_cache(maxsize=4096)
def _held_by_lookup(
    adapter: Adapter, out_features: int, in_features: int, dtype: torch.dtype
) -> int:
    """The bytes that an adapted embedding keeps for every token, from what autograd is given."""
    W = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    p = {key: t.detach().requires_grad_() for key, t in adapter.init(W).items()}

    def held(tokens: int) -> int:
        y = torch.empty(tokens, out_features, dtype=dtype, device="meta")
        ids = torch.empty(tokens, dtype=torch.int64, device="meta")
        own = {t.untyped_storage()._cdata for t in (W, ids, *p.values())}
        kept: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            if (storage := t.untyped_storage())._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = adapter.lookup(y, ids, W, p, None)
        del output
        return sum(kept.values())

    return held(2) - held(1)
