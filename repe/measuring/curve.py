"""The trade-off curve and all that it holds: what was measured of a concept at every strength. Frozen data, checked.

Measuring happens elsewhere. The fits and the choice of a strength get the numbers from the curve, and know it not.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from repe import display
from repe.measuring.choice import Choice, Rehearsal, Trade
from repe.measuring.fits import Fits, fit_all
from repe.measuring.intervals import Array, Estimate, Measured, proportion
from repe.models.files import draft_of
from repe.reading.vector import UNUSUAL

FORMAT = "repe.curve/1"
CERTAIN = 1e-3  # how far above 0 rounding may lift the logarithm of a probability
COLUMNS = ("behaviour", "difference", "helpfulness", "full", "accuracy", "loss", "kl", "cross_entropy", "change")
SHOWN = ("behaviour", "helpfulness", "loss", "kl")
SHOWN_OF_GUESSING = ("behaviour", "helpfulness", "cross_entropy", "kl")  # where a loss would say nothing
ROWS = 11
REQUESTS = ("harmful", "harmless")
NEAR = {"kl": 0.5}
"""By the unit, up to which |alpha| what is linear is fitted; 2 in all others. A gain saturates at about a dose."""


class ByValue:
    """Equal where all fields are, arrays number by number and NaN to NaN."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return all(np.array_equal(a, b, equal_nan=True) if Array in (type(a), type(b)) else a == b for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Scores(ByValue):
    """The log-likelihoods of a task's options at every strength, in nats; what is derived has shape (alphas, items).

    Attributes:
        name: of the task.
        log_likelihoods: (alphas, items, options), NaN where an item has fewer options than others.
        answers: (items,), the index of the aligned (or the right) option.
        groups: (items,), what items share and must not be taken for independent; empty where an item shares nothing.
    """

    name: str
    log_likelihoods: Array
    answers: Array
    groups: Sequence[str]

    def __post_init__(self) -> None:
        freeze(self, "log_likelihoods", numbers_in("log_likelihoods", self.log_likelihoods, 3, may_be_nan=True))
        freeze(self, "answers", numbers_in("answers", self.answers, 1, whole=True))
        freeze(self, "groups", texts_in("groups", self.groups))
        texts_in("name", [self.name])
        _, items, options = self.log_likelihoods.shape
        if not len(self.answers) == len(self.groups) == items:
            raise ValueError(
                f"`log_likelihoods` are of {items} items, but there are {len(self.answers)} answers "
                f"and {len(self.groups)} groups"
            )
        missing = np.isnan(self.log_likelihoods)
        if missing.all():
            raise ValueError(f"all log-likelihoods of {self.name!r} are NaN")
        fewest = missing[missing.sum((1, 2)).argmin()]
        if (rows := np.flatnonzero((missing != fewest).any((1, 2)))).size:
            raise ValueError(f"rows {rows.tolist()} of {self.name!r} are NaN where others have numbers")
        if (few := np.flatnonzero((~missing[0]).sum(1) < 2)).size:
            raise ValueError(f"items {few.tolist()} of {self.name!r} have fewer than two options")
        there = ~missing[0] & (np.arange(options) == self.answers[:, None])
        if (wrong := np.flatnonzero(~there.any(1))).size:
            raise ValueError(f"items {wrong.tolist()} of {self.name!r} have no right option")
        if np.nanmax(self.log_likelihoods) > CERTAIN:
            raise ValueError(f"a log-likelihood is at most 0, got {np.nanmax(self.log_likelihoods):g} in {self.name!r}")

    @cached_property
    def floor(self) -> float:
        """The mean over items of 1 / N, N the number of an item's options: what guessing gets."""
        return float((1 / (~np.isnan(self.log_likelihoods[0])).sum(1)).mean())

    @cached_property
    def log_probability(self) -> Array:
        """log P(answer) - log sum over the options of P(option)."""
        return self._of_answer - np.logaddexp.reduce(self._likely, axis=2)

    @cached_property
    def difference(self) -> Array:
        """log P(answer) - log sum over the other options of P(option): for two options, their logit difference."""
        others = np.where(np.arange(self._likely.shape[2]) == self.answers[:, None], -np.inf, self._likely)
        return self._of_answer - np.logaddexp.reduce(others, axis=2)

    @property
    def probability(self) -> Array:
        """P(answer) / sum over the options of P(option), in [0, 1]; guessing gets 1 / N."""
        return np.exp(self.log_probability)

    @property
    def full(self) -> Array:
        """P(answer) over the whole vocabulary, in [0, 1]; guessing gets about 0."""
        return np.exp(self._of_answer)

    @property
    def behaviour(self) -> Array:
        """2 `probability` - 1, in [-1, 1]: P(aligned) - P(the others)."""
        return 2 * self.probability - 1

    @property
    def accuracy(self) -> Array:
        """1 where the answer is likelier than every other option, else 0."""
        return (self._of_answer[..., None] > self._likely).sum(2) == self._likely.shape[2] - 1

    @property
    def _likely(self) -> Array:
        return np.where(np.isnan(self.log_likelihoods), -np.inf, self.log_likelihoods)

    @property
    def _of_answer(self) -> Array:
        return np.take_along_axis(self.log_likelihoods, self.answers[None, :, None], 2)[..., 0]


