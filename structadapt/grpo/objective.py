"""The GRPO objective as pure functions of rewards, log-probabilities and masks.

P prompts, G completions of each, N = P G sequences of up to T tokens. mask (N, T) is 1 from the
first generated token through the end-of-sequence token, which counts.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Scaling = Literal["group", "batch", "none", "rloo"]
Loss = Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo"]
KL = Literal["k1", "k2", "k3"]

SCALINGS, LOSSES, KLS = get_args(Scaling), get_args(Loss), get_args(KL)
MAX_LOG_RATIO = 20.0  # exp overflows near 88 in fp32


def advantages(rewards: Tensor, scaling: Scaling = "group", eps: float = 1e-4) -> Tensor:
    """Advantage of each completion over its group. rewards (P, G) -> (P, G), in fp32 or wider.

    A = r - mean(r) over the group, times
        "group": 1 / (the group's standard deviation + eps)  (GRPO, Shao et al. 2024, section 4.1)
        "batch": 1 / (the standard deviation of all rewards + eps)  (Liu et al. 2025, "Tricks or
                 traps?", section 4.1)
        "none":  1  (Dr. GRPO, Liu et al. 2025, section 3.2: take it with loss "dr_grpo")
        "rloo":  G / (G - 1), which is r less the mean of the group's others (RLOO, Ahmadian et al.
                 2024, eq. 8)
    with the sample standard deviation (n - 1). Where the rewards of a group lie within 1e-6, or
    1e-6 of the largest if that is above 1, and so for a group of one, A is exactly 0.

    >>> import torch
    >>> advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "none")
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])

    Raises ValueError for a tensor that is not (P, G), not finite, or an unknown scaling.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (prompts, group), got shape {tuple(rewards.shape)}")
    _known("scaling", scaling, SCALINGS)
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if not torch.isfinite(r).all():
        raise ValueError("rewards must be finite")
    A, G = r - r.mean(1, keepdim=True), r.shape[1]
    if scaling == "group" and G > 1:
        A = A / (r.std(1, keepdim=True) + eps)
    elif scaling == "batch" and r.numel() > 1:
        A = A / (r.std() + eps)
    elif scaling == "rloo" and G > 1:
        A = A * (G / (G - 1))
    return A.masked_fill(equal_groups(r)[:, None], 0.0)


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups have equal rewards, up to rounding: they teach nothing. (P, G) -> (P,) bool."""
    size = rewards.abs().amax(1).clamp(min=1)
    return rewards.amax(1) - rewards.amin(1) <= 1e-6 * size


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What a long completion loses of its reward: 0 up to max_tokens - buffer tokens, then falling
    linearly to -1 at max_tokens (DAPO, Yu et al. 2025, eq. 13). lengths (...) -> (...), in fp64.

    Raises ValueError for a buffer outside [1, max_tokens].
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"the buffer must be in [1, max_tokens = {max_tokens}], got {buffer}")
    return -((lengths.double() - (max_tokens - buffer)) / buffer).clamp(0, 1)


def normalizer(mask: Tensor, kind: Loss, max_tokens: int) -> float:
    """What the summed loss of a whole batch is divided by.

    "grpo", "gspo": its sequences, "dapo", "cispo": its tokens, "dr_grpo": its sequences times the
    longest length allowed. Take it from the mask (N, T) of all micro-batches of an update, not of
    one. ValueError for another kind.
    """
    return divisor_of(mask.sum().item(), len(mask), kind, max_tokens)


def divisor_of(tokens: float, sequences: float, kind: Loss, max_tokens: int) -> float:
    """`normalizer` from the counts of an update's tokens and sequences on all processes."""
    _known("loss", kind, LOSSES)
    if kind in ("dapo", "cispo"):
        return max(tokens, 1.0)
    return max(sequences, 1.0) * (max_tokens if kind == "dr_grpo" else 1.0)


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kind: Loss = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    divisor: float | None = None,
    max_tokens: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Policy-gradient loss of some sequences, a scalar.

    With rho = exp(logp - old_logp) of a token, w its weight and A its sequence's advantage, the
    clipped surrogate l = -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) is summed
        "grpo":    mean over each sequence's tokens, then over sequences (Shao et al. 2024, eq. 3)
        "dr_grpo": sum over tokens / (sequences * max_tokens)  (Dr. GRPO, Liu et al. 2025)
        "dapo":    sum over tokens / tokens of the whole batch  (DAPO, Yu et al. 2025, eq. 8)
    clip_high > clip_low is DAPO's clip-higher. Two have another l:
        "cispo":   l = -w sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp, summed as "dapo", where
                   sg stops the gradient: no token loses its own (CISPO, MiniMax 2025, eq. 4);
                   clip_low = 1 leaves rho without a lower bound
        "gspo":    rho = exp(mean of logp - old_logp over the sequence) for all of its tokens,
                   summed as "grpo" (GSPO, Zheng et al. 2025, eq. 5); its clips are near 3e-4

    logp, old_logp, mask (N, T); advantages (N,), or (P, G) as `advantages` returns them. divisor:
    `normalizer` of the whole batch, so that the losses of its micro-batches add up to its loss; by
    default these sequences are the batch.
    max_tokens: the longest completion allowed, for "dr_grpo"; T by default.
    weights: (N, T) or (N, 1), as `truncated_weights` returns them; 1 by default.

    The penalty for leaving a reference policy is `kl_penalty`, added to it.

    Raises ValueError for an unknown kind, or shapes that do not fit.
    """
    if divisor is None or kind not in LOSSES:
        divisor = normalizer(mask, kind, max_tokens or mask.shape[1])
    _alike(logp=logp, old_logp=old_logp, mask=mask)
    if advantages.numel() != len(logp):
        raise ValueError(
            f"advantages must be one for each of {len(logp)} sequences, got shape "
            f"{tuple(advantages.shape)}"
        )
    A = advantages.reshape(-1, 1)
    rho = ratio(logp, old_logp, mask, kind)
    bounded = rho.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        per_token = -bounded.detach() * A * logp
    else:
        per_token = -torch.minimum(rho * A, bounded * A)
    return total(per_token if weights is None else per_token * weights, mask, kind, divisor)


def total(per_token: Tensor, mask: Tensor, kind: Loss, divisor: float) -> Tensor:
    """Sum values of tokens (N, T) as the loss `kind` does. divisor: `normalizer` of the batch."""
    per_token = torch.where(mask.bool(), per_token, 0.0)
    if kind in ("grpo", "gspo"):
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    return per_token.sum() / divisor


def ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, kind: Loss = "dapo") -> Tensor:
    """rho = exp(logp - old_logp) (N, T), of a token, or for "gspo" of its sequence; the exponent is
    kept within +-20."""
    log_ratio = torch.where(mask.bool(), logp - old_logp, 0.0)
    if kind == "gspo":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(logp)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kind: Loss = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Which tokens the clip touches: they get no gradient, or for "cispo" a bounded one.

    Shapes as for `loss`; bool (N, T).
    """
    rho, A = ratio(logp, old_logp, mask, kind), advantages.reshape(-1, 1)
    above, below = rho > 1 + clip_high, rho < 1 - clip_low
    if kind != "cispo":
        above, below = above & (A > 0), below & (A < 0)
    return (above | below) & mask.bool() & (A != 0)


