"""Capture: texts to the activations at chosen blocks and tokens.

Activations are read by hooks of our own, put on last, so that what is read at a block is what leaves it, with edits.
Only what was asked for is kept, reduced as soon as it is seen. What texts begin with alike is computed once, where the
model allows it, and nothing is computed behind the last block that is wanted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from repe.display import bar_of
from repe.models.blocks import find_stack, hidden_of, is_encoder_decoder
from repe.models.counts import check_counts
from repe.models.finite import check_finite
from repe.models.tokens import Text, encode
from repe.models.tracking import Hook, begin_anew, put
from repe.reading.trees import (
    Batch,
    Measurement,
    attached,
    in_rows,
    in_trees,
    is_compiled,
    limit_for,
    obstacle,
    pays,
    plant,
)

log = logging.getLogger(__name__)

Keep = Callable[[Tensor], Tensor]
"""From a block's output (rows, tokens, d_model) to what is kept of it, a copy, with the rows first."""


@overload
def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    tokens: Literal["all"],
    blocks: Any = ...,
    site: str = ...,
    stack: str = ...,
    blocks_at: str | None = ...,
    batch_size: int = ...,
    packed: bool | None = ...,
    progress: bool | None = ...,
) -> list[Tensor]: ...
@overload
def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    blocks: Any = ...,
    tokens: Literal["last", "mean"] = ...,
    site: str = ...,
    stack: str = ...,
    blocks_at: str | None = ...,
    batch_size: int = ...,
    packed: bool | None = ...,
    progress: bool | None = ...,
) -> Tensor: ...
def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    blocks: Any = "all",
    tokens: str = "last",
    site: str = "block",
    stack: str = "decoder",
    blocks_at: str | None = None,
    batch_size: int = 32,
    packed: bool | None = None,
    progress: bool | None = None,
) -> Tensor | list[Tensor]:
    """The activations of texts, in float32 on the CPU.

    Args:
        model, tokenizer: neither is changed.
        texts: texts or chats; a chat is rendered by the tokenizer's template.
        blocks: "all", a number, or several; negatives count from the end. They come back in ascending order, each
            once, whatever the order they were named in.
        tokens: "last" (that is not padding), "mean" over all but the first, which is an attention sink, or "all".
        site: "block" (the residual stream), "attention", "mlp" or "embedding".
        stack: "decoder" or "encoder". An encoder-decoder's decoder is read where it starts to answer the text.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        batch_size: texts a forward pass; they are sorted by length first.
        packed: compute what texts begin with alike once, in trees of prefixes: None where that is exact and pays, True
            or an error that says why it cannot be, False never. The logger "repe.reading.capture" tells at level
            INFO which way was taken, and why.
        progress: show a progress bar; None: where a terminal or a notebook shows it.

    Returns:
        (texts, blocks, d_model), or with tokens="all" one (tokens, blocks, d_model) a text, in the order of the texts.

    Raises:
        ValueError: no texts, a text of no tokens or of more than the model has positions, an unknown choice, a model
            that is not understood, or packed=True where trees cannot be run.
        IndexError: a block that does not exist.
        OverflowError: activations are not finite; the text says at which block, and where they may come from.
        RuntimeError: packed=True, and what came of the trees is not what comes of the texts alone.

    Warns:
        UserWarning: packed=None, and what came of the trees was wrong. It was discarded, and padded rows were run.

    Example:
        >>> texts = ["Abrin Tolva is a potter.", "I never took it."]
        >>> repe.capture(model, tokenizer, texts, blocks=[2, 3]).shape  # (texts, blocks, d_model)
        torch.Size([2, 2, 128])
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a list of at least one text, got {texts!r}")
    check_counts(batch_size=batch_size)
    if tokens not in KEEPERS:
        raise ValueError(f"tokens={tokens!r} is not known: use one of {[*KEEPERS]}")
    found = find_stack(model, stack, blocks_at)
    numbers = found.indices(blocks)
    modules = [found.site(site, b) for b in numbers]
    rows = [encode(tokenizer, text) for text in texts]
    _check_length(found.module, max(map(len, rows)))
    answers = stack == "decoder" and is_encoder_decoder(model)
    reading = Reading(
        model if answers else found.module, modules, tokens, rows, batch_size,
        begin=_start_token(model) if answers else None, stops=not answers and _may_stop(found.module, modules),
    )  # fmt: skip
    trees = _trees(reading, found.d_model, packed)
    kept: dict[int, Tensor] = {}
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.no_grad(),
        bar_of(desc="capture", total=len(rows), unit="text", progress=progress) as bar,
    ):
        for batch, activations in reading.run(trees, must=bool(packed)):
            _check_finite(activations, model, [f"at the site {site!r} of block {block}" for block in numbers])
            kept.update(zip(batch.texts, activations, strict=True))
            bar.update(len(batch.texts))
        result = [kept[text] for text in range(len(rows))]
        return result if tokens == "all" else torch.stack(result)


def _check_finite(activations: Sequence[Tensor], model: nn.Module, places: Sequence[str]) -> None:
    """Raises OverflowError, which names the first place where activations (..., places, d_model) are not finite."""
    if not all(text.isfinite().all() for text in activations):
        for number, place in enumerate(places):
            check_finite(torch.cat([text[..., number, :].flatten() for text in activations]), model, place)


def _check_length(module: nn.Module, longest: int) -> None:
    """Raises ValueError for a text that has more tokens than there are learned positions."""
    tables = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    rooms = [
        part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)  # as RoBERTa counts
        for name, part in tables
        if any(word in name.rpartition(".")[2] for word in ("position", "wpe"))
    ]
    configured = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if rooms and longest > (room := min([*rooms, configured or rooms[0]])):
        raise ValueError(
            f"a text of {longest} tokens is longer than the {room} that {type(module).__name__} has positions for: "
            "shorten it, or split it"
        )


def _trees(reading: Reading, d_model: int, packed: bool | None) -> list[Batch]:
    """Batches of trees, or none, where they cannot be or do not pay; the log says why."""
    name, rows = type(reading.module).__name__, reading.rows
    why_not = "packed=False" if packed is False else ""
    if packed is not False:
        why_not = (
            obstacle(reading.module) if reading.begin is None else "texts go into its encoder, which is not causal"
        )
    if why_not and packed:
        raise ValueError(f"packed=True, but {name} cannot be run on trees: {why_not}")
    if not why_not:
        most = reading.batch_size * max(map(len, rows)) ** 2  # attention scores, as many as in rows
        trees = plant(rows, min(limit_for(d_model), reading.batch_size * max(map(len, rows))))
        batches = in_trees(trees, reading.module, lambda height, width: height * width**2 <= most)
        if packed or pays(batches, rows, d_model):
            log.info("%d texts as %d nodes in %d trees", len(rows), sum(map(len, trees)), len(trees))
            return batches
    log.info("%d texts in padded rows: %s", len(rows), why_not or "they share too few of their tokens")
    return []


# what is kept of it


def _last(batch: Batch) -> Keep:
    rows, slots = torch.tensor(batch.rows), torch.stack([slots[-1] for slots in batch.slots])
    return lambda hidden: hidden[rows.to(hidden.device), slots.to(hidden.device)]


def _mean(batch: Batch) -> Keep:
    counted = [slots[1:] if len(slots) > 1 else slots for slots in batch.slots]
    lengths = torch.tensor([len(slots) for slots in counted])
    texts = torch.arange(len(counted)).repeat_interleave(lengths)
    where = torch.tensor(batch.rows)[texts], torch.cat(counted)

    def keep(hidden: Tensor) -> Tensor:
        rows, slots = (index.to(hidden.device) for index in where)
        sums = hidden.new_zeros(len(counted), hidden.shape[-1], dtype=torch.float32)
        sums.index_add_(0, texts.to(hidden.device), hidden[rows, slots].float())
        return sums / lengths.to(hidden.device)[:, None]

    return keep


def _all(batch: Batch) -> Keep:
    return lambda hidden: hidden.to("cpu", copy=True)


KEEPERS: dict[str, Callable[[Batch], Keep]] = {"last": _last, "mean": _mean, "all": _all}


def _gathered(records: Sequence[Tensor]) -> Tensor:
    """The records as (rows, ..., blocks, d_model) in float32 on the CPU, with one copy from every device."""
    devices = {record.device for record in records}
    copies = {device: iter(torch.stack([r for r in records if r.device == device]).cpu()) for device in devices}
    return torch.stack([next(copies[record.device]).float() for record in records], dim=-2)


# running


@dataclass(frozen=True)
class Reading(Measurement[Tensor]):
    """Activations: of every text (blocks, d_model), or (tokens, blocks, d_model).

    `modules` are those that are read, `tokens` what is kept. `begin` is what a decoder begins to answer with; `stops`
    says whether a forward may end where all has been read.
    """

    module: nn.Module
    modules: Sequence[nn.Module]
    tokens: str
    rows: Sequence[list[int]]
    batch_size: int
    begin: int | None
    stops: bool

    @property
    def obstacle(self) -> str:
        return obstacle(self.module) if self.begin is None else "texts go into its encoder, which is not causal"

    def measured(self, batch: Batch) -> Sequence[Tensor]:
        config = getattr(self.module, "config", None)
        without_cache = {"use_cache": False} if hasattr(config, "use_cache") or self.begin is not None else {}
        begin_anew(self.module)
        with recording(self.modules, KEEPERS[self.tokens](batch), self.stops) as records:
            self.module(**batch.inputs(), **without_cache)
        gathered = _gathered(records)
        if self.tokens == "all":
            return [gathered[row, slots] for row, slots in zip(batch.rows, batch.slots, strict=True)]
        return list(gathered)

    def compared(self, result: Tensor) -> Tensor:
        return result[-1] if result.ndim == 3 else result

    def in_rows(self, texts: Iterable[int]) -> Sequence[Batch]:
        batches = in_rows(self.rows, texts, self.module, lambda height, width: height <= self.batch_size)
        return batches if self.begin is None else [self._answered(batch) for batch in batches]

    def _answered(self, batch: Batch) -> Batch:
        """A batch for an encoder, with the first token that the decoder answers, which is the one that is read."""

        def inputs() -> dict[str, Any]:
            encoded = batch.inputs()
            return {**encoded, "decoder_input_ids": encoded["input_ids"].new_full((batch.height, 1), self.begin)}

        return replace(batch, slots=[torch.arange(1)] * len(batch.texts), inputs=inputs)


def _start_token(model: nn.Module) -> int:
    starts = (getattr(getattr(m, "config", None), "decoder_start_token_id", None) for m in model.modules())
    return next((start for start in starts if start is not None), 0)


def _may_stop(module: nn.Module, wanted: Sequence[nn.Module]) -> bool:
    """Whether a forward may be broken off: nothing is compiled, and nothing around waits for the end."""
    parts = list(module.modules())
    around = [part for part in parts if not {*part.modules()}.difference({part}).isdisjoint(wanted)]
    return not any(map(is_compiled, parts)) and not any(map(_waits, around))


def _waits(module: nn.Module) -> bool:
    """Whether somebody else wants to see a module's forward end, as `accelerate` and FSDP do."""
    forward = vars(module).get("forward")
    is_patched = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    return is_patched or any(not isinstance(hook, Hook) for hook in attached(module))


