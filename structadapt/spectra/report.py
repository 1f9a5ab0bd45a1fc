"""Spectra of the updates of a model or an adapter file, one row a matrix."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structadapt.checkpoint import SavedLayer, is_adapter_file, read_adapters, read_tensors
from structadapt.layers import adapted_layers, find_adapted
from structadapt.spectra import measures, powerlaw

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

COLUMNS: tuple[str, ...] = (
    "name",
    "shape",  # (out, in)
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
    "stable_rank",
    "topk_energy",  # k = 1
    "frobenius_norm",
    "relative_norm",  # ||dW||_F / ||W||_F; None without the base weight
    "alpha",  # power-law exponent of the eigenvalues of dW^T dW; None if fewer than ten
    "status",  # "ok", "partial" or "skipped"
    "reason",  # why it is not "ok"
)


@dataclass(frozen=True)
class Report:
    """One record per matrix; keys are `COLUMNS`, values None where there is nothing to say."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write {"rows": [...]} as strict JSON."""
        Path(path).write_text(json.dumps({"rows": self.rows}, allow_nan=False, indent=1) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line a matrix under a line of column names."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({**r, "shape": "x".join(map(str, r["shape"]))} for r in self.rows)

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises ImportError if pandas is not installed."""
        try:
            import pandas  # type: ignore[import-not-found,import-untyped]
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def to_markdown(self) -> str:
        """The rows as a Markdown table."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for row in self.rows:
            lines.append("| " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |")
        return "\n".join(lines)


def analyze(source: Source, base: Source | None = None) -> Report:
    """Spectral measures of weight updates, one row a matrix.

    source: an adapted model, or an adapter file written by `structadapt.save`: the update of each
        adapted layer. With `base`: also a model, a state dict or a safetensors file of weights,
        and the rows are the differences of every matrix of the source; an adapted model counts
        as its adapted weights.
    base: the base weights as a model, adapted or not, a state dict or a safetensors file. An
        adapter file needs them for `relative_norm`, and for the whole update of an adapter that
        depends on them (DoRA); without them such a row is "partial".

    Raises FileNotFoundError; ValueError for a model that is not adapted when there is no base, a
    file that is damaged, a base that lacks a matrix, or one of another shape.
    """
    return Report([_row(*update) for update in _updates(source, base)])


def _updates(
    source: Source, base: Source | None
) -> Iterator[tuple[str, Tensor, Tensor | None, str]]:
    """(name, W' - W, W or None, reason if only part of it) of every matrix."""
    if isinstance(source, nn.Module) and base is None:
        for name, layer in adapted_layers(source).items():
            yield name, layer.delta_weight(), layer.matrix(), ""
    elif isinstance(source, str | os.PathLike) and is_adapter_file(source):
        weights = None if base is None else _weights(base)
        for name, layer in read_adapters(source).items():
            yield name, *_saved_update(name, layer, weights)
    elif base is None:
        raise ValueError(
            "nothing to compare: pass an adapted model, an adapter file, or base= with the "
            "weights that this source started from"
        )
    else:
        tuned, weights = _weights(source, adapted=True), _weights(base)
        if not tuned:
            raise ValueError("the source has no matrix")
        for name in tuned:
            W = _base_weight(weights, name, tuple(tuned[name].shape))
            yield name, (tuned[name].double() - W.double()).float(), W, ""


def _saved_update(
    name: str, layer: SavedLayer, weights: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor | None, str]:
    p = {key: tensor.double() for key, tensor in layer.tensors.items()}
    if weights is not None:
        W = _base_weight(weights, name, layer.shape)
        return (layer.adapter.weight(W.double(), p) - W.double()).float(), W, ""
    direction = layer.adapter.direction(layer.shape, p).float()
    if layer.adapter.additive:
        return direction, None, ""
    kind = type(layer.adapter).__name__
    return direction, None, f"direction only: the update of {kind} depends on W, pass base="


def _base_weight(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in weights:
        raise ValueError(f"the base has no matrix {name}")
    if tuple(weights[name].shape) != shape:
        found = tuple(weights[name].shape)
        raise ValueError(f"{name} is {shape} in the source and {found} in the base")
    return weights[name].detach()


def _weights(source: Source, adapted: bool = False) -> dict[str, Tensor]:
    """Matrices by layer name, without the suffix `.weight`.

    Of an adapted model, the base's weights, or with `adapted` W' in float64.
    """
    others: set[str] = set()  # tensors that are an adapter's
    if isinstance(source, nn.Module):
        tensors: Mapping[str, Tensor] = source.state_dict()
        layers = find_adapted(source)
        ours = {
            f"{n}.weight": m.frozen_weight.double() + m.as_stored(m.delta_weight())
            if adapted
            else m.frozen_weight
            for n, m in layers.items()
        }
        tensors = {**tensors, **ours}
        others = {f"{n}.{key}" for n, m in layers.items() for key in m.tensor_names}
    elif isinstance(source, Mapping):
        tensors = source
    else:
        tensors = read_tensors(source)
    return {
        "" if name == "weight" else name.removesuffix(".weight"): tensor.detach().cpu()
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and tensor.is_floating_point() and name not in others
    }


def _row(name: str, delta: Tensor, W: Tensor | None, partial: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(name=name, shape=tuple(delta.shape), status="ok", reason="")
    if not torch.isfinite(delta).all():
        return {**row, "status": "skipped", "reason": "the update is not finite"}
    s = measures.singular_values(delta)
    norm = torch.linalg.vector_norm(s).item()
    base_norm = 0.0 if W is None else torch.linalg.vector_norm(W.double()).item()
    power = powerlaw.fit(s.square().cpu().numpy())
    for function in (
        measures.effective_rank,
        measures.effective_rank_energy,
        measures.participation_ratio,
        measures.stable_rank,
        measures.topk_energy,
    ):
        row[function.__name__] = function(s)
    row.update(
        frobenius_norm=norm,
        relative_norm=norm / base_norm if base_norm else None,
        alpha=power.alpha if power else None,
    )
    return {**row, "status": "partial", "reason": partial} if partial else row


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)
