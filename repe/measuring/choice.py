"""The strength to steer with: chosen on one half of the items and tested on the other.

Its loss is what the upper end of an interval says it may be, and so is that of every strength between it and 0: tested
from 0 outwards, up to the first that may cost too much, many strengths are no more likely to break the budget than one.
Of other items than these, it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from repe.measuring.intervals import Array, Estimate, Measured

FEWEST = 4  # clusters of a task: two in either half
SPLITS = 25
NOTHING = Estimate(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Outcome:
    """What a strength gains and loses on some of the items.

    Attributes:
        gain: of behaviour over alpha 0, in the wanted direction; from -2 to 2.
        loss: of helpfulness, as a share of that at alpha 0.
    """

    gain: Estimate
    loss: Estimate

    def __str__(self) -> str:
        return f"gain {self.gain}, loss {self.loss}"


UNCHANGED = Outcome(NOTHING, NOTHING)


@dataclass(frozen=True)
class Choice:
    """The strength to steer with.

    Attributes:
        alpha: the strength; 0, which changes nothing, where none can be recommended.
        budget: the share of helpfulness that it may cost.
        sign: +1 where the concept is wanted more of, -1 where less.
        chosen: its outcome on the items that it was chosen on, and so a flattering one.
        tested: its outcome on the others.
        reason: why no strength is recommended; empty where one is.
    """

    alpha: float
    budget: float
    sign: int
    chosen: Outcome = UNCHANGED
    tested: Outcome = UNCHANGED
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the loss stays within the budget on the items that the strength was not chosen on."""
        return self.tested.loss.value <= self.budget

    def __str__(self) -> str:
        if self.reason:
            return f"alpha 0: {self.reason}"
        return f"alpha {self.alpha:g} for a loss of at most {self.budget:.3g}: {self.tested} on items not chosen on"


@dataclass(frozen=True)
class Rehearsal:
    """A choice made again and again, each time on another random half of the items."""

    choices: tuple[Choice, ...]

    @cached_property
    def made(self) -> tuple[Choice, ...]:
        """Those that recommend a strength."""
        return tuple(choice for choice in self.choices if not choice.reason)

    @property
    def refused(self) -> float:
        """Share of the splits on which no strength could be recommended."""
        return 1 - len(self.made) / len(self.choices)

    @property
    def broken(self) -> float:
        """Share of the splits on whose other half the budget is broken; where alpha is 0, it is not."""
        return sum(not choice.kept for choice in self.choices) / len(self.choices)

    def __str__(self) -> str:
        told = f"{len(self.choices)} splits: no strength on {self.refused:.1%}"
        if not self.made:
            return told
        low, middle, high = np.quantile([choice.alpha for choice in self.made], [0.05, 0.5, 0.95])
        told += f", else alpha {middle:g} (90% from {low:g} to {high:g})"
        return f"{told}; the budget is broken on {self.broken:.1%}"