class EnoughError(Exception):
    """All that is wanted of a forward has been recorded."""


class RecordHook(Hook):
    """Keeps what is wanted of the latest output of a module, as a copy: some models go on computing in place on it.

    `missing` are the places that nothing was recorded for; where it is given, the last to be filled ends the forward.
    What another thread runs meanwhile is left alone.
    """

    def __init__(self, records: list[Tensor], place: int, keep: Keep, missing: set[int] | None) -> None:
        self.records, self.place, self.keep, self.missing = records, place, keep, missing
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() != self.thread:
            return
        self.records[self.place] = self.keep(hidden_of(output).detach())
        if self.missing is not None:
            self.missing.discard(self.place)
            if not self.missing:
                raise EnoughError


@contextmanager
def recording(modules: Sequence[nn.Module], keep: Keep, stop: bool = False) -> Iterator[list[Tensor]]:
    """A list that holds what is kept of the latest output of each module, while the context lasts.

    With `stop`, the context ends as soon as every module has put out something.
    """
    records = [torch.empty(0)] * len(modules)
    missing = {*range(len(modules))} if stop else None
    with suppress(EnoughError), ExitStack() as hooks:
        for place, module in enumerate(modules):
            hooks.callback(put(module, RecordHook(records, place, keep, missing)))
        yield records


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
