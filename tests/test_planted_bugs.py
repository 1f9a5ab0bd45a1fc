"""The kernels' checks find bugs: each is planted in a copy of the source, and has to be noticed."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_checks import check, normal

from structadapt.kernels import reference

KERNELS = Path(__file__).parents[1] / "kernels"
BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:.*encountered in"),  # what a bug multiplies
]


def load(file, text, folder):
    """A kernel's module from other source; triton reads it from the file."""
    path = folder / f"planted_{file}"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrapped_around(rows, width):
    """Rows 2^30 numbers apart in the upper half of 2^32: a 32-bit offset of the third, 2^31, would
    go back to the start of the memory, which is zeros and not a crash."""
    whole = torch.from_numpy(np.zeros((1 << 32) + 64, np.int16)).view(BF16)
    apart = whole[1 << 31 :].as_strided((rows, width), (1 << 30, 1))
    return apart.copy_(normal(rows, width, dtype=BF16))


def check_lora(m):
    M, N, K, R = 70, 104, 72, 24
    x, W, s = normal(M, K, dtype=BF16), normal(N, K, dtype=BF16), normal(M, R, dtype=BF16)
    dy, b, g = normal(M, N, dtype=BF16), normal(N, R, dtype=BF16), 1 + normal(N).abs()
    bias = normal(N, dtype=BF16)
    exact = x.double() @ W.double().T + s.double() @ b.double().T
    check(m.narrow(x, b[:K].contiguous()), x.double() @ b[:K].double())
    check(m.gemm(x, W.T, s, b.T, bias, g), g.double() * exact + bias.double())
    tile = {"BM": 32, "BN": 32, "BK": 32, "BR": 16, "GROUP_M": 2, "EPILOGUE": 2}
    check(m.gemm(x, W.T, s, b.T, bias, g, tile), g.double() * exact + bias.double())
    out = m.over_rows(x, s, torch.empty(R, K), transposed=True, factor=3.0)
    check(out, 3 * s.double().T @ x.double(), 2e-6)
    y = (g * dy.float() + bias).to(BF16)
    found = m.dy_pass(dy, b, s, 2.0, g, y, bias)
    check(found.dS, dy.double() @ b.double())
    check(found.dB, 2 * g.double()[:, None] * (dy.double().T @ s.double()), 2e-6)
    check(found.gdY, g.double() * dy.double())
    dg = (dy.double() * (y.double() - bias.double()) / g.double()).sum(0)
    check(found.parts_g.sum(0), dg, 1e-5)
    parts = m.digits(s, 3, (80, 32), 3.0, g=1 + normal(M).abs()).double()
    check(parts.sum(0)[:M, :R], 3 * (1 + normal(M).abs()).double()[:, None] * s.double(), 2e-7)
    assert not parts[:, M:].any()
    assert not parts[:, :, R:].any()
    far = wrapped_around(3, 16)
    check(
        m.narrow(far, normal(16, 4, dtype=BF16)), far.double() @ normal(16, 4, dtype=BF16).double()
    )


def check_dora(m):
    W, A, B, g = normal(50, 70, dtype=BF16), normal(20, 70), normal(50, 20), 1 + normal(50).abs()
    norm = (W.double() + 2 * B.double() @ A.double()).norm(dim=1)
    check(m.dora_norm(W, A, B, 2.0), norm, 5e-6)  # A and B in 16 bits
    h, b, bias = normal(70, 20, dtype=BF16), B.to(BF16), normal(50, dtype=BF16)
    base = normal(70, 50, dtype=BF16)
    exact = g.double() * (base.double() + h.double() @ b.double().T) + bias.double()
    check(m.dora_epilogue(base.clone(), h, b, bias, g), exact)
    g[3], g[40], bias[5], bias[17] = 0, -1e-3, 300, -100
    x, dy = normal(70, 70, dtype=BF16), normal(70, 50, dtype=BF16)
    u = x.double() @ W.double().T + h.double() @ b.double().T
    y = (g.double() * u + bias.double()).to(BF16)
    dg = m.gain_gradient(dy, x, h, W, b, bias, g, y, torch.zeros(2, 50))
    lost = torch.tensor([3, 5, 17, 40])
    check(dg[lost], (dy.double() * u).sum(0)[lost], 1e-5)
    assert dg.count_nonzero() == len(lost)


