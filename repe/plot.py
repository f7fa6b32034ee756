"""Pictures on matplotlib axes. Every function takes the axes to draw on, makes them where none are given, and returns
them; what is drawn was computed elsewhere, and what was not measured is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import ceil
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator
from scipy import optimize

from repe.fits import Array, Fit, bell, saturating

if TYPE_CHECKING:
    from repe.choice import Choice
    from repe.curve import TradeoffCurve
    from repe.reading import Reading
    from repe.vector import ConceptVector

# Okabe and Ito's palette, safe for colour-blind readers, on white and on black alike; so is the map
ALIGNED, HELPFUL, AFFORDABLE, FAINT = "#0072B2", "#D55E00", "#009E73", "#999999"
DIVERGING = "PuOr"
MARKS = "DsP^vX"
RANDOM = {"color": FAINT, "linewidth": 0.8, "alpha": 0.7, "zorder": 1.5, "label": "random directions"}
UNITS = {"gap": "gaps", "raw": "unit directions", "sigma": "standard deviations", "norm": "residual norms"}
LONGEST = 20  # of a prompt's name, in letters
TINIEST = 6.0  # of a token, in points


# the trade-off


@dataclass(frozen=True)
class Quantity:
    """What is drawn of one side of the trade-off.

    Attributes:
        color: of its line.
        means: (alphas,).
        band: (2, alphas), the ends of the intervals, as far as they are possible.
        fitted: (points,), at `evenly` spread strengths; none where there is no fit.
        random: (directions, alphas), of the control.
        prompted: by system prompt, without steering.
    """

    color: str
    means: Array
    band: Array
    fitted: Array
    random: Array
    prompted: Mapping[str, float]


def quantities(curve: TradeoffCurve) -> tuple[Quantity, Quantity]:
    """Alignment and helpfulness."""
    control, baseline = curve.control, curve.baseline
    prompts = baseline.prompts if baseline else ()

    def quantity(column: str, least: float, fit: Fit, shape: Callable[..., Array], asked: Array | None) -> Any:
        ends = np.stack([curve.columns[column + end] for end in ("_low", "_high")]).clip(least, 1)
        fitted = shape(evenly(curve.alphas), *(fit[p].value for p in "ab")) if fit.estimates else np.empty(0)
        random = np.empty((0, len(curve.alphas))) if control is None else getattr(control, column)
        prompted = {} if asked is None else dict(zip(prompts, asked.mean(1).tolist(), strict=True))
        return curve.columns[column], ends, fitted, random, prompted

    falling = partial(bell, floor=curve.helpfulness.floor)
    aligned, right = (baseline.alignment.behaviour, baseline.helpfulness.probability) if baseline else (None, None)
    return (
        Quantity(ALIGNED, *quantity("behaviour", -1, curve.fits.behaviour, saturating, aligned)),
        Quantity(HELPFUL, *quantity("helpfulness", 0, curve.fits.bell, falling, right)),
    )


def evenly(alphas: Array, points: int = 241) -> Array:
    """(points,), from the least alpha to the largest."""
    return np.linspace(alphas[0], alphas[-1], points)


def efficient_window(curve: TradeoffCurve, budget: float = 0.05) -> tuple[float, float]:
    """The ends of the strengths around 0 all of which keep the upper end of the loss's interval within a budget."""
    alphas = curve.alphas
    dear = alphas[curve.columns["loss_high"] > budget]
    inside = (alphas > dear[dear < 0].max(initial=-np.inf)) & (alphas < dear[dear > 0].min(initial=np.inf))
    return alphas[inside][0].item(), alphas[inside][-1].item()


