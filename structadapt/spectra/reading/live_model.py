"""A module in memory as a source: its weights, or the updates of its adapters."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from structadapt.adapted import Adapted
from structadapt.adapters import DoRA, LoRA
from structadapt.layers import find_adapted, kind_of, matrix_of, matrix_shape, unwrapped
from structadapt.quantised import is_quantised
from structadapt.spectra.reading.adapter_updates import Update
from structadapt.spectra.reading.matrix import Skipped, Stored, kernel, stored_tensor
from structadapt.spectra.reading.names import module_path
from structadapt.spectra.reading.peft_folder import refuse_variants

SOURCE = "model"


def weights(model: nn.Module, adapted: bool) -> dict[str, Stored]:
    """Every parameter and buffer by name, as the matrix (out, in) where a module says what it is.

    An adapted layer counts with its frozen weight, or, `adapted`, with its adapted one.
    """
    found: dict[str, Stored] = {}
    model = unwrapped(model)
    of_peft = {
        id(m)
        for _, layer, parts in _peft_layers(model)
        for part in parts
        for m in getattr(layer, part).modules()
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) or id(module) in of_peft:
            continue
        own = module.tensor_names if isinstance(module, Adapted) else ()
        for key, tensor in _tensors(module):
            if key not in own:
                path = f"{name}.{key}" if name else key
                found[path] = _weight(path, module, key, tensor, adapted)
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of one module, its buffers, and what it computes as a parameter."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
    if parametrize.is_parametrized(module):
        for key in cast(Any, module.parametrizations):
            with torch.no_grad():
                yield key, getattr(module, key)


def _weight(path: str, module: nn.Module, key: str, tensor: Tensor, adapted: bool) -> Stored:
    stored = stored_tensor(path, tensor.detach(), SOURCE)
    if key in module._buffers:
        return _with_problem(stored, "a buffer, no weight")
    if key != "weight" or not (isinstance(module, Adapted) or kind_of(module)):
        return stored
    if stored.problem and not is_quantised(module):
        return stored
    if isinstance(module, Adapted):
        return _adapted(path, module) if adapted else base_of(path, module)
    return base_of(path, module)


def base_of(name: str, layer: nn.Module) -> Stored:
    """W (out, in) of a layer that carries or can carry an adapter; a quantised one is dequantised
    for each part that is read."""
    if getattr(layer, "is_quantised", False) or is_quantised(layer):

        def read(start: int, stop: int) -> Tensor:
            return matrix_of(layer).reshape(-1)[start:stop].float().cpu()

        return Stored(name, matrix_shape(layer), "float32", SOURCE, read)
    W = matrix_of(layer)
    problem = stored_tensor(name, W, SOURCE)
    if problem.problem or W.dim() != 2:
        return problem
    turned = not W.is_contiguous() and W.T.is_contiguous()
    return stored_tensor(name, W.T if turned else W, SOURCE, transposed=turned)


def _adapted(name: str, layer: Adapted) -> Stored:
    """W' in float64, with an update that is rounded to fp32."""
    base = base_of(name, layer)

    def read(start: int, stop: int) -> Tensor:
        W = layer.matrix().double() + layer.delta_weight()
        return (W.T if base.transposed else W).reshape(-1)[start:stop].cpu()

    return Stored(
        name, base.shape, "float64", SOURCE, read, base.problem, base.transposed, rounded=False
    )


def _with_problem(stored: Stored, problem: str) -> Stored:
    return Stored(stored.name, stored.shape, stored.dtype, SOURCE, stored.read, problem)


# -- adapters --------------------------------------------------------------------------------------


def updates(model: nn.Module) -> tuple[list[Update], list[Skipped], list[str]]:
    """The updates of the layers that this library adapted, or PEFT with LoRA or DoRA."""
    model = unwrapped(model)
    found = [_update(name, layer) for name, layer in find_adapted(model).items()]
    skipped, notes = [], []
    for name, module, parts in _peft_layers(model):
        try:
            refuse_variants(parts)
            found.append(_peft_update(module_path(name), cast(Any, module), notes))
        except ValueError as error:
            skipped.append(Skipped(module_path(name), (), "none", SOURCE, str(error)))
    return found, skipped, list(dict.fromkeys(notes))


def _update(name: str, layer: Adapted) -> Update:
    tensors = {
        key: stored_tensor(f"{name}.{key}", tensor.detach(), SOURCE)
        for key, tensor in layer.tensors().items()
        if key != "delta_bias"
    }
    base = base_of(f"{name}.weight", layer)
    return Update(module_path(name), layer.adapter, matrix_shape(layer), tensors, base)


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, set[str]]]:
    """(name, layer, its parts beside the base layer) of each layer that PEFT wraps."""
    for name, module in model.named_modules(remove_duplicate=False):
        peft = hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")
        if peft and not isinstance(module, Adapted):
            parts = {key.partition(".")[0] for key, _ in module.named_parameters()}
            yield name, module, parts - {"base_layer"}


def _peft_update(name: str, layer: Any, notes: list[str]) -> Update:
    """The first active adapter of a LoRA layer of PEFT. ValueError if there is none, or its scale
    is not positive."""
    embedding = bool(getattr(layer, "lora_embedding_A", None))
    A, B = (
        (layer.lora_embedding_A, layer.lora_embedding_B)
        if embedding
        else (layer.lora_A, layer.lora_B)
    )
    active = [key for key in layer.active_adapters if key in A]
    if not active:
        raise ValueError(f"none of its adapters, {', '.join(A)}, is active")
    key = active[0]
    if len(active) > 1:
        notes.append(f"of the active adapters {', '.join(active)}, {key} is looked at")
    factors = {"A": A[key], "B": B[key]}
    tensors = {
        part: stored_tensor(f"{name}.lora_{part}.{key}", getattr(module, "weight", module), SOURCE)
        for part, module in factors.items()
    }
    tensors = {p: kernel(t) if len(t.shape) > 2 else t for p, t in tensors.items()}
    rank, width = tensors["A"].shape
    shape = (tensors["B"].shape[0], width)
    kind = LoRA
    if key in getattr(layer, "lora_magnitude_vector", {}):
        kind = DoRA
        m = layer.lora_magnitude_vector[key].weight.detach().reshape(-1)
        tensors["m"] = stored_tensor(f"{name}.lora_magnitude_vector.{key}", m, SOURCE)
    base = None
    if layer.merged:
        notes.append("the adapters of PEFT are merged: the base weights are not known")
    elif kind_of(layer.base_layer) or is_quantised(layer.base_layer):
        base = base_of(f"{name}.weight", layer.base_layer)
    adapter = kind(rank, layer.scaling[key], "constant")
    return Update(name, adapter, shape, tensors, base)
