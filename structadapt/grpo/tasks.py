"""Records to train on, and the rewards that go with them.

A record is a dict that JSON can hold, with "prompt" and "answer"; see `grpo.rewards`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from structadapt.bounds import quoted
from structadapt.grpo import verifiers
from structadapt.grpo.sandbox import sandboxed

Line = bytes | Mapping[str, Any]  # a line of a JSONL file, or one already read
SHOWN = 10  # malformed rows that an error names
BOXED = "{question}\n\nReason step by step, and put the final answer in \\boxed{}."
DEEPMATH = ("question", "final_answer", "difficulty", "topic")


def load_jsonl(
    path: str | Path, prompt: str = "prompt", answer: str = "answer"
) -> list[dict[str, Any]]:
    """The records of a file with one JSON object a line, in UTF-8.

    prompt, answer: the fields that become "prompt" (text, or token ids) and "answer" (not null);
    the other fields stay as they are.

    Raises one ValueError for all malformed lines, empty ones too: it names up to ten by number. And
    for a file without a line.
    """

    def convert(row: Line) -> dict[str, Any]:
        fields = _object(row)
        _need(fields, (prompt, answer))
        question = fields[prompt]
        ids = isinstance(question, list) and all(type(token) is int for token in question)
        if not question or not (isinstance(question, str) or ids):
            raise ValueError(f'"{prompt}" is {quoted(question)}, neither text nor token ids')
        rest = {name: value for name, value in fields.items() if name not in (prompt, answer)}
        if clash := rest.keys() & {"prompt", "answer"}:
            raise ValueError(f'has "{min(clash)}" beside "{prompt}" and "{answer}"')
        return {"prompt": question, "answer": fields[answer], **rest}

    records = _convert(_lines(Path(path)), convert)
    if not records:
        raise ValueError(f"{path} has no line")
    return records


def load_deepmath(
    source: str | Path,
    min_difficulty: float | None = None,
    max_difficulty: float | None = None,
    template: str = BOXED,
) -> list[dict[str, Any]]:
    """DeepMath-103K (He et al. 2025), or its problems of some difficulty, both ends included.

    source: a .jsonl or .parquet file, a folder that has some at any depth, or else the name of a
        dataset on the Hugging Face Hub, whose "train" split is read ("zwhe99/DeepMath-103K").
    template: "{question}" in it is replaced by the question; its other braces stay.
    Records have "prompt", "answer", "difficulty" and "topic". Answers are LaTeX, and not only
    numbers: `math_verify_reward` compares them, `numeric_match` refuses some.

    Raises ValueError for fields that are missing or of the wrong type, naming up to ten rows; for
    a difficulty that no row has, naming the range that there is; for a file of another kind.
    ImportError without pyarrow for .parquet, or without datasets for the Hub.
    """
    if "{question}" not in template:
        raise ValueError(f"template must contain {{question}}, got {template!r}")

    def convert(row: Line) -> dict[str, Any]:
        fields = _object(row)
        _need(fields, DEEPMATH)
        question, answer, difficulty, topic = (fields[name] for name in DEEPMATH)
        for name in ("question", "final_answer", "topic"):
            if not (isinstance(fields[name], str) and fields[name].strip()):
                raise ValueError(f'"{name}" is {quoted(fields[name])}, not text')
        number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool)
        if not (number and math.isfinite(difficulty)):
            raise ValueError(f'"difficulty" is {quoted(difficulty)}, not a finite number')
        prompt = template.replace("{question}", question)
        return {"prompt": prompt, "answer": answer, "difficulty": difficulty, "topic": topic}

    records = _convert(_deepmath_rows(source), convert)
    low = -math.inf if min_difficulty is None else min_difficulty
    high = math.inf if max_difficulty is None else max_difficulty
    kept = [record for record in records if low <= record["difficulty"] <= high]
    if not kept:
        found = [record["difficulty"] for record in records]
        span = f"they go from {min(found)} to {max(found)}" if found else "there are none"
        raise ValueError(
            f"{source}: no row of {len(records)} has a difficulty from {low} to {high}; {span}"
        )
    return kept


# -- other libraries' tasks and verifiers ----------------------------------------------------------


def math_verify_reward(*, seconds: float = 4.0, memory: int = 2**30) -> Callable[..., Any]:
    """A reward: 1.0 if math-verify finds the completion's expression equal to meta["answer"].

    It runs in a `Sandbox`. math-verify gives up by itself after a second on a step, for a reward of
    0.0; what it cannot stop by itself ends after `seconds`, as a fault. Raises ImportError without
    math-verify.
    """
    verifiers.library("math_verify", "tasks")
    return _foreign("math_verify", {}, seconds, memory)


def reasoning_gym(
    name: str,
    size: int,
    seed: int,
    *,
    seconds: float = 4.0,
    memory: int = 2**30,
    **options: Any,
) -> tuple[list[dict[str, Any]], Callable[..., Any]]:
    """Records of a reasoning-gym dataset, and the reward that it defines, in a `Sandbox`.

    options: the dataset's own. Scored is what stands in the last <answer>...</answer> of a
    completion, else all of it; many datasets give part of 1.0 for what is not quite right.
    Records have "prompt", "answer" (one that is right, or None), and "question" and "index", which
    the reward needs: prompts may be changed.

    Raises ImportError without reasoning-gym; what it raises for a name or option that it does not
    know.
    """
    options = {"size": size, "seed": seed, **options}
    dataset = verifiers.library("reasoning_gym", "tasks").create_dataset(name, **options)
    records = []
    for index in range(size):
        item = dataset[index]
        question, answer = item["question"], item["answer"]
        text = answer if answer is None else str(answer)
        records.append({"prompt": question, "answer": text, "question": question, "index": index})
    return records, _foreign("reasoning_gym", {"name": name, "options": options}, seconds, memory)


def _foreign(
    verifier: str, setup: dict[str, Any], seconds: float, memory: int
) -> Callable[..., Any]:
    place = f"{verifiers.__file__}:{verifier}"
    return sandboxed(place, seconds=seconds, memory=memory, setup=setup)


# -- rows and what is wrong with them --------------------------------------------------------------


def _convert(
    rows: Iterable[tuple[str, Line]], convert: Callable[[Line], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every row converted, or one ValueError for the first few that cannot be."""
    records: list[dict[str, Any]] = []
    wrong: list[str] = []
    for where, row in rows:
        try:
            records.append(convert(row))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            if len(wrong) == SHOWN:
                wrong.append("and there may be more")
                break
    if wrong:
        raise ValueError("malformed rows:\n" + "\n".join(wrong))
    return records