def tradeoff(curve: TradeoffCurve, ax: Any = None, budget: float = 0.05) -> tuple[Any, Any]:
    """Behaviour above and helpfulness below, over the strength: means with 95% intervals, and what was fitted to them.

    Shaded are the strengths of `efficient_window`; ringed is the one that `curve.best` chooses, on half of the items.

    Args:
        curve: what is drawn.
        ax: two axes, or one that is split into two.
        budget: the share of helpfulness that a strength may cost.
    """
    choice, window, (aligned, helpful) = curve.best(budget), efficient_window(curve, budget), quantities(curve)
    floor, lost, kept = curve.helpfulness.floor, f"{100 * budget:.3g}%", (1 - budget) * _unsteered(curve, helpful)
    upper, lower = axes = _stacked(ax)
    for panel, quantity in ((upper, aligned), (lower, helpful)):
        _draw(panel, curve.alphas, quantity)
        _shade(panel, window, f"loses at most {lost}")
        if not choice.reason:
            panel.axvline(choice.alpha, color=_ink(), linewidth=0.8)
            _ring(panel, choice.alpha, quantity.means[curve.alphas == choice.alpha].item())
    lower.axhline(kept, color=AFFORDABLE, linestyle=":", linewidth=1.2)
    lower.axhline(floor, color=_ink(), linestyle=":", linewidth=1.2)
    upper.set(ylim=(-1.06, 1.06), yticks=[-1, 0, 1])
    lower.set(ylim=(_lowest(helpful, floor), 1.03))
    _say_beside(upper, aligned.prompted)
    _say_beside(lower, helpful.prompted, {f"{lost} lost": kept, "guessing": floor})
    _say_above(upper, choice)
    _name_axes(upper, lower, _alpha(curve))
    upper.set_title(f"{curve.concept}, steered", pad=18)
    _legend(lower, axes)
    return axes


def frontier(curve: TradeoffCurve, ax: Any = None, budget: float = 0.05) -> Any:
    """Behaviour against helpfulness, a point a strength, joined in order; the strength chosen is ringed."""
    choice, (aligned, helpful) = curve.best(budget), quantities(curve)
    furthest, kept = np.abs(curve.alphas).max() or 1, (1 - budget) * _unsteered(curve, helpful)
    ax = _axes(None, (6.4, 4.6)) if ax is None else _with_room(ax)
    points = ax.scatter(aligned.means, helpful.means, s=36, c=curve.alphas, cmap=DIVERGING, zorder=3)
    points.set(clim=(-furthest, furthest), edgecolor=_ink(), linewidth=0.6)
    ax.plot(aligned.means, helpful.means, color=_ink(), linewidth=0.8)
    for path in zip(aligned.random, helpful.random, strict=True):
        ax.plot(*path, **RANDOM)
    _outline(ax, _unsteered(curve, aligned), _unsteered(curve, helpful), "x", "alpha 0")
    if not choice.reason:
        at = curve.alphas == choice.alpha
        _ring(ax, aligned.means[at].item(), helpful.means[at].item(), _chosen(choice))
    for mark, name in _marked(aligned.prompted):
        _outline(ax, aligned.prompted[name], helpful.prompted[name], mark, f"prompt: {_short(name)}")
    ax.axhline(kept, color=AFFORDABLE, linestyle=":", linewidth=1.2, label=f"{100 * budget:.3g}% lost")
    ax.set(xlim=(-1.06, 1.06), xticks=[-1, -0.5, 0, 0.5, 1], xlabel="alignment: P(aligned) - P(others)")
    ax.set_ylabel("helpfulness: P(right)")
    ax.set_title(f"{curve.concept}, steered")
    _legend(ax, [ax])
    ax.figure.colorbar(points, ax=ax, label=_alpha(curve))
    return ax


def _draw(ax: Any, alphas: Array, quantity: Quantity) -> None:
    color, said = quantity.color, "mean, 95% interval"
    ax.fill_between(alphas, *quantity.band, color=color, alpha=0.35, linewidth=0, label=said)
    ax.plot(alphas, quantity.means, color=color, marker="o", markersize=3.5, label=said)
    if quantity.fitted.size:
        ax.plot(evenly(alphas), quantity.fitted, color=_ink(), linestyle="--", linewidth=1, label="fit")
    for random in quantity.random:
        ax.plot(alphas, random, **RANDOM)


def _shade(ax: Any, window: tuple[float, float], label: str) -> None:
    ax.axvline(0, color=FAINT, linewidth=0.8, zorder=1.5)
    if window[0] < window[1]:
        look = {"facecolor": (AFFORDABLE, 0.2), "edgecolor": AFFORDABLE, "linewidth": 0.8, "zorder": 0.5}
        ax.axvspan(*window, **look, label=label)


