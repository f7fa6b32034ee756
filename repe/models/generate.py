"""Generation: what a model writes after texts or chats, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from repe.models.ends import decoded_behind
from repe.models.tokens import Text, encode, pad

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


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
    model: Any, tokenizer: Any, texts: Sequence[Text], options: Mapping[str, Any]
) -> tuple[list[list[int]], Tensor]:
    """The token ids of texts, and those that the model writes after each, (texts, tokens)."""
    if isinstance(texts, Mapping) or (isinstance(texts, Sequence) and any(isinstance(t, Mapping) for t in texts)):
        raise ValueError("got one chat: put it in a list")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a list of at least one text, got {texts!r}")
    prompts = [encode(tokenizer, text) for text in texts]
    batch = pad(prompts, side="left", device=model.device)
    return prompts, model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


class Halt(StoppingCriteria):
    """Ends every row of a generation once somebody says so."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.is_stopped(), dtype=torch.bool, device=input_ids.device)


class Pieces:
    """A text that is written token by token, in pieces that can be read: a character may take several tokens.

    What a token adds depends on the one before it, so the tokens of the last piece are decoded along.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._begun = self._shown = 0

    def add(self, token: int) -> str:
        """What a token makes readable; nothing while a character is incomplete."""
        self.ids.append(token)
        return self._new(lambda text: not text.endswith(INCOMPLETE))

    def rest(self) -> str:
        """What is left once no token is to come."""
        return self._new(bool)

    def _new(self, is_readable: Callable[[str], bool]) -> str:
        known, text = (
            str(self.tokenizer.decode(self.ids[self._begun : end], skip_special_tokens=True))
            for end in (self._shown, len(self.ids))
        )
        if len(text) <= len(known) or not is_readable(text):
            return ""
        self._begun, self._shown = self._shown, len(self.ids)
        return text[len(known) :]
