"""Putting adapters on a model and taking their effect out again."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import structadapt as sa

TARGET = "all-linear"
LINEAR = [f"blocks.{i}.{n}" for i in range(2) for n in ("attn", "up", "down")]


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def adapted_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, sa.AdaptedLinear)]


# -- adapt -----------------------------------------------------------------------------------------


def test_adapt_keeps_the_layer_its_keys_and_its_output(net, ids, adapter):
    base, expected = bits(net), net(ids)
    layers = dict(net.named_modules())
    weights = {n: layers[n].weight for n in LINEAR}
    assert sa.adapt(net, adapter) is net
    assert adapted_names(net) == LINEAR
    for name in LINEAR:
        assert net.get_submodule(name) is layers[name] and isinstance(layers[name], nn.Linear)
        assert layers[name].weight is weights[name]
    assert torch.equal(net(ids), expected)
    assert torch.equal(net.eval()(ids), expected)
    state = net.state_dict()
    assert same({k: state[k] for k in base}, base)
    net.load_state_dict(base)  # a base checkpoint keeps loading
    name = next(iter(state.keys() - base.keys()))
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{name}\""):
        net.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"blocks.0.up.weight"):
        net.load_state_dict({k: v for k, v in base.items() if k != "blocks.0.up.weight"})


def test_only_adapters_train(net, ids, adapter):
    sa.adapt(net, adapter)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    tensors = {n for n in net.state_dict() if n.rsplit(".", 1)[-1] not in ("weight", "bias")}
    assert trained == {n for n in tensors if ".frozen_" not in n}
    assert {id(p) for p in sa.adapter_parameters(net)} == {
        id(p) for p in net.parameters() if p.requires_grad
    }
    assert all(p.dtype == torch.float32 for p in sa.adapter_parameters(net))
    before = bits(net)
    optimizer = torch.optim.SGD(sa.adapter_parameters(net), lr=0.1)
    net(ids).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and changed <= trained


def test_adapters_are_fp32_over_a_bf16_base(net, ids, adapter, train_a_little):
    net.bfloat16()
    expected = net(ids)
    sa.adapt(net, adapter)
    assert all(p.dtype == torch.float32 for p in sa.adapter_parameters(net))
    assert torch.equal(net(ids), expected)
    train_a_little(net)
    net(ids).float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in sa.adapter_parameters(net))
    assert net(ids).dtype == torch.bfloat16


def test_fresh_tensors_depend_on_seed_and_name_alone(net):
    other = copy.deepcopy(net)
    state = torch.get_rng_state()
    sa.adapt(net, sa.LoRA())
    assert torch.equal(torch.get_rng_state(), state)
    sa.adapt(other, sa.LoRA(), "blocks.1.attn")  # other layers, other order
    assert torch.equal(net.blocks[1]["attn"].A, other.blocks[1]["attn"].A)
    assert not torch.equal(net.blocks[0]["attn"].A, net.blocks[1]["attn"].A)
    third = sa.adapt(copy.deepcopy(other), sa.LoRA(), "blocks.0.attn", seed=1)
    assert not torch.equal(third.blocks[0]["attn"].A, net.blocks[0]["attn"].A)


def test_a_second_adapter_on_other_layers(net, ids):
    sa.adapt(net, sa.LoRA(rank=2), "attn")
    sa.adapt(net, sa.QuanTA(), "up")
    kinds = {n: type(net.get_submodule(n).adapter).__name__ for n in adapted_names(net)}
    assert kinds == {
        n: "LoRA" if n.endswith("attn") else "QuanTA" for n in LINEAR if not n.endswith("down")
    }
    net(ids).square().sum().backward()
    assert all(p.grad is not None for p in sa.adapter_parameters(net))
    assert len(list(sa.adapter_parameters(net))) == 2 * 2 + 2 * 3
    with pytest.raises(ValueError, match=r"blocks.0.attn is adapted already, with LoRA\(rank=2"):
        sa.adapt(net, sa.LoRA(), TARGET)


@pytest.mark.parametrize(
    "target, expected",
    [
        ("all-linear", LINEAR),
        ("attn", ["blocks.0.attn", "blocks.1.attn"]),
        ("blocks.0.attn", ["blocks.0.attn"]),
        (r"blocks\.1\..*", LINEAR[3:]),
        ("up|down", [n for n in LINEAR if not n.endswith("attn")]),
        (["blocks.0.up", "lm_head"], ["blocks.0.up", "lm_head"]),
        (lambda name, module: module.bias is None, ["blocks.0.up", "blocks.1.up", "lm_head"]),
        (["attn", lambda name, module: name == "lm_head"],
         ["blocks.0.attn", "blocks.1.attn", "lm_head"]),
    ],
)  # fmt: skip
def test_targets(net, target, expected):
    assert adapted_names(sa.adapt(net, sa.LoRA(), target)) == expected


class Inside(nn.Module):
    """A module whose layer has its own name: proj, and proj.proj."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(x)


