"""Put adapted weights in the place of the frozen ones, and the frozen ones back.

Rounding W' to a low-precision dtype can lose the update it carries: in bf16, with an update of
relative size 1e-4, about 94 % of it. So every merge measures, per layer, the share of the update
that survives, <round(W') - W, W' - W> / |W' - W|^2, and speaks up.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structadapt.adapted import Adapted
from structadapt.layers import adapted_layers
from structadapt.ops import wide_dtype

WARN_BELOW, REFUSE_BELOW = 0.99, 0.5  # shares of an update that survive


@dataclass(frozen=True)
class LayerMerge:
    """What merging one layer does to its update."""

    name: str
    dtype: torch.dtype  # of the merged weight
    relative_update: float  # |W' - W| / |W|, Frobenius
    survives: float  # share of W' - W left after rounding; 1 if there is no update


@dataclass(frozen=True)
class MergeReport:
    """What merging does to the update of every layer. Print it."""

    layers: list[LayerMerge]

    @property
    def survives(self) -> float:
        """The smallest share of any layer."""
        return min(layer.survives for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}}  {'|dW|/|W|':>9}  {'survives':>8}  dtype"]
        lines += [
            f"{m.name:{width}}  {m.relative_update:9.2e}  {m.survives:8.1%}  {m.dtype}"
            for m in self.layers
        ]
        return "\n".join(lines)


def merge(
    model: nn.Module, *, report: bool = False, force: bool = False, residual: bool = False
) -> MergeReport | None:
    """Put W' in the place of W in every adapted layer; `unmerge` brings W back bit for bit.

    W' is computed in at least fp32 and rounded once to the dtype of W. W itself is kept aside, so
    the model holds both while merged.

    report: return a `MergeReport`: per layer, the share of the update that survives the rounding.
    residual: keep also what the rounding took, in the dtype of W, and run it as a second product:
        the merged model computes with W' to about twice the digits of that dtype. What fp16 cannot
        hold of it is lost, and counts as lost.
    force: merge without a warning however little survives.

    Warns below 99 % and refuses below 50 %, unless `force`. Raises RuntimeError if the model is
    merged already, sharded, quantised or on the meta device; ValueError if a weight is shared with
    another module, which would change with it, if W' is not finite, or if too little survives.
    Nothing is changed then.
    """
    return _merge(model, report, force, residual, stacklevel=5)


@torch.no_grad()
def _merge(
    model: nn.Module, report: bool, force: bool, residual: bool, stacklevel: int
) -> MergeReport | None:
    layers = adapted_layers(model)
    _refuse(model, layers)
    merged_weights: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    measured = []
    for name, layer in layers.items():
        dtype = layer.weight.dtype
        weight, exact = rounded(layer, dtype, report or residual)
        weight = weight.contiguous()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: the merged weight is not finite; nothing was merged")
        merged_weights[name] = weight
        if exact and residual:
            residuals[name] = (exact[1] - weight).to(dtype)
        if not exact and not force and _is_small(weight - layer.weight, layer.weight):
            exact = layer.wide_weights()
        if exact and (report or not force):
            measured.append(measure(name, layer, *exact, weight, residuals.get(name)))
    if not force:
        ways = "run it unmerged, or pass force=True"
        speak_up(measured, ways if residual else f"{ways}, or residual=True", stacklevel)
    try:
        for name, layer in layers.items():
            layer.base_weight = layer.weight.data
            layer.weight.data = merged_weights[name]
            layer.residual = residuals.get(name)
    except BaseException:  # an interrupt between two layers
        _unmerge(model)
        raise
    return MergeReport(measured) if report else None


def rounded(
    layer: Adapted, dtype: torch.dtype, measured: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """W' of a layer in `dtype`, and (W, W') in more digits: if they are wanted, or are there anyway
    since the layer's weight is of low precision."""
    low = wide_dtype(layer.weight.dtype) != layer.weight.dtype
    exact = layer.wide_weights() if low or measured else None
    return (exact[1] if exact and low else layer.adapted_weight()).to(dtype), exact


