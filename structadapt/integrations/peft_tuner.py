"""The adapters as a PEFT method: importing this module registers "structadapt" with PEFT.

    from structadapt.integrations.peft_tuner import StructAdaptConfig
    config = StructAdaptConfig(adapter=sa.DoRA(rank=16), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)

The model is adapted as by `structadapt.adapt`: the layers stay the objects they were, nothing is
wrapped. `disable_adapter` gives the base model and `unmerge_adapter` the base weights bit for bit;
`save_pretrained` and `PeftModel.from_pretrained` work wherever this module is imported.

Adapter tensors are named `structadapt_A`, `structadapt_B`, ... in such a model, because code that
reads a merged PeftModel leaves out the names that contain the method's prefix.

One adapter a model. TRL copies the adapter of a PeftModel for its reference when beta > 0: give it
the bare model and `peft_config=` instead, and the reference is the base model. Not supported:
modules_to_save, and `peft.utils.get_base_model_state_dict`, which takes every tensor of an adapted
layer for the adapter's.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from structadapt.adapter_file import AdapterFileError
from structadapt.adapters.base import Adapter
from structadapt.bounds import few
from structadapt.checkpoint import fingerprint, has_base
from structadapt.integrations.peft_layers import (
    PREFIX,
    TunerLayer,
    check_name,
    make_tuner_layer,
    restore,
)
from structadapt.layers import adaptable_layers, find_adapted
from structadapt.merging import merge, unmerge
from structadapt.surgery import adapt

METHOD = "structadapt"
WRAPPER = "base_model.model."  # what PeftModel puts in front of the base model's names


def _peft_type() -> PeftType:
    """Our member of PEFT's enumeration, which has no room for others: added as its body would."""
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType(name)


# -- configuration ---------------------------------------------------------------------------------


@dataclasses.dataclass
class StructAdaptConfig(PeftConfig):
    """Which adapter goes where; what PEFT writes to adapter_config.json.

    Raises ValueError for an unknown adapter, options it refuses, or modules_to_save; TypeError for
    targets that are not text, since they are written to JSON.
    """

    adapter: Adapter | str = "LoRA"  # sa.DoRA(rank=16); kept as its name and options
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments for it
    target_modules: str | list[str] = "all-linear"  # as `target` of structadapt.adapt
    exclude_modules: str | list[str] = dataclasses.field(default_factory=list)
    seed: int = 0
    modules_to_save: list[str] | None = None  # known to PEFT, refused here
    # of the frozen weight of each layer, written when a model is adapted; compared if given
    base_fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        if isinstance(self.adapter, Adapter):
            self.adapter, self.options = type(self.adapter).__name__, self.adapter.config()
        if self.modules_to_save:
            raise ValueError(
                f"modules_to_save={self.modules_to_save!r}: structadapt trains adapters alone and "
                "freezes the rest; give these layers an adapter, or train them without it"
            )
        self.target_modules = _texts(self.target_modules, "target_modules")
        self.exclude_modules = _texts(self.exclude_modules, "exclude_modules")
        self.build()

    def build(self) -> Adapter:
        """The adapter. Raises ValueError for an unknown one and for options it refuses."""
        kind = str(self.adapter)
        if kind not in Adapter.registry:
            known = ", ".join(Adapter.registry)
            raise ValueError(f"adapter must be one of {known}, got {self.adapter!r}")
        # JSON has lists for the tuples of a configuration
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}
        try:
            return Adapter.registry[kind](**options)
        except TypeError as error:
            raise ValueError(f"options of {kind}: {error}") from None


def _texts(patterns: str | Iterable[str], role: str) -> str | list[str]:
    if isinstance(patterns, str):
        return patterns
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{role} must be text or several texts, got {patterns!r}: a callable cannot be written "
            "to adapter_config.json"
        )
    return sorted(patterns) if isinstance(patterns, set | frozenset) else list(patterns)


def _refuse_other_base(model: nn.Module, fingerprints: dict[str, str]) -> None:
    """AdapterFileError for a model whose weights are not those that adapters were saved over."""
    for name, layer in adaptable_layers(model).items():
        if not has_base(layer, fingerprints.get(name)):
            raise AdapterFileError(
                f"{name} has another base weight than the one that this adapter was saved over: "
                "load the right base, or pass a config with base_fingerprints={}"
            )


# -- the tuner -------------------------------------------------------------------------------------


