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
        backend = compiled if isinstance(compiled, str) else "aot_eager"
        function = torch.compile(function, fullgraph=True, backend=backend)
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
    with pytest.raises(
        ValueError, match="unknown backend 'cuda' from sa.backend: expected one of auto"
    ):
        sa.backend("cuda").__enter__()
    with pytest.raises(RuntimeError, match="here"), sa.backend("triton"):
        raise RuntimeError("here")
    assert dispatch.current() == "auto"


def test_blocks_that_overlap_leave_the_default_behind():
    first, second = sa.backend("triton"), sa.backend("torch")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.current() == "torch"
    second.__exit__(None, None, None)
    assert dispatch.current() == "auto"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("torch", "torch"),
        ("", "auto"),
        ("gpu", "unknown backend 'gpu' from STRUCTADAPT_BACKEND: expected one of auto"),
    ],
)
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
            torch.empty(1, 64, dtype=BF16).expand(256, 64),
            torch.empty(32, 64, dtype=BF16),
            90,
            "positive multiples",
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


@pytest.mark.parametrize("kind", [sa.LoRA, sa.DoRA])
def test_tensors_of_any_strides(kind, x, train_a_little):
    """As factors of an SVD have them: column by column."""
    model = sa.adapt(nn.Sequential(nn.Linear(48, 32)), kind(rank=3), target="0")
    train_a_little(model, 0.1)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    columns = {k: v.T.contiguous().T if v.dim() == 2 else v.repeat_interleave(2)[::2]
               for k, v in state.items() if not k.endswith("weight")}  # fmt: skip
    assert not all(v.is_contiguous() for v in columns.values())

    def step():
        y = model(x)
        y.square().mean().backward()
        grads = [y, *(p.grad for p in sa.adapter_parameters(model))]
        model.zero_grad()
        return grads

    with sa.backend("triton"):
        expected = step()
        model.load_state_dict({**state, **columns}, assign=True)
        found = step()
    close(found, expected, 1e-5)


def test_what_has_no_kernel_falls_back_under_triton(ids):
    """An embedding and a float64 base: only their norm would be an op's."""
    with sa.backend("triton"):
        model = sa.adapt(nn.Sequential(nn.Embedding(11, 16)), sa.DoRA(rank=2), target="0")
        model(ids)
        sa.adapt(nn.Sequential(nn.Linear(16, 16)).double(), sa.DoRA(rank=2), target="0")


def test_few_rows_are_left_to_torch(monkeypatch):
    Elsewhere(monkeypatch)
    W = on_cuda(torch.empty(32, 64, dtype=BF16))
    for rows, expected in ((8, "torch"), (127, "torch"), (128, "triton")):
        x = on_cuda(torch.empty(rows, 64, dtype=BF16))
        assert (dispatch.against(x, W) is None) == (expected == "triton")
    with sa.backend("triton"):
        assert dispatch.against(on_cuda(torch.empty(1, 64, dtype=BF16)), W) is None


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with sa.backend("triton"):
        found = sa.explain("lora_linear", *lora_tensors(), 1.0)
    assert found.backend == "torch" and "triton 3.6 or newer is not installed" in found.reason


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


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # read by that of torch 2.14
@pytest.mark.parametrize("asked", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_the_custom_ops_pass_torchs_own_check(op, asked):
    """Fakes, strides, the backward ops through their gradients: x is transposed, the rank is 4."""
    x, *rest = OPS[op](dtype=torch.float32)
    x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    with sa.backend(asked):  # inside they choose like any op
        torch.library.opcheck(getattr(opaque, op), (x, *rest))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("op", OPS)
def test_inductor_finds_the_strides_it_was_promised(op):
    """The rank is 4, so h has longer rows than columns; x and its gradient are transposed."""
    torch._dynamo.reset()
    x, *rest = OPS[op]()
    x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    with sa.backend("triton"):
        found = outcome(op, (x, *rest), compiled="inductor")
        expected = outcome(op, (x, *rest))
    close(found, expected, 1e-6)


@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows_makes_two_graphs(op):
    torch._dynamo.reset()
    x, *rest = OPS[op](dtype=torch.float32)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend=backend)
    with sa.backend("triton"):
        for rows in (3, 5, 6, 9, 12):
            part = x.detach()[:, :1].expand(-1, rows, -1).contiguous().requires_grad_()
            compiled(part, *rest).sum().backward()
    assert len(graphs) <= 2


def test_the_first_step_of_a_process_is_compiled_once():
    code = (
        "import torch, structadapt as sa\n"
        "model = sa.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), sa.DoRA(2), target='0')\n"
        "step = torch.compile(model, backend='aot_eager', fullgraph=True)\n"
        "with torch._dynamo.config.patch(error_on_recompile=True):\n"
        "    for _ in range(3): step(torch.ones(3, 8)).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_exported_programs_hold_the_plain_formulas():
    model = sa.adapt(nn.Sequential(nn.Linear(16, 16)), sa.LoRA(rank=2), target="0")
    with sa.backend("triton"), torch.no_grad():
        program = torch.export.export(model, (torch.ones(4, 16),))
    assert "structadapt" not in str(program.graph)


def test_sharded_weights_are_compiled_as_plain_formulas():
    class Sharded(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("not run")

    x = torch.ones(4, 16)
    W = torch.Tensor._make_subclass(Sharded, torch.ones(16, 16))
    with sa.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert dispatch.traced_to_kernels(x, torch.ones(16, 16))
        assert not dispatch.traced_to_kernels(x, W)
        assert not dispatch.traced_to_kernels(x, torch.ones(16, 16, dtype=BF16))
        assert not dispatch.traced_to_kernels(x, torch.ones(16, 16), rank=1000)


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
