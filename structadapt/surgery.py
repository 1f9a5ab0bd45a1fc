"""Put adapters into a model and take their effect out again.

An adapted layer stays the object it was: its class becomes `AdaptedLinear`, it keeps its `weight`
and `bias` under their names, and gains the adapter's tensors. References, hooks and layers
registered under two names stay valid, and base checkpoints keep their keys.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from structadapt import quantised
from structadapt.adapted import Adapted
from structadapt.adapters.base import Adapter, generator_for
from structadapt.layers import (
    AdaptedLinear,
    adaptable_layers,
    adapted_layers,
    find_adapted,
    kind_of,
    matrix_of,
    matrix_shape,
)
from structadapt.planning import Plan, layer_plan
from structadapt.quantised import Dequantize
from structadapt.refusals import ATTRIBUTES, kept_forwards, refuse_layer, refuse_wrong_order
from structadapt.targets import Pattern, Target, select

Overrides = Mapping[Pattern, Mapping[str, Any]]

# -- adapting --------------------------------------------------------------------------------------


def adapt(
    model: nn.Module,
    adapter: Adapter,
    target: Target = "all-linear",
    exclude: Target = (),
    *,
    overrides: Overrides | None = None,
    dequantize: Dequantize | None = None,
    seed: int = 0,
) -> nn.Module:
    """Adapt the layers of `model` that `target` names, in place; returns the model.

    Every parameter that is not an adapter's is frozen. Call again, with other layers, for a second
    adapter. Fresh tensors depend on (seed, layer name) alone. If anything is refused the model is
    left as it was. On the meta device nothing is drawn: a layer starts when the base weights are
    loaded, or with its `reset_parameters()`.

    target: "all-linear" (every nn.Linear and transformers' Conv1D but the output head); a regular
        expression that matches the whole module path or what follows one of its dots ("q_proj"); a
        callable (name, module) -> bool; or several of these, each of which must match a layer.
        nn.Embedding, nn.Conv1d and nn.Conv2d are adapted where they are named.
    exclude: the same grammar, taken out of the target.
    overrides: pattern -> fields of the adapter that are other on the layers it matches, as in
        {"down_proj": {"rank": 32}}. Of several that match a layer, the first counts.
    dequantize: (module) -> W (out, in) for quantised linear layers of a kind that is not known
        here (torchao's and bitsandbytes' are): any subclass of nn.Linear can then be adapted.

    Raises TypeError if `adapter` is not an adapter or has no such field; ValueError if a pattern
    matches no layer (near names are shown), a layer is adapted already or does not suit the
    adapter; RuntimeError for a model that is compiled, sharded, merged or built under inference
    mode: adapt, then compile, then shard.
    """
    chosen = _choose(model, adapter, target, exclude, overrides, dequantize)
    fresh = {}
    for name, (layer, own) in chosen.items():
        with torch.no_grad(), _naming(name):
            fresh[name] = (own, own.init(matrix_of(layer, dequantize), generator_for(seed, name)))
    attach(model, fresh, seed, dequantize)
    return model


@torch.inference_mode(False)
def attach(
    model: nn.Module,
    layers: dict[str, tuple[Adapter, dict[str, Tensor]]],
    seed: int = 0,
    dequantize: Dequantize | None = None,
) -> None:
    """Give the named layers their adapters and tensors, and freeze all the rest.

    Raises ValueError or RuntimeError, before anything changes, for a layer that cannot carry an
    adapter or has an attribute of such a name.
    """
    for name, (_, tensors) in layers.items():
        layer = model.get_submodule(name)
        refuse_layer(name, layer, kind_of(layer, dequantize))
        for key in (*tensors, *ATTRIBUTES):
            if hasattr(layer, key):
                raise ValueError(f"{name} has an attribute {key} already: rename it, or exclude")
    for name, (adapter, tensors) in layers.items():
        _give(model.get_submodule(name), adapter, tensors, (seed, name), dequantize)
    trained = {id(p) for layer in adapted_layers(model).values() for p in layer.trained_tensors()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    _leave_fast_paths(model)


def _give(
    layer: nn.Module,
    adapter: Adapter,
    tensors: dict[str, Tensor],
    origin: tuple[int, str],
    dequantize: Dequantize | None,
) -> None:
    """Make a layer an adapted one. origin: (seed, name)."""
    forwards = kept_forwards(layer)
    layer.__class__ = kind_of(layer, dequantize)  # type: ignore[assignment]
    assert isinstance(layer, Adapted)
    layer.__dict__.update(dict.fromkeys(forwards, MethodType(type(layer).forward, layer)))
    if layer.is_quantised:
        layer.__dict__["dequantize"] = dequantize or quantised.dequantize
    layer.adapter, layer.enabled, layer.origin = adapter, True, origin
    layer.base_weight = layer.residual = None
    layer.tensor_names = tuple(tensors)
    for key, tensor in tensors.items():
        tensor = tensor.clone() if tensor.is_inference() else tensor  # or it could not train
        if key.startswith("frozen_"):
            layer.register_buffer(key, tensor)
        else:
            layer.register_parameter(key, nn.Parameter(tensor))
    layer.pending = layer.weight.is_meta
    layer.watch()


def _leave_fast_paths(model: nn.Module) -> None:
    """Have torch's transformer encoders call their adapted layers."""
    for module in model.modules():
        # In eval mode this class reads the weights of its layers and never calls them, unless one
        # of them has a hook.
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in (module.linear1, module.linear2):
                if isinstance(layer, AdaptedLinear) and not layer._forward_pre_hooks:
                    layer.register_forward_pre_hook(_no_op)
        # And this one packs padded inputs, which only that path can take.
        if isinstance(module, nn.TransformerEncoder) and find_adapted(module):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _no_op(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing."""


def _choose(
    model: nn.Module,
    adapter: Adapter,
    target: Target,
    exclude: Target,
    overrides: Overrides | None,
    dequantize: Dequantize | None,
) -> dict[str, tuple[nn.Module, Adapter]]:
    """The layers to adapt and the adapter of each, checked; nothing is changed."""
    if not isinstance(adapter, Adapter):
        known = ", ".join(f"{name}()" for name in Adapter.registry)
        raise TypeError(f"adapter must be one of {known}, got {adapter!r}")
    refuse_wrong_order(model)
    layers = adaptable_layers(model, dequantize)
    left_out = select(model, layers, exclude, "exclude")
    chosen = select(model, layers, target, "target")
    chosen = {name: layer for name, layer in chosen.items() if name not in left_out}
    if not chosen:
        raise ValueError(f"no layer to adapt: target {target!r}, exclude {exclude!r}")
    own = dict.fromkeys(chosen, adapter)
    if not isinstance(overrides or {}, Mapping):
        raise TypeError(f"overrides must map patterns to fields of the adapter, got {overrides!r}")
    for pattern, fields in reversed([*(overrides or {}).items()]):
        changed = _changed(adapter, pattern, fields)
        own.update(dict.fromkeys(select(model, chosen, pattern, "overrides"), changed))
    for name, layer in chosen.items():
        refuse_layer(name, layer, kind_of(layer, dequantize))
        with _naming(name):
            own[name] = own[name].resolved(*matrix_shape(layer))
    return {name: (layer, own[name]) for name, layer in chosen.items()}


def _changed(adapter: Adapter, pattern: Pattern, fields: Mapping[str, Any]) -> Adapter:
    """The adapter with some fields changed."""
    if not isinstance(fields, Mapping):
        raise TypeError(f"overrides[{pattern!r}] must be like {{'rank': 32}}, got {fields!r}")
    config = adapter.config()
    unknown = sorted(fields.keys() - config.keys())
    if unknown:
        raise TypeError(
            f"overrides[{pattern!r}]: {type(adapter).__name__} has no {unknown[0]}, only "
            f"{', '.join(config)}"
        )
    with _naming(f"overrides[{pattern!r}]"):
        return type(adapter)(**{**config, **fields})


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name in front of an adapter's complaint about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from None


# -- turning off -----------------------------------------------------------------------------------


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what the base model computes, bit for bit. Raises
    ValueError if the model is not adapted."""
    before = {layer: layer.enabled for layer in adapted_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


# -- looking ---------------------------------------------------------------------------------------


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained tensors of every adapter, for the optimizer. Raises ValueError if the model is
    not adapted."""
    return (p for layer in adapted_layers(model).values() for p in layer.trained_tensors())


def delta_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, W' - W) of each adapted layer, (out, in) in fp32; merged or not. Raises ValueError if
    the model is not adapted."""
    return ((name, layer.delta_weight()) for name, layer in adapted_layers(model).items())


def parameter_groups(
    model: nn.Module, lr: float, *, b_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer.

    b_ratio: learning rate of B over that of all else (LoRA+, Hayou et al. 2024).
    weight_decay: of A and B. Magnitudes, biases and gates have none: decay would pull them towards
        0, which is not where W' = W.

    Raises ValueError if the model is not adapted, or for a negative or not finite number.
    """
    for name, value in (("lr", lr), ("b_ratio", b_ratio), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number, not negative, got {value!r}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for layer in adapted_layers(model).values():
        for name, tensor in layer.tensors().items():
            if isinstance(tensor, nn.Parameter):
                spared = name.startswith((*layer.adapter.no_decay, "delta_bias"))
                rates = (lr * b_ratio if name == "B" else lr, 0.0 if spared else weight_decay)
                groups.setdefault(rates, []).append(tensor)
    return [
        {"params": tensors, "lr": rate, "weight_decay": decay}
        for (rate, decay), tensors in groups.items()
    ]


def plan(
    model: nn.Module,
    adapter: Adapter,
    target: Target = "all-linear",
    exclude: Target = (),
    *,
    overrides: Overrides | None = None,
    dequantize: Dequantize | None = None,
) -> Plan:
    """What `adapt` with the same arguments would do; nothing changes. Raises what it raises."""
    rows = []
    chosen = _choose(model, adapter, target, exclude, overrides, dequantize)
    for name, (layer, own) in chosen.items():
        with _naming(name):
            rows.append(layer_plan(name, own, layer))
    return Plan(rows, _base_parameters(model))


def summary(model: nn.Module) -> Plan:
    """The plan of an adapted model: its layers, parameters, FLOPs and memory. Raises ValueError if
    it is not adapted."""
    rows = [layer_plan(name, m.adapter, m) for name, m in adapted_layers(model).items()]
    return Plan(rows, _base_parameters(model))


def _base_parameters(model: nn.Module) -> int:
    ours = {id(p) for layer in find_adapted(model).values() for p in layer.trained_tensors()}
    return sum(p.numel() for p in model.parameters() if id(p) not in ours)
