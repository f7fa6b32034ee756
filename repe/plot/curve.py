"""Pictures of what steering does: a trade-off curve in two views, what it costs, and what a calibration tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from repe.measuring.choice import Choice, affordable
from repe.measuring.curve import TradeoffCurve
from repe.measuring.fits import Fit, bell, saturating
from repe.measuring.intervals import Array
from repe.plot import axes
from repe.plot.text import short

if TYPE_CHECKING:
    from repe.measuring.calibrate import Calibration, Trial

PROMPTS = "DsP^vX"
RANDOM = {"color": axes.FAINT, "linewidth": 0.8, "alpha": 0.7, "zorder": 1.5, "label": "random directions"}
MIDDLE = {"color": axes.FAINT, "linewidth": 0.8, "zorder": 1.5}
MEAN, TAIL = "mean, 95% interval", "95th percentile of tokens"
UNITS = {
    "kl": "doses",
    "gap": "gaps",
    "raw": "unit directions",
    "sigma": "standard deviations",
    "norm": "residual norms",
}


@dataclass(frozen=True)
class Quantity:
    """What is drawn of one side of the trade-off: means, and their intervals as far as they are possible; the fit, if
    there is one; every direction of the control; and what system prompts get by themselves."""

    color: str
    means: Array  # (alphas,)
    unsteered: float
    band: Array  # (2, alphas)
    fitted: Callable[[Array], Array] | None
    random: Array  # (directions, alphas)
    prompted: Mapping[str, float]


def quantities(curve: TradeoffCurve) -> tuple[Quantity, Quantity]:
    """Alignment and helpfulness."""
    columns, fits, control, baseline = curve.columns, curve.fits, curve.control, curve.baseline

    def quantity(color: str, column: str, least: float, fit: Fit, shape: Callable[..., Array], asked: Any) -> Quantity:
        band = np.stack([columns[f"{column}_low"], columns[f"{column}_high"]]).clip(least, 1)
        fitted = partial(shape, a=fit["a"].value, b=fit["b"].value) if fit.estimates else None
        random = np.empty((0, len(curve.alphas))) if control is None else getattr(control, column)
        prompted = dict(zip(baseline.prompts, asked(baseline).mean(1).tolist(), strict=True)) if baseline else {}
        means = columns[column]
        return Quantity(color, means, means[curve.alphas == 0].item(), band, fitted, random, prompted)

    falling = partial(bell, floor=curve.helpfulness.floor)
    return (
        quantity(axes.ALIGNED, "behaviour", -1, fits.behaviour, saturating, lambda b: b.alignment.behaviour),
        quantity(axes.HELPFUL, "helpfulness", 0, fits.bell, falling, lambda b: b.helpfulness.probability),
    )


def efficient_window(curve: TradeoffCurve, budget: float = 0.05) -> tuple[float, float]:
    """The ends of the strengths around 0 all of which keep the upper end of the loss's interval within a budget."""
    inside = curve.alphas[affordable(curve.alphas, curve.columns["loss_high"] <= budget)]
    return inside[0].item(), inside[-1].item()


def tradeoff(curve: TradeoffCurve, ax: Any = None, budget: float = 0.05) -> tuple[Any, Any]:
    """Draw behaviour above and helpfulness below, over the strength: means with 95% intervals, and their fits.

    Shaded are the strengths of `efficient_window`; ringed is the one that `curve.best` chooses, on half of the items.
    Neither is there, nor a fit of helpfulness, where the unsteered model guesses.

    Args:
        curve: what is drawn.
        ax: two axes, or one that is split into two.
        budget: the share of helpfulness that a strength may cost.
    """
    choice, window, (aligned, helpful) = curve.best(budget), efficient_window(curve, budget), quantities(curve)
    if curve.guesses:
        window, helpful = (0, 0), replace(helpful, fitted=None)
    floor, lost, kept = curve.helpfulness.floor, f"{100 * budget:.3g}%", (1 - budget) * helpful.unsteered
    upper, lower = panels = axes.stacked(ax)
    for panel, quantity in ((upper, aligned), (lower, helpful)):
        _draw(panel, curve.alphas, quantity)
        _shade(panel, window, f"loses at most {lost}")
        if not choice.reason:
            panel.axvline(choice.alpha, color=axes.ink(), linewidth=0.8)
            axes.ring(panel, choice.alpha, quantity.means[curve.alphas == choice.alpha].item())
    if not curve.guesses:
        axes.dotted(lower, kept, axes.AFFORDABLE)
    axes.dotted(lower, floor)
    upper.set(ylim=(-1.06, 1.06), yticks=[-1, 0, 1])
    lowest = min(floor, *helpful.means, *helpful.random.flat, *helpful.prompted.values())
    lower.set(ylim=(max(lowest - 0.05, -0.03), 1.03))
    _say_beside(upper, aligned.prompted)
    _say_beside(lower, helpful.prompted, {"guessing": floor} | ({} if curve.guesses else {f"{lost} lost": kept}))
    _say_above(upper, choice)
    axes.name_stacked(upper, lower, _alpha(curve), "alignment:\nP(aligned)\n- P(others)", "helpfulness:\nP(right)")
    axes.entitle(upper, f"{curve.concept}, steered", pad=18)
    axes.legend(*panels)
    return panels


