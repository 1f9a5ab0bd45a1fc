"""Files built to attack: a thousand, in families, each with one thing wrong."""

import gzip
import itertools
import json
import os
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from reliability_mutations import resealed
from torch import nn

import structadapt as sa
from structadapt.adapters import Adapter

SPECTRA = ("spectra.analyze", "structadapt spectra")
HERE = ("sa.load",)
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
SHAPES = [[2**24, 2**24], [2**31, 1], [2**63, 2**63], [10**30, 1], [0, 8], [-8, 8], [8], [8, 8, 8], [],
          None, "88", {"a": 1}, [8.0, 8.0], [True, True], [[8], [8]], 64, [8, float("nan")],
          [2**24 + 1, 8], [127, 127], [8, 2**24]]  # fmt: skip
AXES = [10**9, 10**30, -1, 0, 1, 64, [2] * 40, [1] * 1000, [8, -1, -1], [2**31, 2**31], [], {}, None,
        "2x2x2", [[2], [2]], [2.0, 2.0, 2.0], [2**24] * 3, True, float("inf"), [0, 0, 0],
        [2] * 5000]  # fmt: skip


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


def lies() -> Iterator[Case]:
    """Of the header's length, and of where tensors lie."""
    for n in [0, 1, 2, 7, *(2**k for k in range(3, 64, 3)), 2**64 - 1, 2**63, 2**32 - 1]:

        def build(h: dict[str, Any], d: bytes, n: int = n) -> bytes:
            return n.to_bytes(8, "little") + raw(h, d)[8:]

        yield of("lies", f"a header of {n} bytes", lambda b=build: with_header(b))
    offsets = [(0, 0), (0, 1), (-1, 63), (64, 0), (1, 65), (0, 2**63), (2**63, 2**63 + 64),
               (0, 64.0), ("0", "64"), (None, None), (8, 72), (10**6, 10**6 + 64)]  # fmt: skip
    for place in offsets:

        def build(h: dict[str, Any], d: bytes, place: Any = place) -> bytes:
            h["blocks.0.attn.A"]["data_offsets"] = list(place)
            return resealed(raw(h, d))

        yield of("lies", f"offsets {place}", lambda b=build: with_header(b))
    codes = ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F64", "I64", "U8", "BOOL", "C64", "", "f32",
             "F33", None, 1, [], {}, "F32\0", "A" * MIB]  # fmt: skip
    for code in codes:

        def build(h: dict[str, Any], d: bytes, code: Any = code) -> bytes:
            h["blocks.0.attn.A"]["dtype"] = code
            return resealed(raw(h, d))

        yield of("lies", f"dtype {code!r:.20}", lambda b=build: with_header(b))
    shapes = [[16], [2, 9], [8, 2], [2**62, 2**62], [2**31, 2**31], [-2, -8], [2, 8, 1], [0], [],
              [1] * 100_000, "28", None, {}, [2.0, 8.0], [True, 16]]  # fmt: skip
    for shape in shapes:

        def build(h: dict[str, Any], d: bytes, shape: Any = shape) -> bytes:
            h["blocks.0.attn.A"]["shape"] = shape
            return resealed(raw(h, d))

        yield of("lies", f"shape {shape!r:.20}", lambda b=build: with_header(b))
    for count, extra in itertools.product((1, 8, 4096), (b"\0", b"{", b"\xff")):
        yield of("lies", f"{count} more bytes", lambda n=count, x=extra: with_header(
            lambda h, d: resealed(raw(h, d + x * n))))  # fmt: skip


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


NAMES = ["", ".", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "a\nb", "\x1b[2J", "\u202e",
         "\ud800", "__class__", "forward", "weight", "blocks.0", "blocks.0.attn.A.A", "a" * 5000,
         "a." * 50_000, "module." * 50_000, "(a+)+$", "%s%n", "{0.__class__}", "'; DROP", "\u0430ttn",
         "blocks.0.attn ", "BLOCKS.0.ATTN", "blocks..0.attn", "training", "None", "💥"]  # fmt: skip


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
                 harmless=SPECTRA if name == "" else SPECTRA)  # fmt: skip


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


# -- other contents --------------------------------------------------------------------------------


