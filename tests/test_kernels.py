"""LoRA's and DoRA's Triton kernels against float64, in Triton's interpreter.

What a kernel gets is rounded first, and the reference computes with the same numbers: an error is
the kernel's own. Uninitialised memory is NaN.
"""

import itertools

import numpy as np
import pytest
import torch
from kernel_checks import DTYPES, check, normal, relative

from structadapt.kernels import _launch, dora, lean, lora

pytestmark = pytest.mark.usefixtures("nan_filled")

BF16 = torch.bfloat16
SIDES = [  # M, N, K, rank: ones, tails of every tile, ranks beyond one block
    (1, 8, 16, 1),
    (2, 24, 8, 3),
    (15, 72, 100, 4),
    (17, 136, 72, 8),
    (33, 40, 136, 16),
    (63, 16, 24, 17),
    (65, 72, 104, 24),
    (127, 33, 31, 64),
    (129, 100, 72, 96),
    (34, 66, 98, 256),
]


def case(M, N, K, rank, dtype, bias=True, seed=0):
    """Inputs, rounded to `dtype`; A, B and g stay fp32, as adapters are kept."""
    x, dy = normal(M, K, seed=seed, dtype=dtype), normal(M, N, seed=seed + 1, dtype=dtype)
    W = normal(N, K, seed=seed + 2, scale=K**-0.5, dtype=dtype)
    b = normal(N, seed=seed + 3, dtype=dtype) if bias else None
    A = normal(rank, K, seed=seed + 4, scale=K**-0.5)
    B = normal(N, rank, seed=seed + 5, scale=rank**-0.5)
    g = 0.5 + normal(N, seed=seed + 6).abs()
    return x, dy, W, b, A, B, g


def lora_in_float64(x, dy, W, b, A, B, scale, h=None, g=None):
    """{name: value or gradient} with A and scale B rounded as the kernels multiply them, and from
    the rounded h that they hold."""
    dtype = x.dtype
    x64, dy64, W64, A64 = x.double(), dy.double(), W.double(), A.to(dtype).double()
    B64 = (B * scale).to(dtype).double()
    exact = x64 @ A64.T
    h64 = exact if h is None else h.double()
    g64 = torch.ones(len(W), dtype=torch.float64) if g is None else g.double()
    z = x64 @ W64.T + h64 @ B64.T
    y = g64 * z + (0 if b is None else b.double())
    gB = B64 if g is None else (g[:, None] * scale * B.float()).to(dtype).double()
    gdy = g64 * dy64
    dS = dy64 @ gB
    return {
        "y": y,
        "h": exact,
        "dS": dS,
        "dx": gdy @ W64 + dS @ A64,
        "db": dy64.sum(0),
        "dA": dS.T @ x64,
        "dB": scale * g64[:, None] * (dy64.T @ h64),
        "dg": (dy64 * z).sum(0),
    }


# -- every kernel by itself ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "rank"), SIDES)
def test_lora_forward_and_every_gradient(M, N, K, rank, dtype):
    x, dy, W, b, A, B, _ = case(M, N, K, rank, dtype)
    y, h = lora.lora_forward(x, W, b, A, B, 0.7)
    dx, dW, db, dA, dB = lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5)
    ref = lora_in_float64(x, dy, W, b, A, B, 0.7, h)
    check(h, ref["h"], what="h")
    check(y, ref["y"], what="y")
    # dS is rounded on the way to dx and dA
    rounding = {BF16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]
    check(dx, ref["dx"], rounding, "dx")
    check(dA, ref["dA"], rounding, "dA")
    check(dB, ref["dB"], 2e-6, "dB")
    check(dW, dy.double().T @ x.double(), what="dW")
    check(db, ref["db"], 5 * rounding, "db")
    assert dA.dtype == dB.dtype == torch.float32 and dx.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["cublas", "triton"])
