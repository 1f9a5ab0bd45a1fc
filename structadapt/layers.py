"""The one module that carries an adapter, and where a model has it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structadapt.adapters.base import Adapter
from structadapt.ops import wide_dtype


class AdaptedLinear(nn.Linear):
    """A frozen nn.Linear with an adapter. Made by `adapt`, not by calling the class.

    Attributes: `adapter`, the configuration; `enabled`, False within `disabled(model)`; the
    adapter's tensors by name (A, B, m, gate_0, ...), fp32 parameters, or buffers if frozen.
    """

    adapter: Adapter
    enabled: bool
    tensor_names: tuple[str, ...]
    base_weight: Tensor | None  # the weight before a merge, while merged

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(input, self.frozen_weight, self.bias)
        if self.base_weight is not None:
            return F.linear(input, self.weight, self.bias)
        return self.adapter.forward(input, self.weight, self.bias, self.tensors())

    @property
    def frozen_weight(self) -> Tensor:
        """W, merged or not."""
        return self.weight if self.base_weight is None else self.base_weight

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_names}

    def delta_weight(self) -> Tensor:
        """W' - W (out, in), fp32, the difference formed in float64."""
        W = self.frozen_weight.detach().double()
        p = {name: tensor.detach().double() for name, tensor in self.tensors().items()}
        return (self.adapter.weight(W, p) - W).float()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.adapter}"

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "AdaptedLinear":
        """What `to`, `half`, `cuda`, ... do: the adapter's tensors stay at least fp32."""
        before = {name: tensor.data for name, tensor in self.tensors().items()}
        super()._apply(fn, recurse)
        if self.base_weight is not None:
            self.base_weight = fn(self.base_weight)
        wide = wide_dtype(self.weight.dtype)
        for name, tensor in self.tensors().items():
            if tensor.dtype != wide:
                tensor.data = before[name].to(tensor.device, wide)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse weights that would be lost at `unmerge`, or that the adapter does not fit."""
        errors: list[str] = args[-1] if args else kwargs["error_msgs"]
        if self.base_weight is not None:
            errors.append(f"{prefix[:-1]} is merged: unmerge first, then load")
        elif self._other_base(state_dict, prefix):
            kind = type(self.adapter).__name__
            errors.append(f"{prefix[:-1]} has a {kind} of another weight: load first, then adapt")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _other_base(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether only another W comes in, under an adapter that was made for this one."""
        W = state_dict.get(f"{prefix}weight")
        if W is None or self.adapter.additive or f"{prefix}{self.tensor_names[0]}" in state_dict:
            return False
        return not torch.equal(W.to(self.weight), self.weight)

    def trained_tensors(self) -> list[nn.Parameter]:
        """The adapter's tensors that train."""
        return [t for t in self.tensors().values() if isinstance(t, nn.Parameter)]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can carry an adapter, by name: plain nn.Linear, adapted or not.

    A subclass with its own forward is not one: it may never call the adapter.
    """
    modules = model.named_modules()
    return {n: m for n, m in modules if type(m) is nn.Linear or isinstance(m, AdaptedLinear)}


def find_adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name, if there are any."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name. Raises ValueError if there are none."""
    layers = find_adapted(model)
    if not layers:
        raise ValueError("this model has no adapted layer: call structadapt.adapt or load first")
    return layers