def _object(row: Line) -> Mapping[str, Any]:
    if not isinstance(row, bytes):
        return row
    if not row.strip():
        raise ValueError("is empty")
    try:
        fields = json.loads(row.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"is {quoted(fields)}, not an object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has no {name}")


def _need(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    if missing := [name for name in names if fields.get(name) is None]:
        raise ValueError(f"has no {', '.join(map(repr, missing))}, but {quoted(list(fields))}")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", line


def _deepmath_rows(source: str | Path) -> Iterator[tuple[str, Line]]:
    path = Path(source)
    kinds = {".jsonl": _lines, ".parquet": _parquet}
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in kinds)
        if not files:
            raise ValueError(f"{path} has no .jsonl or .parquet file")
    elif path.exists() or path.suffix in kinds:
        if path.suffix not in kinds:
            raise ValueError(f"{path} is neither a .jsonl nor a .parquet file")
        files = [path]
    else:
        yield from _hub(str(source))
        return
    for file in files:
        yield from kinds[file.suffix](file)


def _parquet(path: Path) -> Iterator[tuple[str, Line]]:
    """Without the columns of solutions, which are most of the file."""
    table = verifiers.library("pyarrow.parquet").ParquetFile(path)
    _need_columns(str(path), table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(columns=list(DEEPMATH)):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _hub(name: str) -> Iterator[tuple[str, Line]]:
    dataset = verifiers.library("datasets").load_dataset(name, split="train")
    _need_columns(name, dataset.column_names)
    for number, row in enumerate(dataset.select_columns(list(DEEPMATH)), 1):
        yield f"{name}, row {number}", row


def _need_columns(where: str, names: list[str]) -> None:
    if missing := [name for name in DEEPMATH if name not in names]:
        raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}, but {names}")
