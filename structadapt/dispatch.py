"""Which implementation of an op runs, and why.

Every op has a plain-torch form and, for CUDA devices, a Triton one (`kernels/`). The backend is
"auto" (Triton where it can and where it is worth a launch), "triton" (an error where it cannot) or
"torch"; the variable STRUCTADAPT_BACKEND sets the default.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from structadapt.kernels import _launch

BACKENDS = ("auto", "triton", "torch")
FEW_ROWS = 128  # with fewer, launches cost more than a fused kernel saves
OBSERVED = "something looks at the operations, or a tensor's type does"
MULTIPLE = 16  # both sides of a layer: 16-byte loads and tensor memory descriptors
LARGEST_RANK = 512


@dataclass(frozen=True)
class Choice:
    """What runs one call of an op."""

    op: str
    shapes: str  # of x and W
    backend: str  # "triton" or "torch"
    reason: str

    def __str__(self) -> str:
        return f"{self.op} {self.shapes}: {self.backend}, {self.reason}"


class _State:
    backend: str = ""  # set below
    seen: list[Choice] | None = None  # of an `explain` under way


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every op in a block: "auto", "triton" or "torch".

    For the whole process, not for a thread. "auto" takes Triton for bf16 and fp16 on a CUDA device
    from compute capability 8.0 on, where sizes and strides allow 16-byte loads and there are
    enough rows; "triton" takes it also for few rows and for fp32, and with TRITON_INTERPRET=1 set
    before the start of Python on the CPU too, and raises RuntimeError where it cannot.

    Raises ValueError for another name.
    """
    before, _State.backend = current(), _checked(name)
    try:
        yield
    finally:
        _State.backend = before


def current() -> str:
    """The backend in use: "auto", "triton" or "torch"."""
    if not _State.backend:
        _State.backend = _checked(os.environ.get("STRUCTADAPT_BACKEND", "auto"))
    return _State.backend


@contextmanager
def watching() -> Iterator[list[Choice]]:
    """Collect every choice made in a block, in which "triton" does not raise."""
    before, _State.seen = _State.seen, []
    try:
        yield _State.seen
    finally:
        _State.seen = before


def choose(
    op: str, x: Tensor, W: Tensor, *others: Tensor, rank: int = 0, any_strides: bool = False
) -> str:
    """`triton` or `torch` for tensors that nothing observes. x (..., in), W (out, in).

    any_strides: no kernel reads x or W, torch's own products do.
    Raises RuntimeError if the backend is "triton" and the kernels cannot take them.
    """
    asked = current()
    if asked == "torch" and _State.seen is None:  # the short way
        return "torch"
    reason = (
        "the backend is torch"
        if asked == "torch"
        else refusal(x, W, *others, rank=rank, any_strides=any_strides)
    )
    if reason is None and asked == "auto":
        reason = _slower(x)
    return settle(op, x, W, reason)


def settle(op: str, x: Tensor, W: Tensor, refused: str | None) -> str:
    """Note a choice; raise if what was asked for cannot be had."""
    found = "torch" if refused else "triton"
    if _State.seen is not None:
        shapes = f"{tuple(x.shape)} by {tuple(W.shape)}"
        _State.seen.append(Choice(op, shapes, found, refused or "nothing is against it"))
    elif refused and current() == "triton":
        raise RuntimeError(
            f'{op} cannot run on Triton, and the backend is "triton": {refused}. '
            'sa.backend("auto") runs it on torch'
        )
    return found


def refusal(
    x: Tensor, W: Tensor, *others: Tensor, rank: int = 0, any_strides: bool = False
) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    where = _no_device(x.device)
    if where:
        return where
    forced = current() == "triton"
    allowed = (torch.bfloat16, torch.float16, *((torch.float32,) if forced else ()))
    if x.dtype not in allowed:
        return f"x is {_short(x.dtype)}, and the kernels take bf16 and fp16"
    if W.dtype != x.dtype:
        return f"x is {_short(x.dtype)} and W {_short(W.dtype)}"
    foreign = next((t for t in (W, *others) if t.device != x.device), None)
    if foreign is not None:
        return f"x is on {x.device} and another tensor on {foreign.device}"
    if any_strides:
        return None
    if rank > LARGEST_RANK:
        return f"the rank is {rank}, and the kernels take at most {LARGEST_RANK}"
    if x.stride(-1) != 1 or W.stride(-1) != 1:
        return f"the last stride of x {x.stride()} and of W {W.stride()} has to be 1"
    if x.device.type == "cpu":
        return None  # the interpreter reads number by number
    if any(side % MULTIPLE for side in W.shape):
        return f"W is {tuple(W.shape)}, and both sides have to be multiples of {MULTIPLE}"
    return _launch.misfit(x, W)


def _no_device(device: torch.device) -> str | None:
    if device.type == "cpu" and not _launch.interpreted():
        return "x is on the CPU (TRITON_INTERPRET=1 would interpret the kernels there)"
    if device.type not in ("cpu", "cuda"):
        return f"x is on {device.type}"
    if torch.version.hip:
        return "the kernels are for CUDA, not for ROCm"
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda" and not _launch.architecture(device):
        return "the device is older than compute capability 8.0"
    if device.type == "cpu" and current() != "triton":
        return 'x is on the CPU (sa.backend("triton") would interpret the kernels there)'
    return None


@functools.cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # set to None in sys.modules
        return False


def _slower(x: Tensor) -> str | None:
    rows = x.shape[:-1].numel()
    return f"{rows} rows are too few to be worth it" if rows < FEW_ROWS else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def traced_to_kernels(x: Tensor, rank: int = 0) -> bool:
    """Whether an op is being compiled and becomes an opaque one, which decides when it runs."""
    if not torch.compiler.is_compiling():
        return False
    asked = current()
    if asked == "torch" or rank > LARGEST_RANK:
        return False
    if x.device.type == "cuda":
        return x.dtype in (torch.bfloat16, torch.float16) and not torch.version.hip
    return asked == "triton" and x.device.type == "cpu" and _launch.interpreted()


# -- who looks on ----------------------------------------------------------------------------------


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


def plain_tensors(*tensors: Tensor) -> bool:
    """Whether operations on these tensors are torch's own and can be done behind autograd."""
    return not (tensors[0].is_meta or observed() or any(_overridden(type(t)) for t in tensors))


@functools.cache
def _overridden(kind: type[Tensor]) -> bool:
    """Whether a subclass (sharded, quantised, fake) has operations of its own."""
    plain = getattr(Tensor, "__torch_dispatch__", None)
    return getattr(kind, "__torch_dispatch__", None) is not plain
