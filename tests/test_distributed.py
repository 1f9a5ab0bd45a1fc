"""Adapted models under DDP, FSDP2 and tensor parallelism, on two gloo processes.

The module runs itself twice, once per rank; every check reports, and pytest shows one test each.
"""

import copy
import json
import os
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import structadapt as sa
from structadapt.spectra.states import MEASURES

WORLD, SEQ, WIDTH = 2, 6, 24
TARGET = ["all-linear", "embed"]
ADAPTERS = (
    sa.LoRA(rank=3, alpha=5.0),
    sa.DoRA(rank=3, alpha=5.0),
    sa.QuanTA(),
    sa.QuanTA(init="paper"),
)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# -- the model and its training --------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype)


def adapted(adapter, dtype=torch.float32):
    """An adapted model that has moved from where it started, the same on every rank."""
    model = sa.adapt(base(dtype), adapter, TARGET)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def batch():
    return torch.randint(0, 16, (2 * WORLD, SEQ), generator=torch.Generator().manual_seed(2))


def mine(ids):
    return ids.chunk(WORLD)[dist.get_rank()]


def loss_of(model, ids):
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(1, 1).flatten())


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, ids, steps=3):
    """The gradients of the first step, and the adapter after all of them."""
    optimizer = torch.optim.AdamW(sa.parameter_groups(model, 1e-2, b_ratio=4, weight_decay=0.1))
    first = None
    for _ in range(steps):
        loss_of(model, ids).backward()
        first = first or [full(p.grad).clone() for p in sa.adapter_parameters(model)]
        optimizer.step()
        optimizer.zero_grad()
    return first, [full(p.detach()).clone() for p in sa.adapter_parameters(model)]


def shard(model, **kwargs):
    for block in model.blocks:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


def close(found, expected, tolerance):
    """Relative to the whole of each list: Adam turns a tiny gradient into a whole step."""
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        assert torch.isfinite(left).all()
    error = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm()
    size = torch.cat([b.flatten() for b in expected]).norm()
    assert error <= tolerance * size, f"{(error / size).item():.1e} off"


def same_training(model, plain):
    """`model` on this rank's share is trained as `plain` on the whole batch."""
    found, expected = train(model, mine(batch())), train(plain, batch())
    for left, right in zip(found, expected, strict=True):
        close(left, right, 1e-6)


def identical(found, expected):
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(full(left), full(right))


# -- data parallel ---------------------------------------------------------------------------------


def ddp(model, **kwargs):
    return nn.parallel.DistributedDataParallel(model, **kwargs)


@check
def ddp_gives_the_gradients_of_one_process(folder):
    for adapter in ADAPTERS:
        for kwargs in ({}, {"static_graph": True}):
            same_training(ddp(adapted(adapter), **kwargs), adapted(adapter))


@check
def compiled_ddp_gives_them_too(folder):
    for adapter in ADAPTERS[1:3]:
        torch._dynamo.reset()
        model = torch.compile(ddp(adapted(adapter)), backend="aot_eager")
        same_training(model, adapted(adapter))


@check
def ddp_adds_up_micro_batches(folder):
    expected, _ = train(adapted(ADAPTERS[1]), batch(), steps=1)
    model = ddp(adapted(ADAPTERS[1]))
    first, second = mine(batch()).chunk(2)
    with model.no_sync():
        loss_of(model, first).backward()
    loss_of(model, second).backward()
    close([p.grad / 2 for p in sa.adapter_parameters(model)], expected, 1e-6)


@check
def ddp_starts_every_rank_from_rank_0_and_nothing_kept_is_stale(folder):
    expected, model = adapted(ADAPTERS[1])(batch()), adapted(ADAPTERS[1])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * dist.get_rank())
    model(batch())  # keeps norms
    torch.testing.assert_close(ddp(model)(batch()), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * dist.get_rank())
    model(batch())
    for p in model.parameters():
        dist.broadcast(p.data, 0)  # nothing tells of this write
    for module in model.modules():
        if hasattr(module, "watch"):
            module.watch()
    torch.testing.assert_close(model(batch()), expected)


@check
def ddp_needs_to_be_told_of_adapters_that_a_forward_leaves_out(folder):
    def step(model):
        with sa.disabled(model.module.blocks[0]):
            loss_of(model, mine(batch())).backward()

    model = ddp(adapted(ADAPTERS[0]))
    step(model)
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        step(model)
    model = ddp(adapted(ADAPTERS[0]), find_unused_parameters=True)
    for _ in range(3):
        step(model)
    with pytest.raises(RuntimeError, match="is not needed when a module"):
        ddp(adapted(ADAPTERS[0]).requires_grad_(False))


