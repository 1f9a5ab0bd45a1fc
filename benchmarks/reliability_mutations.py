"""Mutated adapter files through the strict loader: nothing foreign, nothing changed, nothing taken.

Three kinds of file, each from adapters of every kind over one small model, bare or adapted:

saved     what `structadapt.save` wrote, mutated. Every byte of it is under its sha256, so whatever
          is accepted counts as a failure.
resealed  the same with the sha256 made again, as whoever writes such a file on purpose can: the
          checks behind it are tried. What is accepted must be loaded as the file says, bit for bit.
peft      a folder of PEFT, whose format has no hash: likewise.

A mutant that is refused must raise a ValueError or an OSError and leave the model as it was: the
names, kinds, gradients wanted and bytes of all its parameters are compared.
"""

import contextlib
import json
import math
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from reliability_mutants import MUTATIONS, OF_A_CONFIG, mutated, parts
from torch import Tensor, nn

import structadapt as sa
from structadapt.adapters import Adapter
from structadapt.files import UNSEALED, sealed
from structadapt.layers import find_adapted

CHUNK = 10_000  # files of one seed
SHARE = {"saved": 50, "resealed": 25, "peft": 25}  # chunks of a hundred
KINDS: dict[str, Adapter] = {
    "LoRA": sa.LoRA(rank=2), "DoRA": sa.DoRA(rank=2), "QuanTA": sa.QuanTA(axes=3),
    "paper": sa.QuanTA(axes=3, init="paper"),
}  # fmt: skip
WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
SEAL = re.compile(rb'(sha256\\": \\")[0-9a-f]{64}')


def small_model() -> nn.Module:
    torch.manual_seed(0)
    layers = {"attn": nn.Linear(8, 8), "up": nn.Linear(8, 16, bias=False)}
    return nn.ModuleDict({"block": nn.ModuleDict(layers), "norm": nn.LayerNorm(8)})


def trained(adapter: Adapter) -> nn.Module:
    """Adapted, and away from where it starts."""
    model = sa.adapt(small_model(), adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


# -- what a model and a file hold ------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Whatever a load could change."""
    kinds: list[Any] = [(name, type(m).__name__) for name, m in model.named_modules()]
    return kinds + [
        (name, p.requires_grad, p.dtype, p.detach().numpy().tobytes())
        for name, p in model.named_parameters()
    ]


def says(data: bytes) -> dict[str, Any]:
    """What an adapter file says, read without the library: {name: (adapter, config, tensors)}."""
    tensors = safetensors.torch.load(data)
    layers = json.loads(parts(data)[0]["__metadata__"]["structadapt"])["layers"]
    found = {}
    for name, entry in layers.items():
        own = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.rpartition(".")[0] == name}
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["config"].items()}
        found[name] = (entry["adapter"], config, own)
    return found


def holds(model: nn.Module) -> dict[str, Any]:
    """What the model then has."""
    return {
        name: (type(layer.adapter).__name__, layer.adapter.config(), layer.tensors())
        for name, layer in find_adapted(model).items()
    }


def agrees(data: bytes, model: nn.Module) -> bool:
    """Whether the model has just what the file says. A choice that the file leaves open is the
    default of the adapter."""
    told, held = says(data), holds(model)
    return told.keys() == held.keys() and all(
        kind == held[name][0] and _chosen(config, held[name][1]) and _equal(tensors, held[name][2])
        for name, (kind, config, tensors) in told.items()
    )


def _chosen(config: dict[str, Any], held: dict[str, Any]) -> bool:
    """Whether an adapter is the one that a configuration asks for. One of QuanTA may leave
    out_axes open: axes are then those of either side."""
    if config.get("out_axes", ()) in (None, ()) and "out_axes" in held:
        axes = config.get("axes")
        open_ = {"axes": held["axes"]} if axes == held["out_axes"] else {}
        config = {**config, **open_, "out_axes": held["out_axes"]}
    return {**held, **config} == held


def _equal(told: dict[str, Tensor], held: dict[str, Tensor]) -> bool:
    return told.keys() == held.keys() and all(
        torch.equal(told[key].to(held[key].dtype), held[key]) for key in told
    )


