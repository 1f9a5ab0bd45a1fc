"""The log-prob head, plain and on Triton, against the formula over the logits in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check, normal
from torch.autograd.graph import saved_tensors_hooks

from structadapt import head
from structadapt.kernels import lean_logprob, reference

logprob = pytest.importorskip("structadapt.kernels.logprob", reason="needs triton")

KERNELS = {"lean": lean_logprob, "triton": logprob}
# Of a gradient of hidden: rounded as u and again as g u. fp16's u is small, and g u smaller.
TWICE = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6, torch.float64: 1e-12}
ONCE = {torch.bfloat16: 2.2e-3, torch.float16: 3.5e-4, torch.float32: 2e-6, torch.float64: 1e-12}


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]


def case(M, H, V, dtype=torch.float32, bias=True, seed=0):
    """(hidden, W, bias, ids): logits of size 2 or so, targets in the first and last column."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (M,), generator=generator)
    ids[:2] = torch.tensor([0, V - 1])[:M]
    hidden, W = normal(M, H, seed=seed), normal(V, H, seed=seed + 1, scale=2 / H**0.5)
    b = normal(V, seed=seed + 2) if bias else None
    return *(None if t is None else t.to(dtype) for t in (hidden, W, b)), ids


def formula(hidden, W, bias, ids, temperature):
    """The same through logits in float64, of the same rounded inputs, with leaves to derive by."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_() for t in (hidden, W, bias)
    ]
    return *reference.token_logprobs(F.linear(*leaves), ids, temperature), leaves


def compare(kernels, hidden, W, bias, ids, temperature=1.0, g=None):
    """Values and all gradients against the formula."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, W, bias)]
    logp, entropy = head.head_logprobs(kernels, *given, ids, temperature)
    logp64, entropy64, leaves = formula(hidden, W, bias, ids, temperature)
    wide = reference.wide_dtype(hidden.dtype)
    assert logp.dtype == entropy.dtype == wide and logp.shape == entropy.shape == ids.shape
    assert not entropy.requires_grad
    eps = torch.finfo(wide).eps
    size = 1 + float(F.linear(*leaves).detach().abs().max()) if len(hidden) else 1
    for found, expected in ((logp, logp64), (entropy, entropy64)):
        torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps * size)
    g = normal(*ids.shape, seed=9).to(wide) if g is None else g
    wanted = [i for i, t in enumerate(given) if t is not None]
    grads = torch.autograd.grad(logp, [given[i] for i in wanted], g)
    expected = torch.autograd.grad(logp64, [leaves[i] for i in wanted], g.double())
    for i, found, ref in zip(wanted, grads, expected, strict=True):
        assert found.dtype == hidden.dtype
        bound = (TWICE if i == 0 else ONCE)[hidden.dtype]
        check(found, ref, bound, ("hidden", "W", "bias")[i], lines=8)


