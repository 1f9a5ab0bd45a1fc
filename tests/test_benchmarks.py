"""The benchmarks run, refuse wrong providers, and the documented numbers are the measured ones."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import adapters_cpu as benchmark
import pytest
import torch

ROOT = Path(__file__).parents[1]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@needs_peft
def test_adapters_cpu_runs(tmp_path):
    """In a process of its own: it sets the number of threads, and PEFT warns when imported."""
    out = tmp_path / "smoke.json"
    subprocess.run([sys.executable, benchmark.__file__, "--smoke", "--out", out], check=True)
    results = json.loads(out.read_text())
    assert [case["adapter"] for case in results["cases"]] == ["LoRA", "DoRA", "QuanTA"]
    for case in results["cases"]:
        ours, peer = case["providers"]["ours"], case["providers"].get("peft")
        assert ours["init"] == 0
        assert all(time > 0 for time in ours["step"]["wall_ms"])
        assert peer is None or ours["held"] < peer["held"]


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "QuanTA"])
def test_a_wrong_provider_is_refused(name):
    case = benchmark.Case(name, 64, "bf16")
    right = benchmark.Subject("right", case, benchmark.data(case), benchmark.ours)
    right.train()
    right.check()
    with torch.no_grad():
        [*right.tensors.values()][-1].mul_(1.1)
    with pytest.raises(AssertionError, match=re.escape(f"{case}: output of right is")):
        right.check()


def test_a_detached_tensor_is_refused():
    case = benchmark.Case("LoRA", 64, "bf16")
    subject = benchmark.Subject("forgetful", case, benchmark.data(case), benchmark.ours)
    subject.train()
    subject.tensors["A"].requires_grad_(False)
    with pytest.raises(AssertionError, match="no gradient of A, forgetful"):
        subject.check()


def test_memory_counts_what_lives():
    kept, changes = benchmark.allocations(lambda: torch.zeros(1024).neg().exp())
    assert kept.shape == (1024,)
    assert sum(changes) == 4096 and benchmark.largest_sum(changes) == 8192


def test_a_target_is_met_or_not():
    def times(*ms):
        return {"init": 0.0, "step": {"wall_ms": ms}, "decode": {"wall_ms": ms}, "held": 0}

    def verdicts(*ms):
        providers = {"linear": times(1, 1, 1), "ours": times(*ms)}
        case = {"adapter": "LoRA", "width": 2048, "dtype": "bf16", "providers": providers}
        for one in providers.values():
            one["peak"] = one["held"]
        return [line.split(" | ")[-1] for line in benchmark.table({"cases": [case]}).splitlines()]

    assert verdicts(1.1, 1.1, 9)[2] == "yes |"  # the median
    assert verdicts(1.2, 1.2, 1)[2] == "no |"
    assert verdicts(1.1, 1.1, 1.1)[3:] == [" |", "yes |", " |", "yes |"]


def test_the_table_is_the_committed_measurement():
    table = benchmark.table(json.loads(benchmark.RESULTS.read_text()))
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "adapters.md").read_text()
