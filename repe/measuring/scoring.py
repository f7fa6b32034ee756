"""Scoring: the log-likelihoods that a model gives to the options of items."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repe.data.items import Item
from repe.models.blocks import device_of, find_stack, is_encoder_decoder
from repe.models.chats import cue
from repe.models.tokens import Text, encode, pad
from repe.models.tracking import trackers_of
from repe.reading.capture import evaluating


@dataclass(frozen=True)
class EncodedItem:
    """The token ids of an item's prompt, and of each of its options."""

    prompt: list[int]
    options: list[list[int]]


def encode_items(tokenizer: Any, items: Iterable[Item]) -> list[EncodedItem]:
    """Items as token ids; an option's tokens follow the prompt's as they are. Raises ValueError if it has none.

    Behind a chat written as a plain transcript, for want of a template, an option stands after a space.
    """
    return [
        EncodedItem(
            encode(tokenizer, item.prompt), [_option(tokenizer, option, item.prompt) for option in item.options]
        )
        for item in items
    ]


def log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    steering: Iterable[Any] | None = None,
    blocks_at: str | None = None,
    batch_size: int = 64,
) -> list[Tensor]:
    """log P(option | prompt), summed over the option's tokens: for every item a float32 tensor (options,).

    Args:
        model, tokenizer: neither is changed.
        items: prompts and options; an option's tokens follow the prompt's as they are.
        steering: handles that are told where the prompts end, as some scopes need; all that are attached by default.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        batch_size: texts a forward pass.

    Raises:
        ValueError: an option of no tokens, or a model that does not predict every token from those before it alone.
    """
    check_causal(model, blocks_at)
    return score_encoded(model, encode_items(tokenizer, items), steering=steering, batch_size=batch_size)


def score_encoded(
    model: nn.Module, items: Sequence[EncodedItem], *, steering: Iterable[Any] | None = None, batch_size: int = 64
) -> list[Tensor]:
    """`log_likelihoods` of items that are token ids already, as when they are scored again and again.

    `check_causal` says whether the model has any.
    """
    texts = [(item.prompt, option) for item in items for option in item.options]
    scores = torch.empty(len(texts))
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    handles = _attached(model) if steering is None else list(steering)
    before = [handle.prompt_length for handle in handles]
    try:
        with evaluating(model), torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                scores[chosen] = _score(model, [texts[i] for i in chosen], handles)
    finally:
        for handle, length in zip(handles, before, strict=True):
            handle.prompt_length = length
    return list(scores.split([len(item.options) for item in items]))


def _attached(model: nn.Module) -> list[Any]:
    """The handles on a model."""
    return [user for tracker in trackers_of(model) for user in tracker.users if hasattr(user, "prompt_length")]


def check_causal(model: nn.Module, blocks_at: str | None = None) -> None:
    """Raises ValueError where a prompt's continuation has no probability: the model reads both ways, or has no head."""
    kind = type(model).__name__
    need = "likelihoods of options need a causal language model, such as AutoModelForCausalLM loads"
    if is_encoder_decoder(model):
        raise ValueError(f"{kind} is an encoder-decoder, whose encoder would see the option it is to predict: {need}")
    if any(getattr(m, "is_causal", True) is False for m in find_stack(model, blocks_at=blocks_at).module.modules()):
        raise ValueError(f"the attention of {kind} is not causal, so every token is predicted from itself: {need}")
    parts: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    if parts and all(part.get_output_embeddings() is None for part in parts):
        raise ValueError(f"{kind} has no language-model head: {need}")


def _option(tokenizer: Any, option: str, prompt: Text) -> list[int]:
    before = "" if isinstance(prompt, str) else cue(tokenizer, prompt)
    text = before + " " * (before != "" and option[:1].strip() != "") + option
    known, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] if t else [] for t in (before, text))
    if len(ids) <= len(known):
        raise ValueError(f"the option {option!r} has no tokens, so it has no probability")
    return list(ids[len(known) :])


def _score(model: nn.Module, texts: Sequence[tuple[list[int], list[int]]], handles: Sequence[Any]) -> Tensor:
    batch = pad([prompt + option for prompt, option in texts], device=device_of(model))
    ends = torch.tensor([len(prompt) for prompt, _ in texts])
    for handle in handles:
        handle.prompt_length = ends
    width = batch["input_ids"].shape[1]
    needed = width + 1 - int(ends.min())
    logits = model(**batch, use_cache=False, **_only_last(model, needed)).logits
    first = width - logits.shape[1]
    slots, ids = torch.arange(first + 1, width), batch["input_ids"].to(logits.device)
    lengths = batch["attention_mask"].sum(1).cpu()
    rows, columns = ((slots >= ends[:, None]) & (slots < lengths[:, None])).nonzero(as_tuple=True)
    rows, columns = rows.to(logits.device), columns.to(logits.device)
    gained = -torch.nn.functional.cross_entropy(
        logits[rows, columns].float(), ids[rows, columns + first + 1], reduction="none"
    )
    return torch.zeros(len(texts)).index_add(0, rows.cpu(), gained.cpu())


def _only_last(model: nn.Module, count: int) -> dict[str, int]:
    """What keeps a head from being run on all but the last `count` positions, where the model knows how."""
    knows = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    return {"logits_to_keep": count} if knows else {}