def check_quanta(m):
    """Sizes whose tiles have tails, more than one chunk; the chain on chip is 8^4."""
    m.CHUNK_ELEMENTS = 1  # 16 tokens
    uneven, eight = (3, 2, 4, 3), (8,) * 4
    for before, after, M in (((4, 6, 5), (4, 6, 7), 35), (uneven, uneven, 5), (eight, eight, 3)):
        gates, sizes = [], list(before)
        pairs = reference.quanta_pairs(len(before))
        for k, (b, a) in enumerate(pairs):
            old = sizes[b], sizes[a]
            for axis in (b, a):
                if not any(axis in pair for pair in pairs[k + 1 :]):
                    sizes[axis] = after[axis]
            gates.append(0.1 * normal(sizes[b], sizes[a], *old, seed=k))
            gates[-1] += reference.eye_gate(gates[-1])
        n, out = math.prod(before) - 2, math.prod(after) - 1
        if len(before) == 4:
            n, out = n + 2, out + 1
        x, dy = normal(M, n), normal(M, out)
        leaves = [t.double().requires_grad_() for t in (x, *gates)]
        for minus_eye in (True, False):
            y64 = reference.quanta_update(leaves[0], leaves[1:], out, minus_eye)
            exact = torch.autograd.grad(y64, leaves, dy.double())
            check(m.quanta_forward(x, gates, [], out, minus_eye), y64.detach(), 5e-6)
            dx, dG = m.quanta_backward(dy, x, gates, [], minus_eye, True)
            for found, ref in zip([dx, *dG], exact, strict=True):
                check(found, ref, 5e-6)
        twin = [g + 0.1 for g in gates]
        y64 = y64.detach() - reference.quanta_update(
            x.double(), [g.double() for g in twin], out, False
        )
        check(m.quanta_forward(x, gates, twin, out, False), y64, 2e-5)


