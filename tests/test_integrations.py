"""structadapt in transformers' Trainer, in TRL and in PEFT: tiny random models, no network."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")

import peft
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

import structadapt as sa
from structadapt.integrations.callbacks import (
    AdapterCheckpoint,
    NonFiniteGradientError,
    NonFiniteGuard,
)
from structadapt.integrations.peft_tuner import StructAdaptConfig
from structadapt.integrations.trl import (
    MergedVLLMGeneration,
    merged_named_parameters,
    sync_merged_weights,
)
from structadapt.layers import find_adapted

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks transformers for it by the old name; TRL's own default sets it by the old name
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]

KINDS = (
    sa.LoRA(rank=4),
    sa.DoRA(rank=4),
    sa.QuanTA(),
    sa.QuanTA(init="paper"),
)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=repr)


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype)


def bridged(kind=KINDS[0], dtype=torch.float32, **options):
    config = StructAdaptConfig(adapter=kind, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(llama(dtype), config)


IDS = torch.randint(2, 32, (3, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    model.eval()
    return model(IDS).logits


def adapters(model):
    return [p.detach().clone() for p in sa.adapter_parameters(model)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def base_is_untouched(model, dtype=torch.float32):
    now = dict(model.named_parameters())
    return all(torch.equal(now[name], p) for name, p in llama(dtype).named_parameters())


def test_importing_the_package_imports_none_of_them():
    code = (
        "import sys, structadapt, structadapt.integrations\n"
        "assert not {'peft', 'trl', 'transformers', 'accelerate'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- transformers' Trainer -------------------------------------------------------------------------


class Crash(TrainerCallback):
    """Stop in the middle of a run, after step `at`."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def train(model, folder, callbacks=(), resume=None, steps=6, **options):
    data = torch.randint(2, 32, (16, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in data]
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **options,
    }
    arguments = TrainingArguments(**settings)
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[*callbacks]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@every_kind
def test_trainer_trains_the_adapter_alone(kind, tmp_path):
    model = sa.adapt(llama(), kind)
    before = adapters(model)
    trainer = train(model, tmp_path, steps=3)
    assert base_is_untouched(model)
    moved = [not torch.equal(a, b) for a, b in zip(before, adapters(model), strict=True)]
    assert sum(moved) >= len(moved) / 2  # A of LoRA waits for B
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and len({*losses}) == 3


@pytest.mark.parametrize("through", ["adapt", "bridge"])
def test_a_killed_run_goes_on_bit_for_bit(through, tmp_path):
    def make():
        # dropout: the random generators matter
        if through == "adapt":
            return sa.adapt(llama(attention_dropout=0.2), sa.DoRA(rank=4))
        config = StructAdaptConfig(adapter=sa.DoRA(rank=4), task_type="CAUSAL_LM")
        return peft.get_peft_model(llama(attention_dropout=0.2), config)

    options = {"eval_strategy": "steps", "eval_steps": 2}
    whole = make()
    losses = train(whole, tmp_path / "whole", **options).state.log_history
    with pytest.raises(KeyboardInterrupt):
        train(make(), tmp_path / "b", [AdapterCheckpoint(every=2), Crash(at=5)], **options)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    resumed = make()
    again = train(resumed, tmp_path / "b", [AdapterCheckpoint(every=2)], resume=True, **options)
    assert same(adapters(whole), adapters(resumed))
    pairs = [(e["step"], e["loss"]) for e in losses if "loss" in e]
    assert pairs == [(e["step"], e["loss"]) for e in again.state.log_history if "loss" in e]


