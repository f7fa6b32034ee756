"""Writing: what a steered model writes over many strengths.

Texts are written first and judged afterwards, when nothing steers the model: a judge may run it too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn

from repe.data.answers import Answer, answers_of
from repe.data.items import Item
from repe.measuring.intervals import Array
from repe.measuring.judges.judge import Judge, named
from repe.measuring.record import Page
from repe.measuring.scoring import TransformersScorer, strengths_of
from repe.measuring.writings import MEASURES, Writings, check_names, judge_all
from repe.models.tokens import Text, encode_behind
from repe.steering.edit import EditOptions, spells_options
from repe.steering.steer import Steered, edit_of


@spells_options
def write(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    prompts: Sequence[Text],
    alphas: Sequence[float] | Tensor,
    *,
    judge: Judge | Sequence[Judge] | Mapping[str, Judge] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    resume: str | os.PathLike[str] | None = None,
    blocks_at: str | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> Writings:
    """Let the model write after every prompt at every strength: greedily, the likeliest token each time.

    Args:
        model, tokenizer: neither is changed.
        concept: what is steered along, as in `repe.steer`.
        prompts: texts or chats.
        alphas: the strengths, finite, in any order; 0 is added.
        judge: one, several, or a mapping of names: each gives a text one finite number, called with the prompt and the
            text once all texts are written. Judgements are kept under its name, so that a judge that was changed needs
            another. Some are in `repe.measuring.judges`; texts may also be judged later, by `Writings.judged_by`.
        max_new_tokens: the longest that a text may be, in tokens.
        batch_size: texts that are written at a time, of whatever strengths.
        resume: a file that keeps texts and judgements: none is written, or judged under the same name, twice.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        progress: show progress bars; None: where a terminal or a notebook shows them.
        options: of the edit, as in `repe.steer`.

    Raises:
        ValueError: no prompts or no alphas, a number that is not finite, a scope that is a mask, a judge without a
            name, or of one that is taken, one that fails or gives something else than a number (the texts are in
            `resume`), `resume` holds something else, or what `repe.steer` raises.
        ImportError: a judge needs a package that is not installed (the texts are in `resume`).

    Example:
        >>> question = [{"role": "user", "content": "What is 21 minus 4?"}]
        >>> written = repe.measuring.write(model, tokenizer, "honesty", [question], [-1, 1], max_new_tokens=8)
        >>> written.alphas.tolist()
        [-1.0, 0.0, 1.0]
    """
    strengths = strengths_of([0.0, *strengths_of(alphas)])
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
    judges = named(judge)
    check_names(judges)
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_size=batch_size, resume=resume, progress=progress
    )
    texts = scorer.write(prompts, edit, strengths, max_new_tokens=max_new_tokens)
    answers = [[_answer(tokenizer, *said) for said in zip(prompts, row, strict=True)] for row in texts]
    ids = [[a.ids[a.begins :] for a in row] for row in answers]
    measured: Any = {name: np.array([[of(text) for text in row] for row in ids]) for name, of in MEASURES.items()}
    measured["cross_entropy"] = _surprise(scorer, answers)
    written = Writings(np.array(strengths), tuple(prompts), tuple(map(tuple, texts)), **measured)
    names = scorer.names_of(prompts, max_new_tokens)
    for name, each in judges.items():
        page = scorer.record.page(f"judgement by {name}", edit)
        known = page.known(names, lambda _, value: isinstance(value, float) and math.isfinite(value))

        def keep(prompt: int, alpha: float, given: float, page: Page = page) -> None:
            page.add([(names[prompt], [alpha], [given])])

        written = judge_all(written, name, each, known, keep, progress=progress)
    return written


def _answer(tokenizer: Any, prompt: Text, text: str) -> Answer:
    """What was written after a prompt; of no tokens where the tokenizer leaves out all of it."""
    before, together = encode_behind(tokenizer, prompt, ["", text])
    if before == together:
        return Answer(tuple(before), len(before))
    return answers_of(tokenizer, [Item(prompt, (text,))])[0]


def _surprise(scorer: TransformersScorer, answers: Sequence[Sequence[Answer]]) -> Array:
    """(alphas, prompts), how unlikely texts are without the edit, in nats a token; NaN for one of no tokens."""
    found = np.full((len(answers), len(answers[0])), math.nan)
    lengths = np.array([[len(answer.ids) - answer.begins for answer in row] for row in answers])
    if lengths.any():
        said = [answer for row in answers for answer in row if answer.begins < len(answer.ids)]
        found[lengths > 0] = -scorer.log_likelihoods(said, None, [0.0]).log_p[0].numpy() / lengths[lengths > 0]
    return found
