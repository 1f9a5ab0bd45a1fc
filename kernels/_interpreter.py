"""Triton's CPU interpreter, made right for bfloat16.

With TRITON_INTERPRET=1 every kernel runs on CPU tensors, program by program. The interpreter keeps
bf16 as raw 16-bit integers: its dot multiplies the bit patterns, its cast truncates and its
arithmetic is wrong, all without a word (triton 3.6 to 3.9; https://github.com/triton-lang/triton/
pull/11585 was closed as not supported). `repair` makes the dot and the casts exact and lets bare
bf16 arithmetic, which kernels here do not use, raise.
"""

import os
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def interpreting() -> bool:
    """Whether kernels decorated from here on run in the interpreter."""
    knobs = getattr(triton, "knobs", None)
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET") == "1"


def repair() -> None:
    """Patch the interpreter, once a process."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return _narrowed(source)
        if kinds == (tl.bfloat16, tl.float32):
            return _widened(source)
        return cast(self, source, target)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        _refuse_bare(a)
        return binary(self, a, b, op)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        _refuse_bare(a)
        return unary(self, a, op)

    patches = {"create_dot": create_dot, "cast_impl": cast_impl, "binary_op": binary_op,
               "unary_op": unary_op, "repaired": True}  # fmt: skip
    for name, patch in patches.items():
        setattr(InterpreterBuilder, name, patch)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16) and handle.data.dtype != np.bool_


def _refuse_bare(handle: Any) -> None:
    if _is_bf16(handle):
        raise TypeError("bf16 arithmetic in a kernel: cast to float32 first")


def _widened(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(handle: Any) -> Any:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), rounded), tl.bfloat16)
