"""Scores: what was measured of items, texts and random directions at every strength. Frozen data, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from repe.measuring.fits import Array

CERTAIN = 1e-3  # how far above 0 rounding may lift the logarithm of a probability


class ByValue:
    """Equal where all fields are, arrays number by number and NaN to NaN."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return all(np.array_equal(a, b, equal_nan=True) if isinstance(a, Array) else a == b for a, b in pairs)


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
    """R random directions of the concept's norm, steered along as the concept was; means over items.

    Attributes:
        seeds: (R,).
        behaviour, difference: (R, alphas), of the alignment task.
        helpfulness: (R, alphas), mean P(right) among the options.
    """

    seeds: Array
    behaviour: Array
    difference: Array
    helpfulness: Array

    def __post_init__(self) -> None:
        freeze(self, "seeds", numbers_in("seeds", self.seeds, 1, whole=True))
        for name in ("behaviour", "difference", "helpfulness"):
            freeze(self, name, numbers_in(name, getattr(self, name), 2))
            shape, expected = getattr(self, name).shape, (len(self.seeds), self.behaviour.shape[1])
            if shape != expected:
                raise ValueError(f"`{name}` of the control has shape {shape}, expected {expected} (seeds, alphas)")


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


# what dataclasses are checked with


def freeze(owner: Any, name: str, value: Any) -> None:
    object.__setattr__(owner, name, value)


def numbers_in(name: str, values: Any, dimensions: int, *, whole: bool = False, may_be_nan: bool = False) -> Array:
    """A read-only copy in float64 (or int64), None as NaN. Raises ValueError unless it is such an array of numbers."""
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
        raise ValueError(f"`{name}` holds values that are not finite")
    array.setflags(write=False)
    return array


def texts_in(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"`{name}` is text, got {values!r:.80}")
    return tuple(values)


def check_scores(name: str, scores: Any, rows: int, of: str) -> None:
    if not isinstance(scores, Scores):
        raise ValueError(f"`{name}` is of Scores, got {type(scores).__name__}")
    if len(scores.log_likelihoods) != rows:
        raise ValueError(f"`{name}` has {len(scores.log_likelihoods)} rows for {rows} {of}")
