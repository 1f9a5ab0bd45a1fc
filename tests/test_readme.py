"""The README's code runs, and its numbers are the measured ones."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import grpo_example
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def test_every_block_is_of_a_kind_that_is_run():
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "text"}


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), names)
    assert "| effective_rank |" in capsys.readouterr().out
    assert names["step"].reward > 0.5, "the GRPO block does not learn"
    assert (tmp_path / "spectra.json").exists()


def test_the_test_run_installs_and_tests_as_the_readme_says():
    steps = (ROOT / ".ci" / "run").read_text()
    install, test = COMMANDS[0].split(" && "), COMMANDS[-1]
    assert install[:3] == [
        "python -m venv .venv",
        ". .venv/bin/activate",
        'pip install -e ".[dev]"',
    ]
    assert steps.rstrip().endswith(test)
    for command in install[:3]:
        words = [word for word in shlex.split(command) if not word.startswith("-")]
        assert all(word in steps for word in words), command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "quanta", "collapse"])
def test_commands_run(name, tmp_path):
    """Those of a run that has a name, or the one that has none: a test each, so that two workers
    share them."""
    commands = [c.split(" && ")[-1] for c in COMMANDS if "structadapt" in c.split(" && ")[-1]]
    assert commands[0] == "structadapt grpo" and len(commands) == 5
    named = [(re.findall(r"runs/(\w+)", command) or [""])[0] for command in commands]
    assert {*named} == {"", "quanta", "collapse"}
    program = Path(sys.executable).parent / "structadapt"
    said = ""
    for command, found in zip(commands, named, strict=True):
        if found == name:
            done = subprocess.run(
                [program, *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            said += done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert sum(summary["seconds"].values()) > 0 and summary["peak_memory_mib"] > 0
    assert 0.15 < summary["before"]["sampled"] < 0.35 and summary["steps"] == 128
    after = summary["after"]
    if name == "collapse":
        assert after["greedy"] == after["sampled"] == 0.0
        assert summary["collapsed_at"] is not None and summary["dead_steps"]
        assert f"Collapsed at step {summary['collapsed_at']}" in said
        assert "gradient is exactly zero" in said and "are exactly zero" in said
    else:
        assert after["sampled"] >= 0.70 and after["greedy"] >= 0.80
        assert summary["collapsed_at"] is None and "Collapsed" not in said


def test_the_table_is_the_committed_measurement():
    assert grpo_example.table(json.loads(grpo_example.RESULTS.read_text())) in README


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    results = grpo_example.measure(smoke=True)
    assert len(results["runs"]) == len(grpo_example.SETTINGS)
    assert all(name in grpo_example.table(results) for name in grpo_example.SETTINGS)