@pytest.mark.parametrize("missing", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_every_piece_of_a_checkpoint_counts(missing, tmp_path):
    def make():
        return sa.adapt(llama(attention_dropout=0.2), sa.LoRA(rank=4))

    whole = make()
    train(whole, tmp_path, [AdapterCheckpoint(every=2, keep=None)])
    (tmp_path / "checkpoint-4" / missing).unlink()
    resumed = make()
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert not same(adapters(whole), adapters(resumed))


def test_a_checkpoint_holds_the_adapters_and_no_base(tmp_path):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    (tmp_path / ".checkpoint-9.0123").mkdir(parents=True)  # of a killed run
    train(model, tmp_path, [AdapterCheckpoint(every=2, keep=2)], steps=7)
    # 7: after the last step too
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]
    folder = tmp_path / "checkpoint-7"
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    fresh = sa.load(llama(), folder / "model.safetensors")
    assert same(adapters(model), adapters(fresh))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 7 and state["log_history"][-2]["step"] == 7


def test_a_failed_write_leaves_no_checkpoint_behind(tmp_path, monkeypatch):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    written = []

    def full_disk(state, path):
        written.append(path)
        if len(written) == 5:  # optimizer, of the second checkpoint: rng, optimizer, scheduler, rng
            raise OSError("disk full")
        torch.serialization.save(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        train(model, tmp_path, [AdapterCheckpoint(every=1)])
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    train(sa.adapt(llama(), sa.LoRA(rank=2)), tmp_path, [AdapterCheckpoint()], resume=True)
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_checkpoints_of_another_run_are_left_alone_and_warned_of(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    with pytest.warns(UserWarning, match="holds checkpoint-100 of another run.*output_dir of its"):
        train(model, tmp_path, [AdapterCheckpoint(every=2, keep=1)], steps=4)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-100", "checkpoint-4"]


def other_base():
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    return sa.adapt(model, sa.LoRA(rank=2))


@pytest.mark.parametrize(
    "make, words",
    [
        (other_base, "q_proj has another base weight"),
        (
            lambda: sa.adapt(llama(), sa.LoRA(rank=2, alpha=3.0)),
            r"has LoRA\(rank=2, alpha=3",
        ),
    ],
    ids=["base", "alpha"],
)
def test_a_resume_of_what_is_not_the_models_is_refused(make, words, tmp_path):
    """Trainer itself looks at names and shapes alone."""
    train(sa.adapt(llama(), sa.LoRA(rank=2)), tmp_path, [AdapterCheckpoint(every=2)], steps=2)
    with pytest.raises(ValueError, match=words):
        train(make(), tmp_path, [AdapterCheckpoint(every=2)], resume=True)


def test_checkpoints_refuse_what_they_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        AdapterCheckpoint(every=0)
    with pytest.raises(ValueError, match='set it to "no"'):
        train(sa.adapt(llama(), sa.LoRA()), tmp_path, [AdapterCheckpoint()], save_strategy="steps")
    with pytest.raises(ValueError, match="no adapted layer"):
        train(llama(), tmp_path, [AdapterCheckpoint()])


# -- gradients that are not finite -----------------------------------------------------------------


class Poison(TrainerCallback):
    """Make the gradient of one tensor not finite at the given steps; record what each step does."""

    def __init__(self, parameter, steps, value=float("nan")):
        self.steps, self.value, self.on = steps, value, False
        self.history = []
        parameter.register_hook(lambda g: g * 0 + self.value if self.on else g)

    def on_step_begin(self, args, state, control, **kwargs):
        self.on = state.global_step in self.steps

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = kwargs["optimizer"].state_dict()["state"]
        moments = [v.clone() for s in optimizer.values() for v in s.values()]
        self.history.append(adapters(kwargs["model"]) + moments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_guard_skips_a_step(value, tmp_path):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    layer = model.model.layers[1].mlp.up_proj
    poison = Poison(layer.B, {2}, value)  # of 1e30 the norm overflows: clipping would give zeros
    guard = NonFiniteGuard()
    train(model, tmp_path, [guard, poison], steps=5, weight_decay=0.1)
    assert guard.skipped == [(2, ["model.layers.1.mlp.up_proj"])]
    steps = poison.history
    assert same(steps[1], steps[2]) and not same(steps[2], steps[3])
    assert all(torch.isfinite(t).all() for t in steps[-1])
    assert not layer.B._post_accumulate_grad_hooks


def test_without_the_guard_one_nan_is_everywhere(tmp_path):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    train(model, tmp_path, [Poison(model.model.layers[1].mlp.up_proj.B, {1})], steps=3)
    assert all(t.isnan().any() for t in adapters(model))


def test_the_guard_stops_after_three_in_a_row_and_names_the_layers(tmp_path):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    layer = model.model.layers[0].self_attn.v_proj
    guard = NonFiniteGuard()
    good = Poison(layer.A, {1, 3, 4, 5})
    with pytest.raises(NonFiniteGradientError, match="step 5: .* model.layers.0.self_attn.v_proj;"):
        train(model, tmp_path, [guard, good], steps=20)
    assert [step for step, _ in guard.skipped] == [1, 3, 4, 5]
    assert all(torch.isfinite(t).all() for t in adapters(model))


def test_the_guard_stops_when_too_many_of_the_last_steps_are_skipped(tmp_path):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    guard = NonFiniteGuard(share=0.1, window=10)
    poison = Poison(model.model.layers[0].self_attn.v_proj.A, {2, 13, 17})
    with pytest.raises(NonFiniteGradientError, match="2 of the last 10 steps were skipped"):
        train(model, tmp_path, [guard, poison], steps=30)
    assert [step for step, _ in guard.skipped] == [2, 13, 17]


def test_the_guard_sees_each_part_of_an_accumulated_gradient(tmp_path):
    model = sa.adapt(llama(), sa.LoRA(rank=2))

    class First(Poison):  # the first of two parts alone
        def on_substep_end(self, args, state, control, **kwargs):
            self.on = False

    guard = NonFiniteGuard()
    poison = First(model.model.layers[0].self_attn.v_proj.A, {1})
    train(model, tmp_path, [guard, poison], steps=3, gradient_accumulation_steps=2)
    assert [step for step, _ in guard.skipped] == [1]


def test_the_guard_refuses_nonsense():
    with pytest.raises(ValueError, match="must be at least 1"):
        NonFiniteGuard(in_a_row=0)


TWO_PROCESSES = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_integrations as t
import structadapt as sa

folder = Path(sys.argv[2])

def run(name, steps, resume=None, poisoned=True, every=2):
    model = sa.adapt(t.llama(attention_dropout=0.2), sa.LoRA(rank=2))
    guard = t.NonFiniteGuard()
    callbacks = [t.AdapterCheckpoint(every=every), guard]
    if poisoned and os.environ["RANK"] == "1":
        callbacks.append(t.Poison(model.model.layers[1].mlp.up_proj.B, {1}))
    # one schedule, however many steps are taken of it
    trainer = t.train(model, folder / name, callbacks, resume, steps, lr_scheduler_type="constant")
    assert trainer.args.world_size == 2
    return t.adapters(model), guard.skipped

whole, skipped = run("a", 6)
assert [step for step, _ in skipped] == [1], skipped
assert skipped[0][1] == (["model.layers.1.mlp.up_proj"] if os.environ["RANK"] == "1" else [])
run("b", 4)
files = {p.name for p in (folder / "b" / "checkpoint-4").iterdir()}
assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} <= files, files
resumed, skipped = run("b", 6, resume=True, poisoned=False)
assert t.same(whole, resumed) and not skipped
everyone = [None, None]
torch.distributed.all_gather_object(everyone, resumed)
assert t.same(*everyone)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_guard_and_checkpoints_in_two_processes(tmp_path):
    """One rank's NaN skips the step of both; a checkpoint holds the generators of both."""
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


# -- TRL -------------------------------------------------------------------------------------------


def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *"0123456789+=abcdefghijklmnopq"]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def reward(completions, **kwargs):
    """Letters early in the alphabet; differs within almost any group."""
    return [sum(ord(c) % 7 for c in text) / 7 for text in completions]


class Recorded(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), output]
        return output


