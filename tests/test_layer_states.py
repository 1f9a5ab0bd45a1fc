"""What adapted layers share, start from, hold for the backward, and refuse."""

import copy
import functools
import io
import pickle

import pytest
import torch
from kinds import FEW, KINDS, defined, few, kinds, layer_and_input
from torch import nn

import structadapt as sa


@pytest.fixture
def make(train_a_little):
    """A model of one adapted layer that has moved from where it started, and an input."""

    def made(kind, adapter):
        layer, inputs = layer_and_input(kind)
        return train_a_little(sa.adapt(nn.Sequential(layer), adapter, "0")), inputs

    return made


@pytest.fixture
def linear(make):
    """An adapted linear layer."""
    return lambda adapter: make("linear", adapter)[0][0]


# -- a layer that is shared ------------------------------------------------------------------------


def test_a_module_called_twice_in_one_forward(linear, adapter, x):
    layer, x = linear(adapter).double(), x.double()
    found, expected = (
        torch.autograd.grad(run(torch.tanh(run(x)[..., ::2])).square().mean(), tensors)
        for tensors in [layer.trained_tensors()]
        for run in (layer, functools.partial(defined, layer))
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_a_layer_under_two_names(adapter, train_a_little, tmp_path, x):
    torch.manual_seed(0)
    shared = nn.Linear(48, 48)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    base = copy.deepcopy(model)
    train_a_little(sa.adapt(model, adapter, "2"))
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0] is twin[2] and torch.equal(twin(x), expected)
    sa.save(model, tmp_path / "a")
    assert torch.equal(sa.load(base, tmp_path / "a")(x), expected)
    with sa.merged(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), expected)
    assert len([*sa.adapter_parameters(model)]) == len(model[0].trained_tensors())


# -- copies ----------------------------------------------------------------------------------------


@kinds
def test_torch_save_and_load(make, kind, adapter, tmp_path):
    model, inputs = make(kind, adapter)
    expected = model(inputs)
    torch.save(model, tmp_path / "model")
    whole = torch.load(tmp_path / "model", weights_only=False)
    assert torch.equal(whole(inputs), expected)
    torch.save(model.state_dict(), tmp_path / "state")
    other, _ = make(kind, adapter)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    for state in (torch.load(tmp_path / "state"), whole.state_dict(keep_vars=True)):
        other.load_state_dict(state)
        assert torch.equal(other(inputs), expected)
    buffer = io.BytesIO()
    torch.save(whole.state_dict(keep_vars=True), buffer)
    buffer.seek(0)
    for tensor in torch.load(buffer, weights_only=True).values():
        assert type(tensor) in (nn.Parameter, torch.Tensor) and not vars(tensor)


# -- the meta device -------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 48)
        self.out = nn.Linear(48, 96)

    def forward(self, ids):
        return self.out(self.embed(ids))


LOADS = {
    "copied": lambda model, state: model.to_empty(device="cpu").load_state_dict(state),
    "assigned": lambda model, state: model.load_state_dict(state, assign=True),
    "copied, without a bias": lambda model, state: model.to_empty(device="cpu").load_state_dict(
        {k: v for k, v in state.items() if not k.endswith("bias")}, strict=False
    ),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_built_on_the_meta_device_then_loaded(adapter, load, dtype):
    torch.manual_seed(0)
    base, ids = Two().to(dtype), torch.arange(60)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = sa.adapt(base, adapter, ["out", "embed"], seed=4)
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = sa.adapt(Two().to(dtype), adapter, ["out", "embed"], seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    waiting = pytest.raises(RuntimeError, match="embed was adapted on the meta device and has no")
    with waiting:
        model(ids.to("meta"))
    if load != "assigned":
        with waiting:
            copy.deepcopy(model).to_empty(device="cpu")(ids)
    LOADS[load](model, state)
    if "without" in load:
        with torch.no_grad():
            model.out.bias.copy_(state["out.bias"])
    assert torch.equal(model(ids), expected(ids))
    for left, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(left, right) and left.dtype == right.dtype
        assert left.requires_grad == right.requires_grad
    model(ids).float().square().mean().backward()
    torch.optim.AdamW(sa.adapter_parameters(model), fused=True).step()
    if dtype == torch.float32:
        torch.testing.assert_close(model(ids), defined(model.out, model.embed(ids)))


def test_other_ways_from_the_meta_device(adapter, train_a_little, tmp_path):
    def on_meta():
        with torch.device("meta"):
            return sa.adapt(Two(), adapter, ["out", "embed"])

    torch.manual_seed(0)
    ids = torch.arange(60)
    trained = Two()
    base = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    train_a_little(sa.adapt(trained, adapter, ["out", "embed"]))
    expected = trained(ids)
    model = on_meta()
    model.load_state_dict(trained.state_dict(), assign=True)  # base and adapter at once
    assert torch.equal(model(ids), expected)
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(base)
    sa.save(trained, tmp_path / "a")
    assert torch.equal(sa.load(model, tmp_path / "a")(ids), expected)
    model = on_meta()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in base.items() if k != "out.weight"}, assign=True)
    model = on_meta().to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in base.items():
            model.get_parameter(name).copy_(tensor)  # as a loader of one's own does
    for layer in (model.embed, model.out):
        layer.reset_parameters()
    assert torch.equal(model(ids), sa.adapt(load(Two(), base), adapter, ["out", "embed"])(ids))


