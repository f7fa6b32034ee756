"""Generation: what a model writes after texts or chats, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from repe.models.blocks import device_of, is_encoder_decoder
from repe.models.counts import check_counts
from repe.models.ends import decoded_behind
from repe.models.finite import FiniteLogits
from repe.models.tokens import Text, encode, pad


@torch.no_grad()
def generate(model: Any, tokenizer: Any, texts: Sequence[Text], **options: Any) -> list[str]:
    """What the model writes after every text, without special tokens.

    Args:
        model, tokenizer: neither is changed; whatever steers the model does so here too.
        texts: texts or chats, which are padded here. What an encoder-decoder writes is an answer to each, and for all
            others its continuation.
        options: for `model.generate`, such as `max_new_tokens`.

    Returns:
        A text each, or as many as `num_return_sequences` says, one after the other.

    Raises:
        ValueError: there are no texts, or one chat instead of a list; a text has no tokens; or something is no chat, or
            one that the tokenizer's template refuses; or the model does not write, as an encoder.
        TypeError: tokens are given in place of texts.
        OverflowError: the model puts out NaN; the text says where it may come from.

    Example:
        >>> chats = [[{"role": "user", "content": "Name the trade of Abrin Tolva."}]]
        >>> repe.generate(model, tokenizer, chats, max_new_tokens=8)
        ['potter.']
    """
    _, written = _generated(model, tokenizer, texts, options)
    return list(tokenizer.batch_decode(written, skip_special_tokens=True))


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, texts: Sequence[Text], **options: Any) -> list[str]:
    """What `generate` gives, as it stands behind every text: with the space that some decoders take off the front."""
    prompts, written = _generated(model, tokenizer, texts, options)
    return [decoded_behind(tokenizer, *ids) for ids in zip(prompts, written.tolist(), strict=True)]


def _generated(
    model: Any, tokenizer: Any, texts: Sequence[Text], options: dict[str, Any]
) -> tuple[list[list[int]], Tensor]:
    """The token ids of texts, and those that the model writes after each, (texts, tokens)."""
    _check_texts(texts)
    if not callable(getattr(model, "generate", None)):
        raise ValueError(
            f"{type(model).__name__} does not write, as it is no language model that predicts the next token: load one "
            "with AutoModelForCausalLM or AutoModelForSeq2SeqLM, or read texts with `repe.read`"
        )
    check_counts(max_new_tokens=options.get("max_new_tokens"))
    answers, prompts = is_encoder_decoder(model), [encode(tokenizer, text) for text in texts]
    batch = pad(prompts, "right" if answers else "left", device_of(model))
    with FiniteLogits(model) as watch:
        watched = [watch, *(options.get("logits_processor") or [])]
        found = model.generate(**batch, **{**options, "logits_processor": watched})
    written = getattr(found, "sequences", found)
    begun = _begun(written, options.get("decoder_input_ids")) if answers else batch["input_ids"].shape[1]
    return prompts, written[:, begun:]


def _check_texts(texts: Any) -> None:
    if isinstance(texts, Tensor) or (isinstance(texts, Mapping) and "input_ids" in texts):
        raise TypeError(f"expected texts or chats, which are tokenised here, and got tokens: {type(texts).__name__}")
    if isinstance(texts, Mapping) or (isinstance(texts, Sequence) and any(isinstance(t, Mapping) for t in texts)):
        raise ValueError("got one chat: put it in a list")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a list of at least one text, got {texts!r}")


def _begun(written: Tensor, given: Tensor | None) -> int:
    """How many tokens a decoder had before it wrote: what it was given, and that which every answer begins with."""
    width = 0 if given is None else given.shape[1]
    is_kept = given is not None and bool((written[: len(given), :width] == given).all())
    return width + (not is_kept)


class Halt(StoppingCriteria):
    """Ends every row of a generation once somebody says so."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.is_stopped(), dtype=torch.bool, device=input_ids.device)
