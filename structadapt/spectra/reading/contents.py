"""What a path, a module or a state dict holds: whole weights, or the updates of an adapter."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from structadapt.adapter_file import AdapterFileError, SavedLayer, saved_layout
from structadapt.bounds import few
from structadapt.interop.peft_config import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from structadapt.layers import find_adapted
from structadapt.spectra.reading import live_model, peft_folder, pickle_file
from structadapt.spectra.reading.adapter_updates import Update
from structadapt.spectra.reading.matrix import (
    DTYPES,
    Skipped,
    SourceError,
    SourceNotFoundError,
    Stored,
    stored_tensor,
)
from structadapt.spectra.reading.names import unfit_name
from structadapt.spectra.reading.safetensors_file import Header, read_header
from structadapt.spectra.reading.shards import join_shards, read_index, refuse_missing
from structadapt.spectra.reading.whole_file import regular_file

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
RUN, OF_A_RUN = "adapter.safetensors", ("summary.json", "metrics.jsonl")
BASE_OF_A_RUN = "base.safetensors"
ORDER = (INDEX, WEIGHTS, WEIGHTS_FILE, PICKLE_FILE, BIN_INDEX, BIN)  # of the files of a folder
HASHED = 64 * 2**20  # bytes of a file whose sha256 costs nothing to speak of


@dataclass
class Content:
    """tensors: whole weights by key; of an adapter, modules that were trained beside it."""

    what: str
    tensors: dict[str, Stored] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    is_adapter: bool = False
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[tuple[str, int, str | None]] = field(default_factory=list)


def read_source(source: Source, adapted: bool = False) -> Content:
    """What a source holds, none of its values read.

    adapted: whether an adapted module counts with its adapted weights; else it has its updates.
    """
    if isinstance(source, nn.Module):
        return _of_module(source, adapted)
    if isinstance(source, Mapping):
        return _of_mapping(source)
    if not isinstance(source, str | os.PathLike):
        raise SourceError(
            f"a {type(source).__name__} is no source: give a path, a module or a state dict"
        )
    path = Path(source)
    if "\0" in str(path):
        raise SourceError(f"{str(path)!r} holds a NUL: no path")
    return _of_folder(path) if path.is_dir() else _of_file(path)


def weights_of(source: Source) -> Content:
    """A base: whole weights; of an adapted module the frozen ones. SourceError for an adapter."""
    if isinstance(source, nn.Module):
        return Content("model", live_model.weights(source, adapted=False))
    content = read_source(source)
    if content.is_adapter:
        raise SourceError(f"the base {source} is an adapter: give the weights it was trained over")
    return content


def base_of_run(source: Source) -> Path | None:
    """The base in a training run's folder, `structadapt grpo --out`, if the source is one."""
    if not isinstance(source, str | os.PathLike):
        return None
    run = Path(source)
    base = run / BASE_OF_A_RUN
    is_run = (run / RUN).is_file() and any((run / name).exists() for name in OF_A_RUN)
    return base if is_run and base.is_file() else None


def _of_module(model: nn.Module, adapted: bool) -> Content:
    updates, skipped, notes = live_model.updates(model)
    ours = find_adapted(model)
    if not (updates or skipped) or (adapted and len(ours) == len(updates) + len(skipped)):
        what = "adapted model, its adapted weights" if ours else "model"
        return Content(what, live_model.weights(model, adapted=True))
    content = Content("adapted model", {}, updates, True, skipped, notes)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    of_adapters = {id(t) for layer in ours.values() for t in layer.tensors().values()}
    for name, parameter in model.named_parameters():
        beside = id(parameter) in trained - of_adapters and ".lora_" not in name
        if beside and parameter.dim() > 1:
            content.tensors[name] = stored_tensor(name, parameter, live_model.SOURCE)
    return content


def _of_mapping(tensors: Mapping[str, Tensor]) -> Content:
    content = Content("state dict")
    for key, tensor in tensors.items():
        problem = unfit_name(key)
        if problem or not isinstance(tensor, Tensor):
            reason = problem or f"a {type(tensor).__name__}, no tensor"
            content.skipped.append(Skipped(f"{key!r:.60}", (), "none", "state dict", reason))
        else:
            content.tensors[key] = stored_tensor(key, tensor, "state dict")
    return content


# -- files -----------------------------------------------------------------------------------------


def _of_file(path: Path) -> Content:
    if not path.exists() and not path.is_symlink():
        hub = str(path).count("/") == 1 and not path.suffix
        hint = ": a model of the Hub is downloaded first, then its folder is given" if hub else ""
        raise SourceNotFoundError(f"{path} is not there{hint}")
    if path.name == CONFIG_FILE:
        return _of_folder(path.parent)
    if path.name.endswith(".index.json"):
        return _of_shards(path)
    if path.name in (WEIGHTS_FILE, PICKLE_FILE):
        return _of_peft(path)
    if path.suffix in PICKLES:
        tensors, notes = pickle_file.read_pickle(path)
        content = Content("file of torch.save", tensors, notes=notes)
    else:
        header = read_header(path)
        if "structadapt" in header.metadata:
            return _of_adapter(path, header)
        content = Content("safetensors file", dict(header.tensors))
    content = _fit_names(content)
    _refuse_stray_adapter(path, content.tensors)
    content.files.append(_described(path))
    return content


