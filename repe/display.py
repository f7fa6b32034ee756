"""How things are shown: tables and coloured tokens, as text for terminals and as HTML for notebooks.

What is shown are strings and numbers; no class of the library is known here. The HTML needs no script, no other file
and no theme: grounds are translucent, and letters keep the colour that text has where it is shown. Whatever is given is
escaped. Purple is more of a concept, orange is less, as in the pictures.
"""

from __future__ import annotations

import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ENDLESS = 10**9  # columns


# progress

MINUTE = 60
SOON = 2.0  # seconds before a bar that nobody asked for is shown


def bar_of(*args: Any, progress: bool | None, **how: Any) -> Any:
    """A bar of tqdm, which takes the other arguments.

    Without a wish, it is there where somebody is looking, while it takes long, and TQDM_DISABLE is heard.
    """
    from tqdm import tqdm

    if progress is None and is_wanted(progress):
        return tqdm(*args, delay=SOON, leave=False, **how)
    return tqdm(*args, disable=not progress, **how)


def is_wanted(progress: bool | None) -> bool:
    """Whether progress is to be shown: as is said, else if standard error is a terminal or a notebook's."""
    if progress is None:
        return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
    return progress


def say(text: str, *, progress: bool | None) -> None:
    """A line for whoever sees the bars."""
    from tqdm import tqdm

    if is_wanted(progress) and (progress or not os.environ.get("TQDM_DISABLE")):
        tqdm.write(text, file=sys.stderr)


def about(seconds: float) -> str:
    """A time in the unit that suits it.

    Example:
        >>> about(48.7), about(200)
        ('about 49 s', 'about 3 min')
    """
    return f"about {seconds:.0f} s" if seconds < 2 * MINUTE else f"about {seconds / MINUTE:.0f} min"


def _coded(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def visible(text: str, spared: str = "\n\t", coded: Callable[[str], str] = _coded) -> str:
    """A text in which nothing steers a terminal or turns the writing: such characters stand as code."""
    return "".join(coded(c) if c not in spared and _acts(c) else c for c in text)


def _acts(letter: str) -> bool:
    """Whether it is no letter to be seen, but one that controls, ends a line, or turns the writing."""
    return letter in TURNING or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Table:
    """Rows of cells under their heads, over a note: as text in columns, and as HTML. Made by `table`."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def text(self, width: int = ENDLESS) -> str:
        """In columns; where `width` is too narrow for them, the last is broken between words."""
        parts = (self.title, self._columns(width), self.note)
        return "\n".join(part for part in parts if part)

    def html(self) -> str:
        """With the title as the caption, and the note below."""
        title = f'<caption style="text-align: left; white-space: nowrap"><b>{escape(self.title)}</b></caption>'
        body = "".join(_row("td", row) for row in self.rows)
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<table>{title}{_row('th', self.heads)}{body}</table>{note}"

    def _columns(self, width: int) -> str:
        from rich.console import Console
        from rich.table import Table as Grid

        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(self.heads))
        for place, head in enumerate(self.heads, start=1):
            grid.add_column(head, no_wrap=place < len(self.heads))
        for row in self.rows:
            grid.add_row(*row)
        plain = Console(width=width, markup=False, emoji=False, highlight=False, color_system=None, force_jupyter=False)
        with plain.capture() as printed:
            plain.print(grid)
        return "\n".join(line.rstrip() for line in printed.get().removesuffix("\n").split("\n"))

    __str__ = text
    _repr_html_ = html


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> Table:
    """A table of whatever has a `str`, each cell a line.

    Example:
        >>> print(table("two blocks", ["block", "accuracy"], [[3, 0.98], [11, 0.7]], "on 40 pairs"))
        two blocks
        block  accuracy
        3      0.98
        11     0.7
        on 40 pairs
    """
    cells = tuple(tuple(visible(str(cell), "") for cell in row) for row in (heads, *rows))
    return Table(visible(title, ""), cells[0], cells[1:], visible(note))


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


@dataclass(frozen=True)
class Tokens:
    """A text, token by token, the score of each its ground: coloured text, and HTML. Made by `tokens`."""

    title: str
    words: tuple[str, ...]
    scores: tuple[float, ...]

    def text(self, *, color: bool = True) -> str:
        """Over a legend; without colour the scores that would be in colour stand behind their tokens in brackets."""
        paint = _painted if color else _marked
        words = "".join(paint(word, score) for word, score in zip(self.words, self.scores, strict=True))
        return f"{words}\n\n{self.title}: {_legend(color)}"

    def html(self) -> str:
        """Under the title and a legend; every token has its score for a tooltip."""
        spans = "".join(_span(i, *token) for i, token in enumerate(zip(self.words, self.scores, strict=True)))
        legend = " ".join(f'<span style="{_ground(s)}">&nbsp;{_signed(s)}&nbsp;</span>' for s in SAMPLES)
        title = f"<b>{escape(self.title)}</b> &nbsp; <small>score {legend}</small>"
        head, body = "margin-bottom: 0.3em", "white-space: pre-wrap; line-height: 1.8"
        return f'<div><div style="{head}">{title}</div><div style="{body}">{spans}</div></div>'

    _repr_html_ = html


def tokens(title: str, words: Iterable[str], scores: Iterable[float]) -> Tokens:
    """The tokens of a text and their scores; the poles stand at -1 and +1, and NaN is no score."""
    return Tokens(visible(title, ""), tuple(map(_legible, words)), tuple(scores))


def _legible(word: str) -> str:
    """A token as it can be seen: the end of a line has a mark, and nothing is a dot."""
    return visible(word).replace("\n", "↵\n") or "·"


# HTML


def _span(place: int, word: str, score: float) -> str:
    return f'<span title="token {place}: {_signed(score)}" style="{_ground(score)}">{escape(word)}</span>'


def _ground(score: float) -> str:
    if math.isnan(score):
        return "border-bottom: 1px dotted"
    red, green, blue = MORE if score > 0 else LESS
    opacity = FULL * min(abs(score) / STRONGEST, 1) ** STEEPNESS
    return f"background-color: rgba({red}, {green}, {blue}, {opacity:.2f}); border-radius: 2px; padding: 2px 0"


def _signed(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score:+.2g}" if score else "0"


# terminals


def _painted(word: str, score: float) -> str:
    """The token on its colour, which ends with the line: terminals would fill the rest of it."""
    from rich.color import ColorSystem
    from rich.style import Style

    if not (level := _level(score)):
        return word
    ground = (MORE_OF_256 if score > 0 else LESS_OF_256)[level - 1]
    style = Style.parse(f"color({BLACK_OF_256}) on color({ground})")
    return "\n".join(style.render(line, color_system=ColorSystem.EIGHT_BIT) for line in word.split("\n"))


def _marked(word: str, score: float) -> str:
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
