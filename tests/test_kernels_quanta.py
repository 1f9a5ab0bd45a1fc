"""QuanTA's Triton kernels in the interpreter, against float64 and against each other."""

import math

import numpy as np
import pytest
import torch
from kernel_checks import BOUNDS, DTYPES, check, normal, relative

from structadapt.kernels import _launch, lean_quanta, quanta, reference

pytestmark = pytest.mark.usefixtures("nan_filled")
BF16, FP32 = torch.bfloat16, torch.float32


def gates_of(before, after=None, dtype=FP32, scale=0.4, seed=0):
    """fp32 gates near the identity; G and G - I are exact in `dtype`."""
    gates, steps = [], 2.0**9 if dtype == BF16 else 2.0**11  # 7 and 10 bits behind 1, and a sign
    for k, shape in enumerate(reference.quanta_gate_shapes(after or before, before)):
        noise = normal(*shape, seed=seed + k, scale=scale / math.prod(shape[2:]) ** 0.5)
        noise = noise.clamp(-0.2, 0.2).mul(steps).round().div(steps)
        gates.append(reference.eye_gate(noise) + noise)
    return gates


def inputs_of(before, after, M, dtype, seed=0, cropped=0):
    """x and dy; `cropped`: so many columns less than the axes make."""
    width, out = math.prod(before) - cropped, math.prod(after) - cropped
    return normal(M, width, seed=seed, dtype=dtype), normal(M, out, seed=seed + 9, dtype=dtype)


def exact(x, dy, gates, frozen, minus_eye):
    """(y, dx, [dG], the size of T x over that of y, the same for dx) in float64."""
    x = x.double().requires_grad_()
    gates = [g.double().requires_grad_() for g in gates]
    y = whole = reference.quanta_update(x, gates, dy.shape[1], minus_eye)
    if frozen:
        y = y - reference.quanta_update(x, [g.double() for g in frozen], dy.shape[1], False)
    dx, *dG = torch.autograd.grad(y, [x, *gates], dy.double(), retain_graph=True)
    y = y.detach()
    if not frozen:
        return y, dx, dG, 1.0, 1.0
    (dx_whole,) = torch.autograd.grad(whole, x, dy.double())
    sizes = [float(big.norm() / small.norm().clamp(min=1e-30))
             for big, small in ((whole.detach(), y), (dx_whole, dx))]  # fmt: skip
    return y, dx, dG, *sizes


def compare(x, dy, gates, frozen=(), minus_eye=True):
    frozen = list(frozen)
    y = quanta.quanta_forward(x, gates, frozen, dy.shape[1], minus_eye)
    dx, dG = quanta.quanta_backward(dy, x, gates, frozen, minus_eye, True)
    ref_y, ref_dx, ref_dG, of_y, of_dx = exact(x, dy, gates, frozen, minus_eye)
    assert y.dtype == dx.dtype == x.dtype
    # A rounding or two a gate; with twins they are of T x, which is more than T x - T0 x.
    bound = BOUNDS[x.dtype] * (1 + len(gates)) ** 0.5 * (2 if x.dtype == FP32 else 1.2)
    lines = 6 if len(x) >= 5 else 60  # a column of a few rows can be nearly 0
    check(y, ref_y, bound * max(1.0, 2.2 * of_y if frozen else 1.0), "y", lines)
    check(dx, ref_dx, bound * max(1.0, 2.2 * of_dx if frozen else 1.0), "dx", lines)
    for k, (grad, ref) in enumerate(zip(dG, ref_dG, strict=True)):
        assert grad.dtype == gates[k].dtype
        assert grad.shape == ref.shape
        grad, ref = (g.flatten(2).flatten(0, 1) for g in (grad, ref))
        check(grad, ref, bound * 2, f"gate {k}", lines)  # t and r are rounded at every gate


# -- against float64 -------------------------------------------------------------------------------

