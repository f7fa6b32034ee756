"""What a trade-off curve is asked: all fits in one report, and which strength to steer with.

The strength is chosen on one half of the items and tested on the other. Its loss is what the upper end of an interval
says it may be, and so is that of every strength between it and 0: tested from 0 outwards, up to the first that may cost
too much, many strengths are no more likely to break the budget than one. Of other items than these, it says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from repe.measuring.fits import (
    Array,
    Estimate,
    Fit,
    Measured,
    clusters_of,
    fit_bell,
    fit_growth,
    fit_kl,
    fit_line,
    fit_normality,
    fit_quadratics,
    fit_tanh,
)

if TYPE_CHECKING:
    from repe.measuring.curve import TradeoffCurve
    from repe.measuring.scores import Control

FEWEST = 4  # clusters of a task: two in either half
NOTHING = Estimate(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Fits:
    """Every fit of a curve; print it for a report.

    Attributes:
        line: the logit difference of the behaviour items near alpha 0.
        behaviour: tanh over the whole grid.
        helpfulness, log_helpfulness: quadratics near alpha 0, of P(right) and of its logarithm.
        bell: helpfulness over the whole grid.
        kl: the power of |alpha| that the KL divergence grows with.
        change: growth of the last hidden state's change.
        normality: spread of the helpfulness items' logit differences.
        steerability: the concept's slope against those of random directions.
    """

    line: Fit
    behaviour: Fit
    helpfulness: Fit
    log_helpfulness: Fit
    bell: Fit
    kl: Fit
    change: Fit
    normality: Fit
    steerability: Fit

    def __str__(self) -> str:
        return "\n".join(str(getattr(self, f.name)) for f in fields(self))


def fit_all(curve: TradeoffCurve, *, reach: float = 2.0, seed: int = 0) -> Fits:
    """All fits of a curve.

    Args:
        curve: what was measured.
        reach: the largest |alpha| that counts as near 0, for all that is linear there.
        seed: of the resampling.
    """

    def measured(values: Array, groups: Sequence[str] | None = None) -> Measured:
        return Measured(curve.alphas, values, groups, seed)

    aligned, helpful, costs, control = curve.alignment, curve.helpfulness, curve.costs, curve.control
    right = measured(helpful.probability, helpful.groups)
    line = fit_line(measured(aligned.difference, aligned.groups), reach=reach)
    growth = "norm of the last hidden state's change"
    return Fits(
        line,
        fit_tanh(measured(aligned.behaviour, aligned.groups)),
        *fit_quadratics(right, measured(helpful.log_probability, helpful.groups)),
        fit_bell(right, helpful.floor),
        _unmeasured("KL divergence") if costs.kl is None else fit_kl(measured(costs.kl)),
        _unmeasured(growth) if costs.change is None else fit_growth(growth, measured(costs.change), reach=reach),
        fit_normality(measured(helpful.difference, helpful.groups), reach=reach),
        _unmeasured("control") if control is None else fit_steerability(curve.alphas, line, control, seed=seed),
    )


def fit_steerability(alphas: Array, line: Fit, control: Control, *, seed: int = 0) -> Fit:
    """The concept's slope of the mean logit difference against that of R random directions, in the line's window.

    Its facts: how many of the R have a smaller |slope|, the share `p` that has not (the concept counted with them), the
    ratio of their median |slope| to the concept's, and the helpfulness that they lose at the largest |alpha|. Intervals
    of the control have its directions for clusters.

    Args:
        alphas: (alphas,), of the whole grid.
        line: the concept's, of `fit_line`.
        control: the random directions.
    """
    formula = "|slope| of the mean logit difference, against random directions"
    if line.window is None:
        return Fit(formula, reason=line.reason)
    near = (alphas >= line.window[0]) & (alphas <= line.window[1])
    random, size = np.abs(np.polyfit(alphas[near], control.difference[:, near].T, 1)[0]), abs(line["slope"].value)
    far = np.abs(alphas).round(9) == np.abs(alphas).max().round(9)
    lost = 1 - control.helpfulness[:, far].mean(1) / control.helpfulness[:, alphas == 0][:, 0]
    slope, loss = Measured(alphas, random, seed=seed).estimates(np.stack([random, lost]))
    facts = {
        "directions": len(random),
        "smaller": int((random < size).sum()),
        "p": (1 + int((random >= size).sum())) / (1 + len(random)),
        "ratio": float(np.median(random) / size) if size > 0 else None,
        "control_loss": loss,
    }
    return Fit(formula, {"concept": line["slope"], "control": slope}, window=line.window, facts=facts)


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
    chosen: Outcome
    tested: Outcome
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


def choose(curve: TradeoffCurve, budget: float = 0.05, *, seed: int = 0, sign: int | None = 1) -> Choice:
    """The strength with the largest gain of behaviour whose loss of helpfulness stays within a budget.

    A gain counts where its interval is clear of 0, and where it is larger than along 95% of the control's directions.
    A random half of the clusters of either task chooses, the other half tests; a cluster that both tasks share goes to
    one half. What counts against the budget is the upper end of the loss's 95% interval.

    Args:
        curve: what was measured.
        budget: the largest loss `1 - H / H0` allowed, at least 0 and below 1.
        seed: of the split and of the resampling.
        sign: +1 to have more of the concept, -1 to have less of it, None for whichever goes further.

    Raises:
        ValueError: another budget or sign.
    """
    return _choose(curve, budget, sign, seed, np.random.default_rng(seed))


def rehearse(
    curve: TradeoffCurve, splits: int = 200, budget: float = 0.05, *, seed: int = 0, sign: int | None = 1
) -> Rehearsal:
    """`choose` on many random splits: how far the strength depends on the split, and how often its budget is broken.

    Raises:
        ValueError: no splits, or what `choose` raises.
    """
    if splits < 1:
        raise ValueError(f"a rehearsal needs at least one split, got {splits}")
    generator = np.random.default_rng(seed)
    return Rehearsal(tuple(_choose(curve, budget, sign, seed, generator) for _ in range(splits)))


def _choose(curve: TradeoffCurve, budget: float, sign: int | None, seed: int, generator: np.random.Generator) -> Choice:
    if not 0 <= budget < 1:
        raise ValueError(f"the budget is a share of helpfulness, at least 0 and below 1; got {budget}")
    if sign not in (1, -1, None):
        raise ValueError(f"sign is +1 for more of the concept, -1 for less or None for either; got {sign}")
    names = {name: np.array(clusters_of(getattr(curve, name).groups)) for name in ("alignment", "helpfulness")}
    for name, clusters in names.items():
        if (count := len(set(clusters))) < FEWEST:
            task = getattr(curve, name).name
            return _none(budget, sign, f"{task!r} has {count} clusters of items, too few to choose and test: {FEWEST}")
    first = first_half(set(names["alignment"]), set(names["helpfulness"]), generator)
    here = {name: np.isin(clusters, first) for name, clusters in names.items()}
    gains, losses = _outcomes(curve, here, seed)
    wish = np.abs(gains.mean) if sign is None else sign * gains.mean
    expected = losses.estimates()
    at_most = np.array([loss.high for loss in expected])
    sure = _surely_gains(curve, gains)
    usable = np.flatnonzero((wish > 0) & sure & affordable(curve.alphas, at_most <= budget))
    if not usable.size:
        return _none(budget, sign, _why(curve.alphas, np.where(sure, wish, 0), expected, budget))
    best = usable[wish[usable].argmax()]
    wanted = sign or int(np.sign(gains.mean[best]))
    there = _outcomes(curve, {name: ~half for name, half in here.items()}, seed)
    chosen, tested = (
        Outcome(gain.estimates(wanted * gain.values[[best]])[0], loss.estimates(loss.values[[best]])[0])
        for gain, loss in ((gains, losses), there)
    )
    return Choice(float(curve.alphas[best]), budget, wanted, chosen, tested)


def first_half(one: set[str], other: set[str], generator: np.random.Generator) -> list[str]:
    """Half of the clusters that both tasks share, and half of those that only one has."""
    drawn: list[str] = []
    for stratum, odd in ((one & other, 1), (one - other, 0), (other - one, 0)):
        drawn += generator.permutation(sorted(stratum))[: (len(stratum) + odd) // 2].tolist()
    return drawn


def _outcomes(curve: TradeoffCurve, items: Mapping[str, Array], seed: int) -> tuple[Measured, Measured]:
    """Gains of behaviour over alpha 0 and losses of helpfulness, of these items."""

    def of(task: str, values: Array) -> Measured:
        groups = np.array(clusters_of(getattr(curve, task).groups))[items[task]]
        return Measured(curve.alphas, values[:, items[task]], groups.tolist(), seed)

    behaviour = curve.alignment.behaviour
    gains = of("alignment", behaviour - behaviour[curve.alphas == 0])
    return gains, of("helpfulness", curve.helpfulness.probability).loss


def _surely_gains(curve: TradeoffCurve, gains: Measured) -> Array:
    """Where behaviour moves more than its interval allows for chance, and more than along 95% of random directions."""
    sure = np.array([gain.low > 0 or gain.high < 0 for gain in gains.estimates()])
    if curve.control is None:
        return sure
    moved = np.abs(curve.control.behaviour - curve.control.behaviour[:, curve.alphas == 0])
    return sure & (np.abs(gains.mean) > np.quantile(moved, 0.95, axis=0))


def affordable(alphas: Array, cheap: Array) -> Array:
    """Which alphas are cheap enough together with every one between them and 0."""
    above, below = cheap & (alphas >= 0), cheap & (alphas <= 0)
    upwards = np.logical_and.accumulate(above[alphas >= 0])
    downwards = np.logical_and.accumulate(below[alphas <= 0][::-1])[::-1]
    return np.concatenate([downwards[:-1], upwards])


def _none(budget: float, sign: int | None, reason: str) -> Choice:
    return Choice(0.0, budget, sign or 1, UNCHANGED, UNCHANGED, reason)


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


def _unmeasured(what: str) -> Fit:
    return Fit(what, reason="not measured")
