"""The supervised control: the same prompts once, in the same batches, with their right answers.

Here the gradient is dense: a policy that a large first step has ruined still gets one.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt.files import write_atomically
from structadapt.study.cell import Cell
from structadapt.study.tasks import Base, Task

IGNORED = -100  # of cross_entropy: no target
STATE = "sft.pt"
Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its right completion


def pairs_of(task: Task, base: Base) -> list[Pair]:
    """The prompts with their answers and end-of-sequence, as token ids. ValueError for a task whose
    right completions are not known."""
    if task.target is None:
        raise ValueError("method sft needs a task that knows its right completions")
    eos = base.eos if isinstance(base.eos, int) else base.eos[0]
    encode = base.tokenizer.encode
    # A completion goes on: no token that begins a text.
    more = {"add_special_tokens": False} if callable(base.tokenizer) else {}
    return [
        (list(encode(r["prompt"])), [*encode(task.target(r), **more), eos]) for r in task.prompts
    ]


def train(
    base: Base,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    pairs: Sequence[Pair],
    cell: Cell,
    max_grad_norm: float,
    accuracy: Callable[[], float],
    monitor: Any,
    states: Path,
) -> Iterator[dict[str, Any]]:
    """Go once through the pairs, yielding {step, loss, grad_norm, held_out}.

    The loss is the mean cross-entropy of the completions' tokens of a batch. held_out: accuracy()
    after steps 1, 2, 4, 8, ... and the last one, else None. The state is kept in the folder
    `states`; a run that was stopped goes on from it, with the record of the last step it had saved.
    FloatingPointError for a gradient that is not finite, before the step that would take it.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {"optimizer": optimizer, "schedule": schedule}
    parts |= {"monitor": monitor} if monitor else {}
    starts = range(0, len(pairs), cell.batch)
    done = -1
    if (states / STATE).exists():
        state = torch.load(states / STATE, weights_only=True)
        with torch.no_grad():
            for p, value in zip(trained, state["trained"], strict=True):
                p.copy_(value)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["record"]["step"]
        yield state["record"]
    base.model.train()
    for step in range(done + 1, len(starts)):
        batch = pairs[starts[step] : starts[step] + cell.batch]
        optimizer.zero_grad()
        loss = _backward(base.model, batch, cell.micro_batch or len(batch))
        norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        optimizer.step()
        schedule.step()
        if monitor is not None:
            monitor.step()
        look = (step + 1) & step == 0 or step + 1 == len(starts)
        held_out = accuracy() if look else None
        record = {"step": step, "loss": loss, "grad_norm": norm.item(), "held_out": held_out}
        if (step + 1) % cell.checkpoint_every == 0:
            kept = {name: part.state_dict() for name, part in parts.items()}
            file = io.BytesIO()
            torch.save({"record": record, "trained": [p.data for p in trained], **kept}, file)
            states.mkdir(parents=True, exist_ok=True)
            write_atomically(states / STATE, file.getvalue())
        yield record


def _backward(model: torch.nn.Module, pairs: Sequence[Pair], micro: int) -> float:
    """Add the gradient of the mean over the completions' tokens, `micro` pairs at a time; the
    mean."""
    tokens, whole = sum(len(completion) for _, completion in pairs), 0.0
    device = next(model.parameters()).device
    for start in range(0, len(pairs), micro):
        ids, targets = padded(pairs[start : start + micro], device)
        found = model(ids)  # padded on the right: no token sees what comes after it
        logits = found if isinstance(found, Tensor) else found.logits
        flat = logits.flatten(0, 1).float(), targets.flatten()
        loss = F.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / tokens
        loss.backward()
        whole += loss.item()
    return whole


def padded(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (N, L), and at each place the token that comes next, IGNORED before the completion."""
    length = max(len(p) + len(c) for p, c in pairs) - 1
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, completion) in enumerate(pairs):
        whole = torch.tensor(prompt + completion)
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = torch.tensor(completion)
    return ids.to(device), targets.to(device)
