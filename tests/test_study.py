"""The study: grids, cells that go on, workers, engines and the report."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from structadapt.cli import main
from structadapt.examples.process import StepLog
from structadapt.grpo import Config
from structadapt.study import (
    claims,
    collect,
    distributed,
    dry_run,
    folders,
    grid,
    report,
    runner,
    sft,
    statistics,
    tables,
    tasks,
)  # fmt: skip
from structadapt.study import runs as cells
from structadapt.study.cell import Cell
from structadapt.study.evidence import edge
from structadapt.study.grid import parse

ROOT = Path(__file__).parents[1]
REPORTS = ["study", "study/small", "study/smollm"]  # in docs/
SMALL = """
name = "tried"
[run]
model = "tiny"
task = "sorting"
prompts = 24
batch = 8
group = 4
cold_start = 0.1
problems = 16
checkpoint_every = 1
monitor = 1
[[cells]]
adapter = "lora"
rank = [2, 4]
scale = [{alpha = "2r"}, {alpha = 4}]
lr = 1e-3
seed = 0
[[cells]]
adapter = "full"
lr = 1e-3
"""


pytestmark = pytest.mark.usefixtures("one_thread")  # as the workers have: bit for bit


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A grid and the folder of its finished runs."""
    out = tmp_path_factory.mktemp("study")
    path = out / "grid-in.toml"
    path.write_text(SMALL)
    folder = out / "runs"
    assert main(["study", "run", str(path), "--out", str(folder), "--workers", "2", "--quiet"]) == 0
    return parse(SMALL), folder


# -- grids -----------------------------------------------------------------------------------------


def test_a_table_is_the_product_of_its_lists():
    found = parse(SMALL)
    assert [(c.adapter, c.rank, c.alpha) for c in found.cells] == [
        ("lora", 2, "2r"), ("lora", 4, "2r"), ("lora", 4, 4), ("full", None, None),
    ]  # fmt: skip  # rank 2 with alpha 4 is alpha = 2r: one run
    assert len({c.id for c in found.cells}) == 4
    assert found.cell("3").adapter == "full" and found.cell(found.cells[1].id) == found.cells[1]


@pytest.mark.parametrize(
    ("rule", "batch", "rate"), [("fixed", 256, 1e-3), ("linear", 256, 4e-3), ("sqrt", 16, 5e-4)]
)
def test_rates_follow_their_rule(rule, batch, rate):
    cell = Cell("full", 1e-3, lr_rule=rule, batch=batch)
    assert math.isclose(cell.rate, rate)
    assert Cell("full", rate, batch=batch).id == cell.id  # the same run