UNEVEN = {2: (5, 7), 3: (4, 6, 5), 4: (3, 2, 4, 3), 5: (2, 3, 2, 2, 3)}
RECTANGULAR = {2: (6, 3), 3: (7, 2, 9), 4: (2, 3, 5, 4), 5: (3, 2, 2, 3, 2)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", UNEVEN)
@pytest.mark.parametrize("minus_eye", [True, False])
def test_every_pair_of_axes(n, dtype, minus_eye):
    sizes = UNEVEN[n]
    twin = [] if minus_eye else gates_of(sizes, None, dtype, seed=50)
    M = 17 if n < 5 else 5
    compare(*inputs_of(sizes, sizes, M, dtype), gates_of(sizes, None, dtype), twin, minus_eye)


@pytest.mark.parametrize("cropped", [0, 2])
@pytest.mark.parametrize("n", RECTANGULAR)
@pytest.mark.parametrize("minus_eye", [True, False])
def test_rectangular_gates_padding_and_cropping(n, minus_eye, cropped):
    before, after = UNEVEN[n], RECTANGULAR[n]
    for dtype in (FP32, BF16):
        twin = [] if minus_eye else gates_of(before, after, dtype, seed=50)
        x, dy = inputs_of(before, after, 5, dtype, cropped=cropped)
        compare(x, dy, gates_of(before, after, dtype), twin, minus_eye)


@pytest.mark.parametrize("M", [0, 1, 2, 65])
def test_any_number_of_rows(M):
    for minus_eye in (True, False):
        compare(*inputs_of((4, 6, 5), (4, 6, 5), M, BF16), gates_of((4, 6, 5), None, BF16),
                minus_eye=minus_eye)  # fmt: skip


def test_a_row_does_not_depend_on_the_others():
    x, dy = inputs_of((4, 6, 5), (4, 6, 5), 65, BF16)
    gates = gates_of((4, 6, 5))
    whole = quanta.quanta_forward(x, gates, [], dy.shape[1], True)
    for M in (1, 2, 17, 64):
        assert torch.equal(quanta.quanta_forward(x[:M], gates, [], dy.shape[1], True), whole[:M])


@pytest.mark.parametrize("axes", [3, 4])
def test_the_sizes_of_a_real_layer(axes):
    sizes = (16,) * 3 if axes == 3 else (8,) * 4
    x, dy = inputs_of(sizes, sizes, 3, BF16)
    compare(x, dy, gates_of(sizes, None, BF16))


def test_a_rectangular_real_layer():
    x, dy = inputs_of((16, 16, 16), (16, 16, 56), 1, BF16)
    gates = gates_of((16, 16, 16), (16, 16, 56), BF16)
    y = quanta.quanta_forward(x, gates, [], dy.shape[1], True)
    ref = reference.quanta_update(x.double(), [g.double() for g in gates], dy.shape[1], True)
    check(y, ref, 2 * BOUNDS[BF16], lines=60)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64], ids=str)
def test_gradients_of_gates_have_their_dtype(dtype):
    gates = [g.to(dtype) for g in gates_of((4, 4, 4))]
    x, dy = inputs_of((4, 4, 4), (4, 4, 4), 3, FP32)
    dx, dG = quanta.quanta_backward(dy, x, gates, [], True, True)
    assert dx.dtype == FP32 and all(g.dtype == dtype for g in dG)
    assert [g.shape for g in dG] == [g.shape for g in gates]
    same, none = quanta.quanta_backward(dy, x, gates, [], True, False)
    assert torch.equal(dx, same) and none == [None] * 3


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_gates_that_are_still_their_frozen_twins_do_nothing(dtype):
    for sizes in ((4, 6, 5), (8, 8, 8, 8)):
        x, dy = inputs_of(sizes, sizes, 3, dtype)
        gates = gates_of(sizes, None, dtype)
        twin = [g.clone() for g in gates]
        assert not quanta.quanta_forward(x, gates, twin, dy.shape[1], False).any()
        assert not quanta.quanta_backward(dy, x, gates, twin, False, True)[0].any()


def test_agrees_with_the_plain_twin():
    before, after = (4, 6, 5), (7, 2, 9)
    for minus_eye in (True, False):
        x, dy = inputs_of(before, after, 17, FP32)
        gates = gates_of(before, after)
        twin = [] if minus_eye else gates_of(before, after, seed=50)
        arguments = dy, x, gates, twin, minus_eye, True
        y = quanta.quanta_forward(x, gates, twin, dy.shape[1], minus_eye)
        other = lean_quanta.quanta_forward(x, gates, twin, dy.shape[1], minus_eye)
        assert relative(y, other) < 3e-6
        dx, dG = quanta.quanta_backward(*arguments)
        other_dx, other_dG = lean_quanta.quanta_backward(*arguments)
        assert relative(dx, other_dx) < 3e-6
        for one, two in zip(dG, other_dG, strict=True):
            assert relative(one, two) < 3e-6


