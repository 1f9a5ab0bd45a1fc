"""Names of tensors as checkpoints have them, and the module paths they stand for."""

import re
from collections.abc import Callable, Iterable, Set

from structadapt import bounds
from structadapt.interop.peft_config import PREFIX
from structadapt.layers import plain_name
from structadapt.spectra.reading.matrix import DTYPES, SourceError, Stored

Patterns = str | Iterable[str] | None

STACKS = re.compile(r"experts?\b|moe", re.IGNORECASE)
# What stands beside the packed values of a quantised weight.
OF_A_PACK = re.compile(
    r"(^|[._])(scales?|scale_inv|absmax|nested_absmax|quant_map|nested_quant_map|SCB|zeros"
    r"|qzeros|zero_point|channel_scale)$"
)
WEIGHT = re.compile(r"(weight|kernel)(_\w+)?(\.original\d*)?$")  # of a convolution too
PACKED = re.compile(r"u?int|bool|float(8|4|6)")


def module_path(key: str) -> str:
    """The path of the module that a tensor is the weight of: without DDP's `module.`, what
    torch.compile, FSDP and PEFT put in between, and `.weight`."""
    path = plain_name(key)
    while path.startswith("module."):
        path = path.removeprefix("module.")
    path = path.removeprefix(PREFIX)
    path = re.sub(r"(^|\.)modules_to_save\.[^.]+\.", r"\1", path)
    parts = [part for part in path.split(".") if part not in ("base_layer", "original_module")]
    return ".".join(parts[:-1] if parts[-1] == "weight" else parts)


def unfit_name(key: object) -> str:
    """Why a tensor cannot have this name, or nothing."""
    if not isinstance(key, str):
        return f"its name is {type(key).__name__} {key!r:.60}, no text"
    return bounds.unfit_name(key)


def is_stack(stored: Stored) -> bool:
    """Whether a 3-D tensor is one matrix for each expert, and no kernel of a convolution."""
    known = STACKS.search(stored.name) is not None or WEIGHT.search(stored.name) is None
    return len(stored.shape) == 3 and known and not is_plane(stored)


def is_plane(stored: Stored) -> bool:
    """Whether a tensor is (1, a, b), as position embeddings are, and no weight of experts."""
    known = STACKS.search(stored.name) is not None or WEIGHT.search(stored.name) is not None
    return len(stored.shape) == 3 and stored.shape[0] == 1 and not known


def reason_to_skip(stored: Stored, packs: set[str]) -> str:
    """Why a stored tensor holds no matrix that can be looked at, or nothing."""
    if stored.problem:
        return stored.problem
    if 0 in stored.shape:
        return f"empty, {' x '.join(map(str, stored.shape))}: a placeholder of a sharded model?"
    if reason := _no_matrix(stored):
        return reason
    if stored.dtype.startswith("float8"):
        return f"{stored.dtype}: what its scales are is not known here; convert it to bfloat16"
    if stored.dtype not in DTYPES:
        return f"{stored.dtype}: integers or packed values, no matrix of floats"
    if OF_A_PACK.search(stored.name) and _stem(stored.name) in packs:
        return "belongs to a quantised weight: dequantise the checkpoint first"
    if len(stored.shape) < 2:
        return f"{len(stored.shape)}-D, no matrix"
    return ""


def _no_matrix(stored: Stored) -> str:
    """Why a tensor of three dimensions or more that is no weight is no matrix, or nothing: a
    token of vision models is (1, 1, d), a mask of GPT-2 (1, 1, n, n)."""
    shape = stored.shape
    if len(shape) < 3 or WEIGHT.search(stored.name):
        return ""
    if sum(side > 1 for side in shape) < 2:
        return f"no matrix: {' x '.join(map(str, shape))} is a vector"
    if len(shape) > 3 and (stored.dtype in DTYPES or shape[:2] == (1, 1)):
        return f"no matrix: {len(shape)}-D and no weight of a convolution, a mask?"
    return ""


def packs_of(tensors: Iterable[Stored]) -> set[str]:
    """The modules that hold packed values, which are no floats."""
    return {_stem(t.name) for t in tensors if PACKED.match(t.dtype) and len(t.shape) > 1}


def _stem(name: str) -> str:
    """The module that holds a tensor; bitsandbytes puts names behind `.weight`."""
    stem = name.rpartition(".")[0]
    return stem.removesuffix(".weight")


def shared_prefix(missing: list[str], base: Set[str]) -> tuple[str, str]:
    """(to strip, to add) with which the base has the most of the names that it lacks, and at least
    half of them: `transformer.h.0` where the base has `h.0`. ("", "") if there is none."""
    found = set()
    for known in base:
        if missing[0].endswith(f".{known}"):
            found.add((missing[0][: -len(known)], ""))
        if known.endswith(f".{missing[0]}"):
            found.add(("", known[: -len(missing[0])]))
    fits = {pair: sum(renamed(name, pair) in base for name in missing) for pair in sorted(found)}
    best = max(fits, key=lambda pair: fits[pair], default=("", ""))
    return best if best in fits and 2 * fits[best] >= len(missing) else ("", "")


def renamed(name: str, pair: tuple[str, str]) -> str:
    """A name with one prefix instead of another; empty where it does not begin with it."""
    strip, add = pair
    return add + name[len(strip) :] if name.startswith(strip) else ""


def chosen_by(include: Patterns, exclude: Patterns) -> Callable[[str], bool]:
    """Whether a name has one of the expressions to include, if there are any, and none of those to
    exclude. SourceError for what is no regular expression."""
    wanted, unwanted = _compiled(include, "include"), _compiled(exclude, "exclude")

    def chosen(name: str) -> bool:
        included = not wanted or any(pattern.search(name) for pattern in wanted)
        return included and not any(pattern.search(name) for pattern in unwanted)

    return chosen


def _compiled(patterns: Patterns, what: str) -> list[re.Pattern[str]]:
    given = [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    try:
        return [re.compile(pattern) for pattern in given]
    except (re.error, RecursionError, TypeError) as error:
        raise SourceError(f"{what}={patterns!r} is no regular expression: {error}") from None
