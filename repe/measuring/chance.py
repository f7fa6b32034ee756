"""Chance: what random directions would do in a concept's place, forecast from gradients.

A direction that costs as much as the concept's and moves behaviour as far is no worse than it. How far 1,000 random
ones do can be told without steering along a single one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repe.data.answers import Answer
from repe.data.items import Item
from repe.measuring.costs import plain_texts
from repe.measuring.fanout import scoped
from repe.models.blocks import find_stack
from repe.models.tokens import Text
from repe.reading.dose import TEXTS, TOKENS
from repe.reading.gradients import (
    RANDOM,
    NotDifferentiableError,
    along_random,
    gradients_of_answers,
    samples_of_divergence,
)
from repe.reading.placing import as_questions, spread
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit
from repe.steering.scope import Scope, check_for_many, check_inside

ITEMS, DRAWS = 40, 8


class NothingEditedError(ValueError):
    """A scope under which nothing would be edited."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How answers and plain text answer to small pushes of the edited tokens.

    Attributes:
        gradients: (items, sites, d_model), of the log odds of the aligned answer, in nats for a push of length 1.
        samples: (samples, sites, d_model), of what such a push costs plain text: see `repe.reading.gradients`.
    """

    gradients: Tensor
    samples: Tensor

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        sites: Sequence[nn.Module],
        items: Sequence[Item],
        texts: Sequence[Text],
        scope: Scope,
        *,
        draws: int = DRAWS,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Sensitivity:
        """That of the items, and of the beginnings of every other text, twenty at most.

        Raises:
            NotDifferentiableError: the model has no gradient.
            NothingEditedError: the scope holds no token of the items, or of the texts, that tells of another.
            ValueError: the scope is a mask.
            IndexError: it names a position before the start of a prompt.
        """
        check_for_many(scope)
        plain = plain_texts(tokenizer, texts[::2][:TEXTS], scope)
        cut = [Answer(text.ids[:TOKENS], min(text.begins, TOKENS)) for text in plain]

        def edited(answer: Answer) -> Tensor:
            return scoped(scope, len(answer.ids) - 1, answer.begins)

        questions = as_questions(tokenizer, items)
        everything = [answer for options, _ in questions for answer in options] + cut
        if isinstance(scope, tuple):
            check_inside(scope, min(answer.begins for answer in everything))
        for what, of in (("texts", cut), ("items", everything[: -len(cut)])):
            if not any(edited(answer).any() for answer in of):
                raise NothingEditedError(
                    f"scope={scope!r} holds no token of the {what} behind which another is predicted, so that nothing "
                    "can be forecast: name another scope"
                )
        return cls(
            gradients_of_answers(model, sites, questions, edited=edited, progress=progress),
            samples_of_divergence(model, sites, cut, draws=draws, seed=seed, edited=edited, progress=progress),
        )


@dataclass(frozen=True, eq=False)
class Chance:
    """What random directions do that cost plain text what the concept does.

    Attributes:
        slopes: (directions,), how far 1,000 move the mean log odds of the aligned answer, in nats for an alpha of 1.
        lengths: how many of the concept's lengths each of some random vectors is pushed to cost as much.
    """

    slopes: Tensor
    lengths: Sequence[float]


def chance_of(
    model: nn.Module,
    tokenizer: Any,
    edit: Edit,
    vectors: Sequence[ConceptVector],
    items: Sequence[Item],
    texts: Sequence[Text],
    *,
    blocks_at: str | None = None,
    progress: bool | None = None,
) -> Chance | None:
    """Forecast what random directions do in the place of an edit's; None where that cannot be forecast.

    Args:
        model, tokenizer: neither is changed. What is attached to the model applies.
        edit: along one vector.
        vectors: random ones, with the lengths of the edit's.
        items: of which forty are asked, evenly spread.
        texts: plain ones.
    """
    if edit.kind != "add" or edit.gate is not None or edit.keep_norm:
        return None  # a gradient knows what is added everywhere alike
    stack = find_stack(model, edit.stack, blocks_at)
    lengths = {block: length for block, (length, _) in edit.on(stack).lengths.items()}
    sites = [stack.site(edit.site, block) for block in lengths]
    try:
        asked = spread(items, ITEMS)
        found = Sensitivity.of(model, tokenizer, sites, asked, texts, edit.scope, progress=progress)
    except (NotDifferentiableError, NothingEditedError):
        return None

    def root(vector: ConceptVector) -> Tensor:
        pushed = torch.stack([length * vector.write[vector.row(block)] for block, length in lengths.items()])
        return torch.einsum("nsd,sd->n", found.samples, pushed).square().mean().sqrt()

    generator, (concept,) = torch.Generator().manual_seed(0), edit.vectors
    gradient, moved, costs = found.gradients.mean(0), torch.zeros(RANDOM), torch.zeros(RANDOM, len(found.samples))
    for site, length in enumerate(lengths.values()):
        here, spent = along_random(gradient[site], found.samples[:, site], generator)
        moved, costs = moved + length * here, costs + length * spent
    own = root(concept)
    slopes, ratios = moved * own / costs.square().mean(1).sqrt(), [float(own / root(vector)) for vector in vectors]
    return Chance(slopes, ratios) if slopes.isfinite().all() and all(0 < ratio < math.inf for ratio in ratios) else None