def test_both_plans(monkeypatch, plan, dtype):
    monkeypatch.setattr(lora, "plan", lambda *_: plan)
    monkeypatch.setattr(dora, "plan", lambda *_: plan)
    x, dy, W, b, A, B, g = case(33, 40, 72, 12, dtype)
    for bias in (b, None):
        ref = lora_in_float64(x, dy, W, bias, A, B, 0.7)
        rounding = {BF16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]
        y, h = lora.lora_forward(x, W, bias, A, B, 0.7)
        check(y, ref["y"], rounding, "y")
        dx = lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5)[0]
        check(dx, ref["dx"], rounding, "dx")
        y, h, _ = dora.dora_forward(x, W, bias, A, B, g, 0.7)
        check(y, lora_in_float64(x, dy, W, bias, A, B, 0.7, g=g)["y"], rounding, "DoRA's y")


def test_products_that_a_table_gives_to_cublas(monkeypatch):
    """torch.mm with an fp32 output is CUDA's alone: here it is another function."""
    called = []

    def wide_mm(a, b):
        called.append((a.shape, b.shape))
        return a.float() @ b.float()

    monkeypatch.setattr(lora, "by_cublas", lambda *_: True)
    monkeypatch.setattr(lora, "wide_mm", wide_mm)
    x, dy, W, b, A, B, g = case(70, 104, 72, 96, BF16)
    for gain in (None, g):
        ref = lora_in_float64(x, dy, W, b, A, B, 0.7, g=gain)
        if gain is None:
            _, h = lora.lora_forward(x, W, b, A, B, 0.7)
            _, _, _, dA, dB = lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5)
        else:
            _, h, held = dora.dora_forward(x, W, b, A, B, g, 0.7)
            found = dora.dora_backward(dy, x, h, held, W, b, A, B, g, 0.7, (True,) * 6)
            dA, dB = found[3:5]
        check(h, ref["h"], what="h")
        check(dA, ref["dA"], 4e-3, "dA")
        check(dB, ref["dB"], 4e-3, "dB")
    assert len(called) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "rank"), SIDES)
def test_dora_forward_and_every_gradient(M, N, K, rank, dtype):
    x, dy, W, b, A, B, g = case(M, N, K, rank, dtype, bias=M % 2 == 1)
    g[::5] *= -1
    g[1::7] = 0
    g[2::7] = 1e-3
    y, h, held = dora.dora_forward(x, W, b, A, B, g, 0.7)
    found = dora.dora_backward(dy, x, h, held, W, b, A, B, g, 0.7, (True,) * 6)
    ref = lora_in_float64(x, dy, W, b, A, B, 0.7, h, g)
    check(y, ref["y"], what="y")
    rounding = {BF16: 4e-3, torch.float16: 6e-4, torch.float32: 3e-6}[dtype]
    for name, value in zip(("dx", "dW", "db", "dA", "dB", "dg"), found, strict=True):
        if name == "dW":
            check(value, (g.double() * dy.double()).T @ x.double(), rounding, name)
        else:
            bound = {"dB": 2e-6, "db": 5 * rounding, "dg": 10 * rounding}.get(name, rounding)
            check(value, ref[name], bound, name, lines=20 if name == "dg" else 4)


@pytest.mark.parametrize("kernels", [dora, lean], ids=["triton", "torch"])
@pytest.mark.parametrize("M", [5, 130])
def test_the_gradient_of_the_gain_beside_a_large_bias(kernels, M):
    """The output holds little of g u, or nothing; a bias as large as the output stays cheap."""
    x, dy, W, b, A, B, g = case(M, 48, 64, 4, BF16)
    b[::5], b[3::10], b[40] = 100, -300, 1e4
    _, h, held = kernels.dora_forward(x, W, b, A, B, g, 0.7)
    dg = kernels.dora_backward(dy, x, h, held, W, b, A, B, g, 0.7, (False,) * 5 + (True,))[5]
    ref = lora_in_float64(x, dy, W, b, A, B, 0.7, h, g)["dg"]
    u = lora_in_float64(x, dy, W, None, A, B, 0.7, h)["y"]
    error = (dg.double() - ref).abs() / (dy.double().norm(dim=0) * u.norm(dim=0))
    assert float(error.max()) < (2e-2 if M < 130 else 5e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "rank"), [(50, 70, 12), (16, 33, 1), (7, 128, 96)])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e3])
