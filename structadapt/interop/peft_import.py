"""Read a folder that PEFT wrote: LoRA, rsLoRA and DoRA.

adapter_config.json          what was trained; see peft_config.py
adapter_model.safetensors    base_model.model.<layer>.<part>, part one of
    lora_A.weight            (r, in)      conv: (r, in, k...)
    lora_B.weight            (out, r)     conv: (out, r, 1...)
    lora_B.bias              (out,)       lora_bias; multiplied by the scale, as B is
    lora_embedding_A, _B     (r, vocabulary), (dim, r)
    lora_magnitude_vector    (out,)       DoRA; conv: (1, out, 1...)
    base_layer.bias          (out,)       bias="lora_only" or "all": the trained bias
    base_layer.weight        the base weight again, beside an adapted embedding or head
"""

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from structadapt.adapter_file import FLOATS, AdapterFileError, SavedLayer, read_tensors
from structadapt.adapters import DoRA
from structadapt.bounds import few
from structadapt.checkpoint import fill, refuse_misfit
from structadapt.interop.peft_config import (
    ADVICE,
    PICKLE_FILE,
    PREFIX,
    WEIGHTS_FILE,
    PeftConfig,
    read_config,
    unlike_peft,
)
from structadapt.layers import adaptable_layers, matrix_shape
from structadapt.ops import wide_dtype
from structadapt.refusals import refuse_wrong_order
from structadapt.targets import near

MAGNITUDE = "lora_magnitude_vector"  # PEFT also wrote it with ".weight" behind
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
# Longer names first: "base_layer.bias" also ends with "bias".
PARTS = (
    *FACTORS,
    *("lora_B.bias", f"{MAGNITUDE}.weight", MAGNITUDE),
    *("base_layer.weight", "base_layer.bias", "weight", "bias"),
)


