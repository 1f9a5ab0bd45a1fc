"""Saving where it cannot be done, and two savers at one place.

full       A disk (a tmpfs of 1 MiB) is filled but for 0 bytes, 4 KiB, and half of what is to be
           written, and everything that the library writes is written over an older one: the error
           is one OSError, the older one is whole, and nothing else is left. Where tmpfs cannot be
           mounted, a limit on the size of files stands for it.
read-only  The same in a folder, or on a disk, that takes no writes.
savers     Two processes write different things to one place, over and over, while a third reads:
           what it reads is one of the two, whole, and so is what is left, and nothing else is.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stopped_runs

import structadapt as sa
from structadapt.spectra import page, plots

SIZE = 2**20  # bytes of the disk
Write = Callable[[Path, int], None]  # into a folder, a first or second version


def model_of(version: int) -> nn.Module:
    torch.manual_seed(0)
    model = sa.adapt(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), sa.LoRA(rank=8))
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(0.1 * (version + 1))
    return model


def llama(version: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = sa.adapt(LlamaForCausalLM(config), sa.LoRA(rank=4))
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(0.1 * (version + 1))
    return model


def _report(version: int) -> sa.spectra.Report:
    report = sa.spectra.analyze(model_of(version))
    report.about.pop("seconds", None)
    for row in report.rows:
        row["seconds"] = 0.0
    return report


def _checkpoint(folder: Path, version: int) -> None:
    """As many steps as the version: states of the first, then of one more."""
    run = stopped_runs.Run(None, folder / "states", every=1)
    run.records(1 + version)


WRITERS: dict[str, Write] = {
    "save": lambda f, v: sa.save(model_of(v), f / "a.safetensors"),
    "export_peft": lambda f, v: void(sa.export_peft(model_of(v), f / "peft")),
    "export_merged": lambda f, v: void(sa.export_merged(model_of(v), f / "merged")),
    "export_merged, transformers": lambda f, v: void(sa.export_merged(llama(v), f / "merged")),
    "Checkpoints": _checkpoint,
    "Report.to_json": lambda f, v: _report(v).to_json(f / "report.json"),
    "Report.to_csv": lambda f, v: _report(v).to_csv(f / "report.csv"),
    "Report.save": lambda f, v: void(_report(v).save(f / "report")),
    "page": lambda f, v: page.write(_report(v), f / "page.html", [], [], None),
    "plots": lambda f, v: void(plots.draw(_report(v), f / "plots")),
}
SAVED_TWICE = ("save", "export_peft", "export_merged", "Report.to_csv")  # the same bytes each time


def void(value: object) -> None:
    """For a lambda that returns nothing."""


# -- disks -----------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, and what the files hold."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def disk() -> Iterator[tuple[Path, bool]]:
    """An empty folder, on a tmpfs of its own if that can be mounted; whether it could."""
    with tempfile.TemporaryDirectory() as scratch:
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", scratch], capture_output=True
        ).returncode
        try:
            yield Path(scratch), mounted
        finally:
            if mounted:
                subprocess.run(["umount", "-l", scratch], check=True)


@contextlib.contextmanager
def filled(folder: Path, mounted: bool, room: int) -> Iterator[None]:
    """Within this context only `room` bytes can be written."""
    if not mounted:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() says so
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        return
    filler = folder / ".filler"
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize - room
    filler.write_bytes(bytes(max(size, 0)))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def locked(folder: Path, mounted: bool) -> Iterator[None]:
    """Within this context nothing can be written there."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    inner = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    if mounted:
        remount("ro")
    else:
        for path in inner:
            path.chmod(0o555)
    try:
        yield
    finally:
        if mounted:
            remount("rw")
        else:
            for path in inner:
                path.chmod(0o755)