def test_a_pattern_that_matches_a_module_and_a_layer_inside_adapts_the_layer(train_a_little):
    model = nn.Module()
    model.proj = Inside()
    sa.adapt(model, sa.LoRA(rank=2), "proj")
    assert adapted_names(model) == ["proj.proj"]
    train_a_little(model)
    x = torch.randn(3, 4)
    layer = model.proj.proj
    W = layer.adapter.weight(layer.weight, layer.tensors())
    torch.testing.assert_close(model.proj(x), x @ W.T + layer.bias)


def test_exclude(net):
    sa.adapt(net, sa.LoRA(), exclude=["down", r"blocks\.0\.up"])
    assert adapted_names(net) == ["blocks.0.attn", "blocks.1.attn", "blocks.1.up"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            {"target": "atn"},
            r"target 'atn' matches no nn.Linear or .* \(near: blocks.0.attn",
        ),
        (
            {"target": ["attn", "upp"]},
            r"'upp' matches no nn.Linear or .* \(near: blocks.0.up\b",
        ),
        ({"target": "blocks.0.atn"}, r"near: blocks.0.attn"),
        ({"target": "zzz"}, r"near: embed, blocks.0.attn, blocks.0.up, blocks.0.down, lm_head"),
        ({"target": "tt"}, "matches no nn.Linear"),
        ({"target": "blocks"}, r"a ModuleList: only nn.Linear, .*inside it is 'blocks\..*'"),
        ({"target": "("}, "is not a regular expression"),
        ({"target": []}, "no layer to adapt"),
        ({"target": lambda n, m: False}, "matches none of the 8 layers that can be adapted"),
        (
            {"exclude": "dwn"},
            r"exclude 'dwn' matches no nn.Linear or .* \(near: blocks.0.down",
        ),
        ({"target": "up", "exclude": "all-linear"}, "no layer to adapt: target 'up', exclude"),
    ],
)
def test_a_pattern_that_matches_nothing_changes_nothing(net, arguments, words):
    before = repr(net)
    for function in (sa.adapt, sa.plan):
        with pytest.raises(ValueError, match=words):
            function(net, sa.LoRA(), **arguments)
    assert repr(net) == before and all(p.requires_grad for p in net.parameters())


def test_a_layer_that_does_not_suit_the_adapter_changes_nothing(net):
    net.odd = nn.Linear(13, 32)
    before = repr(net)
    for function in (sa.adapt, sa.plan):
        with pytest.raises(ValueError, match="^odd: QuanTA: 13 -> 32 does not factor"):
            function(net, sa.QuanTA())
    assert repr(net) == before and all(p.requires_grad for p in net.parameters())


