"""What a program that runs for a while asks of its process."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structadapt import terminal
from structadapt.files import write_atomically


def peak_memory_mib() -> float | None:
    """The most memory the process has had, or None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@contextlib.contextmanager
def first_interrupt(quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that a step ends whole; the second one interrupts."""
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        if not quiet:
            terminal.tell("\nstopping after this step; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)


def strict(content: Any, indent: int | None = None) -> str:
    """JSON in which what is not finite is null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=indent)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None without one. ValueError, with its name, for a damaged
    one."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@dataclass
class StepLog:
    """The records of a run's steps, a line of JSON each, also of a run that was stopped."""

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record. The first one of a run that goes on is the last step that it had saved:
        what the file holds from there on is replaced."""
        if not self.records:
            self.records = [r for r in read_log(self.path) if r["step"] < record["step"]]
            write_log(self.path, self.records)
        self.records.append(record)
        append(self.path, [record])


def append(path: Path, records: Iterable[Any]) -> None:
    """A line of JSON for each record, at the end of a file."""
    with open(path, "a") as file:
        file.writelines(f"{strict(record)}\n" for record in records)


def write_log(path: Path, records: Iterable[Any]) -> None:
    """A line of JSON for each record, in place of what the file held."""
    write_atomically(path, "".join(f"{strict(record)}\n" for record in records).encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a file with a line of JSON each; none without it. What a full disk cut short
    is left out."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
