"""What the pictures share: colours, axes and the room on them, and names that stand where they can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from scipy import optimize

from repe.plot.text import drawable, fonts, literal

# Okabe and Ito's palette, safe for colour-blind readers, on white and on black alike; so is the map
ALIGNED, HELPFUL, AFFORDABLE, FAINT = "#0072B2", "#D55E00", "#009E73", "#999999"
SEVERAL = (ALIGNED, HELPFUL, AFFORDABLE, "#CC79A7", "#E69F00", "#56B4E9", FAINT)
DIVERGING = "PuOr"  # orange below the middle, purple above it
POSITIVE, NEGATIVE = "#8068B8", "#D9730D"  # the poles, in the map's colours
MARKS = "oDs^vPX"
SCORE = "score (poles at ±1)"
TINIEST = 6.0  # of a token, in points
SIZE = (6.4, 4.0)  # of a picture, in inches


def given(ax: Any, size: tuple[float, float] = (4.8, 3.2)) -> Any:
    """The axes that are given, or new ones."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def stacked(ax: Any) -> Any:
    """Two axes, one above the other: those that are given, or the one that is given in two, or new ones."""
    ax = given(ax, (6.4, 4.8))
    if not isinstance(ax, Axes):
        upper, lower = ax
        return upper, lower
    above, below = cells(ax, 2, beside=0.25)
    ax.set_subplotspec(above)
    return ax, ax.figure.add_subplot(below, sharex=ax)


def cells(ax: Any, rows: int, beside: float = 0.0) -> list[Any]:
    """Where the axes stand, in rows; without a layout engine, room is left under and beside them for what is said."""
    cell, (left, bottom, right, top) = ax.get_subplotspec(), ax.get_position().extents
    place = cell or GridSpec(1, 1, left=left, bottom=bottom, right=right, top=top)[0]
    around = ax.figure.get_layout_engine() is None
    widths, heights = [1, beside] if around and beside else [1], [1] * rows + [0.25 * rows] * around
    grid = place.subgridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
    return [grid[row, 0] for row in range(rows)]


def ink() -> Any:
    """The colour of text, dark on a light ground and light on a dark one."""
    return plt.rcParams["text.color"]


def looks(count: int) -> Iterator[dict[str, Any]]:
    """Of several lines, each over the one before it and thinner, so that none hides another that is the same."""
    for i, color, mark in zip(range(count), cycle(SEVERAL), cycle(MARKS), strict=False):
        under = (count - 1 - i) / max(count - 1, 1)
        yield {"color": color, "marker": mark, "linewidth": 1.2 + 2 * under, "markersize": 4 + 4 * under}


def outline(ax: Any, x: Any, y: Any, mark: str, label: str = "_", **other: Any) -> None:
    """Hollow marks in ink."""
    look = {"color": ink(), "markerfacecolor": "none", "markersize": 9, "zorder": 4, "clip_on": False}
    ax.plot(x, y, mark, label=label, **look | other)


def ring(ax: Any, x: Any, y: Any, label: str = "_") -> None:
    """Around points that are chosen or recommended."""
    outline(ax, x, y, "o", label, markersize=11, markeredgewidth=1.5)


def dotted(ax: Any, level: float, color: Any = None, **label: str) -> None:
    """A level that is no datum, such as chance."""
    ax.axhline(level, color=color or ink(), linestyle=":", linewidth=1.2, **label)


def at_the_poles(line: Callable[..., Any]) -> None:
    """Lines at the scores of the poles and of the middle."""
    for level in (-1, 0, 1):
        line(level, color=ink() if level else FAINT, linestyle=":" if level else "-", linewidth=1, zorder=1.5)


# what is written


def entitle(ax: Any, title: str, **how: Any) -> None:
    literal([ax.set_title(title, **how)])


def beside(ax: Any, levels: Mapping[str, float]) -> None:
    """Names of levels on the right, moved apart where they are too close."""
    at_right = ax.get_yaxis_transform()
    low, high = ax.get_ylim()
    line = 11 * (high - low) / (0.7 * ax.bbox.height * 72 / ax.figure.dpi)
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    where: dict[str, Any] = {"xycoords": at_right, "textcoords": at_right, "annotation_clip": False, "va": "center"}
    for name, place in zip(levels, moved_apart(list(levels.values()), line, (low, high)), strict=True):
        literal([ax.annotate(name, (1, levels[name]), (1.05, place), **where, fontsize="small", arrowprops=leader)])


def moved_apart(places: Sequence[float], distance: float, limits: tuple[float, float]) -> list[float]:
    """The places, in their order, none nearer to another than a distance, and moved as little as that takes."""
    if not places:
        return []
    order, steps, apart = np.argsort(places, kind="stable"), distance * np.arange(len(places)), np.empty(len(places))
    moved = optimize.isotonic_regression(np.array(places)[order] - steps).x
    apart[order] = moved.clip(limits[0], limits[1] - steps[-1]) + steps
    return apart.tolist()


def name_stacked(upper: Any, lower: Any, x: str, above: str, below: str) -> None:
    """Name both y axes, and the x axis once where one stands above the other."""
    small = {"fontsize": "small", "labelpad": 1, "linespacing": 1.15}
    upper.set_ylabel(above, **small)
    lower.set_ylabel(below, **small)
    lower.set_xlabel(x)
    if upper.get_position().y0 > lower.get_position().y0:
        upper.tick_params(labelbottom=False)
    else:
        upper.set_xlabel(x)


def legend(*panels: Any) -> None:
    """Every label of the panels once, below the last of them, in as many columns as there is room for."""
    drawn: dict[str, dict[type, Any]] = {}
    ax = panels[-1]
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, {}).setdefault(type(handle), handle)
    room = 1.25 * ax.bbox.width / ax.figure.dpi
    columns = max(1, int(room / (0.6 + 0.07 * max(map(len, drawn)))))
    columns = ceil(len(drawn) / ceil(len(drawn) / columns))
    handles = [tuple(parts.values()) for parts in drawn.values()]
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5}
    shown = ax.legend(handles, list(drawn), ncols=columns, frameon=False, fontsize="small", **place)
    literal(shown.get_texts())


def name_cells(axis: Any, names: Sequence[str], length: float, **how: Any) -> None:
    """Names of evenly spaced cells along an axis of a length, in dots, as large as they can be."""
    room = 0.8 * length * 72 / axis.figure.dpi / len(names)
    every = max(1, ceil(TINIEST / room))
    size = min(10.0, room * every)
    shown = [drawable(name) for name in names[::every]]
    axis.set_ticks(range(0, len(names), every), shown, fontsize=size, parse_math=False, fontfamily=fonts(), **how)
