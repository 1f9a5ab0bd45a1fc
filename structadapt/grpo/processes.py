"""The processes of a run, where torch.distributed has more than one; here one is all there is."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """(this process, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


def total(values: Sequence[float]) -> list[float]:
    """Every value summed over the processes, in float64 and in the order of their ranks."""
    return [sum(column) for column in zip(*gather(list(values)), strict=True)]


def any_of(yes: bool) -> bool:
    """Whether some process says yes."""
    return any(gather(yes))


def whole(work: Callable[[], T]) -> T:
    """The result of `work`, if it succeeds on every process; else every process raises.

    Without this, the others would wait for ever for the one that failed.
    """
    if rank_and_size()[1] == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as failure:
        error = failure
    failed = [message for message in gather(None if error is None else repr(error)) if message]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"another process failed: {failed[0]}")
    return result  # type: ignore[return-value]


def sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether some are DTensors: a forward with them is a call that all processes make together,
    and their gradients come averaged over the processes."""
    return any(hasattr(p, "full_tensor") for p in parameters)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes, in one message for each dtype. A parameter that has
    none on any of them has none afterwards; those of sharded parameters are the sum already."""
    if rank_and_size()[1] == 1:
        return
    has = gather([p.grad is not None for p in parameters])
    parameters = [
        p for p, *some in zip(parameters, *has, strict=True)
        if any(some) and not hasattr(p, "full_tensor")
    ]  # fmt: skip
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for dtype in dict.fromkeys(g.dtype for g in grads):
        chosen = [i for i, g in enumerate(grads) if g.dtype == dtype]
        flat = torch.cat([grads[i].flatten() for i in chosen])
        dist.all_reduce(flat)
        for i, part in zip(chosen, flat.split([grads[i].numel() for i in chosen]), strict=True):
            parameters[i].grad = part.view_as(grads[i])
