"""Concept files: what a concept is, and templates times items to its contrast pairs; or lists of pairs, one a line.

Nothing here knows a tokenizer or a model. An error names the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from repe.data.pairs import POLES, ContrastPair, Text, check_pair, check_text, either, leaks

BRACES = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")  # a literal brace, a field, or a brace too many
KEYS = ("concept", "description", "poles", "prompts", "wording", "sources", "templates", "items")


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


def load(source: str | os.PathLike[str]) -> Concept:
    """Read a concept file (`.json`), or pairs one a line (`.jsonl`) or row (`.csv`), in UTF-8.

    A concept file has `concept`, `templates` and `items`, and may have the rest of what a `Concept` has. A template
    has a `name` and either `text` or `messages` for both poles, or a text or messages for each of `positive` and
    `negative`. An item has a `name`, and fields: a text, or one for each pole. Every item goes into every template, in
    place of `{field}`; a literal brace is written `{{` or `}}`. Templates and items may say whether they are
    `held_out`; pairs of one that is with one that is not would leak, and are left out.

    Lines and rows have `positive` and `negative`, and may have `template`, `item` and `held_out`. Their concept has
    the file's name. A file that has not changed is read once: take what comes back as frozen.

    Raises:
        ValueError: something is missing, unknown, malformed or double; it names the file and the line, or the entry.
        FileNotFoundError: there is no such file.
    """
    path = Path(source)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a concept is read from a file that ends in {', '.join(READERS)}")
    return _loaded(path, stamp(path))


def head(path: Path) -> tuple[str, str]:
    """The name and the description of the concept in a file, without its pairs. Raises as `load` does."""
    if path.suffix != ".json":
        return path.stem, ""
    content = _mapping(_parse(_read(path), str(path)), str(path))
    return _get(content, "concept", str, str(path)), _get({"description": "", **content}, "description", str, str(path))


def stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file. Raises FileNotFoundError if it is not there, and ValueError if it is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: a concept is read from a file")
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)
def _loaded(path: Path, stamp: tuple[int, ...]) -> Concept:
    """The concept of a file, which is as it was when it was stamped."""
    return READERS[path.suffix](path)


def _check_file(located: Iterable[tuple[str, ContrastPair]], path: Path) -> tuple[ContrastPair, ...]:
    """The pairs of a file, each with the place that it stands at, once they are checked."""
    places: dict[str, str] = {}
    pairs = []
    for where, pair in located:
        check_pair(pair, where)
        poles = json.dumps([pair.positive, pair.negative], sort_keys=True)
        if poles in places:
            raise ValueError(f"{where}: the same pair stands at {places[poles]}")
        places[poles] = where
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no contrast pairs")
    return tuple(pairs)


# A concept file: templates and items


@dataclass(frozen=True)
class Entry:
    """A template or an item, whether it is held out, and at which line of its file it begins."""

    content: Mapping[str, Any]
    held_out: bool | None
    name: str
    line: int


def _from_json(path: Path) -> Concept:
    text = _read(path)
    content = _mapping(_parse(text, str(path)), str(path))
    _refuse_unknown(content, set(KEYS), str(path))
    _check_sources(content.get("sources", []), path)
    for key, kind in (("description", str), ("wording", str)):
        _get({key: kind(), **content}, key, kind, str(path))
    poles, prompts = (
        _mapping(content.get(key, default), f"{path}: {key}")
        for key, default in (("poles", {pole: pole for pole in POLES}), ("prompts", {}))
    )
    _refuse_unknown(poles, set(POLES), f"{path}: poles")
    _refuse_unknown(prompts, set(POLES), f"{path}: prompts")
    return Concept(
        name=_get(content, "concept", str, str(path)),
        description=content.get("description", ""),
        poles={pole: _get(poles, pole, str, f"{path}: poles") for pole in POLES},
        sources=tuple(content.get("sources", ())),
        pairs=_check_file(_cross(content, text, path), path),
        prompts={pole: _get(prompts, pole, str, f"{path}: prompts") for pole in POLES if prompts},
        wording=content.get("wording", ""),
    )


def _check_sources(sources: Any, path: Path) -> None:
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError(f"{path}: 'sources' must be a list of texts, and is {sources!r:.60}")


def _cross(content: Mapping[str, Any], text: str, path: Path) -> Iterator[tuple[str, ContrastPair]]:
    """Every template with every item, but for those that would leak, and the place of each."""
    templates, items = (_entries(content, kind, text, path) for kind in ("templates", "items"))
    places = [f"{path}, line {template.line}: template {template.name!r}" for template in templates]
    unfilled = [_poles(template.content, place) for template, place in zip(templates, places, strict=True)]
    for template, place, poles in zip(templates, places, unfilled, strict=True):
        for item in items:
            if leaks(template.held_out, item.held_out):
                continue
            where = f"{place}, item {item.name!r} (line {item.line})"
            positive, negative = (_fill(poles[pole], item.content, pole, where) for pole in POLES)
            held_out = either(template.held_out, item.held_out)
            yield where, ContrastPair(positive, negative, template.name, item.name, held_out)
    if templates:
        _check_asked(items, {name for poles in unfilled for text in poles.values() for name in _fields(text)}, path)


def _check_asked(items: Iterable[Entry], asked: set[str], path: Path) -> None:
    for item in items:
        if extra := sorted(set(item.content) - {"name", "held_out"} - asked):
            raise ValueError(
                f"{path}, line {item.line}: item {item.name!r} has {', '.join(map(repr, extra))}, which no template "
                "asks for"
            )


def _entries(content: Mapping[str, Any], kind: str, text: str, path: Path) -> list[Entry]:
    """The templates (or items), each with whether it is held out: None for all of them where no one says so."""
    entries = _get(content, kind, list, str(path))
    decided = any(isinstance(entry, Mapping) and entry.get("held_out") is not None for entry in entries)
    found: dict[str, Entry] = {}
    for index, (entry, line) in enumerate(zip(entries, _lines(text, kind), strict=True)):
        place = f"{path}, line {line}: {kind}"
        name = _get(_mapping(entry, f"{place}[{index}]"), "name", str, f"{place}[{index}]")
        if name in found:
            raise ValueError(f"{path}, line {line}: two {kind} are named {name!r}, first in line {found[name].line}")
        flag = _flag(entry, f"{place} {name!r}")
        found[name] = Entry(entry, bool(flag) if decided else None, name, line)
    return list(found.values())


def _lines(text: str, kind: str) -> list[int]:
    """The line at which each entry of a list at the top level begins, in a text that is JSON."""
    decode, at = json.JSONDecoder().raw_decode, _next(text, text.index("{") + 1)
    key, at = decode(text, at)
    while key != kind:
        _, at = decode(text, _next(text, at))
        key, at = decode(text, _next(text, at))
    at, lines = _next(text, _next(text, at) + 1), []
    while text[at] != "]":
        lines.append(text.count("\n", 0, at) + 1)
        _, at = decode(text, at)
        at = _next(text, at)
    return lines


def _next(text: str, at: int) -> int:
    """Where the next value, key or bracket begins."""
    while text[at] in " \t\r\n,:":
        at += 1
    return at


def _poles(template: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The template's text or messages a pole, unfilled."""
    shared = [key for key in ("text", "messages") if key in template]
    own = [key for key in POLES if key in template]
    _refuse_unknown(template, {"name", "held_out", "text", "messages", *POLES}, where)
    if shared + own not in (["text"], ["messages"], list(POLES)):
        raise ValueError(
            f"{where}: a template has 'text', or 'messages', or both 'positive' and 'negative', and this one has "
            f"{', '.join(map(repr, shared + own)) or 'none of them'}"
        )
    poles = {pole: template[shared[0] if shared else pole] for pole in POLES}
    for pole, text in poles.items():
        check_text(text, f"{where}: {pole}")
        _check_messages(text, f"{where}: {pole}")
        _check_braces(text, f"{where}: {pole}")
    return poles


