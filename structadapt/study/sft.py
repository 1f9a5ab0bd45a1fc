"""The supervised control: the same prompts once, in the same batches, with their right answers.

Here the gradient is dense: a policy that a large first step has ruined still gets one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt.study.tasks import Base, Task

IGNORED = -100  # of cross_entropy: no target
Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its right completion


def pairs_of(task: Task, base: Base) -> list[Pair]:
    """The prompts with their answers and end-of-sequence, as token ids. ValueError for a task whose
    right completions are not known."""
    if task.target is None:
        raise ValueError("method sft needs a task that knows its right completions")
    eos = base.eos if isinstance(base.eos, int) else base.eos[0]
    encode = base.tokenizer.encode
    return [(list(encode(r["prompt"])), [*encode(task.target(r)), eos]) for r in task.prompts]


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    pairs: Sequence[Pair],
    batch: int,
    accuracy: Callable[[], float],
    monitor: Any = None,
) -> Iterator[dict[str, Any]]:
    """Go once through the pairs, yielding {step, loss, grad_norm, held_out}.

    The loss is the mean cross-entropy of the completions' tokens. held_out: accuracy() after steps
    1, 2, 4, 8, ... and the last one, else None. FloatingPointError for a gradient that is not
    finite, before the step that would take it.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    starts = range(0, len(pairs), batch)
    model.train()
    for step, start in enumerate(starts):
        ids, targets = padded(pairs[start : start + batch], trained[0].device)
        found = model(ids)  # padded on the right: no token sees what comes after it
        logits = found if isinstance(found, Tensor) else found.logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                               ignore_index=IGNORED)  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        optimizer.step()
        schedule.step()
        if monitor is not None:
            monitor.step()
        look = (step + 1) & step == 0 or step + 1 == len(starts)
        held_out = accuracy() if look else None
        yield {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "held_out": held_out}


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
