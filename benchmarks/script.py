"""The command line that the benchmarks share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from structadapt.files import write_atomically


def parser(doc: str | None, results: Path) -> argparse.ArgumentParser:
    """With --smoke, --table and --out."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--smoke", action="store_true", help="a little of each, to see that it runs")
    made.add_argument("--table", action="store_true", help="of the results that are there")
    made.add_argument("--out", type=Path, default=results, help=f"default: {results.name}")
    return made


def show(
    options: argparse.Namespace,
    results: Path,
    measure: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measure, write and print the table, or print that of what is there. Numbers of --smoke mean
    nothing: they are written to an --out of their own alone."""
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    found = measure()
    if not options.smoke or options.out != results:
        write(options.out, found)
    print(table(found))


def write(path: Path, results: dict[str, Any]) -> None:
    """Results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
