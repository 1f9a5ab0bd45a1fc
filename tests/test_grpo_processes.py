"""The same global batch gives the same update on one process and on two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grpo_processes import CASES, PROMPTS, evaluated, run

from structadapt.grpo import processes

pytestmark = pytest.mark.slow
TIMES = ("tokens_per_second", "rollout_seconds", "update_seconds")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """[what came out, for each of two gloo processes]."""
    out = tmp_path_factory.mktemp("two") / "out.pt"
    script = Path(__file__).parent / "grpo_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(out)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def apart(left, right):
    """The largest relative difference between two sets of parameters."""
    return max(float((left[n] - right[n]).norm() / right[n].norm().clamp(min=1e-9)) for n in right)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(two, name):
    """Three groups of an odd number of prompts, of unequal lengths, the last one short."""
    parameters, records = run(name)
    start, _ = run(name, steps=0)
    assert apart(start, parameters) > 1e-2, "it moved"
    for found, seen in (rank[name] for rank in two):
        assert apart(found, parameters) < 1e-6
        assert len(seen) == len(records)
        for here, there in zip(records, seen, strict=True):
            words = [[w for w in r["alarms"] if w.startswith("word")] for r in (here, there)]
            assert words[0] == words[1] == [f"word {here['step'] + 1}: of 0"]
            for key in here.keys() - set(TIMES) - {"alarms"}:
                assert there[key] == pytest.approx(here[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", ["dapo", "fsdp", "whole"])
def test_they_go_on_where_they_were_stopped(two, name):
    for rank in two:
        whole, resumed = rank[name], rank[f"{name} resumed"]
        assert all(torch.equal(whole[0][n], resumed[0][n]) for n in whole[0])
        first = 0 if name == "whole" else 1
        assert [r["reward"] for r in resumed[1]] == [r["reward"] for r in whole[1]][first:]


@pytest.mark.parametrize("sharded", [False, True])
def test_an_evaluation_is_spread(two, sharded):
    whole, _ = evaluated()
    (first, its), (second, others) = (rank[f"evaluate {sharded}"] for rank in two)
    assert first == second == whole
    assert 0 < whole["mean"] < 1 and whole["count"] == 3 * len(PROMPTS)
    own = [[p for p in PROMPTS[i::2] for _ in range(3)] for i in range(2)]
    assert [its, others] == own
    assert all("rewards failed" in rank["evaluate, broken"] for rank in two)
    assert "another process failed" in two[0]["evaluate, broken"]


def test_one_process_is_all_there_is():
    assert processes.rank_and_size() == (0, 1)
    assert processes.total([1.0, 2.0]) == [1.0, 2.0]
    assert processes.gather("x") == ["x"] and processes.any_of(True)
    with pytest.raises(KeyError):
        processes.whole(lambda: {}["x"])
