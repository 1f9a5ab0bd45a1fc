"""A few hundred of each of benchmarks/reliability.py, and that its measures find what is wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stopped_runs
import torch

import structadapt as sa
from structadapt import adapter_file, files

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODULES = ("reliability_mutants", "reliability_mutations", "reliability_cases",
           "reliability_folders", "reliability_attacks", "reliability_kills", "reliability_stream",
           "reliability_training", "reliability_disk", "reliability")  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the benchmark by name, without "reliability_"."""
    before = [*sys.path]
    sys.path.insert(0, str(BENCHMARKS))
    yield {n.removeprefix("reliability_"): importlib.import_module(n) for n in MODULES}
    sys.path[:] = before
    for name in MODULES:
        sys.modules.pop(name)


def lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("population", ["saved", "resealed", "peft"])
def test_mutated_files(benchmark, population, tmp_path):
    found = benchmark["mutations"].run_chunk(population, 10**6, 400, tmp_path)
    assert not found["failures"]
    assert found["outcomes"]["refused"] > 250 and len(found["mutations"]) > 8
    assert ("loaded as it says" in found["outcomes"]) == (population != "saved")


def test_an_altered_file_that_is_accepted_is_found(benchmark, monkeypatch, tmp_path):
    """The measure can fail: without the seal it does, and with a loader that changes the model."""
    monkeypatch.setattr(adapter_file, "has_seal", lambda data, seal: True)
    found = benchmark["mutations"].run_chunk("saved", 0, 100, tmp_path)
    assert found["outcomes"]["accepted"] > 10 and "accepted" in found["failures"][0]

    def careless(model, path):
        next(model.parameters()).data.add_(1)
        raise ValueError

    monkeypatch.setattr(benchmark["mutations"].sa, "load", careless)
    found = benchmark["mutations"].run_chunk("saved", 0, 10, tmp_path)
    assert found["outcomes"] == {"changed": 10}


def test_a_script_run_makes_the_table_and_changes_nothing(benchmark, tmp_path):
    """Attacks fork, so they are made in a process of one thread."""
    committed = benchmark["reliability"].RESULTS
    before = committed.read_bytes() if committed.exists() else None
    out = tmp_path / "smoke.json"
    program = [sys.executable, BENCHMARKS / "reliability.py", "--smoke", "--only", "attacks"]
    done = subprocess.run([*program, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    families = json.loads(out.read_text())["attacks"]["result"]["families"]
    assert len(families) == 10 and sum(f["cases"] for f in families.values()) >= 20
    problems = [line for f in families.values() for line in f["wrong"]]
    slow = [line for line in problems if line.endswith((" s", " MiB"))]  # of a busy machine
    assert problems == slow
    assert len(lines(done.stdout)) == 2 + 9 and "not measured yet" in done.stdout
    assert (committed.read_bytes() if committed.exists() else None) == before


def test_attacks_are_a_thousand_and_named(benchmark):
    cases = benchmark["attacks"].cases()
    assert len(cases) >= 1000 and {case.family for case in cases} >= {"sizes", "lies", "indexes"}


# -- memory and numbers ----------------------------------------------------------------------------


def test_a_leak_is_found(benchmark):
    training = benchmark["training"]
    assert training.slope([(0, 5), (100, 409_605), (200, 819_205)]) == pytest.approx(4096)
    # In a process of its own: one that freed much before has room for the leak.
    code = "import reliability_training as t; print(t.train(200, 100, 2**17)['bytes_a_step'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) > 2**16


def test_merging_does_not_drift(benchmark, adapter):
    for dtype in (torch.float32, torch.bfloat16):
        assert benchmark["training"].merge_cycles(adapter, dtype, 5) == 0


def test_a_drift_is_found(benchmark, monkeypatch):
    unmerge = sa.unmerge

    def careless(model):
        unmerge(model)
        model[0].weight.data[0, 0] += 1

    monkeypatch.setattr(benchmark["training"].sa, "unmerge", careless)
    assert benchmark["training"].merge_cycles(sa.LoRA(rank=2), torch.float32, 3) == 3


def test_a_checkpoint_of_shards_is_read(benchmark, tmp_path):
    stream = benchmark["stream"]
    written = stream.write(tmp_path, shrink=64)
    assert written["shards"] == 4 and written["tensors"] == 291 and not written["holes"]
    threads = torch.get_num_threads()
    found = stream.read(tmp_path, "reading")
    torch.set_num_threads(threads)
    vectors = sum(shape[0] for shape in stream.layout(64).values() if len(shape) == 1)
    assert found["values"] == written["bytes"] // 2 - vectors
    assert sum(torch.Size(s).numel() for s in stream.layout().values()) == 8_030_261_248


# -- states and disks ------------------------------------------------------------------------------


def test_a_state_with_another_piece_is_passed_over(tmp_path):
    for seal in (False, True):
        found = stopped_runs.mutated_states(tmp_path / str(seal), seal, lambda n: n % 25 == 3)
        verdicts = [verdict.partition(":")[0] for verdict in found.values()]
        assert len(verdicts) > 4
        if not seal:
            assert {*verdicts} == {"passed over"}
        else:
            assert verdicts.count("the same") < len(verdicts) // 2


def test_a_state_without_a_seal_is_read_as_it_was(tmp_path):
    """Of a version before there were seals."""
    expected = stopped_runs.without_times(stopped_runs.Run(None).records())
    stopped_runs.Run(None, tmp_path).records(4)
    for folder in tmp_path.iterdir():
        content = json.loads((folder / "state.json").read_text())
        del content["format"], content["seal"]
        (folder / "state.json").write_text(json.dumps(content))
    rest = stopped_runs.without_times(stopped_runs.Run(None, tmp_path).records())
    assert rest == expected[3:]


@pytest.mark.parametrize("name", ["save", "export_peft", "export_merged", "Report.save", "plots"])
def test_a_full_disk_and_a_read_only_folder(benchmark, name):
    found = benchmark["disk"].measure_disks([name])[name]
    if found.pop("tmpfs") is False:
        found.pop("read-only")  # of folders that belong to whoever may write anywhere
    assert {*found.values()} <= {"", "written"} and "" in found.values()


def test_two_savers(benchmark):
    found = benchmark["disk"].measure_savers(5, ("save", "export_peft"))
    for result in found.values():
        assert result["reads"] and result["whole"] and not result["torn"] + result["failed"]


# -- the page --------------------------------------------------------------------------------------


def test_the_table_is_the_committed_measurement(benchmark):
    results = benchmark["reliability"].RESULTS
    table = benchmark["reliability"].table(
        json.loads(results.read_text()) if results.exists() else {}
    )
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "reliability.md").read_text()


def test_a_folder_that_another_saver_takes_away_is_free(tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    look = os.listdir

    def taken(path):
        os.rename(path, tmp_path / "aside")
        return look(path)

    monkeypatch.setattr(os, "listdir", taken)
    files.refuse_foreign(tmp_path / "merged", lambda name: False)
    monkeypatch.undo()
    (tmp_path / "aside" / "notes").touch()
    with pytest.raises(FileExistsError, match="aside also holds notes"):
        files.refuse_foreign(tmp_path / "aside", lambda name: False)
    with pytest.raises(FileExistsError, match="notes is a file"):
        files.refuse_foreign(tmp_path / "aside" / "notes", lambda name: False)
