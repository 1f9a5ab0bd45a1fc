"""A study on a cluster: every cell is a job of an engine that is there already.

A job is what `structadapt study run GRID --out DIR --cell K` does; it may be started twice, killed
and started again. All machines have to see the study's folder, and it has to support file locks.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from structadapt import terminal
from structadapt.study import folders, grid, runner
from structadapt.study.cell import Cell
from structadapt.study.folders import Status

Tell = Callable[[list[Status]], None]
LOCAL_JOBS = 2  # of submitit's local executor at a time, unless --workers says otherwise


class Job:
    """One cell, as a callable that can be pickled. Returns how many cells failed: 0 or 1."""

    def __init__(self, text: str, out: Path, threads: int, save: bool) -> None:
        self.text, self.out, self.threads, self.save = text, str(out.resolve()), threads, save

    def __call__(self, name: str) -> int:
        torch.set_num_threads(self.threads)
        cell = grid.parse(self.text).cell(name)
        return runner.work([cell], Path(self.out), save=self.save)

    def checkpoint(self, name: str) -> Any:
        """What submitit asks for when Slurm is about to take the machine away: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, name)


def run(
    engine: str, cluster: str | None, options: Mapping[str, Any], cells: Sequence[Cell], out: Path,
    job: Job, workers: int | None, tell: Tell,
) -> None:  # fmt: skip
    """Run the cells, and return when all have ended.

    engine: "submitit" or "ray". cluster: of submitit "slurm" or "local" (default: what is there);
    of ray the address of a cluster, or "auto" (default: one of its own on this machine).
    options: of submitit's update_parameters, or of a Ray task. Raises ImportError, with what to
    install, without the engine; ValueError for options that it does not have.
    """
    start = {"submitit": _submitit, "ray": _ray}[engine]
    start(cluster, dict(options), [cell.id for cell in cells], job, workers, out,
          lambda: tell(folders.status(cells, out)))  # fmt: skip


def _submitit(
    cluster: str | None, options: dict[str, Any], names: list[str], job: Job, workers: int | None,
    out: Path, tell: Callable[[], None],
) -> None:  # fmt: skip
    try:
        import submitit
    except ImportError:
        raise ImportError("--engine submitit needs: pip install 'structadapt[cluster]'") from None
    executor = submitit.AutoExecutor(folder=out.resolve() / folders.JOBS, cluster=cluster)
    local = executor.cluster != "slurm"
    if workers is not None and not local:
        options["slurm_array_parallelism"] = workers
    try:
        executor.update_parameters(**options)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"[cluster.submitit]: {error}") from None
    waiting, jobs = list(names), []
    limit = workers or LOCAL_JOBS if local else len(names)
    try:
        while waiting or jobs:
            free = limit - len(jobs)
            if waiting and free > 0:
                jobs += executor.map_array(job, waiting[:free])
                waiting = waiting[free:]
            time.sleep(1.0)
            for done in [j for j in jobs if j.done()]:
                jobs.remove(done)
                if done.exception() is not None:
                    _died(f"a job died, see {done.paths.stderr}")
            tell()
    except BaseException:
        for one in jobs:
            with suppress(Exception):
                one.cancel()
        raise


def _ray(
    cluster: str | None, options: dict[str, Any], names: list[str], job: Job, workers: int | None,
    out: Path, tell: Callable[[], None],
) -> None:  # fmt: skip
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise ImportError("--engine ray needs: pip install 'structadapt[cluster]'") from None
    cpus = None if cluster else (workers or os.cpu_count() or 1) * job.threads
    ray.init(cluster or "local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        how = {"num_cpus": job.threads, "max_retries": 3, **options}
        try:
            task = ray.remote(_call).options(**how)
        except (ValueError, TypeError) as error:
            raise ValueError(f"[cluster.ray]: {error}") from None
        pending = [task.remote(job, name) for name in names]
        while pending:
            done, pending = ray.wait(pending, timeout=1.0)
            for one in done:
                try:
                    ray.get(one)
                except RayError as error:
                    _died(f"a task died: {error}")
            tell()
    finally:
        ray.shutdown()


def _call(job: Job, name: str) -> int:
    return job(name)


def _died(words: str) -> None:
    terminal.tell(f"{words}; its cell goes on with the same command")