def test_wrong_order_is_refused(net, ids):
    with pytest.raises(TypeError, match=r"adapter must be one of LoRA\(\), DoRA\(\), QuanTA\(\)"):
        sa.adapt(net, "lora")
    with torch.inference_mode():
        frozen = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="0 was built under torch.inference_mode"):
        sa.adapt(frozen, sa.LoRA())
    for compiled in (
        torch.compile(net, backend="eager"),
        nn.Sequential(torch.compile(net, backend="eager")),
    ):
        with pytest.raises(RuntimeError, match="is compiled: adapt first, then compile"):
            sa.adapt(compiled, sa.LoRA())
    layer = nn.Linear(4, 4)
    layer.compile(backend="eager")
    with pytest.raises(RuntimeError, match="Linear is compiled"):
        sa.adapt(layer, sa.LoRA())
    sa.merge(sa.adapt(net, sa.LoRA(), "attn"))
    with pytest.raises(RuntimeError, match="is merged: unmerge first"):
        sa.adapt(net, sa.LoRA(), "up")


def test_subclasses_with_their_own_forward_are_left_alone():
    """nn.MultiheadAttention never calls its out_proj: an adapter there would do nothing."""
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 16)})
    assert adapted_names(sa.adapt(model, sa.LoRA())) == ["out"]
    with pytest.raises(ValueError, match="a NonDynamicallyQuantizableLinear: only nn.Linear"):
        sa.adapt(nn.MultiheadAttention(16, 2), sa.LoRA(), "out_proj")


def test_a_layer_under_two_names_is_adapted_once_and_everywhere(train_a_little):
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sa.adapt(model, sa.LoRA(rank=2))
    train_a_little(model)
    assert len(list(sa.adapter_parameters(model))) == 2 and model[0] is model[2]
    x = torch.randn(3, 8)
    W = shared.weight + next(iter(sa.delta_weights(model)))[1]
    hidden = F.linear(torch.relu(F.linear(x, W, shared.bias)), W, shared.bias)
    torch.testing.assert_close(model(x), hidden)


def test_hooks_copies_and_pickles_survive(net, ids, adapter, train_a_little):
    calls = []
    net.blocks[0]["attn"].register_forward_hook(lambda *a: calls.append(1))
    train_a_little(sa.adapt(net, adapter))
    expected = net(ids)
    assert calls
    net.blocks[0]["attn"]._forward_hooks.clear()
    buffer = io.BytesIO(pickle.dumps(net))
    for twin in (copy.deepcopy(net), pickle.load(buffer)):
        assert torch.equal(twin(ids), expected)
        train_a_little(twin)
    assert torch.equal(net(ids), expected)


def test_torch_compile_without_a_graph_break(adapter, train_a_little):
    torch._dynamo.reset()
    model = train_a_little(sa.adapt(nn.Sequential(nn.Linear(48, 96)), adapter))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 48)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in sa.adapter_parameters(model))


# -- disabled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_4_disabled_is_the_base_model_bit_for_bit(net, ids, adapter, dtype, train_a_little):
    net.to(dtype)
    base = net(ids)
    train_a_little(sa.adapt(net, adapter))
    adapted = net(ids)
    assert not torch.equal(adapted, base)
    with sa.disabled(net):
        assert torch.equal(net(ids), base)
        with sa.disabled(net):
            assert torch.equal(net(ids), base)
        assert torch.equal(net(ids), base)
    assert torch.equal(net(ids), adapted)
    with sa.merged(net), sa.disabled(net):
        assert torch.equal(net(ids), base)
    with pytest.raises(KeyError), sa.disabled(net):
        raise KeyError
    assert torch.equal(net(ids), adapted)


# -- merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_law_3_unmerge_restores_the_base_bit_for_bit(net, adapter, dtype, train_a_little):
    net.to(dtype)
    sa.adapt(net, adapter, r"blocks\.0\..*")
    base = {n: net.get_submodule(n).weight.detach().clone() for n in LINEAR}
    for cycle in range(100):
        train_a_little(net, scale=0.01, seed=cycle)
        sa.merge(net)
        assert not torch.equal(net.blocks[0]["attn"].weight, base["blocks.0.attn"])
        sa.unmerge(net)
    assert all(torch.equal(net.get_submodule(n).weight, base[n]) for n in LINEAR)