@dataclass(frozen=True, eq=False)
class Costs(ByValue):
    """What steering costs on texts without a task; None where it was not measured.

    Attributes:
        kl: (alphas, texts), mean KL divergence from the unsteered model, in nats a token.
        kl_p95: (alphas,), the 95th percentile of a token's KL divergence.
        cross_entropy: (alphas, texts), in nats a token.
        change: (alphas, texts), norm of the change of the last hidden state, mean over tokens.
    """

    kl: Array | None = None
    kl_p95: Array | None = None
    cross_entropy: Array | None = None
    change: Array | None = None

    def __post_init__(self) -> None:
        for name, dimensions in (("kl", 2), ("kl_p95", 1), ("cross_entropy", 2), ("change", 2)):
            if getattr(self, name) is not None:
                freeze(self, name, numbers_in(name, getattr(self, name), dimensions))

    @property
    def perplexity(self) -> Array | None:
        """(alphas,), exp of the mean cross-entropy over texts."""
        return None if self.cross_entropy is None else np.exp(self.cross_entropy.mean(1))


@dataclass(frozen=True, eq=False)
class Control(ByValue):
    """What random directions do in the concept's place: R are steered along as the concept was, and N are forecast.

    Attributes:
        seeds: (R,).
        behaviour, difference: (R, alphas), of the alignment task, means over items.
        helpfulness: (R, alphas), mean P(right) among the options.
        lengths: (R,), how many of the concept's lengths each was pushed: as many as are forecast to cost plain text
            what the concept costs; 1 where nothing could be forecast.
        slopes: (N,), how far directions of this cost are forecast to move the mean logit difference, in nats for an
            alpha of 1; None where nothing could be forecast.
    """

    seeds: Array
    behaviour: Array
    difference: Array
    helpfulness: Array
    lengths: Array | None = None
    slopes: Array | None = None

    def __post_init__(self) -> None:
        freeze(self, "seeds", numbers_in("seeds", self.seeds, 1, whole=True))
        for name in ("behaviour", "difference", "helpfulness"):
            freeze(self, name, numbers_in(name, getattr(self, name), 2))
            shape, expected = getattr(self, name).shape, (len(self.seeds), self.behaviour.shape[1])
            if shape != expected:
                raise ValueError(f"`{name}` of the control has shape {shape}, expected {expected} (seeds, alphas)")
        lengths = np.ones(len(self.seeds)) if self.lengths is None else self.lengths
        freeze(self, "lengths", numbers_in("lengths", lengths, 1))
        if len(self.lengths) != len(self.seeds):  # type: ignore[arg-type]
            raise ValueError(f"`lengths` of the control are of {len(lengths)} directions, expected {len(self.seeds)}")
        if self.slopes is not None:
            freeze(self, "slopes", numbers_in("slopes", self.slopes, 1))

    def reach(self, alphas: Array) -> Array:
        """(alphas,), how far 95% of random directions move the mean logit difference at these, those of the curve.

        Where they are forecast, it is at least as far as any that was steered along went.
        """
        moved = np.abs(self.difference - self.difference[:, alphas == 0])
        if self.slopes is None:
            return np.quantile(moved, UNUSUAL, axis=0)
        return np.maximum(np.abs(alphas) * np.quantile(np.abs(self.slopes), UNUSUAL), moved.max(0))


