"""Writings: what was written at every strength, and what can be said of the texts. Frozen data, shown as tables."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from repe.display import Table, bar_of, table
from repe.measuring.curve import ByValue, freeze
from repe.measuring.intervals import Array, Estimate, Measured, proportion
from repe.measuring.judges.check import Checked, Reliability
from repe.measuring.judges.judge import Judge, judgement, own_name
from repe.models.tokens import Text

SHOWN = ("tokens", "repetition", "perplexity")
SAMPLE = 160  # characters of a text that is shown for a sample


@dataclass(frozen=True, eq=False)
class Judgement(ByValue):
    """What a judge gave the texts.

    Attributes:
        values: (alphas, prompts), read-only.
        reliability: what is known of the judge's errors; None where it was not checked.
    """

    values: Array
    reliability: Reliability | None = None

    def __post_init__(self) -> None:
        self.values.setflags(write=False)

    @property
    def is_share(self) -> bool:
        """Whether all it says is yes (1) and no (0)."""
        return bool(np.isin(self.values, (0, 1)).all())


@dataclass(frozen=True, eq=False)
class Writings(ByValue):
    """What was written at every strength after every prompt. Arrays are read-only, of shape (alphas, prompts).

    Attributes:
        alphas: (alphas,), sorted, distinct, 0 among them.
        prompts: texts or chats.
        texts: one tuple a strength, with one text a prompt.
        tokens: the texts' lengths, in tokens.
        repetition: the share of repeated 4-grams, see `repetition`.
        distinct_1, distinct_2: the share of different tokens, and of different pairs of tokens, see `distinct`.
        cross_entropy: how unlikely the model finds the text after its prompt without the edit, in nats a token; NaN for
            a text of no tokens. Other handles that are on the model when it is measured apply.
        judged: what judges gave, by their names.
    """

    alphas: Array
    prompts: tuple[Text, ...]
    texts: tuple[tuple[str, ...], ...]
    tokens: Array
    repetition: Array
    distinct_1: Array
    distinct_2: Array
    cross_entropy: Array
    judged: Mapping[str, Judgement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.judged)
        freeze(self, "judged", dict(self.judged))
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    @property
    def perplexity(self) -> Array:
        """exp of `cross_entropy`."""
        return np.exp(self.cross_entropy)

    def judged_by(self, judge: Judge, name: str | None = None, *, progress: bool | None = None) -> Writings:
        """Return the same texts with one judgement more.

        What is to outlast a process is judged by `write`, which with `resume=` writes no text twice.

        Args:
            judge: gives a text one finite number, called with the prompt and the text; see `repe.measuring.judges`.
            name: what its judgement is kept under; its own by default. A judgement of this name is replaced.
            progress: show a progress bar; None: where a terminal or a notebook shows it.

        Raises:
            ValueError: the judge has no name, or that of a column, fails, or gives something else than a number.

        Example:
            >>> from repe.measuring.judges import refusal
            >>> question = [{"role": "user", "content": "What is 21 minus 4?"}]
            >>> written = repe.measuring.write(model, tokenizer, "honesty", [question], [1], max_new_tokens=8)
            >>> written.judged_by(refusal).judged["refusal"].values.tolist()
            [[0.0], [0.0]]
        """
        return judge_all(self, name or own_name(judge), judge, [{} for _ in self.prompts], progress=progress)

    def estimates(self, name: str) -> list[Estimate]:
        """Estimate the mean of a column over prompts, one a strength, with its 95% interval.

        A judgement of yes and no is a share, with Wilson's interval. Texts without a number are left out, and a prompt
        that was given twice counts once. Of "perplexity" it is exp of the mean cross-entropy.

        Args:
            name: of a judgement, or "tokens", "repetition", "distinct_1", "distinct_2", "cross_entropy", "perplexity".

        Raises:
            KeyError: there is no such column.
        """
        if name == "perplexity":
            logs = self.estimates("cross_entropy")
            return [Estimate(*(float(np.exp(end)) for end in (e.value, e.low, e.high))) for e in logs]
        if name not in self._columns:
            raise KeyError(f"there is no column {name!r}, only {[*self._columns, 'perplexity']}")
        values = self._columns[name][:, self._different]
        if name in self.judged and self.judged[name].is_share:
            return [proportion(int(row.sum()), len(row)) for row in values]
        return [_mean(alpha, row[~np.isnan(row)]) for alpha, row in zip(self.alphas, values, strict=True)]

    def corrected(self, name: str) -> list[Estimate]:
        """Estimate the share of texts that are what a judge looks for, one a strength, with its errors taken off.

        See `Reliability.corrected`, whose interval holds for the chance in the examples too.

        Raises:
            ValueError: the judge says more than yes and no, or was not checked.
            KeyError: there is no such judgement.
        """
        by, known = self.judged[name], self.judged[name].reliability
        if known is None or not by.is_share:
            need = "whose errors are known (see `repe.measuring.judges.check`) and which says yes or no, 1 or 0"
            raise ValueError(f"shares are corrected of a judge {need}; {name!r} is none")
        values = by.values[:, self._different]
        return [known.corrected(int(row.sum()), len(row)) for row in values]

    @property
    def _columns(self) -> dict[str, Array]:
        judged = {name: by.values for name, by in self.judged.items()}
        return {name: getattr(self, name) for name in (*MEASURES, "cross_entropy")} | judged

    @property
    def _different(self) -> list[int]:
        """The numbers of the prompts that were not given before."""
        return [*{repr(prompt): i for i, prompt in reversed([*enumerate(self.prompts)])}.values()][::-1]

    # how it is shown

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row a text. Raises ImportError where there is no pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed: pip install pandas") from error
        count = len(self.prompts)
        columns = {"alpha": np.repeat(self.alphas, count), "prompt": list(self.prompts) * len(self.alphas)}
        columns["text"] = [text for row in self.texts for text in row]
        return pandas.DataFrame(columns | {name: array.ravel() for name, array in self._columns.items()})

    def samples(self, prompt: int = 0) -> Table:
        """Show the beginnings of what was written after one prompt, at the lowest strength, at 0 and at the highest."""
        rows = sorted({0, int(np.flatnonzero(self.alphas == 0)[0]), len(self.alphas) - 1})
        title = f"after the prompt {self.prompts[prompt]!r:.{SAMPLE}}"
        texts = [(row, self.texts[row][prompt]) for row in rows]
        cells = [[f"{self.alphas[row]:.3g}", text[:SAMPLE] + "…" * (len(text) > SAMPLE)] for row, text in texts]
        return table(title, ["alpha", "text"], cells)

    def _table(self) -> Table:
        columns: dict[str, list[Any]] = {"alpha": [f"{alpha:.3g}" for alpha in self.alphas]}
        notes = []
        for name, by in self.judged.items():
            columns[name] = self.estimates(name)
            notes.append(f"{name}: {by.reliability or 'unchecked'}")
            if by.reliability and by.is_share:
                columns[f"{name}, corrected"] = self.corrected(name)
        for name in SHOWN:
            columns[name] = [f"{estimate.value:.3g}" for estimate in self.estimates(name)]
        title = f"texts after {len(self.prompts)} prompts, means by strength"
        return table(title, [*columns], zip(*columns.values(), strict=True), "; ".join(notes))

    def __str__(self) -> str:
        return f"{self._table().text()}\n\n{self.samples().text()}"

    def _repr_html_(self) -> str:
        return self._table().html() + self.samples().html()

    __repr__ = __str__


def _mean(alpha: float, values: Array) -> Estimate:
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    return Measured(np.array([alpha]), values[None]).estimates()[0]


# judging


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError where a judgement would have the name of a column."""
    taken = {"alpha", "prompt", "text", "cross_entropy", "perplexity", *MEASURES}
    if strange := sorted(set(names) & taken):
        raise ValueError(f"{strange} are columns of every Writings: call the judge something else")


