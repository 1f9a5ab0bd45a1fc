"""The command line as a stranger meets it: help, mistakes, and what is printed where."""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from structadapt import cli, terminal
from structadapt.spectra import analysis
from structadapt.study import dry_run

ROOT = Path(__file__).parents[1]
LEAVES = ["grpo", "preflight", "spectra", "study run", "study status", "study report"]
BEHIND = r"(?: {2,}| \||&&).*"  # an example: words on it, or another command


def call(*arguments):
    """Exit code of the command line in this process."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def help_of(command, capsys):
    assert call(*command.split(), "--help") == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def codes_in(text):
    """The exit codes that a help lists."""
    return re.findall(r"^    (\d+)  ", text.split("exit codes")[1], re.M)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with files that are what they should be, and files that are not."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    weights = {"l.up.weight": torch.randn(8, 6, generator=generator)}
    safetensors.torch.save_file(weights, "good.safetensors")
    for name, content in {
        "garbage.safetensors": b"garbage",
        "empty.safetensors": b"",
        "pickle.pt": b"\x80\x04garbage",
        "zip.bin": b"PK\x03\x04zzz",
        "latin.toml": b"name = '\xff'",
        "empty.toml": b"",
        "grid.toml": b'[[cells]]\nadapter = "lora"\nlr = 1e-3\n',
        "file": b"mine",
        "torn/config.json": b"{torn",
        "done/config.json": b"{}",
        "done/summary.json": b"{}",
        "study/grid.toml": b"nonsense",
        "report/study.json": b'{"runs": [{}], "failed": [], "planned": 1}',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "folder").mkdir()
    return tmp_path


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "study", *LEAVES])
def test_help_has_a_summary_and_examples_that_are_understood(command, capsys):
    text = help_of(command, capsys)
    summary = text.split("\n\n")[1]
    assert summary[0].isupper() and summary.endswith(".")
    examples = re.findall(r"^    structadapt (.*)", text, re.M)
    assert 2 <= len(examples) <= 4
    for example in examples:
        assert example.startswith(command)
        cli._parser().parse_args(re.sub(BEHIND, "", example).split())


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_takes_json_and_quiet_at_its_end(command, capsys):
    text = help_of(command, capsys)
    assert re.search(r"^  --json .*\n  --quiet ", text, re.M)
    usage = " ".join(text.split("\n\n")[0].split())
    assert "[--json] [--quiet]" in usage


@pytest.mark.parametrize("command", LEAVES)
def test_exit_codes_in_the_help_are_those_of_the_documentation(command, capsys):
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/cli.md").read_text().splitlines()
            if line.startswith("| ")]  # fmt: skip
    column = [cell.strip(" `") for cell in rows[0]].index(command)
    documented = [row[0].strip() for row in rows[1:] if row[column].strip()]
    assert codes_in(help_of(command, capsys)) == documented
    assert set(documented) <= set(codes_in(help_of("", capsys)))


def test_help_fits_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    for command in ("", *LEAVES):
        lines = help_of(command, capsys).splitlines()
        assert all(len(line) <= 40 for line in lines if not line.startswith("    "))
    monkeypatch.setenv("COLUMNS", "120")
    assert max(map(len, help_of("spectra", capsys).splitlines())) <= 118


@pytest.mark.parametrize("command", ["", "study"])
def test_without_a_command_there_is_the_help(command, capsys):
    text = help_of(command, capsys)
    assert call(*command.split()) == 2
    assert capsys.readouterr() == ("", text)


def test_as_a_module():
    command = [sys.executable, "-m", "structadapt", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", found.stdout) and not found.returncode, found.stderr


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("grop", ": error: argument COMMAND: invalid choice: 'grop'"),
        ("--colour", ": error: unrecognized arguments: --colour (see structadapt --help)"),
        ("grpo --ranks 4", "grpo: error: unrecognized arguments: --ranks 4; did you mean --rank?"),
        ("grpo --mon 2", "grpo: error: unrecognized arguments: --mon 2 (see structadapt grpo"),
        ("grpo extra", "grpo: error: unrecognized arguments: extra"),
        ("grpo --rank", "grpo: error: argument --rank: expected one argument"),
        ("grpo --out torn", "grpo: error: torn/config.json is damaged"),
        ("grpo --out done", "exists and its run is finished"),
        ("grpo --out file/below", "grpo: error: file/below: Not a directory"),
        ("grpo --load folder", "grpo: error: folder: Is a directory"),
        ("grpo --load pickle.pt", "pickle.pt is truncated or no safetensors file"),
        ("preflight --monitor 1", "preflight: error: unrecognized arguments: --monitor 1"),
        ("preflight --out x", "preflight: error: unrecognized arguments: --out x"),
        ("spectra", "spectra: error: the following arguments are required: path"),
        ("spectra no\x00where", "spectra: error: 'no\\x00where' holds a NUL"),
        ("spectra garbage.safetensors", "is truncated within its header"),
        ("spectra empty.safetensors", "is empty (0 bytes)"),
        ("spectra pickle.pt", "holds something else than tensors"),
        ("spectra zip.bin", "zip.bin is truncated or no file of torch.save"),
        ("spectra folder", "folder has no weights"),
        ("spectra good.safetensors --base file", "spectra: error: file"),
        ("spectra good.safetensors --workers two", "argument --workers: invalid int value"),
        ("spectra good.safetensors --csv no/r.csv", "--csv: there is no folder no"),
        ("study rum", "study: error: argument ACTION: invalid choice: 'rum'"),
        ("study run grid.toml", "study run: error: the following arguments are required: --out"),
        ("study run nogrid --out o", "study run: error: no grid 'nogrid'"),
        ("study run no.toml --out o", "study run: error: no.toml: No such file or directory"),
        ("study run latin.toml --out o", "latin.toml: 'utf-8' codec can't decode"),
        ("study run empty.toml --out o", "empty.toml: no [[cells]]"),
        ("study run grid.toml --out file", "study run: error: file is a file"),
        ("study run grid.toml --out o --cell 9", "no cell '9' in the grid 'grid'"),
        ("study run grid.toml --out o --workers 0", "must be at least 1"),
        ("study run grid.toml --out o --engine no", "argument --engine: invalid choice: 'no'"),
        ("study status nowhere", "study status: error: nowhere holds no study"),
        ("study status study", "study/grid.toml: not TOML"),
        ("study report nowhere", "study report: error: nowhere holds no run of a study"),
        ("study report report", "report/study.json is damaged"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, here, capsys):
    before = sorted(here.rglob("*"))
    assert call(*arguments.split(" ")) == 2
    out, err = capsys.readouterr()
    assert words in err and not out
    assert err.startswith("structadapt") and err.count("\n") == 1 and ": error: " in err
    assert sorted(here.rglob("*")) == before, "nothing is left behind"


def test_what_cannot_be_written_is_said_before_the_work(here, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(analysis, "analyze", lambda *_, **__: pytest.fail("work"))
    assert call("spectra", "good.safetensors", "--html", "r.html") == 2
    assert "--html: the folder . cannot be written to" in capsys.readouterr().err


def test_an_error_is_one_line_of_what_can_be_printed(capsys):
    terminal.say("who", "error", ValueError("two\nlines, \x1b[2J"))
    terminal.say("who", "note", FileNotFoundError(2, "No such file", "a.txt"))
    terminal.say("who", "error", KeyError())
    assert capsys.readouterr().err == (
        "who: error: two lines, \N{REPLACEMENT CHARACTER}[2J\n"
        "who: note: a.txt: No such file\nwho: error: KeyError\n"
    )


def test_a_bug_is_not_taken_for_a_mistake(here, monkeypatch):
    monkeypatch.setattr(analysis, "analyze", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("spectra", "good.safetensors")


def test_ctrl_c_is_one_line_and_130(here, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(analysis, "analyze", interrupted)
    assert call("spectra", "good.safetensors") == 130
    assert capsys.readouterr() == ("", "structadapt: error: interrupted\n")


# -- what is printed where -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "spectra good.safetensors --csv r.csv --html r.html --plots p",
        "spectra good.safetensors --base good.safetensors --maturity",
        "study run grid.toml --out o --dry-run",
        "study status started",
    ],
)
def test_json_is_one_document(command, here, capsys):
    (here / "started").mkdir()
    (here / "started" / "grid.toml").write_bytes((here / "grid.toml").read_bytes())
    assert call(*command.split(), "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and out.endswith("\n") and not err


def test_quiet_leaves_errors_alone(here, capsys):
    safetensors.torch.save_file({"l.weight": torch.zeros(4, 3)}, "zeros.safetensors")
    for options, noted in ([], True), (["--quiet"], False):
        assert call("spectra", "zeros.safetensors", "--plots", "p", *options) == 0
        assert ("note: no pictures" in capsys.readouterr().err) == noted
    assert call("spectra", "nowhere", "--quiet") == 2
    assert "nowhere is not there" in capsys.readouterr().err


def test_quiet_leaves_out_what_libraries_warn_of(monkeypatch, caplog):
    def noisy(*_):
        logging.getLogger("library").warning("noted")
        if logging.root.manager.disable:
            warnings.warn("and warned", stacklevel=1)  # let through, it raises here
        logging.getLogger("library").error("failed")
        return 0

    monkeypatch.setattr(dry_run, "main", noisy)
    for options, seen in ([], ["noted", "failed"]), (["--quiet"], ["failed"]):
        caplog.clear()
        assert call("study", "run", "small", "--out", "unused", "--dry-run", *options) == 0
        assert caplog.messages == seen
    assert not logging.root.manager.disable


@pytest.mark.parametrize(
    "quiet, as_json, on_a_terminal, expected",
    [
        (False, False, False, False),
        (True, False, True, True),
        (False, True, False, True),
        (False, True, True, False),
    ],
)
def test_progress_is_for_who_looks_on(quiet, as_json, on_a_terminal, expected, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: on_a_terminal, raising=False)
    assert terminal.is_quiet(argparse.Namespace(quiet=quiet, json=as_json)) == expected


def test_progress_of_spectra_is_on_standard_error_of_a_terminal(here, monkeypatch, capsys):
    for on_a_terminal, options, shown in (
        (True, [], True),
        (True, ["--json"], True),
        (True, ["--quiet"], False),
        (False, [], False),
    ):
        monkeypatch.setattr("sys.stderr.isatty", lambda on=on_a_terminal: on, raising=False)
        assert call("spectra", "good.safetensors", *options) == 0
        out, err = capsys.readouterr()
        assert "\r" not in out and ("1/1  100%" in err) == shown == bool(err)


@pytest.mark.parametrize(
    "on_a_terminal, environment, coloured",
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colours_are_for_a_terminal(on_a_terminal, environment, coloured, monkeypatch, capsys):
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: on_a_terminal, raising=False)
    assert call("grop") == 2
    err = capsys.readouterr().err
    assert ("\x1b[31merror:\x1b[0m" in err) == coloured == ("\x1b" in err)


# -- streams that are not there --------------------------------------------------------------------


@pytest.fixture
def unread():
    """A stream into a pipe that nobody reads from."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        yield stream


@pytest.mark.parametrize("command, code", [("--help", 0), ("spectra good.safetensors", 0)])
def test_a_reader_that_went_away_stops_nothing(command, code, here, unread, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", unread)
    files = ["--csv", "r.csv"] if "spectra" in command else []
    assert call(*command.split(), *files) == code
    assert not capsys.readouterr().err
    assert not files or "l.up" in (here / "r.csv").read_text()


def test_an_error_that_nobody_reads(unread, monkeypatch):
    monkeypatch.setattr(sys, "stderr", unread)
    assert call("grop") == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("command", ["--help", "spectra good.safetensors"])
def test_a_full_disk_behind_standard_output(command, here, monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert call(*command.split()) == 1
    assert capsys.readouterr().err == "structadapt: error: No space left on device\n"


def test_streams_that_were_closed_before_the_start(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert call("spectra", "good.safetensors", "--csv", "r.csv") == 0
    sys.stdout.close()
    sys.stderr.close()
    assert (here / "r.csv").exists()
