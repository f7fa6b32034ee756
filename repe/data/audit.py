"""Auditing contrast pairs: whether a direction found from them could be the wording, the length or the last token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import log
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from repe.data.catalogue import Pairs, concept_of
from repe.data.pairs import ContrastPair, check, split

if TYPE_CHECKING:
    from repe.models.tokens import Text

FEW = 64  # pairs to fit on: fewer leave the mean difference mostly noise in a thousand dimensions
BALANCE = 0.1  # how far the poles' mean lengths may differ: length itself is well represented, and would be found
UNEVEN = 1.5  # ratio of the lengths of one pair's poles
TELLING = 0.35  # difference of a word's shares in the two poles, above which one word makes up much of the direction
WORDING = 0.9  # share of held-out pairs that single words order rightly, above which they may be all that is found
SHOWN = 8
WIDTH = 100  # of a line in a notebook, in letters

# Scripts without spaces (Thai to Khmer, kana, Chinese) and emoji: every character counts as a word.
ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
ALONE += "\U0001f000-\U0001faff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+")
WORD_OR_SIGN = re.compile(rf"{WORD.pattern}|[^\w\s]")

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
        wording: the share of held-out pairs that a bag of words, fitted to the others, orders rightly; .5 is chance,
            and far below it the words tell as much, the other way round.
        endings: the share of pairs whose poles end in different tokens (words), where activations are read.
        repeated: pairs, by number, that are the same as an earlier one.
        contradicted: pairs, by number, with a text that is positive in one and negative in another.
        seen_items, seen_templates: the names of those that pairs to fit on and pairs held out share, where the pairs
            say themselves which are held out.
        advice: what to do, a sentence each; none if nothing is wrong.

    Example:
        >>> repe.audit("honesty").advice
        ()
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
    seen_items: tuple[str, ...] = ()
    seen_templates: tuple[str, ...] = ()
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
            f"  words that tell most, in positives / in negatives: {told or 'none'}",
        ]
        return "\n".join([*lines, *(f"  -> {sentence}" for sentence in self.advice or ("nothing to mend",))])

    def _repr_html_(self) -> str:
        lines = (fill(line, WIDTH, subsequent_indent="     ") for line in str(self).splitlines())
        return f"<pre style='font-family: monospace'>{escape(chr(10).join(lines))}</pre>"


def audit(pairs: Pairs, tokenizer: Any = None, *, model: Any = None, held_out: float = 0.25, seed: int = 0) -> Audit:
    """Look for what a direction could be instead of the concept. Nothing is run.

    Args:
        pairs: contrast pairs, the path of a file of them, or the name of a concept.
        tokenizer: counts lengths and compares endings in its tokens, chats as its template renders them; words without.
        model: the one whose own concept a name means first; without, a name means the library's.
        held_out, seed: as in `repe.extract`.

    Raises:
        ValueError: there are no pairs, or too few to hold some out; or the concept is not known.
        TypeError: what is given as pairs, or as a tokenizer, is none.
        FileNotFoundError: the file of pairs is not there.

    Example:
        >>> print(str(repe.audit("honesty")).splitlines()[0])
        honesty: ...
    """
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"got {tokenizer!r:.60} for a tokenizer: expected one as `repe.load` returns, or None")
    from repe.models.load import home_of
    from repe.models.tokens import encode

    concept = concept_of(pairs, home_of(model))
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
        lengths=(fmean(p for p, _ in lengths), fmean(n for _, n in lengths)),
        uneven=_where(max(pair) > UNEVEN * min(pair) for pair in lengths),
        telling=_telling(concept.pairs),
        wording=_wording(fit, held),
        endings=fmean(p[-1] != n[-1] for p, n in zip(positives, negatives, strict=True)),
        repeated=_repeated(concept.pairs),
        contradicted=_contradicted(concept.pairs),
        seen_items=_seen(fit, held, "item"),
        seen_templates=_seen(fit, held, "template"),
    )
    return replace(found, advice=tuple(_advice(found, concept.wording)))


def _advice(a: Audit, reason: str) -> Iterator[str]:
    """What is wrong, in the order in which it is best mended."""
    if a.repeated:
        stand = _many(len(a.repeated), "pair stands", "pairs stand")
        yield f"{stand} there twice, at double weight: leave one out"
    if a.contradicted:
        have = _many(len(a.contradicted), "pair has", "pairs have")
        yield f"{have} a text that stands at the other pole elsewhere: decide which it is"
    for part, seen in (("item", a.seen_items), ("template", a.seen_templates)):
        if seen:
            stand = _many(len(seen), f"{part} stands", f"{part}s stand")
            yield f"{stand} on both sides of the split: the accuracy is partly of texts seen"
    if a.fit < FEW:
        yield f"only {_many(a.fit, 'pair')} to fit on: {FEW} or more make a direction that is not mostly noise"
    positive, negative = a.lengths
    if abs(log(positive / negative)) > log(1 + BALANCE):
        yield (
            f"the poles differ in length, {positive:.1f} against {negative:.1f} {a.unit}, and the direction may be "
            f"that: bring them within {BALANCE:.0%}"
        )
    if a.uneven:
        have = _many(len(a.uneven), "pair has", "pairs have")
        yield f"{have} one pole more than half as long again as the other, such as pair {a.uneven[0]}: even them out"
    if endings := round(a.endings * a.pairs):
        yield (
            f"{endings} of {_many(a.pairs, 'pair')} ({a.endings:.0%}) {'ends' if endings == 1 else 'end'} in different "
            f"{a.unit}, and activations are read at the last: give both poles the same ending, or chats that end with "
            "the user"
        )
    if loud := [word for word, p, n in a.telling if abs(p - n) > TELLING]:
        yield f"single words give the poles away ({', '.join(loud)}): say it in other words too"
    if abs(a.wording - 0.5) > WORDING - 0.5:
        turned = "" if a.wording > 0.5 else " (the words point the other way there, which tells as much)"
        quoted = f" (the file says: {reason})" if reason else ""
        yield (
            f"a bag of words orders {a.wording:.0%} of the held-out pairs rightly{turned}, so the direction may be the "
            f"wording: hold out templates and items that share no telling words with the rest{quoted}"
        )


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _telling(pairs: Sequence[ContrastPair]) -> tuple[tuple[str, float, float], ...]:
    """The words whose shares in the two poles differ, those first that differ most."""
    positives, negatives = (
        Counter(word for pair in pairs for word in {w.lower() for w in _words(getattr(pair, pole)) if WORD.match(w)})
        for pole in ("positive", "negative")
    )
    unequal = [word for word in positives | negatives if positives[word] != negatives[word]]
    words = sorted(unequal, key=lambda w: (-abs(positives[w] - negatives[w]), w))
    return tuple((w, positives[w] / len(pairs), negatives[w] / len(pairs)) for w in words[:SHOWN])


def _wording(fit: Sequence[ContrastPair], held: Sequence[ContrastPair]) -> float:
    """The share of held-out pairs that logistic regression on single words orders rightly; ties count half."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    seen, unseen = ([_flat(text) for pair in side for text in (pair.positive, pair.negative)] for side in (fit, held))
    if not any(map(WORD.search, seen)):
        return 0.5
    counter = CountVectorizer(binary=True, token_pattern=WORD.pattern)
    reader = LogisticRegression(max_iter=10_000).fit(counter.fit_transform(seen), [1, 0] * len(fit))
    scores = reader.decision_function(counter.transform(unseen))
    positive, negative = scores[0::2], scores[1::2]
    return float(np.where(np.isclose(positive, negative), 0.5, positive > negative).mean())


