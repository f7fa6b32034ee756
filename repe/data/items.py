"""What behaviour and helpfulness are measured on: prompts with options, of which one is right.

A behaviour item has two options, the aligned one first; a skill item has several and one right answer. Either way the
score is what the model gives to option `answer`, against the others. Requests have no options: what a model writes
after them is judged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from pydantic import ModelWrapValidatorHandler, model_validator

from repe.data.files import Message, Row, TextOrChat, once, read_rows, text_of
from repe.data.pairs import check_text

if TYPE_CHECKING:
    from repe.models.tokens import Text


@dataclass(frozen=True)
class Item:
    """A prompt, the options that may follow it, and which of them is the right (or the aligned) one.

    `group` names what items share and must not be taken for independent: a fact, a request. `about` is whatever else
    its line says of it.

    Raises:
        ValueError: the prompt is neither a text nor a chat; or the options are no texts that differ; or `answer` is not
            the number of one.
    """

    prompt: Text
    options: tuple[str, ...]
    answer: int = 0
    group: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            check_text(self.prompt, "the prompt")
        if isinstance(self.options, str) or not all(isinstance(option, str) for option in self.options):
            raise ValueError(f"`options` are texts in a row, such as (' yes', ' no'); got {self.options!r:.80}")
        if not self.options or len(set(self.options)) < len(self.options):
            raise ValueError(f"`options` are one or more, and all different; got {self.options!r:.80}")
        if not _is_number_of(self.answer, self.options):
            raise ValueError(
                f"`answer` is the number of an option, from 0 to {len(self.options) - 1}; got {self.answer!r}"
            )
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "answer", int(self.answer))


@dataclass(frozen=True)
class RequestPair:
    """A harmful request and a harmless one of the same topic and form: what a safe model refuses, and what it does.

    `refusals` are what a text begins with that refuses either; where there are none, a judge has to tell.

    Raises:
        ValueError: a request is neither a text nor a chat, or empty; or both are the same, or of different kinds; or a
            refusal begins with nothing.
    """

    harmful: Text
    harmless: Text
    refusals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("harmful", "harmless"):
            check_text(getattr(self, name), f"{name}: the request")
        if isinstance(self.harmful, str) != isinstance(self.harmless, str):
            raise ValueError("one request of the pair is a text and the other a chat, and both must be alike")
        if self.harmful == self.harmless:
            raise ValueError(f"the harmful and the harmless request are the same: {self.harmful!r:.80}")
        if isinstance(self.refusals, str) or not all(isinstance(r, str) and r.strip() for r in self.refusals):
            raise ValueError(f"`refusals` are beginnings of texts, such as ['Sorry, I']; got {self.refusals!r:.80}")
        object.__setattr__(self, "refusals", tuple(self.refusals))


def load_items(path: str | os.PathLike[str]) -> list[Item]:
    """Read items from a JSONL file, one a line, or from a CSV file, one a row.

    A line has `text`, or a chat as `messages`, and either `aligned` and `misaligned`, or `options` and `answer`. It may
    have an `id` that no other has, a `group`, and `about`, which holds anything. A row has the same in columns, except
    for `messages` and `about`, with `option_0`, `option_1`, ... for the options; those a row has no use for are blank.

    An `answer` is the option's number from 0 on, its letter from A on, or its own text, where that means one option.

    Raises:
        ValueError: a line is not such an item, or there are none; the text names the file and the line.
        FileNotFoundError: there is no such file.
    """
    rows = _read(path, _ItemRow, "items")
    return [Item(row.prompt, tuple(row.options), row.answer, row.group, row.about) for row in rows]


def load_texts(path: str | os.PathLike[str]) -> list[Text]:
    """Read texts from a JSONL or CSV file: every line has a `text`, or a chat as `messages`, and no options.

    It may have the rest of what an item has. Raises as `load_items` does.
    """
    return [row.prompt for row in _read(path, _TextRow, "texts")]


def load_requests(path: str | os.PathLike[str]) -> list[RequestPair]:
    """Read pairs of requests from a JSONL or CSV file.

    Every line has a `harmful` and a `harmless` request, both texts or both chats. It may have an `id` that no other
    has, and, in JSONL, a list `refusals` of what texts begin with that refuse. Raises as `load_items` does.
    """
    return [row.pair for row in _read(path, _RequestRow, "requests")]


class _TextRow(Row):
    text: str = ""
    messages: list[Message] = []
    id: str = ""
    group: str = ""
    about: dict[str, Any] = {}

    @model_validator(mode="after")
    def _says_something(self) -> _TextRow:
        check_text(self.prompt, *self.one_of(["text"], ["messages"]))
        return self

    @property
    def prompt(self) -> Text:
        return text_of(self.messages or self.text)


class _ItemRow(_TextRow):
    """Once it is checked it has `options`, and the number of one of them as `answer`."""

    aligned: str = ""
    misaligned: str = ""
    options: list[str] = []
    answer: Any = 0

    @model_validator(mode="wrap")
    @classmethod
    def _gathers_columns(cls, row: Any, read: ModelWrapValidatorHandler[_ItemRow]) -> _ItemRow:
        """Take `option_0`, `option_1`, ... for the `options`."""
        names = [name for name in row if re.fullmatch(r"option_\d+", name)] if isinstance(row, dict) else []
        if not names or "options" in row:
            return read(row)
        options = [row.get(f"option_{number}") for number in range(len(names))]
        if None in options:
            raise ValueError(f"expected options in option_0, option_1, ... with none left out, got {', '.join(names)}")
        return read({key: value for key, value in row.items() if key not in names} | {"options": options})

    @model_validator(mode="after")
    def _has_an_answer(self) -> _ItemRow:
        is_skill = "options" in self.one_of(["aligned", "misaligned"], ["options", "answer"])
        if not is_skill:
            self.options = [self.aligned, self.misaligned]
        if len(set(self.options)) < max(2, len(self.options)) or not all(map(str.strip, self.options)):
            raise ValueError(f"expected two options or more, all different and none blank, got {self.options}")
        if is_skill:
            self.answer = _number(self.answer, self.options)
        return self


class _RequestRow(Row):
    harmful: TextOrChat
    harmless: TextOrChat
    refusals: list[str] = []
    id: str = ""

    @model_validator(mode="after")
    def _is_a_pair(self) -> _RequestRow:
        assert self.pair
        return self

    @property
    def pair(self) -> RequestPair:
        return RequestPair(text_of(self.harmful), text_of(self.harmless), tuple(self.refusals))


def _number(answer: Any, options: Sequence[str]) -> int:
    """Which of the options an answer means. Raises ValueError if it means none, or may mean more than one."""
    if isinstance(answer, str):
        letters = ascii_uppercase.ljust(len(options))
        names = [{str(i), letters[i], letters[i].lower(), option.strip()} for i, option in enumerate(options)]
        said = [number for number, of in enumerate(names) if answer.strip() in of]
        meant = [number for number, of in enumerate(names) if any(_alike(answer, name) for name in of)]
    else:
        said = meant = [int(answer)] if _is_number_of(answer, options) else []
    if not len(said) == len(meant) == 1:
        means = f"any of the options {', '.join(map(str, meant))}" if said else "none of the options"
        raise ValueError(
            f"the answer {answer!r} means {means}: expected the number of one, from 0 to {len(options) - 1}, its "
            "letter from A on, or its own text"
        )
    return meant[0]


def _alike(answer: str, name: str) -> bool:
    """Whether an answer may be meant as a name: it is the same but for capitals, or as a number."""
    try:
        return float(answer) == float(name)
    except ValueError:
        return answer.strip().casefold() == name.casefold()


def _is_number_of(answer: Any, options: Sequence[str]) -> bool:
    """Whether this is the number of an option; to Python, False and 0.0 are 0 as well."""
    return isinstance(answer, Integral) and not isinstance(answer, bool) and 0 <= int(answer) < len(options)


def _read(path: str | os.PathLike[str], schema: type[Any], content: str) -> list[Any]:
    places: dict[str, str] = {}
    found = []
    for where, row in read_rows(path, schema, content):
        if row.id:
            once(places, row.id, f"the id {row.id!r}", where)
        found.append(row)
    if not found:
        raise ValueError(f"{path}: no {content}: expected at least one")
    return found
