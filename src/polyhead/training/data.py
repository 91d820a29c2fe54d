"""What a model is trained on: rows of texts with positives, negatives, labels or scores, from any table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyhead.data import SentencePairs
from polyhead.errors import InputError

__all__ = ["Examples", "Kind", "examples"]

Kind = Literal["texts", "labelled", "pairs", "triplets", "scored"]

# Names that other data sets give to the same thing.
_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence"),
    "anchor": ("anchor", "query", "question", "sentence1", "sentence_a", "first"),
    "positive": ("positive", "answer", "document", "passage", "sentence2", "sentence_b", "second"),
    "label": ("label", "labels", "class", "category"),
    "score": ("score", "scores", "similarity"),
}
_EXPECTED = (
    "anchor, positive (and negative, negative_2, ... or negatives: a list), with or without score; or text, label; "
    "or text alone"
)


@dataclass(frozen=True)
class Examples:
    """Rows to train on, in one form whatever they came as.

    Attributes:
        kind: "texts" (text), "labelled" (text, label), "pairs" (anchor, positive), "triplets" (anchor, positive,
            negative_1, ...) or "scored" (anchor, positive, score).
        columns: name -> values ``[rows]``, texts first and in this order, then label (int) or score (float).
        classes: what the labels stand for, where they were not integers.
    """

    kind: Kind
    columns: dict[str, list[Any]]
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def texts(self) -> list[str]:
        """Names of the columns that hold texts."""
        return [name for name in self.columns if name not in ("label", "score")]

    @property
    def fingerprint(self) -> str:
        """Of the whole content and its order: a run is resumed with the same data only."""
        digest = hashlib.sha256()
        for name, values in self.columns.items():
            digest.update(json.dumps([name, values], ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def dataset(self) -> Any:
        """As a ``datasets.Dataset``."""
        from datasets import Dataset

        return Dataset.from_dict(self.columns)


def examples(data: Any, columns: Mapping[str, str | Sequence[str]] | None = None) -> Examples:
    """Read training data and find out what its columns are.

    Args:
        data: a ``datasets.Dataset``, a list of dicts, a mapping of columns, :class:`~polyhead.data.SentencePairs`, or
            a ``.csv``, ``.tsv``, ``.json`` (list) or ``.jsonl`` file.
        columns: role -> column of the data, for roles text, anchor, positive, negatives (one or several), label and
            score; columns not named are left out. None: columns go by their names, and all must be known ones.

    Raises:
        InputError: columns that are missing, unknown or contradict each other, or a row without a text; says which.

    Example:
        >>> found = examples([{"query": "where", "answer": "here"}, {"query": "when", "answer": "now"}])
        >>> found.kind, list(found.columns)
        ('pairs', ['anchor', 'positive'])
    """
    if isinstance(data, Examples):
        return data
    table = _table(data)
    if not table or not len(next(iter(table.values()))):
        raise InputError(f"The training data holds no rows; expected columns {_EXPECTED}.")
    roles = _roles_given(table, columns) if columns is not None else _roles_found(table)
    return _examples(table, roles)


def _table(data: Any) -> dict[str, list[Any]]:
    """Any table as columns."""
    if isinstance(data, SentencePairs):
        first, second = ([pair[i] for pair in data.pairs] for i in (0, 1))
        return {"anchor": first, "positive": second, "score": [float(score) for score in data.gold]}
    if isinstance(data, (str, Path)):
        return _from_rows(_rows_of_file(Path(data)), str(data))
    if hasattr(data, "column_names") and isinstance(data.column_names, dict):
        raise InputError(
            f"Several splits were given ({', '.join(data.column_names)}); choose one, such as data['train']."
        )
    if hasattr(data, "column_names"):
        return {name: list(data[name]) for name in data.column_names}
    if isinstance(data, Mapping):
        lengths = {name: len(values) for name, values in data.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"Columns differ in length: {lengths}.")
        return {name: list(values) for name, values in data.items()}
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        return _from_rows(data, "the list")
    if isinstance(data, Sequence) and all(isinstance(row, str) for row in data):
        return {"text": list(data)}
    raise InputError(
        f"Training data was given as {type(data).__name__}; expected a datasets.Dataset, a list of dicts, a mapping of "
        "columns, SentencePairs, or a .csv, .tsv, .json or .jsonl file."
    )


def _rows_of_file(file: Path) -> list[Mapping[str, Any]]:
    if not file.is_file():
        raise InputError(f"No file '{file}'; expected a .csv, .tsv, .json or .jsonl file with columns {_EXPECTED}.")
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix in (".csv", ".tsv"):
        lines = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if file.suffix == ".csv" else "\t")
        return list(lines)
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if file.suffix == ".json":
            found: list[Mapping[str, Any]] = json.loads(text)
            return found
    except json.JSONDecodeError as error:
        raise InputError(f"'{file}' is not readable JSON: {error}.") from error
    raise InputError(f"'{file}' ends in {file.suffix!r}; expected .csv, .tsv, .json (a list of rows) or .jsonl.")


def _from_rows(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, list[Any]]:
    names = list(rows[0]) if rows else []
    for number, row in enumerate(rows):
        if list(row) != names and set(row) != set(names):
            raise InputError(f"Row {number} of {where} has columns {list(row)}, the first row has {names}.")
    return {name: [row[name] for row in rows] for name in names}


def _roles_found(table: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Role -> columns, by the columns' names."""
    roles: dict[str, list[str]] = {}
    for name in table:
        plain = name.strip().lower()
        role = next((role for role, known in _NAMES.items() if plain in known), None)
        if role is None and plain.startswith("negative"):
            role = "negatives"
        if role is None:
            raise InputError(
                f"Column {name!r} is none of those known; the data has {list(table)}, expected {_EXPECTED}. Say what "
                "columns are with columns={'anchor': ..., 'positive': ...} (--column on the command line); those not "
                "named are left out."
            )
        roles.setdefault(role, []).append(name)
    return roles


