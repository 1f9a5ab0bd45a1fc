"""Checkpoints in several files, safetensors or of torch.save, and the index that names them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structadapt.bounds import LARGEST_JSON, few, parse_json
from structadapt.spectra.reading.matrix import SourceError, SourceNotFoundError, Stored
from structadapt.spectra.reading.whole_file import refuse_pointer, regular_file


def read_index(path: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """{tensor: file} of model.safetensors.index.json and the like.

    The names of the files come from whoever made the checkpoint. They must be plain names, which
    is told from the text alone: what a name links to does not matter, for the cache of Hugging
    Face links to ../../blobs.
    """
    if regular_file(path).st_size > LARGEST_JSON:
        raise SourceError(f"{path} is larger than 32 MiB: no index")
    text = path.read_bytes()
    refuse_pointer(path, text)
    try:
        index = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{path} is no JSON: {error}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise SourceError(f"{path} has no weight_map that names tensors and their files")
    for tensor, file in files.items():
        problem = _unsafe(file, suffixes)
        if problem:
            raise SourceError(f"{path}: the file of {tensor!r} is {file!r:.100}, {problem}")
    return files


def _unsafe(file: Any, suffixes: tuple[str, ...]) -> str:
    """Why a name from an index is not opened, or nothing."""
    if not isinstance(file, str):
        return "no text"
    if "\0" in file or not file.isprintable():
        return "a name with control characters: not opened"
    if "/" in file or "\\" in file or ":" in file or file in ("", ".", ".."):
        return "no plain name of a file in this folder: not opened"
    if not file.endswith(suffixes):
        return f"no {' or '.join(suffixes)}: not opened"
    return ""


def join_shards(
    index: Path, files: Mapping[str, str], shards: Mapping[str, Mapping[str, Stored]]
) -> dict[str, Stored]:
    """The tensors that an index names, in its order. SourceError for one that is not where the
    index says."""
    lost = [f"{tensor} (in {file})" for tensor, file in files.items() if tensor not in shards[file]]
    if lost:
        raise SourceError(
            f"{index} names tensors that their files do not have: {few(lost)}: the index and the "
            "files are not of the same checkpoint"
        )
    return {tensor: shards[file][tensor] for tensor, file in files.items()}


def refuse_missing(index: Path, files: Mapping[str, str]) -> None:
    """SourceNotFoundError that names every file of an index that is not there."""
    names = sorted({*files.values()})
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise SourceNotFoundError(
            f"{index} names {len(names)} files, {len(missing)} of which are not there: "
            f"{', '.join(missing)}: download them"
        )