@pytest.mark.parametrize("V", [2, 31, 32, 33, 65, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_small_and_odd_vocabularies(kernels, V, temperature, nan_filled):
    rows = 17 if V < 100 else 3
    compare(kernels, *case(rows, 24, V), temperature)


def test_a_vocabulary_of_many_blocks(kernels, nan_filled):
    compare(kernels, *case(2, 8, 5003, bias=False), 1.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_dtypes(kernels, dtype, bias, nan_filled):
    """The twin takes float64 too; the kernel works in fp32."""
    if kernels is logprob and dtype == torch.float64:
        pytest.skip("fp32")
    compare(kernels, *case(9, 40, 100, dtype, bias), 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_writes_the_direction_in_half_precision(dtype, nan_filled):
    """As it does on a device, where the products take it so."""
    Z, bias, g = normal(5, 70, scale=3.0), normal(70).to(dtype), normal(5)
    ids = torch.tensor([0, 69, 3, 64, 63])
    Z64, D = Z.double() + bias.double(), torch.empty(5, 80, dtype=dtype)[:, :70]
    factor = 1024.0 if dtype == torch.float16 else 1.0
    logprob.rows(Z, bias, ids, 0.5, D, factor, g)
    expected = F.one_hot(ids, 70) - (Z64 / 0.5).softmax(1)
    check(D, factor * g.double()[:, None] * expected)


@pytest.mark.parametrize("M", [0, 1, 17, 70])
def test_any_number_of_tokens_in_chunks(kernels, M, monkeypatch, nan_filled):
    """Seventeen and seventy tokens need several chunks of at least sixteen."""
    monkeypatch.setattr(lean_logprob, "CHUNK_BYTES", 1)
    assert lean_logprob.row_count(M, 40, 1) == 16
    compare(kernels, *case(M, 24, 40))


def test_chunks_are_even_and_within_the_budget():
    counts = {1: 16, 96: 96, 97: 64, 192: 96, 193: 80, 10**6: 96}
    for tokens, count in counts.items():
        assert lean_logprob.row_count(tokens, 8000, 100 * 8000) == count
    assert lean_logprob.row_count(10**6, 10**9, 8) == 16, "fewer are not worth a reading of W"


def test_a_weight_is_cast_block_by_block(monkeypatch, nan_filled):
    monkeypatch.setattr(lean_logprob, "BLOCK_ELEMENTS", 24 * 32)
    compare(lean_logprob, *case(9, 24, 70, torch.bfloat16))


# -- values that a softmax can go wrong at ---------------------------------------------------------

# The interpreter is numpy, which warns of overflow and NaN.
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def from_logits(kernels, logits, ids, temperature=1.0, g=None):
    """(logp, entropy, gradient of the logits): the head is the identity."""
    Z = logits.clone().requires_grad_()
    logp, entropy = head.head_logprobs(
        kernels, Z, torch.eye(Z.shape[1]).to(Z), None, ids, temperature
    )
    logp.backward(torch.ones_like(logp) if g is None else g)
    return logp.detach(), entropy, Z.grad


def test_large_logits(kernels):
    """Beyond what exp can take, by differences that fp32 has and by those it rounds away."""
    logits = normal(6, 70) * 1e4
    logits[0], logits[1] = 1e4 + normal(70).round(decimals=1), -1e4 + normal(70).round(decimals=1)
    ids = torch.tensor([0, 69, 5, 64, 63, 6])
    logp, entropy, grad = from_logits(kernels, logits, ids, 0.8)
    Z = logits.double().requires_grad_()
    logp64, entropy64 = reference.token_logprobs(Z, ids, 0.8)
    logp64.sum().backward()
    torch.testing.assert_close(logp.double(), logp64.detach(), rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(entropy.double(), entropy64, rtol=3e-7, atol=2e-6)
    torch.testing.assert_close(grad.double(), Z.grad, rtol=1e-5, atol=1e-6)


def test_equal_logits(kernels):
    for V in (2, 33, 128):
        logp, entropy, grad = from_logits(
            kernels, torch.full((2, V), 7.0), torch.tensor([0, V - 1])
        )
        expected = torch.full((2,), float(V)).log()
        torch.testing.assert_close(logp, -expected)
        torch.testing.assert_close(entropy, expected)
        torch.testing.assert_close(grad.sum(1), torch.zeros(2), atol=1e-6, rtol=0)


@numpy_warns
@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_logits(kernels, masked):
    """A bias of -inf: whole blocks without a finite logit, first, last, or all but one column."""
    V, H = 200, 4
    bias = torch.zeros(V)
    for live in (slice(70, 130), slice(0, 3), slice(199, 200)):
        bias[:] = masked
        bias[live] = 0.5
        hidden, W, _, _ = case(3, H, V)
        ids = torch.full((3,), live.start)
        h = hidden.clone().requires_grad_()
        logp, entropy = head.head_logprobs(kernels, h, W, bias, ids, 0.5)
        h64 = hidden.double().requires_grad_()
        few = F.linear(h64, W.double()[live], bias.double()[live])
        logp64, entropy64 = reference.token_logprobs(few, torch.zeros_like(ids), 0.5)
        torch.testing.assert_close(logp.double(), logp64, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(entropy.double(), entropy64, rtol=1e-6, atol=2e-6)
        for loss in (logp.sum(), logp64.sum()):
            loss.backward()
        torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-5, atol=2e-6)
    dead = head.head_logprobs(kernels, hidden, W, bias, torch.zeros(3, dtype=torch.long), 0.5)[0]
    assert (dead < -1e37).all(), "a masked token has no probability"


@numpy_warns
def test_nan_stays_in_its_row(kernels):
    hidden, W, bias, ids = case(5, 8, 130)
    hidden[2, 3] = torch.nan
    h = hidden.clone().requires_grad_()
    logp, entropy = head.head_logprobs(kernels, h, W, bias, ids, 1.0)
    logp.sum().backward()
    others = torch.tensor([0, 1, 3, 4])
    clean = hidden[others].clone().requires_grad_()
    logp4, entropy4 = head.head_logprobs(kernels, clean, W, bias, ids[others], 1.0)
    logp4.sum().backward()
    for found, expected in ((logp, logp4), (entropy, entropy4), (h.grad, clean.grad)):
        assert found[2].isnan().all()
        torch.testing.assert_close(found[others], expected, rtol=1e-5, atol=1e-6)


@numpy_warns
def test_one_nan_logit_is_not_lost(kernels):
    """Wherever it stands in the walk over blocks, with larger numbers before and after it."""
    for column in (0, 63, 64, 100, 129):
        logits = normal(2, 130)
        logits[0, column] = torch.nan
        logp, entropy, grad = from_logits(kernels, logits, torch.tensor([5, 5]))
        assert logp[0].isnan() and entropy[0].isnan() and grad[0].isnan().all()
        assert not (logp[1].isnan() or entropy[1].isnan() or grad[1].isnan().any())


# -- kernel launches -------------------------------------------------------------------------------


def test_a_row_may_start_beyond_what_int32_counts():
    """The third row of each is 2^31 + 32 numbers on; of the memory only what is used is real."""
    V, stride = 40, 2**30 + 16
    Z, D = (torch.empty(2 * stride + V, dtype=torch.bfloat16) for _ in range(2))
    Z, D = (t.as_strided((3, V), (stride, 1)) for t in (Z, D))
    logits, ids = normal(3, V).bfloat16(), torch.tensor([3, 0, 39])
    Z.copy_(logits)
    logp, _ = logprob.rows(Z, None, ids, 1.0, D, 1.0, None)
    expected = logits.double().log_softmax(1)
    torch.testing.assert_close(logp.double(), expected[range(3), ids], rtol=1e-6, atol=1e-6)
    check(D.clone(), F.one_hot(ids, V) - expected.exp())


def test_a_token_out_of_range_reads_nothing():
    logp, entropy = logprob.rows(
        normal(3, 40), None, torch.tensor([-1, 40, 2]), 1.0, None, 1.0, None
    )
    assert logp.isnan().tolist() == [True, True, False] and not entropy.isnan().any()


def test_strided_inputs(kernels):
    hidden, W, bias, ids = case(12, 24, 50)
    wide = torch.stack([hidden, hidden * 0], -1)[..., 0]
    expected = head.head_logprobs(kernels, hidden, W, bias, ids, 1.0)
    two = torch.stack([ids, ids * 0], -1)[:, 0]
    b = torch.stack([bias, bias * 0], -1)[:, 0]
    for given in ((wide, W, b, two), (hidden, W.T.contiguous().T, bias, ids)):
        for found, ref in zip(head.head_logprobs(kernels, *given, 1.0), expected, strict=True):
            torch.testing.assert_close(found, ref)


def test_every_run_gives_the_same_bits_and_leaves_its_inputs_alone(kernels):
    hidden, W, bias, ids = case(20, 24, 100, torch.bfloat16)
    before = [t.clone() for t in (hidden, W, bias, ids)]
    g = normal(20)
    runs = [
        (
            *kernels.head_logprobs_forward(hidden, W, bias, ids, 0.7, True),
            *kernels.head_logprobs_weight_grad(g, hidden, W, bias, ids, 0.7, (True, True)),
        )
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, W, bias, ids), strict=True))


# -- the function ----------------------------------------------------------------------------------


def clipped(logp):
    rho = (logp + 4).exp()
    return torch.minimum(rho * 0.7, rho.clamp(0.8, 1.2)).sum()


LOSSES = {
    "mean": torch.mean,
    "clipped": clipped,
    "square": lambda logp: (logp**2).sum(),
    "few": lambda logp: logp.flatten()[::3].sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_any_loss_on_top(kernels, loss):
    hidden, W, bias, ids = case(12, 24, 50)
    given = [t.requires_grad_() for t in (hidden, W, bias)]
    shaped = hidden.view(3, 4, 24), W, bias, ids.view(3, 4)
    logp, entropy = head.head_logprobs(kernels, *shaped, 0.7)
    expected, expected_entropy = reference.token_logprobs(F.linear(*shaped[:3]), shaped[3], 0.7)
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    found, ref = (torch.autograd.grad(LOSSES[loss](t), given) for t in (logp, expected))
    for a, b in zip(found, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_in_float64():
    hidden, W, bias, ids = case(5, 6, 9, torch.float64)
    given = [t.requires_grad_() for t in (hidden, W, bias)]

    def run(*tensors):
        return head.head_logprobs(lean_logprob, *tensors, ids, 0.7)[0]

    assert torch.autograd.gradcheck(run, given)
    with pytest.raises(RuntimeError, match="head_logprobs has no second derivative"):
        torch.autograd.grad(run(*given).sum(), hidden, create_graph=True)


@pytest.mark.parametrize("needs", [*itertools.product([True, False], repeat=3)])
def test_only_what_is_wanted_is_derived_and_held(kernels, needs):
    hidden, W, bias, ids = case(40, 8, 50)
    given = [t.requires_grad_(need) for t, need in zip((hidden, W, bias), needs, strict=True)]
    held = []

    def keep(t):
        held.append(t)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        logp, entropy = head.head_logprobs(kernels, *given, ids, 1.0)
    assert logp.requires_grad == any(needs) and not entropy.requires_grad
    inputs = {t.data_ptr() for t in (*given, ids)}
    own = sum(t.numel() for t in held if t.data_ptr() not in inputs)
    assert own == hidden.numel() * needs[0], "u alone, and nothing as large as the logits"
    assert len(held) == needs[0] + 4 * any(needs[1:])
    if not any(needs):
        return
    wanted = [t for t, need in zip(given, needs, strict=True) if need]
    reference_logp, _ = reference.token_logprobs(F.linear(*given), ids, 1.0)
    found, ref = (torch.autograd.grad(t.sum(), wanted) for t in (logp, reference_logp))
    for a, b in zip(found, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_without_grad_nothing_is_derived(monkeypatch):
    hidden, W, bias, ids = case(4, 8, 50)
    asked = []
    forward = lean_logprob.head_logprobs_forward

    def spy(*args):
        asked.append(args[-1])
        return forward(*args)

    monkeypatch.setattr(lean_logprob, "head_logprobs_forward", spy)
    with torch.no_grad():
        logp, _ = head.head_logprobs(lean_logprob, hidden.requires_grad_(), W, bias, ids, 1.0)
    assert asked == [False] and not logp.requires_grad
    head.head_logprobs(lean_logprob, hidden, W, bias, ids, 1.0)
    assert asked == [False, True]


def test_backward_twice_and_a_tiny_gradient(kernels):
    """A mean over many tokens: in fp16, g (onehot - softmax) as it stands would be zero."""
    hidden, W, bias, ids = case(6, 16, 50, torch.float16)
    given = [t.requires_grad_() for t in (hidden, W, bias)]
    logp, _ = head.head_logprobs(kernels, *given, ids, 1.0)
    first = torch.autograd.grad(logp.sum() * 2.0**-10, given, retain_graph=True)
    again = torch.autograd.grad(logp.sum() * 2.0**-10, given, retain_graph=True)
    full = torch.autograd.grad(logp.sum(), given)
    for a, b, c in zip(first, again, full, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.float() * 2**10, c.float(), rtol=2e-2, atol=2e-4)
    (zero,) = torch.autograd.grad(head.head_logprobs(kernels, *given, ids, 1.0)[0].sum() * 0, W)
    assert not zero.any()


def test_the_weight_follows_the_dtype_of_hidden(kernels):
    """As under autocast: gradients come in each tensor's own dtype."""
    hidden, W, bias, ids = case(6, 16, 50)
    low = hidden.bfloat16().requires_grad_()
    given = [t.clone().requires_grad_() for t in (W, bias)]
    logp, _ = head.head_logprobs(kernels, low, *given, ids, 1.0)
    logp.sum().backward()
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (low, W, bias)]
    expected, _ = reference.token_logprobs(F.linear(*rounded), ids, 1.0)
    expected.sum().backward()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    assert (low.grad.dtype, given[0].grad.dtype) == (torch.bfloat16, torch.float32)
    for found, ref in zip((low, *given), rounded, strict=True):
        check(found.grad, ref.grad, 3e-3)