def test_the_norm(N, K, rank, dtype, size):
    W, A, B = normal(N, K, scale=0.02, dtype=dtype), normal(rank, K, seed=1), normal(N, rank)
    B *= size * 0.02
    norm = dora.dora_norm(W, A, B, 2.0)
    low = 2 * B.double() @ A.double()
    ref = (W.double() + low).norm(dim=1)
    digits = 2**-15 if dtype == BF16 else 2**-22  # of A and B, in the low-rank term alone
    terms = 2 * B.abs().double() @ A.abs().double()
    bound = 5e-7 * K**0.5 + digits * terms.norm(dim=1) / ref
    assert ((norm.double() - ref).abs() / ref <= bound).all()
    lean_norm = lean.dora_norm(W, A, B, 2.0)
    assert ((norm - lean_norm).abs() / lean_norm <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_where_the_terms_cancel_and_of_a_zero_row(dtype):
    A, B = normal(2, 64, seed=1), normal(24, 2, seed=2)
    noise = 1e-4 * normal(24, 64, seed=3) if dtype == torch.float32 else 0  # else of its rounding
    W = (noise - 2 * B @ A).to(dtype)
    W[5], B[5] = 0, 0
    norm = dora.dora_norm(W, A, B, 2.0)
    ref = (W.double() + 2 * B.double() @ A.double()).norm(dim=1)
    assert norm[5] == 0
    ref[5] = 1
    bound = 1e-3 if dtype == torch.float32 else 2**-9  # what is left is what W was rounded by
    assert ((norm.double() - ref) / ref).abs()[torch.arange(24) != 5].max() <= bound


@pytest.mark.parametrize("orientation", ["y", "dx"])
@pytest.mark.parametrize("epilogue", [1, 2])
def test_the_gemm_with_descriptors(orientation, epilogue):
    """The same kernel that sm_90 and sm_100 run, over several tiles for each program."""
    M, N, K, R = 72, 80, 96, 24
    tile = {"BM": 32, "BN": 32, "BK": 32, "BR": 16, "GROUP_M": 2, "EPILOGUE": epilogue}
    x, _, W, b, _A, B, g = case(M, N, K, R, BF16)
    s = normal(M, R, dtype=BF16)
    if orientation == "y":
        w, low = W.T, B.to(BF16).T
    else:
        w, low = normal(K, N, dtype=BF16), normal(R, N, dtype=BF16)
    exact = x.double() @ w.double() + s.double() @ low.double()
    check(lora.gemm(x, w, s, low, tile=tile), exact)
    check(lora.gemm(x, w, s, low, b, g, tile=tile), g.double() * exact + b.double())


@pytest.mark.parametrize("parts", [1, 3])
def test_split_sums(monkeypatch, parts):
    monkeypatch.setattr(_launch, "splits", lambda *args, **kwargs: parts)
    x, dy, _W, _b, A, B, g = case(150, 72, 104, 12, BF16)
    check(lora.narrow(x, A.to(BF16).T), x.double() @ A.to(BF16).double().T)
    h = normal(150, 12, dtype=BF16)
    out = lora.over_rows(x, h, torch.empty(12, 104), transposed=True, factor=3.0)
    check(out, 3 * h.double().T @ x.double(), 2e-6)
    found = lora.dy_pass(dy, B.to(BF16), h, 2.0, g)
    check(found.dS, dy.double() @ B.to(BF16).double())
    check(found.dB, 2 * g.double()[:, None] * (dy.double().T @ h.double()), 2e-6)
    check(found.gdY, g.double() * dy.double())


def test_square_sides_are_not_confused():
    """C == R: whether a result is transposed cannot be told from its shape."""
    z, h = normal(20, 16, dtype=BF16), normal(20, 16, seed=9, dtype=BF16)
    exact = z.double().T @ h.double()
    check(lora.over_rows(z, h, torch.empty(16, 16), transposed=False), exact, 2e-6)
    check(lora.over_rows(z, h, torch.empty(16, 16), transposed=True), exact.T, 2e-6)


# -- what they are given ---------------------------------------------------------------------------


def test_no_tokens():
    x, dy, W, b, A, B, g = case(0, 24, 16, 4, BF16)
    y, h = lora.lora_forward(x, W, b, A, B, 0.7)
    assert y.shape == (0, 24) and h.shape == (0, 4)
    found = lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5)
    assert found[0].shape == (0, 16) and not any(t.any() for t in found[1:])
    y, h, held = dora.dora_forward(x, W, b, A, B, g, 0.7)
    found = dora.dora_backward(dy, x, h, held, W, b, A, B, g, 0.7, (True,) * 6)
    assert y.shape == (0, 24) and not any(t.any() for t in found[1:])


