"""The forecast: what writing along a direction would gain and cost at every block, without steering once.

Efficiency, the gain for a square root of the cost, has no unit: it compares blocks, readers and random directions. What
it is made of comes from gradients (`repe.reading.gradients`), and holds for small pushes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repe import display
from repe.data.catalogue import Pairs
from repe.data.items import Item
from repe.display import bar_of
from repe.measuring.chance import DRAWS, ITEMS, Sensitivity
from repe.measuring.costs import costs_at, plain_texts
from repe.measuring.curve import ByValue
from repe.measuring.intervals import Array, Estimate, Measured
from repe.measuring.scoring import TransformersScorer
from repe.measuring.sweep import Exam
from repe.measuring.tasks import Task, asked, texts_of
from repe.models.blocks import find_stack
from repe.models.logits import check_causal
from repe.models.tokens import Text
from repe.reading.aiming import unseen
from repe.reading.dose import TEXTS
from repe.reading.extract import read_poles
from repe.reading.gradients import NotDifferentiableError, efficiency_of_random, fisher, slopes
from repe.reading.placing import spread
from repe.reading.vector import DIVERGENCE, UNUSUAL, ConceptVector
from repe.steering.edit import Edit
from repe.steering.scope import Scope

READERS = ("mean", "pca", "probe")
SMALL = 0.02  # of the norm: a push that is measured where no gradient is there

Weighed = tuple[Tensor, Tensor]
"""How far every item moves, (items, blocks), and the Fisher information, (blocks,), of one direction a block."""


@dataclass(frozen=True, eq=False)
class Forecast(ByValue):
    """What a small strength gains and costs; arrays are (readers, blocks) where nothing else is said.

    They are NaN where there is nothing to steer along, as held-out pairs show no distance between the poles.

    Attributes:
        concept: its name.
        readers: what fitted each direction.
        blocks: their numbers.
        slope: how far the log odds of the aligned answer move, in nats, for one dose: the length at which plain text is
            forecast to diverge by 0.1 nats a token. Backwards they move as far the other way.
        dose: that length, in activation units.
        efficiency, low, high: the slope for a square root of the Fisher information, and its 95% interval over items.
        wrong: the share of items that move the wrong way.
        place: the share of random directions that are less efficient, whichever way they point; NaN, like `random`,
            where the model has no gradient.
        random: (blocks,), the efficiency that 95% of random directions stay below.
        accuracy: held-out pairs that are read rightly, NaN where unknown.
        scope: the tokens that are edited.

    Example:
        >>> found = repe.forecast(model, tokenizer, "honesty", readers="mean", items=12)
        >>> found.is_written, round(float(found.accuracy[0, 3]), 2)
        (True, 1.0)
    """

    concept: str
    readers: tuple[str, ...]
    blocks: tuple[int, ...]
    slope: Array
    dose: Array
    efficiency: Array
    low: Array
    high: Array
    wrong: Array
    place: Array
    random: Array
    accuracy: Array
    scope: str

    @property
    def best(self) -> tuple[str, int]:
        """The reader and the block of the largest efficiency."""
        row, column = np.unravel_index(np.nanargmax(self.efficiency), self.efficiency.shape)
        return self.readers[row], self.blocks[column]

    @property
    def is_written(self) -> bool:
        """Whether the best is clear of 0, and above 95% of the random directions, as far as they are known; else the
        concept is only read."""
        at = np.unravel_index(np.nanargmax(self.efficiency), self.efficiency.shape)
        return bool(self.low[at] > 0 and not self.place[at] < UNUSUAL)

    def at(self, reader: str, block: int) -> Estimate:
        """The efficiency of a reader's direction at a block. Raises ValueError if it is not in the forecast."""
        row, column = self.readers.index(reader), self.blocks.index(block)
        return Estimate(*(float(array[row, column]) for array in (self.efficiency, self.low, self.high)))

    def plot(self, ax: Any = None) -> Any:
        """Draws efficiency by block, with the band of random directions; see `repe.plot.forecast`."""
        from repe.plot import forecast

        return forecast(self, ax)

    def _table(self) -> display.Table:
        reader, block = self.best
        verdict = "" if self.is_written else ": read, and not surely written"
        title = f"{self.concept}, scope {self.scope}: best at block {block}, reader {reader!r}{verdict}"
        row = self.readers.index(reader)
        shown = [
            [
                f"{number}{' ← best' if number == block else ''}", str(self.at(reader, number)),
                f"{self.slope[row, i]:+.2f}", f"{self.wrong[row, i]:.0%}", f"{self.place[row, i]:.1%}",
                f"{self.dose[row, i]:.3g}", f"{self.accuracy[row, i]:.2f}",
            ]
            for i, number in enumerate(self.blocks)
        ]  # fmt: skip
        heads = ["block", "efficiency", "nats a dose", "wrong way", "above random", "dose", "read rightly"]
        return display.table(title, heads, shown)

    def __str__(self) -> str:
        return str(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().html()


def forecast(
    model: nn.Module,
    tokenizer: Any,
    concept: Pairs | ConceptVector | Mapping[str, ConceptVector],
    *,
    readers: str | Sequence[str] = READERS,
    alignment: Task | None = None,
    neutral: Any = "neutral",
    blocks: Any = "all",
    scope: Scope = "all",
    letters: bool = False,
    items: int = ITEMS,
    draws: int = DRAWS,
    seed: int = 0,
    blocks_at: str | None = None,
    progress: bool | None = None,
) -> Forecast:
    """Forecast, for every block and reader, what a strength will gain and cost, from gradients and without steering.

    Args:
        model, tokenizer: neither is changed. What is attached to the model applies.
        concept: a name, the path of a file, pairs, a vector, or several vectors by name.
        readers: what is fitted where pairs are given, as in `repe.extract`.
        alignment, letters: the behaviour items, as in `repe.tradeoff`; the concept's own by default. Those that a
            vector was aimed at (`repe.reading.aimed`) are left out.
        neutral: plain texts, as in `repe.tradeoff`; twenty of them are read, of each the first 64 tokens.
        blocks: at which to fit, where pairs are given.
        scope: the tokens that would be edited, as in `repe.steer`.
        items: how many behaviour items, at most, evenly spread.
        draws: samples a text of what the cost is made of: a dose is known to a share of
            1 / sqrt(2 * texts * draws) at best, and less well where texts differ.
        seed: of the samples and of the random directions.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        progress: show progress bars; None: where a terminal or a notebook shows them.

    Raises:
        ValueError: the concept has no behaviour items and none are given, a model without a next token, a scope that is
            a mask or holds no token that could be edited, or what `repe.extract` raises.
        IndexError: the scope names a position before the start of a prompt.

    Warns:
        UserWarning: the model has no gradient, as with quantised kernels: every block is steered along instead.

    Example:
        >>> found = repe.forecast(model, tokenizer, "honesty", readers="mean", items=12)
        >>> found.best[1] in (2, 3)
        True

    Sources: the quadratic cost, Wolf et al. (arXiv 2401.16332) and Taimeskhanov et al. (arXiv 2602.02712).
    """
    check_causal(model, blocks_at)
    vectors = _vectors(model, tokenizer, concept, readers, blocks, seed, blocks_at, progress)
    first = next(iter(vectors.values()))
    for vector in vectors.values():
        first.check_alike(vector)
    if all((vector.scale <= 0).all() for vector in vectors.values()):
        raise ValueError(
            f"{first.concept}: held-out pairs show no distance between the poles at any block, so there is nothing to "
            "steer along: give more pairs, or others"
        )
    behaviour = first.concept if alignment is None else alignment
    questions = spread(unseen(asked(behaviour, model, letters=letters), *vectors.values()), items)
    stack, texts = find_stack(model, first.stack, blocks_at), texts_of(neutral, model)
    sites = [stack.site(first.site, block) for block in first.blocks]
    scope = Edit.of(first, scope=scope, unit="raw").scope
    try:
        found = Sensitivity.of(
            model, tokenizer, sites, questions, texts, scope, draws=draws, seed=seed, progress=progress
        )
        weighed = {n: (slopes(found.gradients, v.write), fisher(found.samples, v.write)) for n, v in vectors.items()}
        chance = _random(found, seed)
    except NotDifferentiableError as error:
        warnings.warn(f"{error}. Every block is steered along instead, and random directions are not", stacklevel=2)
        scorer = TransformersScorer(model, tokenizer, blocks_at=blocks_at, progress=False)
        weighed = _steered(scorer, vectors, questions, texts[::2][:TEXTS], scope, progress)
        chance = torch.full((1, len(sites)), math.nan, dtype=torch.float64)
    return _forecast(first.concept, vectors, weighed, chance, [item.group for item in questions], repr(scope), seed)


def _vectors(
    model: nn.Module, tokenizer: Any, concept: Any, readers: str | Sequence[str], blocks: Any, seed: int,
    blocks_at: str | None, progress: bool | None,
) -> Mapping[str, ConceptVector]:  # fmt: skip
    if isinstance(concept, ConceptVector):
        return {str(concept.provenance.get("reader", "given")): concept}
    if isinstance(concept, Mapping):
        return concept
    names = [readers] if isinstance(readers, str) else list(readers)
    if not names:
        raise ValueError("readers: name at least one, such as 'mean'")
    poles = read_poles(model, tokenizer, concept, blocks=blocks, seed=seed, blocks_at=blocks_at, progress=progress)
    return {name: poles.fitted(name) for name in names}


def _steered(
    scorer: TransformersScorer,
    vectors: Mapping[str, ConceptVector],
    items: Sequence[Item],
    texts: Sequence[Text],
    scope: Scope,
    progress: bool | None,
) -> dict[str, Weighed]:
    """What a small push of either sign does at every block."""
    exam, plain = Exam(scorer.tokenizer, {"alignment": items}), plain_texts(scorer.tokenizer, texts, scope)
    places = [(name, row) for name, vector in vectors.items() for row in range(len(vector.blocks))]
    moved: dict[str, list[Tensor]] = {name: [] for name in vectors}
    spent: dict[str, list[float]] = {name: [] for name in vectors}
    for name, row in bar_of(places, "forecast by steering", unit="block", progress=progress):
        vector = replace(vectors[name], scale=torch.ones_like(vectors[name].scale))  # whether or not the poles part
        edit = Edit.of(vector, blocks=vector.blocks[row], scope=scope, unit="raw")
        length = SMALL * float(vector.norm[row])
        difference = exam.scores(scorer, edit, [-length, length])["alignment"].difference
        moved[name].append(torch.tensor(difference[1] - difference[0]) / (2 * length))
        kl = costs_at(scorer, plain, edit, [-length, length]).kl
        assert kl is not None
        spent[name].append(2 * float(kl.mean()) / length**2)
    return {name: (torch.stack(moved[name], dim=1), torch.tensor(spent[name])) for name in vectors}


def _forecast(
    concept: str,
    vectors: Mapping[str, ConceptVector],
    weighed: Mapping[str, Weighed],
    chance: Tensor,
    groups: Sequence[str],
    scope: str,
    seed: int,
) -> Forecast:
    rows: dict[str, list[Array]] = {
        name: [] for name in ("slope", "dose", "efficiency", "low", "high", "wrong", "place")
    }
    for moved, information in ((slope.double(), cost.double()) for slope, cost in weighed.values()):
        root, mean = information.sqrt(), moved.mean(0)
        known = Measured(np.arange(len(root)), (moved / root).T.numpy(), groups, seed).estimates()
        rows["efficiency"].append(np.array([estimate.value for estimate in known]))
        rows["low"].append(np.array([estimate.low for estimate in known]))
        rows["high"].append(np.array([estimate.high for estimate in known]))
        rows["dose"].append((np.sqrt(2 * DIVERGENCE) / root).numpy())
        rows["slope"].append((mean / root * np.sqrt(2 * DIVERGENCE)).numpy())
        rows["wrong"].append((moved < 0).double().mean(0).numpy())
        below = (chance < (mean / root).abs()).double().mean(0)
        rows["place"].append(torch.where(chance[0].isnan(), math.nan, below).numpy())
    first = next(iter(vectors.values()))
    unusable = np.stack([(vector.scale <= 0).numpy() for vector in vectors.values()])
    return Forecast(
        concept=concept,
        readers=tuple(vectors),
        blocks=first.blocks,
        random=chance.quantile(UNUSUAL, dim=0).numpy(),
        accuracy=np.stack([vector.accuracy.double().numpy() for vector in vectors.values()]),
        scope=scope,
        **{name: np.where(unusable, math.nan, np.stack(values)) for name, values in rows.items()},
    )


def _random(found: Sensitivity, seed: int) -> Tensor:
    """(random directions, blocks): how efficient they are."""
    generator, gradient = torch.Generator().manual_seed(seed), found.gradients.mean(0)
    sites = range(found.samples.shape[1])
    drawn = [efficiency_of_random(gradient[site], found.samples[:, site], generator) for site in sites]
    return torch.stack(drawn, dim=1).double()
