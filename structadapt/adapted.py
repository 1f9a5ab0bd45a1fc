"""What every module that carries an adapter has in common."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from structadapt.adapters.base import Adapter, generator_for
from structadapt.ops import observed, wide_dtype
from structadapt.watched import state_of, watch

Parameters = dict[str, Tensor]
MERGED = "merged"  # a key in the state dict of a merged layer


class Adapted(nn.Module):
    """A frozen layer with an adapter. Made by `adapt`, not by calling the class.

    Attributes: `adapter`, the configuration; `enabled`, False within `disabled(model)`; the
    adapter's tensors by name (A, B, m, gate_0, ...), fp32 parameters, or buffers if frozen, and
    perhaps `delta_bias` (out,), trained and added to the bias.
    """

    plain: ClassVar[type[nn.Module]]  # the class the layer had
    is_quantised: ClassVar[bool] = False

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter
    enabled: bool
    tensor_names: tuple[str, ...]
    base_weight: Tensor | None  # the weight before a merge, while merged
    residual: Tensor | None  # what rounding took from the merged weight, if kept
    origin: tuple[int, str]  # (seed, name): what fresh tensors are drawn from
    pending: bool  # attached on the meta device: no values yet
    _kept: tuple[Any, Parameters]  # what the adapter derived, and from which state of its tensors

    # -- what a kind of layer says -----------------------------------------------------------------

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A stored weight as (out, in); a view."""
        return weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without an adapter, on any weight."""
        raise NotImplementedError

    def run_adapted(self, input: Tensor, bias: Tensor | None, p: Parameters) -> Tensor:
        return self.adapter.forward(input, self.as_matrix(self.weight), bias, p)

    # -- running -----------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if self.pending:
            raise RuntimeError(
                f"{self.origin[1]} was adapted on the meta device and has no values yet: load the "
                "base weights, then an adapter, or call its reset_parameters()"
            )
        self.check_dtype(input)
        if not self.enabled:
            return self.run(input, self.frozen_weight, self.bias)
        p = self.tensors()
        bias = self.adapted_bias(p)
        if self.base_weight is None:
            return self.run_adapted(input, bias, {**p, **self._derived(p)})
        y = self.run(input, self.weight, bias)
        return y if self.residual is None else y + self.run(input, self.residual, None)

    def check_dtype(self, input: Tensor) -> None:
        """TypeError for an input that the weight cannot be multiplied with."""
        if input.dtype != self.weight.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(
                f"{self.origin[1]}: the input is {input.dtype} and the weight {self.weight.dtype}; "
                "cast the input, or run under torch.autocast"
            )

    def adapted_bias(self, p: Parameters) -> Tensor | None:
        """The frozen bias and what is trained beside it."""
        if "delta_bias" not in p:
            return self.bias
        delta = p["delta_bias"]
        like = self.weight if self.bias is None else self.bias
        return (delta if self.bias is None else self.bias + delta).to(like.dtype)

    def _derived(self, p: Parameters) -> Parameters:
        """What the adapter derives from W and p, worked out again only after a write to them."""
        if type(self.adapter).derived is Adapter.derived or observed():
            return {}
        state = state_of([self.weight, *p.values()])
        if state is None:
            return self.adapter.derived(self.matrix(), p)
        state = (self.adapter, *state)
        kept_state, derived = self._kept
        if kept_state != state:
            derived = self.adapter.derived(self.matrix(), p)
            object.__setattr__(self, "_kept", (state, derived))
        return derived

    # -- looking -----------------------------------------------------------------------------------

    @property
    def frozen_weight(self) -> Tensor:
        """The base weight as stored, merged or not."""
        return self.weight if self.base_weight is None else self.base_weight

    def matrix(self) -> Tensor:
        """W (out, in), merged or not; a view."""
        return self.as_matrix(self.frozen_weight.detach())

    def tensors(self) -> Parameters:
        """The adapter's tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_names}

    def trained_tensors(self) -> list[nn.Parameter]:
        """The adapter's tensors that train."""
        return [t for t in self.tensors().values() if isinstance(t, nn.Parameter)]

    def adapted_weight(self) -> Tensor:
        """W' as the layer stores its weight, in at least fp32; the model is left alone. Of a
        sharded layer too, whole: call it on every rank."""
        return self._weights(wide_dtype(self.frozen_weight.dtype))[1]

    def wide_weights(self) -> tuple[Tensor, Tensor]:
        """W and W' as the layer stores its weight, with more digits than it has: in fp32 if the
        weight is of low precision, else in float64."""
        wide = wide_dtype(self.frozen_weight.dtype)
        return self._weights(torch.float64 if wide == self.frozen_weight.dtype else wide)

    def delta_weight(self) -> Tensor:
        """W' - W (out, in), fp32, the difference formed in float64."""
        W, weight = map(self.as_matrix, self._weights(torch.float64))
        return (weight - W).float()

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        W = whole(self.matrix()).to(dtype)
        p = {name: whole(tensor.detach()).to(W) for name, tensor in self.tensors().items()}
        return self.as_stored(W), self.as_stored(self.adapter.weight(W, p))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.adapter}"

    # -- what torch does to modules ----------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base_weight is not None:
            destination[f"{prefix}{MERGED}"] = torch.tensor(True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh adapter tensors for the weight as it is; the weight, unlike in nn.Linear, stays."""
        fresh = self.adapter.init(whole(self.matrix()), generator_for(*self.origin))
        for name, tensor in self.tensors().items():
            value = fresh[name] if name in fresh else torch.zeros(tensor.shape)
            value = sharded_as(tensor, value.to(self.weight.device))
            if tensor.is_meta:
                self._replace(name, value)
            else:
                tensor.copy_(value)
        self.pending = self.weight.is_meta
        self.watch()

    def watch(self) -> None:
        """Let writes be seen to what the adapter keeps something of."""
        self._kept = (None, {})
        if type(self.adapter).derived is not Adapter.derived:
            watch([self.weight, *self.tensors().values()])

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "Adapted":
        """What `to`, `half`, `cuda`, ... do: the adapter's tensors stay at least fp32."""
        before = {name: tensor.data for name, tensor in self.tensors().items()}
        super()._apply(fn, recurse)
        if self.base_weight is not None:
            self.base_weight = fn(self.base_weight)
            self.residual = None if self.residual is None else fn(self.residual)
        wide = wide_dtype(self.weight.dtype)
        for name, tensor in self.tensors().items():
            if tensor.dtype != wide:
                tensor.data = before[name].to(tensor.device, wide)
            if before[name].is_meta and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(float("nan"))  # no value yet, and seen to be none
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load as the plain layer does. A checkpoint without any adapter is the base's: it loads,
        also when strict, and the adapter stays as it is, unless it was made for another W. One that
        was attached on the meta device starts then."""
        adapters = self._given(state_dict, prefix)
        W = state_dict.get(f"{prefix}weight")
        if self.base_weight is not None:
            error_msgs.append(f"{prefix[:-1]} is merged: unmerge first, then load")
            return
        if f"{prefix}{MERGED}" in state_dict:
            error_msgs.append(
                f"{prefix[:-1]}: this state dict was taken while the model was merged, and the "
                "adapter would count twice: take it after unmerge, or save the adapter alone"
            )
            return
        if not (adapters or self.adapter.additive or self.pending or W is None or self._is_base(W)):
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
            if self.pending and W is not None and not self.weight.is_meta:
                self.reset_parameters()
        else:
            is_meta = any(t.is_meta for t in (self.weight, *self.tensors().values()))
            self.pending = is_meta or (self.pending and len(adapters) < len(self.tensor_names))
        wide = wide_dtype(self.weight.dtype)
        for name, tensor in self.tensors().items():
            if tensor.dtype != wide:  # the state dict's own tensor, with assign=True
                self._replace(name, tensor.detach().to(wide))
        self.watch()

    def _replace(self, name: str, value: Tensor) -> None:
        """Another tensor in the place of an adapter's, a parameter where that was one."""
        is_parameter = isinstance(getattr(self, name), nn.Parameter)
        setattr(self, name, nn.Parameter(value) if is_parameter else value)

    def _given(self, state_dict: dict[str, Any], prefix: str) -> set[str]:
        """What a state dict brings of the adapter. torch.distributed fills in what a checkpoint
        lacks with the layer's own tensors, or gives these with the first values written in."""

        def is_given(name: str, tensor: Tensor) -> bool:
            if tensor is not getattr(self, name):
                return True
            return self.pending and not (tensor.is_meta or whole(tensor).isnan().any())

        names = [name for name in self.tensor_names if f"{prefix}{name}" in state_dict]
        return {name for name in names if is_given(name, state_dict[f"{prefix}{name}"])}

    def _is_base(self, W: Tensor) -> bool:
        return torch.equal(whole(W).to(whole(self.weight)), whole(self.weight))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": (None, {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value; any other as it is."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_as(tensor: Tensor, value: Tensor) -> Tensor:
    """A full value, sharded if the tensor is."""
    if not hasattr(tensor, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, cast(Any, tensor).device_mesh, cast(Any, tensor).placements)
