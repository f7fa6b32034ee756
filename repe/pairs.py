"""Contrast pairs: two texts, or chats, that differ in the concept alone. From files or lists, checked, and split.

Nothing here knows a tokenizer or a model. A text is a string; a chat is a sequence of `{"role", "content"}` messages.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Message = Mapping[str, str]
Text = str | tuple[Message, ...]
Name = TypeVar("Name", str, tuple[str, int])

POLES = ("positive", "negative")
LEAST = 2  # pairs to fit on, and to hold out: fewer have no spread


@dataclass(frozen=True)
class ContrastPair:
    """Two texts (or chats) that differ in the concept alone, and what they were made of.

    `template` and `item` name what is shared with other pairs and must not stand on both sides of a split.
    `held_out` None means that it is not decided; `split` then does.
    """

    positive: Text
    negative: Text
    template: str = ""
    item: str = ""
    held_out: bool | None = None

    def __post_init__(self) -> None:
        for pole in POLES:
            if isinstance(getattr(self, pole), list):
                object.__setattr__(self, pole, tuple(getattr(self, pole)))


@dataclass(frozen=True)
class Concept:
    """A concept by name: what it is, what its poles are called, where its pairs come from, and the pairs."""

    name: str
    description: str
    poles: Mapping[str, str]
    sources: tuple[str, ...]
    pairs: tuple[ContrastPair, ...]


def check(pairs: Sequence[ContrastPair]) -> None:
    """Check that there are pairs and that each has two poles that differ.

    Raises:
        ValueError: otherwise; it names the pair.
        TypeError: there is something else among them.
    """
    if not pairs:
        raise ValueError("no contrast pairs: at least one is needed")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, ContrastPair):
            raise TypeError(f"pair {index} is a {type(pair).__name__}: expected ContrastPair(positive, negative)")
        _check_pair(pair, _name(pair, index))


def split(
    pairs: Sequence[ContrastPair], held_out: float = 0.25, seed: int = 0
) -> tuple[tuple[ContrastPair, ...], tuple[ContrastPair, ...]]:
    """The pairs to fit on and the pairs held out, as the pairs themselves decide, else drawn by `seed`.

    Drawn, a share `held_out` of the templates and of the items is held out: what is fitted on has none of them, what
    is held out has both, and other pairs are left out. With one template (or none named) only items are held out, with
    one item only templates. An item without a name is its pair's own.

    Raises:
        ValueError: the share is not within (0, 1), only some of the pairs are decided, or fewer than two pairs would be
            fitted on or held out.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of templates and items held out, between 0 and 1: got {held_out}")
    check(pairs)
    decided = sum(pair.held_out is not None for pair in pairs)
    if 0 < decided < len(pairs):
        raise ValueError(f"held_out is decided for {decided} of {len(pairs)} pairs: decide it for all of them or none")

    sides = [pair.held_out for pair in pairs] if decided else _draw_sides(pairs, held_out, random.Random(seed))
    fit = tuple(pair for pair, side in zip(pairs, sides, strict=True) if side is False)
    held = tuple(pair for pair, side in zip(pairs, sides, strict=True) if side is True)
    if min(len(fit), len(held)) < LEAST:
        raise ValueError(
            f"{len(pairs)} pairs split into {len(fit)} to fit on and {len(held)} held out, and at least {LEAST} of "
            "each are needed, with no template or item in both: give more items or templates, or decide held_out"
        )
    return fit, held


