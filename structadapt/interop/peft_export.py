"""Write adapters as a PEFT folder, which PEFT, vLLM and SGLang load. The format: peft_import.py."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from structadapt.adapted import Adapted
from structadapt.adapters import DoRA, LoRA
from structadapt.adapters.lora import LARGEST_RANK
from structadapt.files import refuse_foreign, whole_folder
from structadapt.interop.peft_config import (
    CONFIG_FILE,
    PICKLE_FILE,
    PREFIX,
    WEIGHTS_FILE,
    unlike_peft,
)
from structadapt.interop.state import finite_tensors, refuse_sharded
from structadapt.layers import adapted_layers, plain_name, unwrapped

REPLACEABLE = {CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, "README.md"}


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    serve_safe: bool = False,
    svd_rank: int | None = None,
) -> dict[str, float]:
    """Write the adapters of `model` as a PEFT folder; the model, merged or not, stays as it is.

    Returns the relative error ||sBA - (W' - W)|| / ||W' - W|| (Frobenius) of each layer, 0.0 where
    the adapter is written as it is. The same adapters give the same bytes; the folder at the path
    is the old one or the whole new one. PEFT, and nothing else, loads ranks and alphas that differ
    between layers, embeddings, convolutions and biases.

    serve_safe: what vLLM and SGLang load: one rank, smaller ones padded with zeros; the scale
        folded into B; A and B of linear layers alone.
    svd_rank: write every layer that is not a LoRA of at most this rank as the LoRA of this rank
        nearest to its update W' - W, by singular value decomposition in float64.

    Raises ValueError, before anything is written, for adapters that the format cannot hold (QuanTA,
    LoRA beside DoRA), saying what would work; if the model is not adapted, is sharded, or a tensor
    is not finite; FileExistsError if `folder` holds anything but a PEFT folder.
    """
    if svd_rank is not None and not (type(svd_rank) is int and 0 < svd_rank <= LARGEST_RANK):
        raise ValueError(f"svd_rank must be a positive integer, got {svd_rank!r}")
    refuse_foreign(folder, REPLACEABLE.__contains__)
    model = unwrapped(model)
    layers = {plain_name(name): layer for name, layer in adapted_layers(model).items()}
    refuse_sharded(layers)
    if "" in layers:
        raise ValueError("PEFT names layers within a model, and this model is itself the layer")
    for name, layer in layers.items():
        if problem := unlike_peft(layer):
            raise ValueError(f"{name} {problem}: use export_merged")
    _refuse_kinds(layers, serve_safe, svd_rank)
    entries = {name: _entry(name, layer, svd_rank) for name, layer in layers.items()}
    if serve_safe:
        rank = max(entry.rank for entry in entries.values())
        entries = {n: _served(n, entry, layers[n], rank) for n, entry in entries.items()}
    bias = _bias_mode(entries, layers)
    config = _config(model, entries, layers, bias)
    tensors = {}
    for name, entry in entries.items():
        tensors |= _tensors(name, entry, layers[name], bias)
    with whole_folder(folder, REPLACEABLE.__contains__) as new:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        (new / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")
        data = safetensors.torch.save(dict(sorted(tensors.items())), {"format": "pt"})
        (new / WEIGHTS_FILE).write_bytes(data)
    return {name: entry.error for name, entry in entries.items()}


# -- what each layer becomes -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One layer of the folder: LoRA, or DoRA with m."""

    adapter: LoRA
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    m: Tensor | None = None  # (out,)
    delta_bias: Tensor | None = None  # (out,)
    error: float = 0.0

    @property
    def rank(self) -> int:
        return self.adapter.rank


def _refuse_kinds(layers: dict[str, Adapted], serve_safe: bool, svd_rank: int | None) -> None:
    """ValueError for a mixture of adapters that one PEFT folder cannot hold."""
    if svd_rank is not None:
        return
    by_kind: dict[str, str] = {}
    for name, layer in layers.items():
        by_kind.setdefault(type(layer.adapter).__name__, name)
    remedy = "use export_merged, or give svd_rank for the nearest LoRA, with its error"
    for kind, name in by_kind.items():
        if kind not in ("LoRA", "DoRA"):
            raise ValueError(f"{name} has a {kind}, which a PEFT folder cannot hold: {remedy}")
    if serve_safe and "DoRA" in by_kind:
        raise ValueError(f"{by_kind['DoRA']} has a DoRA, which vLLM does not load: {remedy}")
    if len(by_kind) > 1:
        raise ValueError(
            f"{by_kind['LoRA']} has a LoRA and {by_kind['DoRA']} a DoRA, but a PEFT folder is one "
            f"or the other (use_dora holds for all its layers): {remedy}"
        )


def _entry(name: str, layer: Adapted, svd_rank: int | None) -> _Entry:
    """A layer as it is, or as the nearest LoRA of rank svd_rank."""
    p = finite_tensors(name, layer)
    adapter, delta_bias = layer.adapter, p.get("delta_bias")
    if type(adapter) is LoRA and adapter.rank <= (svd_rank or adapter.rank):
        return _Entry(adapter, p["A"], p["B"], delta_bias=delta_bias)
    if type(adapter) is DoRA and svd_rank is None:
        _refuse_zero_rows(name, layer, adapter, p)
        return _Entry(adapter, p["A"], p["B"], p["m"], delta_bias)
    assert svd_rank is not None
    delta = layer.delta_weight().double()
    if not torch.isfinite(delta).all():
        raise ValueError(f"{name}: its update is not finite: not exported")
    A, B, error = _nearest(delta, min(svd_rank, *delta.shape))
    return _Entry(LoRA(len(A), len(A)), A, B, delta_bias=delta_bias, error=error)


def _refuse_zero_rows(name: str, layer: Adapted, adapter: DoRA, p: dict[str, Tensor]) -> None:
    """PEFT divides m by the norm of each row of W + sBA, 0 or not."""
    V = layer.matrix().detach().to(p["A"].dtype) + adapter.scale * p["B"] @ p["A"]
    dead = (V == 0).all(dim=1).nonzero().flatten().tolist()
    if dead:
        raise ValueError(
            f"{name}: row {dead[0]} of W + sBA is zero ({len(dead)} such rows), where PEFT's DoRA "
            "divides by 0 and gives NaN: use export_merged, or give svd_rank"
        )


def _nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (r, in) and B (out, r) in fp32 whose product is nearest to delta, and the relative error.

    The singular vectors come from the Gram matrix of the shorter side, several times faster than a
    full decomposition; in float64 the loss is below the rounding of A and B.
    """
    wide = delta.shape[0] < delta.shape[1]
    D = delta.T if wide else delta  # (long, short)
    values, vectors = torch.linalg.eigh(D.T @ D)  # ascending
    right = vectors[:, -rank:].flip(1)  # (short, r)
    root = values[-rank:].flip(0).clamp(min=0) ** 0.25  # of the singular values
    alive = root > 0
    long = (D @ right) / torch.where(alive, root, 1.0) * alive  # (long, r)
    short = right * root
    A, B = (long.T, short) if wide else (short.T, long)
    A, B = A.float().contiguous(), B.float().contiguous()
    norm = torch.linalg.vector_norm(delta).item()
    off = torch.linalg.vector_norm(B.double() @ A.double() - delta).item()
    return A, B, off / norm if norm else 0.0


def _served(name: str, entry: _Entry, layer: Adapted, rank: int) -> _Entry:
    """s = 1 and the common rank. ValueError for what the servers would not load."""
    if isinstance(layer, nn.Embedding) or layer.frozen_weight.dim() > 2:
        raise ValueError(
            f"{name} ({layer.plain.__name__}): vLLM loads A and B of linear layers alone; adapt "
            "others, or use export_merged"
        )
    if entry.delta_bias is not None and entry.delta_bias.any():
        raise ValueError(
            f"{name} has a trained bias, and vLLM loads A and B alone: use export_merged"
        )
    A, B = entry.A, (entry.adapter.scale * entry.B.double()).to(entry.B.dtype)
    missing = rank - entry.rank
    A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
    B = torch.cat([B, B.new_zeros(len(B), missing)], dim=1)
    if not torch.isfinite(B).all():
        raise ValueError(f"{name}: scale times B is not finite in {B.dtype}: not exported")
    return replace(entry, adapter=LoRA(rank, rank), A=A, B=B, delta_bias=None)


# -- as the format has it --------------------------------------------------------------------------


def _bias_mode(entries: dict[str, _Entry], layers: dict[str, Adapted]) -> str:
    """How the folder holds delta_bias: "none", "lora_bias" (beside B), "lora_only" (base + it)."""
    moved = [name for name, entry in entries.items() if entry.delta_bias is not None]
    if not moved:
        return "none"
    dora = any(entry.m is not None for entry in entries.values())
    embedding = any(isinstance(layers[name], nn.Embedding) for name in entries)
    if not (dora or embedding):
        return "lora_bias"
    for name in moved:
        if getattr(layers[name], "bias", None) is None:
            raise ValueError(
                f"{name} has a delta_bias and no bias: PEFT's lora_bias, which could hold it, does "
                "not go with DoRA or with embeddings; use export_merged without it, or LoRA"
            )
    return "lora_only"


def _tensors(name: str, entry: _Entry, layer: Adapted, bias: str) -> dict[str, Tensor]:
    """The tensors of one layer under their names in the file, on the CPU."""
    kernel = tuple(layer.frozen_weight.shape[2:])
    ones = (1,) * len(kernel)
    out_features, rank = entry.B.shape
    a, b = ("lora_A.weight", "lora_B.weight")
    if isinstance(layer, nn.Embedding):
        a, b = ("lora_embedding_A", "lora_embedding_B")
    A = entry.A.reshape(rank, -1, *kernel)
    parts = {a: A, b: entry.B.reshape(out_features, rank, *ones)}
    if entry.m is not None:
        shape = (1, out_features, *ones) if kernel else (out_features,)
        parts["lora_magnitude_vector"] = entry.m.reshape(shape)
    moved = entry.delta_bias
    if moved is None:
        moved = entry.B.new_zeros(out_features)
    base = getattr(layer, "bias", None)
    if bias == "lora_bias":
        parts["lora_B.bias"] = (moved.double() / entry.adapter.scale).to(entry.B.dtype)
    elif bias == "lora_only" and base is not None:
        parts["base_layer.bias"] = (base.detach().double() + moved.double()).to(entry.B.dtype)
    return {f"{PREFIX}{name}.{k}": t.detach().cpu().contiguous() for k, t in parts.items()}


def _config(
    model: nn.Module, entries: dict[str, _Entry], layers: dict[str, Adapted], bias: str
) -> dict[str, Any]:
    """adapter_config.json: what differs between layers goes into patterns."""
    rslora = all(entry.adapter.scaling == "alpha/sqrt(r)" for entry in entries.values())
    ranks = {name: entry.rank for name, entry in entries.items()}
    alphas = {}
    for name, entry in entries.items():
        as_it_is = rslora or entry.adapter.scaling == "alpha/r"
        alpha = entry.adapter.alpha if as_it_is else entry.adapter.scale * entry.rank
        alphas[name] = int(alpha) if alpha == int(alpha) else alpha
    rank, rank_pattern = _usual(ranks)
    alpha, alpha_pattern = _usual(alphas)
    base = getattr(model, "config", None)
    kinds = {layer.plain.__name__ for layer in layers.values()} - {"Embedding"}
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": any(entry.m is not None for entry in entries.values()),
        "bias": "lora_only" if bias == "lora_only" else "none",
        "fan_in_fan_out": kinds == {"Conv1D"},
        "target_modules": _target_modules(model, [*entries]),
        "modules_to_save": None,
        **({"lora_bias": True} if bias == "lora_bias" else {}),  # older versions lack the key
    }


def _usual(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, the smallest of several, and patterns for the layers that differ."""
    counts = Counter(values.values())
    usual = min(counts, key=lambda value: (-counts[value], value))
    return usual, {f"^{re.escape(n)}": v for n, v in values.items() if v != usual}


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """The last parts of the names, the names, or an expression: the first that means just them."""
    modules = {plain_name(name) for name, _ in model.named_modules()}

    def selected(targets: list[str]) -> set[str]:
        return {m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)}

    for targets in (sorted({name.rsplit(".", 1)[-1] for name in names}), sorted(names)):
        if selected(targets) == {*names}:
            return targets
    return "|".join(re.escape(name) for name in sorted(names))
