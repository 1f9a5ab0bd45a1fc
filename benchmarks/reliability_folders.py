"""Files built to attack whose content is not what their names promise: pickles, archives, pipes,
links, configurations of PEFT, indexes of shards."""

import gzip
import itertools
import json
import os
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from reliability_cases import (
    CONFIG,
    INDEX,
    MIB,
    REAL,
    SPECTRA,
    TEXT,
    WEIGHTS,
    WHOLE,
    Case,
    entry,
    of,
    peft_folder,
    raw,
)  # fmt: skip
from torch import nn


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
    "gzip bomb": lambda: gzip.compress(bytes(64 * MIB)), "tar": _tar,
    "elf": lambda: b"\x7fELF" * 99, "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(99),
    "json": lambda: b"{}" * 50, "python": lambda: b"import os\nos.system('touch pwned')\n",
    **{f"code in pickle {p}": (lambda p=p: pickle.dumps(Code(), p)) for p in range(6)},
    "code in torch.save": lambda: _torch({"w": torch.ones(2, 2), "x": Code()}),
    "code in old torch.save": lambda: _torch({"w": torch.ones(2, 2), "x": Code()}, True),
    "a module": lambda: _torch(nn.Linear(2, 2)),
    "a module, old": lambda: _torch(nn.Linear(2, 2), True),
    "zip bomb": lambda: _packed(_torch({"w": torch.zeros(4096, 4096)})),
    "zip bomb of many": lambda: _packed(_torch({str(i): torch.zeros(2**20) for i in range(64)})),
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


GOOD_HEADER = raw({"w": entry([2, 2], 0, 16)})


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
        "holes behind a header": lambda p: os.truncate(_touched(p, GOOD_HEADER), 2**40),
        "a header of holes": lambda p: os.truncate(_touched(p, bytes([0, 0, 0, 64])), 2**31),
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

BOMBS = [
    "(a+)+$", "([a-z.0-9]+)+!", "(.*)*!", "(.+)+x!", "(\\w|\\w)*!", "(.|.)*!", "((a*)*)*!",
    ".*.*.*.*.*.*.*.*.*.*!", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!", "(?:.?){50}.{50}!",
    ".?" * 40 + "." * 40, "(a|aa)+$", "([^!]*)*!", "(?=(.*)*!)x", "(?:(?:.*)*)*!",
    "(x?)" * 30 + "!", "(.{1,30}){1,30}!", "(?:a|b|ab|.)*!", "(.*\\.)*(.*\\.)*!", "(" * 3000,
    "a{99999999999}", "a{1,2}{3}", "((((((((((.*)*)*)*)*)*)*)*)*)*)*!", "(?P<x>.*)(?P=x)*!",
    "[" * 1000, "\\", "(?", "a" * 200_000, "(?i)" + "(.*)+!", "(?:" * 500 + ".*" + ")*" * 500,
]  # fmt: skip


def configurations() -> Iterator[Case]:
    """Of adapter_config.json."""
    fields: dict[str, list[Any]] = {
        "r": WHOLE, "lora_alpha": REAL, "peft_type": [*TEXT, ["LORA"]], "bias": TEXT[:9],
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
            if field in ("r", "lora_alpha", "bias") and value is None:  # the default
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


MANY = {f"{i}.*x": 2 for i in range(50_000)}
TEXTS: dict[str, bytes] = {
    "nothing": b"", "a list": b"[]", "a number": b"1", "no end": b"{", "NaN": b"NaN",
    "twice": b'{"peft_type":"LORA","r":2,"r":3}', "nesting": b"[" * 10**6,
    "utf-16": "{}".encode("utf-16"),
    "a name many times": b'{"r":2,' + b'"a":1,' * 150_000 + b'"a":1}',
    "nested objects": b'{"a":' * 10**5, "a long number": b'{"r":' + b"9" * 10**6 + b"}",
    "lists": b'{"a":[' + b"[]," * 10**7 + b"0]}", "names": b"\xff\xfe{}", "NUL": b"{\0}",
    "41 MB of a text": b'{"a":"' + b"b" * 41 * 10**6 + b'"}',
    "many patterns": json.dumps({"peft_type": "LORA", "rank_pattern": MANY}).encode(),
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

        yield Case("texts", f"{name} as {file}", build)


# -- indexes ---------------------------------------------------------------------------------------

PATHS = [
    "../secret.safetensors", "../../etc/passwd", "/etc/passwd", "/etc/secret.safetensors",
    "a/../../secret.safetensors", "sub/secret.safetensors", "C:\\secret.safetensors",
    "C:secret.safetensors", "\\\\host\\share\\x.safetensors", "file:///etc/passwd",
    "http://x/y.safetensors", "~/x.safetensors", "..", ".", "", "/", "a\0.safetensors",
    "a\n.safetensors", "\x1b[2J.safetensors", "x.pkl", "x.pt", "x.bin", "x.py", 7, None, [], {},
    ["a"], True, "a" * 300 + ".safetensors", "a" * 10**6, "missing.safetensors", ".safetensors",
    "..safetensors/", "....//x.safetensors", "%2e%2e%2fx.safetensors", "\u2025/x.safetensors",
    "\uff0e\uff0e/x.safetensors", "a\u202e.safetensors", "-rf.safetensors",
    "$(touch pwned).safetensors", "pipe.safetensors", "loop.safetensors", "zero.safetensors",
    "empty.safetensors", "folder.safetensors",
]  # fmt: skip


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