def test_merged_weights_are_the_adapted_ones(net, ids, adapter, train_a_little):
    train_a_little(sa.adapt(net, adapter))
    expected, deltas = net(ids), dict(sa.delta_weights(net))
    parameters = [id(p) for p in net.parameters()]
    base = {n: net.get_submodule(n).weight.detach().clone() for n in LINEAR}
    with sa.merged(net):
        torch.testing.assert_close(net(ids), expected, rtol=1e-4, atol=1e-5)
        assert [id(p) for p in net.parameters()] == parameters
        for name, delta in sa.delta_weights(net):
            assert torch.equal(delta, deltas[name]) and delta.dtype == torch.float32
            merged = net.get_submodule(name).weight
            torch.testing.assert_close(merged, base[name] + delta, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(ids), expected)
    with pytest.raises(KeyError), sa.merged(net):
        raise KeyError
    assert torch.equal(net(ids), expected)


def test_a_merged_model_moves_whole(net, ids, train_a_little):
    train_a_little(sa.adapt(net, sa.LoRA()))
    expected = net.double()(ids)
    sa.merge(net.float())
    net.double()
    sa.unmerge(net)
    torch.testing.assert_close(net(ids), expected)


def test_merge_refuses_and_changes_nothing(net, ids, train_a_little):
    with pytest.raises(ValueError, match="no adapted layer: call structadapt.adapt"):
        sa.merge(net)
    sa.adapt(net, sa.LoRA(), [TARGET, "lm_head"])
    net.lm_head.weight = net.embed.weight
    before = bits(net)
    with pytest.raises(ValueError, match="lm_head and embed share a weight"):
        sa.merge(net)
    net.lm_head.weight = nn.Parameter(net.embed.weight.detach().clone(), requires_grad=False)
    train_a_little(net)
    before = bits(net)
    with pytest.raises(RuntimeError, match="the model is not merged"):
        sa.unmerge(net)
    sa.merge(net)
    with pytest.raises(RuntimeError, match="blocks.0.attn is merged already"):
        sa.merge(net)
    sa.unmerge(net)
    assert same(bits(net), before)
    with torch.no_grad():
        net.blocks[1]["down"].B[0, 0] = float("nan")
    before = net.blocks[0]["attn"].weight.clone()
    with pytest.raises(ValueError, match=r"blocks.1.down: the merged weight is not finite"):
        sa.merge(net)
    assert torch.equal(net.blocks[0]["attn"].weight, before)


# -- looking ---------------------------------------------------------------------------------------


def test_functions_of_an_adapted_model_refuse_a_bare_one(net):
    for function in (sa.adapter_parameters, sa.delta_weights, sa.summary, sa.unmerge):
        with pytest.raises(ValueError, match="no adapted layer"):
            function(net)
    with pytest.raises(ValueError, match="no adapted layer"), sa.disabled(net):
        pass


def test_delta_weights(net, adapter, train_a_little):
    train_a_little(sa.adapt(net, adapter))
    for name, delta in sa.delta_weights(net):
        layer = net.get_submodule(name)
        W = layer.weight.double()
        p = {k: t.double() for k, t in layer.tensors().items()}
        torch.testing.assert_close(delta, (layer.adapter.weight(W, p) - W).float())
        assert not delta.requires_grad
        assert torch.equal(delta, (layer.adapter.weight(W, p) - W).float()), "formed in float64"


def test_plan_counts_what_adapt_does(net, adapter):
    before = repr(net)
    plan = sa.plan(net, adapter)
    assert repr(net) == before and [row.name for row in plan] == LINEAR
    base = sum(p.numel() for p in net.parameters())
    sa.adapt(net, adapter)
    assert plan.parameters == sum(p.numel() for p in sa.adapter_parameters(net))
    assert plan.base_parameters == base
    summary = sa.summary(net)
    assert summary == plan
    for row in summary:
        layer = net.get_submodule(row.name)
        assert row.shape == tuple(layer.weight.shape)
        assert row.tensors == {k: tuple(t.shape) for k, t in layer.tensors().items()}
    text = str(plan)
    assert all(name in text for name in LINEAR)
    assert re.search(rf"6 layers, {plan.parameters:,} trained parameters \([\d.]+% of", text)


