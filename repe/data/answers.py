"""Answers: what is scored, as token ids. An item has one for every option."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from repe.data.items import Item
from repe.models.chats import cue
from repe.models.tokens import Text, encode


@dataclass(frozen=True)
class Answer:
    """A text as token ids, and where in it the answer begins: how many of the tokens before it are the prompt's.

    Raises:
        ValueError: there is no token before the answer, from which its first could be predicted.

    Example:
        >>> Answer((5, 6, 7), begins=2).ids[2:]
        (7,)
    """

    ids: tuple[int, ...]
    begins: int

    def __post_init__(self) -> None:
        if not 1 <= self.begins <= len(self.ids):
            raise ValueError(
                f"an answer begins behind at least one of its {len(self.ids)} tokens, not at {self.begins}"
            )


def answers_of(tokenizer: Any, items: Iterable[Item]) -> list[Answer]:
    """The options of all items, one after another, each behind its prompt.

    An option's tokens follow the prompt's as they are. Behind a chat written as a plain transcript, for want of a
    template, it stands after a space.

    Raises:
        ValueError: an option has no tokens.
    """
    answers = []
    for item in items:
        prompt = encode(tokenizer, item.prompt)
        options = [_option(tokenizer, option, item.prompt) for option in item.options]
        answers += [Answer((*prompt, *option), len(prompt)) for option in options]
    return answers


def _option(tokenizer: Any, option: str, prompt: Text) -> Sequence[int]:
    before = "" if isinstance(prompt, str) else cue(tokenizer, prompt)
    text = before + " " * (before != "" and option[:1].strip() != "") + option
    known, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] if t else [] for t in (before, text))
    if len(ids) <= len(known):
        raise ValueError(f"the option {option!r} has no tokens, so it has no probability")
    return ids[len(known) :]
