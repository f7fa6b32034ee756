"""The forecast: what writing along a direction would gain and cost at every block, without steering once.

Efficiency, the gain for a square root of the cost, has no unit: it compares blocks, readers and random directions. What
it is made of comes from gradients (`repe.reading.gradients`), and holds for small pushes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repe import display
from repe.data.catalogue import Pairs
from repe.data.items import Item
from repe.display import bar_of
from repe.measuring.answerable import answerable, not_aimed_at
from repe.measuring.chance import DRAWS, ITEMS, Sensitivity
from repe.measuring.costs import costs_at, plain_texts
from repe.measuring.curve import ByValue, LeftOut
from repe.measuring.intervals import Array, Estimate, Measured
from repe.measuring.scoring import TransformersScorer
from repe.measuring.sweep import Exam
from repe.measuring.tasks import Task, asked, called, texts_of
from repe.models.blocks import find_stack
from repe.models.counts import check_counts
from repe.models.logits import check_causal
from repe.models.tokens import Text
from repe.reading.dose import TEXTS
from repe.reading.extract import read_poles
from repe.reading.gradients import NotDifferentiableError, along_random, information, slopes
from repe.reading.placing import spread
from repe.reading.vector import DIVERGENCE, UNUSUAL, ConceptVector
from repe.steering.edit import Edit
from repe.steering.scope import Scope

READERS = ("mean", "pca", "probe")
SMALL = 0.02  # of the norm: a push that is measured where no gradient is there
RUNS = (1 / 6, 1 / 3, 1.0)  # of the blocks that can be steered along: how many in a row are tried together

Weighed = tuple[Tensor, Tensor]
"""How far every item moves, (items, blocks), and the Fisher information of one direction a block, (blocks, blocks), NaN
off the diagonal where it is not known."""


@dataclass(frozen=True)
class Place:
    """A block, or several in a row that are pushed together, the same part of the way between the poles at each.

    Attributes:
        reader, blocks: which.
        efficiency: nats of log odds for a square root of the Fisher information, with its 95% interval over items.
        slope: nats of log odds for what costs a dose together.
        wrong: the share of items that move the wrong way.
        above: the share of random directions, a different one as long at each of the blocks, that are less efficient.
    """

    reader: str
    blocks: tuple[int, ...]
    efficiency: Estimate
    slope: float
    wrong: float
    above: float

    def __str__(self) -> str:
        first, last = self.blocks[0], self.blocks[-1]
        in_a_row = f"{first} to {last}" if len(self.blocks) > 1 else str(first)
        return in_a_row if last - first < len(self.blocks) else f"{len(self.blocks)} of {in_a_row}"


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
        coherence: (readers, blocks, blocks), as in a `ConceptVector`; NaN where the model has no gradient.
        runs: of every reader, the most efficient of the blocks that can be steered along, so many in a row: a sixth, a
            third, and all.
        left_out: how many behaviour items were not asked, and why.

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
    coherence: Array
    runs: tuple[Place, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

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

    def ranked(self) -> list[tuple[str, tuple[int, ...]]]:
        """Readers and the blocks that they are tried at, one or a run of them, from the most efficient way on."""
        found: dict[tuple[str, tuple[int, ...]], float] = {
            (reader, (block,)): self.at(reader, block).value for reader in self.readers for block in self.blocks
        }
        found |= {(run.reader, run.blocks): run.efficiency.value for run in self.runs}
        return sorted(found, key=lambda place: -abs(np.nan_to_num(found[place])))

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
        shown += [
            [str(run), str(run.efficiency), f"{run.slope:+.2f}", f"{run.wrong:.0%}", f"{run.above:.1%}", "", ""]
            for run in self.runs
            if run.reader == reader
        ]
        heads = ["block", "efficiency", "nats a dose", "wrong way", "above random", "dose", "read rightly"]
        return display.table(title, heads, shown, "\n".join(map(str, self.left_out)))

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
    all_items: bool = False,
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
        alignment, letters, all_items: the behaviour items, as in `repe.tradeoff`; the concept's own by default. Those a
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
            a mask or holds no token that could be edited, nearly all items left out, or what `repe.extract` raises.
        IndexError: the scope names a position before the start of a prompt.

    Warns:
        UserWarning: the model has no gradient, as with quantised kernels: every block is steered along instead.

    Example:
        >>> found = repe.forecast(model, tokenizer, "honesty", readers="mean", items=12)
        >>> found.best[1] in (2, 3)
        True

    Sources: the quadratic cost, Wolf et al. (arXiv 2401.16332) and Taimeskhanov et al. (arXiv 2602.02712).
    """
    check_counts(0, seed=seed)
    check_counts(items=items, draws=draws)
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
    stack, texts = find_stack(model, first.stack, blocks_at), texts_of(neutral, model)
    sites = [stack.site(first.site, block) for block in first.blocks]
    scope = Edit.of(first, scope=scope, unit="raw").scope
    scorer = TransformersScorer(model, tokenizer, blocks_at=blocks_at, progress=False)
    names = {"alignment": called(behaviour, first.concept)}
    tasks = {"alignment": asked(behaviour, model, letters=letters)}
    task, aimed_at = not_aimed_at(tasks, [*vectors.values()], names)
    kept, left_out = (task, ()) if all_items else answerable(scorer, tokenizer, task, scope, names)
    questions = spread(kept["alignment"], items)
    try:
        found = Sensitivity.of(
            model, tokenizer, sites, questions, texts, scope, draws=draws, seed=seed, progress=progress
        )
        weighed = {
            name: (slopes(found.gradients, vector.write), information(found.samples, vector.write))
            for name, vector in vectors.items()
        }
        randoms = Randoms.of(found, seed)
    except NotDifferentiableError as error:
        warnings.warn(f"{error}. Every block is steered along instead, and random directions are not", stacklevel=2)
        weighed, randoms = _steered(scorer, vectors, questions, texts[::2][:TEXTS], scope, progress), None
    weigh = Weigher([item.group for item in questions], randoms, seed)
    single = _forecast(vectors, weighed, weigh, repr(scope))
    return replace(single, runs=_runs(vectors, weighed, weigh) if randoms else (), left_out=aimed_at + left_out)


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
    first = next(iter(vectors.values()))
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
    unknown = math.nan * torch.ones(len(first.blocks), len(first.blocks))
    return {n: (torch.stack(moved[n], dim=1), torch.diagonal_scatter(unknown, torch.tensor(spent[n]))) for n in vectors}


