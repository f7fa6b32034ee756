"""Auditing contrast pairs: whether a direction found from them could be the wording, the length or the last token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from repe.catalogue import Pairs, concept_of
from repe.pairs import ContrastPair, Text, check, split
from repe.tokens import encode

FEW = 64  # pairs to fit on: fewer leave the mean difference mostly noise in a thousand dimensions
BALANCE = 0.1  # how far the poles' mean lengths may differ: length itself is well represented, and would be found
UNEVEN = 1.5  # ratio of the lengths of one pair's poles
TELLING = 0.35  # difference of a word's shares in the two poles, above which one word makes up much of the direction
WORDING = 0.9  # share of held-out pairs that single words order rightly, above which they may be all that is found
SHOWN = 8

Words = Sequence[Any]


@dataclass(frozen=True)
class Audit:
    """What was found in contrast pairs, and what to do about it.

    Attributes:
        pairs, fit, held_out: how many pairs there are, are fitted on, and are held out.
        unit: what lengths count: "tokens", or "words" where no tokenizer was given.
        lengths: the mean length of the positive and of the negative poles.
        uneven: pairs, by number, of which one pole is more than half as long again as the other.
        telling: the words that give a pole away most: (word, its share of positives, its share of negatives).
        wording: the share of held-out pairs that a bag of words, fitted to the others, orders rightly; .5 is chance.
        endings: the share of pairs whose poles end in different tokens (words), where activations are read.
        repeated: pairs, by number, that are the same as an earlier one.
        contradicted: pairs, by number, with a text that is positive in one and negative in another.
        advice: what to do, a sentence each; none if nothing is wrong.
    """

    concept: str
    pairs: int
    fit: int
    held_out: int
    unit: str
    lengths: tuple[float, float]
    uneven: tuple[int, ...]
    telling: tuple[tuple[str, float, float], ...]
    wording: float
    endings: float
    repeated: tuple[int, ...]
    contradicted: tuple[int, ...]
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = ", ".join(f"{word!r} {p:.0%}/{n:.0%}" for word, p, n in self.telling)
        lines = [
            f"{self.concept}: {self.pairs} pairs, {self.fit} to fit on and {self.held_out} held out",
            f"  mean length, positive / negative: {self.lengths[0]:.1f} / {self.lengths[1]:.1f} {self.unit}",
            f"  pairs of uneven length: {len(self.uneven)}; repeated: {len(self.repeated)}; "
            f"contradicted: {len(self.contradicted)}",
            f"  pairs that end in different {self.unit}: {self.endings:.0%}",
            f"  held-out pairs that a bag of words orders rightly: {self.wording:.0%} (chance: 50%)",
            f"  words that tell most, in positives / in negatives: {told}",
        ]
        return "\n".join([*lines, *(f"  -> {sentence}" for sentence in self.advice or ("nothing to mend",))])

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def audit(pairs: Pairs, tokenizer: Any = None, *, held_out: float = 0.25, seed: int = 0) -> Audit:
    """Looks for what a direction could be instead of the concept. No model is needed.

    Args:
        pairs: contrast pairs, the path of a file of them, or the name of a concept.
        tokenizer: counts lengths and compares endings in its tokens, chats as its template renders them; words without.
        held_out, seed: as in `repe.extract`.

    Raises:
        ValueError: there are no pairs, or too few to hold some out.
    """
    concept = concept_of(pairs)
    check(concept.pairs)
    fit, held = split(concept.pairs, held_out, seed)
    cut: Callable[[Text], Words] = _words if tokenizer is None else lambda text: encode(tokenizer, text)
    positives, negatives = ([cut(getattr(p, pole)) for p in concept.pairs] for pole in ("positive", "negative"))
    lengths = [(len(p), len(n)) for p, n in zip(positives, negatives, strict=True)]
    found = Audit(
        concept=concept.name,
        pairs=len(concept.pairs),
        fit=len(fit),
        held_out=len(held),
        unit="words" if tokenizer is None else "tokens",
        lengths=(float(np.mean([p for p, _ in lengths])), float(np.mean([n for _, n in lengths]))),
        uneven=_where(max(pair) > UNEVEN * min(pair) for pair in lengths),
        telling=_telling(concept.pairs),
        wording=_wording(fit, held),
        endings=float(np.mean([p[-1] != n[-1] for p, n in zip(positives, negatives, strict=True)])),
        repeated=_repeated(concept.pairs),
        contradicted=_contradicted(concept.pairs),
    )
    return replace(found, advice=tuple(_advice(found, concept.wording)))


def _advice(a: Audit, reason: str) -> list[str]:
    """What is wrong, in the order in which it is best mended."""
    positive, negative = a.lengths
    loud = [word for word, p, n in a.telling if abs(p - n) > TELLING]
    rules: list[tuple[Any, str]] = [
        (a.repeated, f"{len(a.repeated)} pairs stand there twice and count double: leave them out"),
        (
            a.contradicted,
            f"{len(a.contradicted)} pairs have a text that stands at the other pole elsewhere: decide which it is",
        ),
        (a.fit < FEW, f"only {a.fit} pairs to fit on: {FEW} or more make a direction that is not mostly noise"),
        (
            abs(log(positive / negative)) > log(1 + BALANCE),
            f"the poles differ in length, {positive:.1f} against {negative:.1f} {a.unit}, and the direction may be "
            f"that: bring them within {BALANCE:.0%}",
        ),
        (
            a.uneven,
            f"{len(a.uneven)} pairs have one pole more than half as long again as the other, such as pair "
            f"{min(a.uneven, default=0)}: even them out",
        ),
        (
            a.endings > 0,
            f"{a.endings:.0%} of the pairs end in different {a.unit}, and activations are read at the last: give both "
            "poles the same ending, or chats that end with the user",
        ),
        (loud, f"single words give the poles away ({', '.join(loud)}): say it in other words too"),
        (
            a.wording > WORDING,
            f"a bag of words orders {a.wording:.0%} of the held-out pairs rightly, so the direction may be the "
            "wording: hold out templates and items that share no telling words with the rest"
            + (f" (the file says: {reason})" if reason else ""),
        ),
    ]
    return [sentence for applies, sentence in rules if applies]


def _telling(pairs: Sequence[ContrastPair]) -> tuple[tuple[str, float, float], ...]:
    """The words whose shares in the two poles differ most."""
    positives, negatives = (
        Counter(word for pair in pairs for word in {w.lower() for w in _words(getattr(pair, pole)) if w[0].isalnum()})
        for pole in ("positive", "negative")
    )
    words = sorted(positives | negatives, key=lambda w: (-abs(positives[w] - negatives[w]), w))
    return tuple((w, positives[w] / len(pairs), negatives[w] / len(pairs)) for w in words[:SHOWN])


def _wording(fit: Sequence[ContrastPair], held: Sequence[ContrastPair]) -> float:
    """The share of held-out pairs that logistic regression on single words orders rightly; ties count half."""
    counter = CountVectorizer(binary=True, token_pattern=r"\w+")
    seen = counter.fit_transform([_flat(text) for pair in fit for text in (pair.positive, pair.negative)])
    model = LogisticRegression(max_iter=10_000).fit(seen, np.tile([1, 0], len(fit)))
    scores = model.decision_function(
        counter.transform([_flat(text) for pair in held for text in (pair.positive, pair.negative)])
    )
    positive, negative = scores[0::2], scores[1::2]
    return float(np.where(np.isclose(positive, negative), 0.5, positive > negative).mean())


def _repeated(pairs: Sequence[ContrastPair]) -> tuple[int, ...]:
    first: dict[tuple[str, str], int] = {}
    keys = [(_flat(pair.positive), _flat(pair.negative)) for pair in pairs]
    return _where(first.setdefault(key, i) < i for i, key in enumerate(keys))


def _contradicted(pairs: Sequence[ContrastPair]) -> tuple[int, ...]:
    positives, negatives = {_flat(pair.positive) for pair in pairs}, {_flat(pair.negative) for pair in pairs}
    return _where(_flat(pair.positive) in negatives or _flat(pair.negative) in positives for pair in pairs)


def _where(truths: Iterable[Any]) -> tuple[int, ...]:
    return tuple(i for i, truth in enumerate(truths) if truth)


def _flat(text: Text) -> str:
    """A text, or a chat with its speakers."""
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)


def _words(text: Text) -> Words:
    """Words and signs; of a chat that waits for an answer the last is the one who is to give it."""
    if isinstance(text, str):
        return re.findall(r"\w+|[^\w\s]", text)
    waits = ["assistant"] if text[-1]["role"] != "assistant" else []
    return [word for message in text for word in re.findall(r"\w+|[^\w\s]", message["content"])] + waits