def _contents(text: Any) -> list[str]:
    return [text] if isinstance(text, str) else [message["content"] for message in text]


def _fields(text: Any) -> set[str]:
    """The fields that a text, or a message of several, asks for."""
    return {found[1] for content in _contents(text) for found in BRACES.finditer(content) if found[1]}


def _check_braces(text: Any, where: str) -> None:
    for content in _contents(text):
        for found in BRACES.finditer(content):
            if found[0] in ("{", "}"):
                near = content[max(0, found.start() - 20) : found.start() + 20]
                raise ValueError(
                    f"{where}: the {found[0]!r} in {near!r} belongs to no {{field}}: write a literal brace twice, "
                    f"{2 * found[0]!r}"
                )


def _fill(text: Any, item: Mapping[str, Any], pole: str, where: str) -> Text:
    if not isinstance(text, str):
        return tuple({**message, "content": str(_fill(message["content"], item, pole, where))} for message in text)
    return BRACES.sub(lambda found: _value(item, found[1], pole, where) if found[1] else found[0][0], text)


def _value(item: Mapping[str, Any], name: str, pole: str, where: str) -> str:
    fields = {key: value for key, value in item.items() if key not in ("name", "held_out")}
    if name not in fields:
        raise ValueError(
            f"{where}: the template asks for {{{name}}}, and the item has {', '.join(fields) or 'no field'}"
        )
    value = fields[name]
    if isinstance(value, Mapping):
        _refuse_unknown(value, set(POLES), f"{where}: field {name!r}")
        return _get(value, pole, str, f"{where}: field {name!r}")
    return _get(fields, name, str, where)