def attempt(write: Write, folder: Path, refusing: contextlib.AbstractContextManager[None]) -> str:
    """Write the second version over the first where it cannot be done; what is wrong, or nothing.
    `wrong` begins with "written" where it could be done after all."""
    before = content(folder)
    error: BaseException | None = None
    with refusing:
        try:
            write(folder, 1)
        except BaseException as raised:
            error = raised
        after = {k: v for k, v in content(folder).items() if k != ".filler"}
    if error is None:
        return "written" if after != before else "nothing was written, and nothing was said"
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error!s:.150}"
    if after != before:
        changed = sorted(k for k in after.keys() | before.keys() if after.get(k) != before.get(k))
        return f"{', '.join(changed[:3])} is left behind, or changed"
    return ""


def measure_disks(names: Iterable[str] = tuple(WRITERS)) -> dict[str, Any]:
    """{writer: {way: what is wrong, or ""}}"""
    found: dict[str, Any] = {}
    for name in names:
        write = WRITERS[name]
        found[name] = {}
        for way in ("0 bytes", "4 KiB", "half", "read-only"):
            with disk() as (folder, mounted), quiet():
                write(folder, 0)
                size = sum(len(data) for data in content(folder).values() if data)
                room = {"0 bytes": 0, "4 KiB": 4096, "half": size // 2, "read-only": 0}[way]
                refusing = (
                    locked(folder, mounted) if way == "read-only" else filled(folder, mounted, room)
                )
                found[name][way] = attempt(write, folder, refusing)
                found[name]["tmpfs"] = mounted
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- savers ----------------------------------------------------------------------------------------


def race(write: Write, folder: Path, rounds: int) -> dict[str, Any]:
    """Two processes write their versions; this one reads."""
    wholes = []
    for version in (0, 1):
        with tempfile.TemporaryDirectory() as alone:
            write(Path(alone), version)
            wholes.append(content(Path(alone)))
    children = []
    for version in (0, 1):
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                for _ in range(rounds):
                    write(folder, version)
                code = 0
            os._exit(code)
        children.append(child)
    reads = torn = 0
    left = list(children)
    codes: list[int] = []
    while left:
        for child in [*left]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                codes.append(status)
        for name, data in _seen(folder).items():
            reads += 1
            torn += data not in (wholes[0].get(name), wholes[1].get(name))
    return {
        "rounds": rounds, "reads": reads, "torn": torn, "failed": sum(map(bool, codes)),
        "whole": content(folder) in wholes,
    }  # fmt: skip


def _seen(folder: Path) -> dict[str, bytes]:
    """The files that have their names, as far as they stay while they are read."""
    found = {}
    for place, folders, files in os.walk(folder):  # which passes over a folder that is gone
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            with contextlib.suppress(OSError):
                if not name.startswith("."):
                    path = Path(place, name)
                    found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def measure_savers(rounds: int, names: Iterable[str] = SAVED_TWICE) -> dict[str, Any]:
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, quiet():
            found[name] = race(WRITERS[name], Path(folder), rounds)
    return found


# -- the table -------------------------------------------------------------------------------------


def disk_rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    ways = {w: t for writer in found.values() for w, t in writer.items() if w != "tmpfs"}
    made = []
    for label, some in {"a full disk": [w for w in ways if w != "read-only"],
                        "a read-only folder": ["read-only"]}.items():  # fmt: skip
        told = [writer[way] for writer in found.values() for way in some]
        done = sum(t == "written" for t in told)
        bad = sum(bool(t) and t != "written" for t in told)
        said = f"{len(found)} writers, {len(told) - done} failed saves: {bad} wrong"
        made.append((f"saving to {label}", "the old one whole, one OSError", said, not bad))
    return made


def saver_rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    torn, reads = (sum(f[k] for f in found.values()) for k in ("torn", "reads"))
    failed = sum(f["failed"] for f in found.values())
    broken = sum(not f["whole"] for f in found.values())
    rounds = sum(2 * f["rounds"] for f in found.values())
    said = (
        f"{rounds:,} saves by two processes, {reads:,} reads of a file between: {torn} torn; "
        f"{failed} savers failed, {broken} results not whole"
    )
    met = not (torn or failed or broken)
    return [("two processes saving to one place", "one of the two, whole", said, met)]
