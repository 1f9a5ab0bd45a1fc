"""Adapted layers do what any torch layer does: autocast, checkpointing, compile, export,
torch.func, higher derivatives."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from kinds import FEW, KINDS, defined, few, kinds, layer_and_input
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import structadapt as sa


@pytest.fixture
def make(train_a_little):
    """An adapted model that has moved from where it started."""

    def made(adapter, *layers, dtype=torch.float32):
        torch.manual_seed(0)
        layers = layers or (nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48, bias=False))
        model = sa.adapt(nn.Sequential(*layers).to(dtype), adapter, lambda name, module: True)
        return train_a_little(model)

    return made


@pytest.fixture
def make_kind(make):
    def made(kind, adapter):
        layer, inputs = layer_and_input(kind)
        return make(adapter, layer), inputs

    return made


def gradients(model, y):
    return torch.autograd.grad(y.float().square().mean(), [*sa.adapter_parameters(model)])


def all_close(left, right, **tolerances):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


# -- autocast --------------------------------------------------------------------------------------


@kinds
@few
def test_autocast_starts_as_the_layer_itself_would(kind, few):
    torch.manual_seed(0)
    make_layer, shape = KINDS[kind]
    layer = make_layer()
    inputs = torch.randint(0, 48, (2, 3)) if shape is None else torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(inputs)
        found = sa.adapt(nn.Sequential(layer), few, "0")(inputs)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_under_autocast(make, adapter, dtype, x):
    model = make(adapter, dtype=dtype)
    expected = gradients(model, model(x.to(dtype)))
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), y)
    assert y.dtype == torch.bfloat16
    for found, wanted in zip(gradients(model, y), expected, strict=True):  # outside, as torch asks
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 0.06 * wanted.norm()


def test_a_second_derivative_under_autocast(make, adapter, x):
    model = make(adapter)
    x = x.clone().requires_grad_()
    second = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = model(x)
        (slope,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        second.append(torch.cat([g.flatten() for g in gradients(model, slope)]))
    assert (second[0] - second[1]).norm() <= 0.05 * second[1].norm()


@few
def test_compiled_under_autocast_is_eager_under_autocast(make, few, x):
    torch._dynamo.reset()
    model = make(few)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.01 * expected.norm()


# -- checkpointing ---------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return F.dropout(self.model(F.dropout(x, 0.3)), 0.3)


def saving_products(context, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    keep = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    return keep[0] if op in products else keep[1]


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, saving_products),
    },
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing_gives_the_same_gradients(make, adapter, how, x):
    model = make(adapter)
    block, x = Dropping(model), x.clone().requires_grad_()
    found = []
    for run in (block, functools.partial(checkpoint, block, **CHECKPOINTS[how])):
        torch.manual_seed(5)
        model.zero_grad()
        x.grad = None
        run(x).square().mean().backward()
        found.append([x.grad, *(p.grad for p in sa.adapter_parameters(model))])
    if how == "selective":  # runs the plain form
        all_close(*found)
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_input_without_a_gradient_is_only_for_the_kind_that_is_not_reentrant(make, x):
    model = make(FEW[0])
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not checkpoint(model, x, use_reentrant=True).requires_grad
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in sa.adapter_parameters(model))


# -- compile and export ----------------------------------------------------------------------------


def train_steps(model, run, inputs, steps=3):
    optimizer = torch.optim.AdamW(sa.adapter_parameters(model), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = run(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@kinds
@few
def test_compile_has_no_break_and_no_recompilation_over_steps(make_kind, kind, few):
    model, inputs = make_kind(kind, few)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train_steps(model, compiled, inputs)
    all_close(found, train_steps(twin, twin, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@few
def test_inductor(make, few, x):
    model = make(few)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train_steps(model, compiled, x)
    all_close(found, train_steps(twin, twin, x), rtol=1e-4, atol=1e-5)


@few
def test_five_sequence_lengths_make_two_graphs(make, few):
    torch._dynamo.reset()
    model, counter = make(few), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (4, 6, 7, 9, 12):
        x = torch.randn(2, length, 48)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        compiled(x).sum().backward()
    assert counter.frame_count == 2


def test_functions_take_a_compiled_model(make, x, tmp_path):
    model = make(FEW[1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(x)
    compiled(x)
    assert len(sa.summary(compiled)) == len([*sa.delta_weights(compiled)]) == 2
    assert len(sa.parameter_groups(compiled, 1e-3)) == 1
    sa.save(compiled, tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48, bias=False))
    fresh.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(sa.load(fresh, tmp_path / "a")(x), expected)
    for context in (sa.disabled, sa.merged):
        with context(compiled):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export_with_a_dynamic_batch_and_sequence(make, adapter, strict, x):
    model = make(adapter)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=strict)
    for shape in ((4, 6, 48), (3, 5, 48), (7, 2, 48)):
        other = torch.randn(shape)
        torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-4, atol=1e-5)


# -- torch.func and higher derivatives -------------------------------------------------------------


def test_gradients_by_torch_func(make, adapter, x):
    model = make(adapter).double()
    x = x[0].double()
    parameters = dict(model.named_parameters())
    trained = {n: p for n, p in parameters.items() if p.requires_grad}

    def loss(p, x):
        return torch.func.functional_call(model, p, (x,)).square().mean()

    all_close(torch.func.grad(loss)(trained, x).values(), gradients_of(loss, trained, x))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for i, row in enumerate(x):
        all_close((g[i] for g in per_sample.values()), gradients_of(loss, trained, row))
    _, forward = torch.func.jvp(lambda x: loss(trained, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(forward, torch.func.grad(loss, argnums=1)(trained, x).sum())
    all_close(gradients_of(loss, trained, x), gradients_of(loss, trained, x))  # eager still works


def gradients_of(loss, parameters, x):
    return torch.autograd.grad(loss(parameters, x), [*parameters.values()])


def test_an_ensemble_by_vmap(make, adapter, x):
    models = [make(adapter), make(adapter)]
    with torch.no_grad():
        for p in sa.adapter_parameters(models[1]):
            p.mul_(1.1)
    parameters, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def run(p, b, x):
        return torch.func.functional_call(skeleton, (p, b), (x,))

    found = torch.func.vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    all_close(found, [model(x) for model in models], rtol=1e-4, atol=1e-5)


def test_second_derivatives(make, adapter, x):
    """Those of the definition; and where nothing is detached, the numerical ones."""
    layer = make(adapter, nn.Linear(48, 48))[0].double()
    x = x[0, :2].double().requires_grad_()
    leaves = [x, *layer.trained_tensors()]

    def second(y):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    all_close(second(layer(x)), second(defined(layer, x)), rtol=1e-9, atol=1e-9)
    if adapter.additive:
        torch.autograd.gradgradcheck(lambda x, *_: layer(x), leaves, fast_mode=True)


def test_forward_derivatives(make, adapter, x):
    layer = make(adapter, nn.Linear(48, 48))[0].double()
    x, tangent = x.double(), torch.randn(x.shape, dtype=torch.float64)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(y.tangent, layer(tangent) - layer(torch.zeros_like(tangent)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_takes_in_nothing_that_was_kept(make, adapter, x):
    layer = make(adapter, nn.Linear(48, 48))[0]
    layer(x)
    traced = torch.jit.trace(layer, x)
    with torch.no_grad():
        for p in layer.trained_tensors():
            p.mul_(1.5)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-4)


# -- tied weights ----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 48)
        self.lm_head = nn.Linear(48, 60, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.embed(ids))


@pytest.mark.parametrize("target", [["lm_head"], ["embed"], ["embed", "lm_head"]], ids=str)
@few
def test_tied_weights(few, target, train_a_little):
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(60)
    rows, logits = model.embed(ids), model(ids)
    sa.adapt(model, few, target)
    assert torch.equal(model(ids), logits)
    train_a_little(model)
    model(ids).square().mean().backward()
    torch.optim.SGD(sa.adapter_parameters(model), lr=0.1).step()
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.embed(ids), rows) == ("embed" not in target)
    assert torch.equal(model.lm_head(rows), F.linear(rows, model.embed.weight)) == (
        "lm_head" not in target
    )
    expected = model(ids)
    assert not torch.equal(expected, logits)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embed.weight and torch.equal(twin(ids), expected)
    for name in target:
        layer = model.get_submodule(name)
        matrix = layer.adapter.weight(layer.matrix(), layer.tensors())
        torch.testing.assert_close(layer.adapted_weight(), layer.as_stored(matrix))
    with pytest.raises(ValueError, match=r"share a weight: merging would change both"):
        sa.merge(model)
    assert torch.equal(model(ids), expected)
