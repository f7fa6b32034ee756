"""Which token is where: texts to padded batches, and columns to absolute positions.

A position counts the tokens of a row that are not padding, from the first of its prompt. A slot counts columns, padding
included, from the first that the cache holds. The functions here are pure; `calls.py` finds out what a call holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repe.models.chats import Chat, encode_answers, encode_chat
from repe.models.ends import unended

Text = str | Chat
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


# texts -> batches


def encode(tokenizer: Any, text: Text) -> list[int]:
    """The token ids of a text, or of a chat as `repe.chats` renders it. The tokenizer is not changed.

    Raises:
        TypeError: this is no tokenizer.
        ValueError: the text has no tokens, or the tokenizer's template refuses the chat.
    """
    check_tokenizer(tokenizer)
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else encode_chat(tokenizer, text)
    if len(ids) == 0:
        raise ValueError(f"the text {text!r} has no tokens: give a text of at least one token")
    return list(ids)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError for a processor of images or sound, and for whatever else is no tokenizer."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return
    inner = hasattr(getattr(tokenizer, "tokenizer", None), "convert_ids_to_tokens")
    advice = "pass its own, `processor.tokenizer`" if inner else "is the order of the arguments right?"
    raise TypeError(f"expected a tokenizer of transformers, and got {type(tokenizer).__name__}: {advice}")


def encode_behind(tokenizer: Any, text: Text, answers: Sequence[str]) -> list[list[int]]:
    """The token ids of a text, or a chat, with each of several answers behind it: encoded together, and not ended.

    Raises:
        TypeError: this is no tokenizer.
        ValueError: the tokenizer's template refuses the chat.
    """
    check_tokenizer(tokenizer)
    if isinstance(text, str):
        return [unended(tokenizer, text + answer) for answer in answers]
    return encode_answers(tokenizer, text, answers)


def pad(rows: Sequence[Sequence[int]], side: str = "right", device: Any = None) -> dict[str, Tensor]:
    """Ragged rows of token ids as a batch: `input_ids` and `attention_mask`, both (rows, tokens).

    The filler is token 0, which the mask hides: no pad token is needed, and no tokenizer is asked.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns] = torch.tensor(row)
        mask[i, columns] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def strings(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What every token adds to the text of those before it; together they are the text.

    A letter of several tokens comes with the last of them, and the others add nothing.
    """
    pieces = Pieces(tokenizer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found = [pieces.add(token) for token in ids]
    return (*found[:-1], found[-1] + pieces.rest()) if found else ()


class Pieces:
    """A text that comes token by token, in pieces that can be read: a character may take several tokens.

    What a token adds depends on the one before it, so the tokens of the last piece are decoded along: alone it may lose
    its space, or be a part of a character.
    """

    def __init__(self, tokenizer: Any, **how: bool) -> None:
        self.tokenizer = tokenizer
        self.how = {"skip_special_tokens": True, **how}
        self.ids: list[int] = []
        self._begun = self._shown = 0

    def add(self, token: int) -> str:
        """What a token makes readable; nothing while a character is incomplete."""
        self.ids.append(token)
        return self._new(lambda text: not text.endswith(INCOMPLETE))

    def rest(self) -> str:
        """What is left once no token is to come."""
        return self._new(bool)

    def _new(self, is_readable: Callable[[str], bool]) -> str:
        parts = (self.ids[self._begun : self._shown], self.ids[self._begun :])
        known, text = (str(self.tokenizer.decode(part, **self.how)) for part in parts)
        if len(text) <= len(known) or not is_readable(text):
            return ""
        self._begun, self._shown = self._shown, len(self.ids)
        return text[len(known) :]


# slots -> positions


@dataclass(frozen=True)
class Columns:
    """The first columns that a cache holds, padding among them: what is worked out once and used at every token.

    `mask` (rows, width) is true where not padding, `positions` (rows, width) are the places in the text, and `length`
    (rows, 1) counts the tokens that are not padding.
    """

    mask: Tensor
    positions: Tensor
    length: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Columns:
        counted = mask.long().cumsum(dim=1)
        return cls(mask.bool(), counted - 1, counted[:, -1:])

    def at(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (rows, tokens) of the tokens in `slots`, and a mask of their shape that is false at padding."""
        inside = slots.clamp(max=self.mask.shape[1] - 1)
        return self.positions[:, inside] + (slots - inside), self.mask[:, inside] | (slots > inside)

    def beyond(self, slots: Tensor) -> Tensor:
        """Positions (rows, tokens) of tokens that all stand behind these columns."""
        return self.length + (slots - self.mask.shape[1])


def positions_at(slots: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions and validity of the tokens in `slots`.

    Args:
        slots: (tokens,), counted from the first column the cache holds.
        mask: (rows, width), true where the first `width` slots are not padding; slots beyond are. None: no padding.

    Returns:
        positions (rows or 1, tokens), and a mask of the same shape that is false at padding, or None if none is.
    """
    return (slots[None], None) if mask is None else Columns.of(mask).at(slots)
