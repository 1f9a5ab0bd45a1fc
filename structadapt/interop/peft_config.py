"""What adapter_config.json says, and what of it this library can take.

Facts of the format as PEFT 0.21 writes and reads it; the file is JSON, so PEFT is not needed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from structadapt.adapter_file import AdapterFileError
from structadapt.adapters import DoRA, LoRA
from structadapt.bounds import read_json
from structadapt.interop.expressions import match

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MOST_PATTERNS = 4096
PREFIX = "base_model.model."  # of every tensor's name

# Keys that the import reads, and keys whose value cannot change what the adapter computes.
KNOWN = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("bias", "lora_bias", "lora_dropout", "init_lora_weights", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "ensure_weight_tying"),
}
# Inits that leave the base weight as it was, so that the folder fits the published model.
FAITHFUL_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
REFUSED = {
    "modules_to_save": "whole modules are trained beside the adapters",
    "trainable_token_indices": "rows of the embedding are trained beside the adapters",
    "layer_replication": "the model's layers are repeated before they are adapted",
    "target_parameters": "bare parameters are adapted, which belong to no adaptable layer",
    "alora_invocation_tokens": "the adapter (aLoRA) acts on some tokens only",
    "use_qalora": "the adapter (QALoRA) pools its inputs",
    "use_bdlora": "the factors (BD-LoRA) are block-diagonal",
    "arrow_config": "the adapters (Arrow) are routed by token",
    "velora_config": "the backward pass (VeLoRA) is an approximation",
    "kasa_config": "the base weight (KaSA) is truncated",
    "monteclora_config": "the factors (MonteCLoRA) are sampled",
}
ADVICE = "merge it with PEFT (merge_and_unload) and use the merged model as the base"


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json."""

    path: Path
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def unknown(self) -> list[str]:
        """Settings that this version does not know."""
        known = KNOWN | REFUSED.keys()
        return sorted(key for key, value in self.values.items() if value and key not in known)

    def notes(self) -> str:
        """What is read and not done, or nothing."""
        notes = []
        if self["lora_dropout"]:
            notes.append(
                f"lora_dropout={self['lora_dropout']} is not applied: branch dropout is not part "
                "of structadapt (outputs in eval mode are the same)"
            )
        if self["ensure_weight_tying"]:
            notes.append(
                "ensure_weight_tying: adapters of tied layers are trained apart from now on"
            )
        if self.unknown:
            notes.append(f"unknown settings were ignored: {', '.join(self.unknown)}")
        return "; ".join(notes)

    def adapter(self, name: str) -> LoRA:
        """The adapter of the layer `name`."""
        kind = DoRA if self["use_dora"] else LoRA
        rank = self._pattern("rank_pattern", name, self.values.get("r", 8))
        alpha = self._pattern("alpha_pattern", name, self.values.get("lora_alpha", 8))
        scaling = "alpha/sqrt(r)" if self["use_rslora"] else "alpha/r"
        try:
            return kind(rank, alpha, scaling)
        except (ValueError, OverflowError) as error:
            raise AdapterFileError(f"{self.path}: {name}: {error}") from None

    def targets(self, names: Iterable[str]) -> list[str] | None:
        """Those of `names` that target_modules selects; None if that cannot be told."""
        target = self["target_modules"]
        if target in (None, "all-linear") or self["ensure_weight_tying"]:  # which adds layers
            return None
        excluded = self["exclude_modules"] or []
        return [
            name
            for name in names
            if self._selects(target, name)
            and not self._selects(excluded, name)
            and (isinstance(target, str) or self._transforms(name))
        ]

    def _transforms(self, name: str) -> bool:
        """Whether layers_to_transform has the number of the layer's block: what follows the last
        name of layers_pattern that occurs, or without one the last number in the path."""
        wanted, patterns = self["layers_to_transform"], self["layers_pattern"] or r"[^.]*"
        if wanted in (None, []):
            return True
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._regex(rf".*\.{pattern}\.(\d+)\.", name)
            if found:
                return int(found[1]) in (wanted if isinstance(wanted, list) else [wanted])
        return False

    def _selects(self, target: str | list[str], name: str) -> bool:
        """A list names whole paths or what follows a dot; a text is a regular expression."""
        if isinstance(target, str):
            return bool(self._regex(target, name, whole=True))
        return any(name == t or name.endswith(f".{t}") for t in target)

    def _pattern(self, key: str, name: str, default: Any) -> Any:
        """The value of the first expression that matches the end of a layer's path."""
        for pattern, value in (self[key] or {}).items():
            if self._regex(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    def _regex(self, pattern: str, name: str, whole: bool = False) -> re.Match[str] | None:
        try:
            return match(pattern, name, whole)
        except ValueError as error:
            raise AdapterFileError(f"{self.path}: {error}") from None


def read_config(folder: Path) -> PeftConfig:
    """Read and check adapter_config.json.

    Raises FileNotFoundError, and AdapterFileError for a file that is damaged or asks for something
    that is not a plain LoRA, rsLoRA or DoRA of the published base model.
    """
    config = parse_config(folder)
    for key, reason in REFUSED.items():
        if config[key]:
            raise AdapterFileError(f"{config.path}: {key} is set: {reason}; {ADVICE}")
    _refuse_changed_base(config)
    _refuse_unknown_methods(config)
    return config


def parse_config(folder: Path) -> PeftConfig:
    """adapter_config.json of some LoRA, whatever else it asks for. Errors as for `read_config`."""
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
    except ValueError as error:
        raise AdapterFileError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} holds a {type(values).__name__}, expected an object")
    config = PeftConfig(path, values)
    if config["peft_type"] != "LORA":
        raise AdapterFileError(
            f"{path}: peft_type {config['peft_type']!r}, this library reads 'LORA' (LoRA, rsLoRA, "
            f"DoRA): {ADVICE}"
        )
    _refuse_types(config)
    return config