class StructAdaptModel(BaseTuner):
    """What PEFT calls a tuner: the base model is at `.model`, adapted as by `structadapt.adapt`."""

    prefix = PREFIX
    tuner_layer_cls = TunerLayer  # type: ignore[assignment]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError, before PEFT writes its configuration into it, for an adapted model."""
        adapted = find_adapted(model)
        if adapted:
            name = next(iter(adapted))
            raise ValueError(
                f"{name} is adapted already: give PEFT the bare model, or unload first"
            )
        super().__init__(model, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adapt `model`. The dtype arguments change nothing: adapters are at least fp32.

        Raises what `structadapt.adapt` raises, and ValueError for a second adapter; the model is
        left as it was then.
        """
        others = [name for name in self.peft_config if name != adapter_name]
        if others:
            raise ValueError(
                f"cannot add the adapter {adapter_name!r}: structadapt has one adapter a model and "
                f"{others[0]!r} is here. For a reference policy (TRL with beta > 0) give the "
                "trainer the bare model and peft_config=...: its reference is then the base model"
            )
        config = cast(StructAdaptConfig, self.peft_config[adapter_name])
        _refuse_other_base(model, config.base_fingerprints)
        before = {name: (type(m), {*m.__dict__}) for name, m in model.named_modules()}
        targets, excluded = config.target_modules, config.exclude_modules
        adapt(model, config.build(), targets, excluded, seed=config.seed)
        layers = find_adapted(model)
        for name, layer in layers.items():
            own_class, attributes = before[name]
            make_tuner_layer(layer, own_class, {*layer.__dict__} - attributes, adapter_name)
        # A copy: the caller's configuration may be for another model too.
        found = {name: fingerprint(m.matrix()) for name, m in layers.items() if not m.pending}
        config = dataclasses.replace(config, base_fingerprints=found or config.base_fingerprints)
        self.peft_config[adapter_name] = config
        self.targeted_module_names = list(layers)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("structadapt adapts a model as a whole: see inject_adapter")

    # -- merging --

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put W' in the place of W, however much of the update its dtype keeps: W is kept aside.

        Always checked for finite values (`safe_merge`). Raises what `structadapt.merge` raises.
        """
        self._check_names(adapter_names)
        if self._is_merged():
            warnings.warn("the adapter is merged already: nothing to do", stacklevel=2)
            return
        merge(self.model, force=True)  # a weight sync must not stop for what rounding takes

    def unmerge_adapter(self) -> None:
        """Bring W back bit for bit."""
        if not self._is_merged():
            warnings.warn("the adapter is not merged: nothing to do", stacklevel=2)
            return
        unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with W' for its weights and no adapter.

        Raises what `structadapt.merge` raises, also for a dtype that would lose most of the
        update; a model merged before by `merge_adapter` keeps those weights without asking.
        """
        self._check_names(adapter_names)
        if not self._is_merged():
            merge(self.model)
        return self._remove()

    def unload(self) -> nn.Module:
        """The base model with its own weights, bit for bit, and no adapter."""
        if self._is_merged():
            unmerge(self.model)
        return self._remove()

    def _remove(self) -> nn.Module:
        for layer in find_adapted(self.model).values():
            restore(layer)
        del self.model.peft_config
        return self.model

    def _is_merged(self) -> bool:
        return any(layer.base_weight is not None for layer in find_adapted(self.model).values())

    # -- adapters by name --

    def _check_names(self, adapter_names: str | Sequence[str] | None) -> None:
        check_name(adapter_names, next(iter(self.peft_config)))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let the one adapter train, or not in inference mode. ValueError for another name."""
        self._check_names(adapter_name)
        for layer in find_adapted(self.model).values():
            cast(TunerLayer, layer).set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Raises NotImplementedError: there is one adapter, and `unload` takes it off."""
        raise NotImplementedError("structadapt has one adapter a model: call unload()")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: there is one adapter."""
        raise NotImplementedError("structadapt has one adapter a model: there is none to combine")

    # -- state dict: tensors keep their names, with or without an adapter name --

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {k: v for k, v in state_dict.items() if k.rpartition(".")[2].startswith(PREFIX)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors under the names of `model`. Raises AdapterFileError (a ValueError) if one is
        missing, unknown or not finite, where PEFT itself would say little."""
        wanted = {
            f"{name}.{key}".removeprefix(WRAPPER): f"{name}.{key}"
            for name, layer in find_adapted(model).items()
            for key in layer.tensor_names
        }
        given = {key.removeprefix(WRAPPER): tensor for key, tensor in state_dict.items()}
        differences = [f"{name} is missing" for name in wanted if name not in given]
        differences += [f"the model has no {name}" for name in given if name not in wanted]
        differences += [
            f"{n} is not finite" for n, t in given.items() if not torch.isfinite(t).all()
        ]
        if differences:
            shown = few(differences, between="; ")
            raise AdapterFileError(f"these adapters do not fit this model: {shown}")
        return {wanted[name]: tensor for name, tensor in given.items()}


if _peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=METHOD, config_cls=StructAdaptConfig, model_cls=StructAdaptModel)
