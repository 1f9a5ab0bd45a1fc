"""Nested dicts, lists and tensors as what JSON can hold, and tensors by name."""

from typing import Any

import torch
from torch import Tensor

from structadapt.grpo.sharded import Sharded, is_sharded


def flatten(value: Any, prefix: str = "t") -> tuple[Any, dict[str, Tensor]]:
    """(what JSON can hold, tensors by name) of nested dicts, lists and tensors. Sharded tensors
    are themselves; others are copies on the CPU."""
    tensors: dict[str, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"{prefix}{len(tensors)}"
            if is_sharded(value):
                tensors[name] = value.detach()
                return {"sharded": name, "dtype": str(value.dtype).removeprefix("torch.")}
            tensors[name] = value.detach().cpu().clone()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[visit(k), visit(v)] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            return [visit(v) for v in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} in the state of a run cannot be kept: {value!r}")

    return visit(value), tensors


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `flatten` took; tuples come back as lists, sharded tensors as `Sharded`."""
    if isinstance(value, list):
        return [unflatten(v, tensors) for v in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict) and "sharded" in value:
        return Sharded(value["sharded"], getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value["dict"]}
    return value
