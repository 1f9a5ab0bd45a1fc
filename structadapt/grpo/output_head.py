"""The hidden states that a model's output head would get, in place of its logits.

The head is what `get_output_embeddings()` returns, as in transformers, else the attribute
`lm_head`. It has to be a plain nn.Linear, and its output what the model returns: not scaled, capped
or masked afterwards. The second is looked at in every call. The head hands out a stand-in for the
logits, all zeros and without memory, and the model has to return that very tensor, unwritten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotPlainError(Exception):
    """The model does something else with its logits than return them."""


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

        def stand_in(input: Tensor) -> Tensor:
            weight, device = self.linear.weight, input.device.type
            cast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
            fits = input.dim() == 3 and (cast or input.dtype == weight.dtype)
            if torch.compiler.is_compiling() or not fits:
                return nn.Linear.forward(self.linear, input)
            x = input.to(torch.get_autocast_dtype(device)) if cast else input
            # At least fp32, whatever the dtype: a model that casts its logits up returns it as is.
            dtype = torch.promote_types(x.dtype, torch.float32)
            zeros = torch.zeros(*x.shape[:-1], 1, dtype=dtype, device=x.device)
            logits = zeros.expand(-1, -1, len(weight))
            seen.append((x, logits, x._version))
            return logits

        self.linear.forward = stand_in  # type: ignore[method-assign]
        try:
            out = call()
            logits = logits_of(out)
        except Exception as error:
            raise NotPlainError(f"{type(error).__name__}: {error}") from error
        finally:
            del self.linear.forward
        if len(seen) != 1:
            raise NotPlainError(f"the head was called {len(seen)} times")
        x, given, version = seen[0]
        # A reentrant checkpoint around the head would return it with a gradient of its own.
        if logits is not given or given._version or given.requires_grad or x._version != version:
            raise NotPlainError("the logits are not what the head returned")
        return out, x


# Models that were found to do something else with their logits: not tried again.
refused: WeakSet[nn.Module] = WeakSet()


def find_head(model: nn.Module) -> OutputHead | None:
    """The model's head, if it is one that can be left out as far as one can see."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(model, "lm_head", None)
    if type(head) is not nn.Linear or model in refused or "forward" in vars(head):
        return None
    if torch.is_inference_mode_enabled():  # its tensors do not count writes
        return None
    # Sharded and quantised weights have types of their own; a bias follows its weight.
    if type(head.weight) is not nn.Parameter or head.weight.is_meta:
        return None
    path = _path(model, head)
    # A hook may look at the logits, and FSDP gathers weights in hooks; what is compiled is traced.
    looked_at = any(getattr(module, name) for module in path for name in HOOKS)
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
