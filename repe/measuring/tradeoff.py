"""The trade-off: a concept, and what it is measured on, to the curve of what a strength gains and costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from repe.data.catalogue import concept_of, has
from repe.data.items import Item
from repe.display import about, bar_of, is_wanted, say
from repe.measuring.answerable import answerable, not_aimed_at
from repe.measuring.chance import DRAWS, ITEMS, Chance, chance_of
from repe.measuring.costs import costs_at, plain_texts
from repe.measuring.curve import Baseline, Control, Costs, Scores, TradeoffCurve
from repe.measuring.fanout import BATCH_TOKENS
from repe.measuring.record import name_of
from repe.measuring.scoring import Scorer, TransformersScorer, strengths_of
from repe.measuring.side_effects import Requests, requests_of, side_effects_at
from repe.measuring.sweep import Exam
from repe.measuring.tasks import Task, asked, called, texts_of
from repe.models.blocks import find_stack
from repe.models.counts import check_counts
from repe.models.fingerprint import fingerprint
from repe.models.load import home_of
from repe.models.tokens import Text
from repe.reading.extract import name_of as name_of_model
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.steer import edit_of

STEPS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
ALPHAS = (*(-step for step in reversed(STEPS)), 0.0, *STEPS)
"""Up to where plain text is expected to diverge by 0.4 nats a token."""
CONTROLS, STEERED = 20, 4
"""Random directions that are steered along; the fewer, as many as an interval needs, where many are forecast."""
PROVENANCE = ("reader", "pairs", "held_out_pairs", "pairs_digest")  # of the vector, what a curve keeps


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
    letters: bool = False,
    all_items: bool = False,
    requests: Requests = "requests",
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
        controls: how many random directions are steered along; 4 by default where what 1,000 of them do to behaviour
            can be forecast from gradients, else 20. They are as long as costs what the concept costs, as far as that is
            forecast. An edit without a length, along several vectors, or with helpfulness measured elsewhere, has no
            such control.
        baseline: system prompts by name, to compare with; True for those of the concept, where it has them and all
            items are chats.
        letters: leave items that ask for an option's letter as they are; by default they are asked in words, as small
            models bind no letters.
        all_items: measure also on items that tell nothing, which are left out by default, and counted: those that ask
            for a letter, and of which the unsteered model does not find the same text the likeliest wherever the
            options' texts stand; and those that the scope holds no token of behind which an option is predicted. Items
            of either task that the vector was aimed at (`repe.reading.aimed`) are left out in any case.
        requests: pairs of harmful and harmless requests, as in `repe.measuring.side_effects`, which are answered at the
            strength that is recommended, or near 1 where none is; None for none.
        batch_tokens, resume, blocks_at, progress, options: as in `repe.measuring.sweep`.

    Returns:
        The curve: `.fits`, `.best()`, `.plot()`, `.save(path)`.

    Raises:
        ValueError: a task is not known or malformed, or nearly all of its items were left out; or what
            `repe.measuring.sweep` raises.

    Example:
        >>> facts, skills = (repe.measuring.items_of(name, model)[:40] for name in ("honesty", "skills"))
        >>> measured_on = {"alignment": facts, "helpfulness": skills}
        >>> curve = repe.tradeoff(model, tokenizer, "honesty", [-1, 1], **measured_on, controls=2)
        >>> curve.alphas.tolist()
        [-1.0, 0.0, 1.0]

    Sources: Wolf et al. (arXiv 2401.16332); the control, and a strength chosen on one half of the items and reported on
    the other, as in AxBench (Wu et al., arXiv 2501.17148).
    """
    check_counts(0, controls=controls)
    strengths = strengths_of([0.0, *strengths_of(alphas)])
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    placement = edit.on(find_stack(model, edit.stack, blocks_at))
    given = {"alignment": edit.name if alignment is None else alignment, "helpfulness": helpfulness}
    here = {name: task for name, task in given.items() if not isinstance(task, Scores)}
    tasks: Mapping[str, Sequence[Item]] = {name: asked(task, model, letters=letters) for name, task in here.items()}
    names = {"alignment": called(alignment, edit.name), "helpfulness": called(helpfulness, "helpfulness")}
    tasks, aimed_at = not_aimed_at(tasks, edit.vectors, names)
    if isinstance(helpfulness, Scores) and len(helpfulness.log_likelihoods) != len(strengths):
        raise ValueError(
            f"`helpfulness` was measured at {len(helpfulness.log_likelihoods)} alphas, and these are {strengths}, 0 "
            "among them"
        )
    pairs = requests_of(requests, model)
    texts, prompts = texts_of(neutral, model), _prompts(baseline, edit.name, model, tasks)
    randoms = _randoms(edit, controls, tasks)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens, resume=resume, progress=progress
    )
    is_new = not scorer.record.is_begun
    kept, left_out = (tasks, ()) if all_items else answerable(scorer, tokenizer, tasks, edit.scope, names)
    exam = Exam(tokenizer, kept)
    chance = _chance(scorer, exam, edit, randoms, texts or texts_of("neutral", model))
    if chance is not None and controls is None:
        randoms = randoms[:STEERED]
    if is_new:
        _say_how_long(scorer, exam, edit, (1 + len(randoms)) * len(strengths))
    spent = costs_at(scorer, plain_texts(tokenizer, texts, edit.scope), edit, strengths) if texts else Costs()
    measured = exam.scores(scorer, edit, strengths)
    if isinstance(helpfulness, Scores):
        measured["helpfulness"] = helpfulness
    curve = TradeoffCurve(
        concept=edit.name,
        alphas=np.array(strengths),
        alignment=replace(measured["alignment"], name=names["alignment"]),
        helpfulness=replace(measured["helpfulness"], name=names["helpfulness"]),
        costs=spent,
        control=_control(exam, scorer, edit, strengths, randoms, chance, progress),
        baseline=_baseline(scorer, tokenizer, prompts, kept),
        left_out=aimed_at + left_out,
        provenance={
            "model": name_of_model(model),
            "fingerprint": fingerprint(model),
            "vector": {key: edit.vectors[0].provenance.get(key) for key in PROVENANCE} if edit.vectors else {},
            "edit": edit.kind,
            "unit": edit.unit,
            "site": edit.site,
            "blocks": list(placement.blocks),
            "scope": repr(edit.scope),
            "baseline": dict(prompts),
            "controls": len(randoms),
            "forecast": chance is not None,
            "worded": not letters,
            "date": datetime.now(UTC).date().isoformat(),
        },
    )
    if not pairs:
        return curve
    at = curve.best().alpha or min(
        (alpha for alpha in strengths if alpha), key=lambda alpha: abs(alpha - 1), default=0.0
    )
    return replace(curve, side_effects=side_effects_at(scorer, edit, [at], pairs))


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
    if controls and why_not:
        raise ValueError(f"controls={controls}: {why_not}")
    if why_not:
        return []
    (vector,) = edit.vectors
    drawn = [ConceptVector.random(vector, seed) for seed in range(CONTROLS if controls is None else controls)]
    return [replace(random, sigma=vector.sigma, norm=vector.norm) for random in drawn]


