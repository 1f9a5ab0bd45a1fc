"""Which implementation of an op runs, and why.

Every op has a plain-torch form and, for CUDA devices, a Triton one (`kernels/`). The backend is
"auto" (Triton where it can and where it is worth a launch), "triton" (an error where it cannot) or
"torch"; the variable STRUCTADAPT_BACKEND sets the default.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structadapt.kernels import _launch
from structadapt.onlookers import has_own_operations

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


def _checked(name: str, source: str = "sa.backend") -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r} from {source}: expected one of {', '.join(BACKENDS)}"
        )
    return name


class _State:
    # Read here: a graph that is compiled later must not see it change from unset to set.
    default: str = _checked(os.environ.get("STRUCTADAPT_BACKEND") or "auto", "STRUCTADAPT_BACKEND")
    backend: str = default
    blocks: ClassVar[list[tuple[object, str]]] = []  # entered and not left, the innermost last
    seen: list[Choice] | None = None  # of an `explain` under way


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every op in a block: "auto", "triton" or "torch".

    For the whole process, not for a thread. "auto" takes Triton for bf16 and fp16 on a CUDA device
    from compute capability 8.0 on, where sizes and strides allow 16-byte loads and there are
    enough rows; "triton" takes it also for few rows, and with TRITON_INTERPRET=1 set before the
    start of Python on the CPU too, there also for fp32; it raises RuntimeError where it cannot.

    Raises ValueError for another name.
    """
    block = (object(), _checked(name))
    _State.blocks.append(block)
    _State.backend = name
    try:
        yield
    finally:  # blocks of generators and threads may be left in another order than entered
        _State.blocks.remove(block)
        _State.backend = _State.blocks[-1][1] if _State.blocks else _State.default


def current() -> str:
    """The backend in use: "auto", "triton" or "torch"."""
    return _State.backend


@contextmanager
def watching() -> Iterator[list[Choice]]:
    """Collect every choice made in a block, in which "triton" does not raise."""
    before, _State.seen = _State.seen, []
    try:
        yield _State.seen
    finally:
        _State.seen = before


def against(
    x: Tensor, W: Tensor, *others: Tensor, rank: int = 0, any_strides: bool = False
) -> str | None:
    """Why these tensors, which nothing observes, go to torch, or None. x (..., in), W (out, in).

    any_strides: no kernel reads x or W, torch's own products do.
    """
    asked = current()
    if asked == "torch":
        return "the backend is torch"
    reason = refusal(x, W, *others, rank=rank, any_strides=any_strides)
    return _slower(x) if reason is None and asked == "auto" else reason


def settle(op: str, x: Tensor, W: Tensor, refused: str | None, strict: bool = True) -> str:
    """`triton` or `torch`; noted for `explain`.

    Raises RuntimeError if the backend is "triton" and something is against it, unless an op that
    is not `strict` may always fall back.
    """
    found = "torch" if refused else "triton"
    raises = refused is not None and strict and current() == "triton"
    if _State.seen is not None:
        shapes = f"{tuple(x.shape)} by {tuple(W.shape)}"
        reason = refused or "nothing is against it"
        reason += " (outside of explain it raises)" if raises else ""
        _State.seen.append(Choice(op, shapes, found, reason))
    elif raises:
        raise RuntimeError(
            f'{op} cannot run on Triton, and the backend is "triton": {refused}. '
            'sa.backend("auto") runs it on torch'
        )
    return found


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch.autocast would multiply it in."""
    dtype = _autocast_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def refusal(
    x: Tensor, W: Tensor, *others: Tensor, rank: int = 0, any_strides: bool = False
) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    where = _no_device(x.device)
    if where:
        return where
    dtypes = _dtypes(x.device)
    if x.dtype not in dtypes:
        return f"x is {_short(x.dtype)}, and the kernels take {', '.join(map(_short, dtypes))}"
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
    if not HAS_TRITON:
        return "triton 3.6 or newer is not installed"
    if device.type == "cuda" and not _launch.architecture(device):
        return "the device is older than compute capability 8.0"
    if device.type == "cpu" and current() != "triton":
        return 'x is on the CPU (sa.backend("triton") would interpret the kernels there)'
    return None


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    # In fp32 on a device the products are cuBLAS's at best, and tiles fit no shared memory.
    wide = (torch.float32,) if device.type == "cpu" else ()
    return (torch.bfloat16, torch.float16, *wide)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no parent; None in sys.modules
        return False


# The module with the descriptors that the kernels are launched with: older ones have none.
HAS_TRITON = _found("triton.tools.tensor_descriptor") and sys.modules.get("triton", 1) is not None


def _slower(x: Tensor) -> str | None:
    rows = x.shape[:-1].numel()
    return f"{rows} rows are too few to be worth it" if rows < FEW_ROWS else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def traced_to_kernels(x: Tensor, W: Tensor, *others: Tensor, rank: int = 0) -> bool:
    """Whether an op is being compiled and becomes an opaque one, which decides when it runs.

    By what a trace knows of all of its runs: not by rows, addresses or the device's age.
    """
    # The flag itself: before torch 2.12 a compiler takes is_exporting() for true.
    if not torch.compiler.is_compiling() or torch.compiler._is_exporting_flag:
        return False
    asked, device = current(), x.device.type
    if asked == "torch" or rank > LARGEST_RANK or not HAS_TRITON or torch.version.hip:
        return False
    if device != "cuda" and not (asked == "triton" and device == "cpu" and _launch.interpreted()):
        return False
    if torch._C._are_functorch_transforms_active() or any(map(has_own_operations, (x, W, *others))):
        return False
    dtype = _autocast_dtype(x)
    fits = device == "cpu" or not any(side % MULTIPLE for side in W.shape)
    return dtype in _dtypes(x.device) and W.dtype == dtype and fits
