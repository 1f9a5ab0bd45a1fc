"""How far an analysis is: weighed by the work of each matrix, on a terminal only."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from structadapt.spectra.report import shown

Progress = Callable[[int, int, float, str], None]  # (done, all, share of the work, name)


def flops(shape: tuple[int, int]) -> float:
    """Operations for the singular values of a matrix (out, in).

    The Gram matrix of the smaller side n takes 2 n out in, its eigenvalues about 2.4 n^3 of the
    same speed (measured at n = 4096).
    """
    n = min(shape)
    return 2.0 * n * shape[0] * shape[1] + 2.4 * n**3


class Meter:
    """One line on standard error that is written over: matrix, share of the work, time left."""

    def __init__(self, stream: TextIO | None = None, visible: bool = True) -> None:
        self.stream = stream or sys.stderr
        self.visible = visible and self.stream.isatty()
        self.began = self.last = time.monotonic()

    def __call__(self, done: int, total: int, share: float, name: str) -> None:
        now = time.monotonic()
        if not self.visible or (now - self.last < 0.2 and done < total):
            return
        self.last = now
        left = f"{duration((now - self.began) * (1 - share) / share)} left" if share > 0 else ""
        line = f"{done}/{total}  {share:4.0%}  {left:>12}  {shown(name)}"
        self.stream.write(f"\r\x1b[K{line[: self._columns() - 1]}")
        self.stream.flush()

    def _columns(self) -> int:
        """The width of the terminal: a line that breaks could not be taken away."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return shutil.get_terminal_size().columns

    def close(self) -> None:
        """Take the line away."""
        if self.visible:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def duration(seconds: float) -> str:
    """Seconds in the two largest units that count."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
