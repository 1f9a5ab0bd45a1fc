"""Every kind of layer that carries an adapter, through one matrix view."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import structadapt as sa
from structadapt.layers import adaptable_layers, find_adapted, matrix_shape

KINDS = {
    "linear": lambda: nn.Linear(24, 36),
    "linear without bias": lambda: nn.Linear(24, 36, bias=False),
    "Conv1D": lambda: Conv1D(36, 24),
    "embedding": lambda: nn.Embedding(24, 36),
    "embedding with padding": lambda: nn.Embedding(24, 36, padding_idx=3),
    "conv1d": lambda: nn.Conv1d(8, 36, 3, padding=1, stride=2),
    "conv2d": lambda: nn.Conv2d(6, 24, 2, bias=False, padding_mode="circular", padding=1),
    "conv2d in groups": lambda: nn.Conv2d(12, 24, (2, 2), groups=2, dilation=2),
}


def layer_and_input(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = KINDS[kind]().to(dtype)
    nn.init.normal_(layer.weight, std=0.3)
    if isinstance(layer, nn.Embedding):
        return layer, torch.tensor([[0, 3, 5], [3, 3, 23]])
    shape = {nn.Conv1d: (2, 8, 7), nn.Conv2d: (2, layer.weight.shape[1], 5, 6)}.get(type(layer))
    if kind.endswith("groups"):
        shape = (2, 12, 5, 6)
    return layer, torch.randn(shape or (2, 3, 24), dtype=dtype)


def adapt(layer, adapter):
    return sa.adapt(nn.Sequential(layer), adapter, "0")


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_adapted_weight(kind, adapter, train_a_little):
    plain, x = layer_and_input(kind, torch.float64)
    model = train_a_little(adapt(copy.deepcopy(plain), adapter), 0.3)
    layer = model[0]
    y = model(x)
    upstream = torch.randn(y.shape, dtype=y.dtype)
    tensors = layer.trained_tensors()
    found = torch.autograd.grad(y, tensors, upstream)
    p = layer.tensors()
    matrix = layer.adapter.weight(layer.as_matrix(layer.weight), p)
    expected = torch.func.functional_call(plain, {"weight": layer.as_stored(matrix)}, (x,))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    if "padding" not in kind:
        wanted = torch.autograd.grad(expected, tensors, upstream)
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    assert all(gradient.any() for gradient in found)
    assert not torch.allclose(y, plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_start_disabled_and_merged(kind, dtype, adapter, train_a_little):
    plain, x = layer_and_input(kind, dtype)
    expected = plain(x)
    model = adapt(copy.deepcopy(plain), adapter)
    assert isinstance(model[0], type(plain))
    assert torch.equal(model(x), expected)
    train_a_little(model, 0.3)
    with sa.disabled(model):
        assert torch.equal(model(x), expected)
    adapted = model(x)
    assert adapted.dtype == dtype and not torch.equal(adapted, expected)
    before = model[0].weight.clone()
    with sa.merged(model):
        tolerance = {torch.float32: 2e-5}.get(dtype, 0.1)
        torch.testing.assert_close(model(x), adapted, rtol=tolerance, atol=tolerance)
        assert model[0].weight.is_contiguous() and model[0].weight.shape == before.shape
        with sa.disabled(model):
            assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_files(kind, adapter, tmp_path, train_a_little):
    plain, x = layer_and_input(kind)
    model = train_a_little(adapt(copy.deepcopy(plain), adapter))
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected) and type(twin[0]) is type(model[0])
        train_a_little(twin)
        assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
    sa.save(model, tmp_path / "a")
    bare = nn.Sequential(copy.deepcopy(plain))
    assert torch.equal(sa.load(bare, tmp_path / "a")(x), expected)
    assert sa.summary(bare) == sa.summary(model)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_and_spectra(kind, adapter, train_a_little):
    plain, _ = layer_and_input(kind)
    model = nn.Sequential(plain)
    plan = sa.plan(model, adapter, "0")
    shape = matrix_shape(plain)
    train_a_little(sa.adapt(model, adapter, "0"))
    assert sa.summary(model) == plan
    assert plan.layers[0].shape == shape == tuple(model[0].matrix().shape)
    assert plan.parameters == sum(p.numel() for p in sa.adapter_parameters(model))
    assert plan.training_bytes >= 16 * plan.parameters
    rows = sa.spectra.analyze(model).rows
    assert len(rows) == (2 if isinstance(adapter, sa.DoRA) else 1)  # its direction, and all of it
    assert all(row["shape"] == shape and row["frobenius_norm"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_of_an_embedding_says_what_its_backward_holds(adapter, dtype):
    model = adapt(nn.Embedding(24, 36).to(dtype), adapter)

    def held(tokens):
        ids, sizes = torch.zeros(tokens, dtype=torch.int64), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids)
        for tensor in (ids, *model.parameters(), *model.buffers()):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(sizes.values())

    assert held(128) - held(64) == 64 * sa.summary(model).held_bytes


def test_all_linear_takes_linear_layers_alone():
    model = nn.ModuleDict({str(i): make() for i, make in enumerate(KINDS.values())})
    assert adaptable_layers(model).keys() == set(map(str, range(len(KINDS))))
    sa.adapt(model, sa.LoRA(rank=2))
    assert list(find_adapted(model)) == ["0", "1", "2"]
    sa.adapt(model, sa.DoRA(rank=2), lambda name, module: isinstance(module, nn.Embedding))
    assert list(find_adapted(model)) == ["0", "1", "2", "3", "4"]


def test_embeddings_that_change_themselves_are_refused():
    model = nn.Sequential(nn.Embedding(8, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="0: an embedding with max_norm changes its weight"):
        sa.adapt(model, sa.LoRA(rank=2), "0")


# -- overrides -------------------------------------------------------------------------------------


def test_overrides(net):
    overrides = {"down": {"rank": 5, "alpha": 1.0}, "blocks.1..*": {"rank": 3}}
    plan = sa.plan(net, sa.LoRA(rank=2), overrides=overrides)
    sa.adapt(net, sa.LoRA(rank=2), overrides=overrides)
    assert sa.summary(net) == plan
    ranks = {name: layer.adapter.rank for name, layer in find_adapted(net).items()}
    assert ranks == {
        **dict.fromkeys(["blocks.0.attn", "blocks.0.up"], 2),
        **dict.fromkeys(["blocks.1.attn", "blocks.1.up"], 3),
        **dict.fromkeys(["blocks.0.down", "blocks.1.down"], 5),  # the first that matches
    }
    assert net.blocks[0]["down"].adapter.alpha == 1.0 and net.blocks[0]["up"].adapter.alpha == 16.0
    assert net.blocks[0]["down"].A.shape[0] == 5


@pytest.mark.parametrize(
    "overrides, error, words",
    [
        ({"dwn": {"rank": 2}}, ValueError, r"overrides 'dwn' matches no .* \(near: blocks.0.down"),
        ({"lm_head": {"rank": 2}}, ValueError, "'lm_head' matches lm_head, a Linear: not in the t"),
        ({"up": {"rnk": 2}}, TypeError, r"overrides\['up'\]: LoRA has no rnk, only rank, alpha"),
        (
            {"up": {"rank": 0}},
            ValueError,
            r"overrides\['up'\]: LoRA: rank must be a posit",
        ),
        ({"up": 5}, TypeError, r"overrides\['up'\] must be like {'rank': 32}, got 5"),
        (["up"], TypeError, r"overrides must map patterns to fields .*, got \['up'\]"),
    ],
)
def test_overrides_that_are_refused(net, overrides, error, words):
    before = repr(net)
    with pytest.raises(error, match=words):
        sa.adapt(net, sa.LoRA(rank=2), overrides=overrides)
    assert repr(net) == before


# -- QuanTA on real shapes -------------------------------------------------------------------------


REAL = [(1024, 4096), (14336, 4096), (4096, 14336), (4096, 11008), (3584, 18944), (4099, 4096)]
VOCABULARIES = [(151936, 4096), (4096, 50257)]


@pytest.mark.parametrize("shape", REAL + VOCABULARIES)
@pytest.mark.parametrize("n_axes", [3, 4])
def test_the_plan_of_real_shapes_is_bounded_and_says_its_axes(shape, n_axes):
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    plan = sa.plan(nn.Sequential(layer), sa.QuanTA(n_axes), "0")
    (row,) = plan
    assert row.parameters < 0.1 * shape[0] * shape[1]
    assert isinstance(row.adapter.axes, tuple) and repr(row.adapter) in str(plan)
    for axes, width in ((row.adapter.axes, shape[1]), (row.adapter.out_axes, shape[0])):
        assert width <= torch.Size(axes).numel() < 1.125 * width


@pytest.mark.parametrize("init", ["identity", "paper", "zero_last"])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (101, 127), (127, 101), (122, 64)])
def test_every_parameter_trains_and_every_row_is_reached(shape, init):
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    model = adapt(layer, sa.QuanTA(init=init))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sa.adapter_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = torch.randn(8, shape[1], dtype=torch.float64)
    model(x).square().sum().backward()
    for name, tensor in model[0].tensors().items():
        if name.startswith("gate"):
            assert (tensor.grad != 0).all(), name
    changed = model[0].delta_weight()
    assert changed.any(1).all() and changed.any(0).all()


# -- parameter groups ------------------------------------------------------------------------------


def test_parameter_groups(net):
    sa.adapt(net, sa.DoRA(rank=2), "attn")
    sa.adapt(net, sa.QuanTA(), "up")
    groups = sa.parameter_groups(net, 1e-3, b_ratio=16, weight_decay=0.1)
    names = {id(p): n.rsplit(".", 1)[-1] for n, p in net.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    gates = {f"gate_{i}": (1e-3, 0.0) for i in range(3)}
    assert found == {"A": (1e-3, 0.1), "B": (1.6e-2, 0.1), "m": (1e-3, 0.0), **gates}
    everything = list(itertools.chain.from_iterable(group["params"] for group in groups))
    assert {id(p) for p in everything} == {id(p) for p in sa.adapter_parameters(net)}
    torch.optim.AdamW(groups)
    assert len(sa.parameter_groups(net, 1e-3)) == 1
    for bad in ({"b_ratio": -1.0}, {"weight_decay": float("nan")}):
        with pytest.raises(ValueError, match="must be a finite number"):
            sa.parameter_groups(net, 1e-3, **bad)