def test_any_leading_dimensions_and_strides_of_rows():
    wide = normal(3, 2, 7, 48, dtype=BF16)
    x, (_, _, W, b, A, B, _) = wide[..., 8:32], case(42, 40, 24, 4, BF16)
    y, _h = lora.lora_forward(x, W, b, A, B, 0.7)
    check(y.view(42, 40), lora_in_float64(x.reshape(42, 24), y.view(42, 40), W, b, A, B, 0.7)["y"])
    assert y.shape == (3, 2, 7, 40)
    strided = wide.view(42, 48)[:, 8:32]
    assert torch.equal(lora.lora_forward(strided, W, b, A, B, 0.7)[0], y.view(42, 40))
    offset = torch.cat([torch.zeros(1, dtype=BF16), strided.reshape(-1)])[1:].view(42, 24)
    assert torch.equal(lora.lora_forward(offset, W, b, A, B, 0.7)[0], y.view(42, 40))
    assert lora.readable(strided.T.contiguous().T).stride() == (24, 1)


def test_a_gradient_that_is_expanded():
    x, _, W, b, A, B, _ = case(20, 40, 24, 4, BF16)
    _, h = lora.lora_forward(x, W, b, A, B, 0.7)
    one = torch.ones((), dtype=BF16).expand(20, 40)
    found = lora.lora_backward(one, x, h, W, A, B, 0.7, (True,) * 5)
    plain = lora.lora_backward(one.contiguous(), x, h, W, A, B, 0.7, (True,) * 5)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_only_what_is_needed(needs):
    x, dy, W, b, A, B, g = case(9, 16, 24, 3, torch.float32)
    _, h = lora.lora_forward(x, W, b, A, B, 0.7)
    whole = lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5)
    for found, all_of_them, need in zip(
        lora.lora_backward(dy, x, h, W, A, B, 0.7, needs), whole, needs, strict=True
    ):
        assert torch.allclose(found, all_of_them, rtol=1e-5, atol=1e-6) if need else found is None
    _, h, y = dora.dora_forward(x, W, b, A, B, g, 0.7)
    for found, need in zip(
        dora.dora_backward(dy, x, h, y, W, b, A, B, g, 0.7, (*needs, needs[0])),
        (*needs, needs[0]),
        strict=True,
    ):
        assert (found is not None) == need


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.0, -1.5, 64.0])
def test_magnitudes(dtype, scale):
    x, dy, W, b, A, B, _ = case(33, 40, 72, 8, dtype)
    x, W, A = x * 1e3, W * 1e-3, A * 1e-3
    x[4] *= 10
    y, h = lora.lora_forward(x, W, b, A, B, scale)
    ref = lora_in_float64(x, dy, W, b, A, B, scale, h)
    check(y, ref["y"], lines=30)
    dx, *_, dA, dB = lora.lora_backward(dy, x, h, W, A, B, scale, (True,) * 5)
    check(dx, ref["dx"], 3 * (2.2e-3 if dtype == BF16 else 3e-4))
    check(dA, ref["dA"], 3 * (2.2e-3 if dtype == BF16 else 3e-4), lines=30)
    check(dB, ref["dB"], 3e-6)


