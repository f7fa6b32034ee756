"""Which token is where: texts to padded batches, and columns to absolute positions.

A position counts the tokens of a row that are not padding, from the first of its prompt. A slot counts columns, padding
included, from the first that the cache holds. The functions here are pure; `calls.py` finds out what a call holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repe.models.chats import Chat, encode_answers, encode_chat
from repe.models.ends import unended

Text = str | Chat


# texts -> batches


def encode(tokenizer: Any, text: Text) -> list[int]:
    """The token ids of a text, or of a chat as `repe.chats` renders it. The tokenizer is not changed.

    Raises:
        ValueError: the text has no tokens, or the tokenizer's template refuses the chat.
    """
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else encode_chat(tokenizer, text)
    if len(ids) == 0:
        raise ValueError(f"the text {text!r} has no tokens: give a text of at least one token")
    return list(ids)


def encode_behind(tokenizer: Any, text: Text, answers: Sequence[str]) -> list[list[int]]:
    """The token ids of a text, or a chat, with each of several answers behind it: encoded together, and not ended.

    Raises:
        ValueError: the tokenizer's template refuses the chat.
    """
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
    """What every token stands for, as it is read."""
    return tuple(tokenizer.decode([i]) for i in ids)


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
