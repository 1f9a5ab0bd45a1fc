"""What an adapter file says, checked in itself.

Tensors are named `<layer>.<tensor>` as in the adapted model's state dict. The metadata has one
entry, "structadapt", a JSON object:

    {"format": 2, "sha256": "ab12...", "version": "0.1.0", "torch": "2.13.0",
     "layers": {name: {"adapter": "LoRA", "config": {...}, "shape": [out, in],
                       "base": fingerprint of the frozen weight}}}  in model order

sha256 is of the whole file, with 64 zeros in its own place: a file in which a byte is another one
is refused. Format 1 had none, and is read.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structadapt.adapters.base import Adapter
from structadapt.bounds import (
    METADATA,
    in_part,
    parse_json,
    read_header,
    regular_size,
    unfit_name,
)
from structadapt.files import has_seal
from structadapt.ops import wide_dtype

FORMAT, UNSEALED_FORMAT = 2, 1
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_WIDTH = 2**24  # of a layer in a file


class AdapterFileError(ValueError):
    """A file that is not a whole adapter file, or not one for this model."""

    def __init__(self, message: str) -> None:
        super().__init__(in_part(message))


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
    with _whole(path):
        size = regular_size(path)  # before open(), which waits for the other end of a pipe
        with open(path, "rb") as file:
            return "structadapt" in _metadata(read_header(file, size)[1])


def read_adapters(
    path: str | os.PathLike[str],
    refuse: Callable[[dict[str, "SavedLayer"]], object] = lambda layers: None,
) -> dict[str, SavedLayer]:
    """The layers of an adapter file by name, checked in themselves. Errors as for `load`.

    refuse: called with the layers, their tensors on the meta device, before any value is read: what
        does not fit costs nothing, however large it says it is.
    """
    with _whole(path):
        size = regular_size(path)
        file = open(path, "rb")  # noqa: SIM115 - what `refuse` raises is no damage
    with file:
        with _whole(path):
            beginning, entries = read_header(file, size)
            metadata = _metadata(entries)
        layers = saved_layout(path, metadata, entries)
        refuse(layers)
        data = beginning + file.read()
    with _whole(path):
        tensors = safetensors.torch.load(data)
    _refuse_altered(path, metadata, data)
    whole = {
        name: replace(layer, tensors=_take(path, tensors, name, layer.tensors))
        for name, layer in layers.items()
    }
    if tensors:
        raise AdapterFileError(f"{path} has tensors of no layer: {', '.join(sorted(tensors)[:3])}")
    return whole


def _metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    metadata = entries.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    return metadata


def _refuse_altered(path: str | os.PathLike[str], metadata: Mapping[str, str], data: bytes) -> None:
    header = parse_json(metadata["structadapt"])
    if header["format"] != UNSEALED_FORMAT and not has_seal(data, header.get("sha256")):
        raise AdapterFileError(
            f"{path} was altered since it was saved: its content does not give its sha256"
        )


def saved_layout(
    path: str | os.PathLike[str], metadata: Mapping[str, str], names: Collection[str]
) -> dict[str, SavedLayer]:
    """The layers of an adapter file from its metadata and the names of its tensors alone: their
    tensors are on the meta device. Raises AdapterFileError."""
    if "structadapt" not in metadata:
        raise AdapterFileError(
            f"{path} is no structadapt adapter file (one of PEFT is loaded by its folder)"
        )
    try:
        header = parse_json(metadata["structadapt"])
        # A format without a seal that has one was another format.
        known = UNSEALED_FORMAT if "sha256" not in header else FORMAT
        if type(header["format"]) is not int or header["format"] != known:
            raise AdapterFileError(
                f"{path} has format {header['format']!r:.50}, this version reads {FORMAT}: "
                "update structadapt"
            )
        if len(header["layers"]) > len(names):  # each has a tensor
            raise ValueError(f"it describes {len(header['layers'])} layers, and has fewer tensors")
        if any(map(unfit_name, header["layers"])):
            raise ValueError("the name of a layer is too long, or holds control characters")
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
        size = regular_size(path)
        with open(path, "rb") as file:
            read_header(file, size)
        return safetensors.torch.load_file(path)


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a damaged safetensors file raises into an AdapterFileError."""
    try:
        yield
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is truncated or no safetensors file: {error}") from None


def _describe(entry: dict[str, Any]) -> tuple[Adapter, tuple[int, int]]:
    """The adapter and (out, in) of one layer's entry in the metadata."""
    kind, config = entry["adapter"], entry["config"]
    if not isinstance(config, dict):  # dict() would take an empty text or list for one
        raise ValueError(f"the config of a layer is no object, but {config!r:.50}")
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
