"""One cell of a study: a run in a folder of its own, which goes on where it was stopped."""

import math
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import structadapt as sa
from structadapt.examples import monitoring
from structadapt.examples.process import StepLog, peak_memory_mib, read_json
from structadapt.files import locked, write_atomically
from structadapt.grpo import processes
from structadapt.study import distributed, folders, sft, tasks
from structadapt.study.cell import Cell, config, digest
from structadapt.study.distributed import StoppedError

FALL = 10.0  # accuracy at the start over that at the end, from which a run has collapsed

Records = list[dict[str, Any]]
Stop = Callable[[], bool]
Tell = Callable[[dict[str, Any], int], None]


def nothing(record: dict[str, Any], total: int) -> None:
    """What is told of a step by default."""


def run(
    cell: Cell, folder: Path, *, stop: Stop = lambda: False, tell: Tell = nothing, save: bool = True
) -> dict[str, Any]:
    """Run a cell to its end and return what summary.json holds; of one that is done, that.

    stop: looked at after every step. tell: gets every step's record and the number of steps.
    save: also what was trained.

    What the run raises is written to error.json and raised again. Raises StoppedError if `stop`
    says so; ValueError for a folder that holds another cell.
    """
    first = processes.rank_and_size()[0] == 0
    if first:
        folders.note(cell, folder)
    if (done := read_json(folder / folders.SUMMARY)) is not None:
        return done
    try:
        summary = _run(cell, folder, stop, tell, save)
    except (StoppedError, KeyboardInterrupt):
        raise
    except Exception as error:
        folders.fail(folder, f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    if first:
        folders.write(folder / folders.SUMMARY, summary)
        (folder / folders.ERROR).unlink(missing_ok=True)
        shutil.rmtree(folder / folders.STATES, ignore_errors=True)
    return summary


# -- the run ---------------------------------------------------------------------------------------


def _run(cell: Cell, folder: Path, stop: Stop, tell: Tell, save: bool) -> dict[str, Any]:
    began, first = time.perf_counter(), processes.rank_and_size()[0] == 0
    task = tasks.task_of(cell)
    bases = folder.parents[1] / folders.BASES
    base = tasks.load(cell, bases)
    model, adapter = base.model, cell.build_adapter()
    frozen = None if adapter else distributed.whole_state(model)
    before = _before(cell, base, task, bases)
    trained = _prepare(model, cell)
    monitor = monitoring.watch(model, cell.monitor, full=adapter is None)
    found = _steps(cell, folder, base, task, trained, monitor)
    try:
        records, failure = _follow(found, cell, folder, len(task.prompts), stop, tell)
    finally:
        if monitor is not None and first:
            monitor.to_jsonl(folder / folders.MONITOR)
    after = None if failure else tasks.accuracy(base, task, cell, _merged(model, cell))
    whole = None if adapter else distributed.whole_state(model)
    if first and not failure:
        sa.spectra.analyze(whole or model, frozen).save(folder / folders.SPECTRA)
    if first and save:
        _save(model, whole, folder)
    return {
        **_fate(before, after, records, failure),
        "id": cell.id,
        "parameters": sum(p.numel() for p in trained),
        "cold_start": base.cold_start,
        "monitor": monitoring.summary(monitor),
        "seconds": time.perf_counter() - began,  # of the process that ended it
        "peak_memory_mib": peak_memory_mib(),
        "versions": {n: version(n) for n in ("structadapt", "torch")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _prepare(model: Any, cell: Cell) -> list[torch.nn.Parameter]:
    """Put the adapter on, or shard what trains as a whole; what the optimizer trains."""
    adapter = cell.build_adapter()
    if adapter is not None:
        sa.adapt(model, adapter, cell.target, seed=cell.seed)
    elif cell.processes > 1:
        distributed.shard(model)
    if cell.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return list(model.parameters() if adapter is None else sa.adapter_parameters(model))


def _fate(before: Any, after: Any, records: Records, failure: str | None) -> dict[str, Any]:
    """What came of a run."""
    absorbed = next((r["step"] for r in records if _is_absorbed(r)), None)
    return {
        "before": before,
        "after": after,
        "collapsed": _collapsed(before, after, absorbed),
        "absorbed_at": absorbed,
        "failure": failure,
        "steps": len(records),
        "first_kl": records[0].get("kl") if records else None,
    }


def _collapsed(before: Any, after: Any, absorbed: int | None) -> bool:
    """Not finite, below a tenth of the first accuracy, or below it and without a gradient."""
    if after is None or after["sampled"] < before["sampled"] / FALL:
        return True
    return absorbed is not None and after["sampled"] < before["sampled"]


def _before(cell: Cell, base: tasks.Base, task: tasks.Task, bases: Path) -> dict[str, Any]:
    """The accuracy of the base model, worked out once for all cells that share it."""
    names = ("model", "task", "data", "min_difficulty", "cold_start", "problems", "samples", "seed",
             "dtype", "new_tokens", "grpo")  # fmt: skip
    key = {name: getattr(cell, name) for name in names}
    path = bases / f"before-{digest(key)}.json"
    bases.mkdir(parents=True, exist_ok=True)
    first = processes.rank_and_size()[0] == 0
    with locked(path.with_name(f".{path.name}.lock")) if first else nullcontext():
        known = processes.gather(read_json(path))[0]
        if known is None:
            known = {"of": key, "accuracy": tasks.accuracy(base, task, cell, nullcontext)}
            if first:
                folders.write(path, known)
    return known["accuracy"]


def _steps(
    cell: Cell, folder: Path, base: tasks.Base, task: tasks.Task, trained: Any, monitor: Any
) -> Iterator[dict[str, Any]]:
    """The run, a record a step."""
    how = config(cell, base.eos, base.pad, task.new_tokens)
    optimizer = torch.optim.AdamW(trained, lr=cell.rate, weight_decay=cell.weight_decay)
    updates = math.ceil(len(task.prompts) / cell.batch)
    updates *= cell.minibatches * how.epochs if cell.method == "grpo" else 1
    end = 1.0 if cell.schedule == "constant" else 0.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, updates)
    states = folder / folders.STATES
    if cell.method == "sft":
        return sft.train(
            base, optimizer, schedule, sft.pairs_of(task, base), cell, how.max_grad_norm,
            lambda: tasks.sampled(base, task, cell, 200), monitor, states,
        )  # fmt: skip
    checkpoints = sa.grpo.Checkpoints(states, every=cell.checkpoint_every)
    checkpoints.reopen()  # summary.json says what is finished
    reference = None
    if how.kl_coef:
        reference = lambda: sa.disabled(base.model)  # noqa: E731
    return map(asdict, sa.grpo.train(
        base.model, optimizer, task.prompts, task.reward, how, tokenizer=base.tokenizer,
        rollout_context=_merged(base.model, cell), reference=reference, scheduler=schedule,
        observers=[monitor] if monitor else [], checkpoints=checkpoints,
        guard=sa.grpo.Guard(patience=cell.stop_absorbed or 8),
    ))  # fmt: skip


def _follow(
    found: Iterator[dict[str, Any]], cell: Cell, folder: Path, prompts: int, stop: Stop, tell: Tell
) -> tuple[Records, str | None]:
    """Every step's record, written as it comes, and what ended the run before its time if it
    diverged. Raises StoppedError."""
    log, total = StepLog(folder / folders.STEPS), math.ceil(prompts / cell.batch)
    first = processes.rank_and_size()[0] == 0
    try:
        for record in found:
            if first:
                log.add(record)
            tell(record, total)
            if _is_absorbed(record) and cell.stop_absorbed:
                break
            done = record["step"] + 1
            if done < total and processes.any_of(stop()):
                raise StoppedError(f"{cell.id} after step {done} of {total}")
    except FloatingPointError as error:  # not finite: a gradient, or the logits
        return log.records, str(error)
    return log.records, None


def _is_absorbed(record: dict[str, Any]) -> bool:
    return any(alarm.startswith("absorbing") for alarm in record.get("alarms", ()))


def _merged(model: torch.nn.Module, cell: Cell) -> Callable[[], AbstractContextManager[None]]:
    """Rollouts from merged weights, which only fp32 holds without loss."""
    if cell.adapter == "full" or cell.dtype != "float32":
        return nullcontext
    return lambda: sa.merged_if_exact(model)


def _save(model: torch.nn.Module, whole: dict[str, torch.Tensor] | None, folder: Path) -> None:
    if whole is not None:
        write_atomically(folder / "model.safetensors", safetensors.torch.save(whole))
    else:
        sa.save(model, folder / "adapter.safetensors")