@dataclass(frozen=True, eq=False)
class Trade:
    """What a strength is chosen by.

    Attributes:
        behaviour: of the alignment task's items.
        helpfulness: P(right) of the helpfulness task's items.
        difference: the logit difference of the alignment task's items.
        chance: (alphas,), how far 95% of random directions move its mean; None where that is not known.
        blind: why a loss of helpfulness could not be seen, and nothing can be chosen; empty where it could.
    """

    behaviour: Measured
    helpfulness: Measured
    difference: Measured
    chance: Array | None = None
    blind: str = ""

    def choose(
        self, budget: float = 0.05, *, sign: int | None = 1, generator: np.random.Generator | None = None
    ) -> Choice:
        """Choose the strength with the largest gain of behaviour whose loss of helpfulness stays within a budget.

        A gain counts where the logit difference surely moves the same way: where its interval is clear of 0, and it
        moves further than along 95% of the random directions. Probabilities near 0 or 1 hide what their logits show.
        A random half of the clusters of either task chooses, the other half tests; a cluster that both tasks share goes
        to one half. What counts against the budget is the upper end of the loss's 95% interval.

        Args:
            budget: the largest loss `1 - H / H0` allowed, at least 0 and below 1.
            sign: +1 to have more of the concept, -1 to have less of it, None for whichever goes further.
            generator: of the split; that of the resampling's seed by default.

        Raises:
            ValueError: another budget or sign.
        """
        if not 0 <= budget < 1:
            raise ValueError(f"the budget is a share of helpfulness, at least 0 and below 1; got {budget}")
        if sign not in (1, -1, None):
            raise ValueError(f"sign is +1 for more of the concept, -1 for less or None for either; got {sign}")
        for name in ("behaviour", "helpfulness"):
            if (count := len(set(getattr(self, name).clusters))) < FEWEST:
                few = f"the items of {name} are of {count} clusters, too few to choose and test: {FEWEST}"
                return Choice(0.0, budget, sign or 1, reason=few)
        if self.blind:
            return Choice(0.0, budget, sign or 1, reason=self.blind)
        (gains, losses, moved), (other_gains, other_losses, _) = self._halves(generator)
        alphas, expected, sure = gains.alphas, losses.estimates(), self._surely(gains, moved)
        wish = np.where(sure, np.abs(gains.mean) if sign is None else sign * gains.mean, 0)
        usable = (wish > 0) & affordable(alphas, np.array([loss.high <= budget for loss in expected]))
        if not usable.any():
            return Choice(0.0, budget, sign or 1, reason=_why(alphas, wish, expected, budget))
        best = int(np.where(usable, wish, 0).argmax())
        wanted = sign or int(np.sign(gains.mean[best]))
        chosen = _outcome(gains, losses, best, wanted)
        return Choice(float(alphas[best]), budget, wanted, chosen, _outcome(other_gains, other_losses, best, wanted))

    def settle(self, budget: float = 0.05, *, sign: int | None = 1, splits: int = SPLITS) -> Choice:
        """Choose on many random splits, and keep the choice in the middle: what one split finds may be its luck.

        It is the first of those with the median alpha, of two with that nearer to 0.

        Raises:
            ValueError: no splits, or what `choose` raises.
        """
        choices = self.rehearse(splits, budget, sign=sign).choices
        ranked = sorted(choices, key=lambda choice: abs(choice.alpha))
        return next(choice for choice in choices if choice.alpha == ranked[(splits - 1) // 2].alpha)

    def rehearse(self, splits: int = 200, budget: float = 0.05, *, sign: int | None = 1) -> Rehearsal:
        """Choose on many random splits: how far the strength depends on the split, and how often its budget is broken.

        Raises:
            ValueError: no splits, or what `choose` raises.
        """
        if splits < 1:
            raise ValueError(f"a rehearsal needs at least one split, got {splits}")
        generator = np.random.default_rng(self.behaviour.seed)
        return Rehearsal(tuple(self.choose(budget, sign=sign, generator=generator) for _ in range(splits)))

    def _halves(self, generator: np.random.Generator | None) -> list[tuple[Measured, Measured, Measured]]:
        """Gains of behaviour, losses of helpfulness, and how far the logits move, on either half of the items."""
        generator = np.random.default_rng(self.behaviour.seed) if generator is None else generator
        names = [np.array(measured.clusters) for measured in (self.behaviour, self.helpfulness)]
        first = first_half(set(names[0]), set(names[1]), generator)
        asked, tried = (np.isin(clusters, first) for clusters in names)
        halves = ((asked, tried), (~asked, ~tried))
        return [(self.behaviour.of(a).gain, self.helpfulness.of(t).loss, self.difference.of(a).gain) for a, t in halves]

    def _surely(self, gains: Measured, moved: Measured) -> Array:
        """Where the logits move as behaviour does, more than chance allows in items and in directions."""
        sure = np.array([gain.low > 0 or gain.high < 0 for gain in moved.estimates()])
        sure &= np.sign(moved.mean) == np.sign(gains.mean)
        return sure if self.chance is None else sure & (np.abs(moved.mean) > self.chance)


def first_half(one: set[str], other: set[str], generator: np.random.Generator) -> list[str]:
    """Draw half of the clusters that both tasks share, and half of those that only one has."""
    drawn: list[str] = []
    for stratum, odd in ((one & other, 1), (one - other, 0), (other - one, 0)):
        drawn += generator.permutation(sorted(stratum))[: (len(stratum) + odd) // 2].tolist()
    return drawn


def affordable(alphas: Array, cheap: Array) -> Array:
    """Mark the alphas that are cheap enough together with every one between them and 0."""
    dear = alphas[~cheap]
    return (alphas > dear[dear <= 0].max(initial=-np.inf)) & (alphas < dear[dear >= 0].min(initial=np.inf))


def _outcome(gains: Measured, losses: Measured, row: int, sign: int) -> Outcome:
    return Outcome(gains.estimates(sign * gains.values[[row]])[0], losses.estimates(losses.values[[row]])[0])


def _why(alphas: Array, gain: Array, losses: list[Estimate], budget: float) -> str:
    gaining = np.flatnonzero(gain > 0)
    if not gaining.size:
        return "no alpha on the grid surely gains anything in the wanted direction, and more than random directions do"
    cheapest = min(gaining, key=lambda i: losses[i].high)
    loss = losses[cheapest]
    return (
        f"no alpha that gains is sure to stay within a loss of {budget:.3g}, all between it and 0 included: "
        f"the cheapest, alpha {alphas[cheapest]:g}, loses {loss.value:.3g} (at most {loss.high:.3g})"
    )
