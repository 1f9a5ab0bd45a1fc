"""Adapter files built to attack, in families, each with one thing wrong."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reliability_mutations import resealed
from torch import nn

import structadapt as sa
from structadapt.adapters import Adapter

SPECTRA = ("spectra.analyze", "structadapt spectra")
MIB = 2**20
WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
INDEX = "model.safetensors.index.json"
ADAPTERS: dict[str, Adapter] = {
    "LoRA": sa.LoRA(rank=2), "DoRA": sa.DoRA(rank=2), "QuanTA": sa.QuanTA(axes=3),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """build(folder): makes the file, and returns the path to open."""

    family: str
    name: str
    build: Callable[[Path], Path]
    harmless: tuple[str, ...] = ()  # entries that do not read what is wrong


def small_model() -> nn.Module:
    torch.manual_seed(0)
    layers = {"attn": nn.Linear(8, 8), "up": nn.Linear(8, 16, bias=False)}
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(layers)])})


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def adapter_file(kind: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file of `save` whose description is changed, sealed again."""
    path = Path("made.safetensors").absolute()
    sa.save(sa.adapt(small_model(), ADAPTERS[kind]), path)
    header, data = _parts(path)
    described = json.loads(header["__metadata__"]["structadapt"])
    change(described)
    header["__metadata__"]["structadapt"] = json.dumps(described)
    return resealed(raw(header, data))


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    path.unlink()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(change: Callable[[dict[str, Any], bytes], bytes]) -> bytes:
    path = Path("made.safetensors").absolute()
    sa.save(sa.adapt(small_model(), ADAPTERS["LoRA"]), path)
    return change(*_parts(path))


