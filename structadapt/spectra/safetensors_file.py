"""The header of a safetensors file, and its tensors, read where they lie.

A file is the length of the header (8 bytes, little-endian), the header (JSON: for every tensor its
dtype, shape and data_offsets), and the data without gaps. A part of a tensor is read by its place
in the file, not through a mapping: nothing that was read stays in the memory of the process, and a
file that is cut while it is read is an error, not a crash.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structadapt.bounds import LARGEST_JSON, parse_json
from structadapt.spectra.matrix import DTYPES, SourceError, SourceNotFoundError, Stored

LFS = b"version https://git-lfs"
FORMATS = {  # the name of a dtype in a header: ours, and bits
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "BF16": ("bfloat16", 16),
    "F16": ("float16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds, checked against its size."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The tensors of a file, none of them read.

    Raises SourceNotFoundError; SourceError for a file that is empty, truncated, a git-LFS pointer,
    no safetensors file, or whose header contradicts itself.
    """
    entries, data = _read_json(path)
    metadata = entries.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise SourceError(f"{path}: its __metadata__ is no object of texts: the file is damaged")
    tensors, places = {}, []
    for name, entry in entries.items():
        tensors[name], begin, end = _stored(path, name, entry, data)
        places.append((begin, end, name))
    _refuse_gaps(path, sorted(places), data)
    return Header(tensors, metadata)


def regular_file(path: Path) -> os.stat_result:
    """SourceNotFoundError or SourceError for what is no file, or an empty one."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        link = ", a link to nothing" if path.is_symlink() else ""
        raise SourceNotFoundError(f"{path} is not there{link}") from None
    except (ValueError, OSError) as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{path} is no regular file")
    if not found.st_size:
        raise SourceError(f"{path} is empty (0 bytes): download it again")
    return found


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """SourceError for a git-LFS pointer in place of a file."""
    if beginning.startswith(LFS):
        raise SourceError(
            f"{path} is a git-LFS pointer, not the weights: fetch them with `git lfs pull`"
        )


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands, and where the data begin."""
    size = regular_file(path).st_size
    with open(path, "rb") as file:
        beginning = file.read(64)
        refuse_pointer(path, beginning)
        length = int.from_bytes(beginning[:8], "little")
        if size < 8 or (8 + length > size and length <= LARGEST_JSON):
            raise SourceError(f"{path} is truncated within its header: download it again")
        if length > LARGEST_JSON or beginning[8:9] != b"{":
            raise SourceError(
                f"{path} is no safetensors file: its first bytes are {beginning[:8]!r}, which "
                f"would be a header of {length} bytes"
            )
        file.seek(8)
        text = file.read(length)
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{path}: its header is damaged: {error}") from None
    return entries, 8 + length


def _stored(path: Path, name: str, entry: Any, data: int) -> tuple[Stored, int, int]:
    """One tensor, and from where to where it lies in the data."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in [*shape, begin, end])
        if not whole or end < begin or not isinstance(code, str):
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise SourceError(
            f"{path}: {name}: its entry in the header is damaged: {entry!r:.200}"
        ) from None
    dtype, bits = FORMATS.get(code, (code, None))
    count = 1
    for n in shape:
        count *= n
    if bits is not None and count * bits != 8 * (end - begin):
        raise SourceError(
            f"{path}: {name} is {dtype} of shape {tuple(shape)}, {count * bits // 8} bytes, and "
            f"its place in the file has {end - begin}: the file is damaged"
        )

    def read(start: int, stop: int) -> Tensor:
        kind = DTYPES[dtype]
        return read_values(path, name, data + begin, start, stop, kind)

    return Stored(name, tuple(shape), dtype, str(path), read), begin, end


def read_values(
    path: Path, name: str, place: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """The values from start to stop of a tensor that begins at a place in a file."""
    buffer = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
    with open(path, "rb") as file:
        file.seek(place + start * dtype.itemsize)
        if file.readinto(buffer.numpy().data) != len(buffer):
            raise SourceError(f"{path}: {name} ends too early: was the file cut while it is read?")
    return buffer.view(dtype)


def _refuse_gaps(path: Path, places: list[tuple[int, int, str]], data: int) -> None:
    """SourceError for tensors that overlap, leave a gap, or do not end where the file does."""
    size = os.stat(path).st_size - data
    at = 0
    for begin, end, name in places:
        if begin != at:
            what = "overlaps another tensor" if begin < at else "lies behind a gap"
            raise SourceError(f"{path}: {name} {what}: the header is damaged")
        if end > size:
            raise SourceError(
                f"{path} is truncated: {name} should end at byte {data + end} and the file has "
                f"{data + size}: download it again"
            )
        at = end
    if at != size:
        raise SourceError(f"{path} has {size - at} bytes behind its last tensor: it is damaged")


# -- shards ----------------------------------------------------------------------------------------


def read_index(path: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """{tensor: file} of model.safetensors.index.json and the like.

    The names of the files come from whoever made the checkpoint. They must be plain names, which
    is told from the text alone: what a name links to does not matter, for the cache of Hugging
    Face links to ../../blobs.
    """
    if regular_file(path).st_size > LARGEST_JSON:
        raise SourceError(f"{path} is larger than 32 MiB: no index")
    text = path.read_bytes()
    refuse_pointer(path, text)
    try:
        index = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{path} is no JSON: {error}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise SourceError(f"{path} has no weight_map that names tensors and their files")
    for tensor, file in files.items():
        problem = _unsafe(file, suffixes)
        if problem:
            raise SourceError(f"{path}: the file of {tensor!r} is {file!r:.100}, {problem}")
    return files


def _unsafe(file: Any, suffixes: tuple[str, ...]) -> str:
    """Why a name from an index is not opened, or nothing."""
    if not isinstance(file, str):
        return "no text"
    if "\0" in file or not file.isprintable():
        return "a name with control characters: not opened"
    if "/" in file or "\\" in file or ":" in file or file in ("", ".", ".."):
        return "no plain name of a file in this folder: not opened"
    if not file.endswith(suffixes):
        return f"no {' or '.join(suffixes)}: not opened"
    return ""


def join_shards(
    index: Path, files: Mapping[str, str], shards: Mapping[str, Mapping[str, Stored]]
) -> dict[str, Stored]:
    """The tensors that an index names, in its order. SourceError for one that is not where the
    index says."""
    lost = [f"{tensor} (in {file})" for tensor, file in files.items() if tensor not in shards[file]]
    if lost:
        raise SourceError(
            f"{index} names tensors that their files do not have: {few(lost)}: the index and the "
            "files are not of the same checkpoint"
        )
    return {tensor: shards[file][tensor] for tensor, file in files.items()}


def missing_shards(index: Path, files: Mapping[str, str]) -> None:
    """SourceNotFoundError that names every file of an index that is not there."""
    names = sorted({*files.values()})
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise SourceNotFoundError(
            f"{index} names {len(names)} files, {len(missing)} of which are not there: "
            f"{', '.join(missing)}: download them"
        )


def few(names: list[str], most: int = 3) -> str:
    """The first of a list, and how many more there are."""
    more = f" (and {len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