def _say_how_long(scorer: TransformersScorer, exam: Exam, edit: Edit, rows: int) -> None:
    """Tells what is to come, by the time that one strength takes."""
    if not is_wanted(scorer.progress):
        return
    started = perf_counter()
    exam.scores(scorer, edit, [0.0])
    taken = rows * (perf_counter() - started)
    say(f"items at {rows} strengths, random directions included: {about(taken)}", progress=scorer.progress)


def _chance(
    scorer: TransformersScorer, exam: Exam, edit: Edit, randoms: Sequence[ConceptVector], texts: Sequence[Text]
) -> Chance | None:
    """What random directions are forecast to do, from the scorer's record where it is there."""
    if not randoms:
        return None
    asked_of = [[item.answer, len(item.options)] for item in exam.tasks["alignment"]]
    answers = [[answer.ids, answer.begins] for answer in exam.answers]
    name = name_of([asked_of, answers, [*texts], len(randoms), ITEMS, DRAWS])
    page = scorer.record.page("chance", edit)
    (known,) = page.known([name], lambda _, value: isinstance(value, list) and len(value) == 2)
    if known:
        slopes, lengths = known[0.0]
        return Chance(torch.tensor(slopes), lengths)
    items, blocks_at = exam.tasks["alignment"], scorer.blocks_at
    found = chance_of(
        scorer.model, scorer.tokenizer, edit, randoms, items, texts, blocks_at=blocks_at, progress=scorer.progress
    )
    if found is not None:
        page.add([(name, [0.0], [[found.slopes.tolist(), [*found.lengths]]])])
    return found


def _control(
    exam: Exam,
    scorer: Scorer,
    edit: Edit,
    strengths: Sequence[float],
    randoms: Sequence[ConceptVector],
    chance: Chance | None,
    progress: bool | None,
) -> Control | None:
    if not randoms:
        return None
    lengths = [1.0] * len(randoms) if chance is None else chance.lengths[: len(randoms)]
    pairs = [*zip(randoms, lengths, strict=True)]
    rows = [
        exam.scores(scorer, edit.along(random), [length * alpha for alpha in strengths])
        for random, length in bar_of(pairs, "random directions", unit="direction", progress=progress)
    ]
    behaviour, difference = (
        np.stack([getattr(row["alignment"], name).mean(1) for row in rows]) for name in ("behaviour", "difference")
    )
    helpfulness = np.stack([row["helpfulness"].probability.mean(1) for row in rows])
    slopes = None if chance is None else chance.slopes.double().numpy()
    return Control(np.arange(len(rows)), behaviour, difference, helpfulness, np.array(lengths), slopes)


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
