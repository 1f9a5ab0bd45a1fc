"""The command line: structadapt grpo | preflight | spectra | study."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

from structadapt.examples import grpo as grpo_example
from structadapt.examples import preflight as preflight_example
from structadapt.examples.options import add_arguments
from structadapt.spectra import command as spectra_command
from structadapt.study import command as study_command


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


COMMANDS: dict[str, tuple[Any, Callable[[argparse.ArgumentParser], None], str]] = {
    "grpo": (
        grpo_example, add_arguments,
        "train a tiny language model with GRPO, in under a minute on a CPU",
    ),
    "preflight": (
        preflight_example, partial(add_arguments, without=("--prompts", "--out")),
        "whether that run would collapse, from its first update",
    ),
    "spectra": (
        spectra_command, spectra_command.add_arguments,
        "what a checkpoint, an adapter, or what changed between two of them looks like",
    ),
    "study": (
        study_command, study_command.add_arguments,
        "which adapter, rank, scale and learning rate survive: grids of runs",
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 2 for bad input, 130 after Ctrl-C; others
    stand in the help of each."""
    parser = Parser(prog="structadapt", description="Choose the structure of a weight update.")
    parser.add_argument("--version", action="version", version=version("structadapt"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, add, words) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=words,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.set_defaults(run=module.main)

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