def _roles_given(table: dict[str, list[Any]], columns: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    known = (*_NAMES, "negatives")
    roles = {}
    for role, named in columns.items():
        role = "negatives" if role == "negative" else role
        names = [named] if isinstance(named, str) else list(named)
        if role not in known:
            raise InputError(f"columns names {role!r}, expected {', '.join(known)}.")
        missing = [name for name in names if name not in table]
        if missing:
            raise InputError(f"columns asks for {', '.join(missing)} as {role}; the data has {', '.join(table)}.")
        roles[role] = names
    return roles


def _examples(table: dict[str, list[Any]], roles: dict[str, list[str]]) -> Examples:
    for role, names in roles.items():
        if role != "negatives" and len(names) > 1:
            raise InputError(f"Columns {names} would all be the {role}; name one with columns={{{role!r}: ...}}.")
    one = {role: table[names[0]] for role, names in roles.items() if role != "negatives"}
    if "label" in one and "score" in one:
        raise InputError("The data has both labels and scores; name the columns to use with columns=...")
    if "positive" in one and "anchor" not in one and "text" in one:
        one["anchor"] = one.pop("text")
    if "anchor" in one and "positive" not in one and "text" not in one:
        one["text"] = one.pop("anchor")
    negatives = _negatives(table, roles.get("negatives", []))
    found = set(one)
    if "text" in found and not found - {"text", "label"} and not negatives:
        return _single(one)
    if {"anchor", "positive"} <= found and "text" not in found:
        return _paired(one, negatives)
    raise InputError(f"The columns {list(table)} do not make a training set; expected {_EXPECTED}.")


def _single(one: dict[str, list[Any]]) -> Examples:
    texts = _strings("text", one["text"])
    if "label" not in one:
        return Examples("texts", {"text": texts})
    numbers, classes = _labels(one["label"])
    return Examples("labelled", {"text": texts, "label": numbers}, classes)


def _paired(one: dict[str, list[Any]], negatives: dict[str, list[Any]]) -> Examples:
    columns: dict[str, list[Any]] = {name: _strings(name, one[name]) for name in ("anchor", "positive")}
    if "label" in one:  # of a pair: 1 where the two belong together
        numbers = _floats("label", one.pop("label"))
        if set(numbers) - {0.0, 1.0}:
            raise InputError(
                f"Pairs have labels {sorted(set(numbers))[:5]}; a pair's label is 0 or 1. Call a grade 'score'; "
                "classes go with one text a row."
            )
        one["score"] = numbers
    if negatives:
        if "score" in one:
            raise InputError("The data has both negatives and scores; name the columns to use with columns=...")
        return Examples("triplets", columns | negatives)
    if "score" in one:
        return Examples("scored", columns | {"score": _floats("score", one["score"])})
    return Examples("pairs", columns)


def _negatives(table: dict[str, list[Any]], names: list[str]) -> dict[str, list[Any]]:
    """Negatives as columns negative_1, negative_2, ...; a list a row becomes several columns."""
    found: list[list[Any]] = []
    for name in names:
        values = table[name]
        if isinstance(values[0], str):
            found.append(values)
            continue
        counts = {len(value) if isinstance(value, (list, tuple)) else -1 for value in values}
        if len(counts) > 1 or counts <= {-1, 0}:
            raise InputError(f"Column {name!r} must hold a text, or a list of equally many texts, in every row.")
        found += [list(column) for column in zip(*values, strict=True)]
    return {f"negative_{i}": _strings(f"negative_{i}", values) for i, values in enumerate(found, 1)}


def _strings(name: str, values: list[Any]) -> list[str]:
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"Row {number} has {value!r} as {name}, expected a text.")
    return values


def _floats(name: str, values: list[Any]) -> list[float]:
    found = []
    for number, value in enumerate(values):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            found.append(float("nan"))
        if not np.isfinite(found[-1]):
            raise InputError(f"Row {number} has {value!r} as {name}, expected a number.")
    return found


def _labels(values: list[Any]) -> tuple[list[int], list[str]]:
    if all(isinstance(value, (int, np.integer)) for value in values):
        return [int(value) for value in values], []
    if any(value is None for value in values):
        raise InputError(f"Row {values.index(None)} has no label.")
    classes = sorted({str(value) for value in values})
    number = {name: i for i, name in enumerate(classes)}
    return [number[str(value)] for value in values], classes
