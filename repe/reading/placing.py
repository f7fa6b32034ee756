"""Placing: at which block a vector is written, by what writing there does to behaviour and costs on plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repe.data.answers import answers_of
from repe.data.catalogue import find_task, has_task
from repe.data.items import Item, load_items
from repe.data.worded import worded
from repe.models.blocks import find_stack
from repe.models.load import home_of
from repe.models.tokens import Text
from repe.reading.dose import DRAWS, dose_of, plain_texts
from repe.reading.gradients import Question, fisher, gradients_of_answers, samples_of_divergence, slopes
from repe.reading.vector import ConceptVector

ITEMS = 16
LATEST = 0.8  # of the depth
NEARLY_EQUAL = 0.05  # of efficiency, as a share: what few items and texts cannot tell apart


def placed(
    model: nn.Module,
    tokenizer: Any,
    vector: ConceptVector,
    concept: str,
    neutral: Sequence[Text] | None = None,
    *,
    blocks_at: str | None = None,
    progress: bool | None = None,
) -> ConceptVector:
    """The vector with its doses, and with the most efficient block recommended where the concept has behaviour items.

    Its provenance says by what the block was chosen, and the efficiency of every block.
    """
    stack = find_stack(model, vector.stack, blocks_at)
    sites = [stack.site(vector.site, block) for block in vector.blocks]
    plain, questions = plain_texts(model, tokenizer, neutral), questions_of(model, tokenizer, concept)
    try:
        samples = samples_of_divergence(model, sites, plain, draws=DRAWS, progress=progress)
        gradients = gradients_of_answers(model, sites, questions, progress=progress) if questions else None
    except (RuntimeError, NotImplementedError) as error:  # quantised kernels have no gradient
        told = {"forecast": f"the model cannot be differentiated ({type(error).__name__}: {error!s:.200})"}
        return dose_of(model, sites, plain, vector, None, told, progress=progress)
    information = fisher(samples, vector.write)
    if gradients is not None:
        vector = _moved(vector, slopes(gradients, vector.write).mean(0) / information.sqrt(), stack.n_blocks)
    return dose_of(model, sites, plain, vector, information, progress=progress)


def questions_of(model: nn.Module, tokenizer: Any, concept: str, count: int = ITEMS) -> list[Question]:
    """Some of a concept's behaviour items, in words and evenly spread; none where it has none."""
    home = home_of(model)
    items = worded(load_items(find_task(concept, home))) if has_task(concept, home) else []
    return as_questions(tokenizer, spread(items, count))


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, or all, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def as_questions(tokenizer: Any, items: Sequence[Item]) -> list[Question]:
    """Items as token ids."""
    answers = iter(answers_of(tokenizer, items))
    return [([next(answers) for _ in item.options], item.answer) for item in items]


def _moved(vector: ConceptVector, efficiency: Tensor, depth: int) -> ConceptVector:
    """The vector that recommends its most efficient block; of nearly equal ones, where the poles are furthest apart.

    The last fifth of the model is left out, unless nothing else was fitted: what is written there goes to the next word
    more than into what is written after it.
    """
    early = torch.tensor([block < LATEST * depth for block in vector.blocks])
    sound = efficiency.isfinite() & (vector.scale > 0)
    usable = efficiency.masked_fill(~(sound & early if (sound & early).any() else sound), -torch.inf)
    if not usable.isfinite().any():
        return vector
    told = {"chosen_by": "writing", "efficiency": [round(float(e), 3) for e in efficiency]}
    equal = usable >= usable.max() - NEARLY_EQUAL * usable.max().abs()
    best = vector.blocks[int(vector.separation.masked_fill(~equal, -torch.inf).argmax())]
    return replace(vector, recommended=(best,), provenance={**vector.provenance, **told})