@dataclass(frozen=True, eq=False)
class Randoms:
    """What random directions do: `moved` (directions, blocks) and `costs` (directions, samples, blocks)."""

    moved: Tensor
    costs: Tensor

    @classmethod
    def of(cls, found: Sensitivity, seed: int) -> Randoms:
        generator, gradient = torch.Generator().manual_seed(seed), found.gradients.mean(0)
        sites = range(found.samples.shape[1])
        drawn = [along_random(gradient[site], found.samples[:, site], generator) for site in sites]
        return cls(*(torch.stack(parts, dim=-1) for parts in zip(*drawn, strict=True)))

    def efficiency(self, rows: Sequence[int], lengths: Tensor) -> Tensor:
        """(directions,), whichever way they point, of a different one at each of the blocks."""
        moved, costs = ((of[..., rows].double() @ lengths.double()) for of in (self.moved, self.costs))
        return moved.abs() / costs.square().mean(1).sqrt()


@dataclass(frozen=True, eq=False)
class Weigher:
    """What is made of slopes and costs, where blocks, by their rows, are pushed by lengths in proportion."""

    groups: Sequence[str]
    randoms: Randoms | None
    seed: int

    def of_items(self, vector: ConceptVector, weighed: Weighed, rows: Sequence[int]) -> Tensor:
        """(items,), how far each moves for a square root of the Fisher information."""
        moved, cost = (part.double() for part in weighed)
        lengths = _way(vector, rows)
        return moved[:, rows] @ lengths / (lengths @ cost[rows][:, rows] @ lengths).sqrt()

    def place(self, reader: str, vector: ConceptVector, weighed: Weighed, rows: Sequence[int]) -> Place:
        of_items = self.of_items(vector, weighed, rows)
        (known,) = Measured(np.zeros(1), of_items[None].numpy(), self.groups, self.seed).estimates()
        above = math.nan
        if self.randoms is not None:
            random = self.randoms.efficiency(rows, _way(vector, rows))
            above = float((random < abs(known.value)).double().mean())
        return Place(
            reader,
            tuple(vector.blocks[row] for row in rows),
            known,
            slope=float(of_items.mean()) * math.sqrt(2 * DIVERGENCE),
            wrong=float((of_items < 0).double().mean()),
            above=above,
        )


