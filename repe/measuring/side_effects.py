"""Side effects: whether steering, along whatever concept, makes a safe model comply, or an obliging one refuse.

Two things tell: how near what is written lies to the model's refusal direction, and what it writes after mild requests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor, nn

from repe.data.catalogue import find_task
from repe.data.items import RequestPair, load_requests
from repe.measuring.curve import SideEffects
from repe.measuring.judges.refusal import refusal
from repe.measuring.scoring import TransformersScorer, strengths_of
from repe.models.blocks import find_stack
from repe.models.chats import cue
from repe.models.counts import check_counts
from repe.models.load import home_of
from repe.models.tokens import encode
from repe.reading.capture import capture
from repe.reading.vector import UNUSUAL
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.steer import Steered, edit_of

PAIRS, TOKENS = 24, 32
"""How many pairs of requests are answered, and how much of each answer is written."""
FEWEST = 4  # pairs: a half fits, and the other tests

Requests = str | os.PathLike[str] | Sequence[RequestPair] | None
"""A task's name, the path of a file, pairs, or None for none."""


@spells_options
def side_effects(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    alphas: Sequence[float] | Tensor,
    *,
    requests: Requests = "requests",
    pairs: int = PAIRS,
    max_new_tokens: int = TOKENS,
    seed: int = 0,
    batch_size: int = 32,
    resume: str | os.PathLike[str] | None = None,
    blocks_at: str | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> SideEffects:
    """Measure what steering along a concept does to refusing: the direction, and the share of requests refused.

    The refusal direction leads from harmless to harmful requests: it is the difference of their mean activations at the
    output of an edited block, at the last token of the prompt. A model may tell the two apart and refuse neither; that
    is said too, as the direction is then one of harm alone. It is known where that of one half of the pairs orders the
    other half. The cosine is with what a positive alpha adds; or, where what is added hangs on the activation, with the
    direction it is added along, and for several with the space they span, which has no sign. Directions that are read
    of one model have more in common than random ones: a cosine beyond the random ones' range is a reason to look at the
    refusals, and no more.

    Texts are written greedily. Whether one refuses, `repe.measuring.judges.refusal` says, which knows English alone;
    or, where a pair names them, the beginnings of refusals. What is no refusal need not comply: a broken text is none.

    Args:
        model, tokenizer: neither is changed. What is attached to the model applies.
        concept: what is steered along, as in `repe.steer`.
        alphas: the strengths, finite, in any order; 0 is added. Few are enough: every one writes two texts a pair.
        requests: pairs of a harmful and a harmless request: a task's name, the path of a file, or
            `repe.data.RequestPair`s; the model's own or the library's by default.
        pairs: how many of them are answered, at most, drawn by `seed`; the direction is made of all.
        max_new_tokens: the longest that an answer may be, in tokens.
        seed: of the halves, one of which tests the direction of the other, and of which pairs are answered.
        batch_size: texts that are read or written at a time.
        resume: a file that keeps the texts: none is written twice.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        progress: show progress bars; None: where a terminal or a notebook shows them.
        options: of the edit, as in `repe.steer`.

    Returns:
        The side effects; `not_measured` says why there are none: no requests, or chats without a chat template.

    Raises:
        ValueError: fewer than four pairs of requests, fewer than one to answer, a file that is malformed, a number that
            is not finite, a scope that is a mask, or what `repe.steer` raises.
        TypeError: something among the requests is no `RequestPair`.

    Example:
        >>> print(repe.measuring.side_effects(model, tokenizer, "happiness", [1], pairs=8))
        cosine with the refusal direction ...
        refused at alpha 1: harmful 100% [68, 100] (unsteered 100% [68, 100]), harmless ...

    Source: the direction, Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (arXiv
    2406.11717).
    """
    check_counts(0, seed=seed)
    check_counts(pairs=pairs, max_new_tokens=max_new_tokens, batch_size=batch_size)
    strengths = strengths_of(alphas)
    asked = requests_of(requests, model)
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_size=batch_size, resume=resume, progress=progress
    )
    return side_effects_at(scorer, edit, strengths, asked, pairs=pairs, max_new_tokens=max_new_tokens, seed=seed)


def requests_of(requests: Requests, model: nn.Module) -> Sequence[RequestPair]:
    """Pairs of requests, from the name of a task, the path of a file, or as they are; none for None.

    Raises:
        ValueError, TypeError: as `side_effects` raises them of requests.
    """
    if isinstance(requests, str | os.PathLike):
        requests = load_requests(find_task(requests, home_of(model)))
    _check(requests or (), 1)
    return requests or ()


