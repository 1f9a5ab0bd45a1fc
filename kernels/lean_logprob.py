"""Log-probabilities of chosen tokens from hidden states and an output head, without the logits.

Shapes: hidden (M, H), W (V, H), bias (V,) or None, ids (M,) int64, g (M,) the gradient of the
log-probabilities. W and bias follow the dtype of hidden. With z = hidden W^T + bias,

    logp = z_c / T - log sum exp(z / T)        u = d logp / d hidden = (onehot_c - softmax) W / T

The direction u depends on no loss, so that the forward works it out while a chunk of logits is
there, and the backward of any loss is g u: two products with W in all. A head that trains has its
logits worked out again for dW = sum g (onehot - softmax)^T hidden / T: two products more.

Logits are accumulated and kept in at least fp32, a chunk of tokens at a time. The function that
takes a chunk's rows of logits apart is an argument: `logprob.py` has it as a Triton kernel.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from structadapt.kernels import reference

CHUNK_BYTES = 2**28  # of logits and what is made of them
CUDA_CHUNK_BYTES = 2**30  # about 1000 tokens at V = 152064: fewer do not pay for W's reading
BLOCK_ELEMENTS = 2**22  # of W, where it has to be cast, and of dW, where it cannot be added onto
LEAST_ROWS = 16
PAD = 16  # numbers that the stride of a row is a multiple of: it is then read in wide pieces
FP16_GAIN = 1024.0  # most probabilities of a large vocabulary are too small for fp16

# (logits (C, V), bias, ids, temperature, D (C, V) or None, its factor, g or None) ->
# (logp, entropy); the logits may be overwritten, and D is left as factor g (onehot - softmax).
Rows = Callable[
    [Tensor, Tensor | None, Tensor, float, Tensor | None, float, Tensor | None],
    tuple[Tensor, Tensor],
]


def rows(
    Z: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, D: Tensor | None,
    factor: float, g: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch. The largest logit is taken off first: what is left rounds less than z / T."""
    if bias is not None:
        Z.add_(bias)
    Z.sub_(Z.amax(1, keepdim=True)).div_(temperature)
    chosen = Z.gather(1, ids[:, None]).squeeze(1)
    E = torch.exp(Z, out=D) if D is not None and D.dtype == Z.dtype else Z.exp()
    total = E.sum(1)
    # The entropy is log total - sum e z / total; where z is -inf, e z has to be 0 and not NaN.
    moment = Z.clamp_(min=torch.finfo(Z.dtype).min).mul_(E).sum(1)
    log_total = total.log()
    if D is not None:
        weight = torch.full_like(total, factor) if g is None else factor * g
        E.mul_((-weight / total)[:, None])
        E.scatter_add_(1, ids[:, None], weight[:, None])
        if E is not D:
            D.copy_(E)
    return chosen - log_total, log_total - moment / total


