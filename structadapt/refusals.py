"""What cannot be adapted, or not in this order, and why."""

from types import MethodType
from typing import cast

from torch import Tensor, nn

from structadapt.adapted import Adapted

# what a layer gains beside the adapter's tensors
ATTRIBUTES = ("adapter", "enabled", "origin", "pending", "tensor_names", "base_weight", "residual")


def refuse_layer(name: str, layer: nn.Module, kind: type[Adapted] | None) -> None:
    """ValueError or RuntimeError for a layer that cannot carry an adapter, with the reason."""
    if isinstance(layer, Adapted):
        raise ValueError(f"{name} is adapted already, with {layer.adapter}; exclude it")
    weight = cast(Tensor, layer.weight)
    if "weight" not in layer._parameters:
        raise ValueError(
            f"{name}: its weight is computed by weight_norm, prune or the like, which would "
            "undo a merge: remove that first"
        )
    if "forward" in layer.__dict__ and not kept_forwards(layer):
        raise RuntimeError(
            f"{name}: something has replaced its forward, and would not call an adapter: adapt "
            "first, then wrap it"
        )
    if weight.is_meta and hasattr(layer, "_hf_hook"):
        raise RuntimeError(
            f"{name}: accelerate has offloaded its weight: adapt first, then offload"
        )
    if not weight.numel():
        raise ValueError(f"{name}: its weight is empty, {tuple(weight.shape)}")
    if not weight.is_floating_point() and not (kind and kind.is_quantised):
        raise ValueError(f"{name}: cannot adapt a weight of dtype {weight.dtype}")
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        raise ValueError(
            f"{name}: an embedding with max_norm changes its weight in every forward, and "
            "scale_grad_by_freq has no meaning for an adapter: build it without"
        )
    if weight.is_inference():
        raise RuntimeError(
            f"{name} was built under torch.inference_mode() and cannot be trained through; "
            "build the model outside it"
        )


def refuse_wrong_order(model: nn.Module) -> None:
    """RuntimeError for a model that is compiled, wrapped for DDP, sharded or merged."""
    for name, module in model.named_modules():
        label = name or type(module).__name__
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise RuntimeError(f"{label} is compiled: adapt first, then compile, then shard")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise RuntimeError(f"{label} is DistributedDataParallel: adapt first, then wrap")
        if _is_sharded(module):
            raise RuntimeError(f"{label} is sharded: adapt first, then compile, then shard")
        if isinstance(module, Adapted) and module.base_weight is not None:
            raise RuntimeError(f"{label} is merged: unmerge first")


def _is_sharded(module: nn.Module) -> bool:
    """Also where a forward has left FSDP2's parameters whole."""
    by_class = any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    return by_class or any(hasattr(p, "device_mesh") for p in module.parameters(recurse=False))


def kept_forwards(layer: nn.Module) -> list[str]:
    """Attributes of a layer that hold its class's forward, as accelerate's hooks keep it."""
    plain = MethodType(type(layer).forward, layer)
    attributes = layer.__dict__.items()
    return [key for key, value in attributes if isinstance(value, MethodType) and value == plain]
