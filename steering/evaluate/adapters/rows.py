"""Rows of public data files, each with its place, so that an error names file, line and field.

Reads JSON Lines, CSV, JSON lists and JSON tables. Knows no suite.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.errors import EvaluationError

MAX_FIELD_CHARS = 1_000_000


@dataclass(frozen=True)
class Row:
    """place: for people (`file, line 7`). number: 1-based. folder: where its file lies."""

    place: str
    number: int
    values: Mapping[str, Any]
    folder: Path | None = None

    def text(self, field: str) -> str:
        """A field that must hold text. Raises EvaluationError."""
        found = self.optional(field)
        if found is None:
            raise self.error(field, "is missing or empty")
        return found

    def optional(self, field: str) -> str | None:
        """A field that may be absent, null or empty. Raises EvaluationError for anything else."""
        value = self.values.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids are numbers in some files
        if value is not None and not isinstance(value, str):
            raise self.error(field, "is not text")
        if not _is_whole(value or ""):
            raise self.error(field, "holds half of a surrogate pair (\\ud800 to \\udfff)")
        return (value or "").strip() or None

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, or none. Raises EvaluationError."""
        value = self.values.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(
            isinstance(each, str) and each and _is_whole(each) for each in value
        ):
            raise self.error(field, "is not a list of texts")
        return tuple(value)

    def error(self, field: str, problem: str) -> EvaluationError:
        """Never holds what the field holds: prompts do not belong into logs."""
        return EvaluationError(f"{self.place}: field {field!r} {problem}")


def read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        values = _parsed(line, place)
        if not isinstance(values, dict):
            raise EvaluationError(f"{place}: not a JSON object")
        yield Row(place, number, values, path.parent)


def read_csv(path: Path) -> Iterator[Row]:
    """One row a record, numbered from 1; its place names the line that it ends on."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    reader = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    number = 0
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise EvaluationError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
        if values is None:
            return
        number += 1
        place = f"{path}, line {reader.line_num}"
        if None in values:
            raise EvaluationError(f"{place}: more values than the header has names")
        yield Row(place, number, values, path.parent)


def read_json_list(path: Path) -> Iterator[Row]:
    rows = _parsed(read_text(path), str(path))
    if not isinstance(rows, list):
        raise EvaluationError(f"{path}: not a JSON list")
    yield from _objects(path, enumerate(rows, start=1))


def read_json_table(path: Path) -> Iterator[Row]:
    """{"1": {...}, "2": {...}}; the key becomes the field `key`."""
    table = _parsed(read_text(path), str(path))
    if not isinstance(table, dict):
        raise EvaluationError(f"{path}: not a JSON object of rows")
    rows = [{"key": key, **row} if isinstance(row, dict) else row for key, row in table.items()]
    yield from _objects(path, enumerate(rows, start=1))


def with_fields(rows: Iterable[Row], fields: Iterable[str]) -> Iterator[Row]:
    """The rows, once the first is seen to have the fields: a wrong file is told by its columns.

    Raises EvaluationError, which names those that are missing and those that are there.
    """
    for index, row in enumerate(rows):
        missing = [field for field in fields if field not in row.values]
        if index == 0 and missing:
            there = ", ".join(str(name)[:40] for name in list(row.values)[:12])
            raise EvaluationError(
                f"{row.place}: no field {', '.join(map(repr, missing))}; there are: {there}"
            )
        yield row


def read_text(path: Path) -> str:
    """Raises EvaluationError."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _is_whole(text: str) -> bool:
    """Whether it is text: JSON can spell half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _objects(path: Path, rows: Iterable[tuple[int, object]]) -> Iterator[Row]:
    for number, values in rows:
        place = f"{path}, row {number}"
        if not isinstance(values, dict):
            raise EvaluationError(f"{place}: not a JSON object")
        yield Row(place, number, values, path.parent)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        where = f"{line}column {error.colno}"
        raise EvaluationError(f"{place}: not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise EvaluationError(f"{place}: nested too deeply") from None
