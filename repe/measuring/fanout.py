"""Fanning out: texts under many strengths at once, with all that they share computed once.

The rows of one batch carry their own alpha. Texts with a common prefix share it in trees (`repe.reading.trees`), as the
options of an item share their prompt; and the blocks below the first edited one, which no strength changes, run once
for all strengths: in the forwards that follow they are passed over. Where a model cannot be trusted with trees, or
something of the user's own is attached to it, every text has a padded row for every strength, told where its prompt
ends, and nothing is passed over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from repe.data.answers import Answer
from repe.models.blocks import Stack, device_of, hidden_of, with_hidden
from repe.models.call import Forward
from repe.models.logits import logits_at, picks_columns, vocabulary_of
from repe.models.tracking import Hook, prompts_end, tracker_of
from repe.reading.capture import EnoughError
from repe.reading.trees import Batch, Measurement, Tree, in_rows, limit_for, obstacle, plant
from repe.steering.edit import Edit
from repe.steering.handle import Steering
from repe.steering.scope import Scope, in_scope, needs_prompt_length

BATCH_TOKENS = 8192
MOST_LOGITS = 2**27  # numbers at once, half a GiB in float32; a single text or tree may take more


class Fanout(Measurement[Tensor]):
    """Something to be measured of texts at every strength of an edit: (values, alphas, numbers) of each.

    A kind of measurement has a name, so many values of so many `numbers`, each in its range. The first value, in nats,
    shows whether trees came out right, at the least and at the largest strength.

    Args:
        model: with `handle` attached, if anything is edited.
        stack: of the model.
        answers: the texts. The last token of each is not read.
        alphas: the strengths.
        batch_tokens: tokens a forward, at most, but for a single text.
        edited: (tokens,) of every text, which are in scope; empty if no trees are to be run.
    """

    kind: ClassVar[str]
    values: ClassVar[int]
    ranges: ClassVar[Sequence[tuple[float, float]]]
    smallest = 5.0

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        handle: Steering | None,
        answers: Sequence[Answer],
        alphas: Tensor,
        batch_tokens: int,
        edited: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.stack, self.handle, self.module = model, stack, handle, stack.module
        self.answers, self.alphas, self.batch_tokens = answers, alphas, batch_tokens
        self.rows = [answer.ids[:-1] for answer in answers]
        self.edited, self.scope = edited, "all" if handle is None else handle.scope
        self.ends = [int(alphas.abs().argmin()), int(alphas.abs().argmax())]

    @staticmethod
    @abstractmethod
    def numbers(answer: Answer) -> int:
        """How many numbers a value has."""

    @abstractmethod
    def at(self, batch: Batch, alphas: Tensor) -> Sequence[Tensor]:
        """Runs a batch at these strengths: (values, alphas, numbers) of every text."""

    def measured(self, batch: Batch) -> Sequence[Tensor]:
        return self.at(batch, self.alphas)

    def compared(self, result: Tensor) -> Tensor:
        return result[0, self.ends]

    def alone(self, batch: Batch) -> Sequence[Tensor]:
        return [result[0] for result in self.at(batch, self.alphas[self.ends])]

    def fits(self, height: int, width: int) -> bool:
        """Whether all strengths have room in a batch, as far as `batch_tokens` allows."""
        return height * width <= max(1, min(self.batch_tokens // len(self.alphas), MOST_LOGITS // self.vocabulary))

    def in_rows(self, texts: Iterable[int]) -> Sequence[Batch]:
        return in_rows(self.rows, texts, self.module, self.fits, [answer.begins for answer in self.answers])

    # batches -> logits

    @cached_property
    def vocabulary(self) -> int:
        return vocabulary_of(self.model)

    @cached_property
    def passed(self) -> Sequence[nn.Module]:
        """The blocks that no strength changes: all below the first edited one, and it too if its output is edited."""
        if self.handle is None or self.handle.site == "embedding":
            return ()
        return self.stack.blocks[: self.handle.blocks[0] + (self.handle.site == "block")]

    def logits(
        self, batch: Batch, alphas: Tensor, wanted: Tensor, outset: Any = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the strengths, and (rows, strengths, wanted, vocabulary), the logits at the wanted columns.

        `outset` is what `begin` gave for this batch.
        """
        size = batch.height * (len(wanted) if picks_columns(self.model) else batch.width) * self.vocabulary
        at_once = max(1, min(self.batch_tokens // (batch.height * batch.width), MOST_LOGITS // size))
        given = batch.inputs()
        for first in range(0, len(alphas), at_once):
            chunk = alphas[first : first + at_once]
            with self._steered(batch, chunk, given), self._passing(outset, len(chunk)):
                found = logits_at(self.model, _repeated(given, len(chunk)), wanted)
            yield (
                slice(first, first + len(chunk)),
                rearrange(found, "(rows alphas) w v -> rows alphas w v", rows=batch.height),
            )

    def begin(self, batch: Batch) -> Any:
        """What the last block that no strength changes puts out for trees; None if there is no such block."""
        if not (batch.trees and self.passed):
            return None
        kept, given = KeepHook(), batch.inputs()
        registered = self.passed[-1].register_forward_hook(kept, prepend=True)  # before anything is edited
        try:
            with self._steered(batch, torch.zeros(1), given), suppress(EnoughError):
                self.module(**given, use_cache=False)
        finally:
            registered.remove()
        return kept.output

    @contextmanager
    def _steered(self, batch: Batch, alphas: Tensor, given: dict[str, Any]) -> Iterator[None]:
        """Every row of the batch stands there once for every strength."""
        copies = len(alphas)
        if self.handle is not None:
            self.handle.alpha = repeat(alphas, "alphas -> (rows alphas)", rows=batch.height)
            self.handle.scope = self._nodes(batch).repeat_interleave(copies, 0) if batch.trees else self.scope
        with ExitStack() as told:
            if not batch.trees:
                starts = dict(zip(batch.rows, (self.answers[text].begins for text in batch.texts), strict=True))
                ends = torch.tensor([starts[row] for row in range(batch.height)])
                told.enter_context(prompts_end(self.model, ends.repeat_interleave(copies)))
            elif (tracker := tracker_of(self.module)) is not None:
                told.enter_context(tracker.telling(_forward(given, copies)))
            yield

    def _nodes(self, batch: Batch) -> Tensor:
        """(rows, columns), which nodes of trees are edited."""
        nodes = torch.zeros(batch.height, batch.width, dtype=torch.bool)
        for text, row, slots in zip(batch.texts, batch.rows, batch.slots, strict=True):
            nodes[row, slots] = self.edited[text]
        return nodes.to(device_of(self.module))

    def _passing(self, outset: Any, copies: int) -> AbstractContextManager[None]:
        if outset is None:
            return nullcontext()
        hidden = repeat(hidden_of(outset), "rows tokens width -> (rows copies) tokens width", copies=copies)
        return passing(self.passed, with_hidden(outset, hidden))


class KeepHook(Hook):
    """Keeps a module's output as it is, and ends the forward."""

    def __init__(self) -> None:
        self.output: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output
        raise EnoughError


@contextmanager
def passing(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Blocks that are not run while the context lasts: each puts out `output` at once."""
    with ExitStack() as undo:
        for block in blocks:
            before = vars(block).get("forward")
            undo.callback(_unpatch, block, before)
            block.forward = lambda *args, **kwargs: output
        yield


def _unpatch(block: nn.Module, before: Any) -> None:
    if before is None:
        vars(block).pop("forward", None)
    else:
        block.forward = before


def _forward(given: dict[str, Any], copies: int) -> Forward:
    ids = given["input_ids"]
    rows, width = copies * len(ids), ids.shape[1]
    positions = given["position_ids"].repeat_interleave(copies, 0)
    slots = torch.arange(width, device=ids.device)
    return Forward(
        rows=rows, tokens=width, texts=rows, slots=slots, positions=positions, starts_prompt=True, ends_prompt=True
    )


def _repeated(given: dict[str, Any], copies: int) -> dict[str, Any]:
    return {
        name: _repeated(value, copies) if isinstance(value, dict) else value.repeat_interleave(copies, 0)
        for name, value in given.items()
    }


# texts -> trees


def why_padded(model: nn.Module, stack: Stack, edit: Edit | None) -> str:
    """Why texts get padded rows instead of trees, as the end of a sentence, or "". Asked before an edit is attached."""
    if edit is not None and edit.gate is not None:
        return "a gate decides row by row, and a tree holds several texts"
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        return "its weights are spread over several places"
    if any(getattr(getattr(m, "active_peft_config", None), "is_prompt_learning", False) for m in model.modules()):
        return "an adapter puts virtual tokens before every row"
    if getattr(getattr(stack.module, "config", None), "output_router_logits", False):
        return "it counts what its experts get by rows of text"
    return obstacle(stack.module)


def grow(answers: Sequence[Answer], scope: Scope, d_model: int, batch_tokens: int) -> tuple[list[Tree], list[Tensor]]:
    """A tree for every prompt, or larger ones, whichever costs less; and (tokens,) of every text, which are edited.

    Tokens are shared where they and all before them are edited alike.
    """
    rows = [answer.ids[:-1] for answer in answers]
    shapes = [(len(row), answer.begins) for row, answer in zip(rows, answers, strict=True)]
    masks = {shape: scoped(scope, *shape) for shape in set(shapes)}
    prompts: dict[tuple[int, ...], list[int]] = {}
    for text, answer in enumerate(answers):
        prompts.setdefault(answer.ids[: answer.begins], []).append(text)
    small = [
        replace(tree, texts=tuple(texts[text] for text in tree.texts))
        for texts in prompts.values()
        for tree in plant([rows[text] for text in texts], batch_tokens)  # a prompt's texts are edited alike
    ]
    marks = [masks[shape].tolist() for shape in shapes]
    large = plant(rows, min(limit_for(d_model), batch_tokens), marks)
    return min(small, large, key=lambda trees: sum(tree.cost(d_model) for tree in trees)), [masks[s] for s in shapes]


def scoped(scope: Scope, length: int, start: int) -> Tensor:
    """(length,), which tokens of a text are in scope, whose prompt has `start` tokens."""
    places = torch.arange(length)
    end = torch.tensor([[start]]) if needs_prompt_length(scope) else None
    inside = in_scope(scope, places[None], end, places)
    return torch.ones(length, dtype=torch.bool) if inside is None else inside[0]
