"""Pictures of what steering does: a trade-off curve in two views, and what a calibration tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from repe.measuring.fits import Fit, bell, saturating
from repe.measuring.intervals import Array
from repe.plot.axes import (
    AFFORDABLE,
    ALIGNED,
    DIVERGING,
    FAINT,
    HELPFUL,
    SIZE,
    axes_of,
    beside,
    entitle,
    ink,
    legend,
    looks,
    ring,
    stacked,
    with_room,
)
from repe.plot.text import short

if TYPE_CHECKING:
    from repe.measuring.calibrate import Calibration, Trial
    from repe.measuring.choice import Choice
    from repe.measuring.curve import TradeoffCurve

PROMPTS = "DsP^vX"
RANDOM = {"color": FAINT, "linewidth": 0.8, "alpha": 0.7, "zorder": 1.5, "label": "random directions"}
MEAN = "mean, 95% interval"
UNITS = {"gap": "gaps", "raw": "unit directions", "sigma": "standard deviations", "norm": "residual norms"}


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
    upper, lower = axes = stacked(ax)
    for panel, quantity in ((upper, aligned), (lower, helpful)):
        _draw(panel, curve.alphas, quantity)
        _shade(panel, window, f"loses at most {lost}")
        if not choice.reason:
            panel.axvline(choice.alpha, color=ink(), linewidth=0.8)
            _ring(panel, choice.alpha, quantity.means[curve.alphas == choice.alpha].item())
    lower.axhline(kept, color=AFFORDABLE, linestyle=":", linewidth=1.2)
    lower.axhline(floor, color=ink(), linestyle=":", linewidth=1.2)
    upper.set(ylim=(-1.06, 1.06), yticks=[-1, 0, 1])
    lower.set(ylim=(_lowest(helpful, floor), 1.03))
    _say_beside(upper, aligned.prompted)
    _say_beside(lower, helpful.prompted, {f"{lost} lost": kept, "guessing": floor})
    _say_above(upper, choice)
    _name_axes(upper, lower, _alpha(curve))
    entitle(upper, f"{curve.concept}, steered", pad=18)
    legend(lower, axes)
    return axes


def frontier(curve: TradeoffCurve, ax: Any = None, budget: float = 0.05) -> Any:
    """Behaviour against helpfulness, a point a strength, joined in order; the strength chosen is ringed."""
    choice, (aligned, helpful) = curve.best(budget), quantities(curve)
    furthest, kept = np.abs(curve.alphas).max() or 1, (1 - budget) * _unsteered(curve, helpful)
    ax = axes_of(None, (6.4, 4.6)) if ax is None else with_room(ax)
    points = ax.scatter(aligned.means, helpful.means, s=36, c=curve.alphas, cmap=DIVERGING, zorder=3)
    points.set(clim=(-furthest, furthest), edgecolor=ink(), linewidth=0.6)
    ax.plot(aligned.means, helpful.means, color=ink(), linewidth=0.8)
    for path in zip(aligned.random, helpful.random, strict=True):
        ax.plot(*path, **RANDOM)
    _outline(ax, _unsteered(curve, aligned), _unsteered(curve, helpful), "x", "alpha 0")
    if not choice.reason:
        at = curve.alphas == choice.alpha
        _ring(ax, aligned.means[at].item(), helpful.means[at].item(), _chosen(choice))
    for mark, name in _marked(aligned.prompted):
        _outline(ax, aligned.prompted[name], helpful.prompted[name], mark, f"prompt: {short(name)}")
    ax.axhline(kept, color=AFFORDABLE, linestyle=":", linewidth=1.2, label=f"{100 * budget:.3g}% lost")
    ax.set(xlim=(-1.06, 1.06), xticks=[-1, -0.5, 0, 0.5, 1], xlabel="alignment: P(aligned) - P(others)")
    ax.set_ylabel("helpfulness: P(right)")
    entitle(ax, f"{curve.concept}, steered")
    legend(ax, [ax])
    ax.figure.colorbar(points, ax=ax, label=_alpha(curve))
    return ax


def costs(curve: TradeoffCurve, ax: Any = None) -> Any:
    """The KL divergence from the unsteered model over the strength: the mean over texts, and the 95th percentile of
    tokens, where it was measured.

    Raises:
        ValueError: neither was measured.
    """
    columns, alphas = curve.columns, curve.alphas
    if "kl" not in columns and "kl_p95" not in columns:
        raise ValueError("the curve has no divergence: measure it with neutral texts, see `repe.tradeoff`")
    ax = axes_of(ax, SIZE)
    if "kl" in columns:
        _band(ax, alphas, columns["kl"], (columns["kl_low"], columns["kl_high"]), ALIGNED)
    if "kl_p95" in columns:
        ax.plot(alphas, columns["kl_p95"], color=HELPFUL, marker="D", markersize=3.5, label="95th percentile of tokens")
    ax.axvline(0, color=FAINT, linewidth=0.8, zorder=1.5)
    ax.set(xlabel=_alpha(curve), ylabel="KL divergence (nats a token)")
    ax.set_ylim(bottom=0)
    entitle(ax, f"{curve.concept}, steered: how far the model is moved")
    legend(ax, [ax])
    return ax


def _draw(ax: Any, alphas: Array, quantity: Quantity) -> None:
    _band(ax, alphas, quantity.means, quantity.band, quantity.color)
    if quantity.fitted.size:
        ax.plot(evenly(alphas), quantity.fitted, color=ink(), linestyle="--", linewidth=1, label="fit")
    for random in quantity.random:
        ax.plot(alphas, random, **RANDOM)


def _band(ax: Any, alphas: Array, means: Array, ends: Iterable[Array], color: str) -> None:
    ax.fill_between(alphas, *ends, color=color, alpha=0.35, linewidth=0, label=MEAN)
    ax.plot(alphas, means, color=color, marker="o", markersize=3.5, label=MEAN)


def _shade(ax: Any, window: tuple[float, float], label: str) -> None:
    ax.axvline(0, color=FAINT, linewidth=0.8, zorder=1.5)
    if window[0] < window[1]:
        look = {"facecolor": (AFFORDABLE, 0.2), "edgecolor": AFFORDABLE, "linewidth": 0.8, "zorder": 0.5}
        ax.axvspan(*window, **look, label=label)


def _outline(ax: Any, x: float, y: float, mark: str, label: str = "_", **other: Any) -> None:
    shown = {"color": ink(), "markerfacecolor": "none", "markersize": 9, "zorder": 4, "clip_on": False}
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
    """Marks and names of levels on the right."""
    for mark, name in _marked(prompted):
        _outline(ax, 1, prompted[name], mark, markersize=5, transform=ax.get_yaxis_transform())
    beside(ax, {f"prompt: {short(name)}": level for name, level in prompted.items()} | dict(levels or {}))


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
    return zip(cycle(PROMPTS), prompted, strict=False)


# calibration


def calibration(found: Calibration, ax: Any = None, *, sign: int = 1) -> tuple[Any, Any]:
    """What was tried out, block by block: above, how well every reader reads there; below, what steering there gains.

    Args:
        found: what `repe.calibrate` returned.
        ax: two axes, or one that is split into two.
        sign: +1 for more of the concept, -1 for less.
    """
    if sign not in (1, -1):
        raise ValueError(f"sign is +1 for more of the concept and -1 for less, got {sign}")
    setting = found.more if sign == 1 else found.less
    upper, lower = axes = stacked(ax)
    by_reader: dict[str, list[Trial]] = {}
    for trial in setting.trials:
        by_reader.setdefault(trial.reader, []).append(trial)
    for (reader, trials), look in zip(by_reader.items(), looks(len(by_reader)), strict=True):
        blocks, gains = [t.block for t in trials], [t.validation.gain for t in trials]
        upper.plot(blocks, [t.accuracy for t in trials], **look, label=reader)
        lower.plot(blocks, [g.value for g in gains], **look, label=reader)
        lower.vlines(blocks, [g.low for g in gains], [g.high for g in gains], color=look["color"], linewidth=1.5)
    if setting.alpha:
        best = setting.trial
        for panel, value in ((upper, best.accuracy), (lower, best.validation.gain.value)):
            ring(panel, best.block, value, f"chosen: alpha {setting.alpha:.3g}, by {best.reader}")
    upper.axhline(0.5, color=ink(), linestyle=":", linewidth=1.2)
    lower.axhline(0, color=FAINT, linewidth=1, zorder=1.5)
    small = {"fontsize": "small", "linespacing": 1.15}
    upper.set_ylim(0, 1.06)
    upper.set_ylabel("reading:\npairs ordered\nrightly", **small)
    lower.set_ylabel(f"steering:\ngain within {found.budget:.0%}\nof helpfulness", **small)
    lower.set_xlabel("block")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    upper.tick_params(labelbottom=upper.get_position().y0 <= lower.get_position().y0)
    entitle(upper, f"{found.concept}, {'more' if sign == 1 else 'less'} of it")
    legend(lower, axes)
    return axes