def grpo(
    model, folder, resume=None, steps=3, beta=0.0, bf16=False, gradient_checkpointing=False,
    **options,
):  # fmt: skip
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=steps,
        beta=beta,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Recorded(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+1="} for i in range(8)]),
        processing_class=tokenizer(),
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@every_kind
def test_grpo_trains_a_plain_adapted_model(kind, tmp_path):
    model = sa.adapt(llama(), kind)
    before = adapters(model)
    trainer = grpo(model, tmp_path)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 3 and len({*rewards}) > 1
    assert base_is_untouched(model) and not same(before, adapters(model))


def test_grpo_with_the_defaults_of_trl(tmp_path):
    """bf16 and gradient checkpointing."""
    model = sa.adapt(llama(), sa.DoRA(rank=4))
    before = adapters(model)
    grpo(model, tmp_path, steps=2, bf16=True, gradient_checkpointing=True)
    assert base_is_untouched(model) and not same(before, adapters(model))
    assert all(p.dtype == torch.float32 for p in sa.adapter_parameters(model))


@every_kind
def test_grpo_with_kl_through_the_bridge(kind, tmp_path):
    config = StructAdaptConfig(adapter=kind, task_type="CAUSAL_LM")
    trainer = grpo(llama(), tmp_path, beta=0.1, peft_config=config)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0 and kl[-1] > 0.0
    model = trainer.model.get_base_model()
    assert base_is_untouched(model)
    # after training still, the reference is the base model
    seen, base = trainer.seen[-1], llama()
    tokens = torch.cat([seen["prompt_ids"], seen["completion_ids"]], 1)
    mask = torch.cat([seen["prompt_mask"], seen["completion_mask"]], 1)
    with torch.no_grad():
        scores = base(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
    expected = scores[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    expected = expected[:, -seen["completion_ids"].shape[1] :]
    real = seen["completion_mask"].bool()
    torch.testing.assert_close(seen["ref_per_token_logps"][real], expected[real], atol=1e-6, rtol=0)
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(model.model(IDS)[0], base.model(IDS)[0])


def test_grpo_goes_on_bit_for_bit(tmp_path):
    whole, resumed = (sa.adapt(llama(), sa.QuanTA()) for _ in range(2))
    grpo(whole, tmp_path, steps=4, callbacks=[AdapterCheckpoint(every=2), NonFiniteGuard()])
    grpo(resumed, tmp_path, steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert same(adapters(whole), adapters(resumed))


def test_grpo_says_how_to_get_a_reference(tmp_path):
    with pytest.raises(ValueError, match="give the trainer the bare model and peft_config"):
        grpo(bridged(), tmp_path, beta=0.1)


# -- the bridge ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bridge_is_adapt(kind, dtype, train_a_little):
    model, ours = bridged(kind, dtype), sa.adapt(llama(dtype), kind)
    inner = model.get_base_model()
    assert same(adapters(inner), adapters(ours))  # the same fresh tensors
    assert torch.equal(logits(model), logits(llama(dtype)))
    train_a_little(inner)
    train_a_little(ours)
    assert torch.equal(logits(model), logits(ours))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(dtype)))
    assert torch.equal(logits(model), logits(ours))
    assert [*dict(inner.named_modules())] == [*dict(llama().named_modules())]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if "structadapt_" in n
    }
    model.train()(IDS, labels=IDS).loss.backward()
    ours.train()(IDS, labels=IDS).loss.backward()
    pairs = zip(sa.adapter_parameters(inner), sa.adapter_parameters(ours), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bridge_merges_and_restores_bit_for_bit(kind, dtype, train_a_little):
    model = bridged(kind, dtype)
    train_a_little(model.get_base_model())
    before = logits(model)
    for _ in range(3):
        model.merge_adapter()
        assert model.get_model_status().merged_adapters == ["default"]
        assert not base_is_untouched(model.get_base_model(), dtype)
        close = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0}
        torch.testing.assert_close(logits(model), before, **close)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(llama(dtype)))
        model.unmerge_adapter()
        assert base_is_untouched(model.get_base_model(), dtype)
        assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="not merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()


