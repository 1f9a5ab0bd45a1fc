"""Which layers a target names."""

import difflib
import re
from collections.abc import Callable, Iterable

from torch import nn

Pattern = str | Callable[[str, nn.Module], bool]
Target = Pattern | Iterable[Pattern]

HEAD_NAMES = ("lm_head", "embed_out")
NAMED_ONLY = (nn.Embedding, nn.Conv1d, nn.Conv2d)  # no part of "all-linear"
CAN = "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d and transformers' Conv1D can be adapted"


def select(
    model: nn.Module, layers: dict[str, nn.Module], target: Target, role: str
) -> dict[str, nn.Module]:
    """The layers that match any of the patterns, in model order. `role` names the argument.

    A layer registered under several names matches by any of them. Raises ValueError for a pattern
    that matches none, also when it is one of several; TypeError for one that is no pattern.
    """
    if not (isinstance(target, str | Iterable) or callable(target)):
        raise TypeError(f"{role} must be text, a callable or several of these, got {target!r}")
    patterns = [target] if isinstance(target, str) or callable(target) else list(target)
    names: set[str] = set()
    for pattern in patterns:
        if not (isinstance(pattern, str) or callable(pattern)):
            raise TypeError(f"{role} must be text or callables, got {pattern!r}")
        matching = _matching(model, layers, pattern)
        found = {name for name, layer in layers.items() if layer in matching}
        if not found:
            raise ValueError(_no_match(model, layers, pattern, role))
        names |= found
    return {name: layer for name, layer in layers.items() if name in names}


def _matching(model: nn.Module, layers: dict[str, nn.Module], pattern: Pattern) -> set[nn.Module]:
    """The layers that a pattern names."""
    candidates: set[nn.Module] = {*layers.values()}
    if pattern == "all-linear":
        linear = {layer for layer in candidates if not isinstance(layer, NAMED_ONLY)}
        return linear - _output_heads(model)
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in candidates]
    if isinstance(pattern, str):
        return {module for name, module in named if _name_matches(pattern, name)}
    return {module for name, module in named if _asked(pattern, name, module)}


def _asked(pattern: Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    """A callable's answer. One that reads `bias` or `in_features` is about linear layers: that an
    embedding has none is a no."""
    try:
        return pattern(name, module)
    except AttributeError:
        if isinstance(module, NAMED_ONLY):
            return False
        raise


def near(name: str, names: Iterable[str]) -> str:
    """' (near: ...)' with a few names like `name`, or of all kinds if none is; for messages."""
    by_suffix: dict[str, str] = {}
    for full in names:
        by_suffix.setdefault(full.rsplit(".", 1)[-1], full)
    close = difflib.get_close_matches(
        name[:200], [*by_suffix, *by_suffix.values()], n=3, cutoff=0.5
    )
    shown = list(dict.fromkeys(by_suffix.get(n, n) for n in close)) or list(by_suffix.values())[:6]
    return f" (near: {', '.join(shown)})" if shown else ""


def _name_matches(pattern: str, name: str) -> bool:
    """The expression matches the whole path, or all that follows one of its dots."""
    parts = name.split(".")
    try:
        return any(re.fullmatch(pattern, ".".join(parts[i:])) for i in range(len(parts)))
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """Layers that turn hidden states into logits: by transformers' accessor, else by name."""
    accessor = getattr(model, "get_output_embeddings", None)
    head = accessor() if callable(accessor) else None
    if isinstance(head, nn.Module):
        return {head}
    modules = model.named_modules(remove_duplicate=False)
    return {module for name, module in modules if name.rsplit(".", 1)[-1] in HEAD_NAMES}


def _no_match(model: nn.Module, layers: dict[str, nn.Module], pattern: Pattern, role: str) -> str:
    if not isinstance(pattern, str) or pattern == "all-linear":
        return f"{role} {pattern!r} matches none of the {len(layers)} layers that can be adapted"
    for name, module in model.named_modules():
        if name and name not in layers and _name_matches(pattern, name):
            why = f"only {CAN}"
            if role == "overrides":
                why = "not in the target"
            elif any(inner.startswith(f"{name}.") for inner in layers):
                why += f"; what is inside it is {pattern + '..*'!r}"
            elif isinstance(module, nn.Linear):
                why += ", and not their subclasses, which may have ways of their own"
            return f"{role} {pattern!r} matches {name}, a {type(module).__name__}: {why}"
    shown = near(pattern, layers)
    return f"{role} {pattern!r} matches no nn.Linear or other layer that can be adapted{shown}"