# -- exact cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 6, 5), (8, 8, 8, 8)], ids=str)
def test_identity_gates_add_nothing_or_copy(sizes, dtype):
    x, dy = inputs_of(sizes, sizes, 5, dtype)
    gates = gates_of(sizes, scale=0.0)
    assert not quanta.quanta_forward(x, gates, [], x.shape[1], True).any()
    assert torch.equal(quanta.quanta_forward(x, gates, [], x.shape[1], False), x)
    assert not quanta.quanta_forward(x, gates, gates, x.shape[1], False).any()
    assert not quanta.quanta_backward(dy, x, gates, [], True, False)[0].any()


def test_permutation_gates_permute_exactly():
    sizes = (4, 6, 5)
    order = torch.Generator().manual_seed(0)
    gates = []
    for b, a in reference.quanta_pairs(3):
        n = sizes[b] * sizes[a]
        gate = torch.eye(n)[torch.randperm(n, generator=order)]
        gates.append(gate.view(sizes[b], sizes[a], sizes[b], sizes[a]))
    x, _ = inputs_of(sizes, sizes, 9, BF16)
    y = quanta.quanta_forward(x, gates, [], 120, False)
    assert torch.equal(y, reference.quanta_apply(x, gates))
    assert torch.equal(y.sort(1).values, x.sort(1).values)
    dx, _ = quanta.quanta_backward(y, x, gates, [], False, False)
    assert torch.equal(dx, x)  # the transposed is the inverse


@pytest.mark.parametrize("minus_eye", [True, False])
def test_the_transposed_chain_is_the_adjoint(minus_eye):
    x, dy = inputs_of((3, 2, 4, 3), (2, 3, 5, 4), 7, FP32, cropped=1)
    gates = gates_of((3, 2, 4, 3), (2, 3, 5, 4))
    y = quanta.quanta_forward(x, gates, [], dy.shape[1], minus_eye)
    dx, _ = quanta.quanta_backward(dy, x, gates, [], minus_eye, False)
    forth, back = (y.double() * dy).sum(), (x.double() * dx).sum()
    torch.testing.assert_close(forth, back, rtol=0, atol=1e-5 * float(y.norm() * dy.norm()))


@pytest.mark.parametrize("sizes", [(4, 6, 5), (8, 8, 8, 8)], ids=str)
def test_tiny_updates_keep_their_digits(sizes):
    """A bf16 gate 1 + 1e-4 would be 1."""
    noise = [1e-4 * normal(*g.shape, seed=k) for k, g in enumerate(gates_of(sizes))]
    gates = [reference.eye_gate(n) + n for n in noise]
    x, dy = inputs_of(sizes, sizes, 4, BF16)
    y = quanta.quanta_forward(x, gates, [], x.shape[1], True)
    ref_y, ref_dx, *_ = exact(x, dy, gates, [], True)
    assert relative(y, ref_y) < 2 * BOUNDS[BF16]
    dx, _ = quanta.quanta_backward(dy, x, gates, [], True, False)
    assert relative(dx, ref_dx) < 2 * BOUNDS[BF16]


# -- what memory looks like ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [(4, 6, 5), (8, 8, 8, 8)], ids=str)
def test_one_bad_row_stays_one_row(sizes, bad):
    x, dy = inputs_of(sizes, sizes, 9, BF16, cropped=0 if sizes[0] == 8 else 2)
    gates = gates_of(sizes, None, BF16)
    clean = quanta.quanta_forward(x, gates, [], dy.shape[1], True)
    clean_dx = quanta.quanta_backward(dy, x, gates, [], True, False)[0]
    x[4, 3] = dy[4, 3] = bad
    with np.errstate(invalid="ignore"):  # inf - inf, in the interpreter's numpy
        y = quanta.quanta_forward(x, gates, [], dy.shape[1], True)
        dx = quanta.quanta_backward(dy, x, gates, [], True, False)[0]
    others = torch.arange(9) != 4
    for found, before in ((y, clean), (dx, clean_dx)):
        assert torch.equal(found[others], before[others])
        assert not torch.isfinite(found[4]).all()


