"""How well an example's model does, in the form that its results have."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import structadapt as sa


def accuracy(
    model: nn.Module,
    held_out: Sequence[Any],
    reward: Callable[..., float],
    config: sa.grpo.Config,
    samples: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Greedy and sampled accuracy on the held-out problems, with their 95 % intervals; `faults`
    where rewards failed.

    samples: sampled completions of each problem. options: of `grpo.evaluate`.
    """
    found: dict[str, Any] = {"problems": len(held_out), "samples": samples}
    for name, how in (("greedy", {"greedy": True}), ("sampled", {"samples": samples})):
        seen = sa.grpo.evaluate(model, held_out, reward, config, seed=config.seed, **how, **options)
        found |= {"faults": seen.faults} if seen.faults else {}
        found |= {name: seen.mean, f"{name}_interval": [seen.low, seen.high]}
    return found
