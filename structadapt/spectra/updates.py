"""What of a model trains, and how large and how concentrated each update is: for the monitor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from structadapt.adapted import Adapted, whole
from structadapt.adapters import DoRA, LoRA, QuanTA
from structadapt.layers import find_adapted, matrix_shape, plain_name, unwrapped
from structadapt.spectra import moments

SMALL = 256  # a side up to this has an exact Gram matrix; beyond, probes
FROZEN = "its adapter is frozen"
LATER = "its adapter was added, replaced or unfrozen after the monitor was made: make a new one"
GONE = "its layer left the model after the monitor was made: what is read is of the one that left"


@dataclass(frozen=True, eq=False)
class Tracked:
    """One matrix whose update is watched."""

    name: str
    shape: tuple[int, int]  # (out, in)
    kind: str  # the adapter's class, or "weight"
    rank: int | None  # at most, by construction; None: full
    layer: Adapted | None = None
    weight: nn.Parameter | None = None  # that trains by itself, with what it started from
    start: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What the update is made of, at least one."""
        if self.layer is None:
            return [cast(Tensor, self.weight)]
        return [*self.layer.tensors().values(), self.layer.frozen_weight]

    @property
    def null(self) -> float:
        """D_2 of a random update of this shape and rank (see `moments.null`)."""
        return moments.null(self.rank or 10**18, *self.shape)


@dataclass(frozen=True)
class Base:
    """Sizes of a frozen matrix W."""

    frobenius: float
    spectral: float  # largest singular value


def find(model: nn.Module, snapshots: bool) -> tuple[list[Tracked], dict[str, str]]:
    """The updates that can be watched, and why other parameters that train are not, by name."""
    model = unwrapped(model)
    updates: list[Tracked] = []
    others: dict[str, str] = {}
    ours: set[int] = set()
    for name, layer in find_adapted(model).items():
        name = plain_name(name)
        if not _trains(layer):
            others[name] = FROZEN
            continue
        updates.append(_of_layer(name, layer))
        ours |= {id(t) for n, t in layer.tensors().items() if n != "delta_bias"}
    for name, p in model.named_parameters():
        if not p.requires_grad or id(p) in ours:
            continue
        name = plain_name(name)
        if p.dim() != 2:
            others[name] = f"its shape is {tuple(p.shape)}: no matrix"
        elif not snapshots:
            others[name] = "trains without an adapter: pass snapshots=True to keep a copy of it"
        else:
            shape, start = (p.shape[0], p.shape[1]), p.detach().clone()
            updates.append(
                Tracked(name.removesuffix(".weight"), shape, "weight", None, None, p, start)
            )
    return updates, others


def unseen(model: nn.Module, watched: list[Tracked]) -> dict[str, str]:
    """Where the adapters that train are no longer those of `find`, by name, and how. Reads no
    tensor."""
    left = {id(update.layer): update for update in watched if update.layer is not None}
    found: dict[str, str] = {}
    for name, layer in find_adapted(unwrapped(model)).items():
        was, now = left.pop(id(layer), None), _of_layer(plain_name(name), layer)
        same = was is not None and (was.kind, was.rank) == (now.kind, now.rank)
        if not same and _trains(layer):
            found[now.name] = LATER
    return {update.name: GONE for update in left.values()} | found


def _trains(layer: Adapted) -> bool:
    """Whether the update of the weight does; the bias is none of it."""
    return any(t.requires_grad for n, t in layer.tensors().items() if n != "delta_bias")


def _of_layer(name: str, layer: Adapted) -> Tracked:
    shape, adapter = matrix_shape(layer), layer.adapter
    rank = min(adapter.rank, *shape) if isinstance(adapter, LoRA) else None
    return Tracked(name, shape, type(adapter).__name__, rank, layer)


