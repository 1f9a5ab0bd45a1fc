"""Rewards are plain callables: reward(prompt, completion) or reward(prompt, completion, meta).

prompt and completion are what the run works with: text with a tokenizer, else lists of token ids;
the completion ends before the end-of-sequence token. meta is the prompt's record, a dict. The
value is a finite number. One that raises, or returns anything else, is a fault: `score` counts it
as 0.0 and goes on, up to a share of the batch.

The ready rewards here neither evaluate what a model wrote nor parse a number of unbounded size, and
take time linear in the text. For a verifier that does more, see `sandboxed`.
"""

import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from structadapt.bounds import in_part, quoted
from structadapt.grpo.rollout import Rollout

Reward = Callable[..., float]

# A prompt is token ids, text (with a tokenizer), messages of a chat as [{"role": ..., "content":
# ...}] (with a tokenizer that has a chat template), or a record with one of these under "prompt";
# the whole record is the reward's `meta`.
Prompt = Sequence[int] | str | Sequence[Mapping[str, str]] | Mapping[str, Any]


def exact_match(prompt: Any, completion: Any, meta: Mapping[str, Any]) -> float:
    """1.0 if the completion equals meta["answer"], text without surrounding space; else 0.0.
    KeyError without an answer.

    >>> exact_match("1+1=", " 2", {"answer": 2})
    1.0
    """
    answer = meta["answer"]
    if isinstance(completion, str):
        return float(completion.strip() == str(answer).strip())
    return float(list(completion) == list(answer))


# -- numbers in text -------------------------------------------------------------------------------

READ = 2**16  # characters, the last of a completion, that numeric_match looks at
LONGEST, EXPONENT = 64, 400  # characters of a number, and its power of ten, that it still reads

SPELLED = {"−": "-", "{,}": ",", "\\,": ",", "\\!": "", "\\%": "%", "\\$": "$", "^\\circ": ""}
# No quantifier stands within another, and what is repeated is bounded, or cannot hold what follows
# it: linear.
FRACTION = re.compile(r"(?<![0-9])\\[dt]?frac\{(-?[0-9]{1,64})\}\{([0-9]{1,64})\}")
WORDS = re.compile(r"\\(?:text|mathrm)\{[^{}]*\}")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z.)\]}])[-+])?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"(?: ?/ ?[0-9]+\.?[0-9]*)?"
)
MARK = re.compile("####|answer is|answer:", re.IGNORECASE)


