"""Put adapters into a model and take their effect out again.

An adapted layer stays the object it was: its class becomes `AdaptedLinear`, it keeps its `weight`
and `bias` under their names, and gains the adapter's tensors. References, hooks and layers
registered under two names stay valid, and base checkpoints keep their keys.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structadapt.adapters.base import Adapter
from structadapt.layers import AdaptedLinear, adapted_layers, find_adapted, linear_layers
from structadapt.planning import Plan, layer_plan
from structadapt.targets import Target, select

# -- adapting --------------------------------------------------------------------------------------


def adapt(
    model: nn.Module,
    adapter: Adapter,
    target: Target = "all-linear",
    exclude: Target = (),
    *,
    seed: int = 0,
) -> nn.Module:
    """Adapt the layers of `model` that `target` names, in place; returns the model.

    Every parameter that is not an adapter's is frozen. Call again, with other layers, for a second
    adapter. Fresh tensors depend on (seed, layer name) alone. If anything is refused the model is
    left as it was.

    target: "all-linear" (every nn.Linear but the output head); a regular expression that matches
        the whole module path or what follows one of its dots ("q_proj"); a callable
        (name, module) -> bool; or several of these, each of which must match a layer.
    exclude: the same grammar, taken out of the target.

    Raises TypeError if `adapter` is not an adapter; ValueError if a pattern matches no layer (near
    names are shown), a layer is adapted already or does not suit the adapter; RuntimeError for a
    model that is compiled, sharded, or built under inference mode: adapt, then compile, then shard.
    """
    chosen = _choose(model, adapter, target, exclude)
    fresh = {}
    for name, layer in chosen.items():
        with torch.no_grad(), _naming(name):
            fresh[name] = adapter.init(layer.weight, generator_for(seed, name))
    attach(model, {name: (adapter, tensors) for name, tensors in fresh.items()})
    return model


def attach(model: nn.Module, layers: dict[str, tuple[Adapter, dict[str, Tensor]]]) -> None:
    """Give the named nn.Linear layers their adapters and tensors, and freeze all the rest.

    Raises ValueError, before anything changes, for a layer that has an attribute of such a name.
    """
    for name, (_, tensors) in layers.items():
        for key in tensors:
            if hasattr(model.get_submodule(name), key):
                raise ValueError(f"{name} has an attribute {key} already: rename it, or exclude")
    for name, (adapter, tensors) in layers.items():
        layer = model.get_submodule(name)
        layer.__class__ = AdaptedLinear
        assert isinstance(layer, AdaptedLinear)
        layer.adapter, layer.enabled, layer.base_weight = adapter, True, None
        layer.tensor_names = tuple(tensors)
        for key, tensor in tensors.items():
            if key.startswith("frozen_"):
                layer.register_buffer(key, tensor)
            else:
                layer.register_parameter(key, nn.Parameter(tensor))
    trained = {id(p) for layer in adapted_layers(model).values() for p in layer.trained_tensors()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for module in model.modules():
        # In eval mode this class reads the weights of its layers and never calls them, unless one
        # of them has a hook.
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in (module.linear1, module.linear2):
                if isinstance(layer, AdaptedLinear) and not layer._forward_pre_hooks:
                    layer.register_forward_pre_hook(_no_op)


def _no_op(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing."""


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, layer name): the same on every rank and in any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _choose(
    model: nn.Module, adapter: Adapter, target: Target, exclude: Target
) -> dict[str, nn.Linear]:
    """The layers to adapt, checked; nothing is changed."""
    if not isinstance(adapter, Adapter):
        known = ", ".join(f"{name}()" for name in Adapter.registry)
        raise TypeError(f"adapter must be one of {known}, got {adapter!r}")
    refuse_wrong_order(model)
    layers = linear_layers(model)
    left_out = select(model, layers, exclude, "exclude")
    chosen = select(model, layers, target, "target")
    chosen = {name: layer for name, layer in chosen.items() if name not in left_out}
    if not chosen:
        raise ValueError(f"no layer to adapt: target {target!r}, exclude {exclude!r}")
    for name, layer in chosen.items():
        if isinstance(layer, AdaptedLinear):
            raise ValueError(f"{name} is adapted already, with {layer.adapter}; exclude it")
        if "weight" not in layer._parameters:
            raise ValueError(
                f"{name}: its weight is computed by weight_norm, prune or the like, which would "
                "undo a merge: remove that first"
            )
        if not layer.weight.numel():
            raise ValueError(f"{name}: its weight is empty, {tuple(layer.weight.shape)}")
        if not layer.weight.is_floating_point():
            raise ValueError(f"{name}: cannot adapt a weight of dtype {layer.weight.dtype}")
        if layer.weight.is_inference():
            raise RuntimeError(
                f"{name} was built under torch.inference_mode() and cannot be trained through; "
                "build the model outside it"
            )
    return chosen