@every_kind
def test_unloading(kind, train_a_little):
    def plain(model):
        layer, other = model.model.layers[0].mlp.up_proj, llama().model.layers[0].mlp.up_proj
        assert type(layer) is nn.Linear and layer.__dict__.keys() == other.__dict__.keys()
        assert not hasattr(model, "peft_config")
        return [n for n, _ in model.named_parameters()] == [
            n for n, _ in llama().named_parameters()
        ]

    model = bridged(kind)
    train_a_little(model.get_base_model())
    adapted = logits(model)
    model.merge_adapter()
    merged = logits(model)
    base = model.unload()
    assert plain(base) and base_is_untouched(base)

    model = bridged(kind)
    train_a_little(model.get_base_model())
    base = model.merge_and_unload()
    assert plain(base) and torch.equal(logits(base), merged)
    torch.testing.assert_close(logits(base), adapted, atol=1e-5, rtol=0)
    assert isinstance(bridge_again(base), peft.PeftModel)


def bridge_again(base):
    return peft.get_peft_model(base, StructAdaptConfig(task_type="CAUSAL_LM"))


@every_kind
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_from_pretrained(kind, low_cpu_mem_usage, tmp_path, train_a_little):
    model = bridged(kind, target_modules=["q_proj", "mlp.*"], exclude_modules=["down_proj"])
    train_a_little(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 60_000
    again = peft.PeftModel.from_pretrained(
        llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=low_cpu_mem_usage
    )
    assert torch.equal(logits(model), logits(again))
    config = again.peft_config["default"]
    assert config.build() == kind and config.target_modules == ["q_proj", "mlp.*"]
    layers = [name for name, _ in sa.delta_weights(again.get_base_model())]
    assert len(layers) == 6 and not any("down_proj" in name for name in layers)
    trained = [p.requires_grad for p in sa.adapter_parameters(again.get_base_model())]
    assert all(trained) if low_cpu_mem_usage else not any(trained)


def test_a_folder_over_another_base_is_refused(tmp_path, train_a_little):
    config = StructAdaptConfig(adapter=sa.DoRA(rank=4), task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    assert not config.base_fingerprints, "the caller's configuration is for other models too"
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="up_proj has another base weight.*base_fingerprints={}"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert not find_adapted(other)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.base_fingerprints = {}
    assert peft.PeftModel.from_pretrained(other, tmp_path, config=config)


@every_kind
def test_a_model_in_pefts_clothes_is_pickled(kind, train_a_little):
    model = bridged(kind)
    train_a_little(model.get_base_model(), scale=0.02)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    assert same(adapters(again.get_base_model()), adapters(model.get_base_model()))
    assert again.merge_and_unload()


@every_kind
def test_the_state_dict_has_the_adapter_alone(kind, train_a_little):
    model = bridged(kind)
    inner = model.get_base_model()
    train_a_little(inner)
    state = peft.get_peft_model_state_dict(model)
    names = {key.rpartition(".")[2] for key in state}
    layer = inner.model.layers[0].mlp.up_proj
    assert names == {f"structadapt_{name}" for name in layer.tensors()}
    assert len(state) == 14 * len(names)
    other = bridged(kind)
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(model), logits(other))

    some = next(iter(state))
    for broken, message in (
        ({k: v for k, v in state.items() if k != some}, "q_proj.structadapt_.* is missing"),
        ({**state, "x.structadapt_A": state[some]}, "the model has no x.structadapt_A"),
        ({**state, some: state[some] * float("nan")}, "is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.set_peft_model_state_dict(other, broken)
    assert torch.equal(logits(model), logits(other))


def test_what_else_peft_shows(capsys, tmp_path, train_a_little):
    model = bridged(sa.LoRA(rank=2))
    model.print_trainable_parameters()
    count = sum(p.numel() for p in sa.adapter_parameters(model.get_base_model()))
    assert f"trainable params: {count:,} ||" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.enabled is True and status.num_adapter_layers == 14
    assert status.peft_types == {"default": "STRUCTADAPT"}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        with model.disable_adapter():
            pass
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True
    assert "STRUCTADAPT" in [t.value for t in peft.PeftType]
    # structadapt's own functions see the layers too
    inner = model.get_base_model()
    train_a_little(inner)
    sa.save(inner, tmp_path / "a.safetensors")
    ours = sa.load(llama(), tmp_path / "a.safetensors")
    assert torch.equal(logits(ours), logits(model))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in sa.adapter_parameters(half.get_base_model())} == {torch.float32}


def test_inject_adapter_in_model_and_frozen_adapters(train_a_little):
    model = peft.inject_adapter_in_model(StructAdaptConfig(adapter=sa.DoRA(rank=4)), llama())
    assert type(model) is LlamaForCausalLM
    train_a_little(model)
    state = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(StructAdaptConfig(adapter=sa.DoRA(rank=4)), llama())
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(model), logits(other))
    frozen = bridged()
    frozen.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in frozen.parameters())
    with frozen.disable_adapter():
        pass
    assert not any(p.requires_grad for p in frozen.parameters())  # stays as it was
    frozen.set_adapter("default")
    assert any(p.requires_grad for p in frozen.parameters())