def peft_folder(folder: Path, **changes: Any) -> Path:
    sa.export_peft(sa.adapt(small_model(), sa.LoRA(rank=2)), folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder


def of(family: str, name: Any, data: Callable[[], bytes], file: str = "a.safetensors",
       harmless: tuple[str, ...] = ()) -> Case:  # fmt: skip
    def build(folder: Path) -> Path:
        (folder / file).write_bytes(data())
        return folder / file

    return Case(family, f"{name!s:.60}", build, harmless)


# -- adapter files ---------------------------------------------------------------------------------

WHOLE = [10**9, 10**30, -1, 0, 2**20 + 1, 2**31, 2**63, 2**64, 0.5, 1e308, True, None, "8", [], {},
         [8], "\0", float("nan"), float("inf")]  # fmt: skip
REAL = [1e308, -1e308, float("nan"), float("inf"), float("-inf"), -1, 0, 10**300, 10**400 % 10**310,
        1e10, "1", None, [], {}, True, -1e-300]  # fmt: skip
TEXT = ["", "x", "alpha/0", "alpha/r;", "__import__('os').system('touch pwned')", 0, None, [], {},
        "A" * MIB, "\0", "../..", "alpha/R"]  # fmt: skip
SHAPES = [
    [2**24, 2**24], [2**31, 1], [2**63, 2**63], [10**30, 1], [0, 8], [-8, 8], [8], [8, 8, 8], [],
    None, "88", {"a": 1}, [8.0, 8.0], [True, True], [[8], [8]], 64, [8, float("nan")],
    [2**24 + 1, 8], [127, 127], [8, 2**24],
]  # fmt: skip
AXES = [
    10**9, 10**30, -1, 0, 1, 64, [2] * 40, [1] * 1000, [8, -1, -1], [2**31, 2**31], [], {}, None,
    "2x2x2", [[2], [2]], [2.0, 2.0, 2.0], [2**24] * 3, True, float("inf"), [0, 0, 0], [2] * 5000,
]  # fmt: skip


def descriptions() -> Iterator[Case]:
    """Values that an adapter, a shape or a fingerprint cannot have."""
    fields = {"rank": WHOLE, "alpha": REAL, "scaling": TEXT}
    for kind in ("LoRA", "DoRA"):
        for field, values in fields.items():
            for value in values:
                yield _described(kind, f"{field}={value!r:.30}", ("config", field), value)
    for field, values in {"axes": AXES, "out_axes": AXES, "init": TEXT, "start": TEXT}.items():
        for value in values:
            if value is not None or field not in ("out_axes",):
                yield _described("QuanTA", f"{field}={value!r:.30}", ("config", field), value)
    kinds = ["VeRA", "Adapter", "__class__", "", "lora", "os.system", None, 1, [], ["LoRA"], {},
             "A" * MIB, "LoRA\0", "DoRA", "QuanTA"]  # fmt: skip
    for value in kinds:
        yield _described("LoRA", f"adapter={value!r:.30}", ("adapter",), value)
    for kind, value in itertools.product(("LoRA", "QuanTA"), SHAPES):
        yield _described(kind, f"shape={value!r:.30}", ("shape",), value)
    for value in ([], {}, 1, "", "0" * 33, [["a"]], True, "A" * MIB):
        harmless = SPECTRA  # compared with a base alone
        yield _described("LoRA", f"base={value!r:.30}", ("base",), value, harmless)
    for value in ([], {}, None, "2", 2.0, True, 3, -1, 0, 10**30, 1, [2]):
        yield of("descriptions", f"format={value!r}",
                 lambda v=value: adapter_file("LoRA", lambda h: h.update(format=v)))  # fmt: skip
    for value in ([], {}, None, 1, "x", [1], {"a": 1}, {"": {}}, {"blocks.0.attn": []}):
        yield of("descriptions", f"layers={value!r}",
                 lambda v=value: adapter_file("LoRA", lambda h: h.update(layers=v)))  # fmt: skip


def _described(kind: str, name: str, place: tuple[str, ...], value: Any,
               harmless: tuple[str, ...] = ()) -> Case:  # fmt: skip
    def change(header: dict[str, Any]) -> None:
        node = header["layers"]["blocks.0.attn"]
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value

    return of("descriptions", f"{kind}: {name}", lambda: adapter_file(kind, change),
              harmless=harmless)  # fmt: skip


OFFSETS = [
    (0, 0), (0, 1), (-1, 63), (64, 0), (1, 65), (0, 2**63), (2**63, 2**63 + 64), (0, 64.0),
    ("0", "64"), (None, None), (8, 72), (10**6, 10**6 + 64),
]  # fmt: skip
DTYPES = [
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F64", "I64", "U8", "BOOL", "C64", "", "f32", "F33",
    None, 1, [], {}, "F32\0", "A" * MIB,
]  # fmt: skip
OF_A = [
    [16], [2, 9], [8, 2], [2**62, 2**62], [2**31, 2**31], [-2, -8], [2, 8, 1], [0], [],
    [1] * 100_000, "28", None, {}, [2.0, 8.0], [True, 16],
]  # fmt: skip


def lies() -> Iterator[Case]:
    """Of the header's length, and of where tensors lie."""
    for n in [0, 1, 2, 7, *(2**k for k in range(3, 64, 3)), 2**64 - 1, 2**63, 2**32 - 1]:

        def build(h: dict[str, Any], d: bytes, n: int = n) -> bytes:
            return n.to_bytes(8, "little") + raw(h, d)[8:]

        yield of("lies", f"a header of {n} bytes", lambda b=build: with_header(b))
    for key, options in {"data_offsets": OFFSETS, "dtype": DTYPES, "shape": OF_A}.items():
        for value in options:
            yield of("lies", f"{key} {value!r:.30}", lambda k=key, v=value: _with_entry(k, v))
    for count, extra in itertools.product((1, 8, 4096), (b"\0", b"{", b"\xff")):
        yield of("lies", f"{count} more bytes", lambda n=count, x=extra: with_header(
            lambda h, d: resealed(raw(h, d + x * n))))  # fmt: skip


def _with_entry(key: str, value: Any) -> bytes:
    """Another value in the header's entry of one tensor."""

    def build(header: dict[str, Any], data: bytes) -> bytes:
        header["blocks.0.attn.A"][key] = value
        return resealed(raw(header, data))

    return with_header(build)


def sizes() -> Iterator[Case]:
    """Headers that grow in memory, of up to 101 MiB."""
    tensor = json.dumps(entry([0], 0, 0)).encode()
    makers: dict[str, Callable[[int], bytes]] = {
        "spaces": lambda n: b"{" + b" " * (n - 2) + b"}",
        "one name": lambda n: b'{"%b":%b}' % (b"a" * (n - 60), tensor),
        "lists": lambda n: b'{"a":[' + b"[]," * (n // 3 - 4) + b"0]}",
        "objects": lambda n: b'{"a":[' + b"{}," * (n // 3 - 4) + b"0]}",
        "numbers": lambda n: b'{"a":[' + b"1," * (n // 2 - 5) + b"0]}",
        "one number": lambda n: b'{"a":' + b"9" * (n - 6) + b"}",
        "nesting": lambda n: b'{"a":' + b"[" * (n - 5),
        "nested objects": lambda n: b'{"a":' * (n // 5),
        "a name twice": lambda n: b"{" + b'"a":1,' * (n // 6 - 2) + b'"a":1}',
        "names": lambda n: b"{%b}" % b",".join(b'"%d":1' % i for i in range(n // 11)),
        "tensors": lambda n: b"{%b}" % b",".join(b'"%d":%b' % (i, tensor) for i in range(n // 60)),
        "metadata": lambda n: b'{"__metadata__":{"a":"%b"}}' % (b"b" * (n - 30)),
        "our metadata": lambda n: b'{"__metadata__":{"structadapt":"%b"}}' % (b"[" * (n - 60)),
        "dots": lambda n: b'{"%b":%b}' % (b"module." * (n // 7 - 10), tensor),
    }  # fmt: skip
    for (name, make), size in itertools.product(makers.items(), (1, 8, 30, 33, 101)):
        if name == "names" and size > 33:
            continue
        data = lambda m=make, s=size: raw(m(s * MIB))  # noqa: E731
        yield of("sizes", f"{size} MiB of {name}", data)
    for count in (10, 1000, 20_000, 100_000):
        yield of("sizes", f"{count} layers", lambda n=count: _layers(n))
        yield of("sizes", f"{count} layers without tensors", lambda n=count: _layers(n, False))


def _layers(count: int, tensors: bool = True) -> bytes:
    """An adapter file of many layers of different shapes, without values."""
    layers, header, at = {}, {}, 0
    for i in range(count):
        shape = [2 + i % 1000, 2 + i // 1000]
        config = {"rank": 1, "alpha": 1.0, "scaling": "alpha/r"}
        layers[f"{i}"] = {"adapter": "DoRA", "config": config, "shape": shape, "base": "0"}
        if tensors:
            header[f"{i}.A"] = entry([0], at, at)
    text = json.dumps({"format": 2, "sha256": "0" * 64, "layers": layers})
    return resealed(raw({"__metadata__": {"structadapt": text}, **header}))


NAMES = [
    "", ".", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "a\nb", "\x1b[2J", "\u202e",
    "\ud800", "__class__", "forward", "weight", "blocks.0", "blocks.0.attn.A.A", "a" * 5000,
    "a." * 50_000, "module." * 50_000, "(a+)+$", "%s%n", "{0.__class__}", "'; DROP", "\u0430ttn",
    "blocks.0.attn ", "BLOCKS.0.ATTN", "blocks..0.attn", "training", "None", "💥",
]  # fmt: skip


def names() -> Iterator[Case]:
    """Of layers and tensors."""
    for name in NAMES:

        def layer(h: dict[str, Any], d: bytes, name: str = name) -> bytes:
            text = json.loads(h["__metadata__"]["structadapt"])
            text["layers"][name] = text["layers"].pop("blocks.0.attn")
            h["__metadata__"]["structadapt"] = json.dumps(text)
            for key in ("A", "B"):
                h[f"{name}.{key}"] = h.pop(f"blocks.0.attn.{key}")
            return resealed(raw(h, d))

        def tensor(h: dict[str, Any], d: bytes, name: str = name) -> bytes:
            h[name] = h.pop("blocks.0.attn.A")
            return resealed(raw(h, d))

        yield of(
            "names", f"a layer {name!a:.40}", lambda b=layer: with_header(b), harmless=SPECTRA
        )  # which need no model
        yield of("names", f"a tensor {name!a:.40}", lambda b=tensor: with_header(b),
                 harmless=SPECTRA)  # fmt: skip


def values() -> Iterator[Case]:
    """Not finite."""
    for value, place, kind in itertools.product(
        (float("nan"), float("inf"), float("-inf")), (0, -1), ADAPTERS
    ):

        def build(value: float = value, place: int = place, kind: str = kind) -> bytes:
            path = Path("made.safetensors").absolute()
            sa.save(sa.adapt(small_model(), ADAPTERS[kind]), path)
            header, data = _parts(path)
            bits = bytearray(data)
            at = 0 if place == 0 else len(data) - 4
            bits[at : at + 4] = torch.tensor(value).numpy().tobytes()
            return resealed(raw(header, bytes(bits)))

        yield of("values", f"{value} at {place} of {kind}", build, harmless=SPECTRA)
