"""Gates: which rows are edited, decided once a generation by what the prompt is about (CAST, arXiv 2409.05907)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from repe.models.call import Forward
from repe.reading.vector import ConceptVector
from repe.steering.scope import check_rows

Decision = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """Opens for the rows whose prompt scores on the far side of a threshold, and stays as it is for the generation.

    Attributes:
        vector: the condition; its score has the poles at -1 and +1.
        threshold: in scores.
        above: opens above the threshold; False: below.
        block: where the prompt is read, negatives counting from the model's end; None for the vector's recommended one.
            It must not stand after the first block that is edited.
        token: the score of the prompt's "last" token, or the "mean" over all but its first, which is an attention sink.

    Example:
        >>> print(repe.Gate(repe.extract(model, tokenizer, "harmfulness"), threshold=0.5, block=3))
        Gate('harmfulness' > 0.5 at block 3, last token)
    """

    vector: ConceptVector
    threshold: float = 0.0
    above: bool = True
    block: int | None = None
    token: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, ConceptVector):
            raise TypeError(f"a gate reads along a ConceptVector, and got {type(self.vector).__name__}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"a gate's threshold must be finite, got {self.threshold}")
        object.__setattr__(self, "threshold", float(self.threshold))
        if self.token not in ("last", "mean"):
            raise ValueError(f"a gate reads the 'last' token or the 'mean' of the prompt, got token={self.token!r}")
        if self.vector.site != "block":
            raise ValueError(f"a gate reads the residual stream; its vector is of the site {self.vector.site!r}")
        if self.at >= 0:
            self._check_scale()

    def _check_scale(self) -> None:
        if not (scale := self.vector.scale[self.vector.row(self.at)]) > 0:
            raise ValueError(
                f"{self.vector.concept}: held-out pairs show no distance between the poles at block {self.at} (scale "
                f"{scale:g}), so a gate has nothing to go by. Choose another block, or more pairs"
            )

    def __str__(self) -> str:
        sign = ">" if self.above else "<"
        return f"Gate({self.vector.concept!r} {sign} {self.threshold:g} at block {self.at}, {self.token} token)"

    @property
    def at(self) -> int:
        """The block where the prompt is read."""
        return self.vector.recommended[0] if self.block is None else self.block

    def fitted(self, d_model: int, n_blocks: int, stack: str) -> Gate:
        """The gate of a stack of this shape, its block counted from the start.

        Raises:
            ValueError, IndexError: the vector belongs to another stack, or to a model of another shape.
        """
        if self.vector.stack != stack:
            raise ValueError(f"the gate's vector reads the {self.vector.stack}, and the {stack} is steered")
        if self.vector.d_model != d_model or max(self.vector.blocks) >= n_blocks:
            raise ValueError(
                f"the gate's vector has d_model {self.vector.d_model} and holds block {max(self.vector.blocks)}, and "
                f"the model has d_model {d_model} and {n_blocks} blocks: extract it from this model"
            )
        if not -n_blocks <= self.at < n_blocks:
            raise IndexError(f"the gate reads block {self.at}, and the model has {n_blocks}")
        return replace(self, block=self.at % n_blocks)

    def decide(self, mean: Tensor, last: Tensor) -> Tensor:
        """(rows,) boolean: open or shut, from the prompts' activations, both (rows, d_model)."""
        row = self.vector.row(self.at)
        x = (mean if self.token == "mean" else last).float()
        read, midpoint, scale = (
            t[row].to(x.device) for t in (self.vector.read, self.vector.midpoint, self.vector.scale)
        )
        score = (x @ read - midpoint) / scale
        return score > self.threshold if self.above else score < self.threshold


def earliest(block: int, site: str) -> int:
    """The first block whose site comes after the output of a block, which a gate reads."""
    return block + (site != "block")


def gate_block(gate: Gate | Decision, first: int, site: str) -> int:
    """The block whose output a gate reads: before the first edit, or it would judge what it steered."""
    latest = -1 if site == "embedding" else first - earliest(0, site)
    wanted = gate.at if isinstance(gate, Gate) else max(latest, 0)
    if not isinstance(gate, Gate) and not callable(gate):
        raise TypeError(f"a gate is a `repe.Gate` or a function of (mean, last) activations; got {gate!r}")
    if wanted > latest:
        raise ValueError(
            f"the gate reads block {wanted}, after the first edit at the {site} of block {first}: gate at an earlier "
            "block, or steer at later ones"
        )
    return wanted