def judge_all(
    writings: Writings,
    name: str,
    judge: Judge,
    known: Sequence[dict[float, float]],
    keep: Callable[[int, float, float], None] = lambda prompt, alpha, given: None,
    *,
    progress: bool | None = None,
) -> Writings:
    """The writings with a judgement of every text.

    Args:
        writings, name, judge: what is judged, by whom.
        known: for every prompt what the judge gave already, by strength.
        keep: gets the number of the prompt, the strength, and what the judge gives.
        progress: show a progress bar; None: where a terminal or a notebook shows it.
    """
    given = [dict(values) for values in known]
    alphas = writings.alphas.tolist()
    places = [(i, row) for i in range(len(given)) for row, alpha in enumerate(alphas) if alpha not in given[i]]
    for i, row in bar_of(places, f"judging: {name}", unit="text", progress=progress):
        where = f"at alpha={alphas[row]:g} "
        given[i][alphas[row]] = judgement(judge, writings.prompts[i], writings.texts[row][i], where)
        keep(i, alphas[row], given[i][alphas[row]])
    values = np.array([[of_prompt[alpha] for of_prompt in given] for alpha in alphas])
    made = Judgement(values, judge.reliability if isinstance(judge, Checked) else None)
    return replace(writings, judged={**writings.judged, name: made})


# what can be said of a text


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams / all n-grams, in [0, 1]; NaN for a text of fewer than n tokens.

    Source: Li et al. (arXiv 1510.03055), who divide by the number of tokens instead.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(ids: Sequence[int]) -> float:
    """1 - different 4-grams / all 4-grams, in [0, 1); NaN for a text of fewer than 4 tokens.

    Source: seq-rep-4 of Welleck et al. (arXiv 1908.04319).
    """
    return 1 - distinct(ids, 4)


MEASURES: dict[str, Callable[[Sequence[int]], float]] = {
    "tokens": len,
    "repetition": repetition,
    "distinct_1": partial(distinct, n=1),
    "distinct_2": partial(distinct, n=2),
}
