"""What adapters cost, counted on the meta device: no weight is touched."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from structadapt.adapters.base import Adapter


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a `Plan`."""

    name: str
    shape: tuple[int, int]  # (out, in)
    adapter: Adapter
    parameters: int  # trained
    flops: int  # added to one token's forward
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

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}}  {'out x in':>13}  {'parameters':>11}  {'FLOPs/token':>12}"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.parameters:>11,}  {layer.flops:>12,}"
                f"  {layer.adapter}"
            )
        share = self.parameters / max(self.base_parameters, 1)
        lines.append(
            f"{len(self)} layers, {self.parameters:,} trained parameters "
            f"({share:.2%} of {self.base_parameters:,}), {self.flops:,} FLOPs a token added"
        )
        return "\n".join(lines)


def layer_plan(name: str, adapter: Adapter, out_features: int, in_features: int) -> LayerPlan:
    tensors, flops = _cost(adapter, out_features, in_features)
    trained = [t.numel() for key, t in tensors.items() if not key.startswith("frozen_")]
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    return LayerPlan(name, (out_features, in_features), adapter, sum(trained), flops, shapes)


@lru_cache(maxsize=4096)
def _cost(adapter: Adapter, out_features: int, in_features: int) -> tuple[dict[str, Tensor], int]:
    """The tensors of one layer, on the meta device, and the FLOPs that one more token costs."""
    W = torch.empty(out_features, in_features, device="meta")
    tensors = adapter.init(W)

    def flops(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            adapter.forward(torch.empty(tokens, in_features, device="meta"), W, None, tensors)
        return counter.get_total_flops()

    return tensors, flops(2) - flops(1) - 2 * out_features * in_features
