"""The record: a file of what was measured, so that it is measured once, in whatever process.

It has a line a row: what kind of thing was measured, of which text and edit, and the values by strength. The first line
tells of which model. Rows are only ever added; the next run may ask for other texts, edits and strengths.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repe.models.blocks import find_stack
from repe.models.fingerprint import agrees, fingerprint
from repe.reading.trees import dtype_of
from repe.steering.edit import Edit
from repe.steering.handle import status

FORMAT = "repe.record/1"
ROW = ("kind", "edit", "beside", "of")  # what a row is found by: beside which other handles, of which text

Row = tuple[str, Sequence[float], Sequence[Any]]
"""A text's name, the strengths, and a value for each."""


class Record:
    """What is known by the kind of measurement, the edit (None for none), the text's name and the strength.

    Without a path nothing is kept.

    Example:
        >>> edit = Edit.of(repe.extract(model, tokenizer, "honesty"))
        >>> page = Record.open("measured.jsonl", model).page("text", None)
        >>> page.add([(name_of("a prompt"), [0.0], ["what was written"])])
        >>> page.known([name_of("a prompt")], lambda text, value: isinstance(value, str))
        [{0.0: 'what was written'}]
    """

    def __init__(self, path: Path | None = None, model: nn.Module | None = None) -> None:
        self.path, self.model = path, model
        self._values: dict[tuple[str, ...], dict[float, Any]] = {}
        self._head: Mapping[str, Any] = {}
        self._size = -1  # of the file, as it was left when lines were last added

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: nn.Module, blocks_at: str | None = None) -> Record:
        """The record in a file. A line broken off is forgotten; where there is no file, it is begun with the first row.

        Args:
            path: of the file.
            model: that is measured, with whatever handles are on it at the time.
            blocks_at: the dotted path of the list of blocks, where it cannot be found.

        Raises:
            ValueError: the file holds something else, or is of another format, model or dtype; it is left as it is.

        Warns:
            UserWarning: lines are no rows; what they held will be measured again.
        """
        record = cls(Path(path), model)
        record._head = {
            "format": FORMAT,
            "model": fingerprint(model),
            "dtype": str(dtype_of(find_stack(model, blocks_at=blocks_at).module)),
            "blocks_at": blocks_at,
        }
        record._read()
        return record

    @property
    def is_begun(self) -> bool:
        """Whether anything is known."""
        return bool(self._values)

    def page(self, kind: str, edit: Edit | None) -> Page:
        """What is kept of one kind of measurement, under an edit and the handles that are on the model now.

        Raises:
            ValueError: what a gate of a function lets through cannot be told from what another does.
        """
        if self.path is None or self.model is None:
            return Page(self, ())
        beside = [[handle.edit.key(), torch.as_tensor(handle.alpha).tolist()] for handle in status(self.model)]
        return Page(self, (kind, "" if edit is None else edit.key(), name_of(beside) if beside else ""))

    def _read(self) -> None:
        assert self.path is not None
        whole, _ = _lines(self.path, self._head)
        strange = [number for number, line in enumerate(whole[1:], start=2) if not self._take(line)]
        if strange:
            lines = f"line {strange[0]} is no row" if len(strange) == 1 else f"lines {strange} are no rows"
            warnings.warn(f"{self.path}: {lines} of a record; what is missing is measured again", stacklevel=3)

    def _take(self, line: bytes) -> bool:
        """Takes a line, if it is a row."""
        row = _object(line)
        key: tuple[Any, ...] = tuple(row.get(part) for part in ROW)
        alphas, values = row.get("alphas"), row.get("values")
        if not (isinstance(alphas, list) and isinstance(values, list) and len(alphas) == len(values)):
            return False
        if not all(isinstance(part, str) for part in key) or not all(map(_is_strength, alphas)):
            return False
        self._values.setdefault(key, {}).update(zip(map(float, alphas), values, strict=True))
        return True

    def _write(self, lines: Iterable[str]) -> None:
        """Adds lines to the file, which another run may have begun meanwhile."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            head = []
            if file.tell() != self._size:  # this run has added none yet, or another has
                whole, length = _lines(self.path, self._head)
                file.truncate(length)  # without a line that was being written when a run ended
                head = [] if whole else [json.dumps(self._head)]
            file.write("".join(f"{line}\n" for line in (*head, *lines)).encode())
            self._size = file.tell()


class Page:
    """What a record keeps of one kind of measurement under one edit."""

    def __init__(self, record: Record, key: tuple[str, ...]) -> None:
        self._record, self._key = record, key

    def known(self, names: Sequence[str], fits: Callable[[int, Any], bool]) -> list[dict[float, Any]]:
        """For every text the values by strength.

        Args:
            fits: whether a value can be one of the text with this number.

        Warns:
            UserWarning: values that do not fit are left out.
        """
        found = [self._record._values.get((*self._key, name), {}) for name in names]
        fitting = [{a: v for a, v in values.items() if fits(text, v)} for text, values in enumerate(found)]
        if lost := sum(map(len, found)) - sum(map(len, fitting)):
            warnings.warn(f"{self._record.path}: {lost} values do not fit, and are measured again", stacklevel=2)
        return fitting

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows of finite numbers, or texts."""
        if not self._key:
            return
        lines = []
        for name, alphas, values in rows:
            row = dict(zip(ROW, (*self._key, name), strict=True))
            lines.append(json.dumps({**row, "alphas": [*alphas], "values": [*values]}))
            self._record._values.setdefault((*self._key, name), {}).update(zip(alphas, values, strict=True))
        self._record._write(lines)


def missing(known: Sequence[Mapping[float, Any]], alphas: Sequence[float]) -> dict[tuple[float, ...], list[int]]:
    """The strengths that texts have no value for, and the numbers of the texts that lack just these."""
    gaps: dict[tuple[float, ...], list[int]] = {}
    for text, values in enumerate(known):
        if lacking := tuple(alpha for alpha in alphas if alpha not in values):
            gaps.setdefault(lacking, []).append(text)
    return gaps


def name_of(data: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain JSON data, the same in every process."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _lines(path: Path, head: Mapping[str, Any]) -> tuple[list[bytes], int]:
    """The whole lines of a record's file, and their length in bytes; none where there is no file, or only a part of the
    head. Raises ValueError if the file is no record like this one."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no ordinary file, and a record is kept in one: name another")
    written = path.read_bytes() if path.exists() else b""
    *whole, rest = written.split(b"\n")
    if whole or not json.dumps(head).encode().startswith(rest):
        _check(path, whole[0] if whole else rest, head)
    return whole, len(written) - len(rest)


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; an empty one where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_strength(value: Any) -> bool:
    """Whether it is a finite number of float32."""
    return type(value) in (int, float) and abs(value) < torch.finfo(torch.float32).max


def _check(path: Path, line: bytes, head: Mapping[str, Any]) -> None:
    """Raises ValueError if a file's first line is not that of a record like this one."""
    found = _object(line)
    if (format_ := found.get("format")) != FORMAT:
        got = f"the format {format_!r}" if format_ else "something else"
        raise ValueError(f"{path} holds {got}, not a record of the format {FORMAT!r}: name another file")
    alike = {
        "another model": agrees(found.get("model"), head["model"]),
        "another dtype": found.get("dtype") == head["dtype"],
        "other blocks": found.get("blocks_at") == head["blocks_at"],
    }
    if wrong := [name for name, is_alike in alike.items() if not is_alike]:
        raise ValueError(f"{path} is a record of {' and of '.join(wrong)}: name another file")
