"""Layers called together on one input are the layers called one by one."""

import pytest
import torch
from torch import nn

import structadapt as sa
from structadapt import forms

BF16 = torch.bfloat16


def layers(dtype=torch.float32, train=None, bias=True):
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(48, w, bias, dtype=dtype) for n, w in WIDTHS.items()})
    sa.adapt(model, sa.LoRA(rank=4), target=["q", "k"])
    sa.adapt(model, sa.LoRA(rank=16, alpha=4), target="v")
    return train(model, 0.1) if train else model


WIDTHS = {"q": 48, "k": 16, "v": 16}


def step(call, model, x):
    x = x.detach().requires_grad_()
    ys = call(x)
    sum((y.float() ** 2).mean() for y in ys).backward()
    grads = [x.grad, *(p.grad for p in sa.adapter_parameters(model))]
    for p in sa.adapter_parameters(model):
        p.grad = None
    return [*ys, *grads]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_values_and_every_gradient(backend, dtype, x, train_a_little):
    model = layers(dtype, train_a_little)
    x = x.to(dtype)
    with sa.backend(backend):
        apart = step(lambda x: [layer(x) for layer in model.values()], model, x)
        together = step(lambda x: sa.shared_input(x, *model.values()), model, x)
    for a, b in zip(together, apart, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_x_is_read_once_and_little_is_held(x, train_a_little, monkeypatch):
    model = layers(train=train_a_little)
    calls, shared = [], forms.SharedLoRA.apply
    monkeypatch.setattr(forms.SharedLoRA, "apply", lambda *a: calls.append(a) or shared(*a))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        sa.shared_input(x, *model.values())
    assert len(calls) == 1
    own = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    assert [tuple(t.shape) for t in held if t.data_ptr() not in own] == [(24, 4 + 4 + 16)]


def changed(model, how):
    if how == "merged":
        sa.merge(model)
    elif how == "hook":
        model["k"].register_forward_hook(lambda module, args, y: y * 2)
    elif how == "other adapter":
        model["k"] = sa.adapt(
            nn.Sequential(nn.Linear(48, 16)), sa.DoRA(rank=2), target="0"
        )[0]  # fmt: skip
    elif how == "no adapter":
        model["k"] = nn.Linear(48, 16)
    elif how == "trained weight":
        model["k"].weight.requires_grad_()
    elif how == "own forward":
        model["k"].forward = lambda x: torch.zeros(*x.shape[:-1], 16)


@pytest.mark.parametrize(
    "how",
    ["merged", "hook", "other adapter", "no adapter", "trained weight", "own forward", "disabled"],
)
def test_what_cannot_be_shared_is_called_one_by_one(how, x, train_a_little):
    model = layers(train=train_a_little)
    changed(model, how)
    if how == "disabled":
        with sa.disabled(model):
            found = sa.shared_input(x, *model.values())
            expected = [layer(x) for layer in model.values()]
    else:
        found = sa.shared_input(x, *model.values())
        expected = [layer(x) for layer in model.values()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_under_autocast_and_compile_and_in_a_second_derivative(x, train_a_little):
    model = layers(train=train_a_little)
    with torch.autocast("cpu", BF16):
        assert all(y.dtype == BF16 for y in sa.shared_input(x, *model.values()))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: sa.shared_input(x, *model.values()), fullgraph=True, backend="aot_eager"
    )
    expected = sa.shared_input(x, *model.values())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compiled(x), expected, strict=True))
    inputs = x.clone().requires_grad_()
    q, *_ = sa.shared_input(inputs, *model.values())
    (dx,) = torch.autograd.grad(q.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_an_output_that_is_not_used_has_no_gradients(x, train_a_little):
    model = layers(train=train_a_little)
    _, k, _ = sa.shared_input(x, *model.values())
    k.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if n.endswith((".A", ".B"))}
    assert [n for n, g in found.items() if g is not None] == ["k.A", "k.B"]
    shared = [found[n].clone() for n in ("k.A", "k.B")]
    model.zero_grad()
    model["k"](x).square().mean().backward()
    apart = [model["k"].A.grad, model["k"].B.grad]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(shared, apart, strict=True))


def test_hooks_of_all_modules_and_no_layers(x, train_a_little):
    model, calls = layers(train=train_a_little), []
    handle = nn.modules.module.register_module_forward_hook(lambda *a: calls.append(a[0]))
    try:
        sa.shared_input(x, *model.values())
    finally:
        handle.remove()
    assert len(calls) == 3
    assert sa.shared_input(x) == ()


def test_explain_lists_every_layer_once(x, train_a_little):
    model = layers(train=train_a_little)
    found = sa.explain(lambda: sa.shared_input(x, *model.values()))
    assert len(found.choices) == 3


def test_a_wrong_dtype_names_the_layer(x):
    with pytest.raises(TypeError, match=r"q: the input is torch\.float64"):
        sa.shared_input(x.double(), *layers().values())
