"""Files of torch.save: .pt, .pth and .bin. Tensors alone; a pickle that runs code is not loaded."""

import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structadapt.spectra.reading.matrix import SourceError, Stored, stored_tensor
from structadapt.spectra.reading.names import unfit_name
from structadapt.spectra.reading.whole_file import refuse_pointer, regular_file

FRESH = 2**24  # bytes that are read through one mapping: pages that it touched count as memory
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # keys of a training checkpoint


def read_pickle(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a file and notes on what else it holds.

    A file in the zip format is mapped into memory to list it, and again after every 16 MiB that
    are read, so that little of it stays; one in the format before torch 1.6 is read whole and kept.

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
    except pickle.UnpicklingError as error:  # torch's own text advises to load it all the same
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]:.80})" if named else ""
        raise SourceError(
            f"{path} holds something else than tensors{what}, which could run code and was not "
            "run; expected a state dict saved with torch.save, or a safetensors file"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its instructions run into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{path} is truncated or no file of torch.save: {reason:.200}") from None


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
    file = _Mapped(path, way)
    for key, value in content.items():
        name = key if isinstance(key, str) else f"{key!r:.60}"
        problem = unfit_name(key)
        if not isinstance(value, Tensor):
            yield name, _nothing(path, name, problem or f"a {type(value).__name__}, no tensor")
            continue
        stored = stored_tensor(name, value, str(path))
        if not problem and _is_spread(value):
            problem = "it says that it has more values than the file holds"
        read = partial(file.part, key) if mapped else stored.read
        yield name, Stored(
            name, stored.shape, stored.dtype, str(path), read, problem or stored.problem,
            tie=stored.tie,
        )  # fmt: skip


def _nothing(path: Path, name: str, problem: str) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        raise SourceError(f"{path}: {name}: {problem}")

    return Stored(name, (), "none", str(path), read, problem)


class _Mapped:
    """The tensors of one file through a mapping, which goes away after FRESH bytes, and where the
    file changed: to touch what was cut off would end the process."""

    def __init__(self, path: Path, way: str) -> None:
        self.path, self.way = path, way
        self._content: Mapping[Any, Any] | None = None
        self._left, self._seen = 0, (0, 0, 0)
        self._lock = threading.Lock()  # matrices are read in threads

    def part(self, key: Any, start: int, stop: int) -> Tensor:
        tensor = self._mapping().get(key)
        if not isinstance(tensor, Tensor):
            raise SourceError(f"{self.path}: {key} is gone: was the file written while it is read?")
        values = tensor.detach().reshape(-1)[start:stop].clone()
        with self._lock:
            # To flatten what is not contiguous copies all of it.
            self._left -= values.nbytes if tensor.is_contiguous() else tensor.nbytes
            if self._left <= 0:
                self._content = None
        return values

    def _mapping(self) -> Mapping[Any, Any]:
        """What maps names to tensors; nothing where they lie elsewhere now."""
        seen = self._stamp()
        with self._lock:
            content = self._content
            if content is None or seen != self._seen:
                found, way = _state_dict(self.path, _load(self.path, True))
                self._content = content = found if way == self.way else {}
                self._left, self._seen = FRESH, seen
            return content

    def _stamp(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
