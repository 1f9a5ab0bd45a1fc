"""Layers that read the same input, as q, k, v of an attention or gate and up of an MLP do."""

from torch import Tensor, nn

from structadapt import ops
from structadapt.adapters.lora import LoRA
from structadapt.layers import AdaptedLinear
from structadapt.onlookers import HOOKS, has_hooks


def shared_input(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """(layer(x), ...) for x (..., in): one pass over x for the adapters of all of them.

    For the forward of a model of your own:

        q, k, v = sa.shared_input(x, self.q_proj, self.k_proj, self.v_proj)

    Linear layers with LoRA share the product with A, and in the backward the one for dA and the
    sum of dx. Any other layer (without an adapter, with another one, merged, disabled, with hooks)
    makes it what it says: each of them called with x. So do autocast, torch.compile and a few
    rows. Where the pass is shared a second derivative raises RuntimeError.
    """
    if not all(map(_can_share, layers)):
        return tuple(layer(x) for layer in layers)
    found = []
    for layer in layers:
        assert isinstance(layer, AdaptedLinear) and isinstance(layer.adapter, LoRA)
        layer.check_dtype(x)
        p = layer.tensors()
        found.append((layer.weight, layer.adapted_bias(p), p["A"], p["B"], layer.adapter.scale))
    return ops.lora_shared_linear(x, found)


def _can_share(layer: nn.Module) -> bool:
    return (
        type(layer) is AdaptedLinear
        and type(layer.adapter) is LoRA
        and layer.enabled
        and layer.base_weight is None
        and not layer.pending
        and "forward" not in vars(layer)
        and not has_hooks(layer)
        and not any(getattr(nn.modules.module, f"_global{name}") for name in HOOKS)
    )