def frontier(curve: TradeoffCurve, ax: Any = None, budget: float = 0.05) -> Any:
    """Draw behaviour against helpfulness, a point a strength, joined in order; the strength chosen is ringed."""
    choice, (aligned, helpful) = curve.best(budget), quantities(curve)
    furthest = np.abs(curve.alphas).max() or 1
    if ax is None:
        ax = axes.given(None, (6.4, 4.6))
    else:
        ax.set_subplotspec(*axes.cells(ax, 1))
    points = ax.scatter(aligned.means, helpful.means, s=36, c=curve.alphas, cmap=axes.DIVERGING, zorder=3)
    points.set(clim=(-furthest, furthest), edgecolor=axes.ink(), linewidth=0.6)
    ax.plot(aligned.means, helpful.means, color=axes.ink(), linewidth=0.8)
    for path in zip(aligned.random, helpful.random, strict=True):
        ax.plot(*path, **RANDOM)
    axes.outline(ax, aligned.unsteered, helpful.unsteered, "x", "alpha 0")
    if not choice.reason:
        at = curve.alphas == choice.alpha
        axes.ring(ax, aligned.means[at].item(), helpful.means[at].item(), _chosen(choice))
    for mark, name in _marked(aligned.prompted):
        axes.outline(ax, aligned.prompted[name], helpful.prompted[name], mark, f"prompt: {short(name)}")
    if not curve.guesses:
        axes.dotted(ax, (1 - budget) * helpful.unsteered, axes.AFFORDABLE, label=f"{100 * budget:.3g}% lost")
    ax.set(xlim=(-1.06, 1.06), xticks=[-1, -0.5, 0, 0.5, 1], xlabel="alignment: P(aligned) - P(others)")
    ax.set_ylabel("helpfulness: P(right)")
    axes.entitle(ax, f"{curve.concept}, steered")
    axes.legend(ax)
    ax.figure.colorbar(points, ax=ax, label=_alpha(curve))
    return ax


def costs(curve: TradeoffCurve, ax: Any = None) -> Any:
    """Draw the KL divergence from the unsteered model over the strength, as far as it was measured.

    Its mean over texts has a band, the 95% interval; the other line is the 95th percentile of tokens.

    Raises:
        ValueError: neither was measured.
    """
    columns, alphas = curve.columns, curve.alphas
    if "kl" not in columns and "kl_p95" not in columns:
        raise ValueError("the curve has no divergence: measure it with neutral texts, see `repe.tradeoff`")
    ax = axes.given(ax, axes.SIZE)
    if "kl" in columns:
        _band(ax, alphas, columns["kl"], (columns["kl_low"], columns["kl_high"]), axes.ALIGNED)
    if "kl_p95" in columns:
        ax.plot(alphas, columns["kl_p95"], color=axes.HELPFUL, marker="D", markersize=3.5, label=TAIL)
    ax.axvline(0, **MIDDLE)
    ax.set(xlabel=_alpha(curve), ylabel="KL divergence (nats a token)")
    ax.set_ylim(bottom=0)
    axes.entitle(ax, f"{curve.concept}, steered: how far the model is moved")
    axes.legend(ax)
    return ax


def _draw(ax: Any, alphas: Array, quantity: Quantity) -> None:
    _band(ax, alphas, quantity.means, quantity.band, quantity.color)
    if quantity.fitted:
        x = np.linspace(alphas[0], alphas[-1], 241)
        ax.plot(x, quantity.fitted(x), color=axes.ink(), linestyle="--", linewidth=1, label="fit")
    for random in quantity.random:
        ax.plot(alphas, random, **RANDOM)