def _is_small(update: Tensor, W: Tensor) -> bool:
    """Whether fp32 may lose 1 % of an update: its roundings are 6e-8 of W."""
    return bool(torch.linalg.vector_norm(update) < 1e-5 * torch.linalg.vector_norm(W))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Bring back the base weights, bit for bit. Raises RuntimeError if none is merged."""
    if not _unmerge(model):
        raise RuntimeError("the model is not merged")


def _unmerge(model: nn.Module) -> bool:
    """Bring back what is merged; whether anything was."""
    layers = [m for m in adapted_layers(model).values() if m.base_weight is not None]
    for layer in layers:
        assert layer.base_weight is not None
        layer.weight.data = layer.base_weight
        layer.base_weight = layer.residual = None
    return bool(layers)


@contextmanager
def merged(model: nn.Module, *, force: bool = False, residual: bool = False) -> Iterator[None]:
    """Within this context the model runs on merged weights: for rollouts and evaluation. Arguments
    and errors as for `merge`."""
    _merge(model, False, force, residual, stacklevel=6)
    try:
        yield
    finally:
        _unmerge(model)


@contextmanager
def merged_if_exact(model: nn.Module) -> Iterator[None]:
    """For rollouts: merged weights where at least 99 % of every layer's update survives in them, as
    in fp32; else, and where `merge` refuses, the adapters as they are, whose samples cost more but
    come from the policy that learns. In bf16 both is seen, as the update grows."""
    layers = adapted_layers(model).values()
    low = any(wide_dtype(layer.weight.dtype) != layer.weight.dtype for layer in layers)
    before = any(layer.base_weight is not None for layer in layers)  # merged by the caller
    if not before:
        try:
            report = _merge(model, low, True, False, stacklevel=0)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # what cannot be merged
            report = None
        if report is not None and report.survives < WARN_BELOW:
            _unmerge(model)
    try:
        yield
    finally:
        if not before:
            _unmerge(model)


def measure(
    name: str,
    layer: Adapted,
    W: Tensor,
    exact: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
) -> LayerMerge:
    """What is left of the update exact - W in weight + residual."""
    update, kept = exact - W, weight.to(exact.dtype) - W
    if residual is not None:
        kept += residual
    size, whole = (torch.linalg.vector_norm(t).item() for t in (update, W))
    # A fresh magnitude is a norm rounded to fp32: that much is no update.
    nothing = 0.0 if layer.adapter.additive else torch.finfo(torch.float32).eps * whole
    share = 1.0 if size <= nothing else (torch.sum(update / size * kept) / size).item()
    return LayerMerge(name, weight.dtype, size / max(whole, 1e-300), share)


def speak_up(measured: list[LayerMerge], ways: str, stacklevel: int) -> None:
    """Warn of, or refuse with a ValueError, what loses too much of an update."""
    worst = min(measured, key=lambda layer: layer.survives, default=None)
    if worst is None or worst.survives >= WARN_BELOW:
        return
    said = (
        f"{worst.name}: {worst.survives:.0%} of its update of relative size "
        f"{worst.relative_update:.1e} survives rounding to {worst.dtype}"
    )
    if worst.survives < REFUSE_BELOW:
        raise ValueError(f"{said}; nothing was merged: {ways}")
    warnings.warn(f"{said}: {ways}", stacklevel=stacklevel)


def _refuse(model: nn.Module, layers: dict[str, Adapted]) -> None:
    for name, layer in layers.items():
        if layer.base_weight is not None:
            raise RuntimeError(f"{name} is merged already; unmerge first")
        if layer.is_quantised:
            raise RuntimeError(
                f"{name} has a quantised weight, which cannot hold a merged one: run it unmerged"
            )
        if layer.weight.is_meta:
            raise RuntimeError(f"{name} is on the meta device: load the base weights first")
        if hasattr(layer.weight, "device_mesh"):
            raise RuntimeError(f"{name} is sharded: merge before sharding, or unshard the model")
    owners = {id(layer.weight): name for name, layer in layers.items()}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner = owners.get(id(parameter), name)
            if owner != name:
                raise ValueError(f"{owner} and {name} share a weight: merging would change both")
