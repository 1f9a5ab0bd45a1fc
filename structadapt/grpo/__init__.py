"""GRPO on any causal language model: a pure objective, a sampler and a loop.

It sees a module, an optimizer, a reward and contexts to run in, and knows nothing of adapters.
"""

from structadapt.grpo.config import Config, Step
from structadapt.grpo.evaluation import Evaluation, Interval, evaluate, pass_at_k
from structadapt.grpo.guard import CollapseError, Guard
from structadapt.grpo.loop import steps_in, train
from structadapt.grpo.objective import (
    advantages,
    kl,
    kl_penalty,
    loss,
    normalizer,
    overlong_penalty,
    truncated_weights,
)
from structadapt.grpo.resume import Checkpoints
from structadapt.grpo.rewards import exact_match
from structadapt.grpo.rollout import Rollout, generate, logprobs

__all__ = [
    "Checkpoints",
    "CollapseError",
    "Config",
    "Evaluation",
    "Guard",
    "Interval",
    "Rollout",
    "Step",
    "advantages",
    "evaluate",
    "exact_match",
    "generate",
    "kl",
    "kl_penalty",
    "logprobs",
    "loss",
    "normalizer",
    "overlong_penalty",
    "pass_at_k",
    "steps_in",
    "train",
    "truncated_weights",
]
