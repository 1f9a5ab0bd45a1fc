"""The tensors of an adapted model as an export needs them: whole, finite, under plain names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from structadapt.adapted import Adapted


def refuse_sharded(layers: Mapping[str, Adapted]) -> None:
    """ValueError for layers that are split over processes or have no values."""
    for name, layer in layers.items():
        for tensor in [layer.frozen_weight, *layer.tensors().values()]:
            if hasattr(tensor, "device_mesh"):
                raise ValueError(
                    f"{name} is sharded: gather its tensors (full_tensor), load them into a whole "
                    "model, and export that"
                )
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device: there is nothing to export")


def finite_tensors(name: str, layer: Adapted) -> dict[str, Tensor]:
    """The adapter's tensors by name, detached. ValueError if one is not finite."""
    tensors = {key: tensor.detach() for key, tensor in layer.tensors().items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}.{key} is not finite: not exported")
    return tensors