def test_memory_around_x_is_never_read_into_the_result():
    wide = torch.full((9, 200), math.nan, dtype=BF16)
    x, dy = inputs_of((4, 6, 5), (7, 2, 9), 7, BF16, cropped=3)
    gates = gates_of((4, 6, 5), (7, 2, 9))
    wide[1:8, 11:128] = x  # a column slice that starts at no multiple of 16 bytes
    view = wide[1:8, 11:128]
    assert view.stride(0) == 200
    for minus_eye in (True, False):
        y = quanta.quanta_forward(x, gates, [], 123, minus_eye)
        assert torch.equal(quanta.quanta_forward(view, gates, [], 123, minus_eye), y)
        dx, dG = quanta.quanta_backward(dy, x, gates, [], minus_eye, True)
        other_dx, other_dG = quanta.quanta_backward(dy, view, gates, [], minus_eye, True)
        assert torch.equal(dx, other_dx) and all(map(torch.equal, dG, other_dG))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (8, 8, 8, 8)], ids=str)
def test_any_strides(sizes):
    x, dy = inputs_of(sizes, sizes, 4, FP32)
    gates = gates_of(sizes)
    dx, dG = quanta.quanta_backward(dy, x, gates, [], True, True)
    turned = [t.T.contiguous().T for t in (dy, x)]
    mixed = [g.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for g in gates]
    other_dx, other_dG = quanta.quanta_backward(*turned, mixed, [], True, True)
    assert torch.equal(dx, other_dx) and all(map(torch.equal, dG, other_dG))
    one = dy[:1].expand(4, -1)  # a sum's gradient has the stride 0
    dx, _ = quanta.quanta_backward(one, x, gates, [], True, False)
    assert torch.equal(dx, quanta.quanta_backward(one.clone(), x, gates, [], True, False)[0])


def test_offsets_beyond_int32():
    """Every row lies 2^30 numbers further: the last ones are beyond 2^31, in a tiny buffer."""
    for sizes in ((4, 6, 5), (8, 8, 8, 8)):
        n = math.prod(sizes)
        x, _ = inputs_of(sizes, sizes, 1, BF16)
        rows = sparse(3 * 2**30 + n).as_strided((4, n), (2**30, 1))
        rows[:] = x
        gates = gates_of(sizes, None, BF16)
        y = quanta.quanta_forward(rows, gates, [], n, True)
        assert torch.equal(y, quanta.quanta_forward(x.expand(4, -1), gates, [], n, True))
        dx, dG = quanta.quanta_backward(rows, rows, gates, [], True, True)
        near = x.repeat(4, 1)
        other_dx, other_dG = quanta.quanta_backward(near, near, gates, [], True, True)
        assert torch.equal(dx, other_dx) and all(map(torch.equal, dG, other_dG))


def sparse(numbers):
    """bf16 numbers in a mapped file with holes: only the pages that are written take memory."""
    import tempfile

    with tempfile.NamedTemporaryFile(prefix="structadapt") as file:
        file.truncate(2 * numbers)
        return torch.from_file(file.name, shared=True, size=numbers, dtype=BF16)


def test_inputs_are_left_alone_and_runs_repeat():
    sizes = (4, 6, 5)
    x, dy = inputs_of(sizes, sizes, 65, BF16)
    gates, twin = gates_of(sizes), gates_of(sizes, seed=50)
    held = [t.clone() for t in (x, dy, *gates, *twin)]

    def everything():
        y = quanta.quanta_forward(x, gates, twin, 120, False)
        dx, dG = quanta.quanta_backward(dy, x, gates, twin, False, True)
        return [y, dx, *dG]

    first, second = everything(), everything()
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, held, (x, dy, *gates, *twin)))
    taken = {t.untyped_storage().data_ptr() for t in (x, dy, *gates, *twin)}
    assert not taken & {t.untyped_storage().data_ptr() for t in first}