def refuse_wrong_order(model: nn.Module) -> None:
    """RuntimeError for a model that is compiled, sharded or merged."""
    for name, module in model.named_modules():
        label = name or type(module).__name__
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise RuntimeError(f"{label} is compiled: adapt first, then compile, then shard")
        if any(hasattr(p, "device_mesh") for p in module.parameters(recurse=False)):
            raise RuntimeError(f"{label} is sharded: adapt first, then compile, then shard")
        if isinstance(module, AdaptedLinear) and module.base_weight is not None:
            raise RuntimeError(f"{label} is merged: unmerge first")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name in front of an adapter's complaint about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


# -- turning off, merging --------------------------------------------------------------------------


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what the base model computes, bit for bit."""
    before = {layer: layer.enabled for layer in adapted_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put W' in the place of W in every adapted layer; `unmerge` brings W back bit for bit.

    W' is computed in at least fp32 and rounded to the dtype of W; in bf16 most of a small update
    is lost to that rounding. W itself is kept aside, so the model holds both while merged.

    Raises RuntimeError if the model is merged already; ValueError if a weight is shared with
    another module, which would change with it, or if W' is not finite. Nothing is changed then.
    """
    layers = adapted_layers(model)
    merged_already = [name for name, layer in layers.items() if layer.base_weight is not None]
    if merged_already:
        raise RuntimeError(f"{merged_already[0]} is merged already; unmerge first")
    owners = {id(layer.weight): name for name, layer in layers.items()}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner = owners.get(id(parameter), name)
            if owner != name:
                raise ValueError(f"{owner} and {name} share a weight: merging would change both")
    merged_weights = {}
    for name, layer in layers.items():
        merged_weights[name] = layer.adapter.weight(layer.weight, layer.tensors())
        if not torch.isfinite(merged_weights[name]).all():
            raise ValueError(f"{name}: the merged weight is not finite; nothing was merged")
    try:
        for name, layer in layers.items():
            layer.base_weight = layer.weight.data
            layer.weight.data = merged_weights[name]
    except BaseException:  # an interrupt between two layers
        _unmerge(model)
        raise


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Bring back the base weights, bit for bit. Raises RuntimeError if none is merged."""
    if not _unmerge(model):
        raise RuntimeError("the model is not merged")


def _unmerge(model: nn.Module) -> bool:
    """Bring back what is merged; whether anything was."""
    layers = [m for m in adapted_layers(model).values() if m.base_weight is not None]
    for layer in layers:
        assert layer.base_weight is not None
        layer.weight.data = layer.base_weight
        layer.base_weight = None
    return bool(layers)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within this context the model runs on merged weights: for rollouts and evaluation."""
    merge(model)
    try:
        yield
    finally:
        _unmerge(model)


# -- looking ---------------------------------------------------------------------------------------


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained tensors of every adapter, for the optimizer."""
    return (p for layer in adapted_layers(model).values() for p in layer.trained_tensors())


def delta_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, W' - W) of each adapted layer, (out, in) in fp32; merged or not."""
    return ((name, layer.delta_weight()) for name, layer in adapted_layers(model).items())


def plan(
    model: nn.Module, adapter: Adapter, target: Target = "all-linear", exclude: Target = ()
) -> Plan:
    """What `adapt` with the same arguments would do; nothing changes. Raises what it raises."""
    chosen = _choose(model, adapter, target, exclude)
    rows = []
    for name, layer in chosen.items():
        with _naming(name):
            rows.append(layer_plan(name, adapter, layer.out_features, layer.in_features))
    return Plan(rows, _base_parameters(model))


def summary(model: nn.Module) -> Plan:
    """The plan of an adapted model: its layers, parameters and FLOPs."""
    layers = adapted_layers(model).items()
    rows = [layer_plan(n, m.adapter, m.out_features, m.in_features) for n, m in layers]
    return Plan(rows, _base_parameters(model))


def _base_parameters(model: nn.Module) -> int:
    ours = {id(p) for layer in find_adapted(model).values() for p in layer.trained_tensors()}
    return sum(p.numel() for p in model.parameters() if id(p) not in ours)
