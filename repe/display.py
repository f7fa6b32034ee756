"""How objects show themselves: HTML for notebooks, and text in colour for terminals.

The HTML needs no script, no other file and no theme: grounds are translucent, and letters keep the colour that text has
where it is shown. Whatever is given is escaped. Purple is more of a concept, orange is less, as in the pictures.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MORE, LESS = (94, 60, 153), (230, 97, 1)
FULL = 0.6  # how opaque the ground of the strongest score is: letters stay legible on it, dark or light
STRONGEST = 2.0  # score; the poles stand at 1
STEEPNESS = 0.6  # below 1, as weak scores are the many
SAMPLES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
# of the 256 colours of terminals, from weak to strong: light enough for black letters, dark enough for any ground
MORE_OF_256, LESS_OF_256, BLACK_OF_256 = (146, 141, 99), (180, 215, 208), 16
STEPS = (0.25, 0.75, 1.5)  # scores from which a colour is shown
ROWS = 12  # of a table, at most


# HTML


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table under its title, over a note."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    caption = '<caption style="text-align: left; white-space: nowrap">'
    under = f"<p>{escape(note)}</p>" if note else ""
    return f"<table>{caption}<b>{escape(title)}</b></caption><tr>{head}</tr>{body}</table>{under}"


def tokens(title: str, words: Sequence[str], scores: Sequence[float]) -> str:
    """A text, the score of every token its ground and its tooltip, under a title and a legend."""
    spans = "".join(_span(word, score, i) for i, (word, score) in enumerate(zip(words, scores, strict=True)))
    legend = " ".join(f'<span style="{_ground(s)}">&nbsp;{_signed(s)}&nbsp;</span>' for s in SAMPLES)
    head = f'<div style="margin-bottom: 0.3em"><b>{escape(title)}</b> &nbsp; <small>score {legend}</small></div>'
    return f'<div>{head}<div style="white-space: pre-wrap; line-height: 1.8">{spans}</div></div>'


def _span(word: str, score: float, place: int) -> str:
    said = f"token {place}: {_signed(score)}"
    return f'<span title="{said}" style="{_ground(score)}">{escape(_visible(word))}</span>'


def _ground(score: float) -> str:
    if math.isnan(score):
        return "border-bottom: 1px dotted"
    red, green, blue = MORE if score > 0 else LESS
    opacity = FULL * min(abs(score) / STRONGEST, 1) ** STEEPNESS
    return f"background-color: rgba({red}, {green}, {blue}, {opacity:.2f}); border-radius: 2px; padding: 2px 0"


def _signed(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score:+.2g}" if score else "0"


# terminals


def colored(reading: Any, *, block: int | None = None, color: bool = True) -> str:
    """The text that was read, every token on the colour of its score, over a legend.

    Args:
        reading: what `repe.read` returned.
        block: where it was read; the recommended blocks by default.
        color: False for plain text, where the scores that would be in colour stand behind their tokens in brackets.
    """
    scores = reading.at(block).tolist()
    paint = _painted if color else _marked
    text = "".join(paint(word, score) for word, score in zip(reading.tokens, scores, strict=True))
    return f"{text}\n\n{_plain(_titled(reading, block))}: {_legend(color)}"


def _painted(word: str, score: float) -> str:
    """The token on its colour, which ends with the line: terminals would fill the rest of it."""
    level = _level(score)
    if not level:
        return _visible(word)
    ground = (MORE_OF_256 if score > 0 else LESS_OF_256)[level - 1]
    begin, end = f"\x1b[38;5;{BLACK_OF_256};48;5;{ground}m", "\x1b[0m"
    return "\n".join(f"{begin}{line}{end}" if line else "" for line in _visible(word).split("\n"))


def _marked(word: str, score: float) -> str:
    word = _visible(word)
    if not _level(score):
        return word
    end = len(word.rstrip("\n"))
    return f"{word[:end]}[{score:+.1f}]{word[end:]}"


def _level(score: float) -> int:
    """How strong a score is: 0, which has no colour, to 3."""
    return sum(abs(score) >= step for step in STEPS)


def _legend(color: bool) -> str:
    if not color:
        return f"[score] beyond ±{STEPS[0]:g}, poles at ±1"
    samples = [*(-step for step in reversed(STEPS)), *STEPS]
    return " ".join(_painted(f" {sample:+g} ", sample) for sample in samples) + " poles at ±1"


def _visible(word: str) -> str:
    """A token as it can be seen: what ends a line with a mark, what steers a terminal or turns the writing as code."""
    if not word:
        return "·"
    return "".join("↵\n" if c == "\n" else c if c == "\t" else _plain(c) for c in word)


def _plain(text: str) -> str:
    return "".join(_coded(c) if unicodedata.category(c) == "Cc" or c in TURNING else c for c in text)


TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _coded(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


# what is shown of each


def of_reading(reading: Any, block: int | None = None) -> str:
    return tokens(_titled(reading, block), reading.tokens, reading.at(block).tolist())


def _titled(reading: Any, block: int | None) -> str:
    blocks = reading.recommended if block is None else (block,)
    return f"{reading.concept} at {_blocks(blocks)}"


def of_vector(vector: Any) -> str:
    """A table of the blocks, or of some, evenly spread, and the recommended."""
    count = len(vector.blocks)
    spread = {round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)} if count > ROWS else set(range(count))
    rows = sorted(spread | {vector.row(block) for block in vector.recommended}, key=lambda row: vector.blocks[row])
    where = "" if vector.site == "block" else f", at the site {vector.site!r}"
    title = f"{vector.concept}: {_many(count, 'block')} x {vector.d_model}{where}"
    heads = ["block", "accuracy", "separation (sigmas)", "scale", "norm"]
    return table(title, heads, [_row(vector, row) for row in rows], _provenance(vector.provenance))


def _row(vector: Any, row: int) -> list[str]:
    block = vector.blocks[row]
    accuracy, *others = (float(t[row]) for t in (vector.accuracy, vector.separation, vector.scale, vector.norm))
    mark = " ← recommended" if block in vector.recommended else ""
    return [f"{block}{mark}", _number(accuracy, ".2f"), *(_number(value, ".3g") for value in others)]


def _provenance(made: Mapping[str, Any]) -> str:
    said = ("made", "reader", "pairs", "held_out_pairs", "model")
    return ", ".join(f"{key.replace('_', ' ')}: {made[key]}" for key in said if key in made)


def _blocks(blocks: Sequence[int]) -> str:
    return f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"


def _many(count: int, one: str) -> str:
    return f"{count} {one}{'s' * (count != 1)}"


def _number(value: float, how: str) -> str:
    return "unknown" if math.isnan(value) else format(value, how)
