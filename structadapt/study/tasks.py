"""What the cells of a study train: a base model that is loaded or cold-started, and its task."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import structadapt as sa
from structadapt.examples import evaluating, smollm, tiny_lm
from structadapt.files import locked, write_atomically
from structadapt.study import distributed
from structadapt.study.cell import EMBEDDED, Cell, config

Record = dict[str, Any]
GYM_POOL = 4  # problems of reasoning-gym for each prompt of a run: seeds take different ones
DIGITS = 7  # of a sorting problem


@dataclass(frozen=True)
class Task:
    """Prompts to train on, those held out, what is right, and what a supervised run writes."""

    prompts: Sequence[Record]
    held_out: Sequence[Record]
    reward: Callable[..., float]
    new_tokens: int  # of a completion, with end-of-sequence
    target: Callable[[Record], str] | None = None  # the text of the right completion


@dataclass(frozen=True)
class Base:
    """A model before its adapter, and how it reads and stops."""

    model: nn.Module
    tokenizer: Any
    eos: int | Sequence[int]
    pad: int
    cold_start: dict[str, Any] | None = None  # steps and the accuracy reached, of an embedded model


# -- tasks -----------------------------------------------------------------------------------------


def sorting_problem(digits: str) -> Record:
    """prompt "7402913="   answer "0123479": the digits in order."""
    return {"prompt": f"{digits}=", "answer": "".join(sorted(digits))}


def sorting_problems(rng: random.Random, held_out: bool, curriculum: bool = False) -> Iterator:
    """Random digits to sort, for ever, all held out or none. Held out is a tenth of the multisets,
    so that no order of them is seen. With `curriculum` some have few different digits."""
    while True:
        pool = rng.sample("0123456789", rng.randint(2, 10)) if curriculum else "0123456789"
        digits = [rng.choice(pool) for _ in range(DIGITS)]
        weighed = sum(3**i * int(d) for i, d in enumerate(sorted(digits)))
        if (weighed % 11 == 0) == held_out:
            yield sorting_problem("".join(digits))


TINY = {  # name: (problems, tokens of an answer with "$")
    "addition": (tiny_lm.problems, tiny_lm.ANSWER_TOKENS),
    "sorting": (sorting_problems, DIGITS + 1),
}


def task_of(cell: Cell) -> Task:
    """The task of a cell. ValueError for data that cannot be read or is too small."""
    return {"sums": _sums, "deepmath": _deepmath, "gym": _gym}.get(cell.task, _embedded)(cell)


def _embedded(cell: Cell) -> Task:
    problems, tokens = TINY[cell.task]
    learn = problems(random.Random(f"grpo {cell.seed}"), held_out=False)
    held_out = problems(random.Random("held out, end"), held_out=True)
    return Task(
        list(islice(learn, cell.prompts)), list(islice(held_out, cell.problems)),
        sa.grpo.exact_match, tokens, target=lambda record: record["answer"],
    )  # fmt: skip


def _sums(cell: Cell) -> Task:
    learn, held_out = smollm.problems()
    prompts = random.Random(cell.seed).choices(learn, k=cell.prompts)
    return Task(
        prompts, held_out[: cell.problems], smollm.first_number, smollm.NEW_TOKENS,
        target=lambda record: f" {record['answer']}",
    )  # fmt: skip


def _deepmath(cell: Cell) -> Task:
    assert cell.data is not None
    records = sa.grpo.load_deepmath(cell.data, cell.min_difficulty)
    return _split(records, cell, sa.grpo.math_verify_reward(), 4096)


def _gym(cell: Cell) -> Task:
    assert cell.data is not None
    size = cell.problems + GYM_POOL * cell.prompts
    records, reward = sa.grpo.reasoning_gym(cell.data, size, seed=0)
    return _split(records, cell, reward, 256)


def _split(records: list[Record], cell: Cell, reward: Any, new_tokens: int) -> Task:
    """Records held out, the same for every seed, and some of the others."""
    random.Random("held out").shuffle(records)
    held_out, learn = records[: cell.problems], records[cell.problems :]
    if len(learn) < cell.prompts:
        raise ValueError(f"prompts is {cell.prompts}, and {cell.data} has {len(learn)} to train on")
    prompts = random.Random(cell.seed).sample(learn, cell.prompts)
    return Task(prompts, held_out, reward, new_tokens)


# -- base models -----------------------------------------------------------------------------------


def load(cell: Cell, bases: Path) -> Base:
    """The base model of a cell. An embedded one is cold-started once for all cells that share it,
    and kept in `bases`."""
    if cell.model not in EMBEDDED:
        name = None if cell.model == "smollm2" else cell.model
        device = distributed.device_of(cell)
        model, tokenizer = smollm.load(name, device, getattr(torch, cell.dtype))
        eos, pad = smollm.end_tokens(model, tokenizer)
        return Base(model, tokenizer, eos, pad)
    name = f"{cell.model}-{cell.task}-{cell.cold_start:g}-seed{cell.seed}"
    torch.manual_seed(cell.seed)
    model = tiny_lm.TinyLM(EMBEDDED[cell.model])
    bases.mkdir(parents=True, exist_ok=True)
    weights, log = bases / f"{name}.safetensors", bases / f"{name}.json"
    with locked(bases / f".{name}.lock"):
        if not log.exists():
            told = _cold_start(model, cell)
            write_atomically(weights, safetensors.torch.save(model.state_dict()))
            write_atomically(log, json.dumps(told).encode())
    model.load_state_dict(safetensors.torch.load_file(weights))
    model.to(distributed.device_of(cell), getattr(torch, cell.dtype))
    told = json.loads(log.read_text())
    return Base(model, tiny_lm.CharTokenizer(), tiny_lm.EOS, tiny_lm.EOS, told)


def _cold_start(model: tiny_lm.TinyLM, cell: Cell) -> dict[str, Any]:
    """Supervised steps until the model solves some problems. ValueError if it never does."""
    problems, tokens = TINY[cell.task]
    held_out = list(islice(problems(random.Random("held out, curve"), held_out=True), 300))
    how = sa.grpo.Config(eos_token_id=tiny_lm.EOS, pad_token_id=tiny_lm.EOS, max_new_tokens=tokens)

    def accuracy() -> float:
        return sa.grpo.evaluate(
            model, held_out, sa.grpo.exact_match, how, tokenizer=tiny_lm.CharTokenizer(),
            seed=cell.seed,
        ).mean  # fmt: skip

    if not cell.cold_start:
        return {"steps": 0, "accuracy": None}
    source = problems(random.Random(f"cold start {cell.seed}"), held_out=False, curriculum=True)
    steps, reached = 0, 0.0
    for step, _, seen in tiny_lm.cold_start(model, accuracy, cell.cold_start, source, 1000):
        steps, reached = step, reached if seen is None else seen
    if reached < cell.cold_start:
        raise ValueError(
            f"the cold start of {cell.model} on {cell.task} ends at {reached:.3f} after {steps} "
            f"steps, short of {cell.cold_start}: lower cold_start"
        )
    return {"steps": steps, "accuracy": reached}


# -- how well it does ------------------------------------------------------------------------------


def accuracy(base: Base, task: Task, cell: Cell, context: Any) -> dict[str, Any]:
    """Greedy and sampled, with their 95 % intervals, on the held-out problems. All processes of the
    cell call this together."""
    how = config(cell, base.eos, base.pad, task.new_tokens)
    return evaluating.accuracy(
        base.model, task.held_out, task.reward, how, cell.samples, batch_size=256,
        tokenizer=base.tokenizer, rollout_context=context, spread=True,
    )  # fmt: skip


def sampled(base: Base, task: Task, cell: Cell, problems: int) -> float:
    """Sampled accuracy on some of the held-out problems, for a curve."""
    how = config(cell, base.eos, base.pad, task.new_tokens)
    return sa.grpo.evaluate(
        base.model, task.held_out[:problems], task.reward, how, tokenizer=base.tokenizer,
        seed=cell.seed,
    ).mean  # fmt: skip