def check_logprob(m):
    for V, temperature in ((33, 1.0), (200, 0.7)):
        Z, bias = 3 * normal(17, V), normal(V)
        ids = torch.arange(17) % V
        ids[0], ids[1] = V - 1, 0
        Z[2] -= 100
        Z[3, 5:9] = -torch.inf
        Z[3, ids[3]] = 0
        exact = torch.log_softmax((Z.double() + bias.double()) / temperature, 1)
        stride = -(-V // 16) * 16
        buffer = torch.empty(17, stride)[:, :V].copy_(Z)
        D = torch.empty(17, stride)[:, :V]
        g = normal(17)
        logp, entropy = m.rows(buffer, bias, ids, temperature, D, 2.0, g)
        check(logp, exact.gather(1, ids[:, None])[:, 0], 2e-6)
        check(entropy, torch.special.entr(exact.exp()).sum(1), 1e-5)
        onehot = torch.nn.functional.one_hot(ids, V)
        check(D, 2 * g.double()[:, None] * (onehot - exact.exp()), 3e-6)


BATTERIES = {
    "lora.py": check_lora,
    "dora.py": check_dora,
    "quanta.py": check_quanta,
    "logprob.py": check_logprob,
}

PLANTED = {  # what: (file, right, wrong)
    "a tail of K that is one too long": (
        "lora.py",
        "tl.arange(0, BK) < last - k0",
        "tl.arange(0, BK) <= last - k0",
    ),
    "a tail of K that is not masked": (
        "lora.py",
        "inside = k < K - k0",
        "inside = k < K - k0 + BK",
    ),
    "a forgotten factor": ("lora.py", "total *= factor", "total *= 1.0"),
    "a forgotten part": ("lora.py", "mask=(p < P)[:, None]", "mask=(p < P - 1)[:, None]"),
    "swapped strides of the result": (
        "lora.py",
        "(1, C) if transposed else (R, 1)",
        "(R, 1) if transposed else (1, C)",
    ),
    "a sum kept in bf16": (
        "lora.py",
        "tl.dot(p, q, acc, input_precision=PRECISION)\n        px += BK",
        "tl.dot(p, q, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)\n"
        "        px += BK",
    ),
    "a group of tiles that overruns": (
        "lora.py",
        "tl.minimum(tiles_m - first, GROUP_M)",
        "GROUP_M",
    ),
    "a last column that is never written": (
        "lora.py",
        "tl.store(py, acc.to(y.dtype.element_ty), mask=rows & columns)",
        "tl.store(py, acc.to(y.dtype.element_ty), mask=rows & (n < N - 1)[None, :])",
    ),
    "stripes that write over one another": (
        "lora.py",
        "stripe.to(tl.int64) * sdsp",
        "stripe.to(tl.int64) * 0",
    ),
    "a bias that the gain multiplies": (
        "lora.py",
        "out -= shift[None, :]",
        "out -= 0 * shift[None, :]",
    ),
    "half of an output that takes the other's gain": (
        "lora.py",
        "            n += BN // 2\n",
        "            n += 0\n",
    ),
    "offsets of 32 bits": (
        "lora.py",
        "px = x + m.to(tl.int64)[:, None] * sxm + k[None, :]\n    pw = w + k.to(tl.int64)"
        "[:, None] * swk + r",
        "px = x + m[:, None] * sxm + k[None, :]\n    pw = w + k[:, None] * swk + r",
    ),
    "a low-rank block that is skipped": (
        "lora.py",
        "for r0 in tl.range(0, R, BR, num_stages=1):",
        "for r0 in tl.range(0, BR, BR):",
    ),
    "a norm without its scale": (
        "dora.py",
        "digits(B, n, (N, RO), scale)",
        "digits(B, n, (N, RO), 1)",
    ),
    "a norm of the first rank block": (
        "dora.py",
        "for r0 in range(0, R, BR):\n                v =",
        "for r0 in range(0, BR, BR):\n                v =",
    ),
    "digits that are not taken off": ("lora.py", "rest -= digit", "rest -= 0 * digit"),
    "a gain after the bias": (
        "dora.py",
        "    acc *= tl.load(g + n, mask=n < N, other=0.0).to(tl.float32)[None, :]\n"
        "    if HAS_BIAS:",
        "    if HAS_BIAS:\n        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)"
        "[None, :]\n    acc *= tl.load(g + n, mask=n < N, other=0.0).to(tl.float32)[None, :]\n"
        "    if False:",
    ),
    "small gains of one sign": (
        "dora.py",
        "lost = tl.abs(tl.load(g + n, mask=columns, other=1.0).to(tl.float32)) < SMALL",
        "lost = (tl.load(g + n, mask=columns, other=1.0).to(tl.float32) + SMALL / 2) > SMALL",
    ),
    "large biases of one sign": (
        "dora.py",
        "lost |= tl.abs(shift) >",
        "lost |= shift >",
    ),
    "swapped axes of an output": (
        "quanta.py",
        "at += (n_b * OUT[NAXES] + n_a * OUT[NAXES + 1])[None, :]",
        "at += (n_a * OUT[NAXES] + n_b * OUT[NAXES + 1])[None, :]",
    ),
    "a total that is not carried on": (
        "quanta.py",
        "            acc += tl.load(d + same, mask=kept",
        "            acc += 0 * tl.load(d + same, mask=kept",
    ),
    "an activation without what it was": (
        "quanta.py",
        "            moved += tl.load(t + same",
        "            moved += 0 * tl.load(t + same",
    ),
    "an activation that is not cropped": (
        "quanta.py",
        "columns & ((n_b < B) & (n_a < A))[None, :]",
        "columns",
    ),
    "columns behind x that are read": (
        "quanta.py",
        "within = within & (at < WIDTH)",
        "within = within & (at <= WIDTH)",
    ),
    "axes that are turned the wrong way": (
        "quanta.py",
        "others = [n for n in reversed(range(len(sizes)))",
        "others = [n for n in (range(len(sizes)))",
    ),
    "a chain that forgets its activation": (
        "quanta.py",
        "acc = total if MINUS_EYE else",
        "acc = 0 * total if MINUS_EYE else",
    ),
    "a chain whose way back is the way forth": (
        "quanta.py",
        "which = GATES - 1 - k if BACK else k",
        "which = k",
    ),
    "a gate that is not transposed": (
        "quanta.py",
        "Gate(g.matrix.T, g.pair",
        "Gate(g.matrix, g.pair",
    ),
    "a chunk whose gradients replace the others": (
        "quanta.py",
        "dG if before is None else before.add_(dG)",
        "dG",
    ),
    "a sum of exponentials that is not rescaled": (
        "logprob.py",
        "total = total * shrink + e",
        "total = total + e",
    ),
    "an entropy whose moment stays behind": (
        "logprob.py",
        "moment = (moment + total * shift) * shrink + e * y",
        "moment = moment * shrink + e * y",
    ),
    "a temperature for the chosen token alone": (
        "logprob.py",
        "p = tl.exp((_logits(z, bias, v, V, szm, HAS_BIAS) - base) * inverse) * scale",
        "p = tl.exp((_logits(z, bias, v, V, szm, HAS_BIAS) - base)) * scale",
    ),
    "columns beyond the vocabulary": (
        "logprob.py",
        'tl.where(v < V, tl.load(z + v, mask=v < szm, other=0.0).to(tl.float32), float("-inf"))',
        "tl.load(z + v, mask=v < szm, other=0.0).to(tl.float32)",
    ),
    "a bias that is forgotten for the chosen token": (
        "logprob.py",
        "x += tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)",
        "x += 0 * tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)",
    ),
}


@pytest.mark.parametrize("file", BATTERIES)
def test_the_source_as_it_is_passes(file, tmp_path):
    BATTERIES[file](load(file, (KERNELS / file).read_text(), tmp_path))


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_bug_is_noticed(what, tmp_path):
    file, right, wrong = PLANTED[what]
    text = (KERNELS / file).read_text()
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
    module = load(file, text.replace(right, wrong), tmp_path)
    with pytest.raises(AssertionError):
        BATTERIES[file](module)
