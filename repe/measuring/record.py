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

Row = tuple[str, Sequence[float], Sequence[Any]]
"""A text's name, the strengths, and a value for each."""


class Record:
    """What is known by the kind of measurement, the edit (None for none), the text's name and the strength.

    Without a path nothing is kept.

    Example:
        >>> edit = Edit.of(repe.extract(model, tokenizer, "honesty"))
        >>> record = Record.open("measured.jsonl", model)
        >>> record.add("text", None, [(name_of("a prompt"), [0.0], ["what was written"])])
        >>> record.known("text", None, [name_of("a prompt")], lambda text, value: isinstance(value, str))
        [{0.0: 'what was written'}]
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[tuple[str, str, str], dict[float, Any]] = {}
        self._head: list[str] = []  # to be written before the next row
        self._broken: int | None = None  # where the line begins that was being written when the last run ended

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: nn.Module, blocks_at: str | None = None) -> Record:
        """The record in a file. A line broken off is forgotten; where there is no file, it is begun with the first row.

        Args:
            path: of the file.
            model: with the handles on it that are to be there whenever something is measured.
            blocks_at: the dotted path of the list of blocks, where it cannot be found.

        Raises:
            ValueError: the file holds something else, or is of another format, model, dtype or of other handles; it is
                left as it is.

        Warns:
            UserWarning: lines are no rows; what they held will be measured again.
        """
        record = cls(Path(path))
        head = {
            "format": FORMAT,
            "model": fingerprint(model),
            "dtype": str(dtype_of(find_stack(model, blocks_at=blocks_at).module)),
            "blocks_at": blocks_at,
            "steered_by": [[handle.edit.key(), torch.as_tensor(handle.alpha).tolist()] for handle in status(model)],
        }
        record._read(Path(path), head)
        return record

    def known(
        self, kind: str, edit: Edit | None, names: Sequence[str], fits: Callable[[int, Any], bool]
    ) -> list[dict[float, Any]]:
        """For every text the values by strength.

        Args:
            fits: whether a value can be one of the text with this number.

        Warns:
            UserWarning: values that do not fit are left out.
        """
        if self.path is None:
            return [{} for _ in names]
        key = _key(edit)
        found = [self._values.get((kind, key, name), {}) for name in names]
        fitting = [{a: v for a, v in values.items() if fits(text, v)} for text, values in enumerate(found)]
        if lost := sum(map(len, found)) - sum(map(len, fitting)):
            warnings.warn(f"{self.path}: {lost} values do not fit, and are measured again", stacklevel=2)
        return fitting

    def add(self, kind: str, edit: Edit | None, rows: Iterable[Row]) -> None:
        """Add rows of finite numbers, or texts."""
        if self.path is None:
            return
        key, lines = _key(edit), []
        for name, alphas, values in rows:
            lines.append(json.dumps({"kind": kind, "edit": key, "of": name, "alphas": [*alphas], "values": [*values]}))
            self._values.setdefault((kind, key, name), {}).update(zip(alphas, values, strict=True))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._broken is not None:
                file.truncate(self._broken)
            file.write("".join(f"{line}\n" for line in (*self._head, *lines)).encode())
        self._head, self._broken = [], None

    def _read(self, path: Path, head: Mapping[str, Any]) -> None:
        written = path.read_bytes() if path.exists() else b""
        *whole, rest = written.split(b"\n")
        first = json.dumps(head)
        if whole or not first.encode().startswith(rest):
            _check(path, whole[0] if whole else rest, head)
        strange = [number for number, line in enumerate(whole[1:], start=2) if not self._take(line)]
        self._head = [] if whole else [first]
        self._broken = len(written) - len(rest) if rest else None
        if strange:
            lines = f"line {strange[0]} is no row" if len(strange) == 1 else f"lines {strange} are no rows"
            warnings.warn(f"{path}: {lines} of a record; what is missing is measured again", stacklevel=3)

    def _take(self, line: bytes) -> bool:
        """Takes a line, if it is a row."""
        try:
            row = json.loads(line)
            kind, key, name = (str(row[part]) for part in ("kind", "edit", "of"))
            values = dict(zip(map(float, row["alphas"]), row["values"], strict=True))
        except (ValueError, KeyError, TypeError):
            return False
        self._values.setdefault((kind, key, name), {}).update(values)
        return True


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


def _key(edit: Edit | None) -> str:
    return "" if edit is None else edit.key()


def _check(path: Path, line: bytes, head: Mapping[str, Any]) -> None:
    """Raises ValueError if a file's first line is not that of a record like this one."""
    try:
        found = dict(json.loads(line))
    except (ValueError, TypeError):
        found = {}
    if (format_ := found.get("format")) != FORMAT:
        got = f"the format {format_!r}" if format_ else "something else"
        raise ValueError(f"{path} holds {got}, not a record of the format {FORMAT!r}: name another file")
    alike = {
        "another model": agrees(found.get("model"), head["model"]),
        "another dtype": found.get("dtype") == head["dtype"],
        "other blocks": found.get("blocks_at") == head["blocks_at"],
        "a model that something else steers": found.get("steered_by") == head["steered_by"],
    }
    if wrong := [name for name, is_alike in alike.items() if not is_alike]:
        raise ValueError(f"{path} is a record of {' and of '.join(wrong)}: name another file")