def _outline(ax: Any, x: float, y: float, mark: str, label: str = "_", **other: Any) -> None:
    shown = {"color": _ink(), "markerfacecolor": "none", "markersize": 9, "zorder": 4, "clip_on": False}
    ax.plot(x, y, mark, label=label, **shown | other)


def _ring(ax: Any, x: float, y: float, label: str = "_") -> None:
    _outline(ax, x, y, "o", label, markersize=11, markeredgewidth=1.5)


def _unsteered(curve: TradeoffCurve, quantity: Quantity) -> float:
    return quantity.means[curve.alphas == 0].item()


def _lowest(helpful: Quantity, floor: float) -> float:
    """A little below guessing, or below the least that is drawn."""
    return max(min(floor, *helpful.means, *helpful.random.flat, *helpful.prompted.values()) - 0.05, -0.03)


# what is said of them


def _say_above(ax: Any, choice: Choice) -> None:
    said, alpha = (_chosen(choice), choice.alpha) if not choice.reason else ("no strength is recommended", 0)
    above = {"xycoords": ax.get_xaxis_transform(), "xytext": (0, 3), "textcoords": "offset points"}
    ax.annotate(said, (alpha, 1), **above, ha="center", va="bottom", fontsize="small")


def _say_beside(ax: Any, prompted: Mapping[str, float], levels: Mapping[str, float] | None = None) -> None:
    """Marks and names of levels on the right, the names moved apart where they are too close."""
    at_right = ax.get_yaxis_transform()
    for mark, name in _marked(prompted):
        _outline(ax, 1, prompted[name], mark, markersize=5, transform=at_right)
    names = {f"prompt: {_short(name)}": level for name, level in prompted.items()} | dict(levels or {})
    low, high = ax.get_ylim()
    line = 11 * (high - low) / (0.7 * ax.bbox.height * 72 / ax.figure.dpi)
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    beside: dict[str, Any] = {"xycoords": at_right, "textcoords": at_right, "annotation_clip": False, "va": "center"}
    for name, place in zip(names, moved_apart(list(names.values()), line, (low, high)), strict=True):
        text = ax.annotate(name, (1, names[name]), (1.05, place), **beside, fontsize="small", arrowprops=leader)
        text.set_parse_math(False)


def moved_apart(places: Sequence[float], distance: float, limits: tuple[float, float]) -> list[float]:
    """The places, in their order, none nearer to another than a distance, and moved as little as that takes."""
    if not places:
        return []
    order, steps, apart = np.argsort(places, kind="stable"), distance * np.arange(len(places)), np.empty(len(places))
    moved = optimize.isotonic_regression(np.array(places)[order] - steps).x
    apart[order] = moved.clip(limits[0], limits[1] - steps[-1]) + steps
    return apart.tolist()


