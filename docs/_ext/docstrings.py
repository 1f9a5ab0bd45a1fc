"""The library's docstrings are plain prose; autodoc wants reStructuredText. This turns one into the
other:

    name: what it means         -> an entry of a definition list, where `name` is a parameter
    an indented block           -> a literal block: formulas and examples
    `name`                      -> a link where there is something of that name
    *, |, _ and backslashes     -> themselves

A dataclass gets a list of its fields, with the comment that follows each in the source.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from sphinx.application import Sphinx

ENTRY = re.compile(r'^(\w+(?:, \w+)*|"\w+"): +(\S.*)$')
CODE = re.compile(r"(`+)(.+?)\1")
NAME = re.compile(r"[A-Za-z_][\w.]*")
LONG = 6  # fields from which on the signature of a dataclass is left to the list of its fields


def escaped(text: str) -> str:
    """Plain words, whatever reStructuredText would read into them."""
    text = re.sub(r"([\\*|])", r"\\\1", text)
    return re.sub(r"_(?=\W|$)", r"\\_", text)


def inline(text: str) -> str:
    """A line or more of prose."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts.append(escaped(text[end : found.start()]))
        code, end = found[2], found.end()
        reference = NAME.fullmatch(code) and not keeps_glued(text, found)
        parts.append(f":py:obj:`{code}`" if reference else f"``{code}``")
        if keeps_glued(text, found):
            parts.append("\\ ")
    return "".join([*parts, escaped(text[end:])])


def keeps_glued(text: str, found: re.Match[str]) -> bool:
    """Whether a word goes on right after the code: `name`s."""
    return text[found.end() : found.end() + 1].isalnum()


def restructured(lines: list[str], names: Iterable[str]) -> list[str]:
    """A docstring, dedented, as reStructuredText. names: of the parameters."""
    known, out = {*names}, []
    blocks = iter(grouped(lines))
    for indented, block in blocks:
        if indented:
            plain = (CODE.sub(r"\2", line) for line in block)
            out += ["::", "", *(f"    {line}".rstrip() for line in plain), ""]
            continue
        entries = entries_of(block, known)
        if entries is None:
            out += [*inline("\n".join(block)).split("\n"), ""]
            continue
        for name, text in entries:
            shown = ", ".join(f"``{n}``" for n in name.split(", "))
            out += [shown, f"    {inline(text)}", ""]
    return out


def grouped(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """(whether it is an indented block, its lines), in order. Lines that hang below an entry belong
    to it."""
    found: list[tuple[bool, list[str]]] = []
    fresh, entry = True, False
    for line in lines:
        if not line.strip():
            fresh = True
            if found and found[-1][0]:
                found[-1][1].append("")
            continue
        inner = line.startswith(" ")
        entry = ENTRY.match(line) is not None or (entry and (inner or not fresh))
        if inner and not (entry and not fresh):
            if not (found and found[-1][0]):
                found.append((True, []))
            found[-1][1].append(line)
        elif fresh or not found or found[-1][0]:
            found.append((False, [line]))
        else:
            found[-1][1].append(line)
        fresh = False
    for indented, block in found:
        while indented and not block[-1]:
            block.pop()
        if indented:
            block[:] = textwrap.dedent("\n".join(block)).split("\n")
    return found


def entries_of(block: list[str], known: set[str]) -> list[tuple[str, str]] | None:
    """(name, text) of each entry, if the block is made of them."""
    entries: list[tuple[str, str]] = []
    for line in block:
        match = ENTRY.match(line)
        quoted = match is not None and match[1].startswith('"')
        if match and (quoted or {*match[1].split(", ")} <= known):
            entries.append((match[1], match[2]))
        elif not entries:
            return None
        else:
            name, text = entries.pop()
            entries.append((name, f"{text} {line.strip()}"))
    return [part for name, text in entries for part in told_apart(name, text, known)]


def told_apart(name: str, text: str, known: set[str]) -> list[tuple[str, str]]:
    """An entry and those that follow it on its lines: "... text. other: its text"."""
    parts, begin = [], 0
    for found in re.finditer(r"(?<=[.)]) (\w+(?:, \w+)*): ", text):
        if {*found[1].split(", ")} <= known:
            parts.append((name, text[begin : found.start()]))
            name, begin = found[1], found.end()
    return [*parts, (name, text[begin:])]


# -- dataclasses -----------------------------------------------------------------------------------


def fields_of(cls: type) -> list[str]:
    """The fields of a dataclass with type, default and the comment in the source."""
    rows = []
    for owner in reversed(cls.__mro__):
        ours = owner.__module__.startswith("structadapt")
        if not (ours and dataclasses.is_dataclass(owner) and "__annotations__" in vars(owner)):
            continue
        source = textwrap.dedent(inspect.getsource(owner)).split("\n")
        (body,) = ast.parse("\n".join(source)).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                kind = ast.unparse(node.annotation)
                if "ClassVar" in kind or node.target.id.startswith("_"):
                    continue
                default = f" = {ast.unparse(node.value)}" if node.value else ""
                comment = source[(node.end_lineno or 1) - 1].partition("  # ")[2].strip()
                rows = [row for row in rows if row[0] != node.target.id]
                rows.append((node.target.id, f"{kind}{default}", comment))
    own = inspect.get_annotations(cls)
    if not any(comment and name in own for name, _, comment in rows):
        return []
    out = [".. list-table::", "    :widths: auto", "    :header-rows: 1", ""]
    out += ["    * - field", "      - type and default", "      - meaning"]
    for name, kind, comment in rows:
        out += [f"    * - ``{name}``", f"      - ``{kind}``", f"      - {inline(comment)}".rstrip()]
    return [*out, ""]


def parameters(value: Any) -> set[str]:
    target = value.__init__ if inspect.isclass(value) else value
    try:
        names = set(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        names = set()
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        names |= {field.name for field in dataclasses.fields(value)}
    return names


def process_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = restructured(lines, parameters(value))
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        lines += ["", *fields_of(value)]


def process_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: Any, returned: Any
) -> tuple[str, Any] | None:
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        crowded = len(dataclasses.fields(value)) > LONG or "<factory>" in (signature or "")
        return ("(...)", returned) if crowded else None
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    return {"parallel_read_safe": True}
