"""Files of torch.save: .pt, .pth and .bin. Tensors alone; a pickle that runs code is not loaded."""

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structadapt.spectra.reading.matrix import SourceError, Stored, stored_tensor
from structadapt.spectra.reading.names import unfit_name
from structadapt.spectra.reading.whole_file import refuse_pointer, regular_file

WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # keys of a training checkpoint


def read_pickle(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a file and notes on what else it holds.

    A file in the zip format is mapped into memory to list it, and again for each part that is
    read, so that little of it stays; one in the format before torch 1.6 is read whole and kept.

    Raises SourceNotFoundError; SourceError for a file that is empty, truncated, a git-LFS pointer,
    no file of torch.save, or holds Python objects other than tensors, which are never loaded.
    """
    regular_file(path)
    with open(path, "rb") as file:
        beginning = file.read(64)
    refuse_pointer(path, beginning)
    mapped = beginning.startswith(b"PK\x03\x04")
    if mapped:
        _refuse_packed(path)
    content, way = _state_dict(path, _load(path, mapped))
    notes = []
    if not mapped:
        notes.append(f"{path} has the format before torch 1.6: all of it is held in memory")
    if way and len(content) < 1:
        raise SourceError(f"{path}: its {way!r} holds nothing")
    stored = dict(_entries(path, content, way, mapped))
    if way:
        notes.append(f"{path}: the weights are those under {way!r}")
    return stored, notes


def _refuse_packed(path: Path) -> None:
    """SourceError for an archive with compressed parts, which torch.save never writes and which
    could grow a thousandfold."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [part for part in archive.infolist() if part.compress_type]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(f"{path} is truncated or no file of torch.save: {error}") from None
    if packed:
        raise SourceError(
            f"{path} has compressed parts, which torch.save does not write: not loaded"
        )


def _is_spread(tensor: Tensor) -> bool:
    """Whether a tensor shows some of its storage many times, as an expanded one does."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not dense:
        return False
    return tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()


def _load(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():  # of what follows from a file that is none
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if "Unsupported" not in str(error) else _what(error)
        raise SourceError(
            f"{path} contains Python objects other than tensors, which can run code when they are "
            f"read; not loaded: save its state_dict() alone, as safetensors ({reason:.160})"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its instructions run into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{path} is truncated or no file of torch.save: {reason:.200}") from None


def _what(error: Exception) -> str:
    return next(line for line in str(error).splitlines() if "Unsupported" in line)


def _state_dict(path: Path, content: Any) -> tuple[Mapping[Any, Any], str]:
    """What maps names to tensors, and the key of the checkpoint it lies under."""
    if isinstance(content, Tensor):
        return {"": content}, ""
    if not isinstance(content, Mapping):
        raise SourceError(
            f"{path} holds a {type(content).__name__}, expected names and tensors (a state_dict)"
        )
    tensors = [value for value in content.values() if isinstance(value, Tensor)]
    # Beside a model lie its best loss and the state of a generator, which are no matrices.
    for way in () if any(tensor.dim() > 1 for tensor in tensors) else WRAPPERS:
        if isinstance(content.get(way), Mapping):
            return content[way], way
    if not tensors:
        keys = ", ".join(f"{key!r:.30}" for key in list(content)[:5])
        raise SourceError(f"{path} holds no tensor: its keys are {keys or 'none'}")
    return content, ""


def _entries(
    path: Path, content: Mapping[Any, Any], way: str, mapped: bool
) -> Iterator[tuple[str, Stored]]:
    for key, value in content.items():
        name = key if isinstance(key, str) else f"{key!r:.60}"
        problem = unfit_name(key)
        if not isinstance(value, Tensor):
            yield name, _nothing(path, name, problem or f"a {type(value).__name__}, no tensor")
            continue
        stored = stored_tensor(name, value, str(path))
        if not problem and _is_spread(value):
            problem = "it says that it has more values than the file holds"
        read = _reader(path, way, key) if mapped else stored.read
        yield name, Stored(
            name, stored.shape, stored.dtype, str(path), read, problem or stored.problem,
            tie=stored.tie,
        )  # fmt: skip


def _nothing(path: Path, name: str, problem: str) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        raise SourceError(f"{path}: {name}: {problem}")

    return Stored(name, (), "none", str(path), read, problem)


def _reader(path: Path, way: str, key: Any) -> Any:
    """Reads a part of one tensor from a fresh mapping of the file, which then goes away."""

    def read(start: int, stop: int) -> Tensor:
        content, found = _state_dict(path, _load(path, True))
        tensor = content.get(key) if found == way else None
        if not isinstance(tensor, Tensor):
            raise SourceError(f"{path}: {key} is gone: was the file written while it is read?")
        return tensor.detach().reshape(-1)[start:stop].clone()

    return read
