"""Save and load adapters: one safetensors file, its configuration in the metadata.

Tensors are named `<layer>.<tensor>` as in the adapted model's state dict. The metadata has one
entry, "structadapt", a JSON object:

    {"format": 1, "version": "0.1.0",
     "layers": {name: {"adapter": "LoRA", "config": {...}, "shape": [out, in]}}}  in model order
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structadapt.adapted import Adapted
from structadapt.adapters.base import Adapter
from structadapt.layers import (
    adaptable_layers,
    adapted_layers,
    find_adapted,
    matrix_shape,
)
from structadapt.ops import wide_dtype
from structadapt.surgery import attach, refuse_wrong_order
from structadapt.targets import near

FORMAT = 1
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_WIDTH = 2**24  # of a layer in a file


class AdapterFileError(ValueError):
    """A file that is not a whole adapter file, or not one for this model."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`, and nothing of the base, to a safetensors file.

    Atomic: the file at `path` is the old one or the whole new one, whatever happens. The same
    adapters give the same bytes. Raises ValueError if the model is not adapted or a tensor is not
    finite, OSError if the file cannot be written.
    """
    layers = {_uncompiled(name): layer for name, layer in adapted_layers(model).items()}
    header = {
        "format": FORMAT,
        "version": version("structadapt"),
        "layers": {
            name: {
                "adapter": type(layer.adapter).__name__,
                "config": layer.adapter.config(),
                "shape": list(matrix_shape(layer)),
            }
            for name, layer in layers.items()
        },
    }
    tensors = {
        f"{name}.{key}": tensor.detach().contiguous().cpu()
        for name, layer in layers.items()
        for key, tensor in layer.tensors().items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: not saved")
    metadata = {"structadapt": json.dumps(header)}
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Put the adapters of a file into `model`, in place; returns the model.

    A bare model is adapted as the file says and its other parameters are frozen; a model that is
    adapted already must have the same adapters on the same layers. Everything is checked before
    anything changes.

    Raises FileNotFoundError; AdapterFileError (a ValueError) for a file that is truncated,
    damaged, from a newer format, not finite, or for another model, naming what differs;
    RuntimeError for a model that is compiled, sharded, merged or on the meta device.
    """
    refuse_wrong_order(model)
    saved = read_adapters(path)
    adapted = find_adapted(model)
    candidates = adaptable_layers(model)
    found = (_difference(name, layer, candidates) for name, layer in saved.items())
    differences = [difference for difference in found if difference]
    if adapted:
        bare = candidates.keys() - adapted.keys()
        differences += [f"the file has no {name}" for name in adapted if name not in saved]
        differences += [f"{name} is not adapted" for name in saved if name in bare]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        shown = "; ".join(differences[:3])
        raise AdapterFileError(f"{path} does not fit this model: {shown}{more}")
    for name in saved:
        if cast(Tensor, candidates[name].weight).is_meta:
            raise RuntimeError(f"{name} is on the meta device: load the base weights first")
    if not adapted:
        attach(model, {n: (layer.adapter, layer.like(candidates[n])) for n, layer in saved.items()})
        return model
    with torch.no_grad():
        for name, layer in saved.items():
            for key, tensor in adapted[name].tensors().items():
                tensor.copy_(layer.tensors[key])
    return model


@dataclass(frozen=True)
class SavedLayer:
    """One layer of an adapter file."""

    adapter: Adapter
    shape: tuple[int, int]  # (out, in)
    tensors: dict[str, Tensor]

    def like(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors on the device of a layer, in the adapter dtype over it."""
        weight = cast(Tensor, layer.weight)
        return {k: t.to(weight.device, wide_dtype(weight.dtype)) for k, t in self.tensors.items()}


def is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file was written by `save`, from its header alone."""
    with _whole(path), safetensors.safe_open(path, "pt") as file:
        return "structadapt" in (file.metadata() or {})


def read_adapters(path: str | os.PathLike[str]) -> dict[str, SavedLayer]:
    """The layers of an adapter file by name, checked in themselves. Errors as for `load`."""
    data = Path(path).read_bytes()
    with _whole(path):
        tensors = safetensors.torch.load(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
    if "structadapt" not in metadata:
        raise AdapterFileError(f"{path} is no structadapt adapter file: its metadata do not say so")
    try:
        header = json.loads(metadata["structadapt"])
        if header["format"] != FORMAT:
            raise AdapterFileError(
                f"{path} has format {header['format']!r}, this version reads {FORMAT}: "
                "update structadapt"
            )
        described = {n: _describe(entry) for n, entry in header["layers"].items()}
        expected = {n: a.init(torch.empty(s, device="meta")) for n, (a, s) in described.items()}
    except AdapterFileError:
        raise
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise AdapterFileError(f"{path}: its description is damaged: {error!r}") from None
    if not described:
        raise AdapterFileError(f"{path} holds no layer")
    layers = {
        name: SavedLayer(adapter, shape, _take(path, tensors, name, expected[name]))
        for name, (adapter, shape) in described.items()
    }
    if tensors:
        raise AdapterFileError(f"{path} has tensors of no layer: {', '.join(sorted(tensors)[:3])}")
    return layers


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file. AdapterFileError if it is truncated or damaged."""
    with _whole(path):
        return safetensors.torch.load_file(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds its old content or all of `data`, even after a crash.

    A file that exists keeps its mode; a link keeps pointing.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # this call's alone
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a damaged safetensors file raises into an AdapterFileError."""
    try:
        yield
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is truncated or no safetensors file: {error}") from None


def _uncompiled(name: str) -> str:
    """The name that a layer had before torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _describe(entry: dict[str, Any]) -> tuple[Adapter, tuple[int, int]]:
    """The adapter and (out, in) of one layer's entry in the metadata."""
    kind, config = entry["adapter"], dict(entry["config"])
    if kind not in Adapter.registry:
        raise ValueError(f"unknown adapter {kind!r}: known are {', '.join(Adapter.registry)}")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    out_features, in_features = entry["shape"]
    if not all(type(n) is int and 0 < n <= LARGEST_WIDTH for n in (out_features, in_features)):
        raise ValueError(f"impossible shape {entry['shape']!r}")
    adapter = Adapter.registry[kind](**config)
    return adapter.resolved(out_features, in_features), (out_features, in_features)


def _take(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    name: str,
    expected: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Move one layer's tensors out of `tensors`, each there, of the right shape and finite."""
    taken = {}
    for key, like in expected.items():
        tensor = tensors.pop(f"{name}.{key}", None)
        if tensor is None:
            raise AdapterFileError(f"{path}: {name}.{key} is missing")
        if tensor.shape != like.shape or tensor.dtype not in FLOATS:
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"{path}: {name}.{key} is {found}, expected floats of shape {tuple(like.shape)}"
            )
        if not torch.isfinite(tensor.float()).all():
            raise AdapterFileError(f"{path}: {name}.{key} is not finite in fp32")
        taken[key] = tensor
    return taken


def _difference(name: str, saved: SavedLayer, candidates: dict[str, nn.Module]) -> str | None:
    """What keeps a saved layer from going onto the model, or None."""
    layer = candidates.get(name)
    if layer is None:
        return f"the model has no layer {name} to adapt{near(name, candidates)}"
    shape = matrix_shape(layer)
    if shape != saved.shape:
        return f"{name} is {shape[0]} x {shape[1]} (out x in), the file has {saved.shape}"
    if isinstance(layer, Adapted) and layer.adapter != saved.adapter:
        return f"{name} has {layer.adapter}, the file {saved.adapter}"
    return None
