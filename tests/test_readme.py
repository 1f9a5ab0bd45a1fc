"""The README's code runs, and its numbers are the measured ones."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def benchmark():
    path = ROOT / "benchmarks" / "grpo_example.py"
    spec = importlib.util.spec_from_file_location("grpo_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_commands_run(tmp_path):
    commands = [c.split(" && ")[-1] for c in COMMANDS if "structadapt" in c.split(" && ")[-1]]
    assert commands[0] == "structadapt grpo" and len(commands) == 5
    scripts = Path(sys.executable).parent
    for command in commands:
        subprocess.run(
            [scripts / "structadapt", *shlex.split(command)[1:]], cwd=tmp_path, check=True
        )
    for run in (tmp_path / "runs").iterdir():
        summary = json.loads((run / "summary.json").read_text())
        assert sum(summary["seconds"].values()) > 0 and summary["peak_memory_mib"] > 0
        assert 0.15 < summary["before"]["sampled"] < 0.35
        if run.name == "collapse":
            assert summary["after"]["greedy"] == summary["after"]["sampled"] == 0.0
            assert summary["collapsed_at"] is not None
        else:
            assert summary["after"]["sampled"] >= 0.70 and summary["after"]["greedy"] >= 0.80
            assert summary["collapsed_at"] is None and summary["steps"] == 128


def test_the_table_is_the_committed_measurement():
    module = benchmark()
    assert module.table(json.loads(module.RESULTS.read_text())) in README


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    module = benchmark()
    results = module.measure(smoke=True)
    assert len(results["runs"]) == len(module.SETTINGS)
    assert all(name in module.table(results) for name in module.SETTINGS)