class PromptReader:
    """Sums up a prompt's activations as they come, in one forward or in chunks, and latches the decision.

    Attributes:
        open: (rows,), the decision on what came so far; None before any token came.
        complete: whether all of the prompt came, so that the decision holds.
    """

    def __init__(self, decide: Decision) -> None:
        self.decide = decide
        self.open: Tensor | None = None
        self.complete = False
        self.ended: Tensor | None = None
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def restart(self) -> None:
        self.open = self.ended = self._sums = None
        self.complete = False

    def see(self, hidden: Tensor, counted: Tensor, is_last: Tensor) -> None:
        """Takes the prompt's tokens of one forward: hidden (rows, tokens, d_model), the masks (rows, tokens): those
        that the mean counts, and the prompt's last."""
        wide = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        total = torch.where(counted[..., None], wide, 0).sum(1)
        last = torch.where(is_last[..., None], wide, 0).sum(1)
        count, ended = counted.sum(1, keepdim=True), is_last.any(1)
        if self._sums is not None and self.ended is not None:
            before, counted_before, last_before = self._sums
            total, count, last, ended = total + before, count + counted_before, last + last_before, ended | self.ended
        self._sums, self.ended = (total, count, last), ended
        self.open = self._checked(self.decide(total / count.clamp(min=1), last), len(last))

    def open_on(self, device: torch.device) -> Tensor | None:
        if self.open is not None and self.open.device != device:
            self.open = self.open.to(device)
        return self.open

    @staticmethod
    def _checked(decision: Tensor, rows: int) -> Tensor:
        if not isinstance(decision, Tensor) or decision.dtype != torch.bool or decision.shape != (rows,):
            got = f"{decision.dtype} {tuple(decision.shape)}" if isinstance(decision, Tensor) else repr(decision)
            raise TypeError(f"a gate must return a boolean tensor of shape ({rows},), one a row; got {got}")
        return decision


class Latch:
    """What the gate of one handle decided on the prompts of each call of `generate`, and of the latest forward outside.

    Attributes:
        serial: the handle's, by which a generation remembers.
    """

    def __init__(self, decide: Decision) -> None:
        self.decide = decide
        self.serial = 0
        self._bare = PromptReader(decide)

    def read(self, hidden: Tensor, forward: Forward) -> None:
        """Take the activations of the gate's block, (rows, tokens, d_model), until it has decided on the prompt."""
        if not forward.may_hold_prompt:
            return
        reader = self._reader(forward)
        if forward.generation is None and forward.starts_prompt:
            reader.restart()
        if reader.complete or forward.prompt_length is None:
            return
        check_rows(forward.prompt_length, forward)
        length, valid = forward.prompt_length, True if forward.valid is None else forward.valid
        positions = forward.positions.expand(forward.rows, -1)
        counted = (positions < length) & ((positions > 0) | (length == 1)) & valid
        is_last = (positions == length - 1) & valid
        reader.see(hidden, counted.to(hidden.device), is_last.to(hidden.device))
        reader.complete = _has_ended(reader) if forward.is_told else forward.ends_prompt

    def open_rows(self, forward: Forward, scope: str, waits: bool) -> Tensor:
        """(rows,), which rows of a forward the gate lets through.

        Args:
            scope: what the scope is called.
            waits: the scope edits nothing before the whole prompt has been read.

        Raises:
            ValueError: the gate has not seen the prompts of this batch, or not yet all of them.
        """
        reader = self._reader(forward)
        is_open = reader.open_on(forward.slots.device)
        if is_open is None or is_open.shape[0] != forward.rows:
            raise ValueError(
                "the gate has not seen the prompts of this batch: run them while the steering is attached, from an "
                "empty cache"
            )
        if not reader.complete and not waits:
            raise ValueError(
                "the gate decides once it has seen the whole prompt, which comes in pieces, and "
                f"scope={scope} may edit the first: run the prompt in one forward, or choose scope='generated' or "
                "'answer'"
            )
        return is_open

    def _reader(self, forward: Forward) -> PromptReader:
        if forward.generation is None:
            return self._bare
        return forward.generation.readers.setdefault(self.serial, PromptReader(self.decide))


def _has_ended(reader: PromptReader) -> bool:
    """Whether every prompt's last token was seen. Compiled code cannot ask the device, and decides on what came."""
    return torch.compiler.is_compiling() or reader.ended is None or bool(reader.ended.all())
