"""Capture: texts to the activations at chosen blocks and tokens.

Activations are read by hooks of our own, put on last, so that what is read at a block is what leaves it, with edits.
Only what was asked for is kept, reduced as soon as it is seen, and the language-model head is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from repe.blocks import Stack, device_of, find_stack, hidden_of, is_encoder_decoder
from repe.hooks import Hook, put
from repe.tokens import Text, encode, last_slots, pad

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
    progress: bool = ...,
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
    progress: bool = ...,
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
    progress: bool = False,
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
        progress: show a progress bar.

    Returns:
        (texts, blocks, d_model), or with tokens="all" one (tokens, blocks, d_model) a text, in the order of the texts.

    Raises:
        ValueError: no texts, a text of no tokens, an unknown choice, or a model that is not understood.
        IndexError: a block that does not exist.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a list of at least one text, got {texts!r}")
    if tokens not in KEEPERS:
        raise ValueError(f"tokens={tokens!r} is not known: use one of {[*KEEPERS]}")
    found = find_stack(model, stack, blocks_at)
    modules = [found.site(site, b) for b in found.indices(blocks)]
    rows = [encode(tokenizer, text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    kept: list[Tensor | None] = [None] * len(rows)
    device = device_of(found.module)
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        for start in tqdm(range(0, len(order), batch_size), desc="capture", unit="batch", disable=not progress):
            chosen = order[start : start + batch_size]
            run, mask = _prepared(model, found, stack, pad([rows[i] for i in chosen], device=device))
            with recording(modules, KEEPERS[tokens](mask)) as records:
                run()
            lengths = mask.sum(1).tolist()
            for i, activation, length in zip(chosen, _gathered(records), lengths, strict=True):
                kept[i] = activation[:length].clone() if tokens == "all" else activation
        result = [activation for activation in kept if activation is not None]
        return result if tokens == "all" else torch.stack(result)


# what is kept of one batch, whose mask is (rows, tokens)


def _last(mask: Tensor) -> Keep:
    slots = last_slots(mask)
    rows = torch.arange(len(slots), device=slots.device)
    return lambda hidden: hidden[rows.to(hidden.device), slots.to(hidden.device)]


def _mean(mask: Tensor) -> Keep:
    counted = mask.bool() & ((mask.cumsum(1) > 1) | (mask.sum(1, keepdim=True) == 1))
    weights = (counted / counted.sum(1, keepdim=True)).float()[..., None]
    return lambda hidden: (hidden.float() * weights.to(hidden.device)).sum(1)


def _all(mask: Tensor) -> Keep:
    return lambda hidden: hidden.to("cpu", copy=True)


KEEPERS: dict[str, Callable[[Tensor], Keep]] = {"last": _last, "mean": _mean, "all": _all}


def _gathered(records: Sequence[Tensor]) -> Tensor:
    """The records as (rows, ..., blocks, d_model) in float32 on the CPU, with one copy from every device."""
    devices = {record.device for record in records}
    copies = {device: iter(torch.stack([r for r in records if r.device == device]).cpu()) for device in devices}
    return torch.stack([next(copies[record.device]).float() for record in records], dim=-2)


# running


class RecordHook(Hook):
    """Keeps what is wanted of the latest output of a module, as a copy: some models go on computing in place on it."""

    def __init__(self, records: list[Tensor], place: int, keep: Keep) -> None:
        self.records, self.place, self.keep = records, place, keep

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.records[self.place] = self.keep(hidden_of(output).detach())


@contextmanager
def recording(modules: Sequence[nn.Module], keep: Keep) -> Iterator[list[Tensor]]:
    """A list that holds what is kept of the latest output of each module, while the context lasts."""
    records = [torch.empty(0)] * len(modules)
    with ExitStack() as hooks:
        for place, module in enumerate(modules):
            hooks.callback(put(module, RecordHook(records, place, keep)))
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


def _prepared(model: nn.Module, found: Stack, stack: str, batch: dict[str, Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """What runs the stack alone, and the mask of the tokens that its blocks will see."""
    if not is_encoder_decoder(model) or stack == "encoder":
        without_cache = _without_cache(found.module)
        return lambda: found.module(**batch, **without_cache), batch["attention_mask"]
    start = next((s for m in model.modules() if (s := _start_token(m)) is not None), 0)
    begin = batch["input_ids"].new_full((len(batch["input_ids"]), 1), start)
    return lambda: model(**batch, decoder_input_ids=begin, use_cache=False), torch.ones_like(begin)


def _start_token(module: nn.Module) -> int | None:
    return getattr(getattr(module, "config", None), "decoder_start_token_id", None)


def _without_cache(module: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}