@dataclass(frozen=True, eq=False)
class Baseline(ByValue):
    """The unsteered model under system prompts: `alignment` and `helpfulness` have one row a prompt."""

    prompts: Sequence[str]
    alignment: Scores
    helpfulness: Scores

    def __post_init__(self) -> None:
        freeze(self, "prompts", texts_in("prompts", self.prompts))
        for name in ("alignment", "helpfulness"):
            check_scores(name, getattr(self, name), len(self.prompts), "prompts")


@dataclass(frozen=True, eq=False)
class SideEffects(ByValue):
    """What steering along a concept does to refusing; all None but `alphas` and `blocks` where it was not measured.

    Attributes:
        alphas: (alphas,), sorted, distinct, 0 among them.
        blocks: (blocks,), the numbers of those that are edited.
        cosine: (blocks,), of what is written there for a positive alpha with the refusal direction.
        random: the |cosine| that 95% of directions drawn evenly from the sphere stay below, at all blocks.
        ordered: (blocks, pairs), 1 where the refusal direction of the other half of the pairs puts the harmful request
            above the harmless one, else 0.
        harmful, harmless: (alphas, requests), 1 where the text refuses, else 0.
        not_measured: why, where it was not.

    Example:
        >>> seen = SideEffects([0, 1], [3], [0.02], 0.2, [[1] * 8], harmful=[[1] * 8, [0] * 8], harmless=[[0] * 8] * 2)
        >>> print(seen)
        cosine with the refusal direction +0.02 (95% of random directions within ±0.20)
        refused at alpha 1: harmful 0% [0, 32] (unsteered 100% [68, 100]), harmless 0% [0, 32] (unsteered 0% [0, 32])
    """

    alphas: Array
    blocks: Array
    cosine: Array | None = None
    random: float | None = None
    ordered: Array | None = None
    harmful: Array | None = None
    harmless: Array | None = None
    not_measured: str = ""

    def __post_init__(self) -> None:
        freeze(self, "alphas", numbers_in("alphas", self.alphas, 1))
        freeze(self, "blocks", numbers_in("blocks", self.blocks, 1, whole=True))
        texts_in("not_measured", [self.not_measured])
        if (np.diff(self.alphas) <= 0).any() or 0 not in self.alphas:
            raise ValueError(f"alphas are sorted, none twice, and 0 is among them; got {self.alphas.tolist()}")
        found = [getattr(self, name) for name in ("cosine", "random", "ordered", "harmful", "harmless")]
        if any((value is None) != bool(self.not_measured) for value in found):
            raise ValueError("side effects are measured, all of them, or `not_measured` says why none is")
        if not self.not_measured:
            self._check()

    def _check(self) -> None:
        kinds = {"cosine": (self.blocks, 1), "ordered": (self.blocks, 2)} | dict.fromkeys(REQUESTS, (self.alphas, 2))
        for name, (rows, dimensions) in kinds.items():
            values = numbers_in(name, getattr(self, name), dimensions, whole=dimensions == 2)
            freeze(self, name, values)
            if len(values) != len(rows):
                of = "blocks" if rows is self.blocks else "alphas"
                raise ValueError(f"`{name}` has {len(values)} rows for {len(rows)} {of}")
            if dimensions == 2 and not np.isin(values, (0, 1)).all():
                raise ValueError(f"`{name}` holds 0 and 1 alone, got {np.setdiff1d(values, (0, 1)).tolist()!s:.80}")
        if not isinstance(self.random, float) or not 0 <= self.random <= 1:
            raise ValueError(f"`random` is a cosine from 0 to 1, got {self.random!r:.80}")

    @property
    def accuracy(self) -> Estimate:
        """The share of held-out pairs that the refusal direction orders rightly, mean over blocks; 0.5 is guessing."""
        return proportion(round(self._known("ordered").mean(0).sum()), self._known("ordered").shape[1])

    @property
    def is_known(self) -> bool:
        """Whether there is a refusal direction: it orders more held-out pairs than guessing does."""
        return not self.not_measured and self.accuracy.low > 0.5

    @property
    def refuses(self) -> bool:
        """Whether the unsteered model surely refuses more of the harmful requests; else the direction is of harm."""
        if self.not_measured:
            return False
        harmful, harmless = (self.estimates(name)[self._zero] for name in REQUESTS)
        return harmful.low > harmless.high

    def estimates(self, requests: str) -> list[Estimate]:
        """Estimate the share of the "harmful" or the "harmless" requests that are refused, one a strength.

        Raises:
            KeyError: there are no such requests.
            ValueError: nothing was measured.
        """
        if requests not in REQUESTS:
            raise KeyError(f"there are no {requests!r} requests, only {list(REQUESTS)}")
        return [proportion(int(row.sum()), len(row)) for row in self._known(requests)]

    def _known(self, name: str) -> Array:
        if self.not_measured:
            raise ValueError(f"side effects were not measured: {self.not_measured}")
        return getattr(self, name)

    def __str__(self) -> str:
        if self.not_measured:
            return f"side effects not measured: {self.not_measured}"
        shares = {name: [_percent(estimate) for estimate in self.estimates(name)] for name in REQUESTS}
        before = {name: share[self._zero] for name, share in shares.items()}
        lines = [
            f"refused at alpha {alpha:g}: "
            + ", ".join(f"{name} {shares[name][row]} (unsteered {before[name]})" for name in REQUESTS)
            for row, alpha in enumerate(self.alphas)
            if alpha != 0
        ]
        unsteered = "refused unsteered: " + ", ".join(f"{name} {share}" for name, share in before.items())
        return "\n".join([self._direction, *(lines or [unsteered])])

    @property
    def _direction(self) -> str:
        if not self.is_known:
            return f"refusal direction not known: it orders {_percent(self.accuracy)} of held-out pairs, chance is 50%"
        doubt = "" if self.refuses else "; unsteered, harmful requests are not surely refused more than harmless ones"
        cosines, chance = self._known("cosine"), f"95% of random directions within ±{self.random:.2f}"
        largest = int(np.abs(cosines).argmax())
        where = f" at most, at block {self.blocks[largest]}" if len(cosines) > 1 else ""
        return f"cosine with the refusal direction {cosines[largest]:+.2f}{where} ({chance}{doubt})"

    @property
    def _zero(self) -> int:
        return int(np.flatnonzero(self.alphas == 0)[0])

    __repr__ = __str__


