"""Calibration: reader, block and alpha chosen together, by what steering does and not by what a probe reads.

A block where a concept is read perfectly can be one where writing it does nothing. So the readers and blocks that are
forecast to be the most efficient are tried out: steered as far as the divergence on neutral texts allows, and judged by
how far behaviour moves on validation items within the budget. What is chosen is then reported on test items that had no
part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from textwrap import indent
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from repe.data.answers import Answer
from repe.data.catalogue import Pairs, concept_of
from repe.data.items import Item, RequestPair
from repe.display import bar_of
from repe.measuring.answerable import answerable
from repe.measuring.choice import UNCHANGED, Outcome, affordable, first_half
from repe.measuring.costs import costs_at, plain_texts
from repe.measuring.curve import LeftOut, SideEffects
from repe.measuring.fanout import BATCH_TOKENS
from repe.measuring.forecast import READERS, forecast
from repe.measuring.intervals import FEWEST_CLUSTERS, Array, Measured, clusters_of
from repe.measuring.scoring import TransformersScorer
from repe.measuring.side_effects import Requests, requests_of, side_effects_at
from repe.measuring.sweep import Exam
from repe.measuring.tasks import Task, asked, called, texts_of
from repe.models.blocks import find_stack
from repe.models.counts import check_counts
from repe.models.load import home_of
from repe.reading.dose import dose_of, short_texts
from repe.reading.extract import read_poles
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.gate import Decision, Gate, earliest
from repe.steering.scope import check_scope
from repe.steering.steer import edit_of

TRIED = 3
STEPS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # of the farthest alpha: what is tried out at a block
NEAREST, FARTHEST = 2.0**-6, 2.0**6  # alphas between which the limit is looked for
BEGIN = 0.5  # doses: from where on, where they are known
PRECISE = 0.1  # of alpha
SMALLEST = NEAREST * PRECISE  # what moves that much for less is rounding
PER_ROUND = 7  # alphas that are tried at once: the interval shrinks to an eighth
TEXTS = 24  # neutral ones, for the limit is looked for at every block

Tasks = tuple[Sequence[Item], Sequence[Item]]


@dataclass(frozen=True)
class Trial:
    """One reader at a block, or at several in a row together, steered in one direction on validation items.

    Attributes:
        reader, blocks: which.
        farthest: the alpha, with its sign, at which the 95th percentile of a token's divergence reaches the limit.
        alpha: that of the steps up to there that gained most within the budget; 0 if none did.
        validation: what it gained and lost on validation items.
        accuracy: held-out pairs that are ordered rightly there, the mean over the blocks.
        reason: why it was not tried, or nothing was chosen; else empty.
    """

    reader: str
    blocks: tuple[int, ...]
    farthest: float = 0.0
    alpha: float = 0.0
    validation: Outcome = UNCHANGED
    accuracy: float = 0.0
    reason: str = ""

    @property
    def where(self) -> str:
        """The block, or the first and the last of several, in words."""
        first, last, count = self.blocks[0], self.blocks[-1], len(self.blocks)
        if count == 1:
            return f"block {first}"
        return f"blocks {first} to {last}" if last - first < count else f"{count} blocks from {first} to {last}"


@dataclass(frozen=True)
class Setting:
    """What to steer with in one direction, and what it does on test items.

    Attributes:
        sign: +1 for more of the concept, -1 for less.
        vector: the chosen reader's, which recommends the chosen block or blocks.
        trial: how it was chosen; its alpha is 0 where nothing could be.
        test: what it gains and loses on items that had no part in the choice.
        trials: all that was tried.
        side_effects: what steering with it does to refusing; None where nothing could be chosen, or no requests given.
    """

    sign: int
    vector: ConceptVector
    trial: Trial
    test: Outcome
    trials: tuple[Trial, ...] = field(repr=False)
    side_effects: SideEffects | None = None

    @property
    def alpha(self) -> float:
        return self.trial.alpha

    def __str__(self) -> str:
        if not self.alpha:
            return f"nothing to steer with: {self.trial.reason}"
        where = f"{self.trial.where}, reader {self.trial.reader!r}"
        told = f"alpha {self.alpha:+.3g} at {where}: {self.test} on test items"
        return told if self.side_effects is None else f"{told}\n{indent(str(self.side_effects), '    ')}"


@dataclass(frozen=True)
class Calibration:
    """The settings for more and for less of a concept, under a limit of the divergence and a budget of helpfulness.

    `left_out` says how many items of the tasks were not measured on, and why.
    """

    concept: str
    limit: float
    budget: float
    more: Setting
    less: Setting
    left_out: tuple[LeftOut, ...] = ()

    def __str__(self) -> str:
        head = f"{self.concept}, at most {self.limit:g} nats a token and {self.budget:.0%} of helpfulness"
        return "\n  ".join([head, f"more: {self.more}", f"less: {self.less}", *map(str, self.left_out)])

    __repr__ = __str__


@spells_options
def calibrate(
    model: nn.Module,
    tokenizer: Any,
    concept: Pairs,
    *,
    readers: str | Sequence[str] = READERS,
    tried: int | None = TRIED,
    alignment: Task | None = None,
    helpfulness: Task = "skills",
    neutral: Any = "neutral",
    limit: float = 1.0,
    budget: float = 0.05,
    seed: int = 0,
    letters: bool = False,
    all_items: bool = False,
    requests: Requests = "requests",
    batch_tokens: int = BATCH_TOKENS,
    blocks_at: str | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> Calibration:
    """Choose reader, block and alpha for more and for less of a concept.

    Args:
        model, tokenizer: neither is changed.
        concept: as in `repe.extract`.
        readers: that are compared, as in `repe.extract`.
        tried: how many ways are steered along, a reader at a block or at several in a row: those that `repe.forecast`
            finds most efficient; None for every reader at every single block.
        alignment, helpfulness, neutral, letters, all_items: what is measured on, as in `repe.tradeoff`.
        limit: of the 95th percentile of a token's divergence from the unsteered model on neutral texts, in nats.
        budget: of helpfulness that may be lost, by the upper end of the interval.
        seed: of the split of both tasks into validation and test halves; what shares a group stays together.
        requests: of which the side effects of what was chosen are told, as in `repe.tradeoff`.
        batch_tokens, blocks_at, progress: as in `repe.measuring.sweep`.
        options: of the edit, as in `repe.steer`; `blocks` are those that are compared, all by default.

    Raises:
        TypeError: a vector is given, where readers are compared.
        ValueError: as `repe.extract`, `repe.measuring.sweep` and `repe.measuring.costs` raise it, or a limit or budget
            that is not positive.

    Example:
        >>> found = repe.calibrate(model, tokenizer, "honesty", readers="mean", blocks=3)
        >>> found.more.trial.blocks, found.more.alpha > 0
        ((3,), True)

    Sources: blocks by what writing there does, as Arditi et al. (arXiv 2406.11717) choose theirs; the divergence as the
    common measure of strength, as Tan et al. (arXiv 2407.12404).
    """
    if isinstance(concept, ConceptVector):
        raise TypeError(
            "got a vector, and calibration fits one for every reader: give the concept's name, file or pairs, or "
            "measure the vector with `repe.tradeoff`"
        )
    readers = [readers] if isinstance(readers, str) else list(readers)
    if not readers:
        raise ValueError("readers: name at least one, such as 'mean'")
    check_counts(0, seed=seed)
    check_counts(tried=tried, batch_tokens=batch_tokens)
    if not (limit > 0 and budget > 0):
        raise ValueError(f"limit (nats) and budget (a share) are positive, got {limit} and {budget}")
    source = concept_of(concept, home_of(model))
    behaviour = source.name if alignment is None else alignment
    given = {"alignment": behaviour, "helpfulness": helpfulness}
    tasks: Mapping[str, Sequence[Item]] = {name: asked(task, model, letters=letters) for name, task in given.items()}
    texts, pairs = list(texts_of(neutral, model))[:TEXTS], requests_of(requests, model)
    if not texts:
        raise ValueError("calibration needs neutral texts, on which the divergence is limited: got none")
    chosen = options.pop("blocks", "all")
    blocks = "all" if isinstance(chosen, str) and chosen == "auto" else chosen
    site, stack = options.get("site") or "block", options.get("stack") or "decoder"
    scorer = TransformersScorer(model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens)
    scope = check_scope(options.get("scope", "all"))
    names = {"alignment": called(behaviour, source.name), "helpfulness": called(helpfulness, "helpfulness")}
    tasks, left_out = (tasks, ()) if all_items else answerable(scorer, tokenizer, tasks, scope, names)
    halved = halves(tasks["alignment"], tasks["helpfulness"], seed)
    poles = read_poles(
        model, tokenizer, source, blocks=blocks, site=site, stack=stack, blocks_at=blocks_at, progress=progress
    )
    vectors = _placed(
        model, tokenizer, {name: poles.fitted(name) for name in readers}, tried, options.get("gate"),
        alignment=halved[0][0], neutral=texts, scope=scope, letters=letters, all_items=True, seed=seed,
        blocks_at=blocks_at, progress=progress,
    )  # fmt: skip
    edits = [edit_of(model, vector, **options) for vector in vectors]
    search = Search(scorer, plain_texts(tokenizer, texts, edits[0].scope), limit, budget, seed)
    first, second = (Exam(tokenizer, dict(zip(("alignment", "helpfulness"), half, strict=True))) for half in halved)
    with bar_of(total=2 * len(edits), desc="calibrate", progress=progress) as bar:
        more, less = (search.setting(edits, first, second, sign, bar) for sign in (1, -1))
    if pairs:
        more, less = (search.with_side_effects(setting, pairs, **options) for setting in (more, less))
    return Calibration(source.name, limit, budget, more, less, left_out)


def _placed(
    model: nn.Module,
    tokenizer: Any,
    vectors: Mapping[str, ConceptVector],
    tried: int | None,
    gate: Gate | Decision | None = None,
    **how: Any,
) -> list[ConceptVector]:
    """The vectors that are tried out, each with its dose measured where it recommends to be steered along.

    That is nowhere before a gate, which would judge what it steered.
    """
    first = next(iter(vectors.values()))
    stack, texts = find_stack(model, first.stack, how["blocks_at"]), short_texts(model, tokenizer)
    begin = 0
    if isinstance(gate, Gate):
        begin = earliest(gate.fitted(first.d_model, stack.n_blocks, first.stack).at, first.site)
    if begin > max(first.blocks):
        raise ValueError(f"{gate} reads behind every block that could be steered at, of {list(first.blocks)}")
    found = forecast(model, tokenizer, vectors, **how)
    singles = [(name, (block,)) for name, vector in vectors.items() for block in vector.blocks]
    places = [(name, blocks) for name, blocks in (singles if tried is None else found.ranked()) if min(blocks) >= begin]
    sites = [stack.site(first.site, block) for block in first.blocks]
    known = {
        name: replace(vectors[name], dose=torch.tensor(dose).float(), coherence=torch.tensor(coherence).float())
        for name, dose, coherence in zip(
            found.readers, np.nan_to_num(found.dose, nan=np.nan, posinf=np.nan), found.coherence, strict=True
        )
    }
    guessed = [replace(known[name], recommended=blocks) for name, blocks in places[:tried]]
    return [dose_of(model, sites, texts, vector, progress=how["progress"]) for vector in guessed]


@dataclass(frozen=True)
class Search:
    """What every reader and block is tried out with: `texts` are the neutral ones."""

    scorer: TransformersScorer
    texts: Sequence[Answer]
    limit: float
    budget: float
    seed: int

    def setting(self, edits: Sequence[Edit], first: Exam, second: Exam, sign: int, bar: Any) -> Setting:
        """The best of all trials on the first half of the items, tested on the second."""
        trials = []
        for edit in edits:
            trials.append(self.trial(edit, first, sign))
            bar.update()
        best, edit = max(zip(trials, edits, strict=True), key=lambda tried: tried[0].validation.gain.value)
        if not best.alpha:
            return Setting(sign, edit.vectors[0], best, UNCHANGED, tuple(trials))
        alphas, gain, loss = self.measured(edit, [best.alpha], second, sign)
        row = int(np.flatnonzero(alphas)[0])
        test = Outcome(gain.estimates()[row], loss.estimates()[row])
        return Setting(sign, edit.vectors[0], best, test, tuple(trials))

    def with_side_effects(
        self, setting: Setting, pairs: Sequence[RequestPair], **options: Unpack[EditOptions]
    ) -> Setting:
        """The setting with what steering as it says does to refusing."""
        if not setting.alpha:
            return setting
        edit = Edit.of(setting.vector, **options)
        return replace(setting, side_effects=side_effects_at(self.scorer, edit, [setting.alpha], pairs))

    def trial(self, edit: Edit, exam: Exam, sign: int) -> Trial:
        """The edit, where its vector recommends, as far as the limit allows."""
        (vector,) = edit.vectors
        rows = [vector.row(block) for block in vector.recommended]
        reader, accuracy = str(vector.provenance["reader"]), float(vector.accuracy[rows].mean())
        untried = Trial(reader, vector.recommended, accuracy=accuracy)
        if (vector.scale[rows] <= 0).any():
            return replace(untried, reason="held-out pairs show no distance between the poles there")
        if edit.has_length and edit.unit == "kl" and vector.dose[rows].isnan().any():
            return replace(untried, reason="; ".join(vector.provenance["dose"]["unknown"].values()))
        farthest = self.farthest(edit, sign)
        if not farthest:
            return replace(untried, reason=f"the limit, {self.limit:g} nats, is passed by every alpha above {SMALLEST}")
        alphas, gains, losses = self.measured(edit, [step * farthest for step in STEPS], exam, sign)
        loss = losses.estimates()
        usable = affordable(alphas, np.array([estimate.high <= self.budget for estimate in loss]))
        usable &= [gain.low > 0 for gain in gains.estimates()]
        if not usable.any():
            reason = f"no alpha up to {farthest:+.3g} gains anything within the budget"
            return replace(untried, farthest=farthest, reason=reason)
        best = int(np.flatnonzero(usable)[gains.mean[usable].argmax()])
        outcome = Outcome(gains.estimates()[best], loss[best])
        return replace(untried, farthest=farthest, alpha=float(alphas[best]), validation=outcome)

    def farthest(self, edit: Edit, sign: int) -> float:
        """The alpha at which the divergence reaches the limit, by bisection, or `FARTHEST` if it never does."""
        doses = edit.on(find_stack(self.scorer.model, edit.stack, self.scorer.blocks_at)).doses
        low, high = 0.0, BEGIN / doses if math.isfinite(doses) and doses > 0 else NEAREST
        while high < FARTHEST and self.divergence(edit, [sign * high])[0] <= self.limit:
            low, high = high, 2 * high
        while high - low > PRECISE * high and high > SMALLEST:
            between = np.linspace(low, high, PER_ROUND + 2)[1:-1]
            over = self.divergence(edit, (sign * between).tolist()) > self.limit
            reached = int(over.argmax()) if over.any() else len(between)
            low, high = [low, *between][reached], [*between, high][reached]
        return sign * float(low)

    def divergence(self, edit: Edit, alphas: Sequence[float]) -> Array:
        """(alphas,), the 95th percentile of a token's divergence."""
        found = costs_at(self.scorer, self.texts, edit, alphas).kl_p95
        assert found is not None
        return found

    def measured(self, edit: Edit, alphas: Sequence[float], exam: Exam, sign: int) -> tuple[Array, Measured, Measured]:
        """The alphas with 0, the gains of behaviour in the wanted direction, and the losses of helpfulness."""
        grid = np.sort([0.0, *alphas])
        scores = exam.scores(self.scorer, edit, grid.tolist())
        behaviour, right = scores["alignment"], scores["helpfulness"]
        gains = sign * (behaviour.behaviour - behaviour.behaviour[grid == 0])
        return (
            grid,
            Measured(grid, gains, behaviour.groups, self.seed),
            Measured(grid, right.probability, right.groups, self.seed).loss,
        )


def halves(aligned: Sequence[Item], helpful: Sequence[Item], seed: int) -> tuple[Tasks, Tasks]:
    """Both tasks in two halves; items that share a group stay together, in both tasks alike."""
    clusters = [clusters_of([item.group for item in items]) for items in (aligned, helpful)]
    first = {*first_half({*clusters[0]}, {*clusters[1]}, np.random.default_rng(seed))}
    sides = [
        [[item for item, c in zip(items, names, strict=True) if (c in first) == here] for here in (True, False)]
        for items, names in zip((aligned, helpful), clusters, strict=True)
    ]
    if any(len({item.group or id(item) for item in part}) < FEWEST_CLUSTERS for side in sides for part in side):
        raise ValueError(
            f"both tasks need items of at least {2 * FEWEST_CLUSTERS} groups: one half chooses, and the other tests"
        )
    return (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])
