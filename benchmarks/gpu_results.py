"""The results of a device: one JSON, written after every cell, from which a stopped run goes on.

A cell is one check, one tuned case or one timed size. It carries a stamp of what it was made with
(commit, a digest of the kernels, versions, and where it was timed also the table of tiles); a cell
with another stamp is dropped when the file is read, one that is done is not done again.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from structadapt.kernels import _launch

ROOT = Path(__file__).parents[1]
DONE = ("ok", "failed", "not installed", "left out")  # an error or "not reached" is tried again
TIMED = ("lora", "dora", "quanta", "head", "block")  # parts whose numbers depend on the tiles
PACKAGES = ("torch", "triton", "peft", "liger_kernel", "transformers")
Cell = dict[str, Any]


def output(*command: str) -> str:
    """What a program prints, or "" where there is none or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


SOURCES = ("kernels", "structadapt", "benchmarks")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU interpreter"


def machine(device: torch.device, commit: str = "") -> dict[str, Any]:
    """Where and with what the numbers are made."""
    # Of a named commit, git may know nothing where this runs.
    changed = "" if commit else output("git", "diff", "--name-only", "HEAD", "--", *SOURCES)
    found: dict[str, Any] = {
        "device": device_name(device),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        .partition("\n")[0],
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit or output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "changed": sorted(changed.splitlines()),
        "date": date.today().isoformat(),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
    return found


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


class Results:
    """The cells of one device, by "part/name"."""

    def __init__(
        self, folder: Path, device: torch.device, smoke: bool, commit: str = "", fresh: bool = False
    ) -> None:
        self.device, self.smoke = device, smoke
        self.machine = machine(device, commit)
        self.table_name = _launch.table_name(self.machine["device"])
        self.path = folder / f"gpu_{self.table_name}.json"
        self.kernels = digest(p.read_text() for p in sorted((ROOT / "kernels").glob("*.py")))
        self.table: dict[str, Any] | None = None  # the whole tuned table
        self.seconds: dict[str, float] = {}  # that each part took the last time
        self.cells: dict[str, Cell] = {}
        if self.path.is_file() and not fresh:
            stored = json.loads(self.path.read_text())
            self.table = stored.get("table")
            self.seconds = stored.get("seconds", {})
            self.cells = stored["cells"]

    def stamp(self, part: str) -> dict[str, str]:
        used = self.machine["versions"]
        found = {
            "commit": self.machine["commit"],
            "kernels": self.kernels,
            "driver": self.machine["driver"],
            "versions": " ".join(f"{k} {v}" for k, v in used.items()),
        }
        if part in TIMED:
            tiles = json.dumps(_launch.table(self.device), sort_keys=True)
            found["tiles"] = digest([tiles])
        return found

    def drop_stale(self, only: tuple[str, ...] = ()) -> None:
        """Forget what was made with other code, versions or tiles, of all parts or some."""
        parts = {key.split("/")[0] for key in self.cells}
        stamps = {part: self.stamp(part) for part in parts if part in only or not only}
        self.cells = {
            key: cell
            for key, cell in self.cells.items()
            if (part := key.split("/")[0]) not in stamps or cell.get("stamp") == stamps[part]
        }

    def done(self, key: str) -> bool:
        return self.cells.get(key, {}).get("status") in DONE

    def put(self, key: str, cell: Cell) -> None:
        """Keep a cell and write the file; a killed run leaves the old file or the new one."""
        self.cells[key] = {**cell, "stamp": self.stamp(key.split("/")[0])}
        self.write()

    def write(self) -> None:
        about = "smoke, not a measurement" if self.smoke else "benchmarks/gpu.py"
        content = {
            "about": about,
            "smoke": self.smoke,
            "machine": self.machine,
            "seconds": self.seconds,
            "table": self.table,
            "cells": self.cells,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, dumps(content))

    def of(self, part: str) -> dict[str, Cell]:
        return {key: cell for key, cell in self.cells.items() if key.startswith(f"{part}/")}


def write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)


def dumps(content: Any) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text) + "\n"


class Budget:
    """Seconds for everything; what a part leaves over goes to those after it."""

    def __init__(self, seconds: float, shares: dict[str, float]) -> None:
        self.end, self.shares = time.monotonic() + seconds, dict(shares)
        self.deadline = self.end

    def begin(self, part: str) -> None:
        left = self.end - time.monotonic()
        share = self.shares[part] / sum(self.shares.values())
        self.deadline = time.monotonic() + max(0.0, left) * share
        del self.shares[part]

    @property
    def left(self) -> float:
        """Seconds of the part."""
        return self.deadline - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left <= 0
