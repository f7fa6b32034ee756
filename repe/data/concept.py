"""Concepts: what one is, and its contrast pairs; from templates times items, or from lists of pairs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, model_validator

from repe.data.files import ROW_SUFFIXES, Message, Row, TextOrChat, once, read_document, read_rows, text_of
from repe.data.pairs import POLES, ContrastPair, check_pair, check_text, either, leaks

if TYPE_CHECKING:
    from repe.models.tokens import Text

SUFFIXES = (".json", *ROW_SUFFIXES)
BRACES = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")  # a literal brace, a field, or a brace too many


@dataclass(frozen=True)
class Concept:
    """A concept by name.

    Attributes:
        description: what it is, and what it is not.
        poles: what each pole is called.
        sources: where the ideas come from.
        pairs: its contrast pairs.
        prompts: for each pole the system message that asks a model for it outright: what steering is compared with.
        wording: why single words tell the poles apart, where that cannot be helped.
    """

    name: str
    description: str
    poles: Mapping[str, str]
    sources: tuple[str, ...]
    pairs: tuple[ContrastPair, ...]
    prompts: Mapping[str, str] = field(default_factory=dict)
    wording: str = ""


def load_concept(source: str | os.PathLike[str]) -> Concept:
    """Read a concept file (`.json`), or contrast pairs one a line (`.jsonl`) or row (`.csv`), in UTF-8.

    A concept file has `concept`, `templates` and `items`, and may have the rest of what a `Concept` has. A template
    has a `name` and either `text` or `messages` for both poles, or a text or messages for each of `positive` and
    `negative`. An item has a `name`, and fields: a text, or one for each pole. Every item goes into every template, in
    place of `{field}`; a literal brace is written `{{` or `}}`. Templates and items may say whether they are
    `held_out`; pairs of one that is with one that is not would leak, and are left out.

    Lines and rows have `positive` and `negative`, and may have `template`, `item` and `held_out`. Their concept has
    the file's name. A file that has not changed is read once: take what comes back as frozen.

    Raises:
        ValueError: something is missing, unknown, malformed or double; it names the file and the line.
        FileNotFoundError: there is no such file.
    """
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a concept is read from a file that ends in {', '.join(SUFFIXES)}")
    return _loaded(path, stamp(path))


def head(path: Path) -> tuple[str, str]:
    """The name and the description of the concept in a file, without its pairs. Raises as `load_concept` does."""
    if path.suffix != ".json":
        return path.stem, ""
    content = read_document(path, _Content)
    return content.concept, content.description


def stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file. Raises FileNotFoundError if it is not there, and ValueError if it is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: a concept is read from a file")
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)
def _loaded(path: Path, stamp: tuple[int, ...]) -> Concept:
    """The concept of a file, which is as it was when it was stamped."""
    if path.suffix == ".json":
        content = read_document(path, _Content)
        return Concept(
            name=content.concept,
            description=content.description,
            poles=content.poles.model_dump(),
            sources=tuple(content.sources),
            pairs=_checked(_crossed(content, path), path),
            prompts=content.prompts.model_dump() if content.prompts else {},
            wording=content.wording,
        )
    rows = read_rows(path, _PairRow, "contrast pairs")
    pairs = ((where, ContrastPair(**row.model_dump())) for where, row in rows)
    return Concept(path.stem, "", {pole: pole for pole in POLES}, sources=(), pairs=_checked(pairs, path))


def _checked(located: Iterable[tuple[str, ContrastPair]], path: Path) -> tuple[ContrastPair, ...]:
    """The pairs of a file, each with the place that it stands at, once they are checked."""
    places: dict[str, str] = {}
    pairs = []
    for where, pair in located:
        check_pair(pair, where)
        once(places, json.dumps([pair.positive, pair.negative], sort_keys=True), "the same pair", where)
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no contrast pairs")
    return tuple(pairs)


# What files hold


class _PairRow(Row):
    positive: TextOrChat
    negative: TextOrChat
    template: str = ""
    item: str = ""
    held_out: bool | None = None


class _Poles(Row):
    positive: str
    negative: str


class _Entry(Row):
    name: str
    held_out: bool | None = None


class _Template(_Entry):
    text: str = ""
    messages: list[Message] = []
    positive: TextOrChat = ""
    negative: TextOrChat = ""

    @model_validator(mode="after")
    def _says_something(self) -> _Template:
        for pole, text in self.poles.items():
            check_text(text, pole)
        return self

    @property
    def poles(self) -> dict[str, Text]:
        """The text or the chat of each pole, unfilled."""
        given = self.one_of(["text"], ["messages"], POLES)
        return {pole: text_of(getattr(self, key)) for pole, key in zip(POLES, (given * 2)[:2], strict=True)}


class _Item(_Entry):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str | _Poles]

    def fields(self, pole: str) -> dict[str, str]:
        fields = self.__pydantic_extra__.items()
        return {name: value if isinstance(value, str) else getattr(value, pole) for name, value in fields}


AnyEntry = TypeVar("AnyEntry", _Template, _Item)


class _Content(Row):
    concept: str
    description: str = ""
    poles: _Poles = _Poles(positive="positive", negative="negative")
    prompts: _Poles | None = None
    wording: str = ""
    sources: list[str] = []
    templates: list[_Template]
    items: list[_Item]


# Templates times items


def _crossed(content: _Content, path: Path) -> Iterator[tuple[str, ContrastPair]]:
    """Every template with every item, but for those that would leak, and the place of each."""
    templates, items = _sides(content.templates, "template", path), _sides(content.items, "item", path)
    for template, template_side in templates:
        poles, place = template.poles, f"{path}, line {template._line}: template {template.name!r}"
        for item, item_side in items:
            if leaks(template_side, item_side):
                continue
            where = f"{place}, item {item.name!r} (line {item._line})"
            positive, negative = (_filled(poles[pole], item.fields(pole), where) for pole in POLES)
            side = either(template_side, item_side)
            yield where, ContrastPair(positive, negative, template.name, item.name, side)
    asked = {name for template, _ in templates for text in template.poles.values() for name in _names(text)}
    for item, _ in items if templates else ():
        if extra := sorted(set(item.fields("positive")) - asked):
            raise ValueError(
                f"{path}, line {item._line}: item {item.name!r} has {', '.join(map(repr, extra))}, which no template "
                "asks for"
            )


def _sides(entries: Sequence[AnyEntry], kind: str, path: Path) -> list[tuple[AnyEntry, bool | None]]:
    """The templates (or items), each with whether it is held out: None for all of them where no one says so."""
    places: dict[str, str] = {}
    for entry in entries:
        once(places, entry.name, f"the {kind} {entry.name!r}", f"{path}, line {entry._line}")
    decided = any(entry.held_out is not None for entry in entries)
    return [(entry, bool(entry.held_out) if decided else None) for entry in entries]


def _names(text: Text) -> set[str]:
    """The fields that a text asks for."""
    contents = [text] if isinstance(text, str) else [message["content"] for message in text]
    return {found[1] for content in contents for found in BRACES.finditer(content) if found[1]}


def _filled(text: Text, fields: Mapping[str, str], where: str) -> Text:
    if not isinstance(text, str):
        return tuple({**message, "content": str(_filled(message["content"], fields, where))} for message in text)

    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] in fields:
            return fields[found[1]]
        if found[1]:
            there = ", ".join(fields) or "no field"
            raise ValueError(f"{where}: the template asks for {found[0]}, and the item has {there}")
        near = text[max(0, found.start() - 20) : found.start() + 20]
        raise ValueError(
            f"{where}: the {found[0]!r} in {near!r} belongs to no {{field}}: write a literal brace twice, "
            f"{2 * found[0]!r}"
        )

    return BRACES.sub(value, text)
