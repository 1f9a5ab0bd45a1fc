"""Read what others wrote, at a cost that stays in proportion to the file.

A small file can ask for much: a header of a million empty lists, one name ten thousand times, a
pipe that never ends, a gigabyte of holes. What is refused here costs no more than its first bytes.
"""

import json
import os
import stat
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO

LARGEST_JSON = 32 * 2**20  # bytes; the header of 50,000 tensors has 7 MB
MOST_VALUES = 2**19  # in it: a tensor in a header has 8, an adapted layer 25
LONGEST_NAME = 1000  # characters, of a tensor or a layer
LONGEST_MESSAGE, LONGEST_VALUE = 2000, 80  # characters, of an error and of a value in one
METADATA = "__metadata__"  # the one entry of a safetensors header that is no tensor


def regular_size(path: str | os.PathLike[str]) -> int:
    """The size of a file in bytes. ValueError for a pipe or a device, OSError without a file."""
    found = os.stat(path)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # open() names a folder
        raise ValueError("it is no regular file")
    return found.st_size


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. ValueError for one that is damaged or too large; OSError."""
    size = regular_size(path)
    if size > LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, at most {LARGEST_JSON} are read")
    with open(path, "rb") as file:
        return parse_json(file.read(LARGEST_JSON + 1))


def parse_json(text: bytes | str) -> Any:
    """What JSON says. ValueError for a name that is there twice, where json would take the last,
    for more than `MOST_VALUES`, each of which takes some hundred bytes, and for deep nesting."""
    marks = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if len(text) > LARGEST_JSON or sum(text.count(mark) for mark in marks) > MOST_VALUES:  # type: ignore[arg-type]
        raise ValueError(f"its JSON has more than {LARGEST_JSON} bytes or {MOST_VALUES} values")
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        double = next(a for a, b in pairwise(names) if a == b)
        raise ValueError(f"{double!r:.200} is there twice")
    return found


def in_part(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The beginning of a text that may be of any length, as a message that quotes a file."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def quoted(value: object, most: int = LONGEST_VALUE) -> str:
    """A value in a message, at most the beginning of it."""
    return in_part(repr(value), most)


def few(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first of a list, and how many more there are; for messages."""
    more = f" (and {len(names) - most} more)" if len(names) > most else ""
    return between.join(names[:most]) + more


def unfit_name(name: str) -> str:
    """Why a tensor or a layer cannot have this name, or nothing."""
    if not name.isprintable():
        return "its name holds control characters"
    if len(name) > LONGEST_NAME:
        return f"its name has {len(name)} characters"
    return ""


def read_header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    """The beginning of a safetensors file up to its data, and what its header says.

    ValueError for a header that is damaged or too large, or whose tensors do not end where the
    file does.
    """
    beginning = file.read(8)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or length > size - 8 or length > LARGEST_JSON:
        raise ValueError(f"its header would have {length} bytes, and the file has {size}")
    text = file.read(length)
    entries = parse_json(text)
    try:
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != METADATA]
        end = max([0, *ends])
        unfit = next(filter(None, map(unfit_name, entries)), "")
    except (TypeError, LookupError, AttributeError):
        raise ValueError("its header is damaged") from None
    if unfit:
        raise ValueError(f"it holds a tensor of which {unfit}")
    if end != size - 8 - length:
        raise ValueError(f"its tensors end after {8 + length + end} bytes, and it has {size}")
    return beginning + text, entries