# -- the kernels against each other ----------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_gate_with_descriptors_is_the_one_with_pointers(k, back):
    forth = quanta.chain_of(gates_of((4, 6, 8), (8, 6, 4)), BF16, True)
    step = (quanta.transposed(forth) if back else forth)[k]
    K, M = step.matrix.shape[1], 5
    assert _launch.misfit(step.matrix.T if back else step.matrix) is None  # or there is no TMA
    t = normal(M * math.prod(step.before) // K, K, dtype=BF16)
    d, width = normal(*t.shape, seed=1, dtype=BF16), math.prod(step.after)
    found = []
    for tma in (0, 1):
        out = [torch.empty(M, width, dtype=BF16) for _ in range(2)]
        tile = {"BM": 32, "BN": 32, "BK": 16, "TMA": tma}
        quanta.gate(t, step, d, *out, plus=True, then=(0, 2), tile=tile)
        found.append(out)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 2, 2, 2), (8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("minus_eye", [True, False])
@pytest.mark.parametrize("tma", [0, 1])
def test_the_chain_on_chip_is_gate_by_gate(sizes, dtype, minus_eye, tma, monkeypatch):
    if (tma, sizes[0]) in ((1, 2), (0, 8)):
        pytest.skip("a descriptor's rows are 16 bytes at least; and large sizes once")
    x, _ = inputs_of(sizes, sizes, 3, dtype)
    gates = gates_of(sizes, None, dtype)
    monkeypatch.setattr(quanta, "ON_CHIP", {})
    forth = quanta.chain_of(gates, dtype, minus_eye)
    for steps in (forth, quanta.transposed(forth)) if sizes[0] < 8 else (forth,):
        tile = {"BT": 2, "TMA": tma}
        y, y2, apart = (torch.empty_like(x) for _ in range(3))
        kept = quanta.chain(x, steps, y, minus_eye, keep=True, tile=tile)
        inputs = quanta._run(steps, x, apart, minus_eye, keep=True)
        bound = BOUNDS[dtype] * len(steps)
        assert relative(y, apart) < bound
        assert quanta.chain(x, steps, y2, minus_eye, tile=tile) == []
        assert torch.equal(y, y2)
        for t, other in zip(kept, inputs, strict=True):
            assert relative(t, other) < bound
        kept_alone = quanta.chain(x, steps, None, minus_eye, keep=True, tile=tile)
        assert all(map(torch.equal, kept, kept_alone))


@pytest.mark.parametrize("minus_eye", [True, False])
def test_both_ways_through_the_backward(minus_eye, monkeypatch):
    sizes = (8, 8, 8, 8)
    x, dy = inputs_of(sizes, sizes, 3, FP32)
    gates, twin = gates_of(sizes), [] if minus_eye else gates_of(sizes, seed=50)
    dx, dG = quanta.quanta_backward(dy, x, gates, twin, minus_eye, True)
    monkeypatch.setattr(quanta, "ON_CHIP", {})
    other_dx, other_dG = quanta.quanta_backward(dy, x, gates, twin, minus_eye, True)
    assert relative(dx, other_dx) < 3e-6
    for one, two in zip(dG, other_dG, strict=True):
        assert relative(one, two) < 3e-6


def test_chunks_of_tokens_are_the_whole(monkeypatch):
    before, after = (4, 6, 5), (4, 7, 5)
    x, dy = inputs_of(before, after, 50, BF16, cropped=1)
    gates, twin = gates_of(before, after), gates_of(before, after, seed=50)
    y = quanta.quanta_forward(x, gates, twin, dy.shape[1], False)
    dx, dG = quanta.quanta_backward(dy, x, gates, twin, False, True)
    monkeypatch.setattr(quanta, "CHUNK_ELEMENTS", 140 * 20)
    assert torch.equal(quanta.quanta_forward(x, gates, twin, dy.shape[1], False), y)
    other_dx, other_dG = quanta.quanta_backward(dy, x, gates, twin, False, True)
    assert torch.equal(dx, other_dx)
    for one, two in zip(dG, other_dG, strict=True):
        assert relative(one, two) < 1e-6  # the same products, added in another order


def test_sums_over_many_rows_are_split_the_same_way_every_time():
    x, dy = inputs_of((3, 4), (3, 4), 700, FP32)
    (gate,) = gates_of((3, 4))
    _, (dG,) = quanta.quanta_backward(dy, x, [gate], [], True, True)
    _, (again,) = quanta.quanta_backward(dy, x, [gate], [], True, True)
    assert torch.equal(dG, again)
    dG = dG.view(12, 12)
    check(dG, dy.double().T @ x.double())


ALWAYS = {"narrow", "gemm", "dy_pass", "over_rows", "dora_norm", "dora_epilogue", "gate", "logprob",
          "lora_forward", "lora_backward", "dora_forward"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(p.stem for p in _launch.CONFIGS.glob("*.json")))
def test_every_table_has_what_is_launched(name):
    table = set(_launch.read_table(name))
    assert table >= ALWAYS
    assert {k.replace("chain", "inputs") for k in table if k.startswith("chain")} <= table
