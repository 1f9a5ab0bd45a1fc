"""Quantised linear layers, by what they look like: no such library is imported unless it is there.

A hook is all that an adapter needs of one: dequantize(module) -> W (out, in) in a floating dtype.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

Dequantize = Callable[[nn.Module], Tensor]


def is_quantised(layer: nn.Module) -> bool:
    """Whether `dequantize` knows the layer: torchao's weights, bitsandbytes' 4 and 8 bit layers."""
    if not isinstance(layer, nn.Linear):
        return False
    return type(layer).__module__.startswith("bitsandbytes.") or _torchao(layer.weight)


def dequantize(layer: nn.Module) -> Tensor:
    """W (out, in) of a quantised linear layer, as its own forward multiplies by it.

    Raises ValueError for a layer that is not quantised yet (bitsandbytes' are when they are moved
    to their device) or of another kind: pass `dequantize=` with a function for that.
    """
    weight: Any = layer.weight
    if _torchao(weight):
        return weight.dequantize()
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-untyped]

        return dequantize_4bit(weight.data, weight.quant_state)
    state = cast(Any, getattr(layer, "state", None))
    scale = getattr(weight, "SCB", None)
    scale = getattr(state, "SCB", None) if scale is None else scale
    if weight.dtype == torch.int8 and scale is not None:
        return weight.data.float() * (scale.float() / 127)[:, None]
    raise ValueError(
        f"a {type(layer).__name__} with a weight of {weight.dtype} is not quantised yet, or in a "
        "way that is not known here: move it to its device, or pass dequantize="
    )


def _torchao(weight: Tensor) -> bool:
    """A tensor subclass with a `dequantize` of its own."""
    return getattr(type(weight), "dequantize", None) is not Tensor.dequantize and type(
        weight
    ).__module__.startswith("torchao.")
