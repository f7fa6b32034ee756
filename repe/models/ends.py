"""Texts that go on: what may stand behind them is not cut off by an end token, nor tokenized as if it began a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def unended(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, with what the tokenizer puts before it and without what it would put behind.

    Raises:
        ValueError: the tokenizer puts special tokens inside of it.
    """
    whole = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not bare:
        return whole
    for end in range(len(bare), len(whole) + 1):
        if whole[end - len(bare) : end] == bare:
            return whole[:end]
    raise ValueError(
        f"{type(tokenizer).__name__} gives {text!r:.80} the tokens {bare}, and with special tokens {whole}: expected "
        "them before and behind a text alone"
    )


def decoded_behind(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """What tokens say behind others. Alone, the first may lose its space, as a text's first token does."""
    known, whole, alone = (
        str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in ([*before], [*before, *ids], [*ids])
    )
    return whole.removeprefix(known) if whole.startswith(known) else alone
