"""Pictures of concept vectors: where a concept is read, and how vectors lie to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.ticker import MaxNLocator

from repe.plot import axes
from repe.plot.text import by_name, concept_of, short

if TYPE_CHECKING:
    from repe.reading.vector import ConceptVector

    Vectors: TypeAlias = ConceptVector | Sequence[ConceptVector] | Mapping[str, ConceptVector]

FEW = 12  # cells of a side, whose values are written


def profile(vectors: Vectors, ax: Any = None) -> Any:
    """Draw how many held-out pairs are ordered rightly, block by block: bars of one vector, or lines of several.

    Args:
        vectors: a vector, a list, or a mapping from the names that the legend gives them.
        ax: the axes to draw on.
    """
    named = by_name(vectors)
    first, *others = named.values()
    ax = axes.given(ax, axes.SIZE) if others else axes.given(ax)
    (_lines if others else _bars)(ax, named)
    axes.dotted(ax, 0.5)
    where = "block" if first.site == "block" else f"{first.site} of block"
    ax.set(xlabel=where, ylabel="held-out pairs ordered rightly", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.entitle(ax, f"where {concept_of(named, 'each')} is read")
    axes.beside(ax, {"chance": 0.5})
    axes.legend(ax)
    return ax


def _bars(ax: Any, named: Mapping[str, ConceptVector]) -> None:
    (vector,) = named.values()
    blocks, accuracy = np.array(vector.blocks), vector.accuracy.numpy()
    best = np.isin(blocks, vector.recommended)
    ax.bar(blocks[~best], accuracy[~best], color=(axes.ALIGNED, 0.5))
    ax.bar(blocks[best], accuracy[best], color=axes.ALIGNED, label="recommended")


def _lines(ax: Any, named: Mapping[str, ConceptVector]) -> None:
    for (name, vector), look in zip(named.items(), axes.looks(len(named)), strict=True):
        order = np.argsort(vector.blocks)
        ax.plot(np.array(vector.blocks)[order], vector.accuracy.numpy()[order], **look, label=name)
    for vector in named.values():
        axes.ring(ax, vector.recommended, vector.at(*vector.recommended).accuracy.tolist(), "recommended")


def cosines(vectors: Vectors, ax: Any = None, *, block: int | None = None, direction: str = "write") -> Any:
    """Draw the cosines between the directions of vectors at a block; or of one vector, between those of its blocks.

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
    named = by_name(vectors)
    first, *others = named.values()
    if others:
        block = first.recommended[0] if block is None else block
        placed = [vector.at(block) for vector in named.values()]
        for other in placed[1:]:
            placed[0].check_alike(other)
        directions, names = np.concatenate([getattr(vector, direction) for vector in placed]), [*map(short, named)]
    elif block is None:
        directions, names = getattr(first, direction).numpy(), [str(number) for number in first.blocks]
    else:
        raise ValueError(f"one vector is compared block by block, and block={block} is named: give several vectors")
    units = np.asarray(directions, dtype=float)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    ax = _matrix(ax, units @ units.T, names, rotation=90 if others or len(names) > FEW else 0)
    if not others:
        ax.set(xlabel="block", ylabel="block")
    what = {"write": "written", "read": "read"}[direction]
    axes.entitle(ax, f"what is {what} at block {block}" if others else f"{first.concept}: block by block")
    return ax


def _matrix(ax: Any, values: Any, names: Sequence[str], rotation: float) -> Any:
    count, longest = len(names), max(map(len, names))
    side = min(max(2.2, 0.5 * count), 6.0)
    ax = axes.given(ax, (side + 1.4 + 0.07 * longest, side + 0.5 + 0.07 * longest * bool(rotation) + 0.3))
    image = ax.imshow(values, cmap=axes.DIVERGING, vmin=-1, vmax=1, aspect="auto")
    axes.name_cells(ax.xaxis, names, ax.bbox.width, rotation=rotation)
    axes.name_cells(ax.yaxis, names, ax.bbox.height)
    if count <= FEW:
        size = min(9.0, 0.27 * ax.bbox.width * 72 / ax.figure.dpi / count)
        for (row, column), value in np.ndenumerate(values):
            written = {"color": _on(image.cmap(image.norm(value))), "fontsize": size, "ha": "center", "va": "center"}
            ax.text(column, row, f"{round(value, 2) + 0:.2f}", **written)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax


def _on(ground: tuple[float, float, float, float]) -> str:
    """The colour of letters on a ground."""
    return "black" if np.dot((0.3, 0.59, 0.11), ground[:3]) > 0.5 else "white"
