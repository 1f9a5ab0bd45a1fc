"""DoRA's row norm: worked out once for the same weights, and never stale after a write to them."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import structadapt as sa
from structadapt.kernels import lean, reference

MODES = {
    "training": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture
def norms(monkeypatch):
    """How often the norm was worked out, as a list that grows."""
    calls = []
    for module in (lean, reference):
        original = module.dora_norm

        def counted(*args, original=original):
            calls.append(args)
            return original(*args)

        monkeypatch.setattr(module, "dora_norm", counted)
    return calls


@pytest.fixture
def model(train_a_little):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24, bias=False))
    return train_a_little(sa.adapt(layers, sa.DoRA(rank=3)), 0.1)


@pytest.fixture
def x():
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(3))


def defined(model, x):
    """The output by the definition of the adapted weight."""
    for layer in model:
        p = {name: tensor.detach() for name, tensor in layer.tensors().items()}
        x = F.linear(x, layer.adapter.weight(layer.weight.detach(), p), layer.bias)
    return x


def check(model, x):
    tolerance = 0.03 if x.dtype == torch.bfloat16 else 1e-4
    expected = defined(model, x)
    for mode in MODES.values():
        for _ in range(2):
            with mode():
                torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


# -- kept ------------------------------------------------------------------------------------------


def test_micro_batches_share_a_norm(model, x, norms):
    optimizer = torch.optim.AdamW(sa.adapter_parameters(model))
    for step in range(1, 4):
        for _ in range(3):
            model(x).square().sum().backward()
        checkpoint(model, x, use_reentrant=False).sum().backward()
        assert len(norms) == 2 * step
        optimizer.step()


def test_decoding_and_all_that_writes_nothing_share_a_norm(model, x, norms):
    for mode in MODES.values():
        with mode():
            for _ in range(5):
                model.eval()(x[:1])
                model.train()(x)
    with sa.disabled(model):
        model(x)
    list(sa.delta_weights(model)), sa.summary(model), model.state_dict(), repr(model)
    model.requires_grad_(False).requires_grad_(True).zero_grad()
    norms.clear()
    model(x)
    assert not norms
    with sa.merged(model):
        norms.clear()
        model(x)
        assert not norms, "a merged layer has no norm"
    model(x), model(x)
    assert len(norms) == 2


def test_decoding_in_inference_mode_then_a_training_step(model, x):
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        model(x), model(x[:1])
    for one in (model, twin):
        one(x).square().sum().backward()
        torch.optim.SGD(sa.adapter_parameters(one), lr=0.1).step()
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)
    check(model, x)


# -- never stale -----------------------------------------------------------------------------------


def noise(tensor):
    return 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))


def load(model, **kwargs):
    model.load_state_dict({k: v + noise(v) for k, v in model.state_dict().items()}, **kwargs)


def load_a_file(model, folder):
    other = copy.deepcopy(model)
    for p in sa.adapter_parameters(other):
        p.data.add_(noise(p))
    sa.save(other, folder / "adapter")
    sa.load(model, folder / "adapter")


def swap(model):
    model[0].B = nn.Parameter(model[0].B + noise(model[0].B))
    model[1].weight = nn.Parameter(2 * model[1].weight.detach(), requires_grad=False)


def assign_data(model):
    for p in model.parameters():
        p.data = p.data + noise(p)


def through_the_source(model):
    """As with parameters that are views of one buffer: after a first forward, a write to that."""
    sources = [(p, p.detach().clone()) for p in model.parameters()]
    for p, source in sources:
        p.data = source
    model(torch.zeros(1, 24, dtype=sources[0][1].dtype))
    for _, source in sources:
        source.add_(noise(source))


def reorder(model):
    for layer in model:
        rows, columns = layer.A.shape
        strides = (1, rows) if layer.A.is_contiguous() else (columns, 1)
        layer.A.data = layer.A.data.as_strided((rows, columns), strides)


def convert_into_new_parameters(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    model[0].B.data.add_(1.0)


def each(write):
    def write_all(model):
        with torch.no_grad():
            for p in model.parameters():
                write(p)

    return write_all


WRITES = {
    "in place": each(lambda p: p.add_(noise(p))),
    "one value": each(lambda p: p.view(-1)[:1].fill_(2.0)),
    ".data": each(lambda p: p.data.add_(noise(p))),
    "a kept .data": lambda model: [d.add_(noise(d)) for d in [p.data for p in model.parameters()]],
    "assigned .data": assign_data,
    "the tensor that .data was set to": through_the_source,
    "the same memory in another order": reorder,
    "an alias": each(lambda p: p.detach().mul_(1.5)),
    "out=": each(lambda p: torch.mul(p, 1.5, out=p)),
    "foreach": lambda model: torch._foreach_mul_([p.data for p in model.parameters()], 1.5),
    "copy_": each(lambda p: p.copy_(p + noise(p))),
    "init": lambda model: [nn.init.normal_(p) for p in model.parameters()],
    "a vector": lambda model: nn.utils.vector_to_parameters(
        1.5 * nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters()
    ),
    "load_state_dict": load,
    "load_state_dict(assign=True)": lambda model: load(model, assign=True),
    "a swapped Parameter": swap,
    "new Parameters from to": convert_into_new_parameters,
    "merge and unmerge": lambda model: (sa.merge(model), sa.unmerge(model)),
    "reset_parameters": lambda model: [layer.reset_parameters() for layer in model],
    "to": lambda model: model.double().float(),
    "share_memory": lambda model: (model.share_memory(), WRITES["in place"](model)),
    "another alpha": lambda model: setattr(
        model[0], "adapter", dataclasses.replace(model[0].adapter, alpha=3.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(model, x, write, mode):
    for _ in range(2):
        with MODES[mode]():
            model(x)  # keeps norms
        WRITES[write](model)
        check(model, x)


@pytest.mark.parametrize("write", ["in place", ".data", "an alias", "out=", "copy_", "init"])
def test_a_write_under_inference_mode_is_seen(model, x, write):
    with torch.inference_mode():
        model(x)
        WRITES[write](model)
    check(model, x)


def test_files_are_seen(model, x, tmp_path):
    model(x)
    load_a_file(model, tmp_path)
    check(model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_dtype_is_seen(model, x, dtype):
    model(x)
    model.to(dtype)
    check(model, x.to(dtype))
    model.float()
    check(model, x)


OPTIMIZERS = {
    "AdamW for-loop": (torch.optim.AdamW, {"foreach": False}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "Adam fused": (torch.optim.Adam, {"fused": True}),
    "Adagrad fused": (torch.optim.Adagrad, {"fused": True}),
    "SGD": (torch.optim.SGD, {"foreach": False}),
    "SGD foreach": (torch.optim.SGD, {"foreach": True, "momentum": 0.9}),
    "SGD fused": (torch.optim.SGD, {"fused": True}),
    "LBFGS": (torch.optim.LBFGS, {"max_iter": 3}),
}


RUNS = [(name, False) for name in OPTIMIZERS]
RUNS += [(name, True) for name in OPTIMIZERS if name != "LBFGS"]  # which torch does not compile


@pytest.mark.parametrize("name, compiled", RUNS)
def test_an_optimizer_step_is_seen(model, x, name, compiled):
    kind, options = OPTIMIZERS[name]
    optimizer = kind(sa.adapter_parameters(model), lr=0.1, **options)

    def loss():
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for _ in range(3):
        before = model(x).detach()
        if name == "LBFGS":
            step(loss)
        else:
            loss()
            step()
        assert not torch.allclose(model(x), before)
        check(model, x)


@pytest.mark.parametrize("names", [["0.B"], ["1.m"], ["0.weight", "1.A"]], ids=str)
def test_functional_call_uses_the_tensors_it_is_given(model, x, names):
    for _ in range(20):  # copies that are thrown away: their ids and addresses come again
        for name in names:
            model.get_parameter(name).data.mul_(1.1)
        given = {name: copy.deepcopy(model.get_parameter(name)) for name in names}
        y = torch.func.functional_call(model, given, (x,))
        torch.testing.assert_close(y, defined(model, x), rtol=1e-4, atol=1e-4)
        del given, y
    plain = {name: 1.5 * p.detach() for name, p in model.named_parameters()}
    check(model, x)
    y = torch.func.functional_call(model, plain, (x,))
    check(model, x)
    WRITES["an alias"](model)
    torch.testing.assert_close(y, defined(model, x), rtol=1e-4, atol=1e-4)


def test_copies_and_averages_keep_their_own(model, x):
    model(x)
    twin, average = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    average(x)
    WRITES["in place"](twin)
    check(twin, x), check(model, x)
    average.update_parameters(twin)
    average.update_parameters(model)
    check(average.module, x)


TRANSFORMS = {"grad": lambda f: torch.func.grad(lambda x: f(x).sum()), "vmap": torch.func.vmap}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nothing_is_kept_under_torch_func(model, x, transform):
    model(x)
    WRITES["in place"](model)
    TRANSFORMS[transform](model)(x)
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    assert not any(is_wrapped(t) for layer in model for t in layer._kept[1].values())
    check(model, x)


def test_a_write_that_bypasses_torch_is_seen_after_watch(model, x):
    model(x)
    model[0].B.detach().numpy()[:] = 1.0
    for layer in model:
        layer.watch()
    check(model, x)