def test_flops_of_one_token():
    model = nn.Sequential(nn.Linear(24, 60, bias=False))
    assert sa.plan(model, sa.LoRA(rank=3)).flops == 2 * 3 * (24 + 60)
    assert sa.plan(model, sa.DoRA(rank=3)).flops == 2 * 3 * (24 + 60)
    shapes = sa.plan(model, sa.QuanTA((2, 3, 4))).layers[0].tensors.values()
    left_alone = [2, 3, 3]  # size of the third axis at each gate; the last has shrunk by then
    by_hand = sum(2 * n * a * b * c * d for n, (a, b, c, d) in zip(left_alone, shapes, strict=True))
    assert sa.plan(model, sa.QuanTA((2, 3, 4))).flops == by_hand


# -- inside PyTorch --------------------------------------------------------------------------------


def test_a_merge_under_autocast_is_exact(net, adapter, train_a_little):
    base = {n: net.get_submodule(n).weight.detach().clone() for n in LINEAR}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sa.adapt(net, adapter)
        with sa.merged(net):
            assert all(torch.equal(net.get_submodule(n).weight, base[n]) for n in LINEAR)
    train_a_little(net)
    with sa.merged(net):
        expected = {n: net.get_submodule(n).weight.clone() for n in LINEAR}
    with torch.autocast("cpu", dtype=torch.bfloat16), sa.merged(net):
        assert all(torch.equal(net.get_submodule(n).weight, expected[n]) for n in LINEAR)


def test_low_precision_merges_round_once(net, adapter, train_a_little):
    train_a_little(sa.adapt(net.bfloat16(), adapter))
    with sa.merged(net):
        merged = {n: net.get_submodule(n).weight.clone() for n in LINEAR}
    for name, layer in ((n, net.get_submodule(n)) for n in LINEAR):
        p = {k: t.detach().double() for k, t in layer.tensors().items()}
        exact = layer.adapter.weight(layer.weight.double(), p)
        error = (merged[name].double() - exact).abs()
        assert (error <= 2.0**-8 * exact.abs() + 1e-6).all(), "more than one rounding"


def test_casting_an_adapted_model_keeps_the_adapter_in_fp32(net, ids, adapter, train_a_little):
    train_a_little(sa.adapt(net, adapter))
    before = [p.detach().clone() for p in sa.adapter_parameters(net)]
    objects = list(sa.adapter_parameters(net))
    net.bfloat16().half().float().double().bfloat16()
    assert [id(p) for p in sa.adapter_parameters(net)] == [id(p) for p in objects]
    assert all(p.dtype == torch.float32 for p in objects)
    assert all(torch.equal(p, b) for p, b in zip(objects, before, strict=True))
    assert net(ids).dtype == torch.bfloat16


def test_a_transformer_encoder_layer_uses_its_adapter_in_eval_mode(train_a_little):
    """In eval mode torch's fast path reads weights without calling their layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    base = layer.eval()(x)
    train_a_little(sa.adapt(layer, sa.LoRA(rank=2)))
    adapted = layer(x)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(layer.train()(x), adapted)
    with sa.merged(layer.eval()):
        torch.testing.assert_close(layer(x), adapted)


def test_a_transformer_encoder_takes_padding_in_eval_mode(train_a_little):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    train_a_little(sa.adapt(model, sa.LoRA(rank=2)))
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padded)
        torch.testing.assert_close(y[:1], model(x[:1]))
        torch.testing.assert_close(y[1:, :3], model(x[1:, :3]))


def test_layers_that_accelerate_has_hooked(adapter, train_a_little):
    """Its hooks keep the forward that the layer had, and call that."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48))
    x = torch.randn(3, 32)
    for layer in model:
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    base = model(x)
    adapter = adapter if getattr(adapter, "axes", 3) == 3 else sa.QuanTA(3)
    sa.adapt(model, adapter)
    assert torch.equal(model(x), base)
    train_a_little(model)
    y = model(x)
    y.square().sum().backward()
    assert not torch.equal(y, base) and all(
        p.grad is not None for p in sa.adapter_parameters(model)
    )
    with sa.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), y)