def test_clear_errors_for_what_the_bridge_does_not_do(tmp_path):
    model = bridged()
    before, config = logits(model), model.peft_config["default"]
    with pytest.raises(ValueError, match="one adapter a model and 'default' is here"):
        model.add_adapter("other", StructAdaptConfig())
    with pytest.raises(NotImplementedError, match="there is none to combine"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(NotImplementedError, match="call unload"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="one adapter, 'default'"):
        model.merge_adapter(["other"])
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match="is adapted already: give PEFT the bare model"),
    ):
        peft.get_peft_model(model.get_base_model(), StructAdaptConfig())
    assert torch.equal(logits(model), before) and model.peft_config == {"default": config}

    with pytest.raises(ValueError, match="modules_to_save=.*trains adapters alone"):
        StructAdaptConfig(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="must be one of LoRA, DoRA, QuanTA, got 'OFT'"):
        StructAdaptConfig(adapter="OFT")
    with pytest.raises(ValueError, match="options of LoRA: .*'r'"):
        StructAdaptConfig(adapter="LoRA", options={"r": 4})
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        StructAdaptConfig(adapter="LoRA", options={"rank": 0})
    with pytest.raises(TypeError, match="a callable cannot be written"):
        StructAdaptConfig(target_modules=lambda name, module: True)
    bare = llama()
    with pytest.raises(ValueError, match="q_porj"):
        peft.get_peft_model(bare, StructAdaptConfig(target_modules="q_porj"))
    assert type(bare.model.layers[0].self_attn.q_proj) is nn.Linear
    assert StructAdaptConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]


