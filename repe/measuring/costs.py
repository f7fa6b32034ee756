"""Costs: what steering does to texts that have nothing to do with the concept, token by token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from repe.data.answers import Answer
from repe.measuring.curve import Costs
from repe.measuring.fanout import BATCH_TOKENS
from repe.measuring.scoring import TransformersScorer, strengths_of
from repe.models.tokens import Text, encode
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.scope import Scope, needs_prompt_length
from repe.steering.steer import Steered, edit_of


@spells_options
def costs(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    texts: Sequence[Text],
    alphas: Sequence[float] | Tensor,
    *,
    blocks_at: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> Costs:
    """Measure the KL divergence from the unsteered model, the cross-entropy, and how far the last hidden state moves.

    A text counts as written after its first token, which is what the scopes take for its prompt; with scope="prompt",
    or positions from the prompt's end, all of it counts as prompt. The divergence is `KL(unsteered || steered)`, at
    every token that predicts another. The hidden state is that of the last block's output, before the final norm; its
    change is the norm of the difference.

    Args:
        texts: neutral ones, of two tokens at least.
        alphas: the strengths; sorted, each once.
        model, tokenizer, concept, blocks_at, batch_tokens, resume, progress, options: as in `repe.measuring.sweep`.

    Raises:
        ValueError: there are no texts, one is too short, or what `repe.measuring.sweep` raises.
        OverflowError: as `repe.measuring.sweep` raises it.

    Example:
        >>> texts = repe.measuring.texts_of("neutral", model)[:5]
        >>> found = repe.measuring.costs(model, tokenizer, "honesty", texts, [0, 1, 2])
        >>> found.kl.shape
        (3, 5)
    """
    strengths = strengths_of(alphas)
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    plain = plain_texts(tokenizer, texts, edit.scope)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens, resume=resume, progress=progress
    )
    return costs_at(scorer, plain, edit, strengths)


def plain_texts(tokenizer: Any, texts: Sequence[Text], scope: Scope) -> list[Answer]:
    """Texts as token ids, and how much of each a scope takes for the prompt.

    Raises:
        ValueError: there are none, or one is of a single token.
    """
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts, got {texts!r:.80}")
    rows = [tuple(encode(tokenizer, text)) for text in texts]
    if not rows or any(len(row) < 2 for row in rows):
        raise ValueError("costs are measured on at least one text, each of two tokens or more")
    is_all_prompt = needs_prompt_length(scope) and scope not in ("answer", "generated")
    return [Answer(row, len(row) if is_all_prompt else 1) for row in rows]


def costs_at(scorer: TransformersScorer, texts: Sequence[Answer], edit: Edit, alphas: Sequence[float]) -> Costs:
    """The costs of an edit on `plain_texts`, at strengths in ascending order."""
    found = scorer.costs(texts, edit, alphas)
    log_p, kl, change = torch.stack([tokens.mean(-1) for tokens in found], dim=-1).double().numpy()
    every = torch.cat([tokens[1] for tokens in found], dim=-1).double().numpy()
    return Costs(kl, np.quantile(every, 0.95, axis=1), -log_p, change)
