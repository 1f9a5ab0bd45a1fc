"""What PEFT asks of a layer with an adapter, mixed into the class of ours."""

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from structadapt.adapted import Adapted
from structadapt.layers import adapted_class

# Code that reads a merged PeftModel leaves out the names that contain the method's prefix.
PREFIX = "structadapt_"


class TunerLayer:
    """Mixed into the class of an adapted layer: what PEFT asks of one.

    Registered with PEFT's own base class, not derived from it: that one has `weight` and `bias` as
    properties that look for a wrapped layer.
    """

    peft_name: str  # of the one adapter
    own_class: type[nn.Module]  # before `adapt`
    added: set[str]  # attributes that `adapt` and the bridge gave the layer
    tensor_names: tuple[str, ...]

    adapter_layer_names: tuple[str, ...] = ()  # containers by adapter name: there are none
    other_param_names: tuple[str, ...] = ()
    quantization_backend = None

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by the adapter's own names."""
        return {name.removeprefix(PREFIX): getattr(self, name) for name in self.tensor_names}

    @property
    def merged(self) -> bool:
        return cast(Adapted, self).base_weight is not None

    @property
    def merged_adapters(self) -> list[str]:
        return [self.peft_name] if self.merged else []

    @property
    def disable_adapters(self) -> bool:
        return not cast(Adapted, self).enabled

    @property
    def active_adapter(self) -> str:
        return self.peft_name

    @property
    def active_adapters(self) -> list[str]:
        return [self.peft_name]

    def _get_available_adapters(self) -> set[str]:
        return {self.peft_name}

    def enable_adapters(self, enabled: bool) -> None:
        cast(Adapted, self).enabled = enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.set_requires_grad(adapter_names, not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        check_name(adapter_names, self.peft_name)
        for parameter in cast(Adapted, self).trained_tensors():
            parameter.requires_grad_(requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None:
        for tensor in self.tensors().values():
            tensor.data = tensor.data.to(cast(Adapted, self).weight.device)


BaseTunerLayer.register(TunerLayer)


@cache
def tuner_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of an adapted layer with TunerLayer mixed in."""
    own = {"__module__": cls.__module__, "__reduce_ex__": _reduce}
    return type(f"Peft{cls.__name__}", (TunerLayer, cls), own)


def _reduce(layer: Adapted, protocol: Any) -> Any:
    """How a layer is pickled whose class was made here and has no name to be found by."""
    return _blank, (layer.plain, layer.is_quantised), layer.__getstate__()


def _blank(plain: type[nn.Module], quantised: bool) -> nn.Module:
    adapted = adapted_class(plain, quantised)
    assert adapted is not None
    kind = tuner_class(adapted)
    return kind.__new__(kind)


def make_tuner_layer(
    layer: nn.Module, own_class: type[nn.Module], added: set[str], peft_name: str
) -> None:
    """Turn an adapted layer into one that PEFT knows. `own_class` is its class before `adapt`,
    `added` are the attributes that `adapt` gave it."""
    names = cast(Adapted, layer).tensor_names
    for name in names:
        home: dict[str, Any] = layer._parameters if name in layer._parameters else layer._buffers
        home[f"{PREFIX}{name}"] = home.pop(name)
    layer.__class__ = tuner_class(type(layer))
    tuner = cast(TunerLayer, layer)
    tuner.tensor_names = tuple(f"{PREFIX}{name}" for name in names)
    tuner.peft_name, tuner.own_class = peft_name, own_class
    tuner.added = added | {"peft_name", "own_class", "added"}


def restore(layer: nn.Module) -> None:
    """Make the layer again what it was before `adapt`; its weight stays as it is now."""
    tuner = cast(TunerLayer, layer)
    own_class = tuner.own_class
    for name in tuner.tensor_names:
        delattr(layer, name)
    for name in tuner.added:
        del layer.__dict__[name]
    layer.__class__ = own_class


def check_name(given: str | Sequence[str] | None, known: str) -> None:
    names = [known] if given is None else [given] if isinstance(given, str) else list(given)
    if names != [known]:
        raise ValueError(f"adapter {given!r}: this model has one adapter, {known!r}")
