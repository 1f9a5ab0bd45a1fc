"""GRPO on any causal language model: a pure objective, a sampler and a loop.

It sees a module, an optimizer, a reward and contexts to run in, and knows nothing of adapters.
"""

from structadapt.grpo.config import Config, Step
from structadapt.grpo.evaluation import Evaluation, Interval, evaluate, pass_at_k
from structadapt.grpo.guard import CollapseError, Guard, Observer
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
from structadapt.grpo.rewards import combine, exact_match, matches_format, numeric_match
from structadapt.grpo.rollout import Rollout, generate, logprobs
from structadapt.grpo.sandbox import Sandbox, SandboxError, sandboxed
from structadapt.grpo.tasks import load_deepmath, load_jsonl, math_verify_reward, reasoning_gym
from structadapt.grpo.trial import Preflight, preflight

__all__ = [
    "Checkpoints",
    "CollapseError",
    "Config",
    "Evaluation",
    "Guard",
    "Interval",
    "Observer",
    "Preflight",
    "Rollout",
    "Sandbox",
    "SandboxError",
    "Step",
    "advantages",
    "combine",
    "evaluate",
    "exact_match",
    "generate",
    "kl",
    "kl_penalty",
    "load_deepmath",
    "load_jsonl",
    "logprobs",
    "loss",
    "matches_format",
    "math_verify_reward",
    "normalizer",
    "numeric_match",
    "overlong_penalty",
    "pass_at_k",
    "preflight",
    "reasoning_gym",
    "sandboxed",
    "steps_in",
    "train",
    "truncated_weights",
]
