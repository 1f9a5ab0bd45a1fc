"""How GRPO samples and updates, and what it says of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from structadapt.grpo import objective
from structadapt.grpo.rollout import HEADS, Head

Overlong = Literal["keep", "mask"]
Nonfinite = Literal["stop", "skip"]
OnCollapse = Literal["warn", "stop"]


@dataclass(frozen=True)
class Config:
    """How GRPO samples and updates. ValueError for a value out of range.

    The recipes of the papers, beside the defaults:
        GRPO      loss="grpo", kl_coef=0.04
        Dr. GRPO  loss="dr_grpo", advantage="none"
        DAPO      clip_high=0.28, max_resamples=4, overlong_buffer=..., or overlong="mask"
        CISPO     loss="cispo", clip_low=1.0, clip_high=4.0
        GSPO      loss="gspo", clip_low=3e-4, clip_high=4e-4
        RLOO      advantage="rloo"
    """

    eos_token_id: int | Sequence[int]  # ends a completion, and counts as part of it
    pad_token_id: int = 0  # may equal an end-of-sequence token
    group_size: int = 8  # completions of each prompt
    prompts_per_step: int = 64  # prompts of one rollout, on all processes together
    max_new_tokens: int = 256  # of a completion, with end-of-sequence
    temperature: float = 1.0  # of the sampling; log-probabilities are of the same distribution
    slots: int | None = None  # sequences that one process samples at once; None: all
    share_prompts: bool = False  # run a prompt once for its group; needs a differentiable cache
    max_resamples: int = 0  # rollouts more for groups whose rewards are all equal (DAPO)
    overlong: Overlong = "keep"  # "mask": completions without end-of-sequence teach nothing
    overlong_buffer: int = 0  # tokens before the limit over which the reward falls by 1 (DAPO)
    max_reward_faults: float = 0.05  # share of a rollout whose rewards may fail and count as 0

    epochs: int = 1  # passes over one rollout
    minibatches: int = 1  # optimizer steps in a pass
    micro_batch_size: int | None = None  # sequences of one backward pass; None: a whole minibatch
    loss: objective.Loss = "dapo"  # how tokens are clipped and summed (see `loss`)
    advantage: objective.Scaling = "group"  # what rewards are divided by (see `advantages`)
    clip_low: float = 0.2  # the ratio is clipped to 1 - clip_low,
    clip_high: float = 0.2  # 1 + clip_high
    kl_coef: float = 0.0  # of KL(policy || reference) in the loss
    kl: objective.KL = "k3"  # the estimator (see `kl`)
    kl_unbiased: bool = True  # weigh the KL's tokens by the ratio
    importance_cap: float | None = None  # of weights for tokens of a sampler that differs; e.g. 2.0
    head: Head = "auto"  # update without logits if the head is plain and unwrapped; or "logits"
    max_grad_norm: float = 1.0  # math.inf: no clipping
    seed: int = 0  # of the sampling noise

    nonfinite: Nonfinite = "stop"  # a NaN or Inf gradient stops the run, or its step is left out
    max_nonfinite: int = 3  # left out in a row, or 1 % of 100 updates: the run stops all the same
    on_collapse: OnCollapse = "warn"  # what an alarm of the guard does (see `Guard`)

    def __post_init__(self) -> None:
        for name in ("group_size", "prompts_per_step", "max_new_tokens", "minibatches", "epochs",
                     "max_nonfinite"):  # fmt: skip
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 1, name, "an integer, at least 1", value)
        for name in ("micro_batch_size", "slots"):
            value = getattr(self, name)
            good = value is None or (isinstance(value, int) and value >= 1)
            _check(good, name, "None or an integer, at least 1", value)
        for name in ("max_resamples", "seed"):
            value = getattr(self, name)
            good = isinstance(value, int) and value >= 0
            _check(good, name, "an integer, at least 0", value)
        good = 0 <= self.overlong_buffer <= self.max_new_tokens
        _check(good, "overlong_buffer", "in [0, max_new_tokens]", self.overlong_buffer)
        good = all(isinstance(token, int) for token in (*self.eos_token_ids, self.pad_token_id))
        _check(good, "eos_token_id and pad_token_id", "integers", self.eos_token_id)
        for name, values in (
            ("loss", objective.LOSSES), ("advantage", objective.SCALINGS), ("kl", objective.KLS),
            ("head", HEADS), ("overlong", get_args(Overlong)),
            ("nonfinite", get_args(Nonfinite)), ("on_collapse", get_args(OnCollapse)),
        ):  # fmt: skip
            _check(getattr(self, name) in values, name, f"one of {values}", getattr(self, name))
        _check(self.temperature > 0, "temperature", "positive", self.temperature)
        _check(0 <= self.clip_low <= 1, "clip_low", "in [0, 1]", self.clip_low)
        _check(self.clip_high >= 0, "clip_high", "not negative", self.clip_high)
        _check(self.kl_coef >= 0, "kl_coef", "not negative", self.kl_coef)
        good = self.importance_cap is None or self.importance_cap > 0
        _check(good, "importance_cap", "None or positive", self.importance_cap)
        good = 0 <= self.max_reward_faults <= 1
        _check(good, "max_reward_faults", "in [0, 1]", self.max_reward_faults)
        _check(self.max_grad_norm > 0, "max_grad_norm", "positive", self.max_grad_norm)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        eos = self.eos_token_id
        return tuple(eos) if isinstance(eos, Sequence) else (eos,)


@dataclass(frozen=True)
class Step:
    """What happened in one step, on all processes. Means are over completions or tokens of the
    rollout that was learned from."""

    step: int  # from 0
    prompts: int  # seen so far
    reward: float  # mean, without the penalty for length
    reward_std: float  # over all completions
    zero_std_fraction: float  # groups whose rewards are all equal: no advantage, no gradient
    resampled: int  # groups with equal rewards that were replaced by others
    reward_faults: int  # rewards that failed, and counted as 0
    length: float  # tokens a completion, with end-of-sequence
    truncated: float  # share of completions without end-of-sequence
    entropy: float  # of the sampling distribution, nats a token
    kl: float  # KL(policy before this step's updates || after), nats a token, first 32 sequences
    reference_kl: float  # KL(policy || reference), nats a token, before the update; 0.0 without one
    clip_fraction: float  # of the tokens, those that the clip keeps from a gradient
    grad_norm: float  # before clipping, mean over the step's updates; 0.0 if there was none
    mismatch: float  # largest |trainer - sampler| log-probability of a token before any update
    mismatch_kl: float  # KL(sampler || trainer), nats a token, before any update
    updates: int  # optimizer steps taken; one whose advantages are all 0 is left out
    skipped: int  # optimizer steps left out because the gradient was not finite
    alarms: tuple[str, ...]  # what the guard noticed (see `Guard`)
    tokens_per_second: float  # generated tokens over rollout and update time
    rollout_seconds: float
    update_seconds: float


def _check(good: bool, name: str, expected: str, found: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {expected}, got {found!r}")
