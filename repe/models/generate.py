"""Generation: what a model writes after texts or chats, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from repe.models.blocks import device_of
from repe.models.counts import check_counts
from repe.models.finite import FiniteLogits
from repe.models.tokens import Text, encode, pad


@torch.no_grad()
def generate(model: Any, tokenizer: Any, texts: Sequence[Text], **options: Any) -> list[str]:
    """What the model writes after every text, without special tokens.

    Args:
        model, tokenizer: neither is changed; whatever steers the model does so here too.
        texts: texts or chats, padded on the left.
        options: for `model.generate`, such as `max_new_tokens`.

    Raises:
        ValueError: there are no texts, or one chat instead of a list; a text has no tokens; or something is no chat, or
            one that the tokenizer's template refuses.
        OverflowError: the model puts out NaN; the text says where it may come from.

    Example:
        >>> chats = [[{"role": "user", "content": "Name the trade of Abrin Tolva."}]]
        >>> repe.generate(model, tokenizer, chats, max_new_tokens=8)
        ['potter.']
    """
    if isinstance(texts, Mapping) or (isinstance(texts, Sequence) and any(isinstance(t, Mapping) for t in texts)):
        raise ValueError("got one chat: put it in a list")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a list of at least one text, got {texts!r}")
    check_counts(max_new_tokens=options.get("max_new_tokens"))
    batch = pad([encode(tokenizer, text) for text in texts], side="left", device=device_of(model))
    with FiniteLogits(model) as watch:
        options["logits_processor"] = [watch, *(options.get("logits_processor") or [])]
        written = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(written, skip_special_tokens=True))


class Halt(StoppingCriteria):
    """Ends every row of a generation once somebody says so."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.is_stopped(), dtype=torch.bool, device=input_ids.device)
