"""Rewards are plain callables: reward(prompt, completion) or reward(prompt, completion, meta).

prompt and completion are what the run works with: text with a tokenizer, else lists of token ids;
the completion ends before the end-of-sequence token. meta is the prompt's record, a dict. The
value is a finite number.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structadapt.grpo.rollout import Rollout

Reward = Callable[..., float]

# A prompt is token ids, text (with a tokenizer), or a record with either under "prompt"; the whole
# record is the reward's `meta`.
Prompt = Sequence[int] | str | Mapping[str, Any]


def exact_match(prompt: Any, completion: Any, meta: Mapping[str, Any]) -> float:
    """1.0 if the completion equals meta["answer"], text without surrounding space; else 0.0."""
    answer = meta["answer"]
    if isinstance(completion, str):
        return float(completion.strip() == str(answer).strip())
    return float(list(completion) == list(answer))


def with_meta(reward: Reward) -> Callable[[Any, Any, Mapping[str, Any]], float]:
    """The reward as a function of three arguments that checks what it returns.

    Raises TypeError for a callable of neither form; when called, ValueError for a value that is
    not a finite number, naming the prompt.
    """
    signature = inspect.signature(reward)
    for arity in (3, 2):
        try:
            signature.bind(*range(arity))
        except TypeError:
            continue
        break
    else:
        raise TypeError(
            f"reward must take (prompt, completion) or (prompt, completion, meta), "
            f"but its signature is {signature}"
        )

    def checked(prompt: Any, completion: Any, meta: Mapping[str, Any]) -> float:
        value = float(reward(*(prompt, completion, meta)[:arity]))
        if not math.isfinite(value):
            raise ValueError(
                f"the reward of prompt {prompt!r}, completion {completion!r} is {value}"
            )
        return value

    return checked


@dataclass(frozen=True)
class Record:
    """A prompt as the loop keeps it."""

    ids: list[int]
    shown: Any  # the prompt as the reward sees it
    meta: Mapping[str, Any]


def record(prompt: Prompt, tokenizer: Any) -> Record:
    """A prompt in any of its forms. ValueError for text without a tokenizer."""
    meta = prompt if isinstance(prompt, Mapping) else {}
    shown: Any = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    if isinstance(shown, str):
        if tokenizer is None:
            raise ValueError(f"prompt {shown!r} is text: pass tokenizer=, or token ids")
        return Record(list(tokenizer.encode(shown)), shown, meta)
    ids = [int(token) for token in shown]
    return Record(ids, ids if tokenizer is None else tokenizer.decode(ids), meta)


def score(
    rollout: Rollout,
    batch: list[Record],
    reward: Callable[..., float],
    eos_token_ids: Sequence[int],
    tokenizer: Any,
) -> Tensor:
    """The rewards of a rollout, (prompts, group) fp32 on the CPU."""
    completions: list[Any] = rollout.completions(eos_token_ids)
    if tokenizer is not None:
        completions = [tokenizer.decode(ids) for ids in completions]
    group = len(rollout) // len(batch)
    repeated = [record for record in batch for _ in range(group)]
    values = [reward(r.shown, c, r.meta) for r, c in zip(repeated, completions, strict=True)]
    return torch.tensor(values, dtype=torch.float32).view(len(batch), group)
