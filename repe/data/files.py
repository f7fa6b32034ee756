"""The one reader of files, in UTF-8: a JSON document, JSON one a line, or CSV one a row, each as a schema says.

An error names the file and the line, what was got and what was expected. A null at the top of a line, and a blank cell,
are as if they were not there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ROW_SUFFIXES = (".jsonl", ".csv")
FLAGS = {"true": True, "false": False}
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "names with values",
    "list_type": "a list",
    "model_type": "names with values",
    "string_type": "a text",
}
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\n]')  # of JSON, as far as it takes to find where objects begin and end


# Schemas


class Row(BaseModel):
    """An object in a file: these keys alone, with values of these very types. It knows the line that it begins in."""

    model_config = ConfigDict(strict=True, extra="forbid")
    _line: int = 0

    @model_validator(mode="wrap")
    @classmethod
    def _is_known_and_located(cls, row: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        unknown = sorted(set(row) - set(cls.model_fields)) if isinstance(row, dict) else []
        if unknown and cls.model_config["extra"] == "forbid":  # pydantic does not say which keys there are
            known = ", ".join(sorted(cls.model_fields))
            raise ValueError(f"unknown {', '.join(map(repr, unknown))}: there are {known}")
        found = read(row)
        found._line = getattr(row, "line", 0)
        return found

    def one_of(self, *choices: Sequence[str]) -> list[str]:
        """Tell which of several sets of keys is given. Raises ValueError if it is not exactly one."""
        given = [key for choice in choices for key in choice if key in self.model_fields_set]
        if given not in map(list, choices):
            expected = ", or ".join(" and ".join(map(repr, choice)) for choice in choices)
            raise ValueError(f"expected {expected}, and there are {', '.join(map(repr, given)) or 'none of them'}")
        return given


class Message(Row):
    """A message of a chat."""

    role: str
    content: str


TextOrChat = str | list[Message]
AnyRow = TypeVar("AnyRow", bound=Row)


def text_of(value: TextOrChat) -> str | tuple[dict[str, str], ...]:
    """A text, or a chat as plain messages."""
    return value if isinstance(value, str) else tuple(message.model_dump() for message in value)


# Reading


def read_document(path: Path, schema: type[AnyRow]) -> AnyRow:
    """Read a JSON file. Raises ValueError if it is not as the schema says, and FileNotFoundError if it is not there."""
    return _checked(schema, _parse(_read(path), path), path)


def read_rows(source: str | os.PathLike[str], schema: type[AnyRow], content: str) -> Iterator[tuple[str, AnyRow]]:
    """Read a file of JSON lines or of CSV: what stands in each line or row, and where.

    Raises:
        ValueError: a line is not what the schema says, or files of another kind hold such `content`.
        FileNotFoundError: there is no such file.
    """
    path = Path(source)
    if path.suffix not in ROW_SUFFIXES:
        raise ValueError(f"{path}: {content} are read from a file that ends in {', '.join(ROW_SUFFIXES)}")
    for number, row in (_csv_rows if path.suffix == ".csv" else _json_lines)(path):
        yield f"{path}, line {number}", _checked(schema, row, path, number)


def once(places: dict[str, str], thing: str, what: str, where: str) -> None:
    """Note where a thing stands in a file. Raises ValueError, which says what it is, if it is there already."""
    if thing in places:
        raise ValueError(f"{where}: {what} stands already at {places[thing]}")
    places[thing] = where


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines: it would also split at the other line separators that may stand inside a JSON text.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            row = _parse(line, path, number)
            yield number, {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else row


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    rows = csv.DictReader(io.StringIO(_read(path)), strict=True)
    try:
        names = rows.fieldnames or ()
        if twice := _twice(names):
            raise ValueError(f"{path}, line {rows.line_num}: two columns are called {twice!r}")
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {rows.line_num}: the row must have as many cells as the header: {len(names)}"
                )
            yield rows.line_num, {name: _cell(name, cell) for name, cell in row.items() if cell}
    except csv.Error as error:
        raise ValueError(f"{path}, after line {rows.line_num}: not CSV: {error}") from error


def _cell(column: str, cell: str) -> str | bool:
    return FLAGS.get(cell.strip().lower(), cell) if column == "held_out" else cell


# JSON that knows its lines


class Located(dict[str, Any]):
    """An object, and the line that it begins in."""

    line: int


def _parse(text: str, path: Path, line: int = 1) -> Any:
    """Read JSON that begins in that line of a file."""
    lines = _lines_of_objects(text, line)

    def located(entries: list[tuple[str, Any]]) -> Located:
        found = Located(entries)
        found.line = next(lines)
        if twice := _twice(key for key, _ in entries):
            raise ValueError(
                f"{path}, line {found.line}: the key {twice!r} stands twice in one object: {dict(entries)!s:.80}"
            )
        return found

    try:
        value = json.loads(text, object_pairs_hook=located)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}, {at}: not JSON: {error.msg}") from error
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # no tokenizer reads one
        half = error.object[error.start]
        raise ValueError(f"{path}, line {line}: {half!r} is half of a character, without the other half") from error
    return value


def _lines_of_objects(text: str, line: int) -> Iterator[int]:
    """Where the objects of a JSON text begin, in the order in which they end: that of `object_pairs_hook`."""
    begun = []
    for token in TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token == "{":
            begun.append(line)
        elif token == "}":
            yield begun.pop()


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# What is wrong, and where


def _checked(schema: type[AnyRow], value: Any, path: Path, line: int = 1) -> AnyRow:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        faults = error.errors()
        # A list or an object that may also be a text is not meant as one.
        meant = (f for f in faults if f["type"] != "string_type" or not isinstance(f["input"], list | dict))
        raise ValueError(f"{path}, {_told(next(meant, faults[0]), value, line)}") from None


def _told(fault: ErrorDetails, value: Any, line: int) -> str:
    """The line of a fault, the names of the value that it is of, and what it is."""
    line, names = getattr(value, "line", line), ""
    for key in fault["loc"]:
        try:
            value = value[key]
        except (KeyError, TypeError):  # a kind of a union, which is no key, or a key that is missing
            continue
        line, names = getattr(value, "line", line), names + (f"[{key}]" if isinstance(key, int) else f".{key}")
    return f"line {line}: {f'{names[1:]}: ' * bool(names)}{_said(fault)}"


def _said(fault: ErrorDetails) -> str:
    if fault["type"] == "missing":
        return f"{fault['loc'][-1]!r} is missing"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return f"expected {EXPECTED.get(fault['type'], fault['msg'])}, got {fault['input']!r:.60}"
