"""The GRPO objective as pure functions of rewards, log-probabilities and masks.

P prompts, G completions of each, N = P G sequences of up to T tokens. mask (N, T) is 1 from the
first generated token through the end-of-sequence token, which counts.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Scaling = Literal["group", "batch", "none"]
Loss = Literal["grpo", "dr_grpo", "dapo"]

SCALINGS, LOSSES = get_args(Scaling), get_args(Loss)
MAX_LOG_RATIO = 20.0  # exp overflows near 88 in fp32


def advantages(rewards: Tensor, scaling: Scaling = "group", eps: float = 1e-4) -> Tensor:
    """Advantage of each completion over its group. rewards (P, G) -> (P, G), in fp32 or wider.

    A = r - mean(r) over the group, divided by
        "group": the group's standard deviation + eps (GRPO, Shao et al. 2024, section 4.1)
        "batch": the standard deviation of all rewards + eps (Liu et al. 2025, "Tricks or traps?")
        "none":  nothing (Dr. GRPO, Liu et al. 2025, section 3.2: take it with loss "dr_grpo")
    with the sample standard deviation (n - 1). Where the rewards of a group lie within 1e-6, or
    1e-6 of the largest if that is above 1, and so for a group of one, A is exactly 0.

    Raises ValueError for a tensor that is not (P, G), not finite, or an unknown scaling.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (prompts, group), got shape {tuple(rewards.shape)}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if not torch.isfinite(r).all():
        raise ValueError("rewards must be finite")
    A = r - r.mean(1, keepdim=True)
    if scaling == "group" and r.shape[1] > 1:
        A = A / (r.std(1, keepdim=True) + eps)
    elif scaling == "batch" and r.numel() > 1:
        A = A / (r.std() + eps)
    return A.masked_fill(equal_groups(r)[:, None], 0.0)


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups have equal rewards, up to rounding: they teach nothing. (P, G) -> (P,) bool."""
    size = rewards.abs().amax(1).clamp(min=1)
    return rewards.amax(1) - rewards.amin(1) <= 1e-6 * size


def normalizer(mask: Tensor, kind: Loss, max_tokens: int) -> float:
    """What the summed loss of a whole batch is divided by.

    "grpo": its sequences, "dapo": its tokens, "dr_grpo": its sequences times the longest length
    allowed. Take it from the mask (N, T) of all micro-batches of an update, not of one.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {kind!r}")
    if kind == "dapo":
        return max(mask.sum().item(), 1.0)
    return max(len(mask), 1) * (max_tokens if kind == "dr_grpo" else 1.0)


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
) -> Tensor:
    """Clipped policy-gradient loss of some sequences, a scalar.

    l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logp - old_logp), summed
        "grpo":    mean over each sequence's tokens, then over sequences (Shao et al. 2024, eq. 3)
        "dr_grpo": sum over tokens / (sequences * max_tokens)  (Dr. GRPO, Liu et al. 2025)
        "dapo":    sum over tokens / tokens of the whole batch  (DAPO, Yu et al. 2025, eq. 8)
    clip_high > clip_low is DAPO's clip-higher.

    The KL penalty that some of these papers add is not part of it.

    logp, old_logp, mask (N, T); advantages (N,), or (P, G) as `advantages` returns them. divisor:
    `normalizer` of the whole batch, so that the losses of its micro-batches add up to its loss; by
    default these sequences are the batch.
    max_tokens: the longest completion allowed, for "dr_grpo"; T by default.

    Raises ValueError for an unknown kind, or shapes that do not fit.
    """
    if divisor is None or kind not in LOSSES:
        divisor = normalizer(mask, kind, max_tokens or mask.shape[1])
    if not logp.shape == old_logp.shape == mask.shape or advantages.numel() != len(logp):
        shapes = ", ".join(str(tuple(t.shape)) for t in (logp, old_logp, mask, advantages))
        raise ValueError(f"logp, old_logp, mask (N, T) and advantages (N,) have shapes {shapes}")
    A = advantages.reshape(-1, 1)
    rho = ratio(logp, old_logp)
    per_token = -torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    per_token = torch.where(mask.bool(), per_token, 0.0)
    if kind == "grpo":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    return per_token.sum() / divisor


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """rho = exp(logp - old_logp), the exponent kept within +-20."""
    return (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Which tokens the clip keeps from getting a gradient. Shapes as for `loss`; bool (N, T)."""
    rho, A = ratio(logp, old_logp), advantages[:, None]
    above, below = (rho > 1 + clip_high) & (A > 0), (rho < 1 - clip_low) & (A < 0)
    return (above | below) & mask.bool()


def kl_from_old(logp: Tensor, old_logp: Tensor) -> Tensor:
    """KL(old || new) per token, estimated on tokens drawn from old: rho - 1 - ln rho, never
    negative and unbiased (k3, Schulman 2020). Shapes (N, T); nats."""
    log_ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio
