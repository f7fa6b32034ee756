"""Writing: what a steered model writes over many strengths, and what can be said of the texts.

Texts are written first and judged afterwards, when nothing steers the model: a judge may run it too.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from repe.display import table
from repe.measuring.curve import ByValue
from repe.measuring.intervals import Array
from repe.measuring.scoring import TransformersScorer, strengths_of
from repe.models.tokens import Text
from repe.steering.edit import EditOptions, spells_options
from repe.steering.steer import Steered, edit_of

Judge = Callable[[Any, str], float]


# what was written


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
        judged: what the judge gave; None without one.
    """

    alphas: Array
    prompts: tuple[Text, ...]
    texts: tuple[tuple[str, ...], ...]
    tokens: Array
    repetition: Array
    distinct_1: Array
    distinct_2: Array
    judged: Array | None = None

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    @property
    def _measures(self) -> dict[str, Array]:
        named = {name: getattr(self, name) for name in (*MEASURES, "judged")}
        return {name: array for name, array in named.items() if array is not None}

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row a text. Raises ImportError where there is no pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed: pip install pandas") from error
        count = len(self.prompts)
        columns = {"alpha": np.repeat(self.alphas, count), "prompt": list(self.prompts) * len(self.alphas)}
        columns["text"] = [text for row in self.texts for text in row]
        return pandas.DataFrame(columns | {name: array.ravel() for name, array in self._measures.items()})

    def __str__(self) -> str:
        heads = ["alpha", *self._measures]
        means = [_means(array) for array in self._measures.values()]
        rows = [[f"{number:.3g}" for number in row] for row in zip(self.alphas, *means, strict=True)]
        return str(table(f"texts after {len(self.prompts)} prompts, means by strength", heads, rows))

    __repr__ = __str__


@spells_options
def write(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    prompts: Sequence[Text],
    alphas: Sequence[float] | Tensor,
    *,
    judge: Judge | None = None,
    judge_name: str | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    resume: str | os.PathLike[str] | None = None,
    blocks_at: str | None = None,
    progress: bool = False,
    **options: Unpack[EditOptions],
) -> Writings:
    """Let the model write after every prompt at every strength: greedily, the likeliest token each time.

    Args:
        model, tokenizer: neither is changed.
        concept: what is steered along, as in `repe.steer`.
        prompts: texts or chats.
        alphas: the strengths, finite, in any order; 0 is added.
        judge: gives a text one finite number, called with the prompt and the text once all texts are written.
        judge_name: what its judgements are kept under; the function's own name by default, so that a judge that was
            changed needs another.
        max_new_tokens: the longest that a text may be, in tokens.
        batch_size: texts that are written at a time, of whatever strengths.
        resume: a file that keeps texts and judgements: none is written, or judged under the same name, twice.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        progress: show progress bars.
        options: of the edit, as in `repe.steer`.

    Raises:
        ValueError: no prompts or no alphas, a number that is not finite, a scope that is a mask, a judge without a name
            whose judgements are to be kept, one that fails or gives something else than a number (the texts are in
            `resume`), `resume` holds something else, or what `repe.steer` raises.

    Example:
        >>> question = [{"role": "user", "content": "What is 21 minus 4?"}]
        >>> written = repe.measuring.write(model, tokenizer, "honesty", [question], [-1, 1], max_new_tokens=8)
        >>> written.alphas.tolist()
        [-1.0, 0.0, 1.0]
    """
    strengths = strengths_of([0.0, *strengths_of(alphas)])
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
    named = None if judge is None or resume is None else judge_name or _own_name(judge)
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_size=batch_size, resume=resume, progress=progress
    )
    texts = scorer.write(prompts, edit, strengths, max_new_tokens=max_new_tokens)
    if judge is None:
        return _writings(tokenizer, prompts, strengths, texts)
    page, names = scorer.record.page(f"judgement by {named}", edit), scorer.names_of(prompts, max_new_tokens)
    judged = page.known(names, lambda _, value: isinstance(value, float) and math.isfinite(value))
    places = [(i, row) for i in range(len(prompts)) for row, alpha in enumerate(strengths) if alpha not in judged[i]]
    for i, row in tqdm(places, "judging", unit="text", disable=not progress):
        judged[i][strengths[row]] = given = _judgement(judge, strengths[row], prompts[i], texts[row][i])
        page.add([(names[i], [strengths[row]], [given])])
    return _writings(tokenizer, prompts, strengths, texts, np.array([[by[a] for by in judged] for a in strengths]))


def _own_name(judge: Judge) -> str:
    """The name of a judge. Raises ValueError if it has none of its own."""
    name = getattr(judge, "__name__", "<nameless>")
    if name.startswith("<"):
        raise ValueError(
            f"judgements are kept under the judge's name, and {judge!r} has none: pass judge_name=, another for "
            "every judge"
        )
    return str(name)


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


def _writings(
    tokenizer: Any, prompts: Sequence[Text], alphas: Sequence[float], texts: Sequence[Sequence[str]], judged: Any = None
) -> Writings:
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in row] for row in texts]
    arrays = {name: np.array([[of(text) for text in row] for row in ids]) for name, of in MEASURES.items()}
    return Writings(np.array(alphas), tuple(prompts), tuple(map(tuple, texts)), **arrays, judged=judged)


def _means(array: Array) -> Array:
    """(alphas,), over the texts that have a number; NaN where none has."""
    counts = (~np.isnan(array)).sum(1)
    return np.where(counts > 0, np.nansum(array, 1) / np.maximum(counts, 1), np.nan)


# judging


def _judgement(judge: Judge, alpha: float, prompt: Text, text: str) -> float:
    of = f"the text {text!r}, written at alpha={alpha:g} after the prompt {prompt!r}"
    try:
        given: Any = judge(prompt, text)
    except Exception as error:
        raise ValueError(f"the judge failed on {of}: {error!r}") from error
    try:
        number = math.nan if isinstance(given, str | bytes) or np.ndim(given) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"a judge gives one finite number, and gave {given!r} for {of}")
    return number
