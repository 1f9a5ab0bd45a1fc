"""Put a model, an optimizer, a scheduler and the random number generators back as they were."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structadapt.grpo.generators import put_random_state, random_state
from structadapt.grpo.rollout import modes

Put = Callable[[], Any]


@contextmanager
def restored(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None
) -> Iterator[Put]:
    """Whatever happens inside, the training state is bit for bit that of before when it ends.

    Yields a function that puts everything back at once, to be called as often as one likes.

    Kept are the values of what the optimizer holds or what requires a gradient, every buffer, the
    optimizer (also that it has no state yet), the scheduler's state_dict, each parameter's
    gradient, every module's mode and the generators of Python, NumPy, torch and CUDA. Tensors stay
    the same objects. Frozen parameters are not copied: no step writes them.
    """
    kept = pieces(model, optimizer, scheduler)

    def put() -> None:
        for piece in kept.values():
            piece()

    try:
        yield put
    finally:
        put()


def pieces(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Put]:
    """What puts each part of the state back as it is now."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    apart = {id(p): lambda p=p: p for p in held}  # their values are kept beside the optimizer
    return {
        "parameters": keep([*held, *trained], {}),
        "buffers": keep([module._buffers for module in model.modules()], {}),
        "optimizer": keep(vars(optimizer), apart),
        "scheduler": _schedule(scheduler),
        "gradients": _gradients([*held, *model.parameters()]),
        "modes": modes(model),
        "generators": generators(),
    }


def _schedule(scheduler: Any) -> Put:
    if scheduler is None:
        return lambda: None
    state = copy.deepcopy(scheduler.state_dict())
    return lambda: scheduler.load_state_dict(copy.deepcopy(state))


def _gradients(parameters: list[nn.Parameter]) -> Put:
    grads = [(p, keep(p.grad, {})) for p in dict.fromkeys(parameters)]

    def put() -> None:
        for parameter, grad in grads:
            parameter.grad = grad()

    return put


def generators() -> Put:
    """What puts the random number generators back as they are now."""
    state = random_state()
    return lambda: put_random_state(state)


# -- nested values ---------------------------------------------------------------------------------


def keep(value: Any, seen: dict[int, Put]) -> Put:
    """What gives `value` back as it is now.

    Tensors, dicts, lists and optimizers are the same objects with their old content; anything else
    is returned as it is. One that stands in several places is copied once (`seen`).
    """
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        put = _tensor(value)
    elif isinstance(value, dict):
        put = _dict(value, seen)
    elif isinstance(value, list):
        put = _list(value, seen)
    elif isinstance(value, torch.optim.Optimizer):  # inside another one
        inside = keep(vars(value), seen)
        put = lambda: (inside(), value)[1]  # noqa: E731
    else:
        return lambda: value
    seen[id(value)] = put
    return put


def _tensor(value: Tensor) -> Put:
    old = value.detach().clone()

    @torch.no_grad()
    def put() -> Tensor:
        value.copy_(old)
        return value

    return put


def _dict(value: dict[Any, Any], seen: dict[int, Put]) -> Put:
    items = {key: keep(item, seen) for key, item in value.items()}

    def put() -> dict[Any, Any]:
        old = {key: item() for key, item in items.items()}
        value.clear()
        value.update(old)
        return value

    return put


def _list(value: list[Any], seen: dict[int, Put]) -> Put:
    items = [keep(item, seen) for item in value]

    def put() -> list[Any]:
        value[:] = [item() for item in items]
        return value

    return put
