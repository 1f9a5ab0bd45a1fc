"""Sample completions, and the log-probability that a model gives them.

A model is any callable module on token ids. Two forms are understood:
    transformers: forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        with .logits and .past_key_values in what it returns (or `cache` for both, as newer
        versions call it): sampled with its cache;
    plain: forward(ids, mask, position_ids) -> logits, without the last or the last two if it
        likes: every new token runs the whole sequence.
mask may be called attention_mask, and position_ids positions; other names go by place.
logits (N, L, V); ids and position_ids (N, L) int64; mask (N, L) int64, 1 where there is a token.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from structadapt import ops
from structadapt.grpo.output_head import NotPlainError, OutputHead, draws, find_head, refuse

Head = Literal["auto", "logits"]
HEADS = get_args(Head)


@dataclass(frozen=True)
class Rollout:
    """N sampled sequences: prompts padded on the left, completions on the right."""

    prompt: Tensor  # (N, P) int64
    prompt_mask: Tensor  # (N, P) int64
    completion: Tensor  # (N, T) int64
    mask: Tensor  # (N, T) int64: 1 from the first new token through the end-of-sequence token
    logp: Tensor  # (N, T) float: of each token when it was drawn, at the sampling temperature
    entropy: Tensor  # (N, T) float: of the distribution it was drawn from, nats
    truncated: Tensor  # (N,) bool: no end-of-sequence token within the limit

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: slice) -> "Rollout":
        """Some of the sequences, without the columns that none of them uses."""
        part = Rollout(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))
        width = max(int(part.mask.sum(1).max()), 1)
        new = {n: getattr(part, n)[:, :width] for n in ("completion", "mask", "logp", "entropy")}
        return Rollout(part.prompt, part.prompt_mask, **new, truncated=part.truncated)

    def completions(self, eos_token_ids: Sequence[int]) -> list[list[int]]:
        """The new tokens of each sequence, without the end-of-sequence token."""
        lengths = self.mask.sum(1).tolist()
        kept = [row[:n] for row, n in zip(self.completion.tolist(), lengths, strict=True)]
        return [ids[:-1] if ids and ids[-1] in eos_token_ids else ids for ids in kept]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    share_prompts: bool = False,
) -> Rollout:
    """Sample one completion of each prompt; `temperature=0` takes the likeliest token each time.

    The pad token may equal an end-of-sequence token: masks go by position. The model runs as it
    is: see `evaluating` for eval mode. generator: on the model's device. share_prompts: run equal
    prompts that stand together once; needs a model with a cache.

    Raises ValueError for max_new_tokens < 1 or temperature < 0; an empty prompt; prompts of unequal
    lengths for a model whose forward takes no mask; share_prompts for a model without a cache.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature not negative, "
            f"got {max_new_tokens} and {temperature}"
        )
    device = next(model.parameters()).device
    prompt, prompt_mask = _pad_left(prompts, pad_token_id, device)
    network = _Network(model, padded=not bool(prompt_mask.all()))
    eos = torch.tensor(list(eos_token_ids), device=device, dtype=torch.long)
    alive = torch.ones(len(prompt), dtype=torch.bool, device=device)
    logits = network.start(prompt, prompt_mask, share_prompts)
    mask = prompt_mask
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for position in range(max_new_tokens):
        token = _draw(logits, temperature, generator)
        logp, entropy = ops.token_logprobs(logits, token, temperature or 1.0)
        token = torch.where(alive, token, pad_token_id)
        columns.append((token, alive.long(), logp * alive, entropy * alive))
        mask = torch.cat([mask, alive.long()[:, None]], 1)
        alive = alive & ~torch.isin(token, eos)
        if not alive.any() or position + 1 == max_new_tokens:
            break
        logits = network.extend(token[:, None], mask)[:, -1]
    completion, completion_mask, logps, entropies = (
        torch.stack(c, 1) for c in zip(*columns, strict=True)
    )
    return Rollout(prompt, prompt_mask, completion, completion_mask, logps, entropies, alive)


def logprobs(
    model: nn.Module,
    rollout: Rollout,
    temperature: float = 1.0,
    share_prompts: bool = False,
    head: Head = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token, (N, T) each, in nats.

    The same temperature as in sampling; fp32 softmax; the entropy carries no gradient. Values
    where the mask is 0 mean nothing. share_prompts: as for `generate`; the gradient then goes
    through the cache, which must not be detached from the graph.
    head: "auto" works from the hidden states before the output head, where that is a plain linear
    layer (see `output_head`): the logits (N, L, V) are then never made, nor rounded to bf16.
    "logits" always makes them.
    """
    plain = find_head(model) if head == "auto" and _innermost(model) is model else None
    reason = None
    if plain is not None:
        linear = plain.linear
        again = draws(model, linear.weight.device)
        try:
            hidden = _over_completions(model, rollout, share_prompts, plain)
        except NotPlainError as error:
            reason = error
            again()
        else:
            with ops.no_autocast(hidden.device):  # hidden has the dtype of the autocast it ran in
                return ops.head_logprobs(
                    hidden, linear.weight, linear.bias, rollout.completion, temperature
                )
    logits = _over_completions(model, rollout, share_prompts)
    if reason is not None:  # and it was not the model itself that failed
        refuse(model, reason)
    return ops.token_logprobs(logits, rollout.completion, temperature)


def _over_completions(
    model: nn.Module, rollout: Rollout, share_prompts: bool, head: OutputHead | None = None
) -> Tensor:
    """What each completion token was drawn from: logits (N, T, V), or hidden states (N, T, H)."""
    new = rollout.completion[:, :-1]
    mask = torch.cat([rollout.prompt_mask, rollout.mask], 1)[:, :-1]
    network = _Network(model, padded=not bool(rollout.prompt_mask.all()), head=head)
    if not share_prompts:
        ids = torch.cat([rollout.prompt, new], 1)
        return network.logits(ids, mask)[:, rollout.prompt.shape[1] - 1 :]
    logits = network.start(rollout.prompt, rollout.prompt_mask, share_prompts)[:, None]
    if not new.shape[1]:
        return logits
    return torch.cat([logits, network.extend(new, mask)], 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, then every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


MASK_NAMES, POSITION_NAMES = ("attention_mask", "mask"), ("position_ids", "positions")
CACHE_NAMES = ("past_key_values", "cache")


class _Network:
    """One way to call a model of either form; keeps the cache between tokens.

    With `head`, hidden states before the head stand wherever logits are spoken of.
    """

    def __init__(self, model: nn.Module, padded: bool, head: OutputHead | None = None) -> None:
        self.model, self.head = model, head
        innermost = _innermost(model)
        self.kind = type(innermost).__name__
        signature = inspect.signature(innermost.forward)
        parameters = signature.parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), "")
        self.cached = bool(self.cache_name) and "use_cache" in parameters
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
        out, logits = self._call(ids, mask, _positions(mask), use_cache=True)
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


def _innermost(model: nn.Module) -> nn.Module:
    """The module that torch.compile or DistributedDataParallel wraps: it has the signature."""
    while True:
        parameters = inspect.signature(model.forward).parameters.values()
        opaque = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        inner = getattr(model, "_orig_mod", None) or (
            getattr(model, "module", None) if opaque else 0
        )
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


def _logits(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.logits


def _positions(mask: Tensor) -> Tensor:
    """0 for the first real token of each row, also after padding on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _pad_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    lengths = [len(p) for p in prompts]
    if not lengths or not min(lengths):
        raise ValueError(f"every prompt needs at least one token, got lengths {lengths[:10]}")
    width = max(lengths)
    ids = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids.to(device), mask.to(device)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