def _refuse_stray_adapter(path: Path, tensors: Mapping[str, Stored]) -> None:
    if peft_folder.is_peft(tensors):
        raise SourceError(
            f"{path} holds an adapter of PEFT under another name: give its folder, with "
            f"{WEIGHTS_FILE} and {CONFIG_FILE}, which has the scale"
        )


def _fit_names(content: Content) -> Content:
    """Move tensors whose names cannot be printed to what is skipped."""
    for key in [key for key in content.tensors if unfit_name(key)]:
        stored = content.tensors.pop(key)
        skipped = stored.skip(unfit_name(key))
        content.skipped.append(
            Skipped(f"{key!a:.200}", skipped.shape, skipped.dtype, skipped.source, skipped.reason)
        )
    return content


def _described(path: Path) -> tuple[str, int, str | None]:
    size = path.stat().st_size
    if size > HASHED:
        return str(path), size, None
    with open(path, "rb") as file:
        return str(path), size, hashlib.file_digest(file, "sha256").hexdigest()


def _of_folder(folder: Path) -> Content:
    """By the first name of ORDER that is there; a run's adapter; the only safetensors file."""
    names = sorted(os.listdir(folder))
    known = [name for name in ORDER if name in names]
    if known:
        path = folder / known[0]
        content = _of_file(path)
        also = [name for name in known[1:] if (name, known[0]) != (WEIGHTS, INDEX)]
        if also:
            content.notes.append(f"{folder} also holds {', '.join(also)}, which is not read")
        return content
    if RUN in names and {*OF_A_RUN} & {*names}:
        content = _of_file(folder / RUN)
        content.what = f"training run, {content.what}"
        return content
    if CONFIG_FILE in names:
        raise SourceNotFoundError(
            f"{folder} has {CONFIG_FILE} and neither {WEIGHTS_FILE} nor {PICKLE_FILE}"
        )
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return _of_file(folder / found[0])
    if found:
        raise SourceError(
            f"{folder} holds {len(found)} safetensors files and no {INDEX} that says which belong "
            f"together: {few(found, 8)}; give one of them"
        )
    holds = f"it holds {few(names, 8)}" if names else "it is empty"
    raise SourceNotFoundError(
        f"{folder} has no weights: no {', '.join(ORDER)} or other .safetensors file; {holds}"
    )


def _of_shards(index: Path) -> Content:
    pickled = ".bin" in index.name
    files = read_index(index, PICKLES if pickled else (".safetensors",))
    refuse_missing(index, files)
    content = Content(f"{len({*files.values()})} shards")
    shards: dict[str, dict[str, Stored]] = {}
    content.files.append(_described(index))
    for name in dict.fromkeys(files.values()):
        path = index.parent / name
        if pickled:
            shards[name], notes = pickle_file.read_pickle(path)
            content.notes += notes
        else:
            shards[name] = read_header(path).tensors
        content.files.append(_described(path))
    content.tensors = join_shards(index, files, shards)
    for name, tensors in shards.items():
        strays = [t for key, t in tensors.items() if files.get(key) != name]
        content.skipped += [t.skip(f"in its file, but not in {index.name}") for t in strays]
    return _fit_names(content)


# -- adapters --------------------------------------------------------------------------------------


def _of_peft(path: Path) -> Content:
    config = peft_folder.config_beside(path.parent)
    notes: list[str] = []
    if path.name == PICKLE_FILE:
        regular_file(path)
        tensors, notes = pickle_file.read_pickle(path)
    else:
        tensors = read_header(path).tensors
    held = _fit_names(Content("", dict(tensors)))
    parts = peft_folder.sorted_parts(held.tensors, str(path))
    updates, more = peft_folder.peft_updates(config, parts)
    files = [_described(path), _described(config.path)]
    skipped = [*held.skipped, *parts.skipped]
    return Content("PEFT adapter", parts.whole, updates, True, skipped, [*notes, *more], files)


def _of_adapter(path: Path, header: Header) -> Content:
    """A file of `structadapt.save`, checked by its header alone."""
    try:
        layers = saved_layout(path, header.metadata, header.tensors)
    except AdapterFileError as error:
        raise SourceError(str(error)) from None
    content = Content("adapter file", is_adapter=True, files=[_described(path)])
    left = dict(header.tensors)
    for name, layer in layers.items():
        own = {key: left.pop(f"{name}.{key}", None) for key in layer.tensors}
        problem = _misfit(layer, own)
        tensors = {key: stored for key, stored in own.items() if stored is not None}
        if "delta_bias" in tensors:
            content.skipped.append(tensors.pop("delta_bias").skip("1-D, no matrix"))
        if problem:
            content.skipped.append(Skipped(name, layer.shape, "none", str(path), problem))
            continue
        content.updates.append(
            Update(name, layer.adapter, layer.shape, tensors, fingerprint=layer.base)
        )
    if left:
        raise SourceError(f"{path} has tensors of no layer: {few(sorted(left))}")
    return content


def _misfit(layer: SavedLayer, own: Mapping[str, Stored | None]) -> str:
    """Why the tensors of a layer are not those that its description asks for, or nothing."""
    for key, like in layer.tensors.items():
        stored = own[key]
        if stored is None:
            return f"{key} is missing"
        if stored.shape != tuple(like.shape) or stored.dtype not in DTYPES:
            return (
                f"{key} is {stored.dtype} of shape {stored.shape}, expected floats of shape "
                f"{tuple(like.shape)}"
            )
    return ""
