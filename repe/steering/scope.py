"""The scope: which tokens are edited, and how strongly every token of a forward is, by alpha, scope and gate.

The functions here are pure; what a forward holds is found out in `models/call.py`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from repe.models.call import Forward

Scope = str | slice | Sequence[int] | Tensor
"""A name, a slice or a list of positions (negatives count from the prompt's end), or a boolean mask (rows, tokens)."""
Alpha = float | Sequence[float] | Tensor
"""One strength for all rows of a batch, or one a row."""

NAMED_SCOPES = ("all", "prompt", "generated", "answer")


# scopes


def check_scope(scope: Scope) -> Scope:
    """Return the scope if it can be understood, lists made tuples and masks copied; raise ValueError or TypeError if
    not."""
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
        return scope.clone()  # an edit stays what it is
    if isinstance(scope, Sequence) and scope and all(type(p) is int for p in scope):
        return tuple(map(int, scope))
    raise TypeError(f"scope={scope!r}: expected a name of {NAMED_SCOPES}, a slice, at least one integer, or a mask")


def named(scope: Scope) -> str:
    """The scope as errors call it."""
    return f"a mask of {tuple(scope.shape)}" if isinstance(scope, Tensor) else repr(scope)


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


def check_for_many(scope: Scope) -> None:
    """Raises ValueError if the scope is a mask, which is of one batch."""
    if isinstance(scope, Tensor):
        raise ValueError("a mask of one batch is no scope for many: name the scope, as in scope='answer'")


def check_inside(scope: Sequence[int], shortest: int) -> None:
    """Raises IndexError if the scope names a position before the start of a prompt of `shortest` tokens."""
    if (worst := min(scope)) < -shortest:
        raise IndexError(
            f"scope position {worst} lies before the start of a prompt of {shortest} tokens: positions count from the "
            "prompt's end when they are negative, padding left out"
        )


def check_rows(prompt_length: Tensor, forward: Forward) -> None:
    """Raises ValueError if prompts' lengths are of other rows than the batch has."""
    if prompt_length.shape[0] not in (1, forward.rows):
        raise ValueError(f"prompt_length has {prompt_length.shape[0]} rows, and the batch {forward.rows}")


def scope_to_json(scope: Scope) -> Any:
    """Plain JSON data that `scope_from_json` makes the scope of again."""
    if isinstance(scope, slice):
        return {"slice": [scope.start, scope.stop, scope.step]}
    if isinstance(scope, Tensor):
        return {"mask": scope.tolist(), "shape": [*scope.shape]}
    return scope if isinstance(scope, str) else list(scope)


def scope_from_json(data: Any) -> Scope:
    if isinstance(data, Mapping):
        if "slice" in data:
            return check_scope(slice(*data["slice"]))
        return torch.tensor(data["mask"], dtype=torch.bool).reshape(data["shape"])
    return check_scope(data)


# scope + forward + alphas + gate -> strength


def strength_of(
    alphas: Tensor, scope: Scope, forward: Forward, is_open: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """How strongly every token of a forward is edited, and which of them are edited at all.

    Args:
        alphas: (1,) or (texts,), float32, on the device of the forward's slots.
        scope: as `check_scope` returned it.
        forward: what the forward holds.
        is_open: (rows,), which rows a gate lets through; None for all.

    Returns:
        (rows or 1, tokens or 1): alpha in scope, 0 elsewhere. The mask of the tokens in scope, of the same shape; None
        where that is all of them.

    Raises:
        ValueError: the batch has other rows than alpha or the scope, or nobody can tell where its prompt ends.
        IndexError: the scope names a position before the start of the prompt.
    """
    mask = _mask(scope, forward)
    if is_open is not None:
        mask = is_open[:, None] if mask is None else mask & is_open[:, None]
    amount = _of_rows(alphas, forward)[:, None]
    return (amount, None) if mask is None else (torch.where(mask, amount, 0.0), mask)


def is_uniform(scope: Scope, forward: Forward) -> bool:
    """Whether a scope names all tokens of a forward, as far as is known without asking the device."""
    if forward.valid is not None or not isinstance(scope, str):
        return False
    return scope == "all" or (scope in ("generated", "answer") and forward.is_past_prompt)


def _mask(scope: Scope, forward: Forward) -> Tensor | None:
    length = None
    if forward.unplaced and not (isinstance(scope, str) and scope == "all"):
        raise ValueError(
            f"scope={named(scope)} cannot be placed in this forward: {forward.unplaced}, or use `generate`, or choose "
            "scope='all'"
        )
    if needs_prompt_length(scope):
        length = None if forward.goes_on else forward.prompt_length
        if length is None:
            what = "one that goes on from the forward before it" if forward.goes_on else "a forward on a filled cache"
            raise ValueError(
                f"scope={named(scope)} needs to know where the prompt ends, and {what} does not tell: use `generate`, "
                "or set prompt_length, or choose scope='all'"
            )
        check_rows(length, forward)
        if forward.starts_prompt and isinstance(scope, tuple):
            check_inside(scope, int(length.min()))
    if isinstance(scope, Tensor):
        scope = _mask_rows(scope.to(forward.slots.device), forward)
    mask = in_scope(scope, forward.positions, length, forward.slots)
    if mask is None or forward.valid is None:
        return forward.valid if mask is None else mask
    return mask & forward.valid


def _mask_rows(scope: Tensor, forward: Forward) -> Tensor:
    if scope.shape[0] != forward.texts or (forward.starts_prompt and scope.shape[1] > forward.tokens):
        raise ValueError(
            f"the scope is a mask of {tuple(scope.shape)}, and the batch is ({forward.texts}, {forward.tokens}): give "
            "one row a text and at most one column a token"
        )
    return repeat(scope, "texts tokens -> (texts copies) tokens", copies=forward.rows // forward.texts)


def _of_rows(alphas: Tensor, forward: Forward) -> Tensor:
    """(rows or 1,): beams and returned sequences repeat the texts."""
    if alphas.shape[0] == 1:
        return alphas
    if alphas.shape[0] != forward.texts:
        raise ValueError(
            f"alpha has {alphas.shape[0]} rows, and the batch {forward.texts}: give one number a text, or one for all"
        )
    return repeat(alphas, "texts -> (texts copies)", copies=forward.rows // forward.texts)
