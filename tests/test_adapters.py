"""The laws that every adapter keeps, and the formulas they are checked against."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import structadapt as sa
from structadapt import forms
from structadapt.adapters import quanta
from structadapt.adapters.base import Adapter
from structadapt.kernels import reference

SHAPES = [(24, 24), (36, 24), (24, 60), (64, 27)]  # (out, in), with 3 axes each
SHAPES_5 = [(48, 48), (96, 32)]  # with 5


def shapes_for(adapter):
    many = isinstance(adapter, sa.QuanTA) and adapter.axes > 3
    return SHAPES_5 if many else SHAPES


def layer(shape, dtype=torch.float64, bias=True, seed=0, rows=(3, 5)):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return draw(*rows, shape[1]), draw(*shape) / 5, draw(shape[0]) if bias else None


def gradients(output, leaves):
    upstream = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype
    )
    return torch.autograd.grad((output * upstream).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_law_1_forward_is_the_linear_of_the_adapted_weight(adapter, bias, perturb):
    for shape in shapes_for(adapter):
        x, W, b = layer(shape, bias=bias)
        p = perturb(adapter.init(W))
        leaves = [t for t in (x, W, b) if t is not None] + list(p.values())
        for leaf in leaves:
            leaf.requires_grad_()
        fast = adapter.forward(x, W, b, p)
        slow = F.linear(x, adapter.weight(W, p), b)
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
        for name, left, right in zip(
            ["x", "W", "b"][: len(leaves) - len(p)] + list(p),
            gradients(fast, leaves),
            gradients(slow, leaves),
            strict=True,
        ):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9, msg=name)
            assert left.abs().max() > 0, f"no gradient for {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_law_2_the_start_is_the_frozen_layer_bit_for_bit(adapter, dtype, bias):
    for shape in shapes_for(adapter):
        for rows in [(3, 5), (1,), (), (0,)]:
            x, W, b = layer(shape, dtype, bias, rows=rows)
            p = adapter.init(W)
            y = adapter.forward(x, W, b, p)
            assert y.dtype == dtype
            assert torch.equal(y, F.linear(x, W, b))
            assert torch.equal(adapter.weight(W, p), W)
            assert {t.dtype for t in p.values()} == {torch.float32}


@given(data=st.data())
def test_laws_1_and_2_for_any_shape_of_low_rank(data):
    kind = data.draw(st.sampled_from([sa.LoRA, sa.DoRA]))
    adapter = kind(rank=data.draw(st.integers(1, 20)), alpha=data.draw(st.floats(0.1, 64)))
    shape = (data.draw(st.integers(1, 33)), data.draw(st.integers(1, 33)))
    check_laws(adapter, shape, data.draw(st.integers(0, 5)))


@given(data=st.data())
def test_laws_1_and_2_for_any_factorisation_of_quanta(data):
    n_axes = data.draw(st.integers(3, 5))
    sizes = st.lists(st.integers(1, 4), min_size=n_axes, max_size=n_axes)
    in_axes = tuple(data.draw(sizes))
    out = data.draw(st.sampled_from([math.prod(in_axes), math.prod(data.draw(sizes))]))
    init = data.draw(st.sampled_from(["identity", "paper", "zero_last"]))
    check_laws(sa.QuanTA(in_axes, init), (out, math.prod(in_axes)), data.draw(st.integers(0, 5)))


def check_laws(adapter, shape, rows):
    x, W, b = layer(shape, rows=(rows,))
    p = adapter.init(W)
    assert torch.equal(adapter.forward(x, W, b, p), F.linear(x, W, b))
    generator = torch.Generator().manual_seed(3)
    for key, tensor in p.items():
        if not key.startswith("frozen_"):
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    slow = F.linear(x, adapter.weight(W, p), b)
    assert torch.allclose(adapter.forward(x, W, b, p), slow, rtol=1e-9, atol=1e-8)


def test_the_same_seed_draws_the_same_tensors_and_leaves_the_global_state(adapter):
    W = torch.randn(48, 48)
    before = torch.get_rng_state()
    draws = [adapter.init(W), adapter.init(W), adapter.init(W.bfloat16())]
    assert torch.equal(torch.get_rng_state(), before)
    for key in draws[0]:
        if key != "m":
            assert torch.equal(draws[0][key], draws[1][key])
            assert torch.equal(draws[0][key], draws[2][key]), "depends on the dtype of the base"
    other = adapter.init(W, torch.Generator().manual_seed(7))
    drawn = [k for k in other if k == "A" or getattr(adapter, "start", "identity") != "identity"]
    assert not any(torch.equal(other[k], draws[0][k]) for k in drawn if other[k].any())


def test_the_configuration_builds_the_adapter_again(adapter):
    assert type(adapter)(**adapter.config()) == adapter
    assert eval(repr(adapter), dict(Adapter.registry)) == adapter
    assert hash(adapter) == hash(type(adapter)(**adapter.config()))
    assert Adapter.registry[type(adapter).__name__] is type(adapter)


def test_an_adapter_is_right_with_init_and_weight_alone(perturb):
    class Shift(Adapter):
        def init(self, W, generator=None):
            return {"shift": W.new_zeros(W.shape[0], 1)}

        def weight(self, W, p):
            return W + p["shift"]

    try:
        x, W, b = layer((4, 6))
        p = perturb(Shift().init(W))
        torch.testing.assert_close(
            Shift().forward(x, W, b, p), x @ (W + p["shift"]).T + b, rtol=1e-12, atol=1e-12
        )
    finally:
        del Adapter.registry["Shift"]


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling, scale", [("alpha/r", 3.0), ("alpha/sqrt(r)", 6.0), ("constant", 12.0)]
)
def test_lora_formula(scaling, scale):
    adapter = sa.LoRA(rank=4, alpha=12, scaling=scaling)
    x, W, b = layer((5, 7))
    p = adapter.init(W)
    assert adapter.scale == scale
    assert p["A"].shape == (4, 7) and p["B"].shape == (5, 4) and not p["B"].any()
    assert p["A"].abs().max() <= 1 / math.sqrt(7) and p["A"].std() > 0.4 / math.sqrt(7)
    p["B"] = torch.randn(5, 4, dtype=W.dtype)
    expected = x @ W.T + scale * (x @ p["A"].T) @ p["B"].T + b
    torch.testing.assert_close(adapter.forward(x, W, b, p), expected)


@pytest.mark.parametrize("kind", [sa.LoRA, sa.DoRA])
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": -3}, "positive integer"),
        ({"rank": 2.0}, "positive integer, got 2.0"),
        ({"rank": True}, "positive integer"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": math.nan}, "alpha must be a positive number, got nan"),
        ({"alpha": math.inf}, "alpha"),
        ({"alpha": "16"}, "alpha"),
        ({"scaling": "alpha/r2"}, "scaling must be one of 'alpha/r'"),
    ],
)
def test_low_rank_refuses(kind, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        kind(**arguments)
    assert str(error.value).startswith(kind.__name__)


def test_a_large_scale_does_not_overflow_fp16_at_the_start():
    adapter = sa.LoRA(rank=8, alpha=512, scaling="constant")
    x, W, b = layer((16, 64), torch.float16)
    assert torch.equal(adapter.forward(1000 * x, W, b, adapter.init(W)), F.linear(1000 * x, W, b))


def test_numbers_of_numpy_are_numbers():
    assert sa.LoRA(np.int64(4), np.float32(8)) == sa.LoRA(4, 8.0)
    assert type(sa.LoRA(np.int64(4)).rank) is int


# -- DoRA ------------------------------------------------------------------------------------------


def test_dora_formula_and_its_detached_norm(perturb):
    adapter = sa.DoRA(rank=3, alpha=6)
    x, W, b = layer((5, 7))
    p = adapter.init(W)
    torch.testing.assert_close(p["m"], W.norm(dim=1))
    p = {k: t.requires_grad_() for k, t in perturb(p).items()}
    V = W + 2 * p["B"] @ p["A"]
    norm = V.norm(dim=1).detach()
    expected = F.linear(x, (p["m"] / norm)[:, None] * V, b)
    actual = adapter.forward(x, W, b, p)
    torch.testing.assert_close(actual, expected)
    leaves = list(p.values())
    for left, right in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dora_with_zero_rows_cancelling_rows_and_zero_magnitudes(dtype):
    adapter = sa.DoRA(rank=2, alpha=2)
    x, W, b = layer((6, 8), dtype)
    W[0] = 0
    p = adapter.init(W)
    assert torch.equal(adapter.forward(x, W, b, p), F.linear(x, W, b))
    p["A"] = torch.eye(2, 8)
    p["B"] = torch.zeros(6, 2)
    W[1] = 0
    W[1, 0] = 2.0
    p["B"][1, 0] = -2.0  # W + BA is exactly zero in row 1
    p["m"][2] = 0
    p = {k: t.requires_grad_() for k, t in p.items()}
    y = adapter.forward(x, W, b, p)
    rows = adapter.weight(W, p)
    assert torch.isfinite(y).all() and not rows[:3].any()
    torch.testing.assert_close(y[..., :3], b[:3].expand_as(y[..., :3]), rtol=1e-2, atol=1e-2)
    found = dict(zip(p, gradients(y, list(p.values())), strict=True))
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert found["B"][:2].any(1).all(), "a zero row can leave zero"
    assert not found["m"][:2].any()


@pytest.mark.parametrize("rows", [2, 64], ids=["decode", "train"])
@pytest.mark.parametrize("plain", [False, True], ids=["lean", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gain", [1.0, 1.001, 30.0, 0.1, 1e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dora_loses_no_digits_whatever_the_magnitude(
    monkeypatch, dtype, gain, bias, plain, rows, perturb
):
    """Against the formula in float64: every error is that of a few roundings."""
    if plain:
        monkeypatch.setattr(forms, "plain_tensors", lambda *tensors: False)
    adapter = sa.DoRA(rank=3, alpha=6)
    x, W, b = layer((24, 64), dtype, bias, rows=(rows,))
    W = W / 2
    p = perturb(adapter.init(W))
    p["m"] *= gain
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in p.values())]
    y = adapter.forward(x, W, b, p)
    found = [y, *gradients(y, leaves)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    x64, A, B, m = wide
    V = W.double() + 2 * B @ A
    y64 = (m / V.detach().norm(dim=1)) * (x64 @ V.T) + (b.double() if bias else 0)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=dtype)
    expected = [y64, *torch.autograd.grad(y64, wide, upstream.double())]
    limit = 6 * torch.finfo(dtype).eps
    for name, left, right in zip(("y", "x", *p), found, expected, strict=True):
        error, size = (left.double() - right).norm(), right.norm()
        assert error <= limit * size, f"{name}: {error / size:.1e}"


def test_dora_keeps_its_norm_in_fp32_under_autocast():
    adapter = sa.DoRA(rank=2)
    x, W, _ = layer((64, 48), torch.float32)
    p = adapter.init(W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter.forward(x, W, None, p), F.linear(x, W))


# -- QuanTA ----------------------------------------------------------------------------------------

EINSUM = {  # the paper's order of gates, written out
    3: "zabc,efbc,diaf,ghde->zghi",
    4: "zabcd,ghcd,flbh,epal,jkfg,ioek,mnij->zmnop",
}


@pytest.mark.parametrize("n_axes", [3, 4])
def test_quanta_applies_the_gates_in_the_papers_order(n_axes):
    in_axes, out_axes = (4, 3, 5, 2)[:n_axes], (2, 5, 3, 4)[:n_axes]
    shapes = reference.quanta_gate_shapes(out_axes, in_axes)
    gates = [torch.randn(s, dtype=torch.float64) for s in shapes]
    x = torch.randn(7, math.prod(in_axes), dtype=torch.float64)
    expected = torch.einsum(EINSUM[n_axes], x.view(7, *in_axes), *gates)
    assert expected.shape[1:] == out_axes
    torch.testing.assert_close(reference.quanta_apply(x, gates), expected.reshape(7, -1))
    assert reference.quanta_axes(gates) == in_axes


def test_quanta_with_five_axes_applies_gate_after_gate():
    in_axes, out_axes = (2, 3, 2, 3, 2), (3, 2, 2, 2, 4)
    gates = [
        torch.randn(s, dtype=torch.float64) for s in reference.quanta_gate_shapes(out_axes, in_axes)
    ]
    u = torch.randn(4, math.prod(in_axes), dtype=torch.float64)
    expected = u.view(4, *in_axes)
    pairs = [(-1, -2), (-1, -3), (-1, -4), (-1, -5), (-2, -3), (-2, -4), (-2, -5),
             (-3, -4), (-3, -5), (-4, -5)]  # fmt: skip
    for gate, (late, early) in zip(gates, pairs, strict=True):
        moved = torch.tensordot(expected, gate, dims=([early, late], [2, 3]))
        expected = moved.movedim((-2, -1), (5 + early + 1, 5 + late + 1))
    torch.testing.assert_close(reference.quanta_apply(u, gates), expected.reshape(4, -1))
    assert expected.shape[1:] == out_axes


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=3, max_size=5),
    seed=st.integers(0, 1000),
)
def test_the_difference_from_the_identity_is_the_difference(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    out_axes, in_axes = zip(*sizes, strict=True)
    shapes = reference.quanta_gate_shapes(out_axes, in_axes)
    gates = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    eyes = [reference.eye_gate(gate) for gate in gates]
    x = torch.randn(3, math.prod(in_axes), generator=generator, dtype=torch.float64)
    expected = reference.quanta_apply(x, gates) - reference.quanta_apply(x, eyes)
    actual = reference.quanta_apply_minus_eye(x, gates)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-7)


def test_an_identity_start_keeps_small_updates_in_bf16():
    """Gates rounded to bf16 would lose an update of 1e-3 on the diagonal altogether."""
    adapter = sa.QuanTA((4, 4, 4))
    x, W, _ = layer((64, 64), torch.float32)
    p = adapter.init(W)
    for gate in p.values():
        gate.mul_(1.001)
    exact = adapter.update(x.double(), 64, {k: t.double() for k, t in p.items()})
    rough = adapter.update(x.bfloat16(), 64, p).double()
    assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quanta_takes_a_gradient_that_starts_anywhere_in_memory(dtype, perturb):
    adapter = sa.QuanTA(3)
    x, W, b = layer((64, 64), dtype, rows=(12,))
    p = {k: t.requires_grad_() for k, t in perturb(adapter.init(W)).items()}
    y = adapter.forward(x, W, b, p)
    upstream = torch.randn(y.numel() + 1).to(dtype)
    found = torch.autograd.grad(y, p.values(), upstream[1:].view_as(y), retain_graph=True)
    expected = torch.autograd.grad(y, p.values(), upstream[1:].clone().view_as(y))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "n, axes, expected",
    [
        (4096, 3, (16, 16, 16)),
        (4096, 4, (8, 8, 8, 8)),
        (1024, 3, (16, 8, 8)),
        (128, 3, (8, 4, 4)),
        (14336, 3, (32, 28, 16)),
        (32768, 5, (8, 8, 8, 8, 8)),
    ],
)
def test_factorise(n, axes, expected):
    assert quanta.factorise(n, axes) == expected


@given(n=st.integers(1, 3000), n_axes=st.integers(3, 5))
def test_sizes_make_the_width_or_a_little_more_where_that_is_much_cheaper(n, n_axes):
    sizes = quanta.factorise(n, n_axes)
    padded = math.prod(sizes)
    assert len(sizes) == n_axes and list(sizes) == sorted(sizes, reverse=True)
    assert n <= padded <= n + n // 8 and padded - n < math.prod(sizes[2:])
    if padded > n:
        assert 2 * quanta._cost(sizes) < quanta._cost(quanta._cheapest(n, n_axes))


def test_a_prime_width_reaches_every_row_and_trains_every_parameter(perturb):
    adapter = sa.QuanTA()
    x, W, b = layer((101, 127))
    p = {k: t.requires_grad_() for k, t in perturb(adapter.init(W)).items()}
    y = adapter.forward(x, W, b, p)
    torch.testing.assert_close(y, F.linear(x, adapter.weight(W, p), b))
    assert all((gradient != 0).all() for gradient in gradients(y, list(p.values())))
    assert (adapter.weight(W, p) != W).any(1).all()
    assert sum(t.numel() for t in p.values()) < W.numel()  # or it would be refused


def test_quanta_tensors():
    W = torch.zeros(60, 24)
    p = sa.QuanTA((2, 3, 4)).init(W)
    assert [tuple(t.shape) for t in p.values()] == [(3, 4, 3, 4), (2, 3, 2, 4), (5, 4, 2, 3)]
    assert list(p) == ["gate_0", "gate_1", "gate_2"]
    p = sa.QuanTA((2, 3, 4), init="paper").init(W)
    assert list(p) == [f"{name}_{i}" for name in ("gate", "frozen") for i in range(3)]
    assert all(torch.equal(p[f"gate_{i}"], p[f"frozen_{i}"]) for i in range(3))
    assert p["gate_0"].abs().max() <= math.sqrt(3 / 12) and p["gate_0"].std() > 0.2
    p = sa.QuanTA((3, 3, 3), init="paper").init(torch.zeros(27, 27))
    assert not torch.equal(p["gate_0"], p["gate_1"])
    p = sa.QuanTA((2, 3, 4), init="zero_last").init(W)
    assert p["gate_1"].any() and not p["gate_2"].any()


def test_every_gate_entry_and_every_output_row_takes_part(perturb):
    for shape in [(24, 24), (60, 24), (24, 60), (96, 27)]:
        adapter = sa.QuanTA(axes=3)
        x, W, _ = layer(shape, rows=(50,))
        p = {k: t.requires_grad_() for k, t in perturb(adapter.init(W)).items()}
        for gradient in gradients(adapter.forward(x, W, None, p), list(p.values())):
            assert gradient.all()
        assert (adapter.weight(W, p) - W).abs().amax(1).min() > 0


@pytest.mark.parametrize(
    "axes", [2, 6, 0, 3.0, None, "333", (4, 4), (1,) * 6, (4, 0, 4), (4, 4.0, 4), True]
)
def test_quanta_refuses_axes(axes):
    with pytest.raises(ValueError, match="axes must be a number from 3 to 5 or as many positive"):
        sa.QuanTA(axes)


@pytest.mark.parametrize(
    ("axes", "out_axes"), [(3, (4, 4, 4)), ((4, 4, 4), (4, 4)), ((4, 4, 4), 3)]
)
def test_quanta_refuses_out_axes(axes, out_axes):
    with pytest.raises(ValueError, match="need axes with as many sizes"):
        sa.QuanTA(axes, out_axes=out_axes)


def test_quanta_reads_sizes_that_can_be_read_once():
    assert sa.QuanTA(iter((4, 4, 4)), out_axes=iter((4, 4, 2))) == sa.QuanTA(
        (4, 4, 4), out_axes=(4, 4, 2)
    )


@pytest.mark.parametrize("axes", [(127, 1, 1), (8, 4, 3)])
def test_quanta_refuses_sizes_that_leave_parameters_without_an_effect(axes):
    with pytest.raises(ValueError, match="give sizes that make it, or less than . more"):
        sa.QuanTA(axes, out_axes=axes).init(torch.zeros(64, 64))


def test_quanta_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="init must be one of 'identity'"):
        sa.QuanTA(init="random")
    with pytest.raises(ValueError, match=r"axes 4x4x4 make 64, but the layer is 24 -> 36"):
        sa.QuanTA((4, 4, 4)).init(torch.zeros(36, 24))
    with pytest.raises(ValueError, match=r"3 -> 3 does not factor into 3 axes.*itself 9"):
        sa.QuanTA().init(torch.zeros(3, 3))