def test_a_scale_that_would_overflow_h_in_fp16_meets_b():
    x, _, W, b, A, B, _ = case(8, 16, 24, 4, torch.float16)
    x, B = x * 100, B * 0
    A *= 400  # h is near 1e5 / 2: scaled by 2 it would be infinite
    y, h = lora.lora_forward(x.clamp(-100, 100), W, b, A.clamp(-20, 20), B, 2.0)
    assert torch.isfinite(h).all() and torch.isfinite(y).all()


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")  # numpy's, in the interpreter
def test_near_the_largest_bf16():
    x, _, W, _, A, B, _ = case(8, 16, 24, 4, BF16)
    x = torch.full_like(x, 1e38)
    W = torch.full_like(W, 0.1)
    y, _ = lora.lora_forward(x, W, None, A * 0, B, 1.0)
    check(y, x.double() @ W.double().T)
    y, _ = lora.lora_forward(x, W * 100, None, A * 0, B, 1.0)
    assert torch.isinf(y).all()


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_its_own_row_and_no_other(bad):
    x, dy, W, b, A, B, g = case(37, 40, 72, 8, BF16)
    clean, _ = lora.lora_forward(x, W, b, A, B, 0.7)
    x[11, 70] = bad
    y, h = lora.lora_forward(x, W, b, A, B, 0.7)
    others = torch.arange(37) != 11
    assert not torch.isfinite(y[11]).any() and torch.equal(y[others], clean[others])
    _, _, _, dA, _ = lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5)
    assert not torch.isfinite(dA[:, 70]).any() and torch.isfinite(dA[:, :70]).all()
    y, *_ = dora.dora_forward(x, W, b, A, B, g, 0.7)
    assert not torch.isfinite(y[11]).any() and torch.isfinite(y[others]).all()
    x[11, 70] = 1
    W[3, 71] = bad
    y, h = lora.lora_forward(x, W, b, A, B, 0.7)
    columns = torch.arange(40) != 3
    assert not torch.isfinite(y[:, 3]).any() and torch.isfinite(y[:, columns]).all()
    dy[6, 39] = bad
    dx, *_, dB = lora.lora_backward(dy, x, h, W.nan_to_num(0, 0), A, B, 0.7, (True,) * 5)
    rows = torch.arange(37) != 6
    assert not torch.isfinite(dx[6]).any() and torch.isfinite(dx[rows]).all()
    assert not torch.isfinite(dB[39]).any() and torch.isfinite(dB[:39]).all()


def far_apart(t):
    """The same rows 2^30 numbers apart, so that the third starts at 2^31; pages are not touched."""
    apart = torch.from_numpy(np.zeros(len(t) << 30, np.int16)).view(t.dtype)
    apart = apart.as_strided(t.shape, (1 << 30, 1))
    return apart.copy_(t)


def test_offsets_beyond_32_bits():
    x, dy, W, b, A, B, g = case(4, 4, 24, 3, BF16)
    far_x, far_dy, far_W = far_apart(x), far_apart(dy), far_apart(W)
    y, h = lora.lora_forward(x, W, b, A, B, 0.7)
    assert torch.equal(lora.lora_forward(far_x, far_W, b, A, B, 0.7)[0], y)
    z, _, held = dora.dora_forward(x, W, b, A, B, g, 0.7)
    assert torch.equal(dora.dora_forward(far_x, far_W, b, A, B, g, 0.7)[0], z)
    assert torch.equal(dora.dora_norm(far_W, A, B, 0.7), dora.dora_norm(W, A, B, 0.7))
    for backward, extra in (
        (lora.lora_backward, (h,)),
        (dora.dora_backward, (h, held)),
    ):
        last = (A, B, 0.7, (True,) * 5) if len(extra) == 1 else (b, A, B, g, 0.7, (True,) * 6)
        near = backward(dy, x, *extra, W, *last)
        far = backward(far_dy, far_x, *extra, far_W, *last)
        assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_runs_are_equal_to_the_bit_and_inputs_stay():
    tensors = case(70, 72, 104, 12, BF16)
    x, dy, W, b, A, B, g = tensors
    before = [t.clone() for t in tensors]

    def everything():
        y, h = lora.lora_forward(x, W, b, A, B, 0.7)
        z, k, held = dora.dora_forward(x, W, b, A, B, g, 0.7)
        return (
            y, h, z, *lora.lora_backward(dy, x, h, W, A, B, 0.7, (True,) * 5),
            *dora.dora_backward(dy, x, k, held, W, b, A, B, g, 0.7, (True,) * 6),
        )  # fmt: skip

    first = everything()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_a_row_does_not_depend_on_its_batch():
    x, _, W, b, A, B, g = case(97, 40, 72, 8, BF16)
    whole = lora.gemm(x, W.T, lora.narrow(x, A.to(BF16).T), B.to(BF16).T, b, g)
    for rows in (1, 31, 32, 33, 64):
        part = x[:rows]
        y = lora.gemm(part, W.T, lora.narrow(part, A.to(BF16).T), B.to(BF16).T, b, g)
        assert torch.equal(y, whole[:rows])


