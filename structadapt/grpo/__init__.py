"""GRPO on any causal language model: a pure objective, a sampler and a loop.

It sees a module, an optimizer, a reward and contexts to run in, and knows nothing of adapters.
"""

from structadapt.grpo.evaluation import Evaluation, evaluate
from structadapt.grpo.loop import Config, Step, steps_in, train
from structadapt.grpo.objective import advantages, loss, normalizer
from structadapt.grpo.rewards import combine, exact_match, matches_format, numeric_match
from structadapt.grpo.rollout import Rollout, generate, logprobs
from structadapt.grpo.sandbox import Sandbox, SandboxError, sandboxed
from structadapt.grpo.tasks import load_deepmath, load_jsonl, math_verify_reward, reasoning_gym

__all__ = [
    "Config",
    "Evaluation",
    "Rollout",
    "Sandbox",
    "SandboxError",
    "Step",
    "advantages",
    "combine",
    "evaluate",
    "exact_match",
    "generate",
    "load_deepmath",
    "load_jsonl",
    "logprobs",
    "loss",
    "matches_format",
    "math_verify_reward",
    "normalizer",
    "numeric_match",
    "reasoning_gym",
    "sandboxed",
    "steps_in",
    "train",
]
