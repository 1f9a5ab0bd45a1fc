"""Write the adapted model as an ordinary checkpoint, without adapters."""

import copy
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from structadapt.adapted import MERGED, Adapted
from structadapt.files import refuse_foreign, whole_folder
from structadapt.interop.state import finite_tensors, refuse_sharded
from structadapt.layers import adapted_layers, plain_name, unwrapped
from structadapt.merging import REFUSE_BELOW, WARN_BELOW, measure, rounded

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
REPLACEABLE = ("config.json", "generation_config.json", WEIGHTS, INDEX, "model-*-of-*.safetensors")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def export_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> dict[str, float]:
    """Write `model` with W' in the place of W as sharded safetensors; the model stays as it is.

    A transformers model is written by its own save_pretrained and loads with from_pretrained; any
    other as model.safetensors, or as shards and model.safetensors.index.json, under the keys of
    its state dict. An output head that is tied to an embedding of which one is adapted is written
    apart from it, and the saved config says so. W' is computed in at least fp32 and rounded once,
    to `dtype` or to the dtype of W. Merged weights are made shard by shard, those of a
    transformers model all at once, on the CPU.

    max_shard_size: of a file, in bytes or as "5GB".

    Returns the share of each layer's update that the rounding leaves,
    <round(W') - W, W' - W> / ||W' - W||^2, about 1 in fp32. Warns of layers that keep less than
    99 %; `force` exports also those that keep less than 50 %.

    Raises ValueError, and leaves no file, if the model is not adapted, is sharded or quantised, if
    W' is not finite or less than half of an update would be left, or if it cannot stand in a
    checkpoint of this kind (a `delta_bias` where there is no bias; a shared weight);
    FileExistsError if `folder` holds anything but such a checkpoint.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    limit = _bytes(max_shard_size)
    refuse_foreign(folder, _replaceable)
    model = unwrapped(model)
    merge = _Merge(model, dtype, force)
    with whole_folder(folder, _replaceable) as new, torch.no_grad():
        if _is_pretrained(model):
            _save_pretrained(model, merge, new, limit)
        else:
            _save_plain(merge, new, limit)
    merge.warn()
    return {name: merge.kept[name] for name in merge.layers}


def _replaceable(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in REPLACEABLE)


def _bytes(size: int | str) -> int:
    """5GB -> 5 * 10^9, as save_pretrained reads it."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", str(size).strip().upper())
    if isinstance(size, bool) or not match or not int(match[1]):
        raise ValueError(f"max_shard_size must be a number of bytes or like '5GB', got {size!r}")
    return int(match[1]) * UNITS[match[2]]


def _is_pretrained(model: nn.Module) -> bool:
    """Whether transformers saves this model; if it is not imported, it does not."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


# -- the merged tensors ----------------------------------------------------------------------------


class _Merge:
    """The tensors of the merged model, each made when it is asked for.

    state: the model's own, without the adapters' tensors; its keys are the checkpoint's.
    owners: of the weight and bias of each adapted layer, under every name it has.
    shared: keys of weights that are an adapted layer's too and stay as they are.
    kept: share of each layer's update that is left, filled as weights are made.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, force: bool) -> None:
        self.dtype, self.force = dtype, force
        self.layers = {plain_name(name): layer for name, layer in adapted_layers(model).items()}
        self.kept: dict[str, float] = {}
        refuse_sharded(self.layers)
        quantised = [name for name, layer in self.layers.items() if layer.is_quantised]
        if quantised or getattr(model, "hf_quantizer", None) is not None:
            where = quantised[0] if quantised else "the base model"
            raise ValueError(
                f"{where} is quantised: load the adapter (check_base=False) into the model that it "
                "was made from, and export that"
            )
        for name, layer in self.layers.items():
            _refuse_unmergeable(name, layer)
        self.owners: dict[str, tuple[str, str]] = {}  # key: (layer, tensor)
        adapters = set()
        first_names = {layer: name for name, layer in self.layers.items()}
        for alias, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, Adapted):
                adapters |= {_key(plain_name(alias), k) for k in (*module.tensor_names, MERGED)}
                for kind in ("weight", "bias"):
                    self.owners[_key(plain_name(alias), kind)] = (first_names[module], kind)
        state = {plain_name(key): tensor for key, tensor in model.state_dict().items()}
        self.state = {key: t for key, t in state.items() if key not in adapters}
        for key, tensor in self.state.items():
            if not isinstance(tensor, Tensor) or hasattr(tensor, "device_mesh") or tensor.is_meta:
                raise ValueError(
                    f"{key} is sharded, on the meta device or no tensor: load it whole"
                )
        self.shared = _shared(model, self.layers)

    def names(self) -> list[str]:
        return [*self.state]

    def dtype_of(self, key: str) -> torch.dtype:
        found = self.state[key].dtype
        return self.dtype if self.dtype is not None and found.is_floating_point else found

    def size(self, key: str) -> int:
        """In bytes."""
        return self.state[key].numel() * self.dtype_of(key).itemsize

    def __getitem__(self, key: str) -> Tensor:
        """One tensor of the merged model, in its dtype; the model's own where nothing changes."""
        tensor, dtype = self.state[key], self.dtype_of(key)
        if key not in self.owners:
            return self._cast(key, tensor)
        name, kind = self.owners[key]
        if kind == "bias":
            delta_bias = self.layers[name].tensors().get("delta_bias")
            if delta_bias is not None:
                tensor = tensor.to(delta_bias.dtype) + delta_bias
            return self._cast(key, tensor)
        merged, exact = rounded(self.layers[name], dtype, measured=True)
        assert exact is not None
        if not torch.isfinite(merged).all():
            raise ValueError(f"{name}: the merged weight is not finite in {dtype}: not exported")
        kept = self.kept[name] = measure(name, self.layers[name], *exact, merged).survives
        if kept < REFUSE_BELOW and not self.force:
            raise ValueError(
                f"{name}: rounding to {dtype} leaves {kept:.0%} of its update; nothing was "
                "exported: pass dtype=torch.float32, or force=True, or serve the adapter beside "
                "the base model"
            )
        return merged

    def _cast(self, key: str, tensor: Tensor) -> Tensor:
        cast = tensor.to(self.dtype_of(key))
        if cast.dtype != tensor.dtype and not torch.isfinite(cast).all():
            raise ValueError(f"{key} is not finite in {cast.dtype}: not exported")
        return cast

    def warn(self) -> None:
        """One warning for all layers that lose much of their update to the rounding."""
        lost = {n: k for n, k in self.kept.items() if k < WARN_BELOW}
        if lost:
            worst = min(lost, key=lambda name: lost[name])
            dtype = self.dtype_of(_key(worst, "weight"))
            warnings.warn(
                f"rounding to {dtype} loses more than 1 % of the update of {len(lost)} of "
                f"{len(self.kept)} layers ({worst} keeps {lost[worst]:.1%}): export with "
                "dtype=torch.float32, or serve the adapter beside the base model",
                stacklevel=3,
            )


