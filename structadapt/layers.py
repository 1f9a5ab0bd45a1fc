"""The modules that carry an adapter, and where a model has them.

An adapter knows one thing, a matrix W (out, in). Each kind of layer here says how its stored weight
is that matrix:

    nn.Linear            W = weight
    transformers' Conv1D W = weight^T
    nn.Embedding         W = weight^T: out is the embedding's width, in the vocabulary, x one-hot
    nn.Conv1d, nn.Conv2d W = weight.flatten(1): in is (in channels / groups) x kernel
    a quantised linear   W = dequantize(layer)
"""

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from structadapt.adapted import Adapted, Parameters
from structadapt.quantised import Dequantize, dequantize, is_quantised

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # parts of a name


class AdaptedLinear(Adapted, nn.Linear):
    """A frozen nn.Linear with an adapter: `weight` (out, in) and `bias` (out,) under their names,
    and the adapter's tensors, in fp32 or wider, beside them. `adapt` turns a layer into one."""

    plain = nn.Linear

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)


class AdaptedEmbedding(Adapted, nn.Embedding):
    """A frozen nn.Embedding with an adapter."""

    plain = nn.Embedding
    bias = None

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(input, weight, self.padding_idx)

    def run_adapted(self, input: Tensor, bias: Tensor | None, p: Parameters) -> Tensor:
        y = self.run(input, self.weight, None)
        return self.adapter.lookup(y, input, self.as_matrix(self.weight), p, self.padding_idx)

    def check_dtype(self, input: Tensor) -> None:
        """ids are no floats."""


class _Conv(Adapted):
    """A convolution with the adapted kernel: it is small beside what it is applied to."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(matrix.shape[0], *self.weight.shape[1:])

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Any, self)._conv_forward(input, weight, bias)

    def run_adapted(self, input: Tensor, bias: Tensor | None, p: Parameters) -> Tensor:
        kernel = self.as_stored(self.adapter.weight(self.as_matrix(self.weight), p))
        return self.run(input, kernel, bias)


class AdaptedConv1d(_Conv, nn.Conv1d):
    """A frozen nn.Conv1d with an adapter."""

    plain = nn.Conv1d


class AdaptedConv2d(_Conv, nn.Conv2d):
    """A frozen nn.Conv2d with an adapter."""

    plain = nn.Conv2d


class _TransposedLinear(Adapted):
    """transformers' Conv1D: a linear layer with weight (in, out)."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight.T, bias)


class _Quantised(Adapted):
    """A linear layer with a quantised weight: it runs by itself, and the adapter goes on top."""

    dequantize: Dequantize
    is_quantised = True

    def as_matrix(self, weight: Tensor) -> Tensor:
        return self.dequantize(self).detach()

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Any, self.plain).forward(self, input)

    def run_adapted(self, input: Tensor, bias: Tensor | None, p: Parameters) -> Tensor:
        y = self.adapter.onto(self.run(input, self.weight, None), input, self.matrix, self.bias, p)
        return y + p["delta_bias"].to(y.dtype) if "delta_bias" in p else y

    def check_dtype(self, input: Tensor) -> None:
        """Quantised layers cast their input."""

    def _is_base(self, W: Tensor) -> bool:
        both = (getattr(t, "dequantize", lambda t=t: t)() for t in (W, self.weight))
        return torch.equal(*(t.detach().float() for t in both))


KINDS: dict[type[nn.Module], type[Adapted]] = {
    cast(type[nn.Module], kind.plain): kind
    for kind in (AdaptedLinear, AdaptedEmbedding, AdaptedConv1d, AdaptedConv2d)
}


@functools.cache
def adapted_class(plain: type[nn.Module], quantised: bool = False) -> type[Adapted] | None:
    """The adapted form of a class of layers, or None.

    A subclass with its own forward has none, unless it is a quantised one: it may never call the
    adapter.
    """
    own: dict[str, Any] = {"plain": plain, "__reduce_ex__": _reduce}
    if quantised:
        return type(f"AdaptedQuantised{plain.__name__}", (_Quantised, plain), own)
    if plain in KINDS:
        return KINDS[plain]
    if (plain.__module__, plain.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return type("AdaptedConv1D", (_TransposedLinear, plain), own)
    return None


def kind_of(layer: nn.Module, hook: Dequantize | None = None) -> type[Adapted] | None:
    """The adapted form of one layer, or None. With a hook that dequantises, that of any subclass of
    nn.Linear."""
    if isinstance(layer, Adapted):
        return type(layer)
    foreign = isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    quantised = is_quantised(layer) or (hook is not None and foreign)
    return adapted_class(type(layer), quantised)


def _reduce(layer: Adapted, protocol: Any) -> Any:
    """How a layer is pickled whose class was made here and has no name to be found by."""
    quantised = isinstance(layer, _Quantised)
    if type(layer) is not adapted_class(layer.plain, quantised):
        return nn.Module.__reduce_ex__(layer, protocol)
    return _blank, (layer.plain, quantised), layer.__getstate__()


def _blank(plain: type[nn.Module], quantised: bool) -> Adapted:
    kind = adapted_class(plain, quantised)
    assert kind is not None
    return kind.__new__(kind)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer that can carry an adapter is a linear one."""
    return not isinstance(layer, nn.Embedding | nn.Conv1d | nn.Conv2d)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of the matrix of a layer that carries or can carry an adapter."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return weight.shape[0], weight.shape[1:].numel()
    return weight.shape[1], weight.shape[0]


def matrix_of(layer: nn.Module, hook: Dequantize | None = None) -> Tensor:
    """W (out, in) of a layer that carries or can carry an adapter, without a gradient."""
    if isinstance(layer, Adapted):
        return layer.matrix()
    kind = kind_of(layer, hook)
    assert kind is not None
    if issubclass(kind, _Quantised):
        return (hook or dequantize)(layer).detach()
    return kind.as_matrix(cast(Any, layer), cast(Tensor, layer.weight).detach())


def adaptable_layers(model: nn.Module, hook: Dequantize | None = None) -> dict[str, nn.Module]:
    """The layers that can carry an adapter, by name, adapted or not."""
    return {name: m for name, m in model.named_modules() if kind_of(m, hook)}


def find_adapted(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by name, if there are any."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel, torch.compile and PeftModel, in any order."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = cast(Any, model).get_base_model()
        else:
            return model


def plain_name(name: str) -> str:
    """The name that a module or tensor had before a part of the model was wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by name. Raises ValueError if there are none."""
    layers = find_adapted(model)
    if not layers:
        raise ValueError("this model has no adapted layer: call structadapt.adapt or load first")
    return layers