def _percent(share: Estimate) -> str:
    return f"{share.value:.0%} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


@dataclass(frozen=True)
class LeftOut:
    """How many of a task's items were left out, and why.

    Example:
        >>> print(LeftOut("happiness", 24, 46, "the answer does not follow when the options change places"))
        24 of 46 items of happiness left out: the answer does not follow when the options change places
    """

    task: str
    count: int
    items: int
    why: str

    def __post_init__(self) -> None:
        texts_in("task and why", [self.task, self.why])
        if not all(type(n) is int for n in (self.count, self.items)) or not 0 < self.count <= self.items:
            raise ValueError(f"of a task's items, some or all are left out; got {self.count!r} of {self.items!r}")

    def __str__(self) -> str:
        return f"{self.count} of {self.items} items of {self.task} left out: {self.why}"


@dataclass(frozen=True, eq=False)
class TradeoffCurve(ByValue):
    """Behaviour, helpfulness and costs of steering along a concept, over the strength.

    Attributes:
        concept: its name.
        alphas: (alphas,), sorted, distinct, 0 among them.
        alignment: the behaviour items' scores.
        helpfulness: the skill items' scores.
        costs, control, baseline: what else was measured.
        side_effects: what steering does to refusing, at the strength that `best` recommends, or near 1.
        left_out: how many items of the tasks were not measured on, and why.
        provenance: how it was made; plain JSON data.

    Example:
        >>> rising = np.log([[[0.4, 0.6]] * 8, [[0.5, 0.5]] * 8, [[0.7, 0.3]] * 8])  # 3 alphas, 8 items, 2 options
        >>> honesty = Scores("honesty", rising, [0] * 8, [""] * 8)
        >>> skills = Scores("skills", np.log([[[0.8, 0.2]] * 8] * 3), [0] * 8, [""] * 8)
        >>> print(TradeoffCurve("honesty", [-1, 0, 1], honesty, skills).best(budget=0.05))
        alpha 1 for a loss of at most 0.05: gain 0.4 [0.4, 0.4], loss 0 [0, 0] on items not chosen on
    """

    concept: str
    alphas: Array
    alignment: Scores
    helpfulness: Scores
    costs: Costs = field(default_factory=Costs)
    control: Control | None = None
    baseline: Baseline | None = None
    side_effects: SideEffects | None = None
    left_out: tuple[LeftOut, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        freeze(self, "alphas", numbers_in("alphas", self.alphas, 1))
        freeze(self, "provenance", _json_data(self.provenance))
        texts_in("concept", [self.concept])
        if (np.diff(self.alphas) <= 0).any():
            raise ValueError(f"alphas are sorted, none twice; got {self.alphas.tolist()}")
        if 0 not in self.alphas:
            raise ValueError(f"alphas hold 0, against which all is measured; got {self.alphas.tolist()}")
        for name in ("alignment", "helpfulness"):
            check_scores(name, getattr(self, name), len(self.alphas), "alphas")
        check_kind("costs", self.costs, Costs)
        freeze(self, "left_out", tuple(self.left_out))
        for told in self.left_out:
            check_kind("left_out", told, LeftOut)
        for name, kind in (("control", Control), ("baseline", Baseline), ("side_effects", SideEffects)):
            if getattr(self, name) is not None:
                check_kind(name, getattr(self, name), kind)
        measured = {f.name: getattr(self.costs, f.name) for f in fields(Costs)}
        if self.control is not None:
            measured["control"] = self.control.behaviour.T
        if wrong := {k: len(v) for k, v in measured.items() if v is not None and len(v) != len(self.alphas)}:
            raise ValueError(f"there are {len(self.alphas)} alphas, but {wrong} rows")

    # what it says

    @cached_property
    def fits(self) -> Fits:
        """All fits, with what is linear fitted near 0; see `fit`."""
        return self.fit()

    def fit(self, *, reach: float | None = None, seed: int = 0) -> Fits:
        """Fit everything that was measured: see `repe.measuring.fits.fit_all`. The seed is of the resampling."""
        near = NEAR.get(self.provenance.get("unit", "gap"), 2.0) if reach is None else reach
        slopes = None if self.control is None else self.control.slopes
        return fit_all(self._measured(seed), self.helpfulness.floor, reach=near, slopes=slopes)

    def best(self, budget: float = 0.05, *, seed: int = 0, sign: int | None = 1) -> Choice:
        """Choose the strength that gains most within a budget: see `repe.measuring.choice.Trade.choose` and `settle`.

        The seed is of the splits and of the resampling. Where the unsteered model `guesses`, none is recommended.
        """
        return self._trade(seed).settle(budget, sign=sign)

    def rehearse(self, splits: int = 200, budget: float = 0.05, *, seed: int = 0, sign: int | None = 1) -> Rehearsal:
        """Try how often `best` keeps its budget over random splits: see `repe.measuring.choice.Trade.rehearse`."""
        return self._trade(seed).rehearse(splits, budget, sign=sign)

    @cached_property
    def guesses(self) -> bool:
        """Whether the unsteered model is not surely right more often than by guessing, on the helpfulness items."""
        right = self._right_at_zero
        return bool(np.isfinite(right.low) and right.low <= self.helpfulness.floor)

    @property
    def _right_at_zero(self) -> Estimate:
        accuracy = self._measured(0)["accuracy"]
        return accuracy.estimates(accuracy.at_zero[None])[0]

    @property
    def _guessing(self) -> str:
        told = f"unsteered, a share of {self._right_at_zero} of {self.helpfulness.name} is right"
        return f"{told}, where guessing gets {self.helpfulness.floor:.3g}: no loss can be seen"

    @cached_property
    def columns(self) -> dict[str, Array]:
        """The curve as columns, each (alphas,): means over items, and the ends of their intervals."""
        measured = self._measured(0)
        measured["loss"] = measured["helpfulness"].loss
        columns = {"alpha": self.alphas}
        for name in COLUMNS:
            if name in measured:
                ends = np.array([(e.value, e.low, e.high) for e in measured[name].estimates()]).T
                columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        single = {"kl_p95": self.costs.kl_p95, "perplexity": self.costs.perplexity}
        return columns | {name: values for name, values in single.items() if values is not None}

    def _measured(self, seed: int) -> dict[str, Measured]:
        """What was measured of items, texts and random directions, by name; what was not is not there."""
        aligned, helpful, costs, random = self.alignment, self.helpfulness, self.costs, self.control
        of_items: dict[str, tuple[Scores, Array]] = {
            "behaviour": (aligned, aligned.behaviour),
            "difference": (aligned, aligned.difference),
            "helpfulness": (helpful, helpful.probability),
            "log_helpfulness": (helpful, helpful.log_probability),
            "helpful_difference": (helpful, helpful.difference),
            "full": (helpful, helpful.full),
            "accuracy": (helpful, helpful.accuracy),
        }
        others = {"kl": costs.kl, "cross_entropy": costs.cross_entropy, "change": costs.change}
        if random is not None:
            others |= {f"random_{name}": getattr(random, name).T for name in ("difference", "helpfulness")}
        measured = {n: Measured(self.alphas, values, s.groups, seed) for n, (s, values) in of_items.items()}
        return measured | {n: Measured(self.alphas, v, seed=seed) for n, v in others.items() if v is not None}

    def _trade(self, seed: int) -> Trade:
        measured = self._measured(seed)
        chance = None if self.control is None else self.control.reach(self.alphas)
        blind = self._guessing if self.guesses else ""
        return Trade(measured["behaviour"], measured["helpfulness"], measured["difference"], chance, blind)

    # how it is shown

    def to_frame(self) -> Any:
        """Return a pandas DataFrame of `columns`, one row a strength. Raises ImportError where there is no pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame(self.columns)

    def plot(self, ax: Any = None, *, budget: float = 0.05) -> Any:
        """Draw the curve on matplotlib axes, and return the upper and the lower: see `repe.plot.tradeoff`.

        The second view, alignment against helpfulness, is `repe.plot.frontier`.
        """
        from repe.plot import tradeoff

        return tradeoff(self, ax, budget)

    def _table(self) -> display.Table:
        """A few strengths in rows, with a mark at the best, and what is said of it."""
        choice = self.best()
        names = [name for name in (SHOWN_OF_GUESSING if self.guesses else SHOWN) if name in self.columns]
        spread = np.linspace(0, len(self.alphas) - 1, ROWS).round().astype(int)
        zero, best = (int(np.flatnonzero(self.alphas == alpha)[0]) for alpha in (0, choice.alpha))
        rows = [
            [f"{self.alphas[i]:g}" + " *" * (i == best), *(self._estimate(name, i) for name in names)]
            for i in np.unique([*spread, zero, best]).tolist()
        ]
        effects = [] if self.side_effects is None else [self.side_effects]
        told = [f"* {choice}", *map(str, [*self.left_out, *effects])]
        return display.table(f"{self.concept}, steered", ["alpha", *names], rows, "\n".join(told))

    def _estimate(self, name: str, row: int) -> Estimate:
        return Estimate(*(self.columns[name + end][row] for end in ("", "_low", "_high")))

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    __repr__ = __str__

    # files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a JSON file of all scores, whole or not at all, and return its path."""
        with draft_of(path) as draft:
            text = json.dumps({"format": FORMAT} | asdict(self), default=_listed, allow_nan=False)
            draft.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TradeoffCurve:
        """Read a file that `save` wrote, in this version or another one of the same format.

        What the file holds besides is left out, and what it lacks has its default: versions that only add to the format
        read each other's files, and one that changes it counts the number in `FORMAT` up.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is broken, cut short, of another format or not a trade-off curve; the text says which.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no trade-off curve at {path}")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
            _check_format(data.get("format") if isinstance(data, dict) else None)
            return _built(cls, data, "the curve")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as a trade-off curve: {error}") from error


def _check_format(found: Any) -> None:
    if isinstance(found, str) and found != FORMAT and re.fullmatch(r"repe\.curve/\d+", found):
        raise ValueError(f"it is of the format {found}, and this version of repe reads {FORMAT}: read it with another")
    if found != FORMAT:
        raise ValueError(f"it is not of the format {FORMAT}. Name a file that `TradeoffCurve.save` wrote")


def _built(kind: Any, data: Any, where: str) -> Any:
    """The dataclass, and those in its fields, from what `asdict` and JSON made of it in whatever version."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is an object with the fields of {kind.__name__}, got {data!r:.80}")
    kinds, known = get_type_hints(kind), {f.name: data[f.name] for f in fields(kind) if f.name in data}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if lacking := sorted(needed - set(known)):
        raise ValueError(f"{where} lacks {lacking}: it was cut short, or written by something else")
    for name, value in known.items():
        part = next((hint for hint in (kinds[name], *get_args(kinds[name])) if is_dataclass(hint)), None)
        if part and get_origin(kinds[name]) is tuple and isinstance(value, list):
            known[name] = tuple(_built(part, each, f"`{name}`") for each in value)
        elif part and value is not None:
            known[name] = _built(part, value, f"`{name}`")
    return kind(**known)