def test_one_scale_is_one_run_however_it_is_said():
    one = Cell("lora", 1e-3, rank=8, alpha="2r")
    same = (
        replace(one, alpha=16),
        replace(one, alpha=2.0, scaling="constant"),
        replace(one, alpha=5.65685, scaling="alpha/sqrt(r)"),
        replace(one, checkpoint_every=3),
    )
    assert {cell.id for cell in same} == {one.id}
    other = [replace(one, alpha=17), replace(one, seed=1), replace(one, task="sorting"),
             replace(one, grpo={"loss": "grpo"}), replace(one, prompts=9)]  # fmt: skip
    assert len({cell.id for cell in [one, *other]}) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "not TOML"),
        ("[run]\nseed = 1", r"no \[\[cells\]\]"),
        ("[[cell]]\nlr = 1", "has no 'cell'; near: cells"),
        ('[[cells]]\nadapter = "lor"\nlr = 1', "adapter must be one of lora"),
        ('[[cells]]\nadapter = "lora"\nrnk = 8\nlr = 1', "no 'rnk'; near: rank"),
        ('[[cells]]\nadapter = "lora"\nlr = []', "lr is an empty list"),
        ('[[cells]]\nadapter = "lora"', "lr is missing"),
        ('[[cells]]\nadapter = "lora"\nlr = true', "lr must be a number"),
        ('[[cells]]\nadapter = "lora"\nlr = nan', "lr must be a number"),
        ('[[cells]]\nadapter = "full"\nlr = 1\nrank = 8', "rank does not apply"),
        ('[[cells]]\nadapter = "lora"\nlr = 1\nrank = -1', "rank must be a positive integer"),
        ('[[cells]]\nadapter = "lora"\nlr = 1\nscale = {alpha = "2r"}', "beside a rank"),
        ('[[cells]]\nadapter = "lora"\nlr = 1\nscale = {alfa = 2}', "near: alpha"),
        (
            '[[cells]]\nadapter = "lora"\nlr = 1\nrank = 8\nalpha = 3\nscale = {alpha = "2r"}',
            "alpha = 3 and scale = .*2r.* both say alpha",
        ),
        (
            '[run]\nscale = {alpha = "2r"}\n[[cells]]\nadapter = "lora"\nlr = 1\nrank=8\nalpha = 3',
            "both say alpha",
        ),
        ('[[cells]]\nadapter = "quanta"\nlr = 1\naxes = "8x"', "axes must be"),
        ('[[cells]]\nadapter = "full"\nlr = 1\nbatch = 0', "batch must be from 1"),
        ('[[cells]]\nadapter = "full"\nlr = 1\n[grpo]\nlos = "grpo"', "los"),
        ('[[cells]]\nadapter = "full"\nlr = 1\n[grpo]\nseed = 1', "seed belongs to the cells"),
        ('[[cells]]\nadapter = "full"\nlr = 1\n[grpo]\nloss = "x"', "loss must be one of"),
        ('[[cells]]\nadapter = "full"\nlr = 1\n[grpo]\nkl_coef = 0.1', "reference policy"),
        ('[[cells]]\nadapter = "full"\nlr = 1\n[cluster.slurm]\na = 1', "near|has no 'slurm'"),
        ('[[cells]]\nadapter = "full"\nlr = 1' + "0" * 400, "lr must be|Exceeds|too large"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ntask = "chess"', "task must be one of"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ntask = "sums"', "is not for model"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ntask = "gym"\nmodel = "x"', "which need it"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ntarget = 5', "target must be text"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ncheckpointing = "no"', "must be true or false"),
        ('[[cells]]\nadapter = "full"\nlr = 1\nseed = -1', "seed must be from 0"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ncold_start = 5', "cold_start must be from 0 to 1"),
        ('[[cells]]\nadapter = "full"\nlr = 1\nmemory_gib = "80"', "memory_gib must be a number"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ndevice = "cpuu"', "none of torch's"),
        ('[[cells]]\nadapter = "full"\nlr = 1\ndtype = "bfloat16"', "needs dtype = float32"),
        ('[[cells]]\nadapter = "full"\nlr = 1\naxes = [[8, 4]]', "axes must be"),
        ('[[cells]]\nadapter = "full"\nlr = 1\nmethod = "sft"\nprocesses = 2', "one process"),
    ],
)
def test_a_wrong_grid_is_refused(text, said, tmp_path, capsys):
    path = tmp_path / "g.toml"
    path.write_text(text)
    assert main(["study", "run", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "g.toml" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tables_scale_stands_over_what_all_share():
    text = '[run]\nalpha = 3\n[[cells]]\nadapter = "lora"\nlr = 1\nrank = 8\nscale = {alpha = 8}'
    assert [cell.scale for cell in parse(text).cells] == [1.0]


def test_shipped_grids_are_whole():
    assert grid.shipped() == ["full", "paper", "small", "smollm"]
    assert {name: len(grid.read(name).cells) for name in grid.shipped()} == {
        "full": 672, "paper": 81, "small": 96, "smollm": 24,
    }  # fmt: skip
    with pytest.raises(ValueError, match="one of full, paper, small, smollm"):
        grid.read("smal")


def test_the_papers_grid_fits_its_machines(capsys):
    assert main(["study", "run", "paper", "--out", "unused", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 81 and all(row["fits"] for row in rows)
    llama = dry_run.model_of("meta-llama/Llama-3.1-8B")[0]
    assert sum(p.numel() for p in llama.parameters()) == 8_030_261_248
    assert not Path("unused").exists()


def test_a_dry_run_says_what_does_not_fit(tmp_path, capsys):
    path = tmp_path / "g.toml"
    path.write_text(SMALL.replace("[run]", "[run]\nmemory_gib = 0.001"))
    assert main(["study", "run", str(path), "--out", str(tmp_path / "o"), "--dry-run"]) == 1
    assert capsys.readouterr().out.count("more than 0.001 GiB") == 4


# -- tasks -----------------------------------------------------------------------------------------


def test_sorting_holds_out_whole_multisets():
    import random
    from itertools import islice

    learn, held = (
        {"".join(sorted(p["prompt"][:-1]))
         for p in islice(tasks.sorting_problems(random.Random(0), held_out=h), 2000)}
        for h in (False, True)
    )  # fmt: skip
    assert not learn & held and len(held) > 300
    assert tasks.sorting_problem("7402913") == {"prompt": "7402913=", "answer": "0123479"}


def test_deepmath_is_split_the_same_for_every_seed(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"question": f"q{i}", "final_answer": str(i), "difficulty": i % 10, "topic": "t"}
            for i in range(100)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    cell = Cell("full", 1e-3, task="deepmath", model="x", data=str(path), min_difficulty=5,
                prompts=20, problems=10)  # fmt: skip
    one, two = (tasks.task_of(replace(cell, seed=seed)) for seed in (0, 1))
    assert one.held_out == two.held_out and one.prompts != two.prompts
    assert not {r["answer"] for r in one.held_out} & {r["answer"] for r in one.prompts}
    with pytest.raises(ValueError, match="prompts is 50"):
        tasks.task_of(replace(cell, prompts=50))


def test_sft_learns_from_the_completions_alone():
    ids, targets = sft.padded([([1, 2], [3, 4]), ([5], [6])], torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert targets.tolist() == [[-100, 3, 4], [6, -100, -100]]


# -- runs ------------------------------------------------------------------------------------------


def test_every_cell_is_run_once(study, capsys):
    found, out = study
    assert main(["study", "status", str(out), "--json"]) == 0
    states = json.loads(capsys.readouterr().out)
    assert [(s["id"], s["state"], s["step"]) for s in states] == [
        (c.id, "done", 3) for c in found.cells
    ]
    stamp = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*.json*")}
    path = out / "grid.toml"
    assert main(["study", "run", str(path), "--out", str(out), "--quiet", "--json"]) == 0
    assert stamp == {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*.json*")}
    assert not list(out.glob("cells/*/states")) and not list(out.glob("cells/*/.held"))


def test_a_run_leaves_what_it_found(study):
    found, out = study
    folder = folders.folder_of(out, found.cells[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["before"]["problems"] == 16
    assert summary["before"]["sampled"] > 0 and summary["first_kl"] > 0
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["updates"] for step in steps) >= 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert len((folder / "monitor.jsonl").read_text().splitlines()) == 3
    assert (folder / "adapter.safetensors").exists() and (folder / "spectra").is_dir()
    assert (folders.folder_of(out, found.cells[3]) / "model.safetensors").exists()


def content(folder):
    """What a run computed, without its times."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        for name in ("tokens_per_second", "rollout_seconds", "update_seconds"):
            del step[name]
    return steps, (folder / "monitor.jsonl").read_text()


def test_a_stopped_cell_goes_on_as_if_it_had_not(study, tmp_path):
    found, out = study
    cell = found.cells[1]
    for count in (0, 1):
        left = iter(range(count))
        with pytest.raises(distributed.StoppedError):
            cells.run(cell, tmp_path / "cells" / cell.id, stop=lambda c=left: next(c, None) is None)
        assert folders.status([cell], tmp_path)[0].state == folders.HALTED
    cells.run(cell, tmp_path / "cells" / cell.id)
    whole, again = folders.folder_of(out, cell), tmp_path / "cells" / cell.id
    assert content(whole) == content(again)
    assert (whole / "adapter.safetensors").read_bytes() == (
        again / "adapter.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_killed_study_goes_on(study, tmp_path):
    found, out = study
    path = tmp_path / "g.toml"
    path.write_text(SMALL)
    command = [sys.executable, "-m", "structadapt.cli", "study", "run", str(path), "--out",
               str(tmp_path / "runs"), "--workers", "1", "--quiet"]  # fmt: skip
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/cells/*/states/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    locked = [p for p in tmp_path.glob("runs/cells/*") if not (p / "summary.json").exists()]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # its worker sees that nobody waits for it
        statuses = folders.status(found.cells, tmp_path / "runs")
        if all(s.state != folders.RUNNING for s in statuses):
            break
        time.sleep(0.1)
    assert locked and all(s.state != folders.RUNNING for s in statuses)
    subprocess.run(command, check=True)
    for cell in found.cells:
        assert content(folders.folder_of(out, cell)) == content(
            folders.folder_of(tmp_path / "runs", cell)
        )


def test_a_failed_cell_is_shown_and_tried_again_on_request(study, tmp_path, monkeypatch, capsys):
    path = tmp_path / "g.toml"
    path.write_text(SMALL.replace('adapter = "full"', 'adapter = "full"\nprompts = 8'))
    command = ["study", "run", str(path), "--out", str(tmp_path / "o"), "--cell", "3", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "accuracy", lambda *a: 1 / 0)
        assert main(command) == 1
    said = capsys.readouterr().out
    assert "1 failed" in said and "ZeroDivisionError: division by zero" in said
    assert main(command) == 1  # not tried again
    assert main(["study", "status", str(tmp_path / "o")]) == 1
    assert main([*command, "--retry"]) == 0
    assert not list(tmp_path.glob("o/cells/*/error.json"))


def test_a_cell_whose_process_dies_again_and_again_has_failed(tmp_path):
    cell = parse(SMALL).cells[3]
    folder = folders.folder_of(tmp_path, cell)
    folder.mkdir(parents=True)
    for deaths in range(runner.TRIES):
        with folders.held(folder) as counted:
            assert counted == deaths
            kept = (folder / ".held").read_text()
        (folder / ".held").write_text(kept)  # as a process that was killed leaves it
    assert runner.work([cell], tmp_path) == 1
    assert "died 3 times" in json.loads((folder / "error.json").read_text())["error"]


def test_one_process_holds_a_cell(tmp_path):
    with folders.claimed(tmp_path) as first, folders.claimed(tmp_path) as second:
        assert first is not None and second is None
    with folders.claimed(tmp_path) as third:
        assert third is not None


def test_no_two_workers_see_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    cell = Cell("full", 1e-3, device="cuda", processes=2)
    assert runner.devices_for([cell] * 9, None) == ["0,1", "2,3"]
    assert runner.devices_for([cell] * 9, 1) == ["0,1"] == runner.devices_for([cell], None)
    with pytest.raises(ValueError, match="needs 8 GPUs, and there are 5"):
        runner.devices_for([replace(cell, processes=8)], None)
    assert runner.devices_for([replace(cell, device="cpu", processes=1)] * 9, 3) == [None] * 3


def test_a_log_that_a_full_disk_cut_short_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "reward": 0.1}\n{"step": 1, "rew')
    log = StepLog(path)
    log.add({"step": 1, "reward": math.nan})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "reward": 0.1}, {"step": 1, "reward": None},
    ]  # fmt: skip


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for dry in ([], ["--dry-run"]):
        assert main(["study", "run", "small", "--out", str(tmp_path), *dry]) == 2
        assert "holds no study" in capsys.readouterr().err
        assert main(["study", "run", "small", "--out", str(tmp_path / "notes.txt"), *dry]) == 2
        assert "notes.txt is a file, and a study is a folder" in capsys.readouterr().err
        assert main(["study", "run", "small", "--out", str(tmp_path / "notes.txt/a/b"), *dry]) == 2
        assert "notes.txt is a file, and a study is a folder" in capsys.readouterr().err
    assert main(["study", "status", str(tmp_path)]) == 2
    assert main(["study", "report", str(tmp_path)]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_cells_folder_holds_no_other_cell(tmp_path):
    one, two = parse(SMALL).cells[:2]
    folders.note(one, tmp_path)
    with pytest.raises(ValueError, match="another cell: its alpha|another cell: its rank"):
        folders.note(two, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_cell_on_two_processes_is_the_cell_on_one(study, tmp_path, trained):
    found, out = study
    cell = replace(next(c for c in found.cells if c.adapter == trained), processes=2)
    with pytest.raises(distributed.StoppedError):
        runner.work([cell], tmp_path, stop=lambda: True)
    assert folders.status([cell], tmp_path)[0].state == folders.HALTED
    assert runner.work([cell], tmp_path) == 0
    one, two = folders.folder_of(out, cell), folders.folder_of(tmp_path, cell)
    first, second = (
        [json.loads(line)["grad_norm"] for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (one, two)
    )
    assert first == pytest.approx(second, rel=1e-4)
    a, b = (json.loads((f / "summary.json").read_text()) for f in (one, two))
    assert a["after"] == b["after"] and b["threads"] >= 1
    rows = json.loads((two / "spectra" / "report.json").read_text())["rows"]
    assert len(rows) == {"lora": 12, "full": 15}[trained]  # embeddings and head train too


# -- engines ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["submitit", "ray"])
def test_engines_run_the_same_cells(study, tmp_path, engine):
    pytest.importorskip(engine)
    _, out = study
    path = tmp_path / "g.toml"
    path.write_text(SMALL.replace("rank = [2, 4]", "rank = 2"))  # two cells
    local = ["--cluster", "local"] if engine == "submitit" else []
    command = [
        sys.executable,
        "-m",
        "structadapt.cli",
        "study",
        "run",
        str(path),
        "--out",
        str(tmp_path / "runs"),
        "--engine",
        engine,
        "--workers",
        "2",
        "--quiet",
        *local,
    ]
    subprocess.run(command, check=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    for cell in grid.read(path).cells:
        assert content(folders.folder_of(out, cell)) == content(
            folders.folder_of(tmp_path / "runs", cell)
        )


def test_an_engine_that_is_missing_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
        out = str(tmp_path / name)
        assert main(["study", "run", "small", "--out", out, "--engine", name]) == 2
        assert "pip install" in capsys.readouterr().err


# -- the report ------------------------------------------------------------------------------------


def test_the_report_reads_the_folders_alone(study, tmp_path, capsys):
    _, out = study
    assert main(["study", "report", str(out), "--to", str(tmp_path / "r"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["runs"]) == 4 and told["failed"] == []
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "not testable here" in page and page.count("<img") >= 2
    again = tmp_path / "r2"
    report.write(tmp_path / "r", again)  # from its study.json
    assert (again / "report.md").read_text() == (tmp_path / "r" / "report.md").read_text()
    assert (again / "study.json").read_text() == (tmp_path / "r" / "study.json").read_text()


def test_a_report_leaves_the_pictures_of_others(study, tmp_path):
    figures = tmp_path / "figures"
    figures.mkdir()
    for name in ("mine.png", "old.png"):
        (figures / name).write_bytes(b"")
    (tmp_path / "report.md").write_text("![a (b)](figures/old.png)\n![c](../figures/mine.png)")
    report.write(study[1], tmp_path)
    drawn = {p.name for p in figures.iterdir()} - {"mine.png"}
    assert (figures / "mine.png").exists() and "old.png" not in drawn and drawn
    assert drawn == set(report._pictured(tmp_path / "report.md"))


def test_a_report_counts_what_other_grids_planned_here(study, tmp_path):
    _, out = study
    shutil.copytree(out, tmp_path / "runs")
    one = SMALL[: SMALL.index("[[cells]]")] + '[[cells]]\nadapter = "full"\nlr = [1e-3, 2e-3]\n'
    (tmp_path / "runs" / "grid.toml").write_text(one)
    found = collect.collected(tmp_path / "runs")
    assert (len(found["runs"]), found["planned"]) == (4, 5)  # one is in both


@pytest.mark.parametrize("content", ["{}", "[1]", '{"before": null}'])
def test_a_summary_that_lacks_fields_is_named(study, tmp_path, content, capsys):
    found, out = study
    shutil.copytree(out, tmp_path / "runs")
    path = folders.folder_of(tmp_path / "runs", found.cells[0]) / "summary.json"
    path.write_text(content)
    for command in ("report", "status"):
        assert main(["study", command, str(tmp_path / "runs")]) == 2
        error = capsys.readouterr().err
        assert f"{path} is damaged: it has no " in error and "collapsed" in error


@pytest.mark.slow
@pytest.mark.parametrize("folder", REPORTS)
def test_the_committed_report_is_that_of_the_committed_figures(folder, tmp_path):
    committed = ROOT / "docs" / folder
    report.write(committed, tmp_path)
    assert (tmp_path / "report.md").read_text() == (committed / "report.md").read_text()
    drawn = {p.name for p in (tmp_path / "figures").iterdir()}
    assert drawn == {p.name for p in (committed / "figures").iterdir()}


def test_what_is_advised_is_what_was_measured():
    text = (ROOT / "docs" / "choosing.md").read_text()
    reports = [ROOT / "docs" / folder / "report.md" for folder in REPORTS]
    table = "".join(report.read_text() for report in reports)
    quoted = re.findall(r"[0-9]+\.[0-9] ± [0-9]+", text)
    assert len(quoted) >= 5 and all(value in table for value in quoted)
    runs = collect.collected(ROOT / "docs" / "study")["runs"]
    grpo = [r for r in runs if r["method"] == "grpo" and r["prompts"] == 2048]
    main_part = [r for r in statistics.parts(grpo)[0] if r["adapter"] in ("lora", "dora")]
    for adapter, least in (("lora", 2), ("dora", 1)):
        points = [(r["scale"] * r["rank"] * r["rate"], r["collapsed"])
                  for r in main_part if r["adapter"] == adapter and r["rank"] >= least]  # fmt: skip
        assert statistics.errors(points, 0.157) == (9 if adapter == "lora" else 0)
    assert "0.157, is wrong for 9" in text


def test_what_is_said_of_a_pretrained_model():
    runs = collect.collected(ROOT / "docs" / "study" / "smollm")["runs"]
    gained = {r["first_kl"]: r["after"]["sampled"] > r["before"]["sampled"] for r in runs}
    assert len(gained) == 24
    assert [kl < 0.49 for kl in gained] == [*gained.values()] and sum(gained.values()) == 16
    assert min(kl for kl, learned in gained.items() if not learned) > 1.03


def test_means_have_students_intervals():
    found = statistics.mean_of([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and math.isclose(found.half, 4.303 / math.sqrt(3))
    assert statistics.mean_of([5.0]) == statistics.Mean(5.0, None, 1)
    with pytest.raises(ValueError, match="no values"):
        statistics.mean_of([])


def test_limits_of_the_kl():
    points = [(0.1, False), (0.2, False), (0.3, True), (0.4, False), (0.9, True)]
    found = statistics.limits(points)
    assert (found.safe, found.collapse) == (0.2, 0.9)
    assert (found.largest_lived, found.smallest_died, found.errors) == (0.4, 0.3, 1)
    found = statistics.limits([(0.1, False), (0.2345, False), (0.7321, True), (2.0, True)])
    assert (found.safe, found.collapse, found.errors) == (0.23, 0.74, 0)  # rounded to be sure
    assert found.best == pytest.approx((0.2345 * 0.7321) ** 0.5)
    with pytest.raises(ValueError, match="nothing to choose"):
        statistics.limits(points[:2])


def row(rank, rate, accuracy, collapsed, **more):
    """A run as a report reads it."""
    alpha = more.pop("alpha", "2r")
    options = {"lr": rate, **{k: v for k, v in more.items() if k in Cell.__dataclass_fields__}}
    cell = Cell("lora", rank=rank, alpha=alpha, **options)
    plain = cell.plain()
    return {
        **dataclasses.asdict(cell), "alpha": plain.alpha, "scaling": plain.scaling,
        "rate": cell.rate, "scale": cell.scale, "before": {"sampled": 0.2},
        "after": {"sampled": accuracy}, "collapsed": collapsed, "first_kl": 0.1,
        "absorbed_at": 3 if collapsed else None, "spectra": None, "rewards": [0.2, accuracy],
        **{k: v for k, v in more.items() if k not in Cell.__dataclass_fields__},
    }  # fmt: skip


def verdicts(rows, judge=claims.judged):
    return {c.text.split(":")[0]: c.verdict for c in judge(rows)}


def test_claims_are_judged_by_their_criteria():
    cliff = [row(8, 1e-3, 0.5, False), row(128, 1e-3, 0.0, True), row(256, 1e-3, 0.0, True)]
    name = "LoRA has a cliff in rank"
    assert verdicts(cliff)[name] == "agrees"
    assert verdicts([*cliff, row(128, 1e-3, 0.4, False, seed=1)])[name] == "disagrees"
    assert verdicts(cliff[:2])[name] == "not testable here"  # not without rank 256
    assert set(verdicts(cliff).values()) <= {"agrees", "disagrees", "not testable here"}


def test_the_claim_of_the_batch_follows_the_rule():
    rows = [row(64, 1e-3, 0.6, False, batch=64)]
    for batch in (128, 256):
        rows += [row(64, 1e-3, 0.6, False, batch=batch),
                 row(64, 1e-3, 0.0, True, batch=batch, lr_rule="sqrt")]  # fmt: skip
    found = [c.verdict for c in claims.judged(rows) if c.text.startswith("Rank 64")]
    assert found == ["disagrees", "agrees", "not testable here"]  # fixed, sqrt, linear


def test_the_scale_decides_only_where_both_rules_were_run():
    name = "Not the rank but the update's scale makes the cliff"
    rows = []
    for rank, rate in ((16, 1e-2), (64, 3e-3), (256, 1e-3)):
        for lr in (1e-3, 3e-3, 1e-2):
            rows.append(row(rank, lr, 0.0 if lr >= rate else 0.5, lr >= rate))
    assert verdicts(rows, claims.beyond)[name] == "not testable here"
    same = [row(r["rank"], r["lr"], 0.5, r["lr"] == 1e-2, alpha=16) for r in rows]
    assert verdicts([*rows, *same], claims.beyond)[name] == "agrees"
    twin = [row(r["rank"], r["lr"], 0.5, r["collapsed"], alpha=16) for r in rows]
    assert verdicts([*rows, *twin], claims.beyond)[name] == "disagrees"
    none = [row(r["rank"], r["lr"], 0.5, False, alpha=16) for r in rows]
    assert verdicts([*rows, *none], claims.beyond)[name] == NOT_TESTABLE  # no edge was reached
    root = [row(r["rank"], r["lr"], 0.5, r["lr"] == 1e-2, alpha=5.657, scaling="alpha/sqrt(r)")
            for r in rows]  # fmt: skip
    said = [c.evidence for c in claims.beyond([*rows, *same, *root]) if c.text.startswith(name)]
    assert "alpha = 5.657, alpha/sqrt(r): r=16 0.01, r=64 0.01, r=256 0.01" in said[0]


def shaped(rank, collapsed, energy, effective=30.0, **more):
    """A run whose update has a shape."""
    spectra = {"topk_energy": energy, "stable_rank": 1 / energy, "effective_rank": effective}
    return row(rank, 1e-3, 0.5, collapsed, spectra=spectra, **more)


def test_updates_are_compared_with_those_of_their_rank():
    name = "With alpha = 2r, collapsed LoRA updates put their energy into fewer directions"
    rows = [shaped(64, c, 0.5 + 0.1 * c, 30 + c, seed=s) for c in (False, True) for s in (0, 1)]
    high = [shaped(256, c, 0.1 + 0.1 * c, seed=s) for c in (False, True) for s in range(4)]
    alone = [shaped(128, True, 0.01, seed=s) for s in range(9)]  # nothing of its rank lived
    rows += high + alone
    (found,) = [c for c in claims.judged(rows) if c.text == name]
    assert found.verdict == "agrees" and found.evidence.startswith("20 pairs")
    assert "top-1 energy in 100%" in found.evidence and "goes the other way" in found.evidence
    assert verdicts(high[:5])[name] == NOT_TESTABLE  # one that collapsed
    other = [shaped(64, True, 0.4, seed=s) for s in range(2, 9)]
    assert verdicts([*rows, *other])[name] == "disagrees"


def test_concentration_needs_three_runs_of_each_fate():
    name = "Concentration tells runs that collapsed from those that live, whatever the scale"
    rows = [shaped(64, c, 0.5 + 0.1 * c, seed=s) for c in (False, True) for s in (0, 1, 2)]
    assert verdicts(rows)[name] == "agrees" and verdicts(rows[:5])[name] == NOT_TESTABLE


def test_full_fine_tuning_lies_between_at_every_rank():
    name = "Full fine-tuning shows a milder form"
    energy = {"topk_energy": 0.3, "stable_rank": 3.0, "effective_rank": 9.0}
    ways = {"scale": None, "rank": None, "scaling": None, "alpha": None}
    rows = [shaped(64, False, 0.4), shaped(128, False, 0.35), shaped(8, False, 0.1)]
    rows += [{**row(8, 1e-3, 0.5, False, spectra={**energy, "topk_energy": e}), **ways,
              "adapter": adapter} for adapter, e in (("full", 0.3), ("quanta", 0.1))]  # fmt: skip
    rows.append(shaped(256, False, 0.1, alpha=16))  # another scale
    assert verdicts(rows)[name] == "agrees"
    assert verdicts([*rows, shaped(256, False, 0.2)])[name] == "disagrees"
    assert verdicts(rows[2:])[name] == NOT_TESTABLE


def test_the_claim_of_what_trains_on_follows_the_rule():
    rows = []
    for adapter, more in (("lora", {"rank": 8}), ("dora", {"rank": 16}), ("quanta", {"axes": 3})):
        rows += [{**row(8, 1e-3, 0.5, False, batch=batch), "adapter": adapter, "axes": None,
                  **more} for batch in claims.BATCHES]  # fmt: skip
        linear = [row(8, 1e-3, 0.1, adapter == "quanta", batch=b, lr_rule="linear")
                  for b in claims.BATCHES[1:]]  # fmt: skip
        rows += [{**r, "adapter": adapter, "axes": None, **more} for r in linear]
    found = [c for c in claims.judged(rows) if c.text.startswith("LoRA r=8, DoRA r=16")]
    assert [c.verdict for c in found] == ["agrees", NOT_TESTABLE, "disagrees"]
    assert "batch 256 1 of 1 collapsed" in found[2].evidence


def test_a_rank_that_was_not_run_at_the_batch_sizes_is_named():
    rows = [row(128, 1e-3, 0.0, True, batch=batch) for batch in claims.BATCHES]
    said = "(256 was not run at these batch sizes)"
    stays = lambda rows: next(  # noqa: E731
        c for c in claims.judged(rows) if c.text.startswith("Ranks 128 and 256 stay")
    )
    assert stays(rows).verdict == "agrees" and stays(rows).evidence.endswith(said)
    lived = [row(256, 1e-3, 0.5, False, batch=batch) for batch in claims.BATCHES]
    assert stays(rows + lived).verdict == "disagrees" and said not in stays(rows + lived).evidence


def test_supervised_runs_are_compared_with_their_twins():
    grpo = [row(256, 1e-3, 0.0, True, seed=seed) for seed in (0, 1)]
    sft = [row(256, 1e-3, 0.9, False, method="sft", rewards=[0.01, None, 0.9], first_kl=None)]
    name = "The cliff is a matter of RL"
    assert verdicts([*grpo, *sft])[name] == "agrees"
    assert verdicts([*grpo, row(256, 1e-3, 0.1, False, method="sft")])[name] == "disagrees"
    assert verdicts([grpo[0], row(256, 1e-3, 0.4, False, seed=1), *sft])[name] == NOT_TESTABLE
    dips = "The large first step ruins a supervised policy too, which then comes back"
    assert verdicts([*grpo, *sft], claims.beyond)[dips] == "agrees"


NOT_TESTABLE = "not testable here"


def test_the_edge_is_the_lowest_rate_at_which_most_collapse():
    rows = [row(64, 1e-3, 0.5, False), row(64, 3e-3, 0.0, True), row(64, 1e-2, 0.0, True)]
    assert edge(rows) == 3e-3 and edge(rows[:1]) is None


def test_a_rank_at_which_two_rules_agree_is_in_both():
    rows = [row(8, 1e-3, 0.5, False), row(64, 1e-3, 0.5, False), row(64, 1e-3, 0.5, 0, alpha=16)]
    found = statistics.by_scaling(rows)
    assert {k: sorted(r["rank"] for r in v) for k, v in found.items()} == {
        "alpha = 2r": [8, 64], "alpha = 16": [8, 64],
    }  # fmt: skip
    assert statistics.whole_setting(row(8, 1e-3, 1, 0, alpha=4.0)) == "LoRA r=8, alpha = 4"
    assert statistics.whole_setting(row(8, 1e-3, 1, 0, alpha=16)) == "LoRA r=8, alpha = 2r"


def test_runs_of_other_protocols_are_not_averaged():
    rows = [row(8, 1e-3, 0.5, False), row(8, 1e-3, 0.1, False, group=4),
            row(8, 1e-3, 0.1, False, weight_decay=0.1)]  # fmt: skip
    assert [len(part) for part in statistics.parts(rows)] == [1, 1, 1]
    same = [row(8, 1e-3, 0.5, False), row(8, 1e-3, 0.1, False, seed=1, slots=4)]
    assert [len(part) for part in statistics.parts(same)] == [2]


def test_a_rule_is_followed_by_the_rate_whatever_it_is_called():
    rows = [row(8, 1e-3, 0.5, False, batch=64), row(8, 4e-3, 0.5, False, batch=256),
            row(8, 1e-3, 0.4, False, batch=256, lr_rule="sqrt")]  # fmt: skip
    at = statistics.following(rows, 1e-3, "linear", 64)
    assert [r["batch"] for r in at] == [64, 256]
    assert [r["rate"] for r in statistics.following(rows, 1e-3, "sqrt", 64)] == [1e-3, 2e-3]


def test_the_papers_figures_stand_beside_what_it_ran():
    rows = [row(rank, 1e-3, 0.4, False, alpha=alpha)
            for rank in (8, 32, 64, 128) for alpha in ("2r", 4.0)]  # fmt: skip
    head, *lines = tables.by_rate(rows)
    assert head[-1] == "paper, batch 64"
    assert {line[0]: line[-1] for line in lines if line[1] == "alpha = 2r"} == {
        "LoRA r=8": "trains on", "LoRA r=32": "", "LoRA r=64": "73.1%", "LoRA r=128": "near floor",
    }  # fmt: skip
    assert not any(line[-1] for line in lines if line[1] != "alpha = 2r")
    supervised = tables.by_rate([{**r, "method": "sft"} for r in rows])
    assert supervised[0] == head[:-1] and len(supervised[1]) == len(head) - 1
    assert tables.by_rate([{**r, "stop_absorbed": 0} for r in rows])[0] == head[:-1]


def test_every_setting_holds_those_of_the_objective():
    more = {"seconds": 1.0, "threads": 1, "versions": {}, "python": "3", "cold_start_steps": 1}
    rows = [row(8, 1e-3, 0.5, False, **more),
            row(8, 1e-3, 0.5, False, grpo={"loss": "grpo", "kl_coef": 0.04}, **more)]  # fmt: skip
    told = dict(tables.settings(rows)[1:])
    assert told["grpo: loss"] == "dapo, grpo" and told["grpo: kl_coef"] == "0.0, 0.04"
    assert told["optimizer"] == "AdamW, betas 0.9 and 0.999, eps 1e-08"
    known = {f"grpo: {f.name}" for f in dataclasses.fields(Config)}
    assert {n for n in told if n.startswith("grpo: ")} == known - {
        f"grpo: {name}" for name in tables.FROM_CELLS
    }
    told = dict(tables.settings([{**rows[0], "method": "sft"}])[1:])
    assert not any(name.startswith("grpo: ") for name in told)


def test_the_picture_of_every_kind_is_drawn(tmp_path):
    """From made-up runs, with several batch sizes and a supervised part."""
    spectra = dict.fromkeys(collect.SPECTRAL, 1.0)
    trace = {"step": [3, 7], **{n: [0.5, 0.6] for n in collect.WATCHED}}
    more = {"spectra": spectra, "curve": [[1, 1.0], [2, 0.5]], "trace": trace, "seconds": 1.0,
            "threads": 1, "versions": {}, "python": "3", "cold_start_steps": 1,
            "state": "healthy"}  # fmt: skip
    rows = []
    for rank in (8, 64, 256):
        for batch, rule in ((64, "fixed"), (128, "fixed"), (128, "sqrt")):
            rows.append(row(rank, 1e-3, 0.4, rank == 256, batch=batch, lr_rule=rule, **more))
        for lr in (1e-3, 3e-3, 1e-2):
            rows.append(row(rank, lr, 0.4, lr == 1e-2, prompts=512, **more))
        rows.append(row(rank, 1e-3, 0.4, False, method="sft", **more))
    rows = [{**r, "after": {**r["after"], "greedy": 0.5}} for r in rows]
    blocks = list(
        report.blocks_of(
            rows, report._judgements(rows), [{"id": "x", "error": "a\nb"}], 30, tmp_path
        )
    )
    names = {p.stem.rsplit("-", 1)[1] for p in tmp_path.glob("*.png")}
    assert names == {"batches", "cliff", "rates", "size", "spectra", "traces", "supervised", "kl"}
    text = "\n\n".join(map(report._markdown, blocks))
    assert "| x | a b |" in text and "of 30 planned" in text