def truncated_weights(
    old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, cap: float = 2.0
) -> Tensor:
    """min(exp(old_logp - sampler_logp), cap) of every token: importance weights for tokens that
    another policy drew than the one that old_logp is of, such as the same weights in another
    precision (truncated importance sampling, Yao et al. 2025). Shapes (N, T); ValueError for
    others."""
    _alike(old_logp=old_logp, sampler_logp=sampler_logp, mask=mask)
    return ratio(old_logp, sampler_logp, mask).clamp(max=cap)


def kl(logp: Tensor, ref_logp: Tensor, kind: KL = "k3") -> Tensor:
    """KL(policy || reference) per token, estimated on tokens drawn from the policy (N, T); nats.

    d = logp - ref_logp: "k1" is d, unbiased, of either sign; "k2" is d^2 / 2, biased, with the
    gradient of the KL; "k3" is exp(-d) - 1 + d, unbiased and never negative, with the gradient of
    KL(reference || policy) (Schulman 2020; Tang & Munos 2025).

    >>> import torch
    >>> kl(torch.tensor([-1.0]), torch.tensor([-2.0]), "k1")
    tensor([1.])

    Raises ValueError for another kind, or shapes that differ.
    """
    _known("kind", kind, KLS)
    _alike(logp=logp, ref_logp=ref_logp)
    d = (logp - ref_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return d
    return d.square() / 2 if kind == "k2" else (-d).expm1() + d


def kl_penalty(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    kind: Loss = "dapo",
    estimator: KL = "k3",
    divisor: float | None = None,
    max_tokens: int | None = None,
    unbiased: bool = True,
) -> Tensor:
    """KL(policy || reference) of some sequences summed as `loss` sums: a scalar to add to it.

    unbiased: multiply by rho, so that the expectation is over the policy of logp and not over the
    one that drew the tokens, and the gradients of k1 and k3 become those of the KL (DeepSeek-V3.2,
    2025, eq. 7; that of k2 is it by itself, so there rho is a constant). Without it the gradient of
    k1 is 0 in expectation. Shapes as for `loss`.

    Raises ValueError for an unknown kind or estimator, or shapes that differ.
    """
    _alike(logp=logp, old_logp=old_logp, ref_logp=ref_logp, mask=mask)
    if divisor is None:
        divisor = normalizer(mask, kind, max_tokens or mask.shape[1])
    inside = mask.bool()
    per_token = kl(torch.where(inside, logp, 0.0), torch.where(inside, ref_logp, 0.0), estimator)
    if unbiased:
        rho = ratio(logp, old_logp, mask, kind)
        per_token = per_token * (rho.detach() if estimator == "k2" else rho)
    return total(per_token, mask, kind, divisor)


def kl_from_old(logp: Tensor, old_logp: Tensor) -> Tensor:
    """KL(old || new) per token, estimated on tokens drawn from old: rho - 1 - ln rho, never
    negative and unbiased (k3, Schulman 2020). Shapes (N, T); nats."""
    return kl(old_logp, logp, "k3")


def _alike(**tensors: Tensor) -> None:
    """ValueError for shapes that differ: some would be repeated without a word."""
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must be the same (N, T), got {shapes}")


def _known(name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}")