def numeric_match(prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
    """1.0 if the number that a text ends on equals meta["answer"] exactly, as a rational; else 0.0.

    The number is all that the last \\boxed{...} holds (units in \\text and "x =" aside); else the
    first after the last "####", "answer is" or "answer:"; else the last of the text. Read are
    integers, decimals, 1e3, 3/4, \\frac{3}{4} and 1,234; a percent sign is a unit, and does not
    count. No number, or one of over 64 characters or beyond 1e400, is 0.0.

    >>> numeric_match("...", "so x = 0.5. The answer is \\\\boxed{1/2}", {"answer": "0.5"})
    1.0

    Raises TypeError for a completion of token ids, KeyError without an answer, ValueError if the
    answer is no such number.
    """
    if not isinstance(completion, str):
        raise TypeError("numeric_match reads text: pass tokenizer= to train")
    wanted = _whole(_plain(str(meta["answer"])))
    if wanted is None:
        raise ValueError(f"the answer {quoted(meta['answer'])} is not a number")
    return float(_final(_plain(completion[-READ:])) == wanted)


def _plain(text: str) -> str:
    for spelled, plain in SPELLED.items():
        text = text.replace(spelled, plain)
    return THOUSANDS.sub("", WORDS.sub("", FRACTION.sub(r"\1/\2", text)))


def _final(text: str) -> Fraction | None:
    _, box, boxed = text.rpartition("\\boxed{")
    if box:
        return _whole(boxed.partition("}")[0])
    marks = list(MARK.finditer(text))
    after = NUMBER.search(text, marks[-1].end()) if marks else None
    if after:
        return _rational(after[0])
    numbers = NUMBER.findall(text)
    return _rational(numbers[-1]) if numbers else None


def _whole(text: str) -> Fraction | None:
    """The number that a text is, but for a name before "=" and signs around it."""
    text = text.rpartition("=")[2].lstrip(" \t\r\n$*").rstrip(" \t\r\n$*%.")
    return _rational(text) if NUMBER.fullmatch(text) else None


def _rational(number: str) -> Fraction | None:
    """What matches NUMBER, if it is short and its exponents are small."""
    if len(number) > LONGEST:
        return None
    above, slash, below = number.replace(" ", "").partition("/")
    parts = [_decimal(above), _decimal(below) if slash else Fraction(1)]
    return parts[0] / parts[1] if parts[0] is not None and parts[1] else None


def _decimal(number: str) -> Fraction | None:
    digits, _, exponent = number.lower().partition("e")
    power = int(exponent or 0)
    if abs(power) > EXPONENT:
        return None
    whole, _, places = digits.partition(".")
    return int(whole + places) * Fraction(10) ** (power - len(places))


# -- rewards made of others ------------------------------------------------------------------------


def matches_format(pattern: str, longest: int = 20_000, flags: int = re.DOTALL) -> Reward:
    """A reward: 1.0 if the whole text matches a regular expression, else 0.0.

    A text of more than `longest` characters is 0.0 and not looked at. That is the only bound: a
    pattern with a quantifier within another, as (a+)+b, can take time exponential in the text, and
    a model finds such texts. Raises re.error for a pattern that is none.
    """
    compiled = re.compile(pattern, flags)

    def reward(prompt: Any, completion: str) -> float:
        return float(len(completion) <= longest and compiled.fullmatch(completion) is not None)

    return reward


def combine(weights: Mapping[Reward, float]) -> Reward:
    """A reward: the weighted sum of others, {reward: weight}. TypeError as for `train`."""
    parts = [(with_meta(reward), weight) for reward, weight in weights.items()]

    def reward(prompt: Any, completion: Any, meta: Mapping[str, Any]) -> float:
        return sum(weight * part(prompt, completion, meta) for part, weight in parts)

    return reward


# -- how the loop calls them -----------------------------------------------------------------------


def with_meta(reward: Reward) -> Callable[[Any, Any, Mapping[str, Any]], float]:
    """The reward as a function of three arguments that checks what it returns.

    A third argument with a default gets meta only if it is called so. Raises TypeError for a
    callable of neither form; when called, ValueError for a value that is not a finite number.
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
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{quoted(value)} is not a finite number")
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
            raise ValueError(f"prompt {quoted(shown)} is text: pass tokenizer=, or token ids")
        ids = list(tokenizer.encode(shown))
    elif isinstance(shown, Sequence) and shown and all(isinstance(m, Mapping) for m in shown):
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ValueError(
                f"prompt {quoted(shown)} is messages: pass tokenizer= with a chat template"
            )
        ids = tokenizer.apply_chat_template(
            list(shown), add_generation_prompt=True, return_dict=False
        )
    else:
        try:
            ids = [operator.index(token) for token in shown]
        except TypeError:
            raise ValueError(
                f"prompt {quoted(prompt)} is neither token ids, nor text, nor a record with one of "
                'them under "prompt"'
            ) from None
        shown = ids if tokenizer is None else tokenizer.decode(ids)
    if not ids:
        raise ValueError(f"prompt {quoted(prompt)} has no token")
    return Record(ids, shown, meta)


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout, and what went wrong in finding them."""

    rewards: Tensor  # (prompts, group) float64 on the CPU; 0.0 where there was a fault
    faults: tuple[str, ...]  # each names prompt, completion and error, all shortened


def score(
    rollout: Rollout,
    batch: list[Record],
    reward: Callable[..., float],
    eos_token_ids: Sequence[int],
    tokenizer: Any,
    max_faults: float = 0.05,
) -> Scores:
    """Reward every completion of a rollout; `reward` as `with_meta` returns it.

    A reward that raises an Exception is a fault. Raises RuntimeError, naming the first, as soon as
    there are more than the share `max_faults` of the rollout.
    """
    completions: list[Any] = rollout.completions(eos_token_ids)
    if tokenizer is not None:
        completions = [tokenizer.decode(ids) for ids in completions]
    group = len(rollout) // len(batch)
    repeated = [record for record in batch for _ in range(group)]
    values: list[float] = []
    faults: list[str] = []
    first: Exception | None = None
    for r, completion in zip(repeated, completions, strict=True):
        try:
            values.append(reward(r.shown, completion, r.meta))
        except Exception as error:
            first = first or error
            values.append(0.0)
            faults.append(_fault(r.shown, completion, error))
            if len(faults) > max_faults * len(rollout):
                raise RuntimeError(
                    f"{len(faults)} of {len(values)} rewards failed, and at most {max_faults:.3g} "
                    f"of the {len(rollout)} may; {faults[0]}"
                ) from first
    return Scores(torch.tensor(values, dtype=torch.float64).view(len(batch), group), tuple(faults))


def _fault(prompt: Any, completion: Any, error: Exception) -> str:
    return (
        f"the reward of prompt {quoted(prompt)}, completion {quoted(completion)}: "
        f"{type(error).__name__}: {in_part(str(error), 300)}"
    )
