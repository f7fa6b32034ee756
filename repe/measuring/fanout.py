"""Fanning out: texts under many strengths at once, with all that they share computed once.

The rows of one batch carry their own alpha. Texts with a common prefix share it in trees (`prefixes.py`), as the
options of an item share their prompt; and the blocks below the first edited one, which no strength changes, run once
for all strengths: in the forwards that follow they are passed over. Where a model cannot be trusted with trees, every
text has a padded row for every strength, and nothing is passed over.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from repe.models.blocks import device_of, hidden_of, with_hidden
from repe.models.call import Forward
from repe.models.tokens import pad
from repe.models.tracking import Hook, tracker_of, trackers_of
from repe.reading.capture import EnoughError
from repe.reading.trees import Tree, cost_of, dtype_of, inputs, limit_for, obstacle, plant
from repe.steering.handle import Steering
from repe.steering.scope import check_inside, in_scope, needs_prompt_length

MOST_LOGITS = 2**27  # numbers at once, half a GiB in float32; a single text or tree may take more
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 0.25  # in half precision two ways of batching differ by about that much over a text

Result = TypeVar("Result")


@dataclass(frozen=True)
class Span:
    """A text as token ids, and where in it what is scored begins: its prompt's length."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """Texts that are run together, for as many strengths as there is room for.

    Attributes:
        texts: the numbers of the texts.
        height, width: the rows, one a tree or a text, and their columns.
        inputs: makes those of the model; the masks of all batches at once would fill the memory.
        rows, slots: in which row, and in which columns, every text's tokens stand.
        edited: (rows, columns), which columns are in scope; None where the forward tells by itself.
        starts: (rows,), the prompts' lengths, where the forward is to tell.
    """

    texts: Sequence[int]
    height: int
    width: int
    inputs: Callable[[], dict[str, Any]]
    rows: Sequence[int]
    slots: Sequence[Tensor]
    edited: Tensor | None = None
    starts: Tensor | None = None


class Fanout:
    """Runs texts through a steered model, many strengths a batch.

    `why_padded` says why no trees are grown, or is "". It is asked before anything is attached.
    """

    def __init__(self, model: nn.Module, handle: Steering, why_padded: str, batch_tokens: int) -> None:
        self.model, self.handle, self.why_padded, self.batch_tokens = model, handle, why_padded, batch_tokens
        self.stack = handle.stack
        self.device = device_of(self.stack.module)
        self.passed = () if why_padded else _unedited(handle)
        self.vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)
        self.picks = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    # texts -> batches

    def batches(self, spans: Sequence[Span], strengths: int) -> list[Batch]:
        """Batches in which all strengths have room, as far as `batch_tokens` allows.

        Raises:
            IndexError: the scope names a position before the start of a prompt, of which a tree would say nothing.
        """
        if isinstance(self.handle.scope, tuple):
            check_inside(self.handle.scope, min(span.start for span in spans))
        room = max(1, min(self.batch_tokens // strengths, MOST_LOGITS // self.vocabulary))
        if self.why_padded:
            order = sorted(range(len(spans)), key=lambda i: len(spans[i].ids))
            return [self._padded(spans, chunk) for chunk in _filled(order, lambda i: len(spans[i].ids) - 1, room)]
        trees = sorted(self._trees(spans), key=len)
        return [
            self._planted(spans, [trees[i] for i in chunk])
            for chunk in _filled(range(len(trees)), lambda i: len(trees[i]), room)
        ]

    def _trees(self, spans: Sequence[Span]) -> list[Tree]:
        """A tree for every prompt, or larger ones, whichever costs less."""
        rows = [span.ids[:-1] for span in spans]
        marks = [self._edited(span)[:-1].tolist() for span in spans]
        prompts: dict[tuple[int, ...], list[int]] = {}
        for i, span in enumerate(spans):
            prompts.setdefault(span.ids[: span.start], []).append(i)
        small = [
            replace(tree, texts=tuple(chosen[text] for text in tree.texts))
            for chosen in prompts.values()
            for tree in plant([rows[i] for i in chosen], self.batch_tokens)  # a prompt's texts are edited alike
        ]
        large = plant(rows, min(limit_for(self.stack.d_model), self.batch_tokens), marks)
        return min(small, large, key=lambda trees: sum(cost_of(tree, self.stack.d_model) for tree in trees))

    def _edited(self, span: Span) -> Tensor:
        """(tokens,), which of a text's tokens are in scope."""
        places = torch.arange(len(span.ids))
        length = torch.tensor([[span.start]]) if needs_prompt_length(self.handle.scope) else None
        inside = in_scope(self.handle.scope, places[None], length, places)
        return torch.ones(len(places), dtype=torch.bool) if inside is None else inside[0]

    def _planted(self, spans: Sequence[Span], trees: Sequence[Tree]) -> Batch:
        texts = [text for tree in trees for text in tree.texts]
        rows = [row for row, tree in enumerate(trees) for _ in tree.texts]
        slots = [path for tree in trees for path in tree.paths]
        height, width = len(trees), max(map(len, trees))
        edited = torch.zeros(height, width, dtype=torch.bool)
        for text, row, path in zip(texts, rows, slots, strict=True):
            edited[row, path] = self._edited(spans[text])[:-1]
        module = self.stack.module
        make = partial(inputs, trees, dtype_of(module), self.device, module.config)
        return Batch(texts, height, width, make, rows, slots, edited=edited.to(self.device))

    def _padded(self, spans: Sequence[Span], chosen: Sequence[int]) -> Batch:
        ids = [spans[i].ids[:-1] for i in chosen]
        slots = [torch.arange(len(row)) for row in ids]
        starts = torch.tensor([spans[i].start for i in chosen])
        make = partial(pad, ids, device=self.device)
        return Batch(chosen, len(ids), max(map(len, ids)), make, range(len(ids)), slots, starts=starts)

    # batches -> logits

    def logits(
        self, batch: Batch, alphas: Tensor, wanted: Tensor, outset: Any = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the strengths, and (rows, strengths, wanted, vocabulary), the logits at the wanted columns.

        `outset` is what `begin` gave for this batch.
        """
        size = batch.height * (len(wanted) if self.picks else batch.width) * self.vocabulary
        given = batch.inputs()
        at_once = max(1, min(self.batch_tokens // (batch.height * batch.width), MOST_LOGITS // size))
        for first in range(0, len(alphas), at_once):
            chunk = alphas[first : first + at_once]
            with self._steered(batch, chunk, given), self._passing(outset, len(chunk)):
                found = self._called(_repeated(given, len(chunk)), wanted)
            yield (
                slice(first, first + len(chunk)),
                rearrange(found, "(rows alphas) w v -> rows alphas w v", rows=batch.height),
            )

    def begin(self, batch: Batch) -> Any:
        """What the last block that no strength changes puts out for a batch; None if there is no such block."""
        if not self.passed:
            return None
        kept, given = KeepHook(), batch.inputs()
        registered = self.passed[-1].register_forward_hook(kept, prepend=True)  # before anything is edited
        try:
            with self._steered(batch, torch.zeros(1), given), suppress(EnoughError):
                self.stack.module(**given, use_cache=False)
        finally:
            registered.remove()
        return kept.output

    def _called(self, given: dict[str, Any], wanted: Tensor) -> Tensor:
        if self.picks:
            return self.model(**given, use_cache=False, logits_to_keep=wanted).logits
        logits = self.model(**given, use_cache=False).logits
        return logits[:, wanted + logits.shape[1] - given["input_ids"].shape[1]]  # virtual tokens may stand before

    @contextmanager
    def _steered(self, batch: Batch, alphas: Tensor, given: dict[str, Any]) -> Iterator[None]:
        """Every row of the batch stands there once for every strength."""
        handle, scope, length = self.handle, self.handle.scope, self.handle.prompt_length
        rows, copies = batch.height, len(alphas)
        handle.alpha = repeat(alphas, "alphas -> (rows alphas)", rows=rows)
        others = [user for tracker in trackers_of(self.model) for user in tracker.users if isinstance(user, Steering)]
        lengths = [user.prompt_length for user in others]
        try:
            with ExitStack() as told:
                if batch.edited is not None:
                    handle.scope = repeat(batch.edited, "rows columns -> (rows copies) columns", copies=copies)
                    tracker = tracker_of(self.stack.module)
                    if tracker is not None:
                        told.enter_context(tracker.telling(_forward(given, copies)))
                else:
                    assert batch.starts is not None
                    for user in others:
                        user.prompt_length = repeat(batch.starts, "rows -> (rows copies)", copies=copies)
                yield
        finally:
            handle.scope, handle.prompt_length = scope, length
            for user, before in zip(others, lengths, strict=True):
                user.prompt_length = before

    def _passing(self, outset: Any, copies: int) -> Any:
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


class DisagreementError(Exception):
    """What came of trees is not what comes of texts alone."""


def trusted(
    fan: Fanout, spans: Sequence[Span], strengths: int, measure: Callable[[Fanout, list[Batch]], Result]
) -> Result:
    """What `measure` makes of batches; of padded rows, and with a warning, where trees come out wrong."""
    batches = fan.batches(spans, strengths)
    try:
        return measure(fan, batches)
    except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError):
        raise  # of a file, a strength or the machine: rows would not change that
    except Exception as error:
        if fan.why_padded:
            raise
        wrong = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"{type(fan.model).__name__} does not give texts in trees of shared prefixes what it gives them alone "
            f"({wrong}). Every text is run in a padded row instead",
            stacklevel=3,
        )
        padded = Fanout(fan.model, fan.handle, wrong, fan.batch_tokens)
        return measure(padded, padded.batches(spans, strengths))


def witnesses(batch: Batch, spans: Sequence[Span]) -> set[int]:
    """The places of the texts of a batch to compare with themselves alone: the longest, and the last.

    What counts columns goes wrong most where most nodes stand before, and a window where most tokens do.
    """
    return {max(range(len(batch.texts)), key=lambda k: len(spans[batch.texts[k]].ids)), len(batch.texts) - 1}


def compare(packed: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Raises DisagreementError if log-likelihoods from trees are not those of texts alone, as far as `dtype` tells."""
    allowed = TOLERANCES.get(dtype, ROUGH)
    if not torch.isclose(packed, plain, rtol=allowed, atol=allowed, equal_nan=True).all():
        raise DisagreementError(f"log-likelihoods {packed.tolist()} and {plain.tolist()}")


def why_padded(model: nn.Module, stack: Any, gate: Any) -> str:
    """Why texts get padded rows instead of trees, as the end of a sentence, or ""."""
    if gate is not None:
        return "a gate decides row by row, and a tree holds several texts"
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        return "its weights are spread over several places"
    if any(getattr(getattr(m, "active_peft_config", None), "is_prompt_learning", False) for m in model.modules()):
        return "an adapter puts virtual tokens before every row"
    if getattr(getattr(stack.module, "config", None), "output_router_logits", False):
        return "it counts what its experts get by rows of text"
    return obstacle(stack.module)


def _unedited(handle: Steering) -> tuple[nn.Module, ...]:
    """The blocks that no strength changes: all below the first edited one, and that one too if its output is edited."""
    if handle.site == "embedding":
        return ()
    return handle.stack.blocks[: handle.blocks[0] + (handle.site == "block")]


def _forward(given: dict[str, Any], copies: int) -> Forward:
    ids = given["input_ids"]
    rows, width = copies * len(ids), ids.shape[1]
    positions = repeat(given["position_ids"], "rows columns -> (rows copies) columns", copies=copies)
    slots = torch.arange(width, device=ids.device)
    return Forward(
        rows=rows, tokens=width, texts=rows, slots=slots, positions=positions, starts_prompt=True, ends_prompt=True
    )


def _repeated(given: dict[str, Any], copies: int) -> dict[str, Any]:
    return {
        name: _repeated(value, copies) if isinstance(value, dict) else value.repeat_interleave(copies, 0)
        for name, value in given.items()
    }


def _filled(numbers: Sequence[int], width: Any, room: int) -> Iterator[list[int]]:
    """Chunks of numbers, of ascending width, that each cover at most so many columns, filler too, but one at least."""
    chunk: list[int] = []
    for number in numbers:
        if chunk and (len(chunk) + 1) * width(number) > room:
            yield chunk
            chunk = []
        chunk.append(number)
    if chunk:
        yield chunk
