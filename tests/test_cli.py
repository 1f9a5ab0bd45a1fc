"""The command line: what a mistake prints, and what a run leaves behind."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from torch import nn

import structadapt as sa
from structadapt import cli
from structadapt.examples import grpo as grpo_example
from structadapt.examples import monitoring, show, tiny_lm
from structadapt.examples.grpo import collapsed_at
from structadapt.grpo import trial

FAST = ["--cold-start", "0", "--prompts", "128"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def base_of(run):
    """The model that the adapter of a run belongs to."""
    base = tiny_lm.TinyLM()
    base.load_state_dict(safetensors.torch.load_file(run / "base.safetensors"))
    return base


def call(*arguments):
    """Exit code of the command line in this process."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--adapter", "lara"], "invalid choice: 'lara' (choose from"),
        (["--rank", "0"], "LoRA: rank must be a positive integer, got 0"),
        (["--rank", "two"], "invalid int value: 'two'"),
        (["--rank", "100000"], "choose something smaller"),
        (["--rank", "10000000000000000000"], "LoRA: rank must be a positive integer"),
        (["--alpha", "1e308"], "LoRA: alpha must be a positive number"),
        (["--target", ""], "target '' matches no nn.Linear"),
        (["--alpha", "nan"], "LoRA: alpha must be a positive number, got nan"),
        (["--adapter", "dora", "--scaling", "r"], "DoRA: scaling must be one of"),
        (["--adapter", "quanta", "--axes", "16x16x16"], "blocks.0.q: QuanTA: axes 16x16x16 make 4096, but the layer is 128 -> 128"),  # noqa: E501
        (["--adapter", "quanta", "--axes", "7"], "QuanTA: axes must be a number from 3 to 5"),
        (["--adapter", "quanta", "--axes", "8xx4"], "'8xx4' is neither a number of axes"),
        (["--adapter", "quanta", "--init", "zero"], "QuanTA: init must be one of"),
        (["--adapter", "quanta", "--rank", "4"], "--rank does not apply to --adapter quanta"),
        (["--adapter", "full", "--target", "q"], "--target does not apply to --adapter full"),
        (["--axes", "3"], "--axes does not apply to --adapter lora"),
        (["--target", "qq"], "layer that can be adapted (near: blocks.0.q"),
        (["--target", "blocks.0.upp"], "(near: blocks.0.up"),
        (["--lr", "0"], "--lr must be from"),
        (["--lr", "nan"], "--lr must be from"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--prompts", "0"], "--prompts must be from 1"),
        (["--cold-start", "2"], "--cold-start must be from 0 to 1"),
        (["--load", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--load", "x", "--rank", "4"], "--load brings its own adapter"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("grpo", *arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith("structadapt") and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


def test_a_directory_that_exists_or_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, words in [
        (tmp_path, "exists: choose another name"),
        (tmp_path / "file", "exists: choose another name"),
        (tmp_path / "file" / "below", "Not a directory"),
        ("/proc/nowhere/run", "No such file or directory"),
    ]:
        assert call("grpo", *FAST, "--out", out) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_adapter_files_that_do_not_fit(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    sa.save(sa.adapt(nn.Sequential(nn.Linear(8, 8)), sa.LoRA(rank=2)), path)
    assert call("grpo", *FAST, "--load", path, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert (
        "does not fit this model: the model has no layer 0 to adapt" in err and err.count("\n") == 1
    )
    path.write_bytes(path.read_bytes()[:-3])
    for command in (["grpo", *FAST, "--load"], ["spectra"]):
        assert call(*command, path) == 2
        err = capsys.readouterr().err
        assert "a.safetensors is truncated" in err and err.count("\n") == 1
    assert call("spectra", tmp_path / "missing") == 2
    sa.save(sa.adapt(nn.Sequential(nn.Linear(8, 8)), sa.LoRA(rank=2)), tmp_path / "whole")
    capsys.readouterr()
    assert call("spectra", tmp_path / "whole", "--base", path) == 2
    err = capsys.readouterr().err
    assert "a.safetensors is truncated" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "quanta", "full"])
def test_a_run_leaves_what_it_promises(kind, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert call("grpo", *FAST, "--adapter", kind, "--out", out, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert not printed.err
    weights = "model.safetensors" if kind == "full" else "adapter.safetensors"
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "monitor.jsonl", "summary.json", "base.safetensors",
        "curves.png", weights,
    }  # fmt: skip
    readings = [json.loads(line) for line in (out / "monitor.jsonl").read_text().splitlines()]
    assert [reading["step"] for reading in readings] == [0, 1]
    assert len(readings[0]["rows"]) == (15 if kind == "full" else 12)
    assert summary["monitor"]["state"] == readings[-1]["state"]
    assert json.loads((out / "summary.json").read_text()) == summary
    for when in ("before", "after"):
        for how in ("greedy", "sampled"):
            low, high = summary[when][f"{how}_interval"]
            assert 0 <= low <= summary[when][how] <= high <= 1
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [0, 1] and summary["steps"] == 2
    assert steps[-1]["held_out"] is not None
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["prompts"] == 128 and config["lr"] == (
        3e-4 if kind == "full" else 2e-3
    )
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    base = base_of(out)
    if kind == "full":
        assert len(summary["spectra"]) > 12
        return
    assert config["adapter"] == {"lora": "LoRA", "dora": "DoRA", "quanta": "QuanTA"}[kind]
    sa.load(base, out / "adapter.safetensors")
    assert summary["parameters"] == sa.summary(base).parameters
    rows = sa.spectra.analyze(base).rows
    for row, saved in zip(rows, summary["spectra"], strict=True):
        assert {**saved, "seconds": 0} == json.loads(json.dumps({**row, "seconds": 0}))

    again = tmp_path / "again"
    options = ["--load", out / "adapter.safetensors", "--out", again, "--quiet"]
    assert call("grpo", *FAST, *options) == 0
    assert call("spectra", again / "adapter.safetensors", "--base", out / "base.safetensors") == 0
    assert "coverage: 12 of 12 matrices" in capsys.readouterr().out
    assert call("spectra", again / "adapter.safetensors", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 12


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in ("a", "b"):
        assert call("grpo", *FAST, "--quiet", "--seed", 3, "--out", tmp_path / name) == 0
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_without_out_every_run_gets_its_own_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for expected in ("grpo-lora-seed0", "grpo-lora-seed0-2"):
        assert call("grpo", "--cold-start", "0", "--prompts", "1", "--quiet") == 0
        assert f"results in runs/{expected}" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_progress_and_screen(tmp_path, capsys):
    assert call("grpo", *FAST, "--out", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"GRPO, step 2/2: reward [\d.]+, held-out sampled accuracy [\d.]+, 0 s left", err
    )
    assert "picture: " in err
    assert re.search(r"sampled accuracy \(95 %\) +[\d.]+% \([\d.]+% to [\d.]+%\)", out)
    assert re.search(r"blocks.1.down +128x512 +", out) and re.search(r"\nmedian ", out)
    assert max(map(len, out.splitlines())) <= 120
    assert len(out.splitlines()) <= 40, "one screen"


def test_without_the_extras_it_runs_and_says_what_would_draw(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'tqdm', 'transformers', "
        "'triton', 'rich', 'pandas']))\nfrom structadapt.cli import main\nsys.exit(main())"
    )
    command = [sys.executable, "-c", code, "grpo", *FAST, "--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no picture: pip install 'structadapt[plot]' draws curves.png" in result.stderr
    assert not (tmp_path / "run" / "curves.png").exists()
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_run_that_diverges_keeps_its_last_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sa.grpo, "exact_match", lambda p, c, meta: float(len(c) % 2))
    assert call("grpo", *FAST, "--lr", 1000, "--out", tmp_path / "run") == 1
    assert re.search(r"Diverged: step \d: the gradient norm is nan", capsys.readouterr().out)
    sa.load(base_of(tmp_path / "run"), tmp_path / "run" / "adapter.safetensors")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"] is None and "gradient norm is nan" in summary["failure"]


def test_a_disk_that_fills_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert call("grpo", *FAST, "--quiet", "--out", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1


def test_a_part_of_the_layers_can_be_loaded_and_goes_on(tmp_path):
    options = ["--adapter", "quanta", "--axes", "8x8x8", "--target", "up|down"]
    assert call("grpo", *FAST, *options, "--quiet", "--out", tmp_path / "a") == 0
    options = ["--load", tmp_path / "a" / "adapter.safetensors"]
    assert call("grpo", *FAST, *options, "--quiet", "--out", tmp_path / "b") == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("stage", ["cold start", pytest.param("GRPO", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_loadable_checkpoint(stage, tmp_path):
    out = tmp_path / "run"
    options = ["--out", str(out)] + ([] if stage == "cold start" else ["--cold-start", "0.02"])
    command = [sys.executable, "-m", "structadapt.examples.grpo", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    awaited = out / ("config.json" if stage == "cold start" else "metrics.jsonl")
    while not (awaited.exists() and awaited.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors and "Traceback" not in errors
    assert "Stopped early: the adapter as it was is saved" in printed
    model = sa.load(base_of(out), out / "adapter.safetensors")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"] and summary["after"] is None
    moved = any(delta.any() for _, delta in sa.delta_weights(model))
    assert moved == (stage == "GRPO") == bool(summary["steps"])


def told(out):
    """What a run left behind, without times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    times = ("tokens_per_second", "rollout_seconds", "update_seconds")
    summary = json.loads((out / "summary.json").read_text())
    summary = {k: v for k, v in summary.items() if k not in ("seconds", "peak_memory_mib")}
    for row in summary["spectra"]:
        del row["seconds"]
    files = [out / "adapter.safetensors", out / "model.safetensors"]
    files.append(out / "monitor.jsonl")
    written = [file.read_bytes() for file in files if file.exists()]
    return written, summary, [{k: v for k, v in s.items() if k not in times} for s in lines]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command(tmp_path, capsys):
    options = ["--cold-start", "0.02", "--prompts", "1600", "--seed", "2"]
    command = [sys.executable, "-m", "structadapt.examples.grpo", *options, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    for lines in (5, 18, 22):  # before the first state, and after it
        process = subprocess.Popen(
            [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert call("grpo", *options, "--lr", 1e-4, "--out", out) == 2
    assert "its settings.lr is None, and here 0.0001" in capsys.readouterr().err
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert not (out / "states").exists()
    assert told(out) == told(whole)
    assert sum(step["updates"] for step in told(out)[2]) > 20
    assert call("grpo", *options, "--out", out) == 2
    assert "its run is finished" in capsys.readouterr().err


def test_readings_are_appended_also_to_a_torn_file(net, ids, tmp_path):
    model, path = sa.adapt(net, sa.LoRA(rank=2)), tmp_path / "monitor.jsonl"
    monitor = sa.spectra.Monitor(model, every=1)

    def steps(log, count):
        for _ in range(count):
            monitor.step()
            log.write()

    log = monitoring.ReadingLog(monitor, path)
    log.write()
    assert not path.exists(), "nothing was read yet"
    steps(log, 3)
    saved, before = monitor.state_dict(), path.read_text()
    steps(log, 2)
    whole = path.read_text()
    assert whole.startswith(before) and whole.count("\n") == 5
    # What another process finds: a step more than the state knows, or half of one less.
    for left in (whole, whole[:-9], before[:-9], ""):
        path.write_text(left)
        monitor = sa.spectra.Monitor(model, every=1)
        monitor.load_state_dict(saved)
        steps(monitoring.ReadingLog(monitor, path), 2)
        assert path.read_text() == whole


def test_collapse_in_words():
    def steps(*rewards):
        return [{"step": i, "reward": r} for i, r in enumerate(rewards)]

    assert collapsed_at([]) is None
    assert collapsed_at(steps(0.3, 0.0, 0.4, 0.5)) is None
    assert collapsed_at(steps(0.3, 0.2, 0.0, 0.01, 0.0)) == 2
    assert collapsed_at(steps(0.3, 0.0, 0.2, 0.0, 0.0)) is None  # two steps are too few to say
    assert collapsed_at(steps(0.0, 0.0, 0.0, 0.0)) is None  # never alive

    summary = {"collapsed_at": 2, "dead_steps": [0, 3, 4], "steps": 6}
    text = show.collapse(summary)
    assert "Collapsed at step 2" in text and "In 2 of 3 steps from 3 on, all rewards" in text
    assert "gradient is exactly zero" in text
    assert "exactly zero" not in show.collapse({**summary, "dead_steps": []})
    assert show.collapse({**summary, "collapsed_at": None}) is None
    nothing = show.collapse({"collapsed_at": None, "dead_steps": [0, 1], "steps": 2})
    assert "In every step, all rewards of every group are equal" in nothing


def test_version(capsys):
    assert call("--version") == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


# -- preflight -------------------------------------------------------------------------------------


@pytest.fixture
def odd(monkeypatch):
    """A reward that an untrained model gets at times: whether the completion's length is odd."""
    monkeypatch.setattr(sa.grpo, "exact_match", lambda p, c, meta: float(len(c) % 2))


def preflight(capsys, *options):
    """(exit code, report) of a preflight without a cold start."""
    code = call("preflight", "--cold-start", "0", "--json", *options)
    out, err = capsys.readouterr()
    assert not err
    return code, json.loads(out)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_preflight_is_the_first_step_of_the_run(kind, odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo_example, "END_PROBLEMS", 10)
    code, report = preflight(capsys, "--adapter", kind, "--lr", "1e-4", "--seed", "3")
    assert code == 0 and report["verdict"] == "safe" and report["updates"] == 4
    assert report["first"]["kl"] > 0 and report["tries"] == [] and report["alpha"] is None
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    options = ["--adapter", kind, "--lr", "1e-4", "--seed", "3", "--quiet", "--out", "run"]
    assert call("grpo", "--cold-start", "0", "--prompts", "64", *options) == 0
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert report["reward"] == step["reward"]
    assert report["equal_groups"] == step["zero_std_fraction"]


def test_preflight_suggests_what_it_measured(odd, monkeypatch, capsys):
    monkeypatch.setattr(trial, "SAFE_KL", 1e-3)
    monkeypatch.setattr(trial, "COLLAPSE_KL", 2e-3)
    options = ["--rank", "64", "--lr", "0.01"]
    code, report = preflight(capsys, *options)
    assert code == 4 and report["verdict"] == "will collapse"
    best, alpha = report["suggestion"], report["alpha"]
    code, again = preflight(capsys, "--rank", "64", "--lr", best["lr"])
    assert code == 0 and again["verdict"] == "safe"
    assert again["first"]["kl"] == pytest.approx(best["kl"], rel=1e-4)
    code, again = preflight(capsys, *options, "--alpha", alpha["alpha"])
    assert code == 0 and again["first"]["kl"] == pytest.approx(alpha["kl"], rel=1e-4)

    assert call("preflight", "--cold-start", "0", "--quiet", *options) == 4
    out = capsys.readouterr().out
    assert out.startswith("will collapse: ") and max(map(len, out.splitlines())) <= 120
    words = f"Try --lr {best['lr']:.3g}, or --alpha {alpha['alpha']:.3g} (measured KL"
    assert words in out


def test_preflight_of_a_model_without_a_reward(capsys):
    assert preflight(capsys)[0] == 3
    assert call("preflight", "--cold-start", "0", "--quiet") == 3
    assert "no signal: the rewards of every group are equal" in capsys.readouterr().out


def test_preflight_that_is_not_finite(odd, monkeypatch, capsys):
    def fail(*_, **__):
        raise FloatingPointError("step 0: the gradient norm is nan")

    code, report = preflight(capsys, "--lr", "1000", "--adapter", "full")
    assert code == 4 and report["first"]["kl_step"] is None  # JSON has no infinity
    monkeypatch.setattr(sa.grpo, "preflight", fail)
    assert call("preflight", "--cold-start", "0", "--quiet") == 1
    assert "preflight: error: step 0: the gradient norm is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--adapter", "lara"], "invalid choice: 'lara' (choose from"),
        (["--rank", "0"], "LoRA: rank must be a positive integer, got 0"),
        (["--lr", "nan"], "--lr must be from"),
        (["--prompts", "5"], "unrecognized arguments: --prompts"),
        (["--out", "here"], "unrecognized arguments: --out"),
        (["--load", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_a_mistake_with_preflight_is_one_line_too(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("preflight", *arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())


# -- the whole example, beside what test_readme.py runs --------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--adapter", "dora"], ["--rank", 256, "--alpha", 16]], ids=["dora", "rank 256"]
)
def test_a_quarter_of_the_prompts_is_enough_to_learn(options, tmp_path, capsys):
    assert call("grpo", *options, "--prompts", 2048, "--json", "--out", tmp_path / "run") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["collapsed_at"] is None and summary["steps"] == 32
    assert math.isfinite(summary["peak_memory_mib"])
    before, after = summary["before"], summary["after"]
    assert 0.15 < before["sampled"] < 0.35
    for kind in ("greedy", "sampled"):
        assert after[kind] > before[kind] + 0.15


# -- spectra ---------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    """A base, the same with an update of one direction in a layer, and one with a NaN."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.up.weight": (24, 16), "model.layers.1.up.weight": (24, 16)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["model.norm.weight"] = torch.ones(16)
    tuned = {name: W + 0.01 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    tuned["model.layers.0.up.weight"] += 3 * torch.ones(24, 16)
    broken = {**tuned, "model.layers.1.up.weight": torch.full((24, 16), math.nan)}
    for name, tensors in {"base": base, "tuned": tuned, "broken": broken}.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


def refuse(constant):
    raise AssertionError(constant)


def test_spectra_writes_what_it_is_asked_for(checkpoints, capsys):
    at = checkpoints
    out = ["--csv", at / "r.csv", "--markdown", at / "r.md", "--html", at / "r.html"]
    code = call("spectra", at / "tuned.safetensors", "--base", at / "base.safetensors", *out,
                "--plots", at / "plots")  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0 and not printed.err
    assert "coverage: 2 of 2 matrices" in printed.out and "\x1b" not in printed.out
    assert "left out: model.norm (16): 1-D, no matrix" in printed.out
    assert "collapsed" in printed.out and "model.layers.0.up" in printed.out
    assert (at / "r.csv").read_text().count("\n") == 3
    assert "| model.layers.0.up |" in (at / "r.md").read_text()
    assert "data:image/png" in (at / "r.html").read_text()
    assert {p.name for p in (at / "plots").iterdir()} == {
        "singular_values.png", "energy.png", "heatmap.png",
    }  # fmt: skip


def test_spectra_json_is_strict_and_whole(checkpoints, capsys):
    path = checkpoints / "broken.safetensors"
    assert call("spectra", path, "--base", checkpoints / "base.safetensors", "--json") == 3
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    good, bad = found["rows"]
    assert good["status"] == "ok" and good["nss_drift"] > 0
    assert bad["status"] == "skipped" and "not finite" in bad["reason"]
    assert {f["kind"] for f in found["findings"]} == {"collapsed", "nonfinite", "intruders"}
    assert [s["name"] for s in found["skipped"]] == ["model.norm"]
    sizes = {file["path"]: file["bytes"] for file in found["files"]}
    assert sizes[str(path)] == path.stat().st_size and len(sizes) == 2


@pytest.mark.parametrize(
    "options, code",
    [
        ([], 0),
        (["--fail-on", "collapsed"], 4),
        (["--fail-on", "concentrated"], 4),
        (["--fail-on", "any"], 4),
        (["--fail-on", "rounding"], 0),
        (["--fail-on", "collapsed", "--oversized", "99"], 0),
        (["--fail-on", "any", "--exclude", "layers.0"], 0),
        (["--include", "layers.1", "--no-relations", "--method", "svd", "--workers", "2"], 0),
    ],
)
def test_spectra_exit_codes(options, code, checkpoints, capsys):
    paths = [checkpoints / "tuned.safetensors", "--base", checkpoints / "base.safetensors"]
    assert call("spectra", *paths, *options) == code
    assert not capsys.readouterr().err


@pytest.mark.parametrize("asked", ["collapsed", "oversized", "intruders", "any"])
def test_what_needs_a_base_is_not_passed_without_it(asked, tmp_path, capsys):
    torch.manual_seed(0)
    model = sa.adapt(torch.nn.Sequential(torch.nn.Linear(32, 24)), sa.LoRA(rank=4))
    with torch.no_grad():
        model[0].B.normal_(std=10.0)
    sa.save(model, tmp_path / "a.safetensors")
    assert call("spectra", tmp_path / "a.safetensors", "--fail-on", asked) == 3
    told = capsys.readouterr().err
    assert f"--fail-on cannot judge {asked} of 0:" in told and "give --base" in told
    assert call("spectra", tmp_path / "a.safetensors", "--fail-on", "concentrated") == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["tuned.safetensors", "--base", "nowhere"], "nowhere is not there"),
        (["tuned.safetensors", "--include", "nothing"], "leave no matrix"),
        (["tuned.safetensors", "--include", "("], "is no regular expression"),
        (["tuned.safetensors", "--csv", "no/r.csv"], "--csv: there is no folder no"),
        (["tuned.safetensors", "--html", "."], "is a folder, give the name of a file"),
        (["tuned.safetensors", "--plots", "base.safetensors"], "is a file, give a folder"),
        (["tuned.safetensors", "--fail-on", "bad"], "invalid choice: 'bad'"),
        (["tuned.safetensors", "--concentrated", "2"], "--concentrated must be above 0"),
        (["tuned.safetensors", "--oversized", "nan"], "--oversized must be above 0"),
        (["tuned.safetensors", "--intruders", "0"], "--intruders must be at least 1"),
        (["tuned.safetensors", "--workers", "0"], "workers must be at least 1"),
        (["tuned.safetensors", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["broken.safetensors", "--strict"], "not finite"),
        (["."], "give one of them"),
    ],
)
def test_a_mistake_with_spectra_is_one_line(arguments, words, checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    assert call("spectra", *arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out, err
    assert len(list(checkpoints.iterdir())) == 3, "nothing is left behind"


def test_spectra_maturity(checkpoints, capsys):
    assert call("spectra", checkpoints / "base.safetensors", "--maturity", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["maturity"]
    assert (entry["module_type"], entry["count"]) == ("up", 2)
    assert entry["effective_rank_ratio"]["median"] == pytest.approx(1, abs=0.1)
    assert call("spectra", checkpoints / "base.safetensors", "--maturity") == 0
    assert "frozen weights beside Gaussian ones" in capsys.readouterr().out
    paths = [checkpoints / "tuned.safetensors", "--base", checkpoints / "base.safetensors"]
    assert call("spectra", *paths, "--maturity") == 0
    out, err = capsys.readouterr()
    assert "this source has none" in err and err.count("\n") == 1 and "coverage: 2 of 2" in out


def test_a_spectra_output_that_fails_takes_nothing_with_it(checkpoints, monkeypatch, capsys):
    def broken(*arguments):
        raise KeyError("child0")

    at, target = checkpoints, checkpoints / "r.csv"
    monkeypatch.setattr("structadapt.spectra.plots.draw", broken)

    def full(path, data):
        raise OSError(28, "No space left on device", f"{path}.temporary")

    monkeypatch.setattr("structadapt.spectra.report.write_atomically", full)
    code = call("spectra", at / "base.safetensors", "--csv", target, "--plots", at / "plots",
                "--markdown", at / "r.md")  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 2 and "coverage: 2 of 2 matrices" in out and f"table in {at / 'r.md'}" in out
    assert (at / "r.md").read_text().count("\n") == 4 and "rows in" not in out
    assert err.splitlines() == [
        f"structadapt spectra: error: no rows in {target}: No space left on device",
        f"structadapt spectra: error: no pictures in {at / 'plots'}: 'child0'",
    ]


def test_spectra_of_zeros_and_a_torn_monitor_are_notes(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    safetensors.torch.save_file({"l.weight": torch.zeros(4, 3)}, run / "model.safetensors")
    (run / "monitor.jsonl").write_text("torn")
    assert call("spectra", run, "--plots", tmp_path / "p", "--html", tmp_path / "r.html") == 0
    err = capsys.readouterr().err
    assert "note: no pictures: nothing to draw" in err and err.count("\n") == 2
    assert "holds no reading" in err and "nothing to draw" in (tmp_path / "r.html").read_text()


def test_spectra_into_a_pipe_that_closes(checkpoints):
    """As `--json | head -c 10`: quiet, and the files are written."""
    code = "import sys; from structadapt import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "spectra", checkpoints / "base.safetensors", "--json"]
    run = subprocess.Popen([*command, "--csv", checkpoints / "r.csv"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)  # fmt: skip
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    with run.stderr as stream:
        said = stream.read()
    assert (run.wait(), said) == (0, b"") and (checkpoints / "r.csv").exists()


def test_spectra_in_colour_on_a_terminal_unless_told_otherwise(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for value, expected in ((None, True), ("1", False)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if value:
            monkeypatch.setenv("NO_COLOR", value)
        assert call("spectra", checkpoints / "base.safetensors") == 0
        assert ("\x1b[1m" in capsys.readouterr().out) == expected
