"""Pictures of a text: the scores of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np

from repe.plot import axes
from repe.plot.text import by_name, concept_of, literal, word

if TYPE_CHECKING:
    from repe.reading.read import Reading

    Readings: TypeAlias = Reading | Sequence[Reading] | Mapping[str, Reading]


def scan(reading: Reading, ax: Any = None) -> Any:
    """Draw the scores of a text, tokens by blocks: white is the middle, the poles stand at -1 and +1.

    Recommended blocks are in bold; grey is where there is no score, as of attention sinks. Where there is no room for
    all names of tokens or blocks, every second or third is left.
    """
    shown = [word(token) for token in reading.tokens]
    wide, high = 1.6 + 0.17 * len(shown), 0.28 * len(reading.blocks)
    ax = axes.given(ax, (min(max(4.0, wide), 12.0), 1 + min(high, 6.0) + 0.08 * max(map(len, shown))))
    colors = plt.get_cmap(axes.DIVERGING).with_extremes(bad=axes.FAINT)
    image = ax.imshow(reading.told.scores.T.numpy(), cmap=colors, vmin=-2, vmax=2, aspect="auto", origin="lower")
    axes.name_cells(ax.xaxis, shown, ax.bbox.width, rotation=90)
    axes.name_cells(ax.yaxis, [str(b) for b in reading.blocks], ax.bbox.height)
    for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if reading.blocks[int(tick)] in reading.recommended else "normal")
    ax.set(ylabel="block")
    axes.entitle(ax, f"{reading.concept}, token by token")
    ax.figure.colorbar(image, ax=ax, pad=0.02, label=axes.SCORE, extend="both")
    return ax


def tokens(readings: Readings, ax: Any = None, *, block: int | None = None) -> Any:
    """Draw the score of every token of a text, as a line; or of several texts or concepts, a line each.

    Where texts differ, a place is named after the tokens of both, or numbered where there are more than two. Attention
    sinks are left out.

    Args:
        readings: a reading, a list, or a mapping from the names that the legend gives them.
        ax: the axes to draw on.
        block: where they were read; the recommended blocks by default.
    """
    named = by_name(readings)
    lines = {name: reading.told.at(block).numpy() for name, reading in named.items()}
    names = _places([reading.tokens for reading in named.values()])
    ax = axes.given(ax, (min(max(axes.SIZE[0], 1.2 + 0.17 * len(names)), 12.0), 3.2 + 0.08 * max(map(len, names))))
    for (name, scores), look in zip(lines.items(), axes.looks(len(lines)), strict=True):
        ax.plot(scores, **look | ({"color": axes.ink()} if len(lines) == 1 else {}), label=name)
    if len(lines) == 1:
        for color, side in ((axes.POSITIVE, np.fmax(scores, 0)), (axes.NEGATIVE, np.fmin(scores, 0))):
            ax.bar(range(len(scores)), side, width=1, color=(color, 0.55))
    else:
        literal(ax.legend(loc="best", fontsize="small").get_texts())
    axes.at_the_poles(ax.axhline)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=_reach(list(lines.values())), ylabel=axes.SCORE)
    axes.name_cells(ax.xaxis, names, ax.bbox.width, rotation=90)
    axes.entitle(ax, f"{concept_of(named, 'scores')}{_where(named, block)}, token by token")
    axes.beside(ax, {"positive pole": 1, "negative pole": -1})
    return ax


def _where(named: Mapping[str, Reading], block: int | None) -> str:
    read_at = {reading.recommended if block is None else (block,) for reading in named.values()}
    (blocks,) = read_at if len(read_at) == 1 else [()]
    return f" at block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}" if blocks else ""


def _reach(lines: Sequence[Any]) -> tuple[float, float]:
    """The limits of the scores: wide enough for the poles and for all of them."""
    scores = np.concatenate([*lines, [-1.0, 1.0]])
    low, high = np.quantile(scores[np.isfinite(scores)], [0, 1])
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def _places(texts: Sequence[Sequence[str]]) -> list[str]:
    """What every place is called: its token, the tokens of two texts, or its number."""
    columns = [list(dict.fromkeys(word(token) for token in c if token is not None)) for c in zip_longest(*texts)]
    return [" | ".join(column) if len(column) <= 2 else str(i) for i, column in enumerate(columns)]
