"""Pictures on matplotlib axes. Every function takes the axes to draw on, makes them where none are given, and returns
them; what is drawn was computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from repe.reading import Reading
    from repe.vector import ConceptVector

ALIGNED, HELPFUL, FAINT = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito's palette: safe for colour-blind readers


def profile(vector: ConceptVector, ax: Any = None) -> Any:
    """How many held-out pairs are ordered rightly, block by block; the recommended block is filled."""
    ax = _axes(ax)
    best = [block in vector.recommended for block in vector.blocks]
    ax.bar(vector.blocks, vector.accuracy.tolist(), color=[ALIGNED if b else "none" for b in best], edgecolor=ALIGNED)
    ax.axhline(0.5, color=FAINT, linestyle=":", linewidth=1)
    where = "block" if vector.site == "block" else f"{vector.site} of block"
    ax.set(xlabel=where, ylabel="held-out pairs ordered rightly", ylim=(0, 1.02), xticks=vector.blocks)
    ax.set_title(f"where {vector.concept} is read")
    return ax


def scan(reading: Reading, ax: Any = None) -> Any:
    """The scores of a text, tokens by blocks: white is the middle, the poles stand at -1 and +1."""
    ax = _axes(ax, (max(4.0, 0.32 * len(reading.tokens)), 0.8 + 0.28 * len(reading.blocks)))
    image = ax.imshow(reading.scores.T.numpy(), cmap="PuOr", vmin=-2, vmax=2, aspect="auto", origin="lower")
    ax.set_xticks(range(len(reading.tokens)), [t.strip() or "·" for t in reading.tokens], rotation=90)
    ax.set_yticks(range(len(reading.blocks)), [str(b) for b in reading.blocks])
    ax.set(ylabel="block", title=f"{reading.concept}, token by token")
    ax.figure.colorbar(image, ax=ax, label="score (poles at ±1)")
    return ax


def strengths(alphas: Sequence[float], behaviour: Tensor, helpfulness: Tensor, ax: Any = None) -> Any:
    """Behaviour, in [-1, 1], and helpfulness, in [0, 1], over the strength."""
    ax = _axes(ax)
    ax.plot(alphas, behaviour.tolist(), marker="o", color=ALIGNED, label="behaviour")
    ax.plot(alphas, helpfulness.tolist(), marker="s", color=HELPFUL, label="helpfulness")
    ax.axvline(0, color=FAINT, linewidth=1)
    ax.set(xlabel="alpha (gaps)", ylabel="P(aligned) - P(misaligned);  P(right)", ylim=(-1.05, 1.05))
    ax.set_yticks(np.linspace(-1, 1, 5))
    ax.legend(frameon=False)
    ax.set_title("what the strength does")
    return ax


def _axes(ax: Any, size: tuple[float, float] = (4.8, 3.2)) -> Any:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
