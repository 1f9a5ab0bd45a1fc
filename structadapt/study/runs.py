"""One cell of a study: a run in a folder of its own, which goes on where it was stopped.

cell.json        what decides the result, and the names of the grid
metrics.jsonl    one record a step
monitor.jsonl    the spectra of the update while it trained
spectra/         those of the update at the end (`spectra.Report.load`)
adapter.safetensors    what was trained; model.safetensors of full fine-tuning
states/          of a run that is not finished
.lock, .held     of the process that works on it
summary.json     written last: the cell is done
error.json       in its place: what ended a run that failed
"""

import fcntl
import json
import math
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import structadapt as sa
from structadapt.examples.process import peak_memory_mib
from structadapt.files import write_atomically
from structadapt.study import distributed, sft, tasks
from structadapt.study.cell import Cell, config

CELL, STEPS, MONITOR = "cell.json", "metrics.jsonl", "monitor.jsonl"
SUMMARY, ERROR, STATES, SPECTRA = "summary.json", "error.json", "states", "spectra"
LOCK, HELD = ".lock", ".held"
FALL = 10.0  # accuracy at the start over that at the end, from which a run has collapsed

Records = list[dict[str, Any]]


class StoppedError(Exception):
    """The run was asked to stop, and goes on from its last state the next time."""


def nothing(record: dict[str, Any], total: int) -> None:
    """What is told of a step by default."""