# -- sharded ---------------------------------------------------------------------------------------


@check
def fsdp2_gives_the_gradients_of_one_process(folder):
    for adapter in ADAPTERS:
        same_training(shard(adapted(adapter)), adapted(adapter))


@check
def a_bf16_base_with_fp32_adapters_is_sharded_as_it_is(folder):
    for adapter in ADAPTERS:
        model = shard(adapted(adapter, torch.bfloat16))
        assert {p.dtype for p in sa.adapter_parameters(model)} == {torch.float32}
        found = train(model, mine(batch()))
        for left, right in zip(
            found, train(ddp(adapted(adapter, torch.bfloat16)), mine(batch())), strict=True
        ):
            identical(left, right)
        close(found[0], train(adapted(adapter, torch.bfloat16), batch(), steps=1)[0], 2e-2)


@check
def blocks_are_compiled_first_and_sharded_after(folder):
    for adapter in ADAPTERS[:3]:
        torch._dynamo.reset()
        model = adapted(adapter)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        with warnings.catch_warnings():
            # torch hides this one itself, unless warnings are errors
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            same_training(shard(model), adapted(adapter))


@check
def the_gradient_norm_of_a_sharded_model(folder):
    plain, model = adapted(ADAPTERS[1]), shard(adapted(ADAPTERS[1]))
    loss_of(plain, batch()).backward()
    loss_of(model, mine(batch())).backward()
    expected = nn.utils.clip_grad_norm_(sa.adapter_parameters(plain), 1e-3)
    found = nn.utils.clip_grad_norm_(sa.adapter_parameters(model), 1e-3)
    torch.testing.assert_close(full(found), expected)
    close([full(p.grad) for p in sa.adapter_parameters(model)],
          [p.grad for p in sa.adapter_parameters(plain)], 1e-6)  # fmt: skip


@check
def mixed_precision_policies(folder):
    reducing = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    same_training(shard(adapted(ADAPTERS[1]), mp_policy=reducing), adapted(ADAPTERS[1]))
    lowering = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for adapter in ADAPTERS:  # adapters reach the forward in bf16 too: rough, not wrong
        found, _ = train(shard(adapted(adapter), mp_policy=lowering), mine(batch()), steps=1)
        close(found, train(adapted(adapter), batch(), steps=1)[0], 3e-2)


@check
def every_rank_draws_the_same_adapter(folder):
    torch.manual_seed(dist.get_rank())
    model = sa.adapt(Model(), sa.QuanTA(init="paper"))
    for p in sa.adapter_parameters(model):
        ranks = [torch.empty_like(p) for _ in range(WORLD)]
        dist.all_gather(ranks, p.detach())
        assert torch.equal(*ranks)


@check
def wrong_orders_are_refused(folder):
    order = "adapt first, then compile, then shard"
    whole = base()
    fully_shard(whole)
    for model in (shard(base()), whole):
        with pytest.raises(RuntimeError, match=order):
            sa.adapt(model, sa.LoRA(rank=2))
        model(mine(batch()))  # the root stays unsharded after a forward
        with pytest.raises(RuntimeError, match=order):
            sa.adapt(model, sa.LoRA(rank=2))
    with pytest.raises(RuntimeError, match="DistributedDataParallel: adapt first"):
        sa.adapt(ddp(base()), sa.LoRA(rank=2))
    with pytest.raises(RuntimeError, match="is sharded: merge before sharding, or unshard"):
        sa.merge(shard(adapted(ADAPTERS[0])))
    with pytest.raises(RuntimeError, match=order):
        sa.load(shard(base()), folder / "missing")


@check
def layers_run_outside_their_block_once_it_is_unsharded(folder):
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    for adapter in ADAPTERS[:3]:
        model = shard(adapted(adapter))
        layer, plain = model.blocks[0].up, adapted(adapter).blocks[0].up
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            layer(x)
        for _ in range(2):
            model.blocks[0].unshard()
            assert torch.equal(layer(x), plain(x))
            model.blocks[0].reshard()
            train(model, mine(batch()), steps=1)
            for p, q in zip(plain.trained_tensors(), layer.trained_tensors(), strict=True):
                p.data.copy_(full(q.detach()))


@check
def ranks_that_generate_different_numbers_of_tokens(folder):
    model = shard(adapted(ADAPTERS[1]))
    for module in (model, *model.blocks):
        module.unshard()
        module.set_reshard_after_forward(False)
    with torch.inference_mode():
        for _ in range(1 + 3 * dist.get_rank()):
            found = model(batch())
    for module in (model, *model.blocks):
        module.reshard()
        module.set_reshard_after_forward(True)
    assert torch.equal(found, adapted(ADAPTERS[1])(batch()))
    same_training(model, adapted(ADAPTERS[1]))