def _legend(ax: Any, panels: Sequence[Any]) -> None:
    """Every label of the panels once, below the axes, in as many columns as there is room for."""
    drawn: dict[str, dict[type, Any]] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, {}).setdefault(type(handle), handle)
    room = 1.25 * ax.bbox.width / ax.figure.dpi
    columns = max(1, int(room / (0.6 + 0.07 * max(map(len, drawn)))))
    columns = ceil(len(drawn) / ceil(len(drawn) / columns))
    handles = [tuple(parts.values()) for parts in drawn.values()]
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5}
    legend = ax.legend(handles, list(drawn), ncols=columns, frameon=False, fontsize="small", **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _alpha(curve: TradeoffCurve) -> str:
    unit = curve.provenance.get("unit", "gap")
    return f"alpha ({UNITS.get(unit, unit)})" if unit else "alpha"


def _name_axes(upper: Any, lower: Any, alpha: str) -> None:
    """Alpha once, where one stands above the other."""
    small = {"fontsize": "small", "labelpad": 1, "linespacing": 1.15}
    upper.set_ylabel("alignment:\nP(aligned)\n- P(others)", **small)
    lower.set_ylabel("helpfulness:\nP(right)", **small)
    lower.set_xlabel(alpha)
    if upper.get_position().y0 > lower.get_position().y0:
        upper.tick_params(labelbottom=False)
    else:
        upper.set_xlabel(alpha)


def _chosen(choice: Choice) -> str:
    return f"chosen: alpha {choice.alpha:.3g}"


def _marked(prompted: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    return zip(cycle(MARKS), prompted, strict=False)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


# reading


def profile(vector: ConceptVector, ax: Any = None) -> Any:
    """How many held-out pairs are ordered rightly, block by block."""
    ax = _axes(ax)
    blocks, best = np.array(vector.blocks), np.isin(vector.blocks, vector.recommended)
    accuracy = np.array(vector.accuracy.tolist())
    ax.bar(blocks[~best], accuracy[~best], color=(ALIGNED, 0.4))
    ax.bar(blocks[best], accuracy[best], color=ALIGNED, label="recommended")
    ax.axhline(0.5, color=_ink(), linestyle=":", linewidth=1.2)
    where = "block" if vector.site == "block" else f"{vector.site} of block"
    ax.set(xlabel=where, ylabel="held-out pairs ordered rightly", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_title(f"where {vector.concept} is read")
    _say_beside(ax, {}, {"chance": 0.5})
    _legend(ax, [ax])
    return ax


def scan(reading: Reading, ax: Any = None) -> Any:
    """The scores of a text, tokens by blocks: white is the middle, the poles stand at -1 and +1. Where there is no room
    for all names of tokens or blocks, every second or third is left."""
    shown = [" ".join(token.split()) or "·" for token in reading.tokens]
    wide, high = 1.6 + 0.17 * len(shown), 0.28 * len(reading.blocks)
    ax = _axes(ax, (min(max(4.0, wide), 12.0), 1 + min(high, 6.0) + 0.08 * max(map(len, shown))))
    image = ax.imshow(reading.scores.T.numpy(), cmap=DIVERGING, vmin=-2, vmax=2, aspect="auto", origin="lower")
    _name_cells(ax.xaxis, shown, ax.bbox.width, rotation=90)
    _name_cells(ax.yaxis, [str(b) for b in reading.blocks], ax.bbox.height)
    ax.set(ylabel="block", title=f"{reading.concept}, token by token")
    ax.figure.colorbar(image, ax=ax, pad=0.02, label="score (poles at ±1)")
    return ax


def _name_cells(axis: Any, names: Sequence[str], length: float, **how: Any) -> None:
    """Names of evenly spaced cells along an axis of a length, in dots, as large as they can be."""
    room = 0.8 * length * 72 / axis.figure.dpi / len(names)
    every = max(1, ceil(TINIEST / room))
    size = min(10.0, room * every)
    axis.set_ticks(range(0, len(names), every), names[::every], fontsize=size, parse_math=False, **how)


# axes


def _stacked(ax: Any) -> Any:
    """Two axes, one above the other: those that are given, or the one that is given in two, or new ones."""
    if ax is None:
        ax = _axes(None, (6.4, 4.8))
    if not isinstance(ax, Axes):
        upper, lower = ax
        return upper, lower
    above, below = _cells(ax, 2, beside=0.25)
    ax.set_subplotspec(above)
    return ax, ax.figure.add_subplot(below, sharex=ax)


def _with_room(ax: Any) -> Any:
    ax.set_subplotspec(*_cells(ax, 1))
    return ax


def _cells(ax: Any, rows: int, beside: float = 0.0) -> list[Any]:
    """Where the axes stand, in rows; without a layout engine, room is left under and beside them for what is said."""
    cell, (left, bottom, right, top) = ax.get_subplotspec(), ax.get_position().extents
    place = cell or GridSpec(1, 1, left=left, bottom=bottom, right=right, top=top)[0]
    around = ax.figure.get_layout_engine() is None
    widths, heights = [1, beside] if around and beside else [1], [1] * rows + [0.25 * rows] * around
    grid = place.subgridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
    return [grid[row, 0] for row in range(rows)]


def _axes(ax: Any, size: tuple[float, float] = (4.8, 3.2)) -> Any:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _ink() -> Any:
    """The colour of text, dark on a light ground and light on a dark one."""
    return plt.rcParams["text.color"]
