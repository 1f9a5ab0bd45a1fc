"""What a program that runs for a while asks of its process."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


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
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
