"""Placing: at which block a vector is written, and how far, by what that does to behaviour and costs on plain text."""

from __future__ import annotations

import warnings
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
from repe.models.logits import check_causal
from repe.models.tokens import Text
from repe.reading.dose import dose_of, forecast_doses, short_texts
from repe.reading.gradients import (
    NotDifferentiableError,
    Question,
    efficiency,
    efficiency_of_random,
    gradients_of_answers,
    information,
    samples_of_divergence,
)
from repe.reading.vector import ConceptVector

ITEMS, DRAWS = 16, 4
LATEST = 0.8  # of the depth: what is written later is hardly acted upon any more (Arditi et al., arXiv 2406.11717)
EQUALLY_EFFICIENT = 0.05  # of efficiency, as a share: what few items and texts cannot tell apart


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

    Its provenance says by what the block was chosen, the efficiency of every block, and how many random directions are
    less efficient there.
    """
    questions = questions_of(model, tokenizer, concept)
    return _weighed(model, tokenizer, vector, questions, neutral, blocks_at, progress)


def dosed(
    model: nn.Module,
    tokenizer: Any,
    vector: ConceptVector,
    texts: Sequence[Text] | None = None,
    *,
    blocks_at: str | None = None,
    progress: bool | None = None,
) -> ConceptVector:
    """The vector with its doses: the length at every block that costs 0.1 nats a token, the mean of both signs.

    It is measured at the recommended blocks, several of them together, and elsewhere forecast from gradients.

    Args:
        model, tokenizer: neither is changed. What is attached to the model applies.
        vector: whose directions they are.
        texts: plain ones; every other one of the library's neutral texts by default, and of each the first 64 tokens.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        progress: show progress bars; None: where a terminal or a notebook shows them.

    Returns:
        A vector whose `dose` is NaN where none was found; `provenance["dose"]` says how each was, and why not.

    Raises:
        ValueError: no texts, or the model does not predict every token from those before it alone.

    Warns:
        UserWarning: the model has no gradient, and only what is recommended was measured.

    Example:
        >>> vector = repe.reading.dosed(model, tokenizer, repe.extract(model, tokenizer, "honesty"))
        >>> bool((vector.dose > 0).all())
        True
    """
    check_causal(model, blocks_at)
    return _weighed(model, tokenizer, vector, (), texts, blocks_at, progress)


def _weighed(
    model: nn.Module,
    tokenizer: Any,
    vector: ConceptVector,
    questions: Sequence[Question],
    texts: Sequence[Text] | None,
    blocks_at: str | None,
    progress: bool | None,
) -> ConceptVector:
    stack, plain = find_stack(model, vector.stack, blocks_at), short_texts(model, tokenizer, texts)
    sites = [stack.site(vector.site, block) for block in vector.blocks]
    try:
        samples = samples_of_divergence(model, sites, plain, draws=DRAWS, progress=progress)
        gradients = gradients_of_answers(model, sites, questions, progress=progress) if questions else None
    except NotDifferentiableError as error:
        warnings.warn(
            f"{error}. Of {vector.concept!r}, reading alone chose the block, and doses of other blocks are unknown",
            stacklevel=4,
        )
        unknown = replace(vector, dose=None, coherence=None)  # type: ignore[arg-type]
        return dose_of(model, sites, plain, unknown, {"forecast": str(error)}, progress=progress)
    if gradients is not None:
        efficient = efficiency(gradients, samples, vector.write)
        vector = moved(vector, efficient, stack.n_blocks)
        vector = compared(vector, efficient, gradients.mean(0), samples)
    forecast = forecast_doses(vector, information(samples, vector.write))
    return dose_of(model, sites, plain, forecast, progress=progress)


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


def moved(vector: ConceptVector, efficiency: Tensor, depth: int) -> ConceptVector:
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
    equal = usable >= usable.max() - EQUALLY_EFFICIENT * usable.max().abs()
    best = vector.blocks[int(vector.separation.masked_fill(~equal, -torch.inf).argmax())]
    return replace(vector, recommended=(best,), provenance={**vector.provenance, **told})


def compared(vector: ConceptVector, efficient: Tensor, gradient: Tensor, samples: Tensor) -> ConceptVector:
    """The vector that knows, for every block, how many random directions are less efficient than it is forwards."""
    generator = torch.Generator().manual_seed(0)
    above = {}
    for row, block in enumerate(vector.blocks):
        random = efficiency_of_random(gradient[row], samples[:, row], generator)
        above[str(block)] = round(float((random < efficient[row]).double().mean()), 3)
    return replace(vector, provenance={**vector.provenance, "above_random": above})
