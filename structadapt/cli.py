"""The command line: structadapt grpo | preflight | spectra | study."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from structadapt.examples import grpo as grpo_example
from structadapt.examples import preflight as preflight_example
from structadapt.examples.options import add_arguments
from structadapt.spectra import command as spectra_command
from structadapt.study import command as study_command


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 2 for bad input, 130 after Ctrl-C; others
    stand in the help of each."""
    parser = Parser(prog="structadapt", description="Choose the structure of a weight update.")
    parser.add_argument("--version", action="version", version=version("structadapt"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    command = commands.add_parser(
        "grpo",
        help="train a tiny language model with GRPO, in under a minute on a CPU",
        description=grpo_example.__doc__,
        formatter_class=raw,
    )
    add_arguments(command)
    command.set_defaults(run=grpo_example.main)

    command = commands.add_parser(
        "preflight",
        help="whether that run would collapse, from its first update",
        description=preflight_example.__doc__,
        formatter_class=raw,
    )
    add_arguments(command, without=("--prompts", "--out"))
    command.set_defaults(run=preflight_example.main)

    command = commands.add_parser(
        "spectra",
        help="what a checkpoint, an adapter, or what changed between two of them looks like",
        description=spectra_command.__doc__,
        formatter_class=raw,
    )
    spectra_command.add_arguments(command)
    command.set_defaults(run=spectra_command.main)

    command = commands.add_parser(
        "study",
        help="which adapter, rank, scale and learning rate survive: grids of runs",
        description=study_command.__doc__,
        formatter_class=raw,
    )
    study_command.add_arguments(command)
    command.set_defaults(run=study_command.main)

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
