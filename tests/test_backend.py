"""Which implementation runs, why, and that every one of them gives the same through the modules."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import structadapt as sa
from structadapt import dispatch, opaque, ops
from structadapt.kernels import _launch

BF16 = torch.bfloat16


def lora_tensors(M=20, N=32, K=48, rank=4, dtype=BF16, grad=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, W, b = normal(2, M // 2, K).to(dtype), (normal(N, K) / K**0.5).to(dtype), normal(N).to(dtype)
    A, B = normal(rank, K) / K**0.5, normal(N, rank)
    return x.requires_grad_(grad), W, b, A.requires_grad_(grad), B.requires_grad_(grad)


def dora_tensors(**kwargs):
    x, W, b, A, B = lora_tensors(**kwargs)
    return x, W, b, A, B, torch.linspace(0.5, 2, len(W)).requires_grad_(x.requires_grad)


def quanta_tensors(dtype=BF16, grad=True):
    x, W, b, *_ = lora_tensors(N=24, K=24, dtype=dtype, grad=grad)
    adapter = sa.QuanTA(axes=(4, 3, 2))
    generator = torch.Generator().manual_seed(1)
    gates = [
        (t + 0.2 * torch.randn(t.shape, generator=generator)).requires_grad_(grad)
        for t in adapter.init(W).values()
    ]
    return x, W, b, gates, [], True


OPS = {
    "lora_linear": lambda **k: (*lora_tensors(**k), 0.5),
    "dora_linear": lambda **k: (*dora_tensors(**k), 0.5),
    "quanta_linear": quanta_tensors,
}


def outcome(op, arguments, compiled=False):
    """The output and every gradient."""
    function = getattr(ops, op)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = function(*arguments)
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    leaves = [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def close(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


# -- the switch ------------------------------------------------------------------------------------


def test_the_switch_and_its_default():
    assert dispatch.current() == "auto"
    with sa.backend("torch"):
        with sa.backend("triton"):
            assert dispatch.current() == "triton"
        assert dispatch.current() == "torch"
    with pytest.raises(ValueError, match="unknown backend 'cuda': expected one of auto"):
        sa.backend("cuda").__enter__()
    with pytest.raises(RuntimeError, match="here"), sa.backend("triton"):
        raise RuntimeError("here")
    assert dispatch.current() == "auto"


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("gpu", "unknown backend")])
def test_the_environment_sets_the_default(value, expected):
    code = "from structadapt import dispatch; print(dispatch.current())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "STRUCTADAPT_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr


def test_auto_leaves_the_cpu_to_torch():
    for op, arguments in OPS.items():
        found = sa.explain(op, *arguments())
        assert found.backend == "torch" and "on the CPU" in found.reason


@pytest.mark.parametrize("op", OPS)
def test_triton_runs_the_kernels_in_the_interpreter(op):
    arguments = OPS[op]()
    with sa.backend("triton"):
        assert sa.explain(op, *arguments).backend == "triton"
        found = outcome(op, arguments)
    with sa.backend("torch"):
        assert sa.explain(op, *arguments).reason == "the backend is torch"
        expected = outcome(op, arguments)
    assert not torch.equal(found[0], expected[0]) or op == "quanta_linear"  # other roundings
    close(found, expected, 1.5e-2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, W: (x.double(), W.double()), "x is float64, and the kernels take"),
        (lambda x, W: (x, W.float()), "x is bfloat16 and W float32"),
        (lambda x, W: (x.mT.contiguous().mT, W), "the last stride of x"),
        (lambda x, W: (x, W.T.contiguous().T), "the last stride of x"),
    ],
)
def test_what_a_kernel_cannot_take_is_an_error_with_triton_and_a_reason_in_explain(change, reason):
    x, W, b, A, B = lora_tensors(grad=False)
    x, W = change(x, W)
    with sa.backend("triton"):
        assert reason in sa.explain("lora_linear", x, W, b.to(x.dtype), A, B, 1.0).reason
        with pytest.raises(RuntimeError, match="lora_linear cannot run on Triton"):
            ops.lora_linear(x, W, b.to(x.dtype), A, B, 1.0)


def test_a_large_rank_a_subclass_and_observed_operations_are_refused():
    x, W, b, A, B = lora_tensors(rank=600, grad=False)
    with sa.backend("triton"):
        assert "rank is 600" in sa.explain("lora_linear", x, W, b, A, B, 1.0).reason
        with pytest.raises(RuntimeError, match="looks at the operations"):
            torch.func.vmap(lambda x: ops.lora_linear(x, W, b, A, B, 1.0))(x)


class Elsewhere:
    """A device that is not there, for what decides before any kernel runs."""

    def __init__(self, monkeypatch, arch=90):
        monkeypatch.setattr(_launch, "architecture", lambda device: arch)
        monkeypatch.setattr(_launch, "interpreted", lambda: False)


def on_cuda(t):
    """A tensor that says it is on a GPU."""

    class Pretending:
        device = torch.device("cuda", 0)
        is_cuda = True

        def __getattr__(self, name):
            return getattr(t, name)

    return Pretending()


@pytest.mark.parametrize(
    ("x", "W", "arch", "reason"),
    [
        (torch.empty(256, 64, dtype=BF16), torch.empty(32, 64, dtype=BF16), 90, None),
        (torch.empty(256, 64, dtype=BF16), torch.empty(32, 64, dtype=BF16), 0, "8.0"),
        (torch.empty(256, 64), torch.empty(32, 64), 90, "float32"),
        (torch.empty(256, 60, dtype=BF16), torch.empty(32, 60, dtype=BF16), 90, "multiples of 16"),
        (torch.empty(256, 64, dtype=BF16), torch.empty(33, 64, dtype=BF16), 90, "multiples of 16"),
        (
            torch.empty(256, 68, dtype=BF16)[:, :64],
            torch.empty(32, 64, dtype=BF16),
            90,
            "multiples of 8 numbers",
        ),
        (
            torch.empty(256 * 64 + 1, dtype=BF16)[1:].view(256, 64),
            torch.empty(32, 64, dtype=BF16),
            90,
            "16 bytes",
        ),
    ],
)
def test_what_a_device_takes(monkeypatch, x, W, arch, reason):
    Elsewhere(monkeypatch, arch)
    found = dispatch.refusal(on_cuda(x), on_cuda(W))
    assert found is None if reason is None else reason in found


def test_few_rows_are_left_to_torch(monkeypatch):
    Elsewhere(monkeypatch)
    W = on_cuda(torch.empty(32, 64, dtype=BF16))
    for rows, expected in ((8, "torch"), (127, "torch"), (128, "triton")):
        x = on_cuda(torch.empty(rows, 64, dtype=BF16))
        assert dispatch.choose("lora_linear", x, W) == expected
    with sa.backend("triton"):
        assert dispatch.choose("lora_linear", on_cuda(torch.empty(1, 64, dtype=BF16)), W)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with sa.backend("triton"):
        found = sa.explain("lora_linear", *lora_tensors(), 1.0)
    assert found.backend == "torch" and found.reason == "triton is not installed"


# -- explain ---------------------------------------------------------------------------------------


def test_explain_names_every_layer_of_a_model(net, ids):
    model = sa.adapt(net, sa.LoRA(rank=2), target="attn")
    sa.adapt(model, sa.DoRA(rank=2), target="up")
    found = sa.explain(model, ids)
    assert found.backend == "torch"
    assert [c.op for c in found.choices].count("lora_linear") == 2
    assert [c.op for c in found.choices].count("dora_linear") == 2
    assert "lora_linear (3, 7, 32) by (32, 32): torch, x is on the CPU" in str(found)
    assert str(sa.explain(nn.Linear(2, 2), torch.ones(1, 2))) == "no op of structadapt was called"
    with sa.backend("triton"):
        mixed = sa.explain(model, ids)
    assert mixed.backend == "triton"
    with pytest.raises(ValueError, match="unknown op 'lora': expected one of lora_linear"):
        sa.explain("lora")


# -- through the modules ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_an_adapted_layer_on_triton_is_the_one_on_torch(adapter, dtype, x, train_a_little):
    model = nn.Sequential(nn.Linear(48, 32, dtype=dtype)).requires_grad_(False)
    model = train_a_little(sa.adapt(model, adapter, target="0"), scale=0.1)

    def step():
        inputs = x.to(dtype).requires_grad_()
        y = model(inputs)
        y.float().square().mean().backward()
        grads = [inputs.grad, *(p.grad for p in sa.adapter_parameters(model))]
        for p in sa.adapter_parameters(model):
            p.grad = None
        return [y, *grads]

    expected = step()
    with sa.backend("triton"):
        found = step()
        assert sa.explain(model, x.to(dtype)).backend == "triton"
    close(found, expected, 2e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_a_fresh_adapter_on_triton_is_within_a_rounding_of_the_layer(adapter, dtype, x):
    model = nn.Sequential(nn.Linear(48, 32, dtype=dtype))
    expected = model(x.to(dtype)).double()
    sa.adapt(model, adapter, target="0")
    with sa.backend("triton"):
        found = model(x.to(dtype)).double()
    one = {BF16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    assert (found - expected).abs().max() <= one * expected.abs().max()


def test_autocast_casts_once_and_gradients_stay_wide(x):
    model = sa.adapt(nn.Sequential(nn.Linear(48, 32, dtype=BF16)), sa.LoRA(rank=2), target="0")
    with sa.backend("triton"), torch.autocast("cpu", torch.bfloat16):
        y = model(x)  # fp32
    assert y.dtype == BF16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in sa.adapter_parameters(model))


def test_a_second_derivative_and_checkpointing_on_triton(x):
    x, W, b, A, B = lora_tensors(dtype=torch.float32)
    with sa.backend("triton"):
        y = ops.lora_linear(x, W, b, A, B, 0.5)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        twice = [t.grad.clone() for t in (x, A, B)]
        for t in (x, A, B):
            t.grad = None
        y = torch.utils.checkpoint.checkpoint(
            lambda x: ops.lora_linear(x, W, b, A, B, 0.5), x, use_reentrant=False
        )
        first = torch.autograd.grad(y.sum(), (x, A, B))
        plain = torch.autograd.grad(ops.lora_linear(x, W, b, A, B, 0.5).sum(), (x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    (dx,) = torch.autograd.grad(
        ops.lora_linear(x, W, b, A, B, 0.5).square().sum(), x, create_graph=True
    )
    dx.square().sum().backward()
    assert all(
        torch.allclose(a, t.grad, rtol=1e-4, atol=1e-3)
        for a, t in zip(twice, (x, A, B), strict=True)
    )


def test_doras_output_is_held_so_a_write_into_it_is_an_error():
    with sa.backend("triton"):
        y = ops.dora_linear(*dora_tensors(), 0.5)
        y += 1
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()
        x, W, b, A, B, g = dora_tensors()
        y = ops.dora_linear(x, W, b, A, B, g.detach(), 0.5)  # nobody asks for the gradient of g
        y += 1
        y.sum().backward()


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("asked", ["triton", "torch"])
def test_compiled_without_a_graph_break(op, asked):
    torch._dynamo.reset()
    arguments = OPS[op]()
    with sa.backend(asked):
        found = outcome(op, arguments, compiled=True)
        expected = outcome(op, arguments)
    close(found, expected, 1e-6 if asked == "triton" else 2e-2)


@pytest.mark.parametrize("op", OPS)
def test_the_custom_ops_pass_torchs_own_check(op):
    arguments = OPS[op](dtype=torch.float32)
    with sa.backend("torch"):  # inside they choose like any op
        torch.library.opcheck(getattr(opaque, op), arguments)


def test_a_compiled_model_and_its_steps_under_triton(net, ids):
    """No recompilation over steps, and the gradients of eager mode."""
    torch._dynamo.reset()
    model = sa.adapt(net.to(BF16), sa.DoRA(rank=2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(sa.adapter_parameters(model), lr=0.1)
    with sa.backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(ids).float().logsumexp(-1).mean().backward()
            found = [p.grad.clone() for p in sa.adapter_parameters(model)]
            optimizer.zero_grad()
            model(ids).float().logsumexp(-1).mean().backward()
            expected = [p.grad for p in sa.adapter_parameters(model)]
            close(found, expected, 3e-2)
            optimizer.step()
            optimizer.zero_grad()