class Code:
    """Its pickle runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _torch(content: Any, legacy: bool = False) -> bytes:
    path = Path("made.pt").absolute()
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.unlink()
    return data


def _packed(data: bytes) -> bytes:
    """The same archive with its parts compressed."""
    path, other = Path("made.pt").absolute(), Path("packed.pt").absolute()
    path.write_bytes(data)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    found = other.read_bytes()
    path.unlink()
    other.unlink()
    return found


def _tar() -> bytes:
    path = Path("made.tar").absolute()
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("../../x")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path.read_bytes()


def _bomb(depth: int) -> Any:
    """Lists of the same list: 2^depth parts."""
    value: Any = [1.0]
    for _ in range(depth):
        value = [value, value]
    return value


CONTENTS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"", "one byte": lambda: b"\0", "zeros": lambda: bytes(4096),
    "spaces": lambda: b" " * 4096, "html": lambda: b"<!DOCTYPE html><html></html>" * 10,
    "git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "gzip bomb": lambda: gzip.compress(bytes(64 * MIB)), "tar": _tar, "elf": lambda: b"\x7fELF" * 99,
    "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "json": lambda: b"{}" * 50,
    "python": lambda: b"import os\nos.system('touch pwned')\n",
    **{f"code in pickle {p}": (lambda p=p: pickle.dumps(Code(), p)) for p in range(6)},
    "code in torch.save": lambda: _torch({"w": torch.ones(2, 2), "x": Code()}),
    "code in old torch.save": lambda: _torch({"w": torch.ones(2, 2), "x": Code()}, True),
    "a module": lambda: _torch(nn.Linear(2, 2)), "a module, old": lambda: _torch(nn.Linear(2, 2), True),
    "zip bomb": lambda: _packed(_torch({"w": torch.zeros(4096, 4096)})),
    "zip bomb of many": lambda: _packed(_torch({f"{i}": torch.zeros(1024, 1024) for i in range(64)})),
    "lists of lists": lambda: _torch({"w": _bomb(40)}),
    "lists of lists, old": lambda: _torch({"w": _bomb(40)}, True),
    "spread tensor": lambda: _torch({"w": torch.zeros(1).expand(10**6, 10**6)}),
    "spread tensor, old": lambda: _torch({"w": torch.zeros(1).expand(10**6, 10**6)}, True),
    "spread rows": lambda: _torch({"w": torch.zeros(1, 4096).expand(10**6, 4096)}),
    "no tensors": lambda: _torch({"a": 1}), "a list": lambda: _torch([torch.ones(2, 2)]),
    "half a zip": lambda: _torch({"w": torch.ones(64, 64)})[:5000],
    "fp8": lambda: safetensors.torch.save({"w": torch.ones(8, 8).to(torch.float8_e4m3fn)}),
    "integers": lambda: safetensors.torch.save({"w": torch.ones(8, 8, dtype=torch.int64)}),
    "vectors": lambda: safetensors.torch.save({"w": torch.ones(8)}),
}  # fmt: skip
FILES = ("a.safetensors", "a.pt", "model.safetensors", "pytorch_model.bin", CONFIG, INDEX)


def contents() -> Iterator[Case]:
    """Of other kinds, under names that promise weights."""
    for (name, data), file in itertools.product(CONTENTS.items(), FILES):
        yield of("contents", f"{name} as {file}", data, file)


def places() -> Iterator[Case]:
    """What is no file."""
    makers: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo, "a folder": os.mkdir,
        "a link to nothing": lambda p: os.symlink("nowhere", p),
        "a link to itself": lambda p: os.symlink(p, p),
        "a link to /dev/zero": lambda p: os.symlink("/dev/zero", p),
        "a link to /dev/random": lambda p: os.symlink("/dev/random", p),
        "a link to passwords": lambda p: os.symlink("/etc/passwd", p),
        "a link to memory": lambda p: os.symlink("/proc/self/mem", p),
        "a socket": lambda p: socket.socket(socket.AF_UNIX).bind(str(p.relative_to(Path.cwd()))),
        "a terabyte of holes": lambda p: os.truncate(_touched(p), 2**40),
        "holes behind a header": lambda p: os.truncate(_touched(p, raw({"w": entry([2, 2], 0, 16)})), 2**40),
        "a header of holes": lambda p: os.truncate(_touched(p, (2**30).to_bytes(8, "little")), 2**31),
    }  # fmt: skip
    for (name, make), file in itertools.product(makers.items(), (*FILES, WEIGHTS)):

        def build(folder: Path, make: Any = make, file: str = file) -> Path:
            if file == WEIGHTS:
                peft_folder(folder)
                (folder / file).unlink()
            make(folder / file)
            return folder if file in (WEIGHTS, CONFIG) else folder / file

        yield Case("places", f"{name} as {file}", build)


def _touched(path: Path, data: bytes = b"") -> Path:
    path.write_bytes(data)
    return path


# -- folders of PEFT -------------------------------------------------------------------------------

BOMBS = ["(a+)+$", "([a-z.0-9]+)+!", "(.*)*!", "(.+)+x!", "(\\w|\\w)*!", "(.|.)*!", "((a*)*)*!",
         ".*.*.*.*.*.*.*.*.*.*!", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!", "(?:.?){50}.{50}!",
         ".?" * 40 + "." * 40, "(a|aa)+$", "([^!]*)*!", "(?=(.*)*!)x", "(?:(?:.*)*)*!",
         "(x?)" * 30 + "!", "(.{1,30}){1,30}!", "(?:a|b|ab|.)*!", "(.*\\.)*(.*\\.)*!", "(" * 3000,
         "a{99999999999}", "a{1,2}{3}", "((((((((((.*)*)*)*)*)*)*)*)*)*)*!", "(?P<x>.*)(?P=x)*!",
         "[" * 1000, "\\", "(?", "a" * 200_000, "(?i)" + "(.*)+!", "(?:" * 500 + ".*" + ")*" * 500]  # fmt: skip


def configurations() -> Iterator[Case]:
    """Of adapter_config.json."""
    fields: dict[str, list[Any]] = {
        "r": WHOLE, "lora_alpha": REAL, "peft_type": TEXT + [["LORA"]], "bias": TEXT[:9],
        "use_dora": [1, "true", [], {}], "use_rslora": [1, "true", [], {}],
        "rank_pattern": [{"attn": v} for v in WHOLE] + [1, "x", [["a"]]],
        "alpha_pattern": [{"attn": v} for v in REAL] + [1, "x", [["a"]]],
        "target_modules": [1, {"a": 1}, [1], [[]], ["nowhere"], "nowhere", "[", ["attn"] * 3],
        "layers_to_transform": ["0", {"a": 1}, [0.5], 10**30, [10**30], -1],
        "modules_to_save": [["x"], "x", 1], "target_parameters": [["x"], 1],
        "init_lora_weights": ["pissa", "olora", {"a": 1}, "loftq"], "layer_replication": [[[0, 9]]],
        "use_new_method": [True], "new_config": [{"a": 1}], "fan_in_fan_out": [1, "x"],
    }  # fmt: skip
    lax = {"target_modules", "layers_to_transform", "modules_to_save", "target_parameters", "bias",
           "init_lora_weights", "layer_replication", "use_new_method", "new_config"}  # fmt: skip
    rank = {"r", "rank_pattern"}  # spectra takes that of the tensors
    for field, options in fields.items():
        for value in options:
            if field in ("r", "lora_alpha") and value is None:
                continue
            yield _configured(f"{field}={value!r:.40}", SPECTRA if field in lax | rank else (),
                              **{field: value})  # fmt: skip
    for bomb in BOMBS:
        for field in ("target_modules", "exclude_modules", "layers_pattern"):
            changes = {field: bomb}
            if field == "layers_pattern":
                changes |= {"layers_to_transform": [0], "target_modules": ["attn", "up"]}
            exclude = ("sa.load",) if field == "exclude_modules" else ()
            yield _configured(f"{field}={bomb!r:.30}", SPECTRA + exclude, **changes)
        for field in ("rank_pattern", "alpha_pattern"):
            value = 2 if field == "rank_pattern" else 16
            yield _configured(
                f"{field} {bomb!r:.30}", (*SPECTRA, "sa.load"), **{field: {bomb: value}}
            )


def _configured(name: str, harmless: tuple[str, ...], **changes: Any) -> Case:
    return Case("configurations", name, lambda folder: peft_folder(folder / "peft", **changes),
                harmless)  # fmt: skip


TEXTS: dict[str, bytes] = {
    "nothing": b"", "a list": b"[]", "a number": b"1", "no end": b"{", "NaN": b"NaN",
    "twice": b'{"peft_type":"LORA","r":2,"r":3}', "nesting": b"[" * 10**6, "utf-16": "{}".encode("utf-16"),
    "a name many times": b'{"r":2,' + b'"a":1,' * 150_000 + b'"a":1}',
    "nested objects": b'{"a":' * 10**5, "a long number": b'{"r":' + b"9" * 10**6 + b"}",
    "lists": b'{"a":[' + b"[]," * 10**7 + b"0]}", "names": b"\xff\xfe{}", "NUL": b"{\0}",
    "41 MB of a text": b'{"a":"' + b"b" * 41 * 10**6 + b'"}',
    "many patterns": json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern":
                                 {f"{i}.*x": 2 for i in range(50_000)}}).encode(),
}  # fmt: skip


def texts() -> Iterator[Case]:
    """In the place of a configuration or an index."""
    for (name, text), file in itertools.product(TEXTS.items(), (CONFIG, INDEX)):

        def build(folder: Path, text: bytes = text, file: str = file) -> Path:
            if file == CONFIG:
                peft_folder(folder / "peft")
                (folder / "peft" / file).write_bytes(text)
                return folder / "peft"
            (folder / file).write_bytes(text)
            return folder

        slow = (*SPECTRA, "sa.load") if name == "many patterns" else ()
        yield Case("texts", f"{name} as {file}", build, slow)


# -- indexes ---------------------------------------------------------------------------------------

PATHS = ["../secret.safetensors", "../../etc/passwd", "/etc/passwd", "/etc/secret.safetensors",
         "a/../../secret.safetensors", "sub/secret.safetensors", "C:\\secret.safetensors", "C:secret.safetensors",
         "\\\\host\\share\\x.safetensors", "file:///etc/passwd", "http://x/y.safetensors", "~/x.safetensors",
         "..", ".", "", "/", "a\0.safetensors", "a\n.safetensors", "\x1b[2J.safetensors", "x.pkl", "x.pt", "x.bin",
         "x.py", 7, None, [], {}, ["a"], True, "a" * 300 + ".safetensors", "a" * 10**6, "missing.safetensors",
         ".safetensors", "..safetensors/", "....//x.safetensors", "%2e%2e%2fx.safetensors", "\u2025/x.safetensors",
         "\uff0e\uff0e/x.safetensors", "a\u202e.safetensors", "-rf.safetensors", "$(touch pwned).safetensors",
         "pipe.safetensors", "loop.safetensors", "zero.safetensors", "empty.safetensors", "folder.safetensors"]  # fmt: skip


def indexes() -> Iterator[Case]:
    """Names that lead elsewhere."""
    for path, bins in itertools.product(PATHS, (False, True)):

        def build(folder: Path, path: Any = path, bins: bool = bins) -> Path:
            inner = folder / "checkpoint"
            inner.mkdir()
            data = safetensors.torch.save({"w": torch.ones(4, 4)})
            (folder / "secret.safetensors").write_bytes(data)
            (inner / "one.safetensors").write_bytes(data)
            os.mkfifo(inner / "pipe.safetensors")
            os.symlink("loop.safetensors", inner / "loop.safetensors")
            os.symlink("/dev/zero", inner / "zero.safetensors")
            (inner / "empty.safetensors").write_bytes(b"")
            (inner / "folder.safetensors").mkdir()
            name = "pytorch_model.bin.index.json" if bins else INDEX
            (inner / name).write_text(json.dumps({"weight_map": {"w": path}}))
            return inner

        yield Case("indexes", f"{path!a:.50}{' of bin' if bins else ''}", build)


def cases() -> list[Case]:
    made = (descriptions, lies, sizes, names, values, contents, places, configurations, texts,
            indexes)  # fmt: skip
    return [case for family in made for case in family()]
