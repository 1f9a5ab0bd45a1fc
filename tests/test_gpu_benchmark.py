"""The GPU benchmark runs tiny on the CPU, goes on where it stopped, and times nothing wrong."""

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = {"ceilings", "check", "sanitize", "tune", "lora", "dora", "quanta", "head", "block"}
KERNELS = {"narrow", "gemm", "dy_pass", "over_rows", "dora_norm", "dora_epilogue", "gate",
           "chain3", "chain4", "inputs3", "inputs4", "logprob", "lora_forward", "lora_backward",
           "dora_forward"}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the benchmark by name, without "gpu_"."""
    sys.path.insert(0, str(BENCHMARKS))
    names = ("counts", "gpu_cases", "gpu_checks", "gpu_parts", "gpu_peers", "gpu_results",
             "gpu_tiles", "gpu_timing", "gpu_tune", "plot", "gpu")  # fmt: skip
    yield {name.removeprefix("gpu_"): importlib.import_module(name) for name in names}
    sys.path.remove(str(BENCHMARKS))
    for name in names:
        del sys.modules[name]


def smoke(folder, *arguments):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--smoke", "--out", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a whole smoke run."""
    folder = tmp_path_factory.mktemp("gpu")
    before = sorted((BENCHMARKS.parent / "kernels" / "configs").iterdir())
    done = smoke(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((BENCHMARKS.parent / "kernels" / "configs").iterdir()) == before
    return folder


@pytest.fixture
def results(out):
    return json.loads((out / "gpu_cpu_interpreter.json").read_text())


# -- a whole run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_and_every_kernel(results):
    assert results["smoke"] and "not a measurement" in results["about"]
    assert {key.split("/")[0] for key in results["cells"]} == PARTS
    states = {key: cell["status"] for key, cell in results["cells"].items()}
    assert {s for k, s in states.items() if not k.startswith("sanitize/")} == {"ok"}
    assert {c.get("kernel") for c in results["cells"].values()} - {None} == KERNELS
    assert {"torch", "triton", "peft"} <= results["machine"]["versions"].keys()
    assert all(cell["stamp"]["commit"] == results["machine"]["commit"]
               for cell in results["cells"].values())  # fmt: skip


@pytest.mark.slow
def test_providers_and_their_numbers(results):
    wanted = {
        "lora": {"frozen", "ours", "ours cublas", "ours triton", "torch twin", "addmm", "compile"},
        "dora": {"frozen", "ours", "ours cublas", "ours triton", "torch twin", "compile"},
        "quanta": {"frozen", "ours", "torch twin", "einsum"},
        "head": {"frozen", "ours", "torch twin", "naive"},
        "block": {"frozen", "ours", "torch twin"},
    }
    for key, cell in results["cells"].items():
        op = key.split("/")[0]
        if op not in wanted:
            continue
        done = {k: e for k, e in cell["providers"].items() if e["status"] == "ok"}
        assert wanted[op] <= done.keys()
        others = [e["status"] for k, e in cell["providers"].items() if k not in done]
        assert set(others) <= {"not installed"}, key
        for entry in done.values():
            assert entry["mode"]["step"] == "clock" and entry["peak_bytes"] is None
            assert entry["rounds"] == len(entry["rounds_ms"]["step"]) == 2
            low, middle, high = (entry["ms"]["step"][k] for k in ("p20", "median", "p80"))
            assert 0 < low <= middle <= high
            assert entry["ratio"]["step"]["median"] > 0 or cell["case"]["op"] == "head"
        assert done["frozen"]["ratio"]["fwd"]["median"] == 1
        assert cell["predicted"]["step"] > 1 and cell["count"]["step"]["flops"] > 0


@pytest.mark.slow
def test_the_table_is_one_that_the_library_reads(results, out):
    table = json.loads((out / "table_smoke.json").read_text())
    assert table == results["table"]
    assert table["inherits"] == "interpreter" and table["kernels"].keys() == KERNELS
    for kernel, entries in table["kernels"].items():
        for entry in entries:
            assert entry["case"] and entry["tile"], kernel


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(out, results):
    begin = time.perf_counter()
    assert smoke(out).returncode == 0
    assert time.perf_counter() - begin < 20
    again = json.loads((out / "gpu_cpu_interpreter.json").read_text())
    assert again["cells"] == results["cells"]
    assert again["seconds"].keys() == {*PARTS, "ceilings end"}


def test_a_part_alone_and_without_time(tmp_path):
    done = smoke(tmp_path, "--part", "quanta", "check", "--seconds", "0")
    assert done.returncode == 1  # nothing was checked, so nothing may be timed
    cells = json.loads((tmp_path / "gpu_cpu_interpreter.json").read_text())["cells"]
    checks = {cell["status"] for key, cell in cells.items() if key.startswith("check/")}
    assert checks == {"not reached"}
    assert cells["quanta/not timed"]["wrong"] == "no check was reached"
    assert {key.split("/")[0] for key in cells} == {"check", "quanta"}


def test_smoke_writes_to_a_place_of_its_own(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--smoke", "--part", "ceilings"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0 and str(tmp_path) in done.stdout.splitlines()[-1]
    assert len(list(tmp_path.glob("gpu_smoke_*/gpu_cpu_interpreter.json"))) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device: --smoke" in done.stderr


# -- what is wrong is not timed --------------------------------------------------------------------


@pytest.fixture
def store(benchmark, tmp_path):
    return benchmark["results"].Results(tmp_path, CPU, smoke=True)


def budget(benchmark, seconds=1e3):
    made = benchmark["results"].Budget(seconds, {"part": 1.0})
    made.begin("part")
    return made


def test_a_failing_check_blocks_the_timing(benchmark, store, monkeypatch):
    lora, right = benchmark["cases"].lora, benchmark["cases"].lora.lora_forward

    def wrong(*arguments):
        y, h = right(*arguments)
        y[:, -1] *= 1.05  # one column
        return y, h

    monkeypatch.setattr(lora, "lora_forward", wrong)
    settings = benchmark["parts"].Settings(rounds=2, smoke=True)
    benchmark["parts"].layer_part(store, budget(benchmark), settings, "lora")
    failed = [c for c in store.of("check").values() if c["status"] == "failed"]
    assert failed and all("y is" in c["wrong"] for c in failed)
    assert list(store.of("lora")) == ["lora/not timed"]
    assert "a check failed: y is" in store.cells["lora/not timed"]["wrong"]


def test_a_result_that_changes_is_a_fault(benchmark, monkeypatch):
    checks, right, calls = benchmark["checks"], benchmark["checks"].kernels, []

    def wavering(*arguments):
        found = right(*arguments)
        calls.append(1)
        found["dx"].view(torch.int16)[0, 0] += len(calls) > 1  # one bit
        return found

    monkeypatch.setattr(checks, "kernels", wavering)
    cell = checks.run_check(checks.checks(True)[0], CPU)
    assert cell == {**cell, "status": "failed", "wrong": "two runs differ in dx"}


def test_a_wrong_provider_is_not_timed(benchmark, monkeypatch):
    parts, peers = benchmark["parts"], benchmark["peers"]

    def off(problem):
        return peers.Provider(lambda x: 1.1 * torch.nn.functional.linear(x, problem.W))

    def missing(problem):
        raise peers.NotInstalledError("nowhere")

    def broken(problem):
        raise ZeroDivisionError("x")

    made = {"frozen": peers.frozen, "ours": off, "peft": missing, "compile": broken}
    monkeypatch.setattr(parts, "providers", lambda *_: made)
    case = parts.cases("lora", True)[0]
    cell = parts.time_case(case, parts.Settings(2, True), CPU, None)
    assert cell["status"] == "failed" and "ours: dx is" in cell["wrong"]
    states = {name: e["status"] for name, e in cell["providers"].items()}
    assert states == {"frozen": "ok", "ours": "failed", "peft": "not installed", "compile": "error"}
    assert "ms" not in cell["providers"]["ours"] and cell["predicted"] is None


def test_a_tile_with_other_numbers_is_not_chosen(benchmark):
    def make(device, sets):
        def call(i, tile):
            if tile["N"] == 2:
                raise RuntimeError("out of resource: shared memory")
            time.sleep(0.02 / tile["N"])  # the wrong one is the fastest
            return [torch.ones(4) * (1.0 if tile["N"] == 1 else 1.5)]

        return call

    class Three(benchmark["tiles"].Tunable):
        def candidates(self, device, smoke):
            return [{"N": 1}, {"N": 2}, {"N": 4}]

    cell = benchmark["tune"].tune(Three("gemm", {"rank": 1}, make, 1), CPU, True)
    assert cell["tile"] == {"N": 1}
    assert "out of resource" in cell["tried"][1]["wrong"]
    assert "off the table's tile" in cell["tried"][2]["wrong"]


# -- timing on a device: a stand-in for torch.cuda ------------------------------------------------


class Stream:
    def wait_stream(self, other): ...


class Event:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.clock

    def synchronize(self): ...

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    def __init__(self):
        self.calls = []

    def replay(self):
        Event.clock += 3.0


@pytest.fixture
def device(benchmark, monkeypatch):
    """A device on which a call takes a millisecond by itself, and three calls 3 in a graph."""
    state = {"capturing": False, "mode": 0}

    @contextlib.contextmanager
    def capture(graph, pool):
        state["capturing"] = True
        yield
        state["capturing"] = False

    fakes = {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
        "get_sync_debug_mode": lambda: state["mode"],
        "set_sync_debug_mode": lambda mode: state.update(mode=mode),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_a_call_is_recorded_over_all_sets(benchmark, device):
    seen = []

    def call(i):
        if device["capturing"]:
            seen.append(i)

    timer = benchmark["timing"].Timer(call, 3, torch.device("cuda")).prepare()
    assert (timer.mode, timer.note, seen, device["mode"]) == ("graph", "", [0, 1, 2], 0)
    assert timer.sample() == 1.0 and timer.repeats == 1


def test_a_call_that_waits_or_fails_to_record_is_timed_with_events(benchmark, device):
    def waiting(i):
        Event.clock += 0.25
        if device["mode"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    timer = benchmark["timing"].Timer(waiting, 3, torch.device("cuda")).prepare()
    assert timer.mode == "events" and "synchronizing" in timer.note and device["mode"] == 0
    assert timer.sample() == 0.25 and timer.repeats == 3  # 2 ms by calls of 0.75

    def unrecordable(i):
        if device["capturing"]:
            device["capturing"] = False
            raise RuntimeError("not while capturing")

    timer = benchmark["timing"].Timer(unrecordable, 3, torch.device("cuda")).prepare()
    assert timer.mode == "events" and "not while capturing" in timer.note


# -- results ---------------------------------------------------------------------------------------


def test_cells_of_other_code_are_dropped(benchmark, store, tmp_path):
    store.put("check/a", {"status": "ok"})
    store.put("check/b", {"status": "not reached"})
    again = benchmark["results"].Results(tmp_path, CPU, smoke=True)
    again.drop_stale()
    assert again.done("check/a") and not again.done("check/b")
    other = benchmark["results"].Results(tmp_path, CPU, smoke=True, commit="another")
    other.drop_stale()
    assert not other.cells
    assert not benchmark["results"].Results(tmp_path, CPU, smoke=True, fresh=True).cells


def test_a_timed_cell_depends_on_the_tiles(benchmark, store, monkeypatch):
    store.put("lora/a", {"status": "ok"})
    store.put("check/a", {"status": "ok"})
    launch = benchmark["results"]._launch
    monkeypatch.setattr(launch, "table", lambda device: {"gemm": []})
    store.drop_stale()
    assert [*store.cells] == ["check/a"]


def test_a_killed_write_leaves_the_old_file(benchmark, store, monkeypatch):
    store.put("check/a", {"status": "ok"})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put("check/b", {"status": "ok"})
    assert [*json.loads(store.path.read_text())["cells"]] == ["check/a"]


def test_unused_time_goes_to_the_others(benchmark):
    shared = benchmark["results"].Budget(100, {"a": 1.0, "b": 3.0})
    shared.begin("a")
    assert 20 < shared.left <= 25
    shared.begin("b")
    assert 95 < shared.left <= 100


@pytest.mark.slow
def test_the_table_can_be_written_from_the_results(benchmark, results, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(results))
    gpu, launch = importlib.import_module("gpu"), benchmark["results"]._launch
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    with pytest.raises(SystemExit, match="no measured table"):
        gpu.table_again(path)
    machine = {**results["machine"], "device": "NVIDIA H200"}
    path.write_text(json.dumps({**results, "smoke": False, "machine": machine}))
    gpu.table_again(path)
    assert json.loads((tmp_path / "nvidia_h200.json").read_text()) == results["table"]


# -- counts ----------------------------------------------------------------------------------------


def test_the_flops_of_lora_are_those_that_torch_counts(benchmark):
    from structadapt.kernels import lean

    counts = benchmark["counts"]
    M, N, K, r = 48, 80, 32, 8
    x, dy, W = torch.randn(M, K), torch.randn(M, N), torch.randn(N, K)
    A, B = torch.randn(r, K), torch.randn(N, r)
    # The counter misses the one in place.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        _, h = lean.lora_forward(x, W, None, A, B, 2.0)
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        lean.lora_backward(dy, x, h, W, A, B, 2.0, (True, False, False, True, True))
    for plan in ("triton", "cublas"):
        assert counts.flops(counts.lora_forward(M, N, K, r, plan)) == forward.get_total_flops()
        assert counts.flops(counts.lora_backward(M, N, K, r, plan)) == backward.get_total_flops()
    large = counts.flops(counts.lora_backward(M, N, K, 4 * counts.SPLIT_RANK))
    assert large == 2 * M * N * K + 4 * M * 4 * counts.SPLIT_RANK * (N + K)


def test_the_docs_have_the_table_of_counts(benchmark):
    root = Path(__file__).parents[1]
    results = sorted((root / "docs" / "results").glob("gpu_*.json"))
    content = json.loads(results[0].read_text()) if results else None
    assert benchmark["counts"].table(results=content) in (root / "docs" / "kernels.md").read_text()


def test_what_was_measured_stands_beside_what_was_counted(benchmark):
    counts = benchmark["counts"]
    case = counts.cases("lora")[0]
    cell = {
        "case": {**dataclasses.asdict(case), "before": [], "after": []},
        "providers": {"ours": {"ratio": {k: {"median": v} for k, v in (("fwd", 1.5), ("bwd", 2))}}},
    }
    found = counts.table(results={"cells": {"lora/one": cell}}).splitlines()
    assert found[2].endswith("| 1.50 / 2.00 |") and "not measured yet" in found[3]
    assert "not measured yet" in counts.table().splitlines()[2]


def test_the_flops_of_a_chain_are_those_that_torch_counts(benchmark):
    from structadapt.kernels import reference

    counts, cases = benchmark["counts"], benchmark["cases"]
    before, after = (4, 6, 5), (4, 6, 7)
    gates = cases.near_identity(before, after, lambda *s, scale: scale * torch.randn(s))
    x = torch.randn(9, 120)
    with FlopCounterMode(display=False) as counted:
        reference.quanta_apply(x, gates)
    chain = counts.quanta_forward(9, before, after)[:-1]
    assert counts.flops(chain) == counted.get_total_flops()


def test_the_predicted_ratios(benchmark):
    """Those of the floors: products and traffic at 790 TFLOP/s and 4.3 TB/s."""
    counts = benchmark["counts"]
    case = counts.Case("lora", 8192, 4096, 4096, 16)
    assert counts.ratios(case, 790, 4.3)["fwd"] == pytest.approx(1.049, abs=1e-3)
    assert counts.target(case) == {"fwd": 1.06, "bwd": 1.12}
    assert counts.target(counts.Case("lora", 2048, 4096, 4096, 16)) == {}
    cube = counts.Case("quanta", 8192, 4096, 4096, 0, (16,) * 3, (16,) * 3)
    assert counts.ratios(cube, 790, 4.3)["fwd"] == pytest.approx(1.188, abs=2e-3)
    head = counts.Case("head", 8192, 152064, 4096)
    assert 2 < counts.ratios(head, 790, 4.3)["step"] < 2.5
    lines = counts.table().splitlines()
    assert len(lines) == 2 + sum(len(counts.cases(op)) for op in ("lora", "dora", "quanta", "head"))
    assert "1.06 / 1.12" in lines[2]


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_pictures_come_from_the_json(benchmark, out, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert (
        benchmark["plot"].main([str(out / "gpu_cpu_interpreter.json"), "--out", str(tmp_path)]) == 0
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"gpu_cpu_interpreter_{kind}.{form}"
                     for kind in ("ratios", "roofline") for form in ("png", "svg")}  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert benchmark["plot"].main([str(out / "gpu_cpu_interpreter.json"), "--rows", "3"]) == 1


def test_pictures_say_what_they_need(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark["plot"], "plt", None)
    assert benchmark["plot"].main(["nothing.json"]) == 2
    assert "pip install structadapt[plot]" in capsys.readouterr().err
