"""Which layers a target names."""

import difflib
import re
from collections.abc import Callable, Iterable

from torch import nn

Pattern = str | Callable[[str, nn.Module], bool]
Target = Pattern | Iterable[Pattern]

HEAD_NAMES = ("lm_head", "embed_out")


def select(
    model: nn.Module, layers: dict[str, nn.Linear], target: Target, role: str
) -> dict[str, nn.Linear]:
    """The layers that match any of the patterns, in model order. `role` names the argument.

    Raises ValueError for a pattern that matches none, also when it is one of several.
    """
    patterns = [target] if isinstance(target, str) or callable(target) else list(target)
    names: set[str] = set()
    for pattern in patterns:
        found = {name for name, layer in layers.items() if _matches(pattern, name, layer, model)}
        if not found:
            raise ValueError(_no_match(model, layers, pattern, role))
        names |= found
    return {name: layer for name, layer in layers.items() if name in names}


def near(name: str, names: Iterable[str]) -> str:
    """' (near: ...)' with a few names like `name`, or of all kinds if none is; for messages."""
    by_suffix: dict[str, str] = {}
    for full in names:
        by_suffix.setdefault(full.rsplit(".", 1)[-1], full)
    close = difflib.get_close_matches(name, [*by_suffix, *by_suffix.values()], n=3, cutoff=0.5)
    shown = list(dict.fromkeys(by_suffix.get(n, n) for n in close)) or list(by_suffix.values())[:6]
    return f" (near: {', '.join(shown)})" if shown else ""


def _matches(pattern: Pattern, name: str, module: nn.Module, model: nn.Module) -> bool:
    if pattern == "all-linear":
        return name not in _output_heads(model)
    return _name_matches(pattern, name) if isinstance(pattern, str) else pattern(name, module)


def _name_matches(pattern: str, name: str) -> bool:
    """The expression matches the whole path, or all that follows one of its dots."""
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def _output_heads(model: nn.Module) -> set[str]:
    """Layers that turn hidden states into logits: by transformers' accessor, else by name."""
    accessor = getattr(model, "get_output_embeddings", None)
    head = accessor() if callable(accessor) else None
    if head is not None:
        return {name for name, module in model.named_modules() if module is head}
    return {n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in HEAD_NAMES}


def _no_match(model: nn.Module, layers: dict[str, nn.Linear], pattern: Pattern, role: str) -> str:
    if not isinstance(pattern, str) or pattern == "all-linear":
        return f"{role} {pattern!r} matches none of the model's {len(layers)} nn.Linear layers"
    for name, module in model.named_modules():
        if name and name not in layers and _name_matches(pattern, name):
            kind = type(module).__name__
            return f"{role} {pattern!r} matches {name}, a {kind}: only nn.Linear can be adapted"
    return f"{role} {pattern!r} matches no nn.Linear{near(pattern, layers)}"