def load(model, state):
    model.load_state_dict(state)
    return model


def test_adapters_alone_or_in_part_are_no_start(make):
    """Half of an adapter's tensors leave the rest without values."""
    trained = Two()
    sa.adapt(trained, FEW[1], "out")
    with torch.device("meta"):
        model = sa.adapt(Two(), FEW[1], "out")
    model.to_empty(device="cpu")
    state = trained.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k != "out.m"}, strict=False)
    with pytest.raises(RuntimeError, match="out was adapted on the meta device and has no values"):
        model(torch.arange(60))
    model.load_state_dict(state)
    assert torch.equal(model(torch.arange(60)), trained(torch.arange(60)))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_low_precision_are_loaded_as_fp32(make, kind, adapter):
    model, x = make(kind, adapter)
    state = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    assert model[0].weight.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in model[0].tensors().values())
    model(x if kind == "embedding" else x.bfloat16()).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in sa.adapter_parameters(model))


# -- inference mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["adapt", "load"])
def test_what_is_adapted_under_inference_mode_still_trains(adapter, how, tmp_path, x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96))
    sa.save(sa.adapt(copy.deepcopy(model), adapter), tmp_path / "a")
    with torch.inference_mode():
        sa.adapt(model, adapter) if how == "adapt" else sa.load(model, tmp_path / "a")
        model(x)
        with sa.merged(model):
            model(x)
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in sa.adapter_parameters(model))
    torch.optim.AdamW(sa.adapter_parameters(model)).step()


# -- what the backward holds -----------------------------------------------------------------------


