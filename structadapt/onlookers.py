"""Who looks on: at the operations of an op, which then have to be torch's own, one by one; or at a
module, which then has to be called."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = getattr(Tensor, "__torch_dispatch__", None)


def observed() -> bool:
    """Whether something else looks at the operations: a compiler, a tracer, torch.func, forward
    differentiation, a dispatch mode (as in selective checkpointing, which counts them)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks at what a module gets or gives, forward or backward."""
    return any(getattr(module, name) for name in HOOKS)


def has_own_operations(t: Tensor) -> bool:
    """Whether a tensor is of a subclass (sharded, quantised, fake) that says what they do."""
    return getattr(type(t), "__torch_dispatch__", None) is not PLAIN


def plain_tensors(*tensors: Tensor) -> bool:
    """Whether operations on these tensors are torch's own and can be done behind autograd."""
    return not (tensors[0].is_meta or observed() or any(map(has_own_operations, tensors)))
