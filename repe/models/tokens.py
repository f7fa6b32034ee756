"""Which token is where: texts to padded batches, absolute positions, and scopes to masks.

A position counts the tokens of a row that are not padding, from the first of its prompt. A slot counts columns, padding
included, from the first that the cache holds. The functions here are pure; `calls.py` finds out what a call holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repe.models.chats import Chat, encode_chat

Text = str | Chat
Scope = str | slice | Sequence[int] | Tensor

NAMED_SCOPES = ("all", "prompt", "generated", "answer")


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


# scopes -> masks


def check_scope(scope: Scope) -> Scope:
    """Returns the scope if it can be understood, lists made tuples. Raises ValueError or TypeError where not."""
    if isinstance(scope, str):
        if scope not in NAMED_SCOPES:
            raise ValueError(
                f"scope={scope!r} is not known: use one of {NAMED_SCOPES}, a slice or a list of positions, or a "
                "boolean mask (rows, tokens)"
            )
        return scope
    if isinstance(scope, slice):
        if not all(bound is None or type(bound) is int for bound in (scope.start, scope.stop, scope.step)):
            raise TypeError(f"scope={scope}: the bounds and the step of a slice must be integers")
        if scope.step is not None and scope.step < 1:
            raise ValueError(f"scope={scope}: the step must be positive")
        return scope
    if isinstance(scope, Tensor):
        if scope.dtype != torch.bool or scope.ndim != 2:
            raise TypeError(
                f"a scope given as a tensor is a boolean mask (rows, tokens), got {scope.dtype} of {tuple(scope.shape)}"
            )
        return scope
    if isinstance(scope, Sequence) and scope and all(type(p) is int for p in scope):
        return tuple(map(int, scope))
    raise TypeError(f"scope={scope!r}: expected a name of {NAMED_SCOPES}, a slice, at least one integer, or a mask")


def needs_prompt_length(scope: Scope) -> bool:
    """Whether the scope can only be placed once it is known where the prompt ends."""
    if isinstance(scope, str):
        return scope != "all"
    if isinstance(scope, slice):
        return any(bound is not None and bound < 0 for bound in (scope.start, scope.stop))
    return not isinstance(scope, Tensor) and any(p < 0 for p in scope)


def in_scope(scope: Scope, positions: Tensor, prompt_length: Tensor | None, slots: Tensor) -> Tensor | None:
    """Which tokens a scope names: (rows or 1, tokens) boolean, or None for every one. Padding is not considered here.

    Args:
        positions: (rows or 1, tokens).
        prompt_length: (rows or 1, 1), the tokens of the prompt that are not padding; None if the scope needs none.
        slots: (tokens,), for a scope that is a mask over columns.
    """
    if isinstance(scope, str) and scope == "all":
        return None
    if isinstance(scope, Tensor):
        inside = slots.clamp(0, scope.shape[1] - 1)
        return scope[:, inside] & (slots == inside)
    end = positions.new_zeros(1, 1) if prompt_length is None else prompt_length
    if scope == "prompt":
        return positions < end
    if scope == "generated":
        return positions >= end
    if scope == "answer":
        return positions >= end - 1
    if isinstance(scope, slice):
        return _in_slice(scope, positions, end)
    assert not isinstance(scope, str)
    wanted = [p if p >= 0 else p + end for p in scope]
    return torch.stack([(positions == p).expand_as(positions + end) for p in wanted]).any(dim=0)


def _in_slice(scope: slice, positions: Tensor, end: Tensor) -> Tensor:
    start = torch.zeros_like(end) if scope.start is None else _from_end(scope.start, end)
    inside = positions >= start
    if scope.stop is not None:
        inside = inside & (positions < _from_end(scope.stop, end))
    return inside & ((positions - start) % (scope.step or 1) == 0)


def _from_end(bound: int, end: Tensor) -> Tensor:
    return torch.full_like(end, bound) if bound >= 0 else (end + bound).clamp(min=0)


def check_inside(scope: Sequence[int], shortest: int) -> None:
    """Raises IndexError if the scope names a position before the start of a prompt of `shortest` tokens."""
    if (worst := min(scope)) < -shortest:
        raise IndexError(
            f"scope position {worst} lies before the start of a prompt of {shortest} tokens: positions count from the "
            "prompt's end when they are negative, padding left out"
        )
