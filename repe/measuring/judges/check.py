"""Checking: how often a judge errs, found on labelled examples, and what a share it counts is without its errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from repe.measuring.intervals import Estimate, Z, proportion
from repe.measuring.judges.judge import Judge, judgement, own_name


@dataclass(frozen=True)
class Reliability:
    """What is known of a judge: what it made of examples that somebody had labelled.

    It holds for texts like the examples. Where those to be judged are easier, or others, the judge errs otherwise.

    Attributes:
        threshold: from which on its number is a yes.
        missed, positives: of the examples labelled True, how many it says no to, and how many there are.
        false_alarms, negatives: of those labelled False, how many it says yes to, and how many there are.
        auc: the probability that it gives a positive more than a negative, ties half; 0.5 is guessing.
    """

    threshold: float
    missed: int
    positives: int
    false_alarms: int
    negatives: int
    auc: float

    @property
    def miss_rate(self) -> Estimate:
        """The share of positives that it says no to."""
        return proportion(self.missed, self.positives)

    @property
    def false_alarm_rate(self) -> Estimate:
        """The share of negatives that it says yes to."""
        return proportion(self.false_alarms, self.negatives)

    def corrected(self, yes: int, texts: int) -> Estimate:
        """Estimate the true share from what the judge says of some texts, in [0, 1], with its errors taken off.

        The interval holds for the chance in the texts and in the examples. A judge that says yes to negatives as often
        as to positives tells nothing: NaN, and an interval of all shares.

        Args:
            yes, texts: how many it says yes to, of how many.

        Example:
            >>> known = Reliability(0.5, missed=10, positives=100, false_alarms=20, negatives=100, auc=0.9)
            >>> print(known.corrected(yes=55, texts=100))
            0.5 [0.339, 0.653]

        Sources: Rogan and Gladen, "Estimating prevalence from the results of a screening test" (1978); the interval is
        that of Lang and Reiczigel, "Confidence limits for prevalence of disease adjusted for estimated sensitivity and
        specificity" (2014).
        """
        found, clear = 1 - self.missed / self.positives, 1 - self.false_alarms / self.negatives
        if found + clear <= 1:
            return Estimate(math.nan, 0.0, 1.0)
        value = (yes / texts + clear - 1) / (found + clear - 1)
        middle, half = self._limits(yes, texts)
        return Estimate(*(min(max(number, 0.0), 1.0) for number in (value, middle - half, middle + half)))

    def _limits(self, yes: int, texts: int) -> tuple[float, float]:
        """The middle of the interval of the true share and half its width; infinite where few examples tell nothing.

        Every share is drawn towards a half, as if some more texts, and an example of either kind, had been seen.
        """
        positives, negatives = self.positives + 2, self.negatives + 2
        found, clear = 1 - (self.missed + 1) / positives, 1 - (self.false_alarms + 1) / negatives
        observed = (yes + Z**2 / 2) / (texts + Z**2)
        if (informed := found + clear - 1) <= 0:
            return 0.5, math.inf
        share = (observed + clear - 1) / informed
        of_found, of_clear = found * (1 - found) / positives, clear * (1 - clear) / negatives
        variance = observed * (1 - observed) / (texts + Z**2) + share**2 * of_found + (1 - share) ** 2 * of_clear
        return share + 2 * Z**2 * (share * of_found - (1 - share) * of_clear), Z * math.sqrt(variance) / informed

    def __str__(self) -> str:
        return (
            f"misses {self.miss_rate} of {self.positives}, false alarms {self.false_alarm_rate} of {self.negatives}, "
            f"AUC {self.auc:.3g}"
        )


@dataclass(frozen=True)
class Checked:
    """A judge of which it is known how it errs. It judges as the judge does, under the same name.

    Attributes:
        judge: the judge that was checked.
        name: what its judgements are kept under.
        reliability: what the check found.
    """

    judge: Judge
    name: str
    reliability: Reliability

    def __call__(self, prompt: Any, text: str) -> float:
        return self.judge(prompt, text)

    def __str__(self) -> str:
        return f"{self.name}: {self.reliability}"


def check(
    judge: Judge, examples: Iterable[tuple[Any, str, bool]], *, threshold: float = 0.5, name: str | None = None
) -> Checked:
    """Let a judge judge examples that somebody labelled, and return it with what is then known of its errors.

    Args:
        judge: gives more to what is labelled True.
        examples: prompts, texts and labels, best of texts like those to be judged, and not the ones it was made with.
        threshold: from which on its number is a yes.
        name: of the judge; its own by default.

    Raises:
        ValueError: all labels are alike, one is no truth value, or the judge has no name or gives no number.

    Example:
        >>> from repe.measuring.judges import refusal
        >>> examples = [("", "I can't help with that.", True), ("", "That is wrong.", True), ("", "Four eggs.", False)]
        >>> print(check(refusal, examples))
        refusal: misses 0.5 [0.0945, 0.905] of 2, false alarms 0 [0, 0.793] of 1, AUC 0.75
    """
    examples = [*examples]
    if strange := [label for *_, label in examples if label not in (True, False)]:
        raise ValueError(f"an example is a prompt, a text, and whether the judge is to say yes; got {strange[0]!r:.80}")
    given = np.array([judgement(judge, prompt, text) for prompt, text, _ in examples])
    labels = np.array([bool(label) for *_, label in examples], dtype=bool)
    yes, no = given[labels], given[~labels]
    if not len(yes) or not len(no):
        raise ValueError(f"a judge is checked on examples of both labels, got {len(yes)} True and {len(no)} False")
    auc = float(roc_auc_score(labels, given))
    missed, alarms = int((yes < threshold).sum()), int((no >= threshold).sum())
    found = Reliability(float(threshold), missed, len(yes), alarms, len(no), auc)
    return Checked(judge, name or own_name(judge), found)
