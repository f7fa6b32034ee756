"""Pictures of the two poles of contrast pairs: what tells them apart, one score or a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from repe.measuring.intervals import Array
from repe.plot import axes
from repe.reading.read import score
from repe.reading.vector import ConceptVector

BINS = 30


def poles(
    vector: ConceptVector,
    positive: Any,
    negative: Any,
    ax: Any = None,
    *,
    block: int | None = None,
    blocks: Sequence[int] | None = None,
) -> Any:
    """Draw the scores of texts of both poles, as two histograms: how well the vector tells them apart.

    Args:
        vector: what reads them.
        positive, negative: their activations, as `repe.capture` returns them: (texts, blocks, d_model), or (texts,
            d_model) of one block.
        ax: the axes to draw on.
        block: where they are read; the first recommended one by default.
        blocks: which blocks the activations are of, where these are neither the vector's nor `block` alone.

    Raises:
        ValueError: the activations are not of such a shape, or of the wrong blocks; or the poles have no distance.
        IndexError: the vector does not hold the block.
    """
    block = vector.recommended[0] if block is None else block
    if not vector.at(block).scale > 0:
        raise ValueError(f"{vector.concept}: the poles have no distance at block {block}, so there are no scores there")
    sides = [_scores(vector, _at(x, vector, block, blocks), block) for x in (positive, negative)]
    ax = axes.given(ax, axes.SIZE)
    edges = np.histogram_bin_edges(np.concatenate(sides), bins=BINS)
    for name, color, side, right in (
        ("positive", axes.POSITIVE, sides[0], f"{(sides[0] > 0).mean():.0%} above 0"),
        ("negative", axes.NEGATIVE, sides[1], f"{(sides[1] < 0).mean():.0%} below 0"),
    ):
        look = {"color": (color, 0.55), "edgecolor": color, "histtype": "stepfilled", "linewidth": 1.5}
        ax.hist(side, _around(side, edges), **look, label=f"{name}: {len(side)} texts, {right}")
    axes.at_the_poles(ax.axvline)
    ax.set(xlabel=axes.SCORE, ylabel="texts")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.entitle(ax, f"{vector.concept} at block {block}: the two poles")
    axes.legend(ax)
    return ax


def _around(values: Array, edges: Array) -> Array:
    """The edges without those of bins that are empty, at either end."""
    first, last = np.searchsorted(edges, values.min(), "right") - 1, np.searchsorted(edges, values.max())
    return edges[min(first, last - 1) : last + 1]


def pairs(
    positive: Any,
    negative: Any,
    ax: Any = None,
    *,
    vector: ConceptVector | None = None,
    block: int | None = None,
    blocks: Sequence[int] | None = None,
) -> Any:
    """Draw contrast pairs in a plane, the poles of each joined by a line.

    The plane is that of the two directions in which all vary most; or, with a vector, its score against the direction
    in which they vary most besides.

    Args:
        positive, negative: the poles' activations, pair by pair, as `repe.capture` returns them: (pairs, blocks,
            d_model), or (pairs, d_model) of one block.
        ax: the axes to draw on.
        vector: whose score is drawn along x.
        block: which of the blocks is drawn; with a vector the first recommended one by default.
        blocks: which blocks the activations are of, where these are neither the vector's nor `block` alone.

    Raises:
        ValueError: the activations are not of such a shape, or of the wrong blocks; or not as many of either pole.
    """
    if vector is not None and block is None:
        block = vector.recommended[0]
    sides = [_at(x, vector, block, blocks) for x in (positive, negative)]
    if sides[0].shape != sides[1].shape:
        raise ValueError(f"the poles of pairs have one shape, got {sides[0].shape} and {sides[1].shape}")
    places, labels = _plane(np.concatenate(sides), vector, block)
    ends = np.split(places, 2)
    ax = axes.given(ax, axes.SIZE)
    ax.plot(*np.stack(ends).transpose(2, 0, 1), color=axes.FAINT, linewidth=0.6, alpha=0.35, zorder=1.5)
    look = {"s": 22, "edgecolor": axes.ink(), "linewidth": 0.3}
    ax.scatter(*ends[0].T, **look, color=axes.POSITIVE, marker="o", label="positive")
    ax.scatter(*ends[1].T, **look, color=axes.NEGATIVE, marker="s", label="negative")
    if vector is not None:
        axes.at_the_poles(ax.axvline)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    of = "pairs" if vector is None else f"pairs of {vector.concept}"
    axes.entitle(ax, f"{len(ends[0])} {of}" + ("" if block is None else f" at block {block}"))
    axes.legend(ax)
    return ax


def _plane(x: Array, vector: ConceptVector | None, block: int | None) -> tuple[Array, list[str]]:
    """(texts, 2) and what the two are; the sign of a component is chosen so that the first half lies on its right."""
    centred = x - x.mean(0)
    total = max((centred**2).sum(), np.finfo(float).tiny)
    if vector is not None and block is not None:
        read = vector.at(block).read[0].double().numpy()
        centred = centred - np.outer(centred @ read, read) / (read @ read)
    u, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    along = u[:, :2] * sizes[:2]
    along = along * np.where(along[: len(x) // 2].mean(0) < 0, -1, 1)
    shares = [f"({size**2 / total:.0%} of the variance)" for size in sizes[:2]]
    if vector is None or block is None:
        return along, [f"component {i + 1} {share}" for i, share in enumerate(shares)]
    return np.stack([_scores(vector, x, block), along[:, 0]], 1), [axes.SCORE, f"component besides {shares[0]}"]


def _scores(vector: ConceptVector, x: Array, block: int) -> Array:
    """(texts,), of activations (texts, d_model) at a block."""
    return score(torch.from_numpy(x)[:, None], vector.at(block))[:, 0].numpy()


def _at(x: Any, vector: ConceptVector | None, block: int | None, blocks: Sequence[int] | None) -> Array:
    """(texts, d_model), the activations of one block."""
    x = np.asarray(x, dtype=float)
    if x.ndim == 3:
        x = x[:, _column(x.shape[1], vector, block, blocks)]
    if x.ndim != 2 or 0 in x.shape or (vector is not None and x.shape[1] != vector.d_model):
        width = "d_model" if vector is None else f"d_model {vector.d_model}"
        raise ValueError(f"activations are (texts, blocks, {width}), as `repe.capture` returns them; got {x.shape}")
    return x


def _column(count: int, vector: ConceptVector | None, block: int | None, blocks: Sequence[int] | None) -> int:
    if blocks is None and count == 1:
        return 0
    held = sorted(blocks if blocks is not None else vector.blocks if vector is not None else range(count))
    if len(held) != count or block not in held:
        raise ValueError(
            f"the activations are of {count} blocks, and block {block} cannot be found among {held}: pass as "
            "blocks= the numbers that they were captured at, and as block= one of them"
        )
    return held.index(block)
