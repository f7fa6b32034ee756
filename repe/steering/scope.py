"""How strongly every token of a forward is edited: alpha where the scope and the gate say so, 0 elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor

from repe.models.call import Forward
from repe.models.tokens import Scope, check_inside, check_scope, in_scope, needs_prompt_length
from repe.steering.gate import Decision, PromptReader

UNATTACHED = sys.maxsize
Alpha = float | Sequence[float] | Tensor


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
