"""The picture of a forecast: efficiency by block, with the band of random directions, beside reading."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from repe.plot import axes

if TYPE_CHECKING:
    from repe.measuring.forecast import Forecast


def forecast(found: Forecast, ax: Any = None) -> Any:
    """Draw the efficiency of every reader by block with its interval, and where 95% of random directions stay.

    A thick line is that of blocks in a row that are pushed together.

    The share of held-out pairs that the best reader orders rightly is dotted, on an axis of its own: it says something
    else.

    Args:
        found: the forecast.
        ax: the axes to draw on.
    """
    ax = axes.given(ax, axes.SIZE)
    band = {"color": axes.FAINT, "alpha": 0.3, "linewidth": 0}
    ax.fill_between(found.blocks, -found.random, found.random, label="95% of random directions", **band)
    for row, (reader, color) in enumerate(zip(found.readers, cycle(axes.SEVERAL))):  # a cycle has no end
        ax.plot(found.blocks, found.efficiency[row], marker="o", markersize=3, color=color, label=reader)
        ax.fill_between(found.blocks, found.low[row], found.high[row], alpha=0.15, linewidth=0, color=color)
        for run in (run for run in found.runs if run.reader == reader):
            ends = [run.blocks[0] - 0.3, run.blocks[-1] + 0.3]
            ax.plot(ends, [run.efficiency.value] * 2, color=color, linewidth=3, alpha=0.6, solid_capstyle="butt")
    reader, block = found.best
    axes.dotted(ax, 0)
    beside = ax.twinx()
    beside.plot(found.blocks, found.accuracy[found.readers.index(reader)], color=axes.FAINT, linestyle=":")
    beside.set(ylim=(0.4, 1.02), ylabel="held-out pairs ordered rightly (dotted)")
    ax.set(xlabel="block", ylabel="efficiency, nats a root of nats")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.entitle(ax, f"{found.concept}: written best at block {block}, reader {reader}")
    axes.legend(ax)
    return ax
