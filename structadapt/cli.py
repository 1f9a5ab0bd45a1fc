"""The command line: structadapt grpo | preflight | spectra | study."""

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

from structadapt import terminal
from structadapt.examples import grpo as grpo_example
from structadapt.examples import preflight as preflight_example
from structadapt.examples.options import add_arguments
from structadapt.spectra import command as spectra_command
from structadapt.study import command as study_command

WORDS = """Choose the structure of a weight update.

    structadapt grpo --adapter dora --out runs/dora      train a tiny model with GRPO
    structadapt preflight --rank 256 --alpha 512         will that run collapse?
    structadapt spectra tuned/ --base base/              what did the update become?
    structadapt study run small --out runs/small         which adapter, rank and rate survive?

exit codes, the same for every command:
    0    done
    1    a run was begun, and failed: it diverged, or its disk is full
    2    bad input, nothing was begun; or a report that could not be written
    3    nothing can be said of all of it, or of a part
    4    what was looked for was found: a collapse, a finding of --fail-on
    130  Ctrl-C

Results go to standard output, with --json as one document of JSON; progress and errors go to
standard error, errors alone with --quiet. NO_COLOR=1 turns colours off.
"""


class Formatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a text, and leaves examples and lists as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip("\n").split("\n\n")
        return "\n\n".join(p if "\n    " in f"\n{p}" else textwrap.fill(p, width) for p in parts)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today is ambiguous once there is another option.
        super().__init__(**{"formatter_class": Formatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        terminal.say(self.prog, "error", f"{message} (see {self.prog} --help)")
        self.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Refuse here what is unknown: the parser above would name itself, not the subcommand."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


COMMANDS: dict[str, tuple[Any, Callable[[argparse.ArgumentParser], None], str]] = {
    "grpo": (
        grpo_example, add_arguments,
        "train a tiny language model with GRPO, in a minute or two on a CPU",
    ),
    "preflight": (
        preflight_example, partial(add_arguments, without=("--prompts", "--monitor", "--out")),
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
    """Run one subcommand and return its exit code: see `WORDS`, and the help of each."""
    terminal.reopen()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        terminal.say("structadapt", "error", "interrupted")
        return 130
    except OSError as error:  # of standard output: what each command writes, it looks after
        terminal.say("structadapt", "error", error)
        return 1


def _parser() -> Parser:
    parser = Parser(prog="structadapt", description=WORDS)
    parser.add_argument("--version", action="version", version=version("structadapt"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, add, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=module.__doc__)
        add(command)
        command.set_defaults(run=module.main)
    return parser


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help(sys.stderr)
            return 2
        if getattr(options, "quiet", False):
            with terminal.errors_alone():
                return options.run(options)
        return options.run(options)
    finally:
        terminal.flush()


if __name__ == "__main__":
    sys.exit(main())
