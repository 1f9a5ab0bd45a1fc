"""A grid of runs in one TOML file, and the cells that it names.

    name = "small"

    [run]                                   # what all cells share; [[cells]] may say otherwise
    model = "tiny"
    task = "addition"
    prompts = 2048

    [[cells]]                               # each table is the product of its lists
    adapter = "lora"
    rank = [8, 64, 256]
    scale = [{alpha = "2r"}, {alpha = 16}, {alpha = 5.657, scaling = "alpha/sqrt(r)"}]
    lr = [1e-3, 3e-3]
    seed = [0, 1, 2]

    [grpo]                                  # further fields of grpo.Config
    loss = "dapo"

    [cluster.submitit]                      # options of a Slurm job; [cluster.ray]: of a task
    timeout_min = 240

The keys are the fields of `Cell`. A cell is one run in a folder of its own, named by what is in it:
two tables that name the same run name one cell.
"""

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from structadapt.study.cell import Cell, config

ENGINES = ("submitit", "ray")  # of a cluster


@dataclass(frozen=True)
class Grid:
    """The cells of a study, each once."""

    name: str
    cells: tuple[Cell, ...]
    cluster: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""  # of the file

    def cell(self, name: str) -> Cell:
        """The cell of a name, or of a number from 0. ValueError, with near names, for none."""
        by_name = {cell.id: cell for cell in self.cells}
        if name in by_name:
            return by_name[name]
        if name.isdigit() and int(name) < len(self.cells):
            return self.cells[int(name)]
        raise ValueError(
            f"no cell {name!r} in the grid {self.name!r}, which has {len(self.cells)}"
            + _near(name, by_name)
        )


def shipped() -> list[str]:
    """The names of the grids that come with the library."""
    folder = files("structadapt.study") / "grids"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def read(source: str | Path) -> Grid:
    """The grid of a file, or a shipped one by its name.

    Raises ValueError for a file that is no such grid, and says which table and key is wrong;
    OSError for one that cannot be read.
    """
    path = Path(source)
    if not path.suffix and not path.is_file():
        if str(source) not in shipped():
            raise ValueError(
                f"no grid {str(source)!r}: give a .toml file, or one of {', '.join(shipped())}"
            )
        path = Path(str(files("structadapt.study") / "grids" / f"{source}.toml"))
    try:
        return parse(path.read_text(), path.stem)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def parse(text: str, name: str = "study") -> Grid:
    """The grid of a text. ValueError for one that is none."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from None
    known: dict[str, type] = {
        "name": str,
        "run": dict,
        "cells": list,
        "grpo": dict,
        "cluster": dict,
    }
    _only(content, known, "the file")
    for key, kind in known.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"{key} must be a {kind.__name__} in TOML")
    cluster = content.get("cluster", {})
    _only(cluster, ENGINES, "[cluster]")
    tables = content.get("cells", [])
    if not tables:
        raise ValueError("no [[cells]]: there is nothing to run")
    shared = content.get("run", {})
    found: dict[str, Cell] = {}
    for number, table in enumerate(tables, 1):
        where = f"[[cells]] {number}"
        if not isinstance(table, dict):
            raise ValueError(f"{where} must be a table")
        try:
            for cell in _product(_over(shared, table), content.get("grpo", {})):
                _config_check(cell)
                found.setdefault(cell.id, cell)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from None
    return Grid(content.get("name", name), tuple(found.values()), cluster, text)


def _over(shared: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A table, and what all cells share where it says nothing. ValueError for what would be said
    twice."""
    whole = {**shared, **table}
    scales = whole.get("scale", {})
    for scale in scales if isinstance(scales, list) else [scales]:
        for name in ("alpha", "scaling"):
            meant = "scale" in table and name not in table  # it may say otherwise than [run]
            if name in whole and isinstance(scale, dict) and name in scale and not meant:
                raise ValueError(
                    f"{name} = {whole[name]!r} and scale = {scale!r} both say {name}: leave one out"
                )
    return whole


def _product(table: Mapping[str, Any], grpo: Mapping[str, Any]) -> Iterable[Cell]:
    """Every combination of the lists in a table."""
    names = [f.name for f in fields(Cell) if f.name != "grpo"]
    _only(table, [*names, "scale"], "it")
    table = dict(table)
    scales = table.pop("scale", {})
    scales = scales if isinstance(scales, list) else [scales]
    for scale in scales:
        if not isinstance(scale, dict):
            raise ValueError(f'scale must be a table as {{alpha = "2r"}}, got {scale!r}')
        _only(scale, ("alpha", "scaling"), "scale")
    lists = {k: v if isinstance(v, list) else [v] for k, v in table.items()}
    empty = [name for name, values in lists.items() if not values]
    if empty or not scales:
        raise ValueError(f"{(*empty, 'scale')[0]} is an empty list: no cell is named")
    missing = [name for name in ("adapter", "lr") if name not in table]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    for values in itertools.product(*lists.values()):
        for scale in scales:
            given = dict(zip(lists, values, strict=True))
            yield Cell(**{**given, **scale}, grpo=dict(grpo))


def _config_check(cell: Cell) -> None:
    """ValueError for what grpo.Config would refuse."""
    try:
        config(cell, 0, 0, 1)
    except TypeError as error:
        raise ValueError(f"[grpo]: {error}") from None


def _only(table: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in table:
        if name not in known:
            raise ValueError(f"{what} has no {name!r}{_near(name, known)}")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f"; near: {', '.join(close)}" if close else ""
