"""Sample completions, and the log-probability that a model gives them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from structadapt import ops
from structadapt.grpo import processes
from structadapt.grpo.in_flight import InFlight, wide
from structadapt.grpo.network import Network, innermost
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
    ref_logp: Tensor | None = None  # (N, T) float: of the reference policy
    weights: Tensor | None = None  # (N, T) float: of each token, for the sampler's difference

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: slice) -> "Rollout":
        """Some of the sequences, without the columns that none of them uses."""
        some = len(self.mask[rows]) > 0
        longest = int(self.mask[rows].sum(1).amax()) if some else 0
        empty = int(self.prompt_mask[rows].any(0).long().argmax()) if some else 0

        def cut(t: Tensor) -> Tensor:
            return t[rows, : max(longest, 1)]

        def cut_if(t: Tensor | None) -> Tensor | None:
            return None if t is None else cut(t)

        return Rollout(
            self.prompt[rows, empty:], self.prompt_mask[rows, empty:], cut(self.completion),
            cut(self.mask), cut(self.logp), cut(self.entropy), self.truncated[rows],
            cut_if(self.ref_logp), cut_if(self.weights),
        )  # fmt: skip

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
    noise: Tensor | None = None,
    share_prompts: bool = False,
    slots: int | None = None,
    together: Callable[[bool], bool] | None = None,
) -> Rollout:
    """Sample one completion of each prompt; `temperature=0` takes the likeliest token each time.

    A finished sequence leaves the batch at once, and where there are more prompts than `slots`, the
    next ones take the places as soon as a quarter of them is free, so that no long completion holds
    the others. (Caches other than keys and values of every token, such as sliding windows, are
    filled again when all have left.) The pad token may equal an end-of-sequence token: masks go by
    position. The model runs as it is: see `evaluating` for eval mode.

    noise: (N, max_new_tokens) in [0, 1): the number that decides each token, so that a sequence is
    the same whatever runs beside it (up to rounding); by default torch's global generator's.
    share_prompts: run equal prompts that stand together once; needs a model with a cache.
    slots: sequences in the batch at once; None: all.
    together: for models whose forward is a collective call (sharded ones): whether any process
    says yes. Every process then calls the model equally often.

    Raises ValueError for max_new_tokens < 1 or temperature < 0; an empty prompt; prompts of unequal
    lengths for a model whose forward takes no mask; share_prompts for a model without a cache;
    FloatingPointError for logits without a distribution (NaN).
    """
    if max_new_tokens < 1 or temperature < 0 or (slots is not None and slots < 1):
        raise ValueError(
            "max_new_tokens and slots must be at least 1 and temperature not negative, "
            f"got {max_new_tokens}, {slots} and {temperature}"
        )
    device = next(model.parameters()).device
    prompt, prompt_mask = _pad_left(prompts, pad_token_id, device)
    N, T = len(prompt), max_new_tokens
    noise = (torch.rand(N, T) if noise is None else noise).to(device, torch.float32)
    eos = torch.tensor(list(eos_token_ids), device=device, dtype=torch.long)
    completion = torch.full((N, T), pad_token_id, device=device)
    mask = torch.zeros(N, T, dtype=torch.long, device=device)
    logps, entropies = (torch.zeros(N, T, device=device) for _ in range(2))
    truncated = torch.ones(N, dtype=torch.bool, device=device)
    batch = InFlight(model, prompt, prompt_mask, share_prompts, min(slots or N, N), together)
    faults: list[int] = []
    while batch.step():
        rows, at, logits = batch.rows, batch.lengths, batch.logits
        if not len(rows):
            continue  # others are not done
        token, broken = _draw(logits, temperature, noise[rows, at])
        faults += rows[broken].tolist()
        completion[rows, at], mask[rows, at] = token, 1
        logp, entropy = ops.token_logprobs(logits, token, temperature or 1.0)
        logps, entropies = logps.to(logp.dtype), entropies.to(logp.dtype)  # float64 if logits are
        logps[rows, at], entropies[rows, at] = logp, entropy
        ended = torch.isin(token, eos)
        truncated[rows[ended]] = False
        batch.put(token, ended | broken | (at + 1 == T))
    if faults:  # not before the others are done, which may wait for this process
        raise NonfiniteLogitsError(min(faults))
    whole = Rollout(prompt, prompt_mask, completion, mask, logps, entropies, truncated)
    return whole[:]  # without the columns that no sequence reached


class NonfiniteLogitsError(FloatingPointError):
    """The logits of a sequence have a NaN, or an infinity that leaves no distribution."""

    def __init__(self, row: int) -> None:
        super().__init__(f"the model's logits are not finite for prompt {row}")
        self.row = row  # of the rollout


def logprobs(
    model: nn.Module,
    rollout: Rollout,
    temperature: float = 1.0,
    share_prompts: bool = False,
    head: Head = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token, (N, T) each, in nats.

    The same temperature as in sampling; fp32 softmax; the entropy carries no gradient. 0 where the
    mask is 0. share_prompts: as for `generate`; the gradient then goes through the cache, which
    must not be detached from the graph.
    head: "auto" works from the hidden states before the output head, where that is a plain linear
    layer (see `output_head`): the logits (N, L, V) are then never made, nor rounded to bf16.
    "logits" always makes them.

    Raises ValueError for a forward that is not understood, or share_prompts without a cache.
    """
    plain = find_head(model) if head == "auto" and innermost(model) is model else None
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
            real = rollout.mask.flatten().nonzero()[:, 0]  # no product is taken over padding
            ids = rollout.completion.flatten()[real]
            with ops.no_autocast(hidden.device):  # hidden has the dtype of the autocast it ran in
                hidden = hidden.flatten(0, 1).index_select(0, real)
                found = ops.head_logprobs(hidden, linear.weight, linear.bias, ids, temperature)
            blank = [t.new_zeros(rollout.mask.numel()) for t in found]
            logp, entropy = (z.index_copy(0, real, t) for z, t in zip(blank, found, strict=True))
            return logp.view_as(rollout.mask), entropy.view_as(rollout.mask)
    logits = _over_completions(model, rollout, share_prompts)
    if reason is not None:  # and it was not the model itself that failed
        refuse(model, reason)
    logp, entropy = ops.token_logprobs(logits, rollout.completion, temperature)
    on = rollout.mask.bool()
    return torch.where(on, logp, 0.0), torch.where(on, entropy, 0.0)


