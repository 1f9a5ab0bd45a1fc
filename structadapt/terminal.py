"""What the command line prints: results to standard output, all else to standard error.

A reader that goes away, as `head` does, stops nothing: what is left to print is dropped, files are
still written, and the exit code is that of the work.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

COLOURS = {"red": 31, "green": 32, "yellow": 33}


def show(text: str) -> None:
    """Print a result, in the encoding of standard output."""
    encoding = sys.stdout.encoding or "utf-8"
    _write(sys.stdout, text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def tell(line: str) -> None:
    """Print a line of progress."""
    _write(sys.stderr, f"{line}\n")


def say(command: str, kind: str, what: str | Exception) -> None:
    """Print an error or a note on one line, whatever its words hold."""
    words = what if isinstance(what, str) else _words(what)
    words = " ".join(words.split())
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    head = paint(f"{kind}:", "red", sys.stderr) if kind == "error" else f"{kind}:"
    tell(f"{command}: {head} {words}")


def _words(error: Exception) -> str:
    """Those of the system are a number, a reason and a path; the number helps nobody."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def is_quiet(args: argparse.Namespace) -> bool:
    """Whether to leave out progress. A program that asks for JSON gets none; who looks on
    at a terminal does."""
    return args.quiet or (args.json and not sys.stderr.isatty())


@contextmanager
def errors_alone() -> Iterator[None]:
    """Leave out what libraries warn of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def in_colour(stream: TextIO) -> bool:
    """Whether it is a terminal that knows colours, and NO_COLOR is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text as it is to be printed to a stream, in a colour where that has any."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if in_colour(stream) else text


def reopen() -> None:
    """Have somewhere to print to where a stream was closed before the start, as by `>&-`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def flush() -> None:
    """Write out what others printed. OSError for a full disk."""
    _write(sys.stdout, "")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # What the stream still holds would fail once more at exit, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise
