"""Save and load adapters: one safetensors file, its configuration in the metadata.

Tensors are named `<layer>.<tensor>` as in the adapted model's state dict. The metadata has one
entry, "structadapt", a JSON object:

    {"format": 1, "version": "0.1.0", "torch": "2.13.0",
     "layers": {name: {"adapter": "LoRA", "config": {...}, "shape": [out, in],
                       "base": fingerprint of the frozen weight}}}  in model order
"""

import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structadapt.adapted import Adapted, whole
from structadapt.adapters.base import Adapter
from structadapt.files import write_atomically
from structadapt.layers import (
    adaptable_layers,
    adapted_layers,
    find_adapted,
    matrix_of,
    matrix_shape,
    plain_name,
    unwrapped,
)
from structadapt.ops import wide_dtype
from structadapt.refusals import refuse_wrong_order
from structadapt.surgery import attach
from structadapt.targets import near

FORMAT = 1
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_WIDTH = 2**24  # of a layer in a file
SAMPLE = 1024  # values of a weight in its fingerprint


class AdapterFileError(ValueError):
    """A file that is not a whole adapter file, or not one for this model."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`, and nothing of the base, to a safetensors file.

    Atomic: the file at `path` is the old one or the whole new one, whatever happens. The same
    adapters give the same bytes. A sharded model is saved whole: call it on every rank. Raises
    ValueError if the model is not adapted or not finite, OSError if the file cannot be written.
    """
    layers = {plain_name(n): layer for n, layer in adapted_layers(unwrapped(model)).items()}
    header = {
        "format": FORMAT,
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
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def load_file(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> nn.Module:
    """Put the adapters of a file into `model`, in place; returns the model.

    A bare model is adapted as the file says and its other parameters are frozen; a model that is
    adapted already must have the same adapters on the same layers. Everything is checked before
    anything changes. The base weights must be those that the adapters were saved over, as far as
    bf16 tells; `check_base=False` is for other ones on purpose, such as a quantised base.

    Raises FileNotFoundError; AdapterFileError (a ValueError) for a file that is truncated,
    damaged, from a newer format, not finite, or for another model or base, naming what differs;
    RuntimeError for a model that is compiled, sharded, merged or on the meta device.
    """
    refuse_wrong_order(model)
    saved = read_adapters(path)
    refuse_misfit(model, saved, path, check_base)
    fill(model, saved)
    return model


def refuse_misfit(
    model: nn.Module,
    saved: "dict[str, SavedLayer]",
    source: str | os.PathLike[str],
    check_base: bool = True,
) -> None:
    """AdapterFileError if the layers of a file cannot go onto the model."""
    adapted, candidates = find_adapted(model), adaptable_layers(model)
    found = (_difference(name, layer, candidates, check_base) for name, layer in saved.items())
    differences = [difference for difference in found if difference]
    if adapted:
        bare = candidates.keys() - adapted.keys()
        differences += [f"the file has no {name}" for name in adapted if name not in saved]
        differences += [f"{name} is not adapted" for name in saved if name in bare]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        shown = "; ".join(differences[:3])
        raise AdapterFileError(f"{source} does not fit this model: {shown}{more}")
    for name in saved:
        if cast(Tensor, candidates[name].weight).is_meta:
            raise RuntimeError(f"{name} is on the meta device: load the base weights first")


def fill(model: nn.Module, saved: "dict[str, SavedLayer]") -> None:
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


@dataclass(frozen=True)
class SavedLayer:
    """One layer of an adapter file."""

    adapter: Adapter
    shape: tuple[int, int]  # (out, in)
    tensors: dict[str, Tensor]
    base: str | None = None  # fingerprint of the weight it was saved over

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
    layers = saved_layout(path, metadata, tensors)
    whole = {
        name: replace(layer, tensors=_take(path, tensors, name, layer.tensors))
        for name, layer in layers.items()
    }
    if tensors:
        raise AdapterFileError(f"{path} has tensors of no layer: {', '.join(sorted(tensors)[:3])}")
    return whole


def saved_layout(
    path: str | os.PathLike[str], metadata: Mapping[str, str], names: Container[str]
) -> dict[str, SavedLayer]:
    """The layers of an adapter file from its metadata and the names of its tensors alone: their
    tensors are on the meta device. Raises AdapterFileError."""
    if "structadapt" not in metadata:
        raise AdapterFileError(
            f"{path} is no structadapt adapter file (one of PEFT is loaded by its folder)"
        )
    try:
        header = json.loads(metadata["structadapt"], object_pairs_hook=without_doubles)
        if header["format"] != FORMAT:
            raise AdapterFileError(
                f"{path} has format {header['format']!r}, this version reads {FORMAT}: "
                "update structadapt"
            )
        described = {n: _describe(entry) for n, entry in header["layers"].items()}
        expected = {n: a.init(torch.empty(s, device="meta")) for n, (a, s) in described.items()}
        for name, (_, shape) in described.items():
            if f"{name}.delta_bias" in names:
                expected[name]["delta_bias"] = torch.empty(shape[0], device="meta")
        bases = {n: entry.get("base") for n, entry in header["layers"].items()}
    except AdapterFileError:
        raise
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise AdapterFileError(f"{path}: its description is damaged: {error!r}") from None
    if not described:
        raise AdapterFileError(f"{path} holds no layer")
    return {n: SavedLayer(a, s, expected[n], bases[n]) for n, (a, s) in described.items()}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file. AdapterFileError if it is truncated or damaged."""
    with _whole(path):
        return safetensors.torch.load_file(path)


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a damaged safetensors file raises into an AdapterFileError."""
    try:
        yield
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is truncated or no safetensors file: {error}") from None


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, which would take the last of two values for a name. Raises ValueError."""
    names = [name for name, _ in pairs]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"{doubles[0]!r} is there twice")
    return dict(pairs)


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


def _difference(
    name: str, saved: SavedLayer, candidates: dict[str, nn.Module], check_base: bool
) -> str | None:
    """What keeps a saved layer from going onto the model, or None."""
    layer = candidates.get(name)
    if layer is None:
        return f"the model has no layer {name} to adapt{near(name, candidates)}"
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
