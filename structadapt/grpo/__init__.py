"""GRPO on any causal language model: a pure objective, a sampler and a loop.

It sees a module, an optimizer, a reward and contexts to run in, and knows nothing of adapters.
"""

from structadapt.grpo.evaluation import Evaluation, evaluate
from structadapt.grpo.loop import Config, Step, steps_in, train
from structadapt.grpo.objective import advantages, loss, normalizer
from structadapt.grpo.rewards import exact_match
from structadapt.grpo.rollout import Rollout, generate, logprobs

__all__ = [
    "Config",
    "Evaluation",
    "Rollout",
    "Step",
    "advantages",
    "evaluate",
    "exact_match",
    "generate",
    "logprobs",
    "loss",
    "normalizer",
    "steps_in",
    "train",
]
