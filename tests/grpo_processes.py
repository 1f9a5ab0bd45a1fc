"""Run by torchrun: the same training on any number of processes; what comes out in a file."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import structadapt as sa

EOS = 3
PROMPTS = [[5, 6, 7], [8], [9, 4, 5, 6], [5, 6], [7, 7, 7], [10], [4, 5], [11, 4], [6, 6, 6]]
COMMON = {"eos_token_id": EOS, "max_new_tokens": 7, "group_size": 3, "prompts_per_step": 4}
CASES = {  # name: (config, how the model is wrapped)
    "dapo": ({"minibatches": 2, "epochs": 2}, None),
    "grpo": ({"loss": "grpo", "micro_batch_size": 2}, None),
    "dr_grpo": ({"loss": "dr_grpo", "advantage": "batch", "slots": 2}, None),
    "gspo": ({"loss": "gspo", "overlong_buffer": 3, "advantage": "rloo"}, None),
    "everything": (
        {"kl_coef": 0.1, "importance_cap": 2.0, "overlong": "mask", "max_resamples": 2}, None,
    ),
    "ddp": ({"minibatches": 2}, "ddp"),
    "fsdp": ({"micro_batch_size": 5, "minibatches": 2}, "fsdp"),
    "partly": ({"micro_batch_size": 2}, "partly"),  # the adapters are not sharded
    "whole": ({}, "fsdp"),  # the base itself trains, sharded
}  # fmt: skip


def model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=EOS, initializer_range=0.4,
    )  # fmt: skip
    return sa.adapt(LlamaForCausalLM(config).double(), sa.LoRA(rank=4), seed=1)


def reward(prompt, completion):
    return float(sum(completion) % 3 == 0)


class Speaker:
    """An observer whose word differs from process to process: the first one's counts."""

    seen = 0

    def after(self, step):
        self.seen += 1
        return (f"word {self.seen}: of {dist.get_rank() if dist.is_initialized() else 0}",)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def run(name, folder=None, steps=99):
    """({parameter: value}, records) after training."""
    options, wrap = CASES[name]
    bare = wrapped = model()
    if name == "whole":
        bare.requires_grad_(True)
    if wrap == "ddp" and dist.is_initialized():
        wrapped = DistributedDataParallel(bare)
    if wrap in ("fsdp", "partly") and dist.is_initialized():
        plain = set(sa.adapter_parameters(bare)) if wrap == "partly" else set()
        for block in bare.model.layers:
            fully_shard(block, ignored_params=plain)
        fully_shard(bare, ignored_params=plain)
    if wrap is None:
        optimizer = torch.optim.SGD(sa.adapter_parameters(bare), lr=1.0, momentum=0.5)
    else:  # with frozen and unused parameters, which nothing may move
        bare.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.AdamW(bare.parameters(), lr=0.05, weight_decay=0.1)
    config = sa.grpo.Config(**COMMON, **options)
    checkpoints = folder and sa.grpo.Checkpoints(folder, every=1)
    training = sa.grpo.train(
        wrapped, optimizer, PROMPTS, reward, config, checkpoints=checkpoints,
        reference=lambda: sa.disabled(bare), observers=[Speaker()],
    )  # fmt: skip
    records = [asdict(step) for _, step in zip(range(steps), training, strict=False)]
    named = dict(bare.named_parameters())
    whole = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in named.items()}
    return whole, records


def evaluated(sharded=False, reward=reward):
    """(what `evaluate` finds, the prompts that this process rewarded): batches of two prompts a
    process, and one prompt is left for the last."""
    bare, own = model(), []
    if sharded and dist.is_initialized():
        fully_shard(bare)

    def seen(prompt, completion):
        own.append(prompt)
        return reward(prompt, completion)

    config = sa.grpo.Config(**COMMON)
    how = {"samples": 3, "k": (1, 2), "batch_size": 6, "spread": True}
    return asdict(sa.grpo.evaluate(bare, PROMPTS, seen, config, **how)), own


def broken_reward(prompt, completion):
    return 1.0 / (prompt != [8])


class Failing(nn.Module):
    """The logits of one rank are NaN."""

    def __init__(self, inner, broken):
        super().__init__()
        self.inner, self.broken = inner, broken

    def forward(self, ids, mask, position_ids):
        logits = self.inner(ids, attention_mask=mask, position_ids=position_ids).logits
        return logits * float("nan") if self.broken else logits


def main(out):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == 2
    found = {name: run(name) for name in CASES}
    for name in ("dapo", "fsdp", "whole"):  # stopped and gone on with
        folder = Path(out).parent / f"states_{name}"
        run(name, folder, steps=2)
        if name == "whole" and rank == 0:  # the second state is damaged: the first is taken
            found_file = sorted(folder.glob("step-00000001/shards/*.distcp"))[-1]
            found_file.write_bytes(found_file.read_bytes()[:-1])
        dist.barrier()
        found[f"{name} resumed"] = run(name, folder)
    found |= {f"evaluate {sharded}": evaluated(sharded) for sharded in (False, True)}
    try:
        evaluated(reward=broken_reward)
    except RuntimeError as error:
        found["evaluate, broken"] = str(error)
    everyone = [None] * size
    dist.all_gather_object(everyone, found)
    for sharded in (False, True):
        broken = Failing(model(), rank == 1)
        if sharded:
            fully_shard(broken)
        optimizer = torch.optim.SGD(sa.adapter_parameters(broken.inner), lr=1.0)
        training = sa.grpo.train(broken, optimizer, PROMPTS, reward, sa.grpo.Config(**COMMON))
        try:
            next(training)
        except (FloatingPointError, RuntimeError) as error:
            assert "logits are not finite for prompt 1" in str(error), error
        else:
            raise AssertionError("one rank fails, and all stop")
    if rank == 0:
        torch.save(everyone, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
