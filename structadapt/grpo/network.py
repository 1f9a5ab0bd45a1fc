"""One way to call a language model, whatever its forward looks like, and to keep its cache.

A model is any callable module on token ids. Two forms are understood:
    transformers: forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        with .logits and .past_key_values in what it returns (or `cache` for both, as newer
        versions call it): sampled with its cache;
    plain: forward(ids, mask, position_ids) -> logits, without the last or the last two if it
        likes: every new token runs the whole sequence.
mask may be called attention_mask, and position_ids positions; other names go by place.
logits (N, L, V); ids and position_ids (N, L) int64; mask (N, L) int64, 1 where there is a token.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structadapt.grpo.output_head import OutputHead

MASK_NAMES, POSITION_NAMES = ("attention_mask", "mask"), ("position_ids", "positions")
CACHE_NAMES = ("past_key_values", "cache")

PARTS, SMALL, WORTH = 4, 512, 0.8  # of `finish`: its groups, and what is not worth them


class Network:
    """A model of either form with the sequences it has read.

    With `head`, hidden states before the head stand wherever logits are spoken of.
    """

    def __init__(self, model: nn.Module, padded: bool, head: OutputHead | None = None) -> None:
        self.model, self.head = model, head
        inner = innermost(model)
        self.kind = type(inner).__name__
        signature = inspect.signature(inner.forward)
        parameters = signature.parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), "")
        self.cached = bool(self.cache_name) and "use_cache" in parameters
        self.keeps_last = "logits_to_keep" in parameters  # (N, 1, V) of a prompt, not (N, L, V)
        first, *others = parameters.values()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in others)
        known = {*MASK_NAMES, *POSITION_NAMES}
        required = [p.name for p in others if p.default is p.empty and p.kind not in
                    (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in known]  # fmt: skip
        self.mask_name, self.position_name = (
            next((name for name in names if name in parameters), None)
            or (names[0] if open_ended else None)
            or (required.pop(0) if required else None)
            for names in (MASK_NAMES, POSITION_NAMES)
        )
        if required or first.kind is first.VAR_POSITIONAL:
            raise ValueError(
                f"{self.kind}.forward{signature} is not understood: "
                "let it take (ids, mask, position_ids)"
            )
        if padded and self.mask_name is None:
            raise ValueError(
                f"prompts of unequal lengths need padding, and {self.kind}.forward takes no mask: "
                "pass prompts of one length, or let it take (ids, mask, position_ids)"
            )
        self.cache: Any = None
        self.ids: Tensor | None = None  # all so far, for a model without a cache

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, L, V) of whole sequences, without a cache."""
        return self._call(ids, mask, _positions(mask))[1]

    def start(self, ids: Tensor, mask: Tensor, share: bool) -> Tensor:
        """(N, V) after the prompts; `extend` goes on from there."""
        if not self.cached:
            if share:
                raise ValueError(f"share_prompts needs a cache, and {self.kind}.forward has none")
            self.ids = ids
            return self.logits(ids, mask)[:, -1]
        rows = torch.arange(len(ids), device=ids.device)
        if share:
            both, rows = torch.unique_consecutive(
                torch.cat([ids, mask], 1), dim=0, return_inverse=True
            )
            ids, mask = both.chunk(2, 1)
        last = {"logits_to_keep": 1} if self.keeps_last and self.head is None else {}
        out, logits = self._call(ids, mask, _positions(mask), use_cache=True, **last)
        self.cache = _cache(out, self.cache_name)
        if share:
            self.cache = _take_rows(self.cache, rows)
        return logits[rows, -1]

    def extend(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, L, V) of L more tokens; the mask is that of the whole sequence."""
        if self.ids is not None:
            self.ids = torch.cat([self.ids, ids], 1)
            return self.logits(self.ids, mask)[:, -ids.shape[1] :]
        positions = _positions(mask)[:, -ids.shape[1] :]
        cache = {self.cache_name: self.cache, "use_cache": True}
        out, logits = self._call(ids, mask, positions, **cache)
        self.cache = _cache(out, self.cache_name)
        return logits

    def finish(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """`extend` for the last time, by the first `lengths` (N,) tokens of each; 0 behind them.

        Sequences of like lengths go together, so that most of the padding is not run.
        """
        N, L = ids.shape
        if self.ids is not None or not _is_plain(self.cache) or N * L < SMALL:
            return self.extend(ids, mask)
        order, past = lengths.argsort(descending=True), mask.shape[1] - L
        groups = order.tensor_split(min(PARTS, N))
        widths = [max(int(lengths[rows].amax()), 1) for rows in groups]
        apart = sum(len(rows) * width for rows, width in zip(groups, widths, strict=True))
        if apart > WORTH * N * L:
            return self.extend(ids, mask)
        found = []
        for rows, width in zip(groups, widths, strict=True):
            part = copy.copy(self)
            part.cache = _take_rows(_apart(self.cache), rows)
            out = part.extend(ids[rows, :width], mask[rows, : past + width])
            found.append(F.pad(out, (0, 0, 0, L - width)))
        return torch.cat(found)[order.argsort()]

    def keep(self, rows: Tensor, columns: int) -> None:
        """Go on with these sequences, without their first `columns` tokens, which are padding."""
        if self.ids is not None:
            self.ids = self.ids[rows, columns:]
        else:
            self.cache = _take_rows(self.cache, rows)
            if columns:
                self.cache = _each(self.cache, lambda t: t[:, :, columns:])

    def join(self, other: "Network", width: int) -> None:
        """Take in another's sequences, all padded on the left to `width` tokens."""
        if self.ids is not None and other.ids is not None:
            both = [F.pad(t, (width - t.shape[1], 0)) for t in (self.ids, other.ids)]
            self.ids = torch.cat(both)
        else:
            theirs = iter(_tensors(other.cache))

            def wide(t: Tensor) -> Tensor:
                return F.pad(t, (0, 0, width - t.shape[2], 0))

            self.cache = _each(self.cache, lambda t: torch.cat([wide(t), wide(next(theirs))]))

    @property
    def joins(self) -> bool:
        """Whether `join` and cutting columns work: keys and values are (N, heads, L, d)."""
        return self.ids is not None or _is_plain(self.cache)

    def _call(
        self, ids: Tensor, mask: Tensor, positions: Tensor, **cache: Any
    ) -> tuple[Any, Tensor]:
        if self.cached and not cache:
            cache = {"use_cache": False}
        named = {self.mask_name: mask, self.position_name: positions}
        arguments = {name: t for name, t in named.items() if name} | cache
        if self.head is not None:
            return self.head.hidden(lambda: self.model(ids, **arguments), _logits)
        out = self.model(ids, **arguments)
        return out, _logits(out)