def load_peft(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put the adapters of a PEFT folder into `model`, in place; returns the model.

    As `structadapt.load` does: a bare model is adapted and its other parameters are frozen; a
    model that is adapted already must have the same adapters on the same layers; everything is
    checked before anything changes. The outputs are PEFT's in eval mode. A trained bias becomes a
    `delta_bias` beside the adapter; bias="all" is taken where the biases of other layers, and of
    norms, have not moved. Warns once, of dropout and of settings it does not know.

    Raises FileNotFoundError; AdapterFileError (a ValueError) for a folder that is damaged, for
    another model, or needs what an adapter here cannot do, naming it; RuntimeError for a model
    that is compiled, sharded, merged or on the meta device.
    """
    refuse_wrong_order(model)
    folder = Path(folder)
    config = read_config(folder)
    parts = _by_layer(folder, _read_weights(folder))
    layers = adaptable_layers(model)
    adapted = [name for name, own in parts.items() if own.keys() & {*FACTORS}]
    _raise(folder, _other_layers(config, model, layers, adapted))
    for name in adapted:
        if layers[name].get_parameter("weight").is_meta:
            raise RuntimeError(f"{name} is on the meta device: load the base weights first")
    saved = {name: _saved_layer(config, name, layers[name], parts[name]) for name in adapted}
    _raise(folder, _left_over(config, model, parts))
    refuse_misfit(model, saved, folder)
    if config.notes():
        warnings.warn(f"{config.path}: {config.notes()}", stacklevel=2)
    fill(model, saved)
    return model


def _raise(folder: Path, problems: list[str]) -> None:
    """Raise what keeps the folder from this model, if anything does."""
    if problems:
        raise AdapterFileError(f"{folder}: {few(problems, between='; ')}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / PICKLE_FILE).exists():
        raise AdapterFileError(
            f"{folder} has its weights in {PICKLE_FILE}, a pickle, which can run code when it is "
            "read: load it with PEFT and save_pretrained it again as safetensors"
        )
    return read_tensors(path)


def _by_layer(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{layer: {part: tensor}}, sorted."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        part = next((part for part in PARTS if key.endswith(f".{part}")), None)
        if part is None or not key.startswith(PREFIX):
            raise AdapterFileError(
                f"{folder}: unexpected tensor {key}: expected {PREFIX}<layer>.<part>, "
                f"part one of {', '.join(PARTS)}"
            )
        tensor = tensors[key]
        if tensor.dtype not in FLOATS:
            raise AdapterFileError(f"{folder}: {key} is {tensor.dtype}")
        name = key[len(PREFIX) : -len(part) - 1]
        parts.setdefault(name, {})[part.replace(f"{MAGNITUDE}.weight", MAGNITUDE)] = tensor
    return parts


# -- layers ----------------------------------------------------------------------------------------


def _other_layers(
    config: PeftConfig, model: nn.Module, layers: dict[str, nn.Module], adapted: list[str]
) -> list[str]:
    """Layers of the folder that the model lacks, or that target_modules does not mean."""
    if not adapted:
        return ["it holds no adapter"]
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for name in adapted:
        if name in layers:
            problem = unlike_peft(layers[name])
            problems += [f"{name} {problem}"] if problem else []
        elif name in modules:
            problems.append(f"{name} is a {type(modules[name]).__name__}: it cannot be adapted")
        else:
            hint = near(name, layers) if len(problems) < 3 else ""  # the others are only counted
            problems.append(f"the model has no layer {name:.200}{hint}")
    expected = config.targets(layers)
    if expected is None or problems:
        return problems
    return [
        *(
            f"{n} has tensors, and target_modules leaves it out"
            for n in adapted
            if n not in expected
        ),
        *(f"target_modules names {n}, which has no tensors" for n in expected if n not in adapted),
    ]


def _saved_layer(
    config: PeftConfig, name: str, layer: nn.Module, parts: dict[str, Tensor]
) -> SavedLayer:
    """One layer of the folder, checked. What is used is taken out of `parts`."""
    adapter = config.adapter(name)
    out_features, in_features = matrix_shape(layer)
    weight = layer.get_parameter("weight")
    kernel = weight.shape[2:]  # () unless the layer is a convolution
    ones = (1,) * len(kernel)
    inner = tuple(weight.shape[1:]) if kernel else (in_features,)
    rank = adapter.rank
    a, b = FACTORS[2:] if isinstance(layer, nn.Embedding) else FACTORS[:2]
    take = _Taker(f"{config.path.parent}: {name}", parts)
    tensors = {
        "A": take(a, (rank, *inner), f"rank {rank}").reshape(rank, in_features),
        "B": take(b, (out_features, rank, *ones), f"rank {rank}").reshape(out_features, rank),
    }
    if isinstance(adapter, DoRA):
        shape = (1, out_features, *ones) if kernel else (out_features,)
        tensors["m"] = take(MAGNITUDE, shape, "use_dora").reshape(out_features)
    elif MAGNITUDE in parts:
        raise AdapterFileError(
            f"{config.path.parent}: {name} has a {MAGNITUDE} of DoRA, but use_dora is not set: "
            "PEFT would drop it; correct the configuration"
        )
    delta_bias = _delta_bias(config, layer, parts, take, adapter.scale)
    if delta_bias is not None:
        tensors["delta_bias"] = delta_bias
    return SavedLayer(adapter, (out_features, in_features), tensors)


def _delta_bias(
    config: PeftConfig, layer: nn.Module, parts: dict[str, Tensor], take: "_Taker", scale: float
) -> Tensor | None:
    """What the folder adds to the bias of a layer: (out,), or None where it trains none."""
    shape = (matrix_shape(layer)[0],)
    delta = None
    if config["lora_bias"]:
        delta = scale * take("lora_B.bias", shape, "lora_bias").double()
    bias = getattr(layer, "bias", None)
    if config["bias"] in ("lora_only", "all") and bias is not None:
        part = "bias" if "bias" in parts else "base_layer.bias"
        trained = take(part, shape, f"bias={config['bias']!r}").to(bias.device).double()
        delta = (0 if delta is None else delta.to(bias.device)) + trained - bias.detach().double()
    if delta is None:
        return None
    return delta.to(wide_dtype(layer.get_parameter("weight").dtype))


class _Taker:
    """Takes tensors out of one layer's parts, each there and of the right shape."""

    def __init__(self, label: str, parts: dict[str, Tensor]) -> None:
        self.label, self.parts = label, parts

    def __call__(self, part: str, shape: tuple[int, ...], reason: str) -> Tensor:
        tensor = self.parts.pop(part, None)
        if tensor is None:
            raise AdapterFileError(f"{self.label}.{part} is missing, expected for {reason}")
        if tensor.shape != shape:
            raise AdapterFileError(
                f"{self.label}.{part} has the shape {tuple(tensor.shape)}, "
                f"expected {shape} for {reason}"
            )
        if not torch.isfinite(tensor.float()).all():
            raise AdapterFileError(f"{self.label}.{part} is not finite in fp32")
        return tensor.clone()  # the file is mapped into memory


def _left_over(
    config: PeftConfig, model: nn.Module, parts: dict[str, dict[str, Tensor]]
) -> list[str]:
    """Tensors that belong to no adapter: harmless where they repeat the model's own."""
    own = dict(model.named_parameters(remove_duplicate=False))
    problems = []
    for name, left in parts.items():
        for part, tensor in left.items():
            kind = part.removeprefix("base_layer.")
            base = own.get(f"{name}.{kind}")
            if base is None or (kind == "bias" and config["bias"] in (None, "none")):
                problems.append(f"unexpected tensor {PREFIX}{name}.{part}")
            elif tensor.shape != base.shape:
                shapes = f"{tuple(tensor.shape)}, the model's {tuple(base.shape)}"
                problems.append(f"{name}.{kind} has the shape {shapes}: was it resized? {ADVICE}")
            elif not torch.equal(tensor.to(base.device, base.dtype), base):
                problems.append(
                    f"{name}.{kind} is trained beside the adapters, or of another base model: "
                    f"it differs from the model's; {ADVICE}"
                )
    return problems
