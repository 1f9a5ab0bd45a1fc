"""Regular expressions that others wrote, matched in bounded time.

Python's matcher tries every way to divide a text among what an expression repeats: of (a+)+ there
are 2^n for n characters, of k stars in a row n^k / k!. Such a number is known from the expression
before it runs.
"""

import math
import re
import warnings
from functools import lru_cache
from typing import Any

MOST_WAYS = 2e7  # of one match: less than a second
LONGEST = 10_000  # characters of an expression
CHOICE = 0.2  # of 2^k ways for k choices, as a power of a path of some 30 characters


def match(pattern: str, text: str, whole: bool) -> re.Match[str] | None:
    """re.fullmatch, or re.match unless `whole`.

    ValueError for what is no regular expression, or one that could take for ever.
    """
    expression, power = _compiled(pattern)
    ways = 1.0 if not power else math.inf
    if power and math.isfinite(power):
        n = max(len(text), 2)
        ways = math.exp(min(power * math.log(n) - math.lgamma(power + 1), 700))
    if ways > MOST_WAYS:
        raise ValueError(
            f"{pattern!r:.200} repeats what repeats, and could take for ever: name the layers"
        )
    return expression.fullmatch(text) if whole else expression.match(text)


@lru_cache(8192)
def _compiled(pattern: str) -> tuple[re.Pattern[str], float]:
    """The expression, and the power of the text's length with which its ways grow."""
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"longer than {LONGEST} characters")
        with warnings.catch_warnings(action="ignore"):  # of Python's plans for its syntax
            parsed: Any = re._parser.parse(pattern)  # type: ignore[attr-defined]
            return re.compile(pattern), _power(parsed)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        text = f"{pattern!r:.200} is not a regular expression: {error!s:.200}"
        raise ValueError(text) from None


def _power(parsed: Any) -> float:
    """Of a sequence of parsed nodes: what repeats adds one, what repeats a repetition has none."""
    return sum(_of_node(str(operation), value) for operation, value in parsed)


def _of_node(operation: str, value: Any) -> float:
    if operation.endswith("_REPEAT"):
        low, high, body = value
        inner = _power(body)
        if high <= 4 or (low == high and not inner):
            return int(high) * inner + (CHOICE * (int(high) - low) if high > low else 0)
        return 1.0 if not inner else math.inf
    if operation == "BRANCH":
        alternatives = value[1]
        firsts = [repr(a[0]) if len(a) and str(a[0][0]) == "LITERAL" else "" for a in alternatives]
        literal = max((firsts.count(first) for first in firsts if first), default=0)
        most = max(literal + firsts.count(""), 1)  # that can begin with the same character
        return max(map(_power, alternatives)) + CHOICE * math.log2(most)
    # Groups, conditions and looks ahead hold sequences somewhere among their values.
    values = value if isinstance(value, list | tuple) else [value]
    return sum(_power(v) for v in values if type(v).__name__ == "SubPattern")
