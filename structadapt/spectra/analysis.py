"""Spectra of whatever a source holds: one row a matrix, a few at a time, the rest of the run safe
from what one of them throws."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from structadapt.spectra.places import places_of
from structadapt.spectra.progress import Progress, flops
from structadapt.spectra.reading import (
    Matrix,
    Opened,
    Patterns,
    Source,
    base_of_run,
    open_source,
)
from structadapt.spectra.report import Report
from structadapt.spectra.rows import Found, Settings, look


def analyze(
    source: Source,
    base: Source | None = None,
    *,
    method: str = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
    device: str = "auto",
    workers: int | None = None,
    allow_missing: bool = False,
    strict: bool = False,
    relations: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Spectral measures of the weights or the updates in a source, one row a matrix.

    source: a model, adapted or not; a state dict; the path of a safetensors, .pt or .bin file, of
        a folder with shards, a PEFT adapter or a training run. An adapter gives its updates,
        anything else its weights, and with `base` the differences to it.
    base: the weights that the source started from, in any of these forms; that of a training run
        is the base.safetensors in its folder unless another is given. The row of an update then
        says how large it is beside its weight and how it lies to it, and the whole update of an
        adapter that depends on W (DoRA) has a row.
    method: "auto" (factors where there are any, else "gram"), "gram" or "svd" in float64.
    include, exclude: regular expressions, searched for in the module path.
    device: "auto" (CUDA where there is one), or a device of torch with float64.
    workers: matrices at a time; by default one on a device, else one for each two cores, at most
        four. Each holds one matrix, and its Gram matrix in float64.
    allow_missing: go on where the base lacks a matrix.
    strict: raise for the first matrix that cannot be analysed; otherwise its row is "skipped",
        with the reason, and the others go on.
    relations: with a base, also how the update lies to W: NSS drift, principal angles,
        off-principal energy and intruders. They need singular vectors of W and W', several times
        the work of singular values where matrices are large.
    progress: called as (matrices done, all, share of the work done, name) from any thread.

    Raises FileNotFoundError; ValueError for a source or base that is damaged, not understood, or
    lacks matrices, and for settings that do not exist.
    """
    began = time.perf_counter()
    settings = Settings(method, _device(device), strict, relations)
    base = base_of_run(source) if base is None else base
    opened = open_source(
        source, base, allow_missing=allow_missing, include=include, exclude=exclude
    )
    found = _all(opened.matrices, settings, _workers(workers, settings.device), progress)
    about = {
        "source": label(source),
        "base": None if base is None else label(base),
        "what": opened.what,
        "method": method,
        "device": str(settings.device),
        "structadapt": version("structadapt"),
        "torch": torch.__version__,
        "files": [
            dict(zip(("path", "bytes", "sha256"), file, strict=True)) for file in opened.files
        ],
        "seconds": time.perf_counter() - began,
    }
    skipped = [asdict(entry) for entry in opened.skipped]
    rows = [item.row for item in found]
    return Report(rows, skipped, _notes(opened, found), _spectra(found), about)


def label(source: Source) -> str:
    """A source in a word: its path, or what it is."""
    if isinstance(source, nn.Module):
        return f"model {type(source).__name__}"
    return "state dict" if isinstance(source, Mapping) else os.fspath(source)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise ValueError("device 'meta' holds no values: take cpu or cuda")
        torch.empty(0, dtype=torch.float64, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used in float64: {reason}") from None
    return chosen


def _workers(workers: int | None, device: torch.device) -> int:
    if workers is None:
        return 1 if device.type != "cpu" else max(1, min(4, torch.get_num_threads() // 2))
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return workers


def _all(
    matrices: list[Matrix], settings: Settings, workers: int, progress: Progress | None
) -> list[Found]:
    """What was found of every matrix, in their order."""
    place = places_of(matrix.name for matrix in matrices)
    jobs = [list(group) for _, group in itertools.groupby(matrices, lambda matrix: matrix.name)]
    told = _told(jobs, progress)

    def one(job: list[Matrix]) -> list[Found]:
        found = look(job, place[job[0].name], settings)
        told(job)
        return found

    if workers == 1:
        return [found for job in jobs for found in one(job)]
    pool = ThreadPoolExecutor(workers)
    try:
        return [found for done in pool.map(one, jobs) for found in done]
    finally:
        pool.shutdown(cancel_futures=True)


def _told(jobs: list[list[Matrix]], progress: Progress | None) -> Callable[[list[Matrix]], None]:
    """Called after a job: adds up the work that is done and hands it to `progress`."""
    if progress is None:
        return lambda job: None
    work = {id(job): sum(map(_work, job)) for job in jobs}
    lock, total, done = threading.Lock(), sum(work.values()) or 1.0, [0, 0.0]

    def told(job: list[Matrix]) -> None:
        with lock:
            done[0], done[1] = done[0] + 1, done[1] + work[id(job)]
            progress(int(done[0]), len(jobs), done[1] / total, job[0].name)

    return told


def _work(matrix: Matrix) -> float:
    """Operations for a row; those of the base and of W' too."""
    others = [m.shape for m in (matrix.base, matrix.tuned) if m is not None]
    own = flops(matrix.shape) if matrix.factors is None else flops(matrix.shape) / 100
    return own + sum(map(flops, others))


def _spectra(found: list[Found]) -> dict[str, np.ndarray]:
    spectra = {}
    for item in found:
        if item.s is not None:
            name = item.row["name"]
            if name in spectra:  # the direction came before the whole update
                spectra[f"{name} (direction)"] = spectra.pop(name)
            spectra[name] = item.s.numpy()
    return spectra


def _notes(opened: Opened, found: list[Found]) -> list[str]:
    """What the source says, and where rounding decides the ranks."""
    rows = [item.row for item in found if item.row["rank_above_noise"] is not None]
    drowned = [
        r
        for r in rows
        if r["frobenius_norm"] and r["rank_above_noise"] < (r["numerical_rank"] or 0)
    ]
    notes = list(opened.notes)
    if drowned:
        notes.append(
            f"{len(drowned)} of {len(rows)} updates are differences of rounded weights, and have "
            "more rank than stands above the rounding: read rank_above_noise and "
            "effective_rank_cut, not the raw ranks (of two that are both below float32, both count "
            "as rounded)"
        )
    for kind in dict.fromkeys(item.row["kind"] for item in found):
        ways = {item.row["precision"] for item in found if item.row["kind"] == kind}
        if len(ways) > 1:
            notes.append(
                f"the values of {kind} came about in {len(ways)} ways ({'; '.join(sorted(ways))}): "
                "compare ranks within one of them"
            )
    return notes