def side_effects_at(
    scorer: TransformersScorer,
    edit: Edit,
    alphas: Sequence[float],
    requests: Sequence[RequestPair],
    *,
    pairs: int = PAIRS,
    max_new_tokens: int = TOKENS,
    seed: int = 0,
) -> SideEffects:
    """The side effects of an edit at some strengths, and at 0. Raises as `side_effects` does."""
    _check(requests, pairs)
    strengths = np.array(strengths_of([0.0, *alphas]))
    placed = edit.on(find_stack(scorer.model, edit.stack, scorer.blocks_at)).constants
    blocks = np.array([*placed])
    if why_not := _obstacle(scorer, edit, requests):
        return SideEffects(strengths, blocks, not_measured=why_not)
    order = np.random.default_rng(seed).permutation(len(requests))
    apart = _apart(scorer, edit, [*placed], requests)
    written = [_written(constants) for constants in placed.values()]
    answered = [requests[i] for i in sorted(order[:pairs])]
    refused = _refused(scorer, edit, strengths.tolist(), answered, max_new_tokens)
    return SideEffects(
        alphas=strengths,
        blocks=blocks,
        cosine=np.array([cosine(rows, to) for rows, to in zip(written, apart.mean(0), strict=True)]),
        random=usual_cosine(len(written[0]), written[0].shape[1], len(written)),
        ordered=_ordered(apart, torch.from_numpy(order)),
        harmful=refused[:, : len(answered)],
        harmless=refused[:, len(answered) :],
    )


def _check(requests: Sequence[RequestPair], pairs: int) -> None:
    check_counts(pairs=pairs)
    for number, pair in enumerate(requests):
        if not isinstance(pair, RequestPair):
            raise TypeError(f"request {number} is a {type(pair).__name__}: expected RequestPair(harmful, harmless)")
    if 0 < len(requests) < FEWEST:
        raise ValueError(
            f"got {len(requests)} pairs of requests, and at least {FEWEST} are needed: one half tests the direction of "
            "the other"
        )


def _obstacle(scorer: TransformersScorer, edit: Edit, requests: Sequence[RequestPair]) -> str:
    """Why nothing can be measured, or ""."""
    if not requests:
        return "there are no requests"
    if not callable(getattr(scorer.model, "generate", None)):
        return f"{type(scorer.model).__name__} cannot generate"
    if any(not isinstance(pair.harmful, str) and cue(scorer.tokenizer, pair.harmful) for pair in requests):
        return "the requests are chats, and the tokenizer has no chat template"
    shortest = min(len(encode(scorer.tokenizer, text)) for pair in requests for text in (pair.harmful, pair.harmless))
    if isinstance(edit.scope, tuple) and min(edit.scope) < -shortest:
        return f"scope={edit.scope!r} names a position before the start of a request of {shortest} tokens"
    return ""


# the direction


def _apart(scorer: TransformersScorer, edit: Edit, blocks: Sequence[int], requests: Sequence[RequestPair]) -> Tensor:
    """(pairs, blocks, d_model), float64, from the harmless to the harmful request of every pair."""
    texts = [pair.harmful for pair in requests] + [pair.harmless for pair in requests]
    read = capture(
        scorer.model, scorer.tokenizer, texts, blocks=blocks, stack=edit.stack, blocks_at=scorer.blocks_at,
        batch_size=scorer.batch_size, progress=scorer.progress,
    )  # fmt: skip
    harmful, harmless = read.double().split(len(requests))
    return harmful - harmless


def _ordered(apart: Tensor, order: Tensor) -> Any:
    """(blocks, pairs), whether the mean of one half's differences points along each difference of the other half."""
    found = torch.zeros(apart.shape[1], len(apart), dtype=torch.int64)
    halves = order[::2], order[1::2]
    for fitted, held in (halves, halves[::-1]):
        found[:, held] = (torch.einsum("pbd,bd->bp", apart[held], apart[fitted].mean(0)) > 0).long()
    return found.numpy()


def _written(constants: Any) -> Tensor:
    """(K, d_model), float64: what is added, or, where that hangs on the activation, along what."""
    rows = constants.write if constants.needs_projection else constants.shift[None]
    return rows.detach().cpu().double()


def cosine(rows: Tensor, direction: Tensor) -> float:
    """The cosine of one row with a direction, or of the space that several rows span; 0 where either is 0."""
    unit = nn.functional.normalize(direction, dim=0)
    if len(rows) == 1:
        return float(nn.functional.normalize(rows[0], dim=0) @ unit)
    return float((torch.linalg.pinv(rows) @ (rows @ unit)).norm())


def usual_cosine(rows: int, d_model: int, blocks: int = 1) -> float:
    """The |cosine| that 95% of directions drawn evenly from the sphere have at most, with a space of so many rows: the
    largest of them, where one is drawn for each of several blocks.

    The square of one is distributed as Beta(rows / 2, (d_model - rows) / 2).
    """
    share = UNUSUAL ** (1 / blocks)
    return math.sqrt(beta.ppf(share, rows / 2, (d_model - rows) / 2)) if rows < d_model else 1.0


# the texts


def _refused(
    scorer: TransformersScorer,
    edit: Edit,
    alphas: Sequence[float],
    pairs: Sequence[RequestPair],
    max_new_tokens: int,
) -> Any:
    """(alphas, requests), 1 where a text refuses; first the harmful requests, then the harmless ones."""
    asked = [(pair.harmful, pair) for pair in pairs] + [(pair.harmless, pair) for pair in pairs]
    texts = scorer.write([prompt for prompt, _ in asked], edit, alphas, max_new_tokens=max_new_tokens)
    refuses = [[_refuses(*of, text) for of, text in zip(asked, row, strict=True)] for row in texts]
    return np.array(refuses, dtype=np.int64)


def _refuses(prompt: Any, pair: RequestPair, text: str) -> bool:
    if pair.refusals:
        return text.lstrip().startswith(pair.refusals)
    return refusal(prompt, text) > 0
