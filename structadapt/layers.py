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
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as nn.Linear does. A checkpoint without any adapter is the base's: it loads, also
        when strict, and the adapter stays as it is, unless it was made for another W."""
        adapters = {key.rsplit(".", 1)[-1] for key in state_dict} & {*self.tensor_names}
        W = state_dict.get(f"{prefix}weight")
        if self.base_weight is not None:
            error_msgs.append(f"{prefix[:-1]} is merged: unmerge first, then load")
            return
        if not (adapters or self.adapter.additive or W is None or self._is_base(W)):
            kind = type(self.adapter).__name__
            error_msgs.append(
                f"{prefix[:-1]} has a {kind} of another weight: load first, then adapt"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not adapters:
            own = {f"{prefix}{name}" for name in self.tensor_names}
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def _is_base(self, W: Tensor) -> bool:
        return torch.equal(W.to(self.weight), self.weight)

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
