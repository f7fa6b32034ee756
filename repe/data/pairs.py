"""Contrast pairs: two texts, or chats, that differ in the concept alone, checked and split.

Nothing here knows a tokenizer or a model. A text is a string; a chat is a sequence of `{"role", "content"}` messages.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repe.models.chats import checked

if TYPE_CHECKING:
    from repe.models.tokens import Text

POLES = ("positive", "negative")
LEAST = 2  # pairs to fit on, and to hold out: fewer have no spread


@dataclass(frozen=True)
class ContrastPair:
    """Two texts (or chats) that differ in the concept alone, and what they were made of.

    `template` and `item` name what is shared with other pairs and must not stand on both sides of a split.
    `held_out` None means that it is not decided; `split` then does.

    Example:
        >>> repe.ContrastPair("I tell the truth.", "I tell lies.", item="statement").item
        'statement'
    """

    positive: Text
    negative: Text
    template: str = ""
    item: str = ""
    held_out: bool | None = None

    def __post_init__(self) -> None:
        for pole in POLES:
            if isinstance(getattr(self, pole), list):
                object.__setattr__(self, pole, tuple(getattr(self, pole)))


def check(pairs: Sequence[ContrastPair]) -> None:
    """Check that there are pairs and that each has two poles that differ.

    Raises:
        ValueError: otherwise; it names the pair.
        TypeError: there is something else among them.
    """
    if not pairs:
        raise ValueError("no contrast pairs: at least one is needed")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, ContrastPair):
            raise TypeError(f"pair {index} is a {type(pair).__name__}: expected ContrastPair(positive, negative)")
        check_pair(pair, _name(pair, index))


def split(
    pairs: Sequence[ContrastPair], held_out: float = 0.25, seed: int = 0
) -> tuple[tuple[ContrastPair, ...], tuple[ContrastPair, ...]]:
    """The pairs to fit on and the pairs held out, as the pairs themselves decide, else drawn by `seed`.

    Drawn, a share `held_out` of the templates and of the items is held out: what is fitted on has none of them, what
    is held out has both, and other pairs are left out. With one template (or none named) only items are held out, with
    one item only templates. An item without a name is its pair's own.

    Raises:
        ValueError: the share is not within (0, 1), only some of the pairs are decided, or fewer than two pairs would be
            fitted on or held out.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of templates and items held out, between 0 and 1: got {held_out}")
    check(pairs)
    decided = sum(pair.held_out is not None for pair in pairs)
    if 0 < decided < len(pairs):
        raise ValueError(f"held_out is decided for {decided} of {len(pairs)} pairs: decide it for all of them or none")

    sides = [pair.held_out for pair in pairs] if decided else _draw_sides(pairs, held_out, random.Random(seed))
    fit = tuple(pair for pair, side in zip(pairs, sides, strict=True) if side is False)
    held = tuple(pair for pair, side in zip(pairs, sides, strict=True) if side is True)
    if min(len(fit), len(held)) < LEAST:
        raise ValueError(
            f"{len(pairs)} pairs split into {len(fit)} to fit on and {len(held)} held out, and at least {LEAST} of "
            "each are needed, with no template or item in both: give more items or templates, or decide held_out"
        )
    return fit, held


# Splitting


def _draw_sides(pairs: Sequence[ContrastPair], share: float, rng: random.Random) -> list[bool | None]:
    """Whether each pair is held out; None for one that is left out."""
    places = [(pair.template, (pair.item, 0 if pair.item else index)) for index, pair in enumerate(pairs)]
    templates, items = zip(*places, strict=True)
    template_sides = _draw(templates, share, rng) if len(set(templates)) > 1 else {}
    # An item that stands on one side of the templates only cannot leak, and goes with them.
    held = [item for template, item in places if template_sides.get(template) is not False]
    rest = {item for template, item in places if template_sides.get(template) is not True}
    contested = [item for item in held if item in rest]
    item_sides = _draw(contested, share, rng) if len(set(items)) > 1 else {}
    sides = [(template_sides.get(template), item_sides.get(item)) for template, item in places]
    return [None if leaks(*side) else either(*side) for side in sides]


def _draw(names: Sequence[Any], share: float, rng: random.Random) -> dict[Any, bool]:
    """Which of the names are held out: a share of them, for at least LEAST pairs, but never all of several."""
    pairs = Counter(names)
    order = rng.sample(sorted(pairs), len(pairs))
    most = max(1, len(order) - 1)
    count = min(max(1, round(share * len(order))), most)
    while count < most and sum(pairs[name] for name in order[:count]) < LEAST:
        count += 1
    return {name: rank < count for rank, name in enumerate(order)}


def leaks(template_side: bool | None, item_side: bool | None) -> bool:
    """Whether a pair would have one part held out and the other not."""
    return {template_side, item_side} == {True, False}


def either(template_side: bool | None, item_side: bool | None) -> bool | None:
    """What the two say together of whether a pair is held out."""
    return item_side if template_side is None else template_side


# Checking


def _name(pair: ContrastPair, index: int) -> str:
    parts = [f"template {pair.template!r}"] * bool(pair.template) + [f"item {pair.item!r}"] * bool(pair.item)
    return f"pair {index}" + (f" ({', '.join(parts)})" if parts else "")


def check_pair(pair: ContrastPair, where: str) -> None:
    """Raises ValueError, which begins with `where`, if the poles are not two texts, or chats, that differ."""
    for pole in POLES:
        check_text(getattr(pair, pole), f"{where}: {pole}")
    if isinstance(pair.positive, str) != isinstance(pair.negative, str):
        raise ValueError(f"{where}: one pole is a text and the other a chat, and both must be alike")
    if pair.positive == pair.negative:
        raise ValueError(f"{where}: the positive and the negative are identical, so they have no concept between them")


def check_text(text: object, where: str) -> None:
    """Raises ValueError if this is neither a text nor a chat, or empty."""
    if isinstance(text, str):
        contents = [text]
    elif isinstance(text, Sequence):
        contents = [checked(message, f"{where}: message {number}")["content"] for number, message in enumerate(text)]
    else:
        raise ValueError(f"{where} must be a text or a list of messages, and is {text!r}")
    if not any(content.strip() for content in contents):
        raise ValueError(f"{where} is empty")