# -- states ----------------------------------------------------------------------------------------

WHOLE = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
LAX = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def on_meta(adapter):
    with torch.device("meta"):
        return shard(sa.adapt(Model(), adapter, TARGET))


@check
def meta_then_shard_then_load(folder):
    for adapter in ADAPTERS:
        expected = sa.adapt(base(), adapter, TARGET)
        with pytest.raises(RuntimeError, match="has no values yet: load the base weights"):
            on_meta(adapter).to_empty(device="cpu")(batch())
        for options in (WHOLE, BROADCAST, LAX):
            for emptied in (True, False):
                model = on_meta(adapter)
                model = model.to_empty(device="cpu") if emptied else model
                rank_0 = dist.get_rank() == 0 or not options.broadcast_from_rank0
                state = base().state_dict() if rank_0 else {}
                with warnings.catch_warnings():  # of torch about itself
                    warnings.simplefilter("ignore")
                    set_model_state_dict(model, state, options=options)
                identical(model.state_dict().values(), expected.state_dict().values())
                assert torch.equal(model(batch()), expected(batch()))
                found, _ = train(model, mine(batch()), steps=1)
                close(found, train(copy.deepcopy(expected), batch(), steps=1)[0], 1e-6)
        for options in (WHOLE, BROADCAST):  # a base and its adapters at once
            model = on_meta(adapter).to_empty(device="cpu")
            set_model_state_dict(model, adapted(adapter).state_dict(), options=options)
            identical(model.state_dict().values(), adapted(adapter).state_dict().values())
            assert torch.equal(model(batch()), adapted(adapter)(batch()))


@check
def another_base_is_refused_by_a_dora_that_is_sharded(folder):
    other = {name: 2 * tensor for name, tensor in base().state_dict().items()}
    set_model_state_dict(shard(adapted(ADAPTERS[1])), base().state_dict(), options=WHOLE)
    with pytest.raises(RuntimeError, match="has a DoRA of another weight: load first, then adapt"):
        set_model_state_dict(shard(adapted(ADAPTERS[1])), {**other}, options=WHOLE)
    model = shard(adapted(ADAPTERS[0]))
    set_model_state_dict(model, {**other}, options=WHOLE)
    assert torch.equal(full(model.blocks[0].up.weight), other["blocks.0.up.weight"])


@check
def adapters_of_a_sharded_model_are_saved_whole(folder):
    for i, adapter in enumerate(ADAPTERS):
        plain, model = adapted(adapter), shard(adapted(adapter))
        sa.save(model, folder / f"sharded_{i}")
        dist.barrier()
        if dist.get_rank() == 0:
            sa.save(plain, folder / f"plain_{i}")
            assert (folder / f"sharded_{i}").read_bytes() == (folder / f"plain_{i}").read_bytes()
            assert torch.equal(sa.load(base(), folder / f"sharded_{i}")(batch()), plain(batch()))
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
        if dist.get_rank() == 0:
            assert trained.keys() <= state.keys()
            assert all(torch.equal(state[n], p) for n, p in trained.items())
            assert all(".frozen_" in n for n in state.keys() - trained.keys())


@check
def updates_of_a_sharded_model_are_whole(folder):
    for adapter in ADAPTERS:
        plain, model = adapted(adapter), shard(adapted(adapter))
        expected, found = dict(sa.delta_weights(plain)), dict(sa.delta_weights(model))
        assert expected.keys() == found.keys()
        for name, delta in found.items():
            assert type(delta) is torch.Tensor
            torch.testing.assert_close(delta, expected[name])


@check
def distributed_checkpoints_become_one_file_and_are_refused_in_part(folder):
    model = shard(adapted(ADAPTERS[1]))
    dcp.async_save(get_model_state_dict(model), checkpoint_id=folder / "dcp_one").result()
    dist.barrier()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        dcp_to_torch_save(folder / "dcp_one", folder / "one.pt")
        state = torch.load(folder / "one.pt", weights_only=True)
        assert state.keys() == whole.keys() and all(torch.equal(state[k], whole[k]) for k in whole)
        plain = adapted(ADAPTERS[1])
        for p in sa.adapter_parameters(plain):
            p.data.zero_()
        plain.load_state_dict(state)
        identical(sa.adapter_parameters(plain), sa.adapter_parameters(adapted(ADAPTERS[1])))
        shard_file = max((folder / "dcp_one").glob("*.distcp"))
        shard_file.write_bytes(shard_file.read_bytes()[:100])
    dist.barrier()
    try:
        dcp.load(get_model_state_dict(model), checkpoint_id=folder / "dcp_one")
    except dcp.api.CheckpointException:
        pass
    else:
        raise AssertionError("a truncated shard was loaded")