# Lists of pairs: a line or a row each


def _from_jsonl(path: Path) -> Concept:
    # Not splitlines: it would also split at the other line separators that may stand inside a JSON text.
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
    located = ((where, _pair(_mapping(_parse(line, where), where), where)) for where, line in lines)
    return _unnamed(located, path)


def _from_csv(path: Path) -> Concept:
    return _unnamed(_rows(path), path)


def _unnamed(located: Iterable[tuple[str, ContrastPair]], path: Path) -> Concept:
    pairs = _check_file(located, path)
    return Concept(path.stem, description="", poles={pole: pole for pole in POLES}, sources=(), pairs=pairs)


def _rows(path: Path) -> Iterator[tuple[str, ContrastPair]]:
    flags = {"true": True, "false": False, "": None}
    rows = csv.DictReader(io.StringIO(_read(path)), strict=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: the row must have as many cells as the header: {len(rows.fieldnames or ())}"
                )
            held_out = row.get("held_out", "").strip().lower()
            if held_out not in flags:
                raise ValueError(f"{where}: 'held_out' must be true, false or empty, and is {held_out!r}")
            yield where, _pair({**row, "held_out": flags[held_out]}, where)
    except csv.Error as error:
        raise ValueError(f"{path}, after line {rows.line_num}: not CSV: {error}") from error


def _pair(row: Mapping[str, Any], where: str) -> ContrastPair:
    _refuse_unknown(row, {*POLES, "template", "item", "held_out"}, where)
    for pole in POLES:
        _check_messages(_get(row, pole, (str, list), where), f"{where}: {pole}")
    names = {key: _get(row, key, str, where) for key in ("template", "item") if row.get(key) is not None}
    return ContrastPair(row["positive"], row["negative"], **names, held_out=_flag(row, where))


READERS: dict[str, Callable[[Path], Concept]] = {".json": _from_json, ".jsonl": _from_jsonl, ".csv": _from_csv}


# Reading what others wrote


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error


def _parse(text: str, where: str) -> Any:
    def once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, count in Counter(key for key, _ in entries).items() if count > 1]:
            raise ValueError(f"{where}: the key {twice[0]!r} stands twice in one object: {dict(entries)!s:.80}")
        return dict(entries)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _check_messages(text: Any, where: str) -> None:
    """Raises ValueError for a message with more than what a file's message has. `check_text` says what it must have."""
    for message in text if isinstance(text, list) else ():
        if isinstance(message, Mapping):
            _refuse_unknown(message, {"role", "content"}, f"{where}: a message")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names with values, got {value!r:.60}")
    return value


def _get(mapping: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    if key not in mapping:
        raise ValueError(f"{where}: {key!r} is missing")
    if not isinstance(mapping[key], kinds):
        raise ValueError(f"{where}: {key!r} has a value of the wrong kind: {mapping[key]!r:.60}")
    return mapping[key]


def _flag(mapping: Mapping[str, Any], where: str) -> bool | None:
    flag = mapping.get("held_out")
    if not isinstance(flag, bool | None):
        raise ValueError(f"{where}: 'held_out' must be true or false, and is {flag!r}")
    return flag


def _refuse_unknown(mapping: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(mapping) - known):
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}: there are {', '.join(sorted(known))}")
