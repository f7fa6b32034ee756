"""Answers: what is scored, as token ids. An item has one for every option."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from repe.data.items import Item
from repe.models.tokens import encode_behind


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

    The tokens are those of the prompt and the option together, as a model reads a text. An item's options begin behind
    the tokens that are the prompt's with every one of them: where an option changes the prompt's last token, as "able"
    does that of "un", the token is the options'. Behind a chat written as a plain transcript, for want of a template,
    an option stands after a space.

    Raises:
        ValueError: an option has no tokens, or no token is the prompt's with every option.
    """
    return [answer for item in items for answer in _options(tokenizer, item)]


def _options(tokenizer: Any, item: Item) -> list[Answer]:
    prompt, *texts = encode_behind(tokenizer, item.prompt, ["", *item.options])
    if prompt in texts:
        raise ValueError(f"the option {item.options[texts.index(prompt)]!r} has no tokens, so it has no probability")
    shared = len([*takewhile(lambda column: len({*column}) == 1, zip(prompt, *texts, strict=False))])
    if not shared:
        raise ValueError(
            f"no token of the prompt {item.prompt!r:.80} stays as it is before the options {item.options!r:.80}: give "
            "a longer prompt, or options that begin with a space"
        )
    return [Answer(tuple(text), shared) for text in texts]
