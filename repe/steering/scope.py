"""The scope: which tokens are edited, and how strongly every token of a forward is, by alpha, scope and gate."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from repe.models.call import Forward
from repe.steering.gate import Decision, PromptReader

Scope = str | slice | Sequence[int] | Tensor
"""A name, a slice or a list of positions (negatives count from the prompt's end), or a boolean mask (rows, tokens)."""

NAMED_SCOPES = ("all", "prompt", "generated", "answer")
UNATTACHED = sys.maxsize
Alpha = float | Sequence[float] | Tensor


# scopes -> masks


def check_scope(scope: Scope) -> Scope:
    """Return the scope if it can be understood, lists made tuples. Raises ValueError or TypeError where not."""
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


def scope_to_json(scope: Scope) -> Any:
    """Plain JSON data that `scope_from_json` makes the scope of again."""
    if isinstance(scope, slice):
        return {"slice": [scope.start, scope.stop, scope.step]}
    if isinstance(scope, Tensor):
        return {"mask": scope.tolist()}
    return scope if isinstance(scope, str) else list(scope)


def scope_from_json(data: Any) -> Scope:
    if isinstance(data, Mapping):
        return slice(*data["slice"]) if "slice" in data else torch.tensor(data["mask"], dtype=torch.bool)
    return check_scope(data)


# alpha, scope and gate -> strength


class Strength:
    """Alpha, scope and gate of one handle, and the tensor that they make of a forward.

    Attributes:
        prompt_length: what the user says of it, for forwards outside `generate`.
        gate: decides from the prompts which rows are edited; None: all are.
        serial: tells this handle from all others of its model, past ones too; a forward remembers by it.
        version: counts the changes.
        largest, least: of the absolute values of alpha.
        touched: whether any token was ever in scope: known, or still on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._alpha = torch.zeros(1, device=device)
        self._scope: Scope = "all"
        self.largest = self.least = 0.0
        self.version = 0
        self._prompt_length: int | Tensor | None = None
        self._told: Tensor | None = None
        self.gate: Decision | None = None
        self._bare_reader: PromptReader | None = None
        self.serial = UNATTACHED
        self.touched: bool | Tensor = False

    @property
    def alpha(self) -> float | Tensor:
        return self._alpha.item() if self._alpha.numel() == 1 else self._alpha.clone()

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        try:
            new = torch.as_tensor(value, dtype=torch.float32).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"alpha must be a number or one number a row, got {value!r}") from error
        if new.ndim > 1 or new.numel() == 0:
            raise ValueError(f"alpha must be a number or one number a row, got the shape {tuple(new.shape)}")
        if not new.isfinite().all():
            raise ValueError(f"alpha must be finite, got {value}")
        rows = new.reshape(-1)
        with torch.inference_mode(False), torch.no_grad():
            if rows.shape == self._alpha.shape:
                self._alpha.copy_(rows)
            else:
                self._alpha = rows.to(self._alpha.device, copy=True)
        self.largest, self.least = new.abs().max().item(), new.abs().min().item()
        self.version += 1

    @property
    def scope(self) -> Scope:
        return self._scope

    @scope.setter
    def scope(self, value: Scope) -> None:
        self._scope = check_scope(value)

    @property
    def prompt_length(self) -> int | Tensor | None:
        return self._prompt_length

    @prompt_length.setter
    def prompt_length(self, value: int | Tensor | None) -> None:
        self._prompt_length, self._told = value, None

    def on(self, device: torch.device, forward: Forward) -> tuple[Tensor, bool]:
        """(rows or 1, tokens or 1), float32, and whether it is known that none of them is 0; worked out once a forward
        and device.

        Raises:
            ValueError: the batch has other rows than alpha or the scope, or nobody can tell where its prompt ends.
            IndexError: the scope names a position before the start of the prompt.
        """
        key = (self.serial, device)
        if key not in forward.memo:
            home = forward.slots.device
            if device == home:
                forward.memo[key] = self._of(forward)
            else:
                strength, everywhere = self.on(home, forward)
                forward.memo[key] = strength.to(device), everywhere
        return forward.memo[key]

    @property
    def is_number(self) -> bool:
        """Whether all rows have one alpha."""
        return self._alpha.numel() == 1

    def is_one(self, forward: Forward) -> bool:
        """Whether every token of a forward is edited alike, as far as is known without asking the device."""
        if self.least == 0 or not self.is_number or self.gate is not None or forward.valid is not None:
            return False
        scope = self._scope if isinstance(self._scope, str) else ""
        return scope == "all" or (scope in ("generated", "answer") and forward.is_past_prompt)

    def times(self, shift: Tensor) -> Tensor:
        """What one alpha for all makes of the displacement of alpha = 1."""
        return self._alpha.to(shift) * shift

    def _of(self, forward: Forward) -> tuple[Tensor, bool]:
        device = forward.slots.device
        mask = self._mask(forward)
        if (reader := self._reader_of(forward)) is not None:
            is_open = self._open_rows(reader, forward)[:, None]
            mask = is_open if mask is None else mask & is_open
        alpha = self._alpha_rows(forward, device)[:, None]
        self.touched = True if mask is None or torch.compiler.is_compiling() else mask.any() | self.touched
        if mask is None:
            return alpha, not torch.compiler.is_compiling() and self.least > 0
        return torch.where(mask, alpha, 0.0), False

    def _mask(self, forward: Forward) -> Tensor | None:
        scope, length = self._scope, None
        if forward.unplaced and not (isinstance(scope, str) and scope == "all"):
            raise ValueError(
                f"scope={self._name_of_scope()} cannot be placed in this forward: {forward.unplaced}, or use "
                "`generate`, or choose scope='all'"
            )
        if needs_prompt_length(scope):
            length = self._length_of_prompt(forward)
            if forward.starts_prompt and isinstance(scope, tuple):
                check_inside(scope, int(length.min()))
        if isinstance(scope, Tensor):
            if scope.device != forward.slots.device:
                scope = scope.to(forward.slots.device)
                if not torch.compiler.is_compiling():
                    self._scope = scope
            scope = self._scope_rows(scope, forward)
        mask = in_scope(scope, forward.positions, length, forward.slots)
        if mask is None or forward.valid is None:
            return forward.valid if mask is None else mask
        return mask & forward.valid

    def _name_of_scope(self) -> str:
        return f"a mask of {tuple(self._scope.shape)}" if isinstance(self._scope, Tensor) else repr(self._scope)

    def _length_of_prompt(self, forward: Forward) -> Tensor:
        """(rows or 1, 1), in tokens that are not padding."""
        if self._prompt_length is not None and forward.generation is None:
            given = self._told_on(forward.slots)
            if given.shape[0] not in (1, forward.rows):
                raise ValueError(f"prompt_length has {given.shape[0]} rows, and the batch {forward.rows}")
            return given
        if forward.prompt_length is None:
            raise ValueError(
                f"scope={self._name_of_scope()} needs to know where the prompt ends, and a forward on a filled cache "
                "does not tell: use `generate`, or set prompt_length, or choose scope='all'"
            )
        return forward.prompt_length

    def _told_on(self, slots: Tensor) -> Tensor:
        """(rows or 1, 1), what the user says of the prompt's length."""
        told = self._told
        if told is None or told.device != slots.device:
            told = torch.as_tensor(self._prompt_length, device=slots.device).reshape(-1, 1)
            if not torch.compiler.is_compiling():
                self._told = told
        return told

    def _scope_rows(self, scope: Tensor, forward: Forward) -> Tensor:
        if scope.shape[0] != forward.texts or (forward.starts_prompt and scope.shape[1] > forward.tokens):
            raise ValueError(
                f"the scope is a mask of {tuple(scope.shape)}, and the batch is ({forward.texts}, {forward.tokens}): "
                "give one row a text and at most one column a token"
            )
        return repeat(scope, "texts tokens -> (texts copies) tokens", copies=forward.rows // forward.texts)

    def _alpha_rows(self, forward: Forward, device: torch.device) -> Tensor:
        alpha = self._alpha
        if alpha.device != device:
            with torch.inference_mode(False), torch.no_grad():
                alpha = alpha.to(device)
            if not torch.compiler.is_compiling():
                self._alpha = alpha
        if alpha.shape[0] == 1:
            return alpha
        if alpha.shape[0] != forward.texts:
            raise ValueError(
                f"alpha has {alpha.shape[0]} rows, and the batch {forward.texts}: give one number a text, or one for "
                "all"
            )
        return repeat(alpha, "texts -> (texts copies)", copies=forward.rows // forward.texts)

    # the gate

    def read_prompt(self, hidden: Tensor, forward: Forward) -> None:
        """Takes the activations of the gate's block, (rows, tokens, d_model), until it has decided on the prompt."""
        reader = self._reader_of(forward)
        if reader is None or not forward.may_hold_prompt:
            return
        if forward.generation is None and forward.starts_prompt:
            reader.restart()
        told = self._prompt_length is not None and forward.generation is None
        if reader.complete or not (told or forward.prompt_length is not None):
            return
        length, valid = self._length_of_prompt(forward), True if forward.valid is None else forward.valid
        positions = forward.positions.expand(forward.rows, -1)
        counted = (positions < length) & ((positions > 0) | (length == 1)) & valid
        is_last = (positions == length - 1) & valid
        reader.see(hidden, counted.to(hidden.device), is_last.to(hidden.device))
        reader.complete = self._has_ended(reader) if told else forward.ends_prompt

    @staticmethod
    def _has_ended(reader: PromptReader) -> bool:
        """Whether every prompt's last token was seen. Compiled code cannot ask the device, and decides on what came."""
        return torch.compiler.is_compiling() or reader.ended is None or bool(reader.ended.all())

    def _reader_of(self, forward: Forward) -> PromptReader | None:
        """What reads the prompts of this forward for the gate; of the latest prompts, outside of `generate`."""
        if self.gate is None:
            return None
        if forward.generation is not None:
            return forward.generation.readers.setdefault(self.serial, PromptReader(self.gate))
        if self._bare_reader is None:
            self._bare_reader = PromptReader(self.gate)
        return self._bare_reader

    def _open_rows(self, reader: PromptReader, forward: Forward) -> Tensor:
        is_open = reader.open_on(forward.slots.device)
        if is_open is None or is_open.shape[0] != forward.rows:
            raise ValueError(
                "the gate has not seen the prompts of this batch: run them while the steering is attached, from an "
                "empty cache"
            )
        waits = isinstance(self._scope, str) and self._scope in ("generated", "answer")
        if not reader.complete and not waits:
            raise ValueError(
                "the gate decides once it has seen the whole prompt, which comes in pieces, and "
                f"scope={self._name_of_scope()} may edit the first: run the prompt in one forward, or choose "
                "scope='generated' or 'answer'"
            )
        return is_open
