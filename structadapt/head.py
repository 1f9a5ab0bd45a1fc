"""Log-probabilities from hidden states and an output head, as one autograd function.

`kernels` is a module (or anything) with the functions `head_logprobs_forward` and
`head_logprobs_weight_grad`: `kernels/lean_logprob.py`, or `kernels/logprob.py` on Triton.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structadapt.kernels import lean, reference


def head_logprobs(
    kernels: Any, hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability (...) of ids (...) and entropy (...), for hidden (..., H) and W (V, H).

    Nats, in at least fp32, of softmax((hidden W^T + bias) / temperature); the entropy carries no
    gradient. W and bias follow the dtype of hidden. Held for the backward: one tensor in the shape
    of hidden; if W or the bias trains, also hidden. A second derivative raises RuntimeError.
    """
    if torch.is_grad_enabled():
        return _Head.apply(kernels, hidden, W, bias, ids, temperature)  # type: ignore[no-any-return]
    logp, entropy, _ = _forward(kernels, hidden, W, bias, ids, temperature, False)
    return logp, entropy


def plain(
    hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same formula through the logits: for compilers and others who look at operations."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = F.linear(hidden, W.to(hidden.dtype), bias)
    return reference.token_logprobs(logits, ids, temperature)


def _forward(
    kernels: Any, hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor, temperature: float,
    need_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    with reference.no_autocast(hidden.device):  # hidden has its dtype already
        logp, entropy, u = kernels.head_logprobs_forward(
            lean.flat(hidden), W, bias, ids.reshape(-1), temperature, need_hidden
        )
    return logp.view(ids.shape), entropy.view(ids.shape), u


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, hidden: Tensor, W: Tensor, bias: Tensor | None, ids: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _, need_hidden, need_W, need_bias, *_ = ctx.needs_input_grad
        inputs = hidden, W, bias, ids
        logp, entropy, u = _forward(kernels, *inputs, temperature, need_hidden)
        ctx.kernels, ctx.temperature, ctx.shape = kernels, temperature, hidden.shape
        ctx.save_for_backward(u, *(inputs if need_W or need_bias else ()))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # with create_graph; u would pass for a constant
            raise RuntimeError("head_logprobs has no second derivative: take it from the logits")
        u, *inputs = ctx.saved_tensors
        _, need_hidden, need_W, need_bias, *_ = ctx.needs_input_grad
        g = g.reshape(-1)
        dhidden = dW = dbias = None
        if need_hidden:  # written in the dtype of hidden at once: no wide tensor of its size
            dhidden = torch.mul(u, g[:, None], out=torch.empty_like(u)).view(ctx.shape)
        if need_W or need_bias:
            hidden, W, bias, ids = inputs
            with reference.no_autocast(hidden.device):
                dW, dbias = ctx.kernels.head_logprobs_weight_grad(
                    g, lean.flat(hidden), W, bias, ids.reshape(-1), ctx.temperature,
                    (need_W, need_bias),
                )  # fmt: skip
        return None, dhidden, dW, dbias, None, None
