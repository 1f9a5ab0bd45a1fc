"""Ways to damage an adapter file, a configuration, or anything."""

import json
import math
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, 1e308, -1e-300, math.nan,
    math.inf, "", "a", "F32", "BF16", "I64", "F8_E4M3", "LoRA", "DoRA", "QuanTA", "\0", "../x",
    "(a+)+$", [], {}, [[]], [1], [0, 0], [8, 8], [2, 8], [-1, 8], {"a": 1}, "0" * 64,
]  # fmt: skip


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(rng: random.Random, data: bytes) -> bytes:
    place, count = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64))
    return data[:place] + rng.randbytes(count) + data[place:]


def delete(rng: random.Random, data: bytes) -> bytes:
    place, count = rng.randrange(len(data)), rng.choice((1, 2, 8, 64))
    return data[:place] + data[place + count :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    place, count = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64))
    return data[:place] + rng.randbytes(count) + data[place + count :]


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def edit(rng: random.Random, tree: Any) -> Any:
    """A nested value of which one part is another one, is gone, or has another name."""
    node, places = tree, []
    while isinstance(node, dict | list) and node and (not places or rng.random() < 0.75):
        key = rng.choice([*node] if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    if not places:
        return rng.choice(ODD)
    parent, key = places[-1]
    way = rng.randrange(4)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, dict):
        names = [f"{key}x", str(key)[1:], "", "weight", rng.choice([*parent])]
        parent[rng.choice(names)] = parent.pop(key)
    elif way == 2 and isinstance(node, int | float) and not isinstance(node, bool):
        parent[key] = node + rng.choice((-1, 1, 8, -8, 0.5, 2**32))
    else:
        parent[key] = deepcopy(rng.choice(ODD))
    return tree


def edit_header(rng: random.Random, data: bytes) -> bytes:
    header, rest = parts(data)
    return joined(edit(rng, header), rest)


def edit_description(rng: random.Random, data: bytes) -> bytes:
    """Of the adapters, where the file has one."""
    header, rest = parts(data)
    metadata = header.get("__metadata__", {})
    if "structadapt" not in metadata:
        return edit_header(rng, data)
    metadata["structadapt"] = json.dumps(edit(rng, json.loads(metadata["structadapt"])))
    return joined(header, rest)


def _tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Two tensors change places, or names."""
    header, rest = parts(data)
    a, b = rng.sample(_tensors(header), 2)
    if rng.random() < 0.5:
        header[a], header[b] = header[b], header[a]
    else:
        left, right = header[a], header[b]
        left["data_offsets"], right["data_offsets"] = right["data_offsets"], left["data_offsets"]
    return joined(header, rest)


def retype(rng: random.Random, data: bytes) -> bytes:
    header, rest = parts(data)
    codes = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "f32")
    header[rng.choice(_tensors(header))]["dtype"] = rng.choice(codes)
    return joined(header, rest)


def reshape(rng: random.Random, data: bytes) -> bytes:
    header, rest = parts(data)
    entry = header[rng.choice(_tensors(header))]
    shape = entry["shape"]
    count = math.prod(shape)
    entry["shape"] = rng.choice(
        [shape[::-1], [count], [1, *shape], [*shape, 1], [shape[0] + 1, *shape[1:]],
         [2, count // 2], [-n for n in shape], [2**62, 4], [0, 5], []]
    )  # fmt: skip
    return joined(header, rest)


def overwrite_values(rng: random.Random, data: bytes) -> bytes:
    """NaN, infinities and others in the place of one value."""
    place = len(data) - 4 * (1 + rng.randrange(len(parts(data)[1]) // 4))
    value = rng.choice((math.nan, math.inf, -math.inf, 0.0, 1.0, 3e38, 1e-45))
    return data[:place] + torch.tensor(value).numpy().tobytes() + data[place + 4 :]


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bits flipped": flip_bits, "cut short": cut, "bytes inserted": insert, "bytes deleted": delete,
    "bytes overwritten": overwrite, "header edited": edit_header,
    "description edited": edit_description, "tensors swapped": swap, "dtype changed": retype,
    "shape changed": reshape, "value changed": overwrite_values,
}  # fmt: skip


def edit_config(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(edit(rng, json.loads(data))).encode("utf-8", "surrogatepass")


BYTES = ("bits flipped", "cut short", "bytes inserted", "bytes deleted", "bytes overwritten")
OF_A_CONFIG = {name: MUTATIONS[name] for name in BYTES} | {"configuration edited": edit_config}


def mutated(
    rng: random.Random, ways: dict[str, Callable[[random.Random, bytes], bytes]], data: bytes
) -> tuple[str, bytes]:
    """Another content, and how it was made."""
    while True:
        mutation = rng.choice([*ways])
        changed = ways[mutation](rng, data)
        if changed != data:
            return mutation, changed