def test_trl_refuses_an_adapter_on_the_head(tmp_path):
    config = StructAdaptConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        grpo(llama(), tmp_path, peft_config=config)


# -- merged weights for vLLM -----------------------------------------------------------------------


def assert_in_sync(tensors, model, dtype=torch.float32):
    """The tensors are the base model's, by name, and compute what the adapted model computes."""
    base = llama(dtype)
    assert [name for name, _ in tensors] == [name for name, _ in base.named_parameters()]
    assert all(tensor.dtype == dtype for _, tensor in tensors)
    result = base.load_state_dict(dict(tensors), strict=False)
    assert not result.unexpected_keys
    # fp32: T x - T0 x of QuanTA's paper start is a small difference of numbers of the size of x
    close = {"atol": 3e-6 if dtype == torch.float32 else 0.05, "rtol": 0}
    torch.testing.assert_close(logits(base), logits(model), **close)
    assert not torch.equal(logits(base), logits(llama(dtype)))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_have_the_base_names(kind, dtype, train_a_little):
    model = train_a_little(sa.adapt(llama(dtype), kind), scale=0.02)
    pointers = {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()}
    tensors = list(merged_named_parameters(model))
    assert_in_sync(tensors, model, dtype)
    assert base_is_untouched(model, dtype)
    assert {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()} == pointers
    with sa.merged(model):  # the same from a merged model
        again = list(merged_named_parameters(model))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors, again, strict=True))


