"""Singular values from slices, SVD and factors against torch's in float64."""

import math

import numpy as np
import pytest
import torch

from structadapt.spectra import engine

SHAPES = [(30, 30), (12, 50), (50, 12), (1, 9), (3, 1), (1, 1), (0, 3), (3, 0), (0, 0)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(W):
    return torch.linalg.svdvals(W.double()) if W.numel() else torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_slices_give_the_singular_values_of_the_whole(shape, dtype, method):
    W = random(*shape).to(dtype)
    for size in (1, 7, 100):
        found = engine.spectrum(iter(W.split(size)), shape, method)
        torch.testing.assert_close(found.s, exact(W), rtol=1e-9, atol=1e-12)
        assert found.method == method and found.s.dtype == torch.float64 and not found.below_floor
    assert torch.equal(engine.spectrum(W, method=method).s, found.s)


def test_matrices_of_many_pieces_and_blocks(monkeypatch):
    monkeypatch.setattr(engine, "GRAM_CHUNK", (20_000, 1))
    monkeypatch.setattr(engine, "QR_CHUNK", (20_000, 1))
    for shape in ((700, 600), (600, 700)):  # more than a leaf of the Gram matrix
        W = random(*shape, dtype=torch.float32)
        for method in ("auto", "svd"):
            s = engine.spectrum(W.split(90), shape, method).s
            torch.testing.assert_close(s, exact(W), rtol=1e-9, atol=1e-10)


def with_values(s, m, k):
    U, V = (torch.linalg.qr(random(n, len(s), seed=n)).Q for n in (m, k))
    return (U * torch.as_tensor(s, dtype=torch.float64)) @ V.T


def test_the_floor_says_what_is_lost():
    s = [10.0**-i for i in range(13)]
    W = with_values(s, 20, 30)
    gram, svd = engine.spectrum(W), engine.spectrum(W, method="svd")
    assert gram.floor == pytest.approx(math.sqrt(20 * np.finfo(float).eps))
    assert svd.floor == pytest.approx(30 * np.finfo(float).eps)
    assert (gram.below_floor, svd.below_floor) == (20 - 8, 20 - 13)
    for found, rtol in ((gram, 0.02), (svd, 1e-3)):
        there = 20 - found.below_floor
        assert found.s[:there].numpy() == pytest.approx(s[:there], rel=rtol)
        assert (found.s[:there] > found.floor).all() and not found.s[there:].any()
    for W in (torch.zeros(4, 3), torch.zeros(3, 4)):
        for method in ("gram", "svd"):
            found = engine.spectrum(W, method=method)
            assert not found.s.any() and found.floor == 0 and found.below_floor == 3


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_nothing_over_or_underflows(method):
    W = random(12, 5)
    for scale in (1e-300, 1e-170, 1e160, 1e300):
        for X in (W * scale, (W * scale).T):
            found = engine.spectrum(X, method=method)
            assert found.s.numpy() == pytest.approx(exact(W).numpy() * scale, rel=1e-9)
            assert 0 < found.floor < found.s[-1]
    parts = torch.cat([torch.zeros(2, 5), 1e-250 * W[:4], 1e200 * W[4:]])
    expected = exact(W[4:]).numpy() * 1e200
    for X in (parts, parts.flip(0)):  # a later slice is larger, or smaller
        assert engine.spectrum(X.split(2), (14, 5), method).s.numpy() == pytest.approx(expected)
    largest = torch.full((2, 2), torch.finfo(torch.float32).max)
    assert engine.spectrum(largest).s[0].item() == pytest.approx(2 * largest[0, 0].item())


def test_what_is_not_finite_is_counted_over_all_slices():
    for shape in ((9, 4), (4, 9)):
        W = random(*shape, dtype=torch.bfloat16)
        W[2, 3], W[3, 0], W[3, 1] = torch.nan, -torch.inf, torch.inf
        for rows in (W, W.split(1), W.split(3)):
            with pytest.raises(engine.NonFiniteError, match="the matrix is not finite: 1 NaN, 2 Inf"
                               ", first at row 2, column 3") as raised:  # fmt: skip
                engine.spectrum(rows, shape)
            assert (raised.value.nans, raised.value.infs) == (1, 2) and raised.value.first == (2, 3)
    B, A = random(5, 2), random(2, 6)
    A[1, 4] = torch.inf
    with pytest.raises(ValueError, match="factor A, transposed, is not finite.*row 4, column 1"):
        engine.factor_spectrum(B, A)


def test_errors_say_what_does_not_fit():
    W = random(4, 3)
    for rows, shape, message in (
        (W.split(2), None, r"slices of rows need shape=\(m, k\)"),
        (W.split(2), (5, 3), "the slices have 4 rows, the matrix 5"),
        (W.split(2), (3, 3), r"rows 2 on are \(2, 3\), of a matrix \(3, 3\)"),
        (W.split(2), (4, 2), r"rows 0 on are \(2, 3\)"),
        (W, (3, 4), r"the matrix is \(4, 3\), not \(3, 4\)"),
        (W[0], None, r"expected a matrix, got shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.spectrum(rows, shape)
    with pytest.raises(ValueError, match="method must be one of auto, gram, svd, got 'eig'"):
        engine.spectrum(W, method="eig")
    with pytest.raises(ValueError, match="an mps device has no float64"):
        engine.spectrum(W, device="mps")
    for B, A in ((random(4, 2), random(3, 4)), (random(4), random(4, 1))):
        with pytest.raises(ValueError, match=r"expected \(m, r\) and \(r, k\)"):
            engine.factor_spectrum(B, A)


@pytest.mark.parametrize("sizes", [(40, 3, 60), (7, 9, 20), (20, 9, 7), (5, 1, 5), (1, 1, 1)])
def test_factors_give_the_singular_values_of_their_product(sizes):
    m, r, k = sizes
    B, A = random(m, r), random(r, k, seed=1)
    expected = exact(B @ A)
    for scale in (1.0, 1e-200, 1e250):
        found = engine.factor_spectrum(B * scale, A / scale)
        torch.testing.assert_close(found.s, expected, rtol=1e-10, atol=1e-12)
        assert found.method == "factors" and int((found.s > 0).sum()) == min(sizes)
    for zero in (engine.factor_spectrum(0 * B, A), engine.factor_spectrum(B, 0 * A)):
        assert zero.s.shape == (min(m, k),) and not zero.s.any() and zero.floor == 0
    assert not engine.factor_spectrum(random(4, 0), random(0, 3)).s.any()


def test_factors_keep_small_values_and_drop_what_is_rounding():
    B = torch.linalg.qr(random(50, 6)).Q * torch.tensor([1, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
    A = torch.linalg.qr(random(70, 6, seed=1)).Q.T
    found = engine.factor_spectrum(B, A)
    assert found.s[:5].numpy() == pytest.approx([1, 1e-3, 1e-6, 1e-9, 1e-12], rel=2e-3)
    assert not found.s[5:].any() and 1e-15 < found.floor < 1e-12
    twice = engine.factor_spectrum(torch.cat([B, B], 1), torch.cat([A, A]))
    assert int((twice.s > 0).sum()) == 5 and twice.s[0].item() == pytest.approx(2)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (9, 9)], ids=str)
def test_vectors_of_the_smaller_side(shape):
    W = random(*shape)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    values, vectors = engine.eigenvectors(W.split(7), shape)
    torch.testing.assert_close(values, s, rtol=1e-9, atol=1e-12)
    right = U if shape[0] < shape[1] else Vh.T
    identity = torch.eye(len(s), dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close((vectors.T @ right).abs(), identity, rtol=0, atol=1e-9)
    values, vectors = engine.eigenvectors(with_values([3.0, 1.0], *shape))
    assert vectors.shape == (min(shape), 2) and values.numpy() == pytest.approx([3, 1])
    for W in (torch.zeros(shape), torch.zeros(0, 3), torch.zeros(3, 0)):
        values, vectors = engine.eigenvectors(W)
        assert values.shape == (0,) and vectors.shape == (min(W.shape), 0)
