"""Save adapters and load them: what is written, and whether a file fits a model."""

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor, nn

from structadapt.adapted import Adapted, whole
from structadapt.adapter_file import FORMAT, AdapterFileError, SavedLayer, read_adapters
from structadapt.bounds import few
from structadapt.files import UNSEALED, sealed, write_atomically
from structadapt.layers import (
    adaptable_layers,
    adapted_layers,
    find_adapted,
    matrix_of,
    matrix_shape,
    plain_name,
    unwrapped,
)
from structadapt.refusals import refuse_wrong_order
from structadapt.surgery import attach
from structadapt.targets import near

SAMPLE = 1024  # values of a weight in its fingerprint


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`, and nothing of the base, to a safetensors file.

    Atomic: the file at `path` is the old one or the whole new one, whatever happens. The same
    adapters give the same bytes. A sharded model is saved whole: call it on every rank. Raises
    ValueError if the model is not adapted or not finite, OSError if the file cannot be written.
    """
    layers = {plain_name(n): layer for n, layer in adapted_layers(unwrapped(model)).items()}
    header = {
        "format": FORMAT,
        "sha256": UNSEALED,
        "version": version("structadapt"),
        "torch": torch.__version__,
        "layers": {
            name: {
                "adapter": type(layer.adapter).__name__,
                "config": layer.adapter.config(),
                "shape": list(matrix_shape(layer)),
                "base": fingerprint(layer.matrix()),
            }
            for name, layer in layers.items()
        },
    }
    tensors = {
        f"{name}.{key}": whole(tensor.detach()).contiguous().cpu()
        for name, layer in layers.items()
        for key, tensor in layer.tensors().items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: not saved")
    metadata = {"structadapt": json.dumps(header)}
    write_atomically(Path(path), sealed(safetensors.torch.save(tensors, metadata)))


def load_file(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> nn.Module:
    """`structadapt.load` of a file that `save` wrote, with its arguments and errors."""
    refuse_wrong_order(model)
    saved = read_adapters(path, lambda layers: refuse_misfit(model, layers, path, check_base))
    fill(model, saved)
    return model


def refuse_misfit(
    model: nn.Module,
    saved: dict[str, SavedLayer],
    source: str | os.PathLike[str],
    check_base: bool = True,
) -> None:
    """AdapterFileError if the layers of a file cannot go onto the model."""
    adapted, candidates = find_adapted(model), adaptable_layers(model)
    lost = [name for name in saved if name not in candidates]
    differences = [
        f"the model has no layer {name:.200} to adapt{near(name, candidates)}" for name in lost[:3]
    ]
    differences += lost[3:]  # as many as the file likes: only counted
    there = {name: layer for name, layer in saved.items() if name in candidates}
    found = (_difference(n, layer, candidates[n], check_base) for n, layer in there.items())
    differences += [difference for difference in found if difference]
    if adapted:
        bare = candidates.keys() - adapted.keys()
        differences += [f"the file has no {name}" for name in adapted if name not in saved]
        differences += [f"{name} is not adapted" for name in saved if name in bare]
    if differences:
        raise AdapterFileError(
            f"{source} does not fit this model: {few(differences, between='; ')}"
        )
    for name in saved:
        if cast(Tensor, candidates[name].weight).is_meta:
            raise RuntimeError(f"{name} is on the meta device: load the base weights first")


def fill(model: nn.Module, saved: dict[str, SavedLayer]) -> None:
    """Adapt a bare model with layers that fit, in its order, or fill those of an adapted one."""
    adapted, layers = find_adapted(model), adaptable_layers(model)
    if not adapted:
        order = [name for name in layers if name in saved]
        attach(model, {n: (saved[n].adapter, saved[n].like(layers[n])) for n in order})
        return
    with torch.no_grad():
        for name, layer in saved.items():
            for key, tensor in adapted[name].tensors().items():
                tensor.copy_(layer.tensors[key])
            adapted[name].pending = False


def fingerprint(W: Tensor) -> str:
    """Two short digests of a weight (out, in), of its shape and a sample of its values: rounded to
    bf16, and rounded to fp16 before. A base that is kept in another dtype has one of them too."""
    W = whole(W.detach())
    step = max(1, W.numel() // SAMPLE) | 1  # odd, or it could meet a few columns alone
    places = torch.arange(0, W.numel(), step, device=W.device)
    values = W[places // W.shape[1], places % W.shape[1]].cpu()
    shape = str(tuple(W.shape)).encode()
    digests = [
        hashlib.sha256(shape + v.bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()[:16]
        for v in (values, values.half())
    ]
    return "-".join(digests)


def has_base(layer: nn.Module, saved: str | None) -> bool:
    """Whether a layer's weight and a saved fingerprint have a digest in common, or one is not
    there: no fingerprint, or a weight on the meta device."""
    if saved is None or cast(Tensor, layer.weight).is_meta:
        return True
    return bool({*fingerprint(matrix_of(layer)).split("-")} & {*str(saved).split("-")})


def _difference(name: str, saved: SavedLayer, layer: nn.Module, check_base: bool) -> str | None:
    """What keeps a saved layer from going onto one of the model, or None."""
    shape = matrix_shape(layer)
    if shape != saved.shape:
        return f"{name} is {shape[0]} x {shape[1]} (out x in), the file has {saved.shape}"
    if isinstance(layer, Adapted):
        if layer.adapter != saved.adapter:
            return f"{name} has {layer.adapter}, the file {saved.adapter}"
        if layer.tensors().keys() != saved.tensors.keys():
            found, given = (", ".join(sorted(t)) for t in (layer.tensors(), saved.tensors))
            return f"{name} has the tensors {found}, the file {given}"
    if check_base and not has_base(layer, saved.base):
        return (
            f"{name} has another base weight than the one that this adapter was saved over: load "
            "the right base, or pass check_base=False"
        )
    return None
