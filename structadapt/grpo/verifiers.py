"""Verifiers of other libraries, as a Sandbox's worker makes them: it loads this file by its path.

Each function takes the sandbox's `setup` and returns a reward (prompt, completion, meta). Nothing
of structadapt is imported here, so that a worker need not import torch.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

ALARM = 1  # seconds: math-verify's own limit for one step, which costs no new worker


def library(name: str, extra: str | None = None) -> Any:
    """An optional dependency. ImportError says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = f"'structadapt[{extra}]'" if extra else name.partition(".")[0]
        raise ImportError(f"{name} cannot be imported ({error}): pip install {wanted}") from None


def math_verify() -> Callable[[Any, str, Mapping[str, Any]], float]:
    """1.0 if the completion's last expression equals meta["answer"]. ValueError if that is none."""
    module = library("math_verify", "tasks")

    @functools.lru_cache(4096)
    def parse_answer(answer: str) -> Any:
        marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        parsed = module.parse(marked, parsing_timeout=ALARM)
        if not parsed:
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}")
        return parsed

    def score(prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        found = module.parse(completion, parsing_timeout=ALARM)
        answer = parse_answer(str(meta["answer"]))
        return float(module.verify(answer, found, timeout_seconds=ALARM))

    score("", "$\\frac{1}{2}$", {"answer": "0.5"})  # the first call is slow
    return score


def reasoning_gym(name: str, options: dict[str, Any]) -> Callable[[Any, str, Any], float]:
    """The dataset's own score of what stands in the last <answer>...</answer>, else of all."""
    dataset = library("reasoning_gym", "tasks").create_dataset(name, **options)
    entry = functools.lru_cache(1024)(dataset.__getitem__)

    def score(prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        item = entry(meta["index"])
        if item["question"] != meta["question"]:
            raise ValueError(f"question {meta['index']} is another one than in the record")
        before, tag, _ = completion.rpartition("</answer>")
        answer = before.rpartition("<answer>")[2] if tag else completion
        return float(dataset.score_answer(answer.strip(), item))

    return score