def _band(ax: Any, alphas: Array, means: Array, ends: Iterable[Array], color: str) -> None:
    ax.fill_between(alphas, *ends, color=color, alpha=0.35, linewidth=0, label=MEAN)
    ax.plot(alphas, means, color=color, marker="o", markersize=3.5, label=MEAN)


def _shade(ax: Any, window: tuple[float, float], label: str) -> None:
    ax.axvline(0, **MIDDLE)
    if window[0] < window[1]:
        look = {"facecolor": (axes.AFFORDABLE, 0.2), "edgecolor": axes.AFFORDABLE, "linewidth": 0.8, "zorder": 0.5}
        ax.axvspan(*window, **look, label=label)


# what is said of them


def _say_above(ax: Any, choice: Choice) -> None:
    said, alpha = (_chosen(choice), choice.alpha) if not choice.reason else ("no strength is recommended", 0)
    above = {"xycoords": ax.get_xaxis_transform(), "xytext": (0, 3), "textcoords": "offset points"}
    ax.annotate(said, (alpha, 1), **above, ha="center", va="bottom", fontsize="small")


def _say_beside(ax: Any, prompted: Mapping[str, float], levels: Mapping[str, float] | None = None) -> None:
    """Marks and names of levels on the right."""
    for mark, name in _marked(prompted):
        axes.outline(ax, 1, prompted[name], mark, markersize=5, transform=ax.get_yaxis_transform())
    axes.beside(ax, {f"prompt: {short(name)}": level for name, level in prompted.items()} | dict(levels or {}))


def _alpha(curve: TradeoffCurve) -> str:
    unit = curve.provenance.get("unit", "gap")
    return f"alpha ({UNITS.get(unit, unit)})" if unit else "alpha"


def _chosen(choice: Choice) -> str:
    return f"chosen: alpha {choice.alpha:.3g}"


def _marked(prompted: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    return zip(cycle(PROMPTS), prompted, strict=False)


# calibration


def calibration(found: Calibration, ax: Any = None, *, sign: int = 1) -> tuple[Any, Any]:
    """Draw what was tried out, block by block: above, how well every reader reads; below, what steering there gains.

    Blocks in a row that were steered at together are one mark, as broad as they are.

    Args:
        found: what `repe.calibrate` returned.
        ax: two axes, or one that is split into two.
        sign: +1 for more of the concept, -1 for less.
    """
    if sign not in (1, -1):
        raise ValueError(f"sign is +1 for more of the concept and -1 for less, got {sign}")
    setting = found.more if sign == 1 else found.less
    upper, lower = panels = axes.stacked(ax)
    readers = list(dict.fromkeys(trial.reader for trial in setting.trials))
    for reader, look in zip(readers, axes.looks(len(readers)), strict=True):
        trials = [trial for trial in setting.trials if trial.reader == reader]
        trials.sort(key=_middle)
        for panel, values in (
            (upper, [t.accuracy for t in trials]),
            (lower, [t.validation.gain.value for t in trials]),
        ):
            single = [(t.blocks[0], value) for t, value in zip(trials, values, strict=True) if len(t.blocks) == 1]
            panel.plot(*zip(*single, strict=True) if single else ((), ()), **look, label=reader)
            firsts, lasts = [t.blocks[0] for t in trials], [t.blocks[-1] for t in trials]
            panel.hlines(values, firsts, lasts, color=look["color"], linewidth=3)
        gains = [t.validation.gain for t in trials]
        ends = [g.low for g in gains], [g.high for g in gains]
        lower.vlines([_middle(t) for t in trials], *ends, color=look["color"], linewidth=1.5)
    if setting.alpha:
        best = setting.trial
        for panel, value in ((upper, best.accuracy), (lower, best.validation.gain.value)):
            axes.ring(panel, _middle(best), value, f"chosen: alpha {setting.alpha:.3g}, by {best.reader}")
    axes.dotted(upper, 0.5)
    lower.axhline(0, color=axes.FAINT, linewidth=1, zorder=1.5)
    upper.set_ylim(0, 1.06)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    gain = f"steering:\ngain within {found.budget:.0%}\nof helpfulness"
    axes.name_stacked(upper, lower, "block", "reading:\npairs ordered\nrightly", gain)
    axes.entitle(upper, f"{found.concept}, {'more' if sign == 1 else 'less'} of it")
    axes.legend(*panels)
    return panels


def _middle(trial: Trial) -> float:
    return (trial.blocks[0] + trial.blocks[-1]) / 2