def test_the_twins_agree():
    x, dy, W, b, A, B, g = case(66, 72, 104, 12, BF16)
    y, h = lora.lora_forward(x, W, b, A, B, 0.5)
    y_lean, h_lean = lean.lora_forward(x, W, b, A, B, 0.5)
    assert relative(y, y_lean) < 6e-3 and relative(h, h_lean) < 4e-3
    ours = lora.lora_backward(dy, x, h, W, A, B, 0.5, (True,) * 5)
    twin = lean.lora_backward(dy, x, h_lean, W, A, B, 0.5, (True,) * 5)
    assert all(relative(a, b) < 8e-3 for a, b in zip(ours, twin, strict=True))
    y, h, held = dora.dora_forward(x, W, b, A, B, g, 0.5)
    y_lean, h_lean, u = lean.dora_forward(x, W, b, A, B, g, 0.5)
    assert relative(y, y_lean) < 6e-3
    ours = dora.dora_backward(dy, x, h, held, W, b, A, B, g, 0.5, (True,) * 6)
    twin = lean.dora_backward(dy, x, h_lean, u, W, b, A, B, g, 0.5, (True,) * 6)
    assert all(relative(a, b) < 8e-3 for a, b in zip(ours, twin, strict=True))


# -- layers that read the same x -------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [lean, lora], ids=["lean", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_share_their_input(kernels, dtype):
    ranks, sides = (3, 16, 5), (40, 24, 72)
    x = normal(33, 48, dtype=dtype)
    Ws = [normal(n, 48, scale=0.1, dtype=dtype) for n in sides]
    As = [normal(r, 48, scale=0.1) for r in ranks]
    Bs = [normal(n, r, seed=r) for n, r in zip(sides, ranks, strict=True)]
    biases, scales = [normal(40, dtype=dtype), None, None], [0.5, 1.0, 2.0]
    dys = [normal(33, n, seed=n, dtype=dtype) for n in sides]
    ys, h = kernels.lora_shared_forward(x, Ws, biases, As, Bs, scales)
    dx, dAs, dBs = kernels.lora_shared_backward(dys, x, h, Ws, As, Bs, scales, True)
    rounding = {BF16: 5e-3, torch.float16: 8e-4, torch.float32: 3e-6}[dtype]
    total = torch.zeros(33, 48, dtype=torch.float64)
    each = zip(dys, Ws, biases, As, Bs, scales, ys, dAs, dBs, strict=True)
    for dy, W, bias, A, B, scale, y, dA, dB in each:
        ref = lora_in_float64(x, dy, W, bias, A, B, scale)
        check(y, ref["y"], rounding, "y")
        check(dA, ref["dA"], rounding, "dA")
        check(dB, ref["dB"], rounding, "dB")
        total += ref["dx"]
    check(dx, total, rounding, "dx")
    assert kernels.lora_shared_backward(dys, x, h, Ws, As, Bs, scales, False)[0] is None