def test_a_forward_that_would_not_call_the_adapter_is_refused(tmp_path):
    layer = nn.Linear(4, 4)
    sa.save(sa.adapt(nn.Sequential(copy.deepcopy(layer)), sa.LoRA(rank=2)), tmp_path / "a")
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    for apply in (lambda model: sa.adapt(model, sa.LoRA()), lambda m: sa.load(m, tmp_path / "a")):
        with pytest.raises(
            RuntimeError, match="0: something has replaced its forward.*adapt first"
        ):
            apply(nn.Sequential(layer))
    assert type(layer) is nn.Linear
    model = cpu_offload(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="0: accelerate has offloaded its weight: adapt first"):
        sa.adapt(model, sa.LoRA())


def test_any_name_of_a_shared_layer_is_a_target():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(8, 8)})
    assert adapted_names(sa.adapt(model, sa.LoRA(rank=2), "second")) == ["first"]
    head = nn.Linear(8, 8)
    model = nn.ModuleDict({"out": head, "lm_head": head, "other": nn.Linear(8, 8)})
    assert adapted_names(sa.adapt(model, sa.LoRA(rank=2))) == ["other"]


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_refused(norm):
    model = nn.Sequential(norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"computed by weight_norm|only nn.Linear, nn.Embedding"):
        sa.adapt(model, sa.LoRA(rank=2), "0")


def test_an_attribute_of_the_same_name_is_refused(net):
    before = repr(net)
    for name in ("A", "enabled"):
        setattr(net.blocks[1]["down"], name, 3)
        with pytest.raises(ValueError, match=f"blocks.1.down has an attribute {name} already"):
            sa.adapt(net, sa.LoRA(rank=2))
        delattr(net.blocks[1]["down"], name)
    assert repr(net) == before and all(p.requires_grad for p in net.parameters())
    with pytest.raises(TypeError, match="target must be text, a callable or several"):
        sa.adapt(net, sa.LoRA(), None)
    net.blocks[0]["up"].weight = nn.Parameter(torch.empty(64, 0))
    with pytest.raises(ValueError, match="blocks.0.up: its weight is empty"):
        sa.adapt(net, sa.LoRA(), "up")


def test_an_interrupted_merge_leaves_the_model_unmerged(net, ids, monkeypatch, train_a_little):
    train_a_little(sa.adapt(net, sa.LoRA(rank=2)))
    expected, calls = net(ids), []

    def interrupt(self, name, value):
        if name == "base_weight" and value is not None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        nn.Module.__setattr__(self, name, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sa.AdaptedLinear, "__setattr__", interrupt)
        sa.merge(net)
    assert torch.equal(net(ids), expected)
    sa.merge(net)
    sa.unmerge(net)
    assert torch.equal(net(ids), expected)


def test_loading_a_state_dict_where_it_would_be_lost_or_wrong(net, ids, train_a_little):
    base = bits(net)
    other = {k: v + 0.1 if k.endswith("weight") else v for k, v in base.items()}
    train_a_little(sa.adapt(net, sa.DoRA(rank=2)))
    net.load_state_dict(base, strict=False)
    with pytest.raises(RuntimeError, match="has a DoRA of another weight: load first, then adapt"):
        net.load_state_dict(other, strict=False)
    whole = bits(net)
    net.load_state_dict(whole)
    with sa.merged(net), pytest.raises(RuntimeError, match="attn is merged: unmerge first"):
        net.load_state_dict(whole)
    lora = sa.adapt(copy.deepcopy(Plain()), sa.LoRA(rank=2))
    lora.load_state_dict({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}, strict=False)
    assert (lora[0].weight == 1).all()


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))