def head_logprobs_forward(
    hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor, temperature: float,
    need_hidden: bool, rows: Rows = rows,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(logp (M,), entropy (M,), u (M, H) if `need_hidden`): nats, at least fp32; u as hidden."""
    chunks = _Chunks(hidden, W, bias, temperature, rows)
    logp, entropy = (hidden.new_empty(len(hidden), dtype=chunks.wide) for _ in range(2))
    u = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    for at in chunks:
        logp[at], entropy[at], D = chunks.run(at, ids[at], None, need_hidden)
        if u is not None and D is not None:
            u[at] = chunks.by_weight(D).mul_(1 / (temperature * chunks.factor))
    return logp, entropy, u


def head_logprobs_weight_grad(
    g: Tensor, hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor, temperature: float,
    needs: tuple[bool, bool], rows: Rows = rows,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (W, bias), summed in at least fp32."""
    chunks = _Chunks(hidden, W, bias, temperature, rows)
    dW = torch.zeros(W.shape, dtype=chunks.wide, device=W.device) if needs[0] else None
    dbias = torch.zeros(len(W), dtype=chunks.wide, device=W.device) if needs[1] else None
    # A loss that is a mean leaves a tiny g: of size 1, g (onehot - softmax) keeps its digits.
    size = torch.linalg.vector_norm(g.to(chunks.wide), torch.inf) if len(g) else g.new_ones(())
    size = torch.where(size == 0, 1.0, size)
    for at in chunks:
        _, _, D = chunks.run(at, ids[at], g[at].to(chunks.wide) / size, True)
        assert D is not None
        if dW is not None:
            chunks.add_weight_grad(dW, D, chunks.hidden[at])
        if dbias is not None:
            dbias.add_(D.sum(0, dtype=chunks.wide))
    size = size / (temperature * chunks.factor)
    dW = None if dW is None else dW.mul_(size).to(W.dtype)
    like = W if bias is None else bias
    return dW, None if dbias is None else dbias.mul_(size).to(like.dtype)


# -- chunks ----------------------------------------------------------------------------------------


class _Chunks:
    """The tokens in even chunks, and the products of one with W.

    fp32 and fp64 are multiplied as they are. bf16 and fp16 are where a product of them can be
    written in fp32; elsewhere they are cast, W a block of rows at a time.
    """

    def __init__(
        self, hidden: Tensor, W: Tensor, bias: Tensor | None, temperature: float, rows: Rows
    ) -> None:
        self.hidden, self.W = hidden, W.to(hidden.dtype)
        self.temperature, self.rows = temperature, rows
        self.bias = None if bias is None else bias.to(hidden.dtype)
        self.wide = reference.wide_dtype(hidden.dtype)
        self.whole = hidden.dtype == self.wide
        self.native = self.whole or (hidden.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"))
        self.operand = hidden.dtype if self.native else self.wide
        self.factor = FP16_GAIN if self.operand == torch.float16 else 1.0
        budget = CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
        row = len(W) * (self.wide.itemsize + self.operand.itemsize)
        self.count = row_count(len(hidden), row, budget)
        # Kept from one chunk to the next: fresh memory costs more than what is done to it.
        self.buffers: dict[torch.dtype | str, Tensor] = {}

    def __iter__(self) -> Iterator[slice]:
        return (slice(m, m + self.count) for m in range(0, len(self.hidden), self.count))

    def run(
        self, at: slice, ids: Tensor, g: Tensor | None, need_D: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logp, entropy, D = factor g (onehot - softmax) if needed) of one chunk."""
        Z = self._buffer("Z", self.wide, len(ids))
        D = self._buffer("D", self.operand, len(ids)) if need_D else None
        h = self.hidden[at]
        if self.whole:
            torch.mm(h, self.W.T, out=Z)
        elif self.native:
            torch.mm(h, self.W.T, out_dtype=self.wide, out=Z)
        else:
            for v in self.blocks():
                torch.mm(h.to(self.wide), self.W[v].to(self.wide).T, out=Z[:, v])
        found = self.rows(Z, self.bias, ids, self.temperature, D, self.factor, g)
        return *found, D

    def by_weight(self, D: Tensor) -> Tensor:
        """D W (C, H) in at least fp32."""
        if self.whole:
            return torch.mm(D, self.W)
        if self.native:
            return torch.mm(D, self.W, out_dtype=self.wide)
        out = D.new_zeros(len(D), self.W.shape[1])
        for v in self.blocks():
            out.addmm_(D[:, v], self.W[v].to(self.wide))
        return out

    def add_weight_grad(self, dW: Tensor, D: Tensor, h: Tensor) -> None:
        """dW += D^T h."""
        if self.whole or not self.native:
            dW.addmm_(D.T, h.to(self.wide))
            return
        for v in self.blocks():
            dW[v].add_(torch.mm(D[:, v].T, h, out_dtype=self.wide))

    def blocks(self) -> Iterator[slice]:
        """Rows of W, a block at a time."""
        size = max(PAD, BLOCK_ELEMENTS // max(self.W.shape[1], 1) // PAD * PAD)
        return (slice(v, min(v + size, len(self.W))) for v in range(0, len(self.W), size))

    def _buffer(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """(count, V), the stride of a row a multiple of PAD."""
        if name not in self.buffers:
            stride = -(-len(self.W) // PAD) * PAD
            self.buffers[name] = self.hidden.new_empty(self.count, stride, dtype=dtype)
        return self.buffers[name][:count, : len(self.W)]


def row_count(tokens: int, row: int, budget: int) -> int:
    """Tokens of one chunk, for rows of `row` bytes: a multiple of LEAST_ROWS, all chunks alike."""
    tokens, most = max(tokens, 1), max(1, budget // row // LEAST_ROWS)
    chunks = -(-tokens // (most * LEAST_ROWS))
    return -(-tokens // (chunks * LEAST_ROWS)) * LEAST_ROWS
