"""A folder of PEFT as a source: LoRA, rsLoRA and DoRA, read without a model.

The tensors are those of structadapt/interop/peft_import.py, and what the configuration means is
asked of peft_config.py. To look at an adapter asks for less than to load it: what only changes
training is a note here, not an error. The rank is that of the tensors; where the configuration has
another one, a note says so.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from structadapt.adapter_file import AdapterFileError
from structadapt.adapters import DoRA, LoRA
from structadapt.bounds import few
from structadapt.interop.peft_config import (
    CONFIG_FILE,
    FAITHFUL_INITS,
    REFUSED,
    PeftConfig,
    parse_config,
)
from structadapt.spectra.reading.adapter_updates import Update
from structadapt.spectra.reading.matrix import (
    DTYPES,
    Skipped,
    SourceError,
    SourceNotFoundError,
    Stored,
    kernel,
)
from structadapt.spectra.reading.names import module_path

KNOWN = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
PART = re.compile(
    rf"(?P<layer>.+)\.(?P<part>{'|'.join(KNOWN)})"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
VARIANT = re.compile(r"(?P<layer>.+)\.(?P<part>lora_\w+)(?:\..+)?")  # AdaLoRA, KaSA, ...


@dataclass
class PeftParts:
    """What the tensors of a folder belong to."""

    layers: dict[str, dict[str, Stored]] = field(default_factory=dict)  # {layer: {part: tensor}}
    bases: dict[str, Stored] = field(default_factory=dict)  # weights kept beside an adapter
    whole: dict[str, Stored] = field(default_factory=dict)  # modules trained whole
    skipped: list[Skipped] = field(default_factory=list)


def is_peft(names: Iterable[str]) -> bool:
    return any(PART.fullmatch(name) for name in names)


def config_beside(path: Path) -> PeftConfig:
    """The configuration of a folder. SourceNotFoundError without one, SourceError if broken."""
    try:
        return parse_config(path)
    except FileNotFoundError:
        raise SourceNotFoundError(
            f"{path / CONFIG_FILE} is not there: without it the scale alpha / r of the adapter is "
            "not known"
        ) from None
    except AdapterFileError as error:
        raise SourceError(str(error)) from None


def sorted_parts(tensors: Mapping[str, Stored], source: str) -> PeftParts:
    """The tensors of a PEFT folder by what they belong to. SourceError for several adapters."""
    parts = PeftParts()
    adapters: dict[str, str] = {}
    for key, stored in tensors.items():
        match = PART.fullmatch(key)
        if match is None and (other := VARIANT.fullmatch(key)):
            parts.layers.setdefault(module_path(other["layer"]), {})[other["part"]] = stored
            continue
        if match is None:
            _beside(parts, key, stored)
            continue
        if match["adapter"]:
            adapters.setdefault(match["adapter"], key)
        if match["kind"] == "bias":
            parts.skipped.append(stored.skip("1-D, the bias of the factor B"))
            continue
        parts.layers.setdefault(module_path(match["layer"]), {})[match["part"]] = stored
    if len(adapters) > 1:
        raise SourceError(
            f"{source} holds several adapters, {', '.join(adapters)}: save them apart"
        )
    return parts


def _beside(parts: PeftParts, key: str, stored: Stored) -> None:
    name = module_path(key)
    if len(stored.shape) < 2 or stored.dtype not in DTYPES:
        reason = "1-D" if stored.dtype in DTYPES else f"{stored.dtype}, no floats"
        parts.skipped.append(stored.skip(stored.problem or reason))
    elif key.endswith(".base_layer.weight"):
        parts.bases[name] = stored
    else:
        parts.whole[name] = stored


def peft_updates(config: PeftConfig, parts: PeftParts) -> tuple[list[Update], list[str]]:
    """The updates of all layers, and notes. What does not fit is added to `parts.skipped`."""
    found, other_ranks = [], []
    for name, own in parts.layers.items():
        try:
            refuse_variants(own)
            update = _update(config, name, own, parts.bases.get(name))
        except ValueError as error:  # SourceError, and AdapterFileError of the configuration
            some = next(iter(own.values()))
            parts.skipped.append(replace(some, name=name).skip(str(error)))
            continue
        assert isinstance(update.adapter, LoRA)
        if update.adapter.rank != config.adapter(name).rank:
            other_ranks.append(f"{name} ({update.adapter.rank})")
        found.append(update)
    notes = _notes(config)
    if other_ranks:
        notes.append(
            f"{config.path}: the tensors have other ranks than the configuration says, and theirs "
            f"are used: {few(other_ranks)}"
        )
    if not config["use_dora"] and any(
        "lora_magnitude_vector" in own for own in parts.layers.values()
    ):
        notes.append(f"{config.path}: use_dora is not set, so the magnitudes are left out, as PEFT")
    return found, notes


def refuse_variants(parts: Iterable[str]) -> None:
    """SourceError for a layer whose parts say that its update is not B A alone."""
    if others := {*parts}.difference(KNOWN):
        raise SourceError(
            f"{min(others)} is of a variant of LoRA, or of another method: not known here"
        )


def _update(config: PeftConfig, name: str, own: dict[str, Stored], base: Stored | None) -> Update:
    embedding = "lora_embedding_A" in own or "lora_embedding_B" in own
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for key in keys:
        if key not in own:
            raise SourceError(f"{key} is missing")
    for bare in config["target_parameters"] or []:
        module = bare.rpartition(".")[0]
        if name == module or name.endswith(f".{module}"):
            raise SourceError("adapts a bare parameter of several matrices (target_parameters)")
    A, B = (_factor(own[key]) for key in keys)
    rank = A.shape[0]
    if B.shape[1] != rank or not rank:
        raise SourceError(f"{keys[0]} is {A.shape} and {keys[1]} {B.shape}: their ranks differ")
    tensors, kind = {"A": A, "B": B}, config.adapter(name)
    if isinstance(kind, DoRA):
        m = own.get("lora_magnitude_vector")
        if m is None:
            raise SourceError("lora_magnitude_vector is missing, and use_dora is set")
        if sum(n != 1 for n in m.shape) > 1 or max(m.shape, default=0) != B.shape[0]:
            raise SourceError(f"lora_magnitude_vector is {m.shape}, expected ({B.shape[0]},)")
        tensors["m"] = replace(m, shape=(B.shape[0],))
    turned = embedding or bool(config["fan_in_fan_out"])
    shape = (B.shape[0], A.shape[1])
    adapter = replace(kind, rank=rank)
    return Update(name, adapter, shape, tensors, base, stored_transposed=turned)


def _factor(stored: Stored) -> Stored:
    """A factor as a matrix. SourceError for what is none."""
    if stored.problem or stored.dtype not in DTYPES:
        raise SourceError(f"{stored.name}: {stored.problem or f'{stored.dtype}, no floats'}")
    if len(stored.shape) < 2 or 0 in stored.shape:
        raise SourceError(f"{stored.name} has the shape {stored.shape}: no factor")
    return kernel(stored) if len(stored.shape) > 2 else stored


def _notes(config: PeftConfig) -> list[str]:
    """What the configuration says that a reader of the figures has to know."""
    notes = []
    init = str(config["init_lora_weights"]).lower()
    if init not in FAITHFUL_INITS:
        notes.append(
            f"{config.path}: init_lora_weights is {config['init_lora_weights']!r}: B A is the "
            "difference from a base that training changed when it began, not from the published one"
        )
    quiet = ("modules_to_save", "target_parameters")
    for key, reason in REFUSED.items():
        if config[key] and key not in quiet:
            notes.append(f"{config.path}: {key} is set: {reason}")
    if config.unknown:
        notes.append(f"{config.path}: unknown settings were ignored: {', '.join(config.unknown)}")
    return notes
