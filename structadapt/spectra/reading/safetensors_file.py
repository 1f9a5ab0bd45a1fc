"""The header of a safetensors file, and its tensors, read where they lie.

A file is the length of the header (8 bytes, little-endian), the header (JSON: for every tensor its
dtype, shape and data_offsets), and the data without gaps. A part of a tensor is read by its place
in the file, not through a mapping: nothing that was read stays in the memory of the process, and a
file that is cut while it is read is an error, not a crash.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structadapt.bounds import LARGEST_JSON, parse_json
from structadapt.spectra.reading.matrix import DTYPES, SourceError, Stored
from structadapt.spectra.reading.whole_file import refuse_pointer, regular_file

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