def test_a_trained_bias_is_sent_with_the_bias():
    model = sa.adapt(nn.Sequential(nn.Linear(8, 6)), sa.LoRA(rank=2))
    layer = model[0]
    layer.delta_bias = nn.Parameter(torch.full((6,), 0.3))
    layer.tensor_names = (*layer.tensor_names, "delta_bias")
    twin = nn.Sequential(nn.Linear(8, 6))
    tensors = dict(merged_named_parameters(model))
    assert not torch.equal(tensors["0.bias"], layer.bias)
    twin.load_state_dict(tensors)
    x = torch.randn(3, 8)
    torch.testing.assert_close(twin(x), model(x))
    layer.bias = None
    with pytest.raises(ValueError, match="0 has a delta_bias and no bias to add it to"):
        next(merged_named_parameters(model))


def test_merged_weights_of_wrapped_models(train_a_little):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def make():
        return train_a_little(sa.adapt(llama(), sa.DoRA(rank=4)), scale=0.02)

    expected = make()
    peft_model = bridged(sa.DoRA(rank=4))
    train_a_little(peft_model.get_base_model(), scale=0.02)
    checkpointed, compiled_block = make(), make()
    checkpointed.model.layers[0] = checkpoint_wrapper(checkpointed.model.layers[0])
    compiled_block.model.layers[1] = torch.compile(compiled_block.model.layers[1])
    for model in (torch.compile(make()), peft_model, checkpointed, compiled_block):
        assert_in_sync(list(merged_named_parameters(model)), expected)


@pytest.fixture
def process_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_kind
def test_merged_weights_of_a_distributed_model(kind, process_group, train_a_little):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = train_a_little(sa.adapt(llama(), kind), scale=0.02)
    expected = list(merged_named_parameters(model))
    wrapped = nn.parallel.DistributedDataParallel(model)
    names = [name for name, _ in merged_named_parameters(wrapped)]
    assert names == [name for name, _ in expected]
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert hasattr(model.model.layers[0].mlp.up_proj.weight, "full_tensor")
    got = list(merged_named_parameters(model))
    assert not any(hasattr(tensor, "full_tensor") for _, tensor in got)
    for (name, tensor), (other, whole) in zip(got, expected, strict=True):
        assert name == other and torch.equal(tensor, whole), name