@torch.no_grad()
def first_nonfinite(model: nn.Module, ids: Sequence[int]) -> str:
    """The name of the module whose output is the first that is not finite, for one sequence; ""
    where none is."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensors = out if isinstance(out, tuple | list) else [out]
            if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        row = torch.tensor([list(ids)], device=next(model.parameters()).device)
        Network(model, padded=False).logits(row, torch.ones_like(row))
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def innermost(model: nn.Module) -> nn.Module:
    """The module that torch.compile or DistributedDataParallel wraps: it has the signature."""
    while True:
        parameters = inspect.signature(model.forward).parameters.values()
        opaque = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        inner = getattr(model, "_orig_mod", None)
        if inner is None and opaque:
            inner = getattr(model, "module", None)
        if inner is None:  # a PEFT model, whose own forward does not tell of the cache
            inner = getattr(model, "get_base_model", lambda: None)()
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _cache(out: Any, name: str) -> Any:
    cache = out[1] if isinstance(out, tuple) else getattr(out, name)
    if cache is None:
        raise ValueError(
            "the model returned no cache though use_cache=True was passed, as transformers' models "
            "do with gradient checkpointing in train mode: leave out share_prompts"
        )
    return cache


def _take_rows(cache: Any, rows: Tensor) -> Any:
    """The cache of some sequences: transformers' own, or keys and values of every layer."""
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return cache
    return [(keys[rows], values[rows]) for keys, values in cache]


def _apart(cache: Any) -> Any:
    """The same keys and values in a cache that may be changed by itself."""
    if not hasattr(cache, "layers"):
        return cache  # pairs are never written into
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _is_plain(cache: Any) -> bool:
    """Whether a cache holds every token's key and value, at the same place in every layer."""
    layers = getattr(cache, "layers", None)
    if layers is not None:  # of transformers; a sliding window or a state is of another type
        return all(type(layer).__name__ == "DynamicLayer" for layer in layers)
    return isinstance(cache, Sequence) and all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(t.dim() == 4 for t in pair)
        for pair in cache
    )


def _tensors(cache: Any) -> list[Tensor]:
    layers = getattr(cache, "layers", None)
    pairs = cache if layers is None else [(layer.keys, layer.values) for layer in layers]
    return [t for pair in pairs for t in pair]


def _each(cache: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The cache with every key and value (N, heads, L, d) changed."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return [(change(keys), change(values)) for keys, values in cache]
    for layer in layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return cache


def _logits(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.logits


def _positions(mask: Tensor) -> Tensor:
    """0 for the first real token of each row, also after padding on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)
