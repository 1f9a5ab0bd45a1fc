"""A checkpoint of the size of an 8B model, read by the spectra in bounded memory.

The layout of Llama 3 8B in bf16: 291 tensors, 16.06 GB, in four shards with an index. The files are
made of one block of 64 MiB of random bf16, over and over (each tensor begins elsewhere in it): the
bytes are all there, and few of them are distinct. Where the disk has no room, they are holes.

reading   Every matrix of every shard, row by row, checked to be finite and summed.
analysis  The whole analysis, with nulls, of the first block and of the embedding.

Memory is the peak of the process, less what it had after a small first analysis.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import structadapt as sa
from structadapt.spectra.reading import open_source

LIMIT = 0.6  # GiB
BLOCK = 2**25  # values
HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 4096, 14336, 1024, 128256, 32
INDEX = "model.safetensors.index.json"


def layout(shrink: int = 1) -> dict[str, tuple[int, ...]]:
    """{name: shape}, all sides but of the norms divided by `shrink`."""
    d, inner, keys, words = (n // shrink for n in (HIDDEN, INNER, KEYS, VOCABULARY))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, d)}
    for i in range(LAYERS):
        own = {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (keys, d),
            "self_attn.v_proj": (keys, d), "self_attn.o_proj": (d, d), "mlp.gate_proj": (inner, d),
            "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner), "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    return {**shapes, "model.norm.weight": (d,), "lm_head.weight": (words, d)}


def write(folder: Path, shrink: int, shards: int = 4) -> dict[str, Any]:
    """The checkpoint; whether its files have holes."""
    shapes = layout(shrink)
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    total = sum(sizes.values())
    holes = shutil.disk_usage(folder).free < total + 2**32
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(BLOCK, total), generator=generator).mul_(0.02).bfloat16()
    data = memoryview(block.view(torch.uint8).numpy().data)
    groups: list[list[str]] = [[]]
    for name in shapes:
        if sum(sizes[n] for n in groups[-1]) > total / shards:
            groups.append([])
        groups[-1].append(name)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, at = {}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name],
                            "data_offsets": [at, at + sizes[name]]}  # fmt: skip
            at += sizes[name]
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if holes:
                out.truncate(8 + len(text) + at)
            for name in names if not holes else ():
                _fill(out, data, sizes[name], 2 * (hash_of(name) % (len(data) // 2)))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {"bytes": total, "tensors": len(shapes), "shards": len(groups), "holes": holes}


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode()[-16:], "little")


def _fill(out: Any, data: memoryview, size: int, start: int) -> None:
    while size:
        part = data[start : start + size]
        out.write(part)
        size, start = size - len(part), 0


# -- one process -----------------------------------------------------------------------------------


def peak_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def read(folder: Path, what: str) -> dict[str, Any]:
    """In this process: seconds, GiB over the process, and what was read."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as small:
        save_file({"w": torch.randn(64, 128).bfloat16()}, Path(small) / "model.safetensors")
        sa.spectra.analyze(small)
    before, began = peak_bytes(), time.perf_counter()
    seen = 0
    if what == "reading":
        for matrix in open_source(folder).matrices:
            for rows in matrix.rows():
                seen += rows.numel()
                assert torch.isfinite(rows.sum())
    else:
        report = sa.spectra.analyze(folder, include=[r"layers\.0\.", "embed_tokens"], workers=1)
        assert all(row["status"] == "ok" for row in report.rows)
        seen = sum(row["n_elements"] for row in report.rows)
    return {
        "seconds": time.perf_counter() - began, "gib": (peak_bytes() - before) / 2**30,
        "values": seen,
    }  # fmt: skip


def measure(shrink: int = 1, analysis: bool = True) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = write(Path(folder), shrink)
        for what in ("reading", "analysis") if analysis else ("reading",):
            program = [sys.executable, __file__, folder, what]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(program, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{what} failed:\n{done.stderr[-2000:]}")
            found[what] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, target, measured, met) for the table."""
    kinds = [what for what in ("reading", "analysis") if what in found]
    parts = [
        f"{what}: {found[what]['values']:,} values in {found[what]['seconds']:.0f} s, "
        f"{found[what]['gib']:.2f} GiB over the process"
        for what in kinds
    ]
    size = f"{found['bytes'] / 1e9:.1f} GB in {found['shards']} shards"
    how = ", of holes" if found["holes"] else ""
    met = all(found[what]["gib"] <= LIMIT for what in kinds)
    return [(f"spectra of {size}{how}", f"{LIMIT} GiB", "; ".join(parts), met)]


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]), sys.argv[2])))
