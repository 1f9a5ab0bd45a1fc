"""Log-probabilities from hidden states and an output head on Triton: see `lean_logprob.py`.

The products are cuBLAS's. One kernel takes a chunk of logits apart, a program for each row: in a
first sweep the largest logit, the sum of exponentials and the entropy's moment, in a second the
row of D = factor g (onehot - softmax). What is read and written is all there is to it: two readings
of the logits and one writing of D.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from structadapt.kernels import _launch, lean_logprob
from structadapt.kernels._interpreter import interpreting, repair
from structadapt.kernels._launch import Tile

if interpreting():
    repair()


# -- the kernel ------------------------------------------------------------------------------------


@triton.jit
def _logits(z, bias, v, V, szm, HAS_BIAS: tl.constexpr):
    """Logits at the columns v in fp32; -inf beyond V.

    The load ends at the row's stride, a multiple of 16, and not at V: it is wide for every V.
    """
    x = tl.where(v < V, tl.load(z + v, mask=v < szm, other=0.0).to(tl.float32), float("-inf"))
    if HAS_BIAS:
        x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["V"])
def logprob_kernel(
    z, bias, ids, g, logp, entropy, d, V, szm, sdm, inverse, factor,
    HAS_BIAS: tl.constexpr, HAS_G: tl.constexpr, HAS_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: logp and entropy of softmax(inverse (z + bias)), d = factor g (onehot - softmax)."""
    row = tl.program_id(0).to(tl.int64)
    z += row * szm
    columns = tl.arange(0, BLOCK)
    top = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)  # lane by lane: of exp y, y = inverse (z - top)
    moment = tl.zeros((BLOCK,), tl.float32)  # of y exp y
    for v0 in range(0, V, BLOCK):
        x = _logits(z, bias, v0 + columns, V, szm, HAS_BIAS)
        new = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        old = tl.where(top == float("-inf"), base, top)
        # exp is 0 long before -1000, and a product with it has to be 0, not NaN.
        shift = tl.maximum((old - base) * inverse, -1000.0)
        y = (x - base) * inverse
        y = tl.where(y < -1000.0, -1000.0, y)  # lets NaN through, as a maximum would not
        e = tl.exp(y)
        shrink = tl.exp(shift)
        moment = (moment + total * shift) * shrink + e * y
        total = total * shrink + e
        top = new
    base = tl.where(top == float("-inf"), 0.0, top)
    s = tl.sum(total, 0)
    log_s = tl.log(s)
    target = tl.load(ids + row)
    inside = (target >= 0) & (target < V)
    x = tl.load(z + target, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(logp + row, (x - base) * inverse - log_s)
    tl.store(entropy + row, log_s - tl.sum(moment, 0) / s)
    if HAS_D:
        d += row * sdm
        weight = factor
        if HAS_G:
            weight *= tl.load(g + row)
        scale = 1.0 / s
        for v0 in range(0, V, BLOCK):
            v = v0 + columns
            p = tl.exp((_logits(z, bias, v, V, szm, HAS_BIAS) - base) * inverse) * scale
            out = weight * (tl.where(v == target, 1.0, 0.0) - p)
            tl.store(d + v, out.to(d.dtype.element_ty), mask=v < sdm)


# -- the op ----------------------------------------------------------------------------------------


def rows(
    Z: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, D: Tensor | None,
    factor: float, g: Tensor | None, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logp, entropy) of logits (C, V), and D; rows of both start at multiples of 16 numbers."""
    C, V = Z.shape
    blocks, launch = _launch.split(tile or _launch.tile("logprob", Z.device, V=V))
    logp, entropy = (Z.new_empty(C, dtype=torch.float32) for _ in range(2))
    if C:
        ids, bias_ = ids.contiguous(), Z if bias is None else bias.contiguous()
        g_, D_ = Z if g is None else g.contiguous(), Z if D is None else D
        _launch.run(
            logprob_kernel, (C,), Z, bias_, ids, g_, logp, entropy, D_, V, Z.stride(0),
            D_.stride(0), 1 / temperature, factor, HAS_BIAS=bias is not None, HAS_G=g is not None,
            HAS_D=D is not None, **blocks, **launch,
        )  # fmt: skip
    return logp, entropy


head_logprobs_forward = functools.partial(lean_logprob.head_logprobs_forward, rows=rows)
head_logprobs_weight_grad = functools.partial(lean_logprob.head_logprobs_weight_grad, rows=rows)
