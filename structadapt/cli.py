"""The command line: structadapt grpo | preflight | spectra."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from structadapt.examples import grpo as grpo_example
from structadapt.examples import preflight as preflight_example
from structadapt.examples.options import add_arguments
from structadapt.spectra import analyze


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 2 for bad input, 130 after Ctrl-C; others of
    `grpo` and `preflight` stand in their help."""
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
        help="what the update in an adapter file looks like",
        description="Singular-value measures of each layer's update, as a Markdown table.",
    )
    command.add_argument("path", help="an adapter file, or weights to compare with --base")
    command.add_argument("--base", help="the base weights, a safetensors file")
    command.add_argument("--json", action="store_true", help='print {"rows": [...]} instead')
    command.set_defaults(run=_spectra)

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _spectra(options: argparse.Namespace) -> int:
    try:
        report = analyze(options.path, options.base)
    except (ValueError, OSError) as error:
        print(f"structadapt spectra: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"rows": report.rows}) if options.json else report.to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