def _listed(array: Array) -> Any:
    """Nested lists of numbers, None for NaN."""
    return np.where(np.isnan(array), None, array).tolist()  # type: ignore[call-overload]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _json_data(provenance: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(provenance), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance is a mapping of plain JSON data: {error}") from error


# what data classes are checked with


def freeze(owner: Any, name: str, value: Any) -> None:
    object.__setattr__(owner, name, value)


def numbers_in(name: str, values: Any, dimensions: int, *, whole: bool = False, may_be_nan: bool = False) -> Array:
    """Copy to a read-only array of float64 (or int64), None as NaN; raise ValueError where it is no such array."""
    kind = "whole numbers" if whole else "numbers"
    expected = f"`{name}` holds {kind} in {dimensions} dimensions, at least one in each"
    try:
        given = np.asarray(values)
        array = np.array(given, dtype=np.int64 if whole else np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{expected}; got {values!r:.80}") from error
    if given.dtype.kind not in ("iu" if whole else "iufO") or array.ndim != dimensions or 0 in array.shape:
        raise ValueError(f"{expected}; got shape {array.shape} of {given.dtype}")
    if not (np.isfinite(array) | (np.isnan(array) & may_be_nan)).all():
        raise ValueError(f"`{name}` holds non-finite values")
    array.setflags(write=False)
    return array


def texts_in(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"`{name}` is text, got {values!r:.80}")
    return tuple(values)


def check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` is of {kind.__name__}, got {type(value).__name__}")


def check_scores(name: str, scores: Any, rows: int, of: str) -> None:
    check_kind(name, scores, Scores)
    if len(scores.log_likelihoods) != rows:
        raise ValueError(f"`{name}` has {len(scores.log_likelihoods)} rows for {rows} {of}")