def held(run, *known):
    """Bytes that autograd keeps, beside the known tensors; each storage once."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    for tensor in known:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(sizes.values())


@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
def test_the_backward_holds_what_the_plan_says(linear, adapter, how):
    model = nn.Sequential(linear(adapter))
    if how == "bf16":
        model.bfloat16()
    tokens, found = (64, 192), []
    for n in tokens:
        x = torch.randn(n, 48, dtype=model[0].weight.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            found.append(held(lambda: model(x), x, *model.parameters(), *model.buffers()))  # noqa: B023
    each = (found[1] - found[0]) / (tokens[1] - tokens[0])
    expected = sa.summary(model).held_bytes
    if how == "autocast":  # and x, which autocast has cast
        expected = expected // 2 + 2 * 48
    assert each == expected
    rank, magnitudes = getattr(adapter, "rank", 0), 4 * 96 * isinstance(adapter, sa.DoRA)
    assert found[0] - tokens[0] * each <= 6 * magnitudes, "more than a few numbers for every output"
    assert expected >= 2 * rank


def test_nothing_is_held_without_a_gradient(linear, adapter, x):
    layer = linear(adapter)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert held(lambda: layer(x)) == 0
            assert not layer(x).requires_grad


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d"])
@few
def test_a_dtype_that_does_not_fit_names_the_layer(make, kind, few):
    model, inputs = make(kind, few)
    said = r"0: the input is torch.float16 and the weight torch.float32; cast the input, or run"
    for context in (sa.disabled(model), sa.merged(model), torch.no_grad()):
        with context, pytest.raises(TypeError, match=said):
            model(inputs.half())
    with pytest.raises(TypeError, match="the input is torch.float32 and the weight torch.bfloat16"):
        model.bfloat16()(inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_output_and_no_other_token(linear, adapter, value, x):
    layer = linear(adapter)
    expected = layer(x)
    broken = x.clone()
    broken[1, 2, 5] = value
    y = layer(broken).detach()
    assert not torch.isfinite(y[1, 2]).any()
    y[1, 2] = expected[1, 2]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_parameters_that_are_not_finite_show(linear, adapter, x):
    layer = linear(adapter)
    for p in layer.trained_tensors():
        value = p.detach().flatten()[0].clone()
        with torch.no_grad():
            p.view(-1)[0] = float("nan")
        assert layer(x).isnan().any()
        with torch.no_grad():
            p.view(-1)[0] = value
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("shape", [(48,), (1, 48), (0, 48), (2, 0, 48), (2, 3, 2, 48)], ids=str)
def test_any_leading_dimensions(linear, adapter, shape):
    layer = linear(adapter)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, defined(layer, x), rtol=1e-4, atol=1e-5)
    leaves = [x, *layer.trained_tensors()]
    found = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(defined(layer, x).square().sum(), leaves)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48)], ids=str)
def test_outputs_can_be_written_to(linear, adapter, shape):
    """As those of nn.Linear can: nn.ReLU(inplace=True) behind it, a residual added in place."""
    layer, x = linear(adapter), torch.randn(shape)
    found = []
    for write in (lambda y: y.mul_(3).relu_(), lambda y: (y * 3).relu()):
        y = write(layer(x))
        found.append([y, *torch.autograd.grad(y.sum(), layer.trained_tensors())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        y = layer(x)
    y.add_(torch.ones(96, requires_grad=True)).sum().backward()


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1),
    "columns apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(4, 6, 48),
    "every other": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_inputs_that_are_not_contiguous(linear, adapter, view, x):
    layer = linear(adapter)
    found = []
    for arrange in (lambda x: x, torch.Tensor.contiguous):
        leaf = x.clone().requires_grad_()
        y = layer(arrange(VIEWS[view](leaf)))
        y.transpose(0, 1).square().mean().backward()  # nor is its gradient
        found.append([y, leaf.grad, *(p.grad for p in layer.trained_tensors())])
        layer.zero_grad()
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 24])
def test_parameters_that_are_not_contiguous(linear, adapter, rows, x):
    layer, found = linear(adapter), []
    for strided in (False, True):
        if strided:
            for p in layer.trained_tensors():
                turned = [*reversed(range(p.dim()))]
                p.data = p.detach().permute(turned).contiguous().permute(turned)
        leaf = x.flatten(0, 1)[:rows].clone().requires_grad_()
        y = layer(leaf)
        y.square().mean().backward()
        found.append([y, leaf.grad, *(p.grad for p in layer.trained_tensors())])
        layer.zero_grad()
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


# -- training --------------------------------------------------------------------------------------


def test_weight_decay_leaves_magnitudes_and_gates_alone(train_a_little):
    model = nn.ModuleDict({"a": nn.Linear(48, 48), "b": nn.Linear(48, 48)})
    sa.adapt(model, sa.DoRA(rank=3), "a")
    train_a_little(sa.adapt(model, sa.QuanTA(), "b"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = sa.parameter_groups(model, 1e-2, b_ratio=4, weight_decay=0.5)
    for p in sa.adapter_parameters(model):
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups).step()
    rates = {"A": 1e-2, "B": 4e-2}
    for name, p in model.named_parameters():
        shrink = 1 - 0.5 * rates.get(name.rsplit(".", 1)[-1], 0.0)
        torch.testing.assert_close(p, before[name] * shrink)
        assert (shrink < 1) == (not torch.equal(p, before[name]))