def load(source: str | os.PathLike[str]) -> Concept:
    """Read a concept file (`.json`), or pairs one a line (`.jsonl`) or row (`.csv`), in UTF-8.

    A concept file has `concept`, `templates` and `items`, and may have `description`, `poles` and `sources`. A template
    has a `name` and either `text` or `messages` for both poles, or a text or messages for each of `positive` and
    `negative`. An item has a `name`, and fields: a text, or one for each pole. Every item goes into every template, in
    place of `{field}`. Templates and items may say whether they are `held_out`; pairs of one that is with one that is
    not would leak, and are left out.

    Lines and rows have `positive` and `negative`, and may have `template`, `item` and `held_out`. Their concept has
    the file's name.

    Raises:
        ValueError: something is missing, malformed or double; it names the file and the line, template or item.
        FileNotFoundError: there is no such file.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], Concept]] = {".json": _from_json, ".jsonl": _from_jsonl, ".csv": _from_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a concept is read from a file that ends in {', '.join(readers)}")
    return readers[path.suffix](path)


# Splitting


def _draw_sides(pairs: Sequence[ContrastPair], share: float, rng: random.Random) -> list[bool | None]:
    """Whether each pair is held out; None for one that is left out."""
    places = [(pair.template, (pair.item, 0 if pair.item else index)) for index, pair in enumerate(pairs)]
    templates, items = zip(*places, strict=True)
    template_sides = _draw(templates, share, rng) if len(set(templates)) > 1 else {}
    # An item that stands on one side of the templates only cannot leak, and goes with them.
    held = [item for template, item in places if template_sides.get(template) is not False]
    rest = {item for template, item in places if template_sides.get(template) is not True}
    contested = [item for item in held if item in rest]
    item_sides = _draw(contested, share, rng) if len(set(items)) > 1 else {}
    sides = [(template_sides.get(template), item_sides.get(item)) for template, item in places]
    return [None if _leaks(*side) else _either(*side) for side in sides]


def _draw(names: Sequence[Name], share: float, rng: random.Random) -> dict[Name, bool]:
    """Which of the names are held out: a share of them, for at least LEAST pairs, but never all of several."""
    pairs = Counter(names)
    order = rng.sample(sorted(pairs), len(pairs))
    most = max(1, len(order) - 1)
    count = min(max(1, round(share * len(order))), most)
    while count < most and sum(pairs[name] for name in order[:count]) < LEAST:
        count += 1
    return {name: rank < count for rank, name in enumerate(order)}


def _leaks(template_side: bool | None, item_side: bool | None) -> bool:
    return {template_side, item_side} == {True, False}


def _either(template_side: bool | None, item_side: bool | None) -> bool | None:
    return item_side if template_side is None else template_side


# Checking


def _name(pair: ContrastPair, index: int) -> str:
    parts = [f"template {pair.template!r}"] * bool(pair.template) + [f"item {pair.item!r}"] * bool(pair.item)
    return f"pair {index}" + (f" ({', '.join(parts)})" if parts else "")


def _check_pair(pair: ContrastPair, where: str) -> None:
    for pole in POLES:
        _check_text(getattr(pair, pole), f"{where}: {pole}")
    if isinstance(pair.positive, str) != isinstance(pair.negative, str):
        raise ValueError(f"{where}: one pole is a text and the other a chat, and both must be alike")
    if pair.positive == pair.negative:
        raise ValueError(f"{where}: the positive and the negative are identical, so they have no concept between them")


def _check_text(text: object, where: str) -> None:
    if isinstance(text, str):
        contents = [text]
    elif isinstance(text, Sequence):
        contents = [_content(message, where) for message in text]
    else:
        raise ValueError(f"{where} must be a text or a list of messages, and is {text!r}")
    if not any(content.strip() for content in contents):
        raise ValueError(f"{where} is empty")


def _content(message: object, where: str) -> str:
    if not (isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
        raise ValueError(f"{where}: a message has a 'role' and a 'content', both texts, and this one is {message!r}")
    content: str = message["content"]
    return content


def _check_file(located: Iterable[tuple[str, ContrastPair]], path: Path) -> tuple[ContrastPair, ...]:
    """The pairs of a file, each with the place that it stands at, once they are checked."""
    places: dict[str, str] = {}
    pairs = []
    for where, pair in located:
        _check_pair(pair, where)
        poles = json.dumps([pair.positive, pair.negative], sort_keys=True)
        if poles in places:
            raise ValueError(f"{where}: the same pair stands at {places[poles]}")
        places[poles] = where
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no contrast pairs")
    return tuple(pairs)


# A concept file: templates and items


def _from_json(path: Path) -> Concept:
    content = _mapping(_parse(_read(path), str(path)), str(path))
    poles = _mapping(content.get("poles", {pole: pole for pole in POLES}), f"{path}: poles")
    sources = _get(content, "sources", list, str(path)) if "sources" in content else []
    return Concept(
        name=_get(content, "concept", str, str(path)),
        description=_get(content, "description", str, str(path)) if "description" in content else "",
        poles={pole: _get(poles, pole, str, f"{path}: poles") for pole in POLES},
        sources=tuple(sources),
        pairs=_check_file(_cross(content, path), path),
    )


def _cross(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, ContrastPair]]:
    """Every template with every item, but for those that would leak, and the place of each."""
    templates, items = (_entries(content, kind, path) for kind in ("templates", "items"))
    for template, template_side in templates:
        place = f"{path}: template {template['name']!r}"
        poles = _poles(template, place)
        for item, item_side in items:
            if _leaks(template_side, item_side):
                continue
            where = f"{place}, item {item['name']!r}"
            positive, negative = (_fill(poles[pole], item, pole, where) for pole in POLES)
            held_out = _either(template_side, item_side)
            yield where, ContrastPair(positive, negative, template["name"], item["name"], held_out)


def _entries(content: Mapping[str, Any], kind: str, path: Path) -> list[tuple[Mapping[str, Any], bool | None]]:
    """The templates (or items), each with whether it is held out: None for all of them where no one says so."""
    entries = [_mapping(entry, f"{path}: {kind}") for entry in _get(content, kind, list, str(path))]
    decided = any("held_out" in entry for entry in entries)
    names = set()
    for index, entry in enumerate(entries):
        name = _get(entry, "name", str, f"{path}: {kind}[{index}]")
        if name in names:
            raise ValueError(f"{path}: two {kind} are named {name!r}")
        names.add(name)
    flags = [_flag(entry, f"{path}: {kind} {entry['name']!r}") for entry in entries]
    return [(entry, bool(flag) if decided else None) for entry, flag in zip(entries, flags, strict=True)]


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
        _check_text(text, f"{where}: {pole}")
    return poles


def _fill(text: Any, item: Mapping[str, Any], pole: str, where: str) -> Text:
    if not isinstance(text, str):
        return tuple({**message, "content": str(_fill(message["content"], item, pole, where))} for message in text)
    return re.sub(r"\{([A-Za-z_]\w*)\}", lambda field: _value(item, field[1], pole, where), text)


def _value(item: Mapping[str, Any], name: str, pole: str, where: str) -> str:
    fields = {key: value for key, value in item.items() if key not in ("name", "held_out")}
    if name not in fields:
        raise ValueError(
            f"{where}: the template asks for {{{name}}}, and the item has {', '.join(fields) or 'no field'}"
        )
    value = fields[name]
    if isinstance(value, Mapping):
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
        _get(row, pole, (str, list), where)
    names = {key: _get(row, key, str, where) for key in ("template", "item") if row.get(key) is not None}
    return ContrastPair(row["positive"], row["negative"], **names, held_out=_flag(row, where))


# Reading what others wrote


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


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