def agrees_with_peft(folder: Path, model: nn.Module) -> bool:
    """The same of a folder: its tensors, and the update that PEFT's formula makes of them."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    config = json.loads((folder / CONFIG).read_bytes())
    for name, layer in find_adapted(model).items():
        own, held = f"{PREFIX}{name}.", layer.tensors()
        rank = held["A"].shape[0]
        for key, part in {"A": "lora_A.weight", "B": "lora_B.weight"}.items():
            if not torch.equal(tensors[own + part].to(held[key].dtype), held[key]):
                return False
        patterns = (config.get("alpha_pattern") or {}).items()
        alphas = [v for p, v in patterns if re.match(rf"(.*\.)?({p})$", name)]
        alpha = alphas[0] if alphas else config.get("lora_alpha", 8)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if getattr(layer.adapter, "scale", None) != scale or bool(config.get("use_dora")) != (
            "m" in held
        ):
            return False
    return True


# -- the work --------------------------------------------------------------------------------------


def resealed(data: bytes) -> bytes:
    return sealed(SEAL.sub(rb"\g<1>" + UNSEALED.encode(), data, count=1))


def run_chunk(population: str, seed: int, count: int, scratch: Path) -> dict[str, Any]:
    """`count` mutants of one population and seed: what became of them."""
    rng = random.Random(f"{population} {seed}")
    source = {"saved": _Adapters, "resealed": _Adapters, "peft": _Folders}[population](scratch)
    outcomes: Counter[str] = Counter()
    mutations: Counter[str] = Counter()
    failures: list[str] = []
    slowest = spent = 0.0
    began = time.perf_counter()
    for number in range(count):
        kind, mutation, data = source.mutant(rng, population == "resealed")
        adapted = rng.random() < 0.5
        model, before = source.target(kind, adapted)
        start = time.perf_counter()
        outcome = "accepted"
        try:
            sa.load(model, source.path)
        except (ValueError, OSError):
            outcome = "refused"
        except BaseException as error:  # whatever it is, that is the finding
            outcome = "foreign"
            failures.append(f"{seed}/{number}, {mutation} of {kind}: {error!r:.200}")
        took = time.perf_counter() - start
        slowest, spent = max(slowest, took), spent + took
        if outcome == "accepted":
            source.forget(kind, adapted)
            right = population != "saved" and source.agrees(data, model)
            outcome = "loaded as it says" if right else "accepted"
            if not right:
                failures.append(f"{seed}/{number}, {mutation} of {kind}: accepted")
        elif snapshot(model) != before:
            outcome = "changed"
            failures.append(f"{seed}/{number}, {mutation} of {kind}: the model is another one")
            source.forget(kind, adapted)
        outcomes[outcome] += 1
        mutations[mutation] += 1
    return {
        "files": count, "outcomes": dict(outcomes), "mutations": dict(mutations),
        "failures": failures[:20], "slowest_ms": 1e3 * slowest, "loading_s": spent,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


class _Adapters:
    """Adapter files, and models to load them into."""

    def __init__(self, scratch: Path) -> None:
        self.path = scratch / "mutant.safetensors"
        self.files, self.models = {}, {}
        for kind, adapter in KINDS.items():
            sa.save(trained(adapter), self.path)
            self.files[kind] = self.path.read_bytes()

    def target(self, kind: str, adapted: bool) -> tuple[nn.Module, list[Any]]:
        """A model that the file would fit; the same one as long as nothing was loaded."""
        if (kind, adapted) not in self.models:
            model = self.fresh(kind) if adapted else small_model()
            self.models[kind, adapted] = model, snapshot(model)
        return self.models[kind, adapted]

    def fresh(self, kind: str) -> nn.Module:
        return sa.adapt(small_model(), KINDS[kind])

    def forget(self, kind: str, adapted: bool) -> None:
        self.models.pop((kind, adapted), None)

    def mutant(self, rng: random.Random, reseal: bool) -> tuple[str, str, bytes]:
        """Written to `path`: the kind of adapter, the mutation, the content."""
        kind = rng.choice([*self.files])
        mutation, data = mutated(rng, MUTATIONS, self.files[kind])
        if reseal:
            data = resealed(data)
        self.path.write_bytes(data)
        return kind, mutation, data

    def agrees(self, data: bytes, model: nn.Module) -> bool:
        return agrees(data, model)


class _Folders(_Adapters):
    """PEFT folders: of each, the configuration or the weights are mutated."""

    def __init__(self, scratch: Path) -> None:
        self.path, self.files, self.models = scratch / "peft", {}, {}
        self.kinds: dict[str, Adapter] = {
            "LoRA": KINDS["LoRA"], "DoRA": KINDS["DoRA"],
            "rsLoRA": sa.LoRA(rank=2, scaling="alpha/sqrt(r)"),
        }  # fmt: skip
        for kind, adapter in self.kinds.items():
            sa.export_peft(trained(adapter), self.path)
            self.files[kind] = {n: (self.path / n).read_bytes() for n in (WEIGHTS, CONFIG)}

    def fresh(self, kind: str) -> nn.Module:
        return sa.adapt(small_model(), self.kinds[kind])

    def mutant(self, rng: random.Random, reseal: bool) -> tuple[str, str, bytes]:
        kind, name = rng.choice([*self.files]), rng.choice((WEIGHTS, CONFIG))
        content = dict(self.files[kind])
        which = MUTATIONS if name == WEIGHTS else OF_A_CONFIG
        mutation, content[name] = mutated(rng, which, content[name])
        for file, data in content.items():
            (self.path / file).write_bytes(data)
        return kind, mutation, b""

    def agrees(self, data: bytes, model: nn.Module) -> bool:
        return agrees_with_peft(self.path, model)


def measure(so_far: dict[str, Any] | None, files: int, keep: Callable[[Any], None]) -> Any:
    """All chunks that are not done yet; `keep` takes the totals after each. The chunks' numbers are
    their seeds, from 0."""
    found = so_far or {"chunk": min(CHUNK, files), "populations": {}}
    chunks = max(1, files // found["chunk"])
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are read and not done
        for population, share in SHARE.items():
            totals = found["populations"].setdefault(population, {"chunks": 0})
            for seed in range(totals["chunks"], max(1, chunks * share // 100)):
                before = _resident()
                chunk = run_chunk(population, seed, found["chunk"], Path(scratch))
                _add(totals, chunk)
                if seed:  # the first one fills caches
                    totals["grown_mib"] = totals.get("grown_mib", 0.0) + _resident() - before
                keep(found)
    return found


def _add(totals: dict[str, Any], chunk: dict[str, Any]) -> None:
    totals["chunks"] += 1
    for key in ("files", "loading_s", "seconds"):
        totals[key] = totals.get(key, 0) + chunk[key]
    for key in ("outcomes", "mutations"):
        totals[key] = dict(Counter(totals.get(key, {})) + Counter(chunk[key]))
    totals["slowest_ms"] = max(totals.get("slowest_ms", 0.0), chunk["slowest_ms"])
    totals["failures"] = (totals.get("failures", []) + chunk["failures"])[:20]


def _memory() -> str | None:
    """A folder in memory, so that the disk is not what is measured."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _resident() -> float:
    """MiB."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return 0.0


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, target, measured, met) for the table."""
    made = []
    words = {
        "saved": "mutated adapter files", "resealed": "the same with the sha256 made again",
        "peft": "mutated PEFT folders",
    }  # fmt: skip
    for population, totals in found["populations"].items():
        counts = totals["outcomes"]
        bad = sum(counts.get(k, 0) for k in ("foreign", "changed", "accepted"))
        said = (
            f"{totals['files']:,} files: {counts.get('refused', 0):,} refused, "
            f"{counts.get('loaded as it says', 0):,} loaded as they say; "
            f"{counts.get('foreign', 0)} foreign exceptions, {counts.get('changed', 0)} models "
            f"changed, {counts.get('accepted', 0)} altered files accepted; "
            f"{totals['files'] / totals['loading_s']:,.0f} files/s, slowest "
            f"{totals['slowest_ms']:.0f} ms"
        )
        made.append((words[population], "0, 0, 0", said, not bad))
    return made


if __name__ == "__main__":  # one chunk, to look into a failure: population, seed, files
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        population, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        print(json.dumps(run_chunk(population, seed, count, Path(folder)), indent=1))
