"""Where a matrix sits in a model, read from its name: the layer, and what it is there."""

from collections import defaultdict
from collections.abc import Iterable

Place = tuple[int | None, str]


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """(layer, module type) of every name.

    The layer is the first number in the path, None where there is none. The module type is the last
    word behind it, with as many words before as it takes to tell the types of these names apart:
    `model.layers.3.self_attn.q_proj` is (3, "q_proj"); BERT's `...0.attention.output.dense` and
    `...0.output.dense` are "attention.output.dense" and "output.dense". Other numbers, those of
    experts, do not count.
    """
    split = {name: _split(name) for name in names}
    tails = {tail for _, _, tail in split.values()}
    short = {tail: _shortest(tail, tails) for tail in tails}
    stacks: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for stack, _, tail in split.values():
        stacks[tail].add(stack)
    return {
        name: (layer, f"{stack}.{short[tail]}" if len(stacks[tail]) > 1 and stack else short[tail])
        for name, (stack, layer, tail) in split.items()
    }


def _split(name: str) -> tuple[str, int | None, tuple[str, ...]]:
    """(the stack of layers, such as "decoder", the layer, the words behind)."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return "", None, tuple(parts)
    words = tuple(part for part in parts[first:] if not part.isdecimal())
    before = parts[:first]
    if not words:  # nn.Sequential: "mlp.0"
        return "", int(parts[first]), tuple(before) or ("layer",)
    return (before[-2] if len(before) > 1 else ""), int(parts[first]), words


def _shortest(tail: tuple[str, ...], tails: set[tuple[str, ...]]) -> str:
    """The shortest end of a path that no other path ends in, or all of it."""
    others = [other for other in tails if other != tail]
    for length in range(1, len(tail)):
        if all(other[-length:] != tail[-length:] for other in others):
            return ".".join(tail[-length:])
    return ".".join(tail)