def _repeated(pairs: Sequence[ContrastPair]) -> tuple[int, ...]:
    first: dict[tuple[str, str], int] = {}
    keys = [(_flat(pair.positive), _flat(pair.negative)) for pair in pairs]
    return _where(first.setdefault(key, i) < i for i, key in enumerate(keys))


def _contradicted(pairs: Sequence[ContrastPair]) -> tuple[int, ...]:
    positives, negatives = {_flat(pair.positive) for pair in pairs}, {_flat(pair.negative) for pair in pairs}
    return _where(_flat(pair.positive) in negatives or _flat(pair.negative) in positives for pair in pairs)


def _seen(fit: Sequence[ContrastPair], held: Sequence[ContrastPair], part: str) -> tuple[str, ...]:
    """The templates (or items) on both sides of a split that the pairs decide, unless there is but one."""
    sides = [{getattr(pair, part) for pair in side} for side in (fit, held)]
    decided = any(pair.held_out is not None for pair in fit)
    return tuple(sorted((sides[0] & sides[1]) - {""})) if decided and len(sides[0] | sides[1]) > 1 else ()


def _where(truths: Iterable[Any]) -> tuple[int, ...]:
    return tuple(i for i, truth in enumerate(truths) if truth)


def _flat(text: Text) -> str:
    """A text, or a chat with its speakers."""
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)


def _words(text: Text) -> Words:
    """Words and signs; of a chat that waits for an answer the last is the one who is to give it."""
    if isinstance(text, str):
        return WORD_OR_SIGN.findall(text)
    waits = text[-1]["role"] != "assistant" or not text[-1]["content"].strip()
    return [word for m in text for word in WORD_OR_SIGN.findall(m["content"])] + ["assistant"] * waits