def test_parameters_are_gathered_layer_by_layer(train_a_little):
    model = sa.adapt(llama(), sa.LoRA(rank=2))
    gathered = []

    @contextmanager
    def gather(parameters):
        gathered.append(len(parameters))
        yield
        gathered.append(0)

    for _ in merged_named_parameters(model, gather):
        assert gathered[-1] in (1, 3)  # W, A and B, open while it is read
    assert gathered[1::2] == [0] * (len(gathered) // 2) and gathered.count(3) == 14


def test_merged_weights_refuse_tied_and_broken_ones():
    tied = sa.adapt(llama(tie_word_embeddings=True), sa.LoRA(rank=2), "lm_head")
    with pytest.raises(ValueError, match="lm_head and model.embed_tokens share a weight"):
        next(merged_named_parameters(tied))
    broken = sa.adapt(llama(), sa.LoRA(rank=2))
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: the merged weight is not"):
        list(merged_named_parameters(broken))


class Engine:
    """What TRL's client and vLLM's loader have of an engine."""

    def __init__(self):
        self.tensors, self.resets = [], 0

    def update_named_params(self, metadata, parameters):
        self.tensors = [(name, tensor.clone()) for name, tensor in parameters]
        described = [(n, str(t.dtype)[6:], list(t.shape)) for n, t in self.tensors]
        assert metadata == described

    def load_weights(self, pairs):
        self.tensors += [(name, tensor.clone()) for name, tensor in pairs]

    def reset_prefix_cache(self):
        self.resets += 1


def generation(model, mode="server", fsdp=None):
    """TRL's vLLM backend without vLLM."""
    backend = object.__new__(VLLMGeneration)
    engine = Engine()
    runner = SimpleNamespace(model_executor=SimpleNamespace())
    runner.model_executor.driver_worker = SimpleNamespace(
        model_runner=SimpleNamespace(model=engine)
    )
    backend.__dict__ |= {
        "model": model,
        "accelerator": SimpleNamespace(is_main_process=True, device=torch.device("cpu")),
        "_dist": SimpleNamespace(
            is_fsdp=fsdp is not None, fsdp_version=fsdp, gather_params=lambda p: nullcontext()
        ),
        "mode": mode,
        "enable_sleep_mode": False,
        "_weight_metadata": None,
        "vllm_client": engine,
        "llm": SimpleNamespace(llm_engine=runner, reset_prefix_cache=engine.reset_prefix_cache),
    }
    return backend, engine


@every_kind
@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_trl_sends_merged_weights(kind, mode, train_a_little):
    model = train_a_little(sa.adapt(llama(), kind), scale=0.02)
    backend, engine = generation(model, mode)
    sync_merged_weights(SimpleNamespace(vllm_generation=backend))
    assert type(backend) is MergedVLLMGeneration
    for _ in range(2):
        engine.tensors = []
        backend.sync_weights()
        assert_in_sync(engine.tensors, model)
        assert base_is_untouched(model)
        train_a_little(model, scale=0.01, seed=2)
    assert engine.resets == 2


def test_trl_alone_would_send_the_adapter_and_no_update(train_a_little):
    model = train_a_little(sa.adapt(llama(), sa.LoRA(rank=2)))
    backend, engine = generation(model)
    backend.sync_weights()
    names = {name for name, _ in engine.tensors}
    assert "model.layers.0.mlp.up_proj.A" in names  # why this module is needed


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trl_merges_on_sync_through_the_bridge(kind, dtype, train_a_little):
    """TRL's own code for a PeftModel, unchanged: right names, and a base that does not drift."""
    model = bridged(kind, dtype)
    backend, engine = generation(model)
    for seed in range(5):
        train_a_little(model.get_base_model(), scale=0.01, seed=seed)
        backend.sync_weights()
        assert_in_sync(engine.tensors, model, dtype)
        assert base_is_untouched(model.get_base_model(), dtype)


def test_sync_merged_weights_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="set use_vllm=True"):
        sync_merged_weights(SimpleNamespace())
    backend, _ = generation(sa.adapt(llama(), sa.LoRA()), fsdp=1)
    with pytest.raises(ValueError, match="FSDP 1"):
        sync_merged_weights(backend)


def test_trl_still_has_what_is_overridden():
    """Private in TRL: this fails when a release moves it, before a run sends the wrong weights."""
    method = VLLMGeneration._iter_named_params
    assert inspect.isgeneratorfunction(method) and [*inspect.signature(method).parameters] == [
        "self"
    ]
    assert "_iter_named_params" in inspect.getsource(VLLMGeneration.sync_weights)
    assert [*inspect.signature(VLLMGeneration.sync_weights).parameters] == ["self"]
    source = inspect.getsource(VLLMGeneration.__init__)
    assert "self.model = model" in source and "self._dist = DistributedBackend" in source
    assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(GRPOTrainer.__init__)