@torch.no_grad()
def base_of(update: Tracked) -> tuple[Base, Tensor | None]:
    """Sizes of W, and for DoRA its row norms (out,). Waits for the device."""
    W = update.start if update.layer is None else update.layer.matrix()
    W = whole(cast(Tensor, W))
    W = W if W.dtype in (torch.float32, torch.float64) else W.float()
    sizes = torch.stack([torch.linalg.vector_norm(W).double(), moments.spectral_norm(W)])
    rows = update.layer is not None and isinstance(update.layer.adapter, DoRA)
    norms = torch.linalg.vector_norm(W, dim=1) if rows else None
    return Base(*sizes.tolist()), norms


@torch.no_grad()
def measure(updates: list[Tracked], row_norms: dict[str, Tensor]) -> Tensor:
    """(len(updates), 5) in float64 on the device of the first.

    Adapters with factors go together by shape and rank. Nothing waits for the device. Of sharded
    parameters the whole values are gathered: a call that all processes make together.
    """
    found: list[Tensor | None] = [None] * len(updates)
    for places in _batches(updates):
        layers = [cast(Adapted, updates[i].layer) for i in places]
        factors = [[whole(getattr(layer, n).detach()) for layer in layers] for n in "BA"]
        B, A = map(torch.stack, factors)
        scale = [cast(LoRA, layer.adapter).scale for layer in layers]
        seen = moments.of_factors(B, A, _constant(scale, B))
        for place, column in zip(places, seen.unbind(-1), strict=True):
            found[place] = column
    rows = []
    for update, seen in zip(updates, found, strict=True):
        seen = _one(update) if seen is None else seen
        rows.append(torch.cat([seen, _drift(update, row_norms).to(seen)]))
    return torch.stack([row.to(rows[0].device) for row in rows])


def _constant(values: list[float], like: Tensor) -> Tensor | float:
    """The one value, or a tensor; made on the device only where they differ."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.float64).to(like.device, non_blocking=True)


def _batches(updates: list[Tracked]) -> Iterator[list[int]]:
    """Places of updates with factors of one shape, rank and device, few enough for the cache."""
    groups: dict[tuple, list[int]] = {}
    for place, update in enumerate(updates):
        if update.layer is not None and isinstance(update.layer.adapter, LoRA):
            A = cast(Tensor, update.layer.A)
            groups.setdefault((update.shape, A.shape, A.dtype, A.device), []).append(place)
    for (shape, A, _, device), places in groups.items():
        most = max(1, 2 ** (20 if device.type == "cpu" else 24) // (A[0] * sum(shape)))
        yield from (places[i : i + most] for i in range(0, len(places), most))


def _one(update: Tracked) -> Tensor:
    """F, D_2, p_1 of an update that has no factors."""
    if update.layer is None:
        weight, start = cast(Tensor, update.weight), cast(Tensor, update.start)
        D = whole(weight.detach()).double() - whole(start).double()
        return _dense(D)
    adapter = update.layer.adapter
    p = {name: whole(t.detach()) for name, t in update.layer.tensors().items()}
    if not isinstance(adapter, QuanTA) or min(update.shape) <= SMALL:
        return _dense(adapter.direction(update.shape, p))
    x = _signs(update.shape[1], p["gate_0"])
    return moments.of_action(lambda x: adapter.update(x, update.shape[0], p), x)


def _dense(D: Tensor) -> Tensor:
    if min(D.shape) <= SMALL:
        return moments.of_dense(D)
    return moments.of_action(lambda x: x @ D.T, _signs(D.shape[1], D))


def _signs(width: int, like: Tensor) -> Tensor:
    """The same +-1 at every check, from a generator of their own."""
    generator = torch.Generator().manual_seed(width)
    shape = (moments.SKETCH + moments.PROBES, width)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(device=like.device, dtype=like.dtype, non_blocking=True)


def _drift(update: Tracked, row_norms: dict[str, Tensor]) -> Tensor:
    """Mean and largest |m / |W|_row - 1| of DoRA; rows of zeros aside."""
    norm = row_norms.get(update.name)
    if norm is None:
        return torch.zeros(2)
    m = whole(cast(Tensor, cast(Adapted, update.layer).m).detach())
    moved = torch.where(norm == 0, 0.0, (m / torch.where(norm == 0, 1.0, norm) - 1).abs())
    return torch.stack([moved.mean(), moved.max()])
