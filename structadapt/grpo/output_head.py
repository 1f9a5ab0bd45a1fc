"""The hidden states that a model's output head would get, in place of its logits.

The head is what `get_output_embeddings()` returns, as in transformers, else the attribute
`lm_head`. It has to be a plain nn.Linear, and its output what the model returns: not scaled, capped
or masked afterwards. The second is looked at in every call. The head hands out a stand-in for the
logits, all zeros and without memory, and the model has to return that very tensor, unwritten.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from structadapt.onlookers import has_hooks

logger = logging.getLogger("structadapt")


class NotPlainError(Exception):
    """The model does something else with its logits than return them."""


class _StandIn(Tensor):
    """Logits that nobody may look at: their numbers are not there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in HARMLESS or getattr(func, "__self__", None) in ATTRIBUTES:
                return func(*args, **(kwargs or {}))
            same = func in CASTS and func(*args, **(kwargs or {}))
        if same is not False and isinstance(args[0], cls) and same.dtype == args[0].dtype:
            return args[0]  # a cast that changes nothing returns what it got
        name = getattr(func, "__name__", func)
        raise NotPlainError(f"the model works on its logits ({name})")


CASTS = (Tensor.float, Tensor.to, Tensor.type_as)
HARMLESS = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point)
ATTRIBUTES = (
    Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.requires_grad, Tensor.is_cuda,
    Tensor.layout, Tensor._version,
)  # fmt: skip


@dataclass
class OutputHead:
    """A head that can be left out."""

    linear: nn.Linear

    def hidden(
        self, call: Callable[[], Any], logits_of: Callable[[Any], Tensor]
    ) -> tuple[Any, Tensor]:
        """(what the model returns, the hidden states (N, L, H) that its head got).

        In the dtype that the head would have multiplied them in. Raises NotPlainError if the logits
        are not hidden W^T + bias and nothing else, or the model cannot work on a stand-in.
        """
        seen: list[tuple[Tensor, Tensor, int]] = []
        before, owner = self._state(), threading.get_ident()

        def stand_in(input: Tensor) -> Tensor:
            weight, device = self.linear.weight, input.device.type
            cast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
            fits = input.dim() == 3 and (cast or input.dtype == weight.dtype)
            other = threading.get_ident() != owner  # whose logits are its own
            if torch.compiler.is_compiling() or not fits or other:
                return nn.Linear.forward(self.linear, input)
            if self._state() != before:
                raise NotPlainError("the head runs with another weight or without a gradient")
            x = input.to(torch.get_autocast_dtype(device)) if cast else input
            # At least fp32, whatever the dtype: a model that casts its logits up returns it as is.
            dtype = torch.promote_types(x.dtype, torch.float32)
            zeros = torch.zeros(*x.shape[:-1], 1, dtype=dtype, device=x.device)
            logits = zeros.expand(-1, -1, len(weight)).as_subclass(_StandIn)
            seen.append((x, logits, x._version))
            return logits

        try:
            self.linear.forward = stand_in  # type: ignore[method-assign]
            out = call()
            logits = logits_of(out)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise NotPlainError(f"{type(error).__name__}: {error}") from error
        finally:
            vars(self.linear).pop("forward", None)
        if len(seen) != 1:
            raise NotPlainError(f"the head was called {len(seen)} times")
        x, given, version = seen[0]
        # A reentrant checkpoint around the head would return it with a gradient of its own.
        if logits is not given or given._version or given.requires_grad or x._version != version:
            raise NotPlainError("the logits are not what the head returned")
        if self._state() != before:
            raise NotPlainError("the head's weight was written to")
        return out, x

    def _state(self) -> tuple[Any, ...]:
        """What the head multiplies by, as far as one can tell without looking at the numbers."""
        tensors = (self.linear.weight, self.linear.bias)
        places = ((id(t), t._version, t.data_ptr()) for t in tensors if t is not None)
        return torch.is_grad_enabled(), *places


def draws(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """A function that puts the random numbers back, for a second try that drops the same."""
    if not model.training:
        return lambda: None
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return again


def refuse(model: nn.Module, reason: NotPlainError) -> None:
    """Do not try again, and say so once."""
    refused.add(model)
    logger.info("%s: the update makes all logits, since %s", type(model).__name__, reason)


# Models that were found to do something else with their logits: not tried again.
refused: WeakSet[nn.Module] = WeakSet()


def find_head(model: nn.Module) -> OutputHead | None:
    """The model's head, if it is one that can be left out as far as one can see."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else getattr(model, "lm_head", None)
        unfit = type(head) is not nn.Linear or model in refused or "forward" in vars(head)
    except (NotImplementedError, AttributeError, TypeError):  # no head, or no hash
        return None
    if unfit:
        return None
    assert isinstance(head, nn.Linear)
    if torch.is_inference_mode_enabled():  # its tensors do not count writes
        return None
    # Sharded and quantised weights have types of their own; a bias follows its weight.
    if type(head.weight) is not nn.Parameter or head.weight.is_meta:
        return None
    path = _path(model, head)
    # A hook may look at the logits, and FSDP gathers weights in hooks; what is compiled is traced.
    looked_at = any(map(has_hooks, path))
    compiled = any(
        module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in path
    )
    return None if looked_at or compiled or not path else OutputHead(head)


def _path(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules from the model down to the head, both included; empty if it is not inside."""
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        return []
    parts = name.split(".")
    return [model, *(model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))]