def run(
    cell: Cell,
    folder: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[dict[str, Any], int], None] = nothing,
    save: bool = True,
) -> dict[str, Any]:
    """Run a cell to its end and return what summary.json holds; of one that is done, that.

    stop: looked at after every step. tell: gets every step's record and the number of steps.
    save: also what was trained.

    What the run raises is written to error.json and raised again. Raises StoppedError if `stop`
    says so; ValueError for a folder that holds another cell.
    """
    first = distributed.rank() == 0
    if first:
        note(cell, folder)
    if (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    try:
        summary = _run(cell, folder, stop, tell, save)
    except (StoppedError, KeyboardInterrupt):
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        write(folder / ERROR, {"error": told, "traceback": traceback.format_exc()})
        raise
    if first:
        write(folder / SUMMARY, summary)
        (folder / ERROR).unlink(missing_ok=True)
        shutil.rmtree(folder / STATES, ignore_errors=True)
    return summary


def note(cell: Cell, folder: Path) -> None:
    """Make the folder of a cell and write down what it is. ValueError for one that holds another
    cell."""
    folder.mkdir(parents=True, exist_ok=True)
    here = json.loads(strict(cell.describe()))
    if (folder / CELL).exists():
        stored = json.loads((folder / CELL).read_text())["parts"]
        for name in here:
            if stored.get(name) != here[name]:
                raise ValueError(
                    f"{folder} holds another cell: its {name} is {stored.get(name)!r}, here "
                    f"{here[name]!r}"
                )
    write(folder / CELL, {"id": cell.id, **asdict(cell), "rate": cell.rate, "scale": cell.scale,
                          "parts": here})  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    """A file of strict JSON."""
    write_atomically(path, f"{strict(content, indent=1)}\n".encode())


def strict(content: Any, indent: int | None = None) -> str:
    """JSON in which what is not finite is null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=indent)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process holds the cell's folder now; while it does, no other one can. The
    process's death lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        for attempt in range(5):  # somebody may only be looking
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02 * attempt)
        else:
            yield False
            return
        yield True


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Note in a claimed folder that its run goes on, until it ends by itself: how many processes
    have died meanwhile without a step in between."""
    note, log = folder / HELD, folder / STEPS
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    before = json.loads(note.read_text()) if note.exists() else {"deaths": -1, "lines": -1}
    deaths = before["deaths"] + 1 if before["lines"] in (lines, -1) else 0
    write(note, {"deaths": deaths, "lines": lines})
    try:
        yield deaths
    finally:
        note.unlink(missing_ok=True)


# -- the run ---------------------------------------------------------------------------------------


def _run(cell: Cell, folder: Path, stop: Any, tell: Any, save: bool) -> dict[str, Any]:
    began = time.perf_counter()
    task = tasks.task_of(cell)
    base = tasks.load(cell, folder.parents[1] / "bases")
    model, adapter = base.model, cell.build_adapter()
    frozen = None if adapter else distributed.whole_state(model)
    before = _before(cell, base, task, folder)
    if adapter is not None:
        sa.adapt(model, adapter, cell.target, seed=cell.seed)
    elif cell.processes > 1:
        distributed.shard(model)
    if cell.checkpointing:
        _checkpoint(model)
    trained = list(sa.adapter_parameters(model) if adapter else model.parameters())
    monitor = None
    if cell.monitor:
        monitor = sa.spectra.Monitor(model, cell.monitor, snapshots=adapter is None)
    records, failure = _train(cell, folder, base, task, trained, monitor, stop, tell)
    after = None if failure else tasks.accuracy(base, task, cell, _merged(model, cell))
    whole = distributed.whole_state(model) if adapter is None else None
    if distributed.rank() == 0:
        if not failure:
            sa.spectra.analyze(whole or model, frozen).save(folder / SPECTRA)
        if save:
            _save(model, whole, folder)
    absorbed = next((r["step"] for r in records if _is_absorbed(r)), None)
    return {
        "id": cell.id,
        "parameters": sum(p.numel() for p in trained),
        "cold_start": base.cold_start,
        "before": before,
        "after": after,
        "collapsed": _collapsed(before, after, absorbed),
        "absorbed_at": absorbed,
        "failure": failure,
        "steps": len(records),
        "first_kl": records[0].get("kl") if records else None,
        "monitor": _states(monitor),
        "seconds": time.perf_counter() - began,
        "peak_memory_mib": peak_memory_mib(),
        "versions": {n: version(n) for n in ("structadapt", "torch")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _collapsed(before: Any, after: Any, absorbed: int | None) -> bool:
    """Not finite, below a tenth of the first accuracy, or below it and without a gradient."""
    if after is None or after["sampled"] < before["sampled"] / FALL:
        return True
    return absorbed is not None and after["sampled"] < before["sampled"]


def _before(cell: Cell, base: tasks.Base, task: tasks.Task, folder: Path) -> dict[str, Any]:
    """The accuracy of the base model, worked out once for all cells that share it."""
    names = ("model", "task", "data", "min_difficulty", "cold_start", "problems", "samples", "seed",
             "dtype", "new_tokens", "grpo")  # fmt: skip
    key = {name: getattr(cell, name) for name in names}
    path = folder.parents[1] / "bases" / f"before-{tasks.digest(key)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if cell.processes > 1:  # they make every forward together
        return tasks.accuracy(base, task, cell, nullcontext)
    with tasks.locked(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            found = tasks.accuracy(base, task, cell, nullcontext)
            write(path, {"of": key, "accuracy": found})
    return json.loads(path.read_text())["accuracy"]


def _train(
    cell: Cell, folder: Path, base: tasks.Base, task: tasks.Task, trained: Any, monitor: Any,
    stop: Callable[[], bool], tell: Callable[[dict[str, Any], int], None],
) -> tuple[Records, str | None]:  # fmt: skip
    """Every step's record, and what ended the run before its time if it diverged."""
    how = config(cell, base.eos, base.pad, task.new_tokens)
    total = math.ceil(len(task.prompts) / cell.batch)
    optimizer = torch.optim.AdamW(trained, lr=cell.rate, weight_decay=cell.weight_decay)
    updates = total * (cell.minibatches if cell.method == "grpo" else 1) * how.epochs
    end = 1.0 if cell.schedule == "constant" else 0.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, updates)
    if cell.method == "sft":
        pairs = sft.pairs_of(task, base)
        found = sft.train(
            base.model, optimizer, schedule, pairs, cell.batch,
            lambda: tasks.sampled(base, task, cell, 200), monitor,
        )  # fmt: skip
    else:
        states = sa.grpo.Checkpoints(folder / STATES, every=cell.checkpoint_every)
        states.reopen()  # summary.json says what is finished
        found = map(asdict, sa.grpo.train(
            base.model, optimizer, task.prompts, task.reward, how, tokenizer=base.tokenizer,
            rollout_context=_merged(base.model, cell), scheduler=schedule,
            observers=[monitor] if monitor else [], checkpoints=states,
            guard=sa.grpo.Guard(patience=cell.stop_absorbed or 8),
        ))  # fmt: skip
    records: Records = []
    path, first = folder / STEPS, distributed.rank() == 0
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    try:
        for record in found:
            if not records:  # of a run that goes on, its last saved step comes first
                records = [r for r in earlier if r["step"] < record["step"]]
                if first:
                    write_atomically(path, "".join(f"{strict(r)}\n" for r in records).encode())
            records.append(record)
            if first:
                with open(path, "a") as file:
                    file.write(f"{strict(record)}\n")
            tell(record, total)
            if _is_absorbed(record) and cell.stop_absorbed:
                break
            if len(records) < total and distributed.agreed(stop()):
                raise StoppedError(f"{cell.id} after step {record['step'] + 1} of {total}")
    except FloatingPointError as error:  # not finite: a gradient, or the logits
        return records, str(error)
    finally:
        if monitor is not None:
            monitor.to_jsonl(folder / MONITOR)
    return records, None


def _is_absorbed(record: dict[str, Any]) -> bool:
    return any(alarm.startswith("absorbing") for alarm in record.get("alarms", ()))


def _merged(model: torch.nn.Module, cell: Cell) -> Callable[[], AbstractContextManager[None]]:
    """Rollouts from merged weights, which only fp32 holds without loss."""
    if cell.adapter == "full" or cell.dtype != "float32":
        return nullcontext
    return lambda: sa.merged_if_exact(model)


def _checkpoint(model: Any) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError("checkpointing = true needs a model of transformers")
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _save(model: torch.nn.Module, whole: dict[str, torch.Tensor] | None, folder: Path) -> None:
    if whole is not None:
        write_atomically(folder / "model.safetensors", safetensors.torch.save(whole))
    else:
        sa.save(model, folder / "adapter.safetensors")


def _states(monitor: sa.spectra.Monitor | None) -> dict[str, Any] | None:
    """The last state of the monitor with its evidence, and the first step of each that there
    was."""
    if monitor is None or not monitor.history:
        return None
    first: dict[str, int] = {}
    for reading in monitor.history:
        first.setdefault(reading.state, reading.step)
    last = monitor.history[-1]
    return {"state": last.state, "evidence": last.evidence, "first": first}
