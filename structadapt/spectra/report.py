"""Spectra of many matrices: one record a matrix, what was left out and why, and the files read."""

import csv
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from structadapt.files import whole_folder, write_atomically
from structadapt.spectra.columns import COLUMNS, CONVENTIONS, SCHEMA

Record = dict[str, Any]
Where = str | os.PathLike[str]
WITHOUT_BASE = "without its base: "  # a row's reason, where one was asked for
NAMELESS = "(no name)"
SAVED = ("report.json", "spectra.safetensors")


class NothingToShowError(ValueError):
    """A report without what one of its outputs shows, which is no fault of it."""


@dataclass(frozen=True)
class Report:
    """What `analyze` found. `docs/spectra.md` says what every field of a row means.

    rows: one record a matrix, keys are `COLUMNS`; None where there is nothing to say.
    skipped: {name, shape, dtype, source, reason} of every tensor that is no row.
    notes: what a reader of the figures has to know.
    spectra: singular values by name, largest first, float64. Where an adapter has two rows for a
        module, `name (direction)` holds those of its direction.
    about: source, base, files with their sizes, method, device, versions, seconds.
    """

    rows: list[Record] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spectra: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def spectrum(self, name: str, kind: str | None = None) -> np.ndarray:
        """The singular values of one matrix. KeyError, with near names, if there are none."""
        key = f"{name} ({kind})"
        if key in self.spectra or name in self.spectra:
            return self.spectra[key] if key in self.spectra else self.spectra[name]
        near = [known for known in self.spectra if name in known][:3]
        raise KeyError(f"no spectrum of {name!r}" + (f" (near: {', '.join(near)})" if near else ""))

    def to_dict(self) -> dict[str, Any]:
        """All but `spectra` as plain values that strict JSON can hold."""
        whole = {
            "schema": SCHEMA,
            "rows": self.rows,
            "skipped": self.skipped,
            "notes": self.notes,
            "conventions": CONVENTIONS,
            **self.about,
        }
        return plain(whole)

    def to_json(self, path: Where) -> None:
        """Write `to_dict()` as strict JSON: {"rows": [...], "skipped": [...], ...}."""
        text = json.dumps(self.to_dict(), allow_nan=False, indent=1, ensure_ascii=False)
        write_atomically(Path(path), f"{text}\n".encode("utf-8", "backslashreplace"))

    def to_csv(self, path: Where) -> None:
        """Write one line a matrix under a line of column names; an empty cell is None. A text that
        a spreadsheet would take for a formula, such as a name with = in front, begins with '."""
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in self.rows:
            texts = {c: _no_formula(v) for c, v in row.items() if isinstance(v, str)}
            writer.writerow({**row, **texts, "shape": "x".join(map(str, row["shape"]))})
        write_atomically(Path(path), file.getvalue().encode("utf-8", "backslashreplace"))

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises ImportError if pandas is not installed."""
        try:
            import pandas  # type: ignore[import-not-found,import-untyped]
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def to_markdown(self, columns: Iterable[str] | None = None) -> str:
        """The rows as a Markdown table: some columns, or all in which something stands. KeyError
        for what is no column."""
        if columns is None:
            columns = [c for c in COLUMNS if any(row[c] is not None for row in self.rows)]
        columns = list(columns) or list(COLUMNS)
        for name in columns:
            _refuse_unknown(name)
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in self.rows:
            cells = (shown(row[column]).replace("|", "\\|") for column in columns)
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def summary(self, by: str = "module_type") -> list[dict[str, Any]]:
        """For every value of a column: {by, kind, count, and for each measure its median, q25,
        q75, low and high}, over the rows that have one. KeyError for what is no column."""
        _refuse_unknown(by)
        groups: dict[tuple[Any, str], list[Record]] = defaultdict(list)
        for row in self.rows:
            groups[row[by], row["kind"]].append(row)
        return [
            {by: key, "kind": kind, "count": len(rows), **spread(rows)}
            for (key, kind), rows in groups.items()
        ]

    def save(self, folder: Where) -> None:
        """Write report.json and the singular values into a folder of their own."""
        with whole_folder(folder, SAVED.__contains__) as new:
            self.to_json(new / SAVED[0])
            names = dict(enumerate(self.spectra))
            tensors = {str(i): self.spectra[name] for i, name in names.items()}
            header = {"names": json.dumps(list(self.spectra))}
            safetensors.numpy.save_file(tensors, new / SAVED[1], metadata=header)

    @classmethod
    def load(cls, folder: Where) -> "Report":
        """What `save` wrote. ValueError for another schema, or for damaged files."""
        path, tensors = (Path(folder) / name for name in SAVED)
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if whole.pop("schema", None) != SCHEMA:
                raise ValueError(f"another schema than {SCHEMA}: analyse again")
            rows = [{**row, "shape": tuple(row["shape"])} for row in whole.pop("rows")]
            with safetensors.safe_open(tensors, "np") as file:
                names = json.loads(file.metadata()["names"])
                spectra = {name: file.get_tensor(str(i)) for i, name in enumerate(names)}
            skipped = [{**s, "shape": tuple(s["shape"])} for s in whole.pop("skipped")]
            notes = whole.pop("notes")
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} holds no report that can be read: {error}") from None
        whole.pop("conventions", None)
        return cls(rows, skipped, notes, spectra, whole)


def _refuse_unknown(column: str) -> None:
    if column not in COLUMNS:
        raise KeyError(f"{column!r} is no column: {', '.join(COLUMNS)}")


def is_matrix(entry: dict[str, Any]) -> bool:
    """Whether what was skipped might be a weight: no vector, no index, no mask."""
    return len(entry["shape"]) > 1 and entry["dtype"] not in ("int64", "bool")


def usable(row: Record) -> bool:
    """Whether a row has values."""
    return row["status"] != "skipped"


def by_type(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """The rows of each module type."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        groups[row["module_type"]].append(row)
    return groups


def by_kind(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """The rows with values of each kind."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        if usable(row):
            groups[row["kind"]].append(row)
    return dict(groups)


def spread(rows: list[Record]) -> dict[str, dict[str, float]]:
    """`quartiles` of every numeric column."""
    found = {column: quartiles(rows, column) for column in COLUMNS if column != "layer"}
    return {column: values for column, values in found.items() if values is not None}


def quartiles(rows: Iterable[Record], column: str) -> dict[str, float] | None:
    """{median, q25, q75, low, high} of one column over the rows that have a number there."""
    values = [row[column] for row in rows if isinstance(row[column], int | float)]
    if not values:
        return None
    q = np.quantile(values, (0.5, 0.25, 0.75, 0, 1)).tolist()
    return dict(zip(("median", "q25", "q75", "low", "high"), q, strict=True))


def shown(value: Any, digits: int = 4) -> str:
    """A cell of a table, on one line."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def path_shown(name: str) -> str:
    """The path of a module in a cell: that of a matrix by itself is empty."""
    text = shown(name)
    return text if text.strip() else NAMELESS


def middle(name: str, width: int = 44) -> str:
    """A name without its middle where it is too long: the ends tell modules apart."""
    if len(name) <= width:
        return name
    return f"{name[: width // 3]}...{name[-(width - width // 3 - 3) :]}"


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def plain(value: Any) -> Any:
    """As strict JSON has it: lists for tuples, None for a number that is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
