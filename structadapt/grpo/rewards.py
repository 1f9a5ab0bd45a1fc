"""Rewards are plain callables: reward(prompt, completion) or reward(prompt, completion, meta).

prompt and completion are what the run works with: text with a tokenizer, else lists of token ids;
the completion ends before the end-of-sequence token. meta is the prompt's record, a dict. The
value is a finite number.
"""

import inspect
import math
import operator
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

    A third argument with a default gets meta only if it is called so. Raises TypeError for a
    callable of neither form; when called, ValueError for a value that is not a finite number,
    naming the prompt.
    """
    signature = inspect.signature(reward)
    places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY,
              p.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    several = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    third = places[2] if len(places) > 2 else None
    wants_meta = several if third is None else third.default is third.empty or third.name == "meta"
    arity = 3 if wants_meta else 2
    try:
        signature.bind(*range(arity))
    except TypeError:
        raise TypeError(
            f"reward must take (prompt, completion) or (prompt, completion, meta), "
            f"but its signature is {signature}"
        ) from None

    def checked(prompt: Any, completion: Any, meta: Mapping[str, Any]) -> float:
        value = reward(*(prompt, completion, meta)[:arity])
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"the reward of prompt {prompt!r}, completion {completion!r} is {value!r}, "
                "not a finite number"
            )
        return number

    return checked


@dataclass(frozen=True)
class Record:
    """A prompt as the loop keeps it."""

    ids: list[int]
    shown: Any  # the prompt as the reward sees it
    meta: Mapping[str, Any]


def record(prompt: Prompt, tokenizer: Any) -> Record:
    """A prompt in any of its forms. ValueError for one of another form, or without a token."""
    meta = prompt if isinstance(prompt, Mapping) else {}
    shown: Any = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if isinstance(shown, str):
        if tokenizer is None:
            raise ValueError(f"prompt {shown!r} is text: pass tokenizer=, or token ids")
        ids = list(tokenizer.encode(shown))
    else:
        try:
            ids = [operator.index(token) for token in shown]
        except TypeError:
            raise ValueError(
                f"prompt {prompt!r} is neither token ids, nor text, nor a record with one of them "
                'under "prompt"'
            ) from None
        shown = ids if tokenizer is None else tokenizer.decode(ids)
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no token")
    return Record(ids, shown, meta)


def score(
    rollout: Rollout,
    batch: list[Record],
    reward: Callable[..., float],
    eos_token_ids: Sequence[int],
    tokenizer: Any,
) -> Tensor:
    """The rewards of a rollout, (prompts, group) float64 on the CPU."""
    completions: list[Any] = rollout.completions(eos_token_ids)
    if tokenizer is not None:
        completions = [tokenizer.decode(ids) for ids in completions]
    group = len(rollout) // len(batch)
    repeated = [record for record in batch for _ in range(group)]
    values = [reward(r.shown, c, r.meta) for r, c in zip(repeated, completions, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view(len(batch), group)
