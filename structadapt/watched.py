"""Parameters that tell when they were written to, so that what was derived from them can be kept.

torch counts in-place writes in `_version`, except two kinds: writes through `.data`, and those of
fused optimizers. A `Watched` parameter tells of the first; a hook on every optimizer step counts
the second. What still goes unseen is a write that bypasses torch altogether (a numpy view, a raw
collective, another process) or goes through an alias that `.data` gave before the parameter was
watched. After one, `watch()` of the layer forgets what it kept.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Watched(nn.Parameter):
    """A parameter whose `.data` shares its version counter; an assignment to it is a new stamp."""

    source: Tensor | None = None  # what `.data` was last set to: it has a version of its own

    @cached_property
    def stamp(self) -> object:
        """An object of its own, another one after every assignment to `.data`."""
        return object()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]
        self.stamp = object()
        self.source = None if value.is_inference() else value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain parameter: its layer watches it again when unpickled."""
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


_optimizer_steps = 0
_hooked = False


def watch(parameters: Iterable[Tensor | None]) -> None:
    """Make plain parameters watched, in place. Others (sharded, quantised) are left alone, and
    nothing is then kept of them."""
    global _hooked
    if not _hooked:
        register_optimizer_step_post_hook(_count_step)
        _hooked = True
    for parameter in parameters:
        if type(parameter) is nn.Parameter:
            parameter.__class__ = Watched


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


def state_of(tensors: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """A key that changes whenever one of the tensors is written to or replaced.

    None if that cannot be told: a tensor that is not watched (as inside FSDP, functional_call or
    for a quantised weight), or a CUDA graph that is being captured and would replay an old value.
    """
    key: list[Any] = [_optimizer_steps]
    for tensor in tensors:
        if type(tensor) is not Watched or tensor.is_inference():
            return None
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        source = 0 if tensor.source is None else tensor.source._version
        key += (tensor.stamp, tensor._version, source, tensor.data_ptr())
    return tuple(key)