def _refuse_types(config: PeftConfig) -> None:
    """AdapterFileError for a value of a kind that PEFT would not write."""
    for key, kinds in {
        "rank_pattern": dict,
        "alpha_pattern": dict,
        "target_modules": (str, list),
        "target_parameters": (str, list),
        "exclude_modules": (str, list),
        "layers_pattern": (str, list),
        "layers_to_transform": (int, list),
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), bool),
    }.items():
        value = config[key]
        kind = int if key == "layers_to_transform" else str
        texts = all(isinstance(item, kind) for item in value) if isinstance(value, list) else True
        if value is not None and not (isinstance(value, kinds) and texts):
            raise AdapterFileError(f"{config.path}: {key} is {value!r}")
        if isinstance(value, dict) and len(value) > MOST_PATTERNS:  # each is tried for each layer
            raise AdapterFileError(f"{config.path}: {key} has {len(value)} patterns")
    if config["bias"] not in (None, "none", "all", "lora_only"):
        raise AdapterFileError(
            f"{config.path}: bias is {config['bias']!r}, expected 'none', 'all' or 'lora_only'"
        )


def _refuse_changed_base(config: PeftConfig) -> None:
    """AdapterFileError for an init that subtracts from the base weight when training begins."""
    init = str(config["init_lora_weights"]).lower()
    if init not in FAITHFUL_INITS:
        raise AdapterFileError(
            f"{config.path}: init_lora_weights is {config['init_lora_weights']!r}: training began "
            "by changing the base weights, so the adapter does not fit the published model; "
            "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
            f"or {ADVICE}"
        )


def _refuse_unknown_methods(config: PeftConfig) -> None:
    """AdapterFileError for a setting of a newer PEFT that looks like another method."""
    for key in config.unknown:
        if key.startswith("use_") or key.endswith("_config"):
            raise AdapterFileError(
                f"{config.path}: {key} is set, which this version does not know: {ADVICE}"
            )


def unlike_peft(layer: nn.Module) -> str:
    """Why PEFT's branch beside a layer and an update of its weight differ, or nothing."""
    for key, usual in {"groups": 1, "dilation": 1, "padding_mode": "zeros"}.items():
        value = getattr(layer, key, usual)
        if value not in (usual, (usual,), (usual, usual)):
            return f"has {key}={value!r}, where PEFT's branch is no update of the weight"
    if getattr(layer, "max_norm", None) is not None or getattr(layer, "scale_grad_by_freq", False):
        return "has max_norm or scale_grad_by_freq, with which it cannot be adapted"
    return ""
