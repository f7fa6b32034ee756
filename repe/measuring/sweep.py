"""The sweep: a model's scores on tasks over many strengths."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from repe.data.answers import answers_of
from repe.data.items import Item
from repe.measuring.curve import Scores
from repe.measuring.fanout import BATCH_TOKENS
from repe.measuring.scoring import Scorer, TransformersScorer, strengths_of
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.steer import Steered, edit_of


@spells_options
def sweep(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    tasks: Mapping[str, Sequence[Item]],
    alphas: Sequence[float] | Tensor,
    *,
    blocks_at: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> dict[str, Scores]:
    """Measure the log-likelihoods of all options, for every task and strength.

    Args:
        model, tokenizer: neither is changed.
        concept: what is steered along, as in `repe.steer`.
        tasks: items by the name of their task.
        alphas: the strengths, finite; sorted, each once.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        batch_tokens: tokens a forward, at most: what bounds the memory. A batch holds one text at least.
        resume: a file that keeps what is measured. It is not measured again, be it with other strengths or items.
        progress: show a progress bar; None: where a terminal or a notebook shows it.
        options: of the edit, as in `repe.steer`: with scope="answer" from the last prompt token on, everywhere by
            default.

    Returns:
        `Scores` by the name of the task, one row a strength, in ascending order.

    Raises:
        ValueError: no alphas, no tasks or no items; an option of no tokens; a scope that is a mask; a model that is not
            causal; `resume` holds something else; or what `repe.steer` raises.
        IndexError: the scope names a position before the start of a prompt.
        OverflowError: logits are not finite at a strength.

    Warns:
        UserWarning: trees of shared prefixes came out wrong for this model; padded rows were run instead.

    Example:
        >>> items = repe.measuring.items_of("skills", model)[:20]
        >>> scores = repe.measuring.sweep(model, tokenizer, "honesty", {"skills": items}, [-1, 0, 1])
        >>> scores["skills"].accuracy.shape
        (3, 20)
    """
    strengths, exam = strengths_of(alphas), Exam(tokenizer, tasks)
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens, resume=resume, progress=progress
    )
    return exam.scores(scorer, edit, strengths)


class Exam:
    """Tasks, with all of their options as token ids.

    Raises:
        ValueError: no tasks, no items, an option of no tokens, or items that cannot be scored.
    """

    def __init__(self, tokenizer: Any, tasks: Mapping[str, Sequence[Item]]) -> None:
        if not tasks or not all(map(len, tasks.values())):
            raise ValueError(f"expected at least one task with items, got { {k: len(v) for k, v in tasks.items()} }")
        self.tasks = tasks
        self.answers = answers_of(tokenizer, (item for items in tasks.values() for item in items))
        self.table(torch.zeros(1, len(self.answers)))  # what cannot be scored is refused before anything is run

    def scores(self, scorer: Scorer, edit: Edit | None, alphas: Sequence[float]) -> dict[str, Scores]:
        """The scores of every task, one row a strength."""
        return self.table(scorer.log_likelihoods(self.answers, edit, alphas).log_p)

    def table(self, log_p: Tensor) -> dict[str, Scores]:
        """The scores of every task from (rows, answers), the log-likelihoods of all options."""
        sizes = [sum(len(item.options) for item in items) for items in self.tasks.values()]
        parts = zip(self.tasks.items(), log_p.split(sizes, dim=1), strict=True)
        return {name: _scores(name, items, part) for (name, items), part in parts}


def _scores(name: str, items: Sequence[Item], log_p: Tensor) -> Scores:
    """The scores of a task from (rows, answers), the options of one item after those of another."""
    counts = np.array([len(item.options) for item in items])
    there = np.arange(counts.max()) < counts[:, None]
    table = np.full((len(log_p), *there.shape), np.nan)
    table[:, there] = log_p.numpy()
    return Scores(name, table, np.array([item.answer for item in items]), [item.group for item in items])