@check
def distributed_checkpoints_continue_where_they_stopped(folder):
    def start():
        model = shard(adapted(ADAPTERS[1]))
        return model, torch.optim.AdamW(sa.parameter_groups(model, 1e-2))

    def step(model, optimizer):
        loss_of(model, mine(batch())).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state(*of):
        options = StateDictOptions(ignore_frozen_params=True)
        return dict(zip(("model", "optimizer"), get_state_dict(*of, options=options), strict=True))

    one, two = start(), start()
    step(*one), step(*two), step(*two)
    dcp.save(state(*one), checkpoint_id=folder / "dcp")
    saved = state(*two)
    dcp.load(saved, checkpoint_id=folder / "dcp")
    options = StateDictOptions(strict=False)
    set_state_dict(
        *two,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=options,
    )
    step(*one), step(*two)
    identical(sa.adapter_parameters(one[0]), sa.adapter_parameters(two[0]))


@check
def the_monitor_reads_sharded_adapters_as_whole_ones(folder):
    for adapter in ADAPTERS:
        models = adapted(adapter), shard(adapted(adapter)), ddp(adapted(adapter))
        monitors = [sa.spectra.Monitor(model, every=2) for model in models]
        for model in models:
            with torch.no_grad():
                for p in sa.adapter_parameters(model):
                    p.mul_(1.5)
        for monitor in monitors:
            assert monitor.step() is None
            monitor.load_state_dict(monitor.state_dict())
        assert len(monitors[0].updates) == len(list(sa.delta_weights(models[0])))
        one, *others = [monitor.step() for monitor in monitors]
        for reading in others:
            assert (reading.step, reading.state) == (one.step, one.state)
            for left, right in zip(reading.rows, one.rows, strict=True):
                assert (left.name, left.shape, left.state) == (right.name, right.shape, right.state)
                for name in MEASURES:  # W^T of an embedding has other strides
                    found, expected = getattr(left, name), getattr(right, name)
                    assert abs(found - expected) <= 1e-5 * expected, (adapter, left, right)
        path = folder / f"monitor-{dist.get_rank()}.jsonl"
        monitors[1].to_jsonl(path)
        assert path.exists() == (dist.get_rank() == 0)


# -- tensor parallel -------------------------------------------------------------------------------


@check
def tensor_parallel_layers(folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    names = ("weight", "bias", "A", "B", "m")
    column = dict(zip(names, (Shard(0), Shard(0), Replicate(), Shard(0), Shard(0)), strict=True))
    row = dict(zip(names, (Shard(1), Replicate(), Shard(1), Replicate(), Replicate()), strict=True))
    x = torch.randn(5, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
    for adapter in ADAPTERS[:2]:
        for placements, placed in ((column, Replicate()), (row, Shard(1))):
            plain = adapted(adapter).blocks[0].down
            layer = copy.deepcopy(plain)
            for name, p in list(layer.named_parameters()):
                sharded = distribute_tensor(p.detach(), mesh, [placements[name]])
                setattr(layer, name, nn.Parameter(sharded, p.requires_grad))
            y = layer(distribute_tensor(x, mesh, [placed])).full_tensor()
            torch.testing.assert_close(y, plain(x))
            y.square().sum().backward()
            plain(x).square().sum().backward()
            for left, right in zip(layer.trained_tensors(), plain.trained_tensors(), strict=True):
                torch.testing.assert_close(full(left.grad), right.grad, rtol=1e-5, atol=1e-5)


# -- running it ------------------------------------------------------------------------------------


def run_checks(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=20),  # of one collective: a check that hangs is a failure
    )
    report = {}
    for name, function in CHECKS.items():
        try:
            function(folder)
            report[name] = None
        except BaseException:
            report[name] = traceback.format_exc()
        (folder / f"report_{rank}").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), folder], env=environment)
        for rank in range(WORLD)
    ]
    try:
        codes = [rank.wait(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * WORLD
    return [json.loads((folder / f"report_{rank}").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, reports):
    for rank, report in enumerate(reports):
        assert report[name] is None, f"rank {rank}: {report[name]}"


if __name__ == "__main__":
    run_checks(int(sys.argv[1]), Path(sys.argv[2]))
