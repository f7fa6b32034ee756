"""Pictures on matplotlib axes. Every function takes the axes to draw on, makes them where none are given, and returns
them; what is drawn was computed elsewhere, and what was not measured is left out. Purple is more of a concept and
orange is less, in every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from repe.measuring.intervals import Array
from repe.plot.activations import pairs as pairs
from repe.plot.activations import poles as poles
from repe.plot.axes import (
    ALIGNED,
    DIVERGING,
    FAINT,
    NEGATIVE,
    POSITIVE,
    SCORE,
    SIZE,
    axes_of,
    beside,
    entitle,
    ink,
    legend,
    looks,
    name_cells,
    ring,
)
from repe.plot.axes import moved_apart as moved_apart
from repe.plot.curve import calibration as calibration
from repe.plot.curve import costs as costs
from repe.plot.curve import efficient_window as efficient_window
from repe.plot.curve import frontier as frontier
from repe.plot.curve import tradeoff as tradeoff
from repe.plot.text import literal, short, word

if TYPE_CHECKING:
    from repe.reading.read import Reading
    from repe.reading.vector import ConceptVector

    Vectors: TypeAlias = ConceptVector | Sequence[ConceptVector] | Mapping[str, ConceptVector]
    Readings: TypeAlias = Reading | Sequence[Reading] | Mapping[str, Reading]

FEW = 12  # cells of a side, whose values are written


# where a concept is read, and by what


def profile(vectors: Vectors, ax: Any = None) -> Any:
    """How many held-out pairs are ordered rightly, block by block: bars of one vector, or lines of several.

    Args:
        vectors: a vector, a list, or a mapping from the names that the legend gives them.
        ax: the axes to draw on.
    """
    named = _named(vectors)
    ax = axes_of(ax) if len(named) == 1 else axes_of(ax, SIZE)
    draw = _bars if len(named) == 1 else _lines
    draw(ax, named)
    first = next(iter(named.values()))
    ax.axhline(0.5, color=ink(), linestyle=":", linewidth=1.2)
    where = "block" if first.site == "block" else f"{first.site} of block"
    ax.set(xlabel=where, ylabel="held-out pairs ordered rightly", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    entitle(ax, f"where {_concept(named, 'each')} is read")
    beside(ax, {"chance": 0.5})
    legend(ax, [ax])
    return ax


def _bars(ax: Any, named: Mapping[str, ConceptVector]) -> None:
    (vector,) = named.values()
    blocks, best = np.array(vector.blocks), np.isin(vector.blocks, vector.recommended)
    accuracy = np.array(vector.accuracy.tolist())
    ax.bar(blocks[~best], accuracy[~best], color=(ALIGNED, 0.5))
    ax.bar(blocks[best], accuracy[best], color=ALIGNED, label="recommended")


def _lines(ax: Any, named: Mapping[str, ConceptVector]) -> None:
    for (name, vector), look in zip(named.items(), looks(len(named)), strict=True):
        order = np.argsort(vector.blocks)
        ax.plot(np.array(vector.blocks)[order], np.array(vector.accuracy.tolist())[order], **look, label=name)
    for vector in named.values():
        best = [vector.row(block) for block in vector.recommended]
        ring(ax, vector.recommended, vector.accuracy[best].tolist(), "recommended")


def cosines(vectors: Vectors, ax: Any = None, *, block: int | None = None, direction: str = "write") -> Any:
    """The cosines between the directions of vectors at a block; or of one vector, between those of its blocks.

    Args:
        vectors: several vectors of one model and site, in a list or in a mapping from their names; or one.
        ax: the axes to draw on.
        block: of several vectors; the first one that the first vector recommends by default.
        direction: "write", what steering adds, or "read", what scores project on.

    Raises:
        ValueError: the vectors do not belong to one model and site; a block is named, where there is one vector; or an
            unknown direction.
        IndexError: a vector does not hold the block.
    """
    if direction not in ("write", "read"):
        raise ValueError(f"a vector has the directions 'write' and 'read', got {direction!r}")
    named = _named(vectors)
    is_one = len(named) == 1
    directions, names, title = (_own if is_one else _others)(named, block, direction)
    units = np.stack([np.asarray(each, dtype=float) for each in directions])
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    ax = _matrix(ax, units @ units.T, names, rotation=0 if is_one and len(names) <= FEW else 90)
    if is_one:
        ax.set(xlabel="block", ylabel="block")
    entitle(ax, title)
    return ax


def _own(named: Mapping[str, ConceptVector], block: int | None, direction: str) -> tuple[Any, list[str], str]:
    (vector,) = named.values()
    if block is not None:
        raise ValueError(f"one vector is compared block by block, and block={block} is named: give several vectors")
    return getattr(vector, direction), [str(b) for b in vector.blocks], f"{vector.concept}: block by block"


def _others(named: Mapping[str, ConceptVector], block: int | None, direction: str) -> tuple[Any, list[str], str]:
    first = next(iter(named.values()))
    block = first.recommended[0] if block is None else block
    placed = [vector.at(block) for vector in named.values()]
    for other in placed[1:]:
        placed[0].check_alike(other)
    what = {"write": "written", "read": "read"}[direction]
    return [getattr(v, direction)[0] for v in placed], [short(n) for n in named], f"what is {what} at block {block}"


def _matrix(ax: Any, values: Array, names: Sequence[str], rotation: float) -> Any:
    count, longest = len(names), max(map(len, names))
    side = min(max(2.2, 0.5 * count), 6.0)
    ax = axes_of(ax, (side + 1.4 + 0.07 * longest, side + 0.5 + 0.07 * longest * bool(rotation) + 0.3))
    image = ax.imshow(values, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
    name_cells(ax.xaxis, names, ax.bbox.width, rotation=rotation)
    name_cells(ax.yaxis, names, ax.bbox.height)
    if count <= FEW:
        size = min(9.0, 0.27 * ax.bbox.width * 72 / ax.figure.dpi / count)
        for (row, column), value in np.ndenumerate(values):
            written = {"color": _on(image.cmap(image.norm(value))), "fontsize": size, "ha": "center", "va": "center"}
            ax.text(column, row, f"{round(value, 2) + 0:.2f}", **written)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax


def _on(ground: tuple[float, float, float, float]) -> str:
    """The colour of letters on a ground."""
    red, green, blue, _ = ground
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


# a text


def scan(reading: Reading, ax: Any = None) -> Any:
    """The scores of a text, tokens by blocks: white is the middle, the poles stand at -1 and +1. Recommended blocks are
    in bold; grey is where there is no score. Where there is no room for all names of tokens or blocks, every second or
    third is left."""
    shown = [word(token) for token in reading.tokens]
    wide, high = 1.6 + 0.17 * len(shown), 0.28 * len(reading.blocks)
    ax = axes_of(ax, (min(max(4.0, wide), 12.0), 1 + min(high, 6.0) + 0.08 * max(map(len, shown))))
    colors = plt.get_cmap(DIVERGING).with_extremes(bad=FAINT)
    image = ax.imshow(reading.scores.T.numpy(), cmap=colors, vmin=-2, vmax=2, aspect="auto", origin="lower")
    name_cells(ax.xaxis, shown, ax.bbox.width, rotation=90)
    name_cells(ax.yaxis, [str(b) for b in reading.blocks], ax.bbox.height)
    for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if reading.blocks[int(tick)] in reading.recommended else "normal")
    ax.set(ylabel="block")
    entitle(ax, f"{reading.concept}, token by token")
    ax.figure.colorbar(image, ax=ax, pad=0.02, label=SCORE, extend="both")
    return ax


def tokens(readings: Readings, ax: Any = None, *, block: int | None = None) -> Any:
    """The score of every token of a text, as a line; or of several texts or concepts, a line each.

    Where texts differ, a place is named after the tokens of both, or numbered where there are more than two. The first
    token, an attention sink, may lie outside of the picture.

    Args:
        readings: a reading, a list, or a mapping from the names that the legend gives them.
        ax: the axes to draw on.
        block: where they were read; the recommended blocks by default.
    """
    named = _named(readings)
    lines = {name: np.array(reading.at(block).tolist()) for name, reading in named.items()}
    names = _places([reading.tokens for reading in named.values()])
    ax = axes_of(ax, (min(max(SIZE[0], 1.2 + 0.17 * len(names)), 12.0), 3.2 + 0.08 * max(map(len, names))))
    if len(lines) == 1:
        _fill(ax, *lines.values())
    for (name, scores), look in zip(lines.items(), looks(len(lines)), strict=True):
        ax.plot(scores, **look | ({"color": ink()} if len(lines) == 1 else {}), label=name)
    for level, style in ((-1, ":"), (0, "-"), (1, ":")):
        ax.axhline(level, color=ink() if level else FAINT, linestyle=style, linewidth=1, zorder=1.5)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=_reach(list(lines.values())), ylabel=SCORE)
    name_cells(ax.xaxis, names, ax.bbox.width, rotation=90)
    entitle(ax, f"{_concept(named, 'scores')}{_where(named, block)}, token by token")
    beside(ax, {"positive pole": 1, "negative pole": -1})
    if len(lines) > 1:
        literal(ax.legend(loc="best", fontsize="small").get_texts())
    return ax


def _where(named: Mapping[str, Reading], block: int | None) -> str:
    read_at = {reading.recommended if block is None else (block,) for reading in named.values()}
    (blocks,) = read_at if len(read_at) == 1 else [()]
    return f" at block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}" if blocks else ""


def _fill(ax: Any, scores: Array) -> None:
    places = np.arange(len(scores))
    for color, side in ((POSITIVE, np.fmax(scores, 0)), (NEGATIVE, np.fmin(scores, 0))):
        ax.bar(places, side, width=1, color=(color, 0.55))


def _reach(lines: Sequence[Array]) -> tuple[float, float]:
    """The limits of the scores: wide enough for the poles and for all but the first token."""
    scores = np.concatenate([line[1:] if len(line) > 1 else line for line in lines])
    scores = np.concatenate([scores[np.isfinite(scores)], [-1.0, 1.0]])
    margin = 0.1 * (scores.max() - scores.min())
    return float(scores.min() - margin), float(scores.max() + margin)


def _places(texts: Sequence[Sequence[str]]) -> list[str]:
    """What every place is called: its token, the tokens of two texts, or its number."""
    columns = [
        list(dict.fromkeys(word(text[i]) for text in texts if i < len(text))) for i in range(max(map(len, texts)))
    ]
    return [" | ".join(column) if len(column) <= 2 else str(i) for i, column in enumerate(columns)]


# names


def _named(things: Any) -> dict[str, Any]:
    """What is drawn, by name: that of a mapping, else its concept, and what else tells it from the others."""
    if isinstance(things, Mapping):
        named = {str(name): thing for name, thing in things.items()}
    else:
        several = list(things) if isinstance(things, (list, tuple)) else [things]
        named = dict(zip(_told_apart(several), several, strict=True))
    if not named:
        raise ValueError("there is nothing to draw: give at least one")
    return {f" {name}" if name.startswith("_") else name: thing for name, thing in named.items()}


def _told_apart(things: Sequence[Any]) -> list[str]:
    names = [thing.concept for thing in things]
    if len(set(names)) < len(names):
        readers = [getattr(thing, "provenance", {}).get("reader") for thing in things]
        names = [f"{name}, {reader}" if reader else name for name, reader in zip(names, readers, strict=True)]
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, seen, strict=True)]


def _concept(named: Mapping[str, Any], otherwise: str) -> str:
    """The concept that all are of."""
    concepts = {thing.concept for thing in named.values()}
    return concepts.pop() if len(concepts) == 1 else otherwise
