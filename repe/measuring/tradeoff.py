"""The trade-off: a concept, and what it is measured on, to the curve of what a strength gains and costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from repe.data.catalogue import concept_of, find_task, has
from repe.data.items import Item, load_items, load_texts
from repe.display import bar_of
from repe.measuring.costs import costs_at, plain_texts
from repe.measuring.curve import Baseline, Control, Costs, Scores, TradeoffCurve
from repe.measuring.fanout import BATCH_TOKENS
from repe.measuring.scoring import Scorer, TransformersScorer, strengths_of
from repe.measuring.sweep import Exam
from repe.models.blocks import find_stack
from repe.models.fingerprint import fingerprint
from repe.models.load import home_of
from repe.models.tokens import Text
from repe.reading.extract import name_of
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.steer import edit_of

STEPS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
ALPHAS = (*(-step for step in reversed(STEPS)), 0.0, *STEPS)
"""Up to where plain text is expected to diverge by 0.4 nats a token."""
CONTROLS = 20
PROVENANCE = ("reader", "pairs", "held_out_pairs", "pairs_digest")  # of the vector, what a curve keeps

Task = str | os.PathLike[str] | Sequence[Item]


@spells_options
def tradeoff(
    model: nn.Module,
    tokenizer: Any,
    concept: str | ConceptVector,
    alphas: Sequence[float] | Tensor = ALPHAS,
    *,
    alignment: Task | None = None,
    helpfulness: Task | Scores = "skills",
    neutral: str | os.PathLike[str] | Sequence[Text] | None = "neutral",
    controls: int | None = None,
    baseline: Mapping[str, str] | bool = True,
    batch_tokens: int = BATCH_TOKENS,
    resume: str | os.PathLike[str] | None = None,
    blocks_at: str | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> TradeoffCurve:
    """Measure what steering along a concept gains in behaviour and costs in helpfulness, over the strength.

    Args:
        model, tokenizer: neither is changed.
        concept: a name or a vector, as in `repe.steer`.
        alphas: the strengths; sorted, each once, and 0 is added.
        alignment: the behaviour items, whose answer is the aligned option: a task's name, the path of a file, or items;
            the concept's own by default.
        helpfulness: the same for items with one right option; or what was measured of them elsewhere, at these alphas.
        neutral: texts on which divergence and cross-entropy are measured; None for none.
        controls: random directions of the same norm, by seed from 0 on; 20 by default, for an edit that has a length,
            along a vector, and with helpfulness measured here. Others have no such control.
        baseline: system prompts by name, to compare with; True for those of the concept, where it has them and all
            items are chats.
        batch_tokens, resume, blocks_at, progress, options: as in `repe.measuring.sweep`.

    Returns:
        The curve: `.fits`, `.best()`, `.plot()`, `.save(path)`.

    Raises:
        ValueError: a task is not known or malformed; or what `repe.measuring.sweep` raises.

    Example:
        >>> facts, skills = (repe.measuring.items_of(name, model)[:40] for name in ("honesty", "skills"))
        >>> measured_on = {"alignment": facts, "helpfulness": skills}
        >>> curve = repe.tradeoff(model, tokenizer, "honesty", [-1, 1], **measured_on, controls=2)
        >>> curve.alphas.tolist()
        [-1.0, 0.0, 1.0]

    Sources: Wolf et al. (arXiv 2401.16332); the control, and a strength chosen on one half of the items and reported on
    the other, as in AxBench (Wu et al., arXiv 2501.17148).
    """
    strengths = strengths_of([0.0, *strengths_of(alphas)])
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    placement = edit.on(find_stack(model, edit.stack, blocks_at))
    tasks = {"alignment": items_of(edit.name if alignment is None else alignment, model)}
    if not isinstance(helpfulness, Scores):
        tasks["helpfulness"] = items_of(helpfulness, model)
    elif len(helpfulness.log_likelihoods) != len(strengths):
        raise ValueError(
            f"`helpfulness` was measured at {len(helpfulness.log_likelihoods)} alphas, and these are {strengths}, 0 "
            "among them"
        )
    texts, prompts = texts_of(neutral, model), _prompts(baseline, edit.name, model, tasks)
    randoms = _randoms(edit, controls, tasks)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens, resume=resume, progress=progress
    )
    exam = Exam(tokenizer, tasks)
    spent = costs_at(scorer, plain_texts(tokenizer, texts, edit), edit, strengths) if texts else Costs()
    measured = exam.scores(scorer, edit, strengths)
    if isinstance(helpfulness, Scores):
        measured["helpfulness"] = helpfulness
    drawn = bar_of(randoms, "random directions", unit="direction", progress=progress if randoms else False)
    return TradeoffCurve(
        concept=edit.name,
        alphas=np.array(strengths),
        alignment=_named(measured["alignment"], alignment, edit.name),
        helpfulness=_named(measured["helpfulness"], helpfulness, "helpfulness"),
        costs=spent,
        control=_control([exam.scores(scorer, edit.along(random), strengths) for random in drawn]),
        baseline=_baseline(scorer, tokenizer, prompts, tasks),
        provenance={
            "model": name_of(model),
            "fingerprint": fingerprint(model),
            "vector": {key: edit.vectors[0].provenance.get(key) for key in PROVENANCE} if edit.vectors else {},
            "edit": edit.kind,
            "unit": edit.unit,
            "site": edit.site,
            "blocks": list(placement.blocks),
            "scope": repr(edit.scope),
            "baseline": dict(prompts),
            "controls": len(randoms),
            "date": datetime.now(UTC).date().isoformat(),
        },
    )


def items_of(task: Task, model: nn.Module) -> Sequence[Item]:
    """The items of a task, from its name, the path of its file, or as they are."""
    return load_items(find_task(task, home_of(model))) if isinstance(task, str | os.PathLike) else task


def texts_of(neutral: Any, model: nn.Module) -> Sequence[Text]:
    """Texts, from the name of a task, the path of a file, or as they are; none for None."""
    if neutral is None:
        return ()
    return load_texts(find_task(neutral, home_of(model))) if isinstance(neutral, str | os.PathLike) else neutral


def _named(scores: Scores, task: Any, otherwise: str) -> Scores:
    return replace(scores, name=Path(task).stem if isinstance(task, str | os.PathLike) else otherwise)


# the control: random directions in the concept's place


def _randoms(edit: Edit, controls: int | None, tasks: Mapping[str, Sequence[Item]]) -> list[ConceptVector]:
    """Random vectors of the concept's lengths.

    Raises:
        ValueError: there cannot be any, and some were asked for.
    """
    why_not = ""
    if not edit.has_length:
        why_not = f"the edit {edit.kind!r} has no length that a random direction could share"
    elif len(edit.vectors) != 1:
        why_not = f"the edit has {len(edit.vectors)} vectors, and a random direction stands for one"
    elif "helpfulness" not in tasks:
        why_not = "`helpfulness` was measured elsewhere, where they were not steered along"
    if controls is not None and (controls < 0 or (controls and why_not)):
        raise ValueError(f"controls={controls}: {why_not or 'a number of random directions, 0 or more'}")
    if why_not:
        return []
    (vector,) = edit.vectors
    drawn = [ConceptVector.random(vector, seed) for seed in range(CONTROLS if controls is None else controls)]
    return [replace(random, sigma=vector.sigma, norm=vector.norm) for random in drawn]


def _control(rows: Sequence[Mapping[str, Scores]]) -> Control | None:
    if not rows:
        return None
    means = [
        (
            row["alignment"].behaviour.mean(1),
            row["alignment"].difference.mean(1),
            row["helpfulness"].probability.mean(1),
        )
        for row in rows
    ]
    return Control(np.arange(len(rows)), *(np.stack(column) for column in zip(*means, strict=True)))


# the baseline: to ask for the concept outright


def _prompts(
    baseline: Mapping[str, str] | bool, concept: str, model: nn.Module, tasks: Mapping[str, Sequence[Item]]
) -> Mapping[str, str]:
    """System prompts by name; none where nothing could be asked with them.

    Raises:
        ValueError: they were given, and cannot be used.
    """
    if not isinstance(baseline, bool | Mapping):
        raise ValueError(
            f"baseline is system prompts by name, such as {{'honest': '...'}}, or a bool; got {baseline!r:.80}"
        )
    are_chats = not any(isinstance(item.prompt, str) for items in tasks.values() for item in items)
    usable = are_chats and len(tasks) == 2
    if isinstance(baseline, Mapping):
        if baseline and not usable:
            raise ValueError("baseline: system prompts need chats, and helpfulness that is measured here: pass False")
        return baseline
    home = home_of(model)
    return concept_of(concept, home).prompts if baseline and usable and has(concept, home) else {}


def _baseline(
    scorer: Scorer, tokenizer: Any, prompts: Mapping[str, str], tasks: Mapping[str, Sequence[Item]]
) -> Baseline | None:
    """The unsteered model's scores under each system prompt."""
    if not prompts:
        return None
    exams = [
        Exam(tokenizer, {name: [_asked(item, prompt) for item in items] for name, items in tasks.items()})
        for prompt in prompts.values()
    ]
    found = [scorer.log_likelihoods(exam.answers, None, [0.0]).log_p for exam in exams]
    scores = exams[0].table(torch.cat(found))
    return Baseline(tuple(prompts), scores["alignment"], scores["helpfulness"])


def _asked(item: Item, prompt: str) -> Item:
    """The item behind a system prompt, before what its own system message says."""
    chat = [dict(message) for message in item.prompt if not isinstance(message, str)]
    own = chat.pop(0)["content"] if chat[0]["role"] == "system" else ""
    return replace(item, prompt=({"role": "system", "content": f"{prompt} {own}".strip()}, *chat))
