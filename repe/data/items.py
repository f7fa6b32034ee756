"""Tasks: what behaviour and helpfulness are measured on. Items with options, and the model's probabilities of them.

A behaviour item has two options, the aligned one first; a skill has several and one right answer. Either way the score
is what the model gives to option `answer`, against the others.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repe.data.pairs import Text


@dataclass(frozen=True)
class Item:
    """A prompt, the options that may follow it, and which of them is the right (or the aligned) one.

    `group` names what items share and must not be taken for independent: a fact, a request.
    """

    prompt: Text
    options: tuple[str, ...]
    answer: int = 0
    group: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


def load_items(path: str | os.PathLike[str]) -> list[Item]:
    """Reads items from a JSONL file, one a line, or from a CSV file, one a row.

    A line has `messages` or `text`, and either `aligned` and `misaligned`, or `options` and `answer` (an index); it may
    have a `group`. A row has the same in columns, with `option_0`, `option_1`, ... for the options.

    Raises:
        ValueError: a line is not such an item, or there are none; the text names the file and the line.
        FileNotFoundError: there is no such file.
    """
    rows = _rows_of_csv(Path(path)) if Path(path).suffix == ".csv" else _lines_of(Path(path))
    return _each(rows, _item, path, "an item with a prompt and options")


def load_texts(path: str | os.PathLike[str]) -> list[Text]:
    """Reads texts from a JSONL file: every line has a `text`, or a chat as `messages`. Raises as `load_items` does."""
    return _each(_lines_of(Path(path)), _prompt, path, "a text or a chat")


def _each(
    rows: Iterator[tuple[int, Any]], read: Callable[[Any], Any], path: str | os.PathLike[str], expected: str
) -> list[Any]:
    found = []
    for number, row in rows:
        try:
            found.append(read(json.loads(row) if isinstance(row, str) else row))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not {expected} ({error!r})") from error
    if not found:
        raise ValueError(f"{path} holds nothing: expected {expected} a line")
    return found


def _lines_of(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            yield number, line


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            options = [value for name, value in row.items() if str(name).startswith("option_") and value]
            answer = {"answer": int(row["answer"])} if (row.get("answer") or "").isdigit() else {}
            yield rows.line_num, {**row, **({"options": options} if options else {}), "answer": 0, **answer}


def _item(data: dict[str, Any]) -> Item:
    options = tuple(data["options"]) if "options" in data else (data["aligned"], data["misaligned"])
    answer = data.get("answer", 0)
    if len(set(options)) < 2 or answer not in range(len(options)):
        raise ValueError("an item needs two different options or more, and an answer among them")
    return Item(_prompt(data), options, answer, str(data.get("group", "")), data)


def _prompt(data: dict[str, Any]) -> Text:
    return data["text"] if "text" in data else tuple(data["messages"])
