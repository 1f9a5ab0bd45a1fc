"""docs/spectra.md says what every column is, in the words of the code."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from structadapt.spectra.columns import table
from structadapt.spectra.evidence import RULES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "spectra.md").read_text()


def test_every_column_and_finding_is_explained():
    assert table() in TEXT
    for name in RULES:
        assert f"| `{name}` |" in TEXT


def test_the_table_is_the_committed_measurement():
    path = ROOT / "benchmarks" / "spectra_cpu.py"
    spec = importlib.util.spec_from_file_location("spectra_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULTS.read_text())) in TEXT


@pytest.mark.parametrize("name", ["spectra_cpu", "monitor_cpu"])
def test_the_benchmark_runs(name):
    """Small, in a process of its own, and nothing that is committed changes."""
    committed = ROOT / "docs" / "results" / f"{name}.json"
    before = committed.read_bytes()
    program = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--smoke"]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    assert done.stdout.count("\n|") >= 2 or done.stdout.startswith("|")
    assert committed.read_bytes() == before


def test_the_alarms_on_the_study_are_those_replayed():
    found = json.loads((ROOT / "docs" / "results" / "monitor_study.json").read_text())
    study = json.loads((ROOT / "docs" / "study" / "study.json").read_text())
    collapsed = {run["id"]: run["collapsed"] for run in study["runs"]}
    assert all(collapsed[run] == fate for run, fate in found["collapsed"].items())
    page = (ROOT / "docs" / "monitor.md").read_text()
    names = {
        (0.2, None, None): "the spectra alone",
        (0.2, None, 0.5): "the spectra, and a reward lost after a step of 0.5 nats",
        (0.2, 0.05, None): "the spectra, and a reward lost after updates moved",
        (0.14, 0.05, 0.5): "the same, `collapsing_speed` 0.14 instead of 0.2",
        (0.25, 0.05, 0.5): "the same, 0.25",
        (0.36, 0.05, 0.5): "the same, 0.36",
    }
    for row in found["limits"]:
        key = row["collapsing_speed"], row["moving_speed"], row["moving_kl"]
        right = sum(collapsed[run] for run in row["alarmed"])
        wrong = len(row["alarmed"]) - right
        if key in names:
            assert f"| {names.pop(key)} | {right} | {wrong} |" in page
        if key == (0.2, 0.05, 0.5):
            assert f"| **{right}** | **{wrong}** |" in page
    assert not names