def _over_completions(
    model: nn.Module, rollout: Rollout, share_prompts: bool, head: OutputHead | None = None
) -> Tensor:
    """What each completion token was drawn from: logits (N, T, V), or hidden states (N, T, H)."""
    new = rollout.completion[:, :-1]
    mask = torch.cat([rollout.prompt_mask, rollout.mask], 1)[:, :-1]
    network = Network(model, padded=not bool(rollout.prompt_mask.all()), head=head)
    if not share_prompts:
        ids = torch.cat([rollout.prompt, new], 1)
        return network.logits(ids, mask)[:, rollout.prompt.shape[1] - 1 :]
    logits = network.start(rollout.prompt, rollout.prompt_mask, share_prompts)[:, None]
    if not new.shape[1]:
        return logits
    if processes.sharded(model.parameters()):  # as many calls on every process
        return torch.cat([logits, network.extend(new, mask)], 1)
    return torch.cat([logits, network.finish(new, mask, rollout.mask[:, 1:].sum(1))], 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, then every module's own mode again."""
    put_back = modes(model)
    model.eval()
    try:
        yield
    finally:
        put_back()


def modes(model: nn.Module) -> Callable[[], None]:
    """What puts every module's mode back as it is now."""
    kept = {module: module.training for module in model.modules()}

    def put_back() -> None:
        for module, training in kept.items():
            module.training = training

    return put_back


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


def _draw(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The token (n,) at which the distribution function of logits (n, V) passes `noise` (n,), and
    where there is none since the logits are not finite."""
    if temperature == 0:
        likeliest = logits.max(-1)
        return likeliest.indices, ~torch.isfinite(likeliest.values)
    cdf = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    total = cdf[:, -1]
    at = torch.minimum(noise * total, total.nextafter(torch.zeros_like(total)))
    token = torch.searchsorted(cdf, at[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1), ~torch.isfinite(total)


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts below each other; shorter prompts and completions are padded."""
    if len(parts) == 1:
        return parts[0]
    P = max(part.prompt.shape[1] for part in parts)
    T = max(part.completion.shape[1] for part in parts)
    found = {}
    for name in ("prompt", "prompt_mask", "completion", "mask", "logp", "entropy", "truncated"):
        tensors = [getattr(part, name) for part in parts]
        if name.startswith("prompt"):
            tensors = [wide(t, P) for t in tensors]
        elif tensors[0].dim() == 2:
            tensors = [torch.nn.functional.pad(t, (0, T - t.shape[1])) for t in tensors]
        found[name] = torch.cat(tensors)
    return Rollout(**found)