def _key(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def _refuse_unmergeable(name: str, layer: Adapted) -> None:
    """ValueError for tensors that are not finite or need a bias that is not there."""
    delta_bias = finite_tensors(name, layer).get("delta_bias")
    if delta_bias is not None and getattr(layer, "bias", None) is None and delta_bias.any():
        raise ValueError(
            f"{name} has a delta_bias and no bias to add it to: the merged model would need "
            "another architecture; use export_peft, which writes it as lora_bias"
        )


def _shared(model: nn.Module, layers: dict[str, Adapted]) -> list[str]:
    """Names under which an adapted layer's weight also serves a module that keeps it as it is."""
    owner_of = {id(layer.weight): layer for layer in layers.values()}
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owner = owner_of.get(id(parameter))
            if owner is not None and owner is not module:
                names.append(_key(plain_name(name), key))
    return names


# -- writing them ----------------------------------------------------------------------------------


def _save_plain(merge: _Merge, folder: Path, limit: int) -> None:
    """Shards of at most `limit` bytes, one in memory at a time; a larger tensor is its own."""
    if merge.shared:
        raise ValueError(
            f"{merge.shared[0]} is the weight of an adapted layer too, and would lose its tie: a "
            "plain module has no config to say so; give the layer a weight of its own first"
        )
    shards: list[list[str]] = [[]]
    filled = 0
    for key in merge.names():
        if filled + merge.size(key) > limit and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += merge.size(key)
    weight_map = {}
    for i, keys in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        weight_map |= dict.fromkeys(keys, file)
        # A tie between layers that are not adapted is written out: safetensors knows none.
        tensors = {key: merge[key].cpu().contiguous().clone() for key in keys}
        safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        total = sum(map(merge.size, merge.names()))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save_pretrained(model: Any, merge: _Merge, folder: Path, limit: int) -> None:
    """transformers' own format: config, generation config, shards, key conversions."""
    apart = bool(merge.shared)
    if apart and getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{merge.shared[0]} is the weight of an adapted layer too, and in an encoder-decoder "
            "model untying the embeddings also changes how logits are scaled: untie them first"
        )
    merged: dict[str, Tensor] = {}
    same: dict[object, Tensor] = {}  # what is tied in the model, once
    for key in merge.names():
        t = merge.state[key]
        tie = merge.owners.get(key) or (t.data_ptr(), t.shape, t.stride(), t.dtype)
        if tie not in same:
            tensor = merge[key]
            same[tie] = tensor if tensor.data_ptr() == t.data_ptr() else tensor.cpu()
            merged[key] = same[tie]
        else:
            merged[key] = same[tie].clone() if apart else same[tie]
    parameters = sum(t.numel() for t in {id(t): t for t in merged.values()}.values())
    same.clear()  # save_pretrained frees each shard when it is written
    with _config_of_its_own(model, untie=apart):
        model.save_pretrained(folder, state_dict=merged, max_shard_size=limit)
    if merge.dtype is not None:
        _edit_json(folder / "config.json", lambda config: _set_dtype(config, merge.dtype))
    if (folder / INDEX).exists():
        _edit_json(folder / INDEX, lambda i: i["metadata"].update(total_parameters=parameters))


@contextmanager
def _config_of_its_own(model: Any, untie: bool) -> Iterator[None]:
    """save_pretrained writes into the config: into a copy of it, within this context."""
    config = model.config
    model.config = copy.deepcopy(config)
    try:
        if untie:
            for part in (model.config, model.config.get_text_config()):
                part.tie_word_embeddings = False
        yield
    finally:
        model.config = config


def _set_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """In the config and those of its parts."""
    if "dtype" in config:
        config["dtype"] = str(dtype).removeprefix("torch.")
    for part in config.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype)


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    _write_json(path, content)


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")