def _way(vector: ConceptVector, rows: Sequence[int]) -> Tensor:
    """(rows,), what pushes at several blocks are in proportion to."""
    return vector.scale[list(rows)].double().abs() if len(rows) > 1 else torch.ones(1, dtype=torch.double)


def _forecast(
    vectors: Mapping[str, ConceptVector], weighed: Mapping[str, Weighed], weigh: Weigher, scope: str
) -> Forecast:
    """That of single blocks."""
    first, every = next(iter(vectors.values())), range(len(next(iter(vectors.values())).blocks))
    places = [[weigh.place(n, vector, weighed[n], [row]) for row in every] for n, vector in vectors.items()]
    unusable = np.stack([(vector.scale <= 0).numpy() for vector in vectors.values()])
    information = torch.stack([cost.double() for _, cost in weighed.values()])
    root = information.diagonal(dim1=1, dim2=2).sqrt()

    def of_each(fact: Callable[[Place], float]) -> Array:
        return np.where(unusable, math.nan, np.array([[fact(place) for place in row] for row in places]))

    random = [
        weigh.randoms.efficiency([row], torch.ones(1)).quantile(UNUSUAL) if weigh.randoms else math.nan for row in every
    ]
    return Forecast(
        concept=first.concept,
        readers=tuple(vectors),
        blocks=first.blocks,
        slope=of_each(lambda place: place.slope),
        dose=np.where(unusable, math.nan, (math.sqrt(2 * DIVERGENCE) / root).numpy()),
        efficiency=of_each(lambda place: place.efficiency.value),
        low=of_each(lambda place: place.efficiency.low),
        high=of_each(lambda place: place.efficiency.high),
        wrong=of_each(lambda place: place.wrong),
        place=of_each(lambda place: place.above),
        random=np.array(random, dtype=float),
        accuracy=np.stack([vector.accuracy.double().numpy() for vector in vectors.values()]),
        scope=scope,
        coherence=(information / (root[:, None] * root[:, :, None])).numpy(),
    )


def _runs(vectors: Mapping[str, ConceptVector], weighed: Mapping[str, Weighed], weigh: Weigher) -> tuple[Place, ...]:
    """The most efficient blocks in a row, for every reader and length, of those that can be steered along."""
    found = []
    for name, vector in vectors.items():

        def efficiency(rows: Sequence[int], name: str = name, vector: ConceptVector = vector) -> float:
            return abs(np.nan_to_num(float(weigh.of_items(vector, weighed[name], rows).mean())))

        order = sorted(range(len(vector.blocks)), key=vector.blocks.__getitem__)
        usable = [row for row in order if vector.scale[row] > 0]
        for count in sorted({round(share * len(usable)) for share in RUNS} - {0, 1}):
            runs = [usable[first : first + count] for first in range(len(usable) - count + 1)]
            found.append(weigh.place(name, vector, weighed[name], max(runs, key=efficiency)))
    return tuple(found)
