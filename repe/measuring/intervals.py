"""Intervals: the mean over items of what was measured, and how far chance may have moved it.

Every interval is one of 95%. That of a share of yes and no is Wilson's; all others come from a clustered bootstrap-t:
whole clusters of items are resampled, and every resampled mean counts in units of its own standard error. For a dozen
clusters of skewed items the percentile bootstrap, BCa and Student's t are too narrow (the t, with the same errors,
misses the upper end of a loss in 8% of cases). What is no mean (a loss, the parameters of a curve) is linearised in its
items first. How the items were chosen, no interval knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.stats import binomtest, norm

Array = np.ndarray

RESAMPLES = 1999
TAIL = 50  # of the resamples on either side: (1999 + 1) * 2.5%
FEWEST_CLUSTERS = 4  # below, an interval is infinite
Z = float(norm.ppf(0.975))
LEAST_ERROR = 0.2  # of a resampled mean, as a share of the mean's own


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, which is infinite where there are too few clusters to say."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def proportion(yes: int, of: int) -> Estimate:
    """Estimate a share of what is there or is not, with Wilson's interval, which has a width where all are alike.

    Example:
        >>> print(proportion(0, 20))
        0 [0, 0.161]
    """
    low, high = binomtest(yes, of).proportion_ci(method="wilson")
    return Estimate(yes / of, float(low), float(high))


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of items at every strength.

    Attributes:
        alphas: (alphas,), sorted, 0 among them.
        values: (alphas, items).
        groups: the cluster of every item; an item whose group is empty is a cluster of its own, as all are for None.
        seed: of the resampling.

    Example:
        >>> right = Measured(np.array([0.0, 1.0]), np.array([[0.9, 0.8, 0.7, 0.8], [0.8, 0.8, 0.5, 0.7]]))
        >>> print(right.loss.estimates()[1])
        0.125 [-0.0386, 0.314]
    """

    alphas: Array
    values: Array
    groups: Sequence[str] | None = None
    seed: int = 0

    @property
    def mean(self) -> Array:
        """(alphas,), over items."""
        return self.values.mean(1)

    @property
    def at_zero(self) -> Array:
        """(items,), where alpha is 0."""
        return self.values[self.alphas == 0][0]

    @property
    def gain(self) -> Measured:
        """What is more than at alpha 0, item by item."""
        return replace(self, values=self.values - self.at_zero)

    @property
    def loss(self) -> Measured:
        """Values whose mean over items is 1 - H / H0, H the mean of what was measured and H0 that at alpha 0.

        Their spread over items is that of the linearisation of this ratio.
        """
        ratio = self.mean[:, None] / self.at_zero.mean()
        return replace(self, values=1 - ratio - (self.values - ratio * self.at_zero) / self.at_zero.mean())

    @property
    def clusters(self) -> list[str]:
        """The name of every item's cluster."""
        return clusters_of([""] * self.values.shape[1] if self.groups is None else self.groups)

    def at(self, where: Array) -> Measured:
        """What was measured at these strengths alone, a mask."""
        return replace(self, alphas=self.alphas[where], values=self.values[where])

    def near(self, reach: float) -> Measured:
        """What was measured where |alpha| <= reach."""
        return self.at(np.abs(self.alphas) <= reach)

    def of(self, items: Array) -> Measured:
        """What was measured of these items alone, a mask."""
        return replace(self, values=self.values[:, items], groups=np.array(self.clusters)[items].tolist())

    def estimates(self, values: Array | None = None) -> list[Estimate]:
        """Estimate the mean of every row of `values` (rows, items), or of what was measured, with its interval.

        Clusters are resampled for all rows at once. The error of a resampled mean is the linearised one of a ratio of
        cluster sums; that of the mean itself is the jackknife's without its factor (G - 1) / G, called CR3.
        """
        values = np.asarray(self.values if values is None else values, dtype=float)
        means = values.mean(1)
        sizes, sums = self._by_cluster(values - means[:, None])
        if len(sizes) < FEWEST_CLUSTERS:
            return [Estimate(float(mean), -np.inf, np.inf) for mean in means]
        error = np.sqrt(((sums / (sizes.sum() - sizes)[:, None]) ** 2).sum(0))
        low, high = means - error * _roots(sizes, sums, error, self.seed)[::-1]
        return [Estimate(*map(float, estimate)) for estimate in zip(means, low, high, strict=True)]

    def _by_cluster(self, values: Array) -> tuple[Array, Array]:
        """Sizes (clusters,) and sums (clusters, rows) of values (rows, items)."""
        _, numbers = np.unique(self.clusters, return_inverse=True)
        sizes = np.bincount(numbers).astype(float)
        sums = np.zeros((len(sizes), len(values)))
        np.add.at(sums, numbers, values.T)
        return sizes, sums


def clusters_of(groups: Sequence[str]) -> list[str]:
    """Name every item's cluster: its group, or the item itself where it has none."""
    return [f"group {group}" if group else f"item {number:09}" for number, group in enumerate(groups)]


def _roots(sizes: Array, sums: Array, error: Array, seed: int) -> Array:
    """(2, rows), the tails of the resampled means in units of their own errors; the rows' means are 0.

    Where few clusters differ from the rest, many a resample misses them all and has no error: see `LEAST_ERROR`.
    """
    weights, clusters = _weights(len(sizes), seed), len(sizes)
    totals = (weights @ sizes)[:, None]
    means = weights @ sums / totals
    squares = weights @ sums**2 - 2 * means * (weights @ (sums * sizes[:, None]))
    squares += means**2 * (weights @ sizes**2)[:, None]
    errors = np.sqrt(np.maximum(squares, 0) * clusters / (clusters - 1)) / totals
    errors = np.maximum(errors, LEAST_ERROR * error)
    roots = np.divide(means, errors, out=np.zeros_like(means), where=errors > 0)
    return np.sort(roots, axis=0)[[TAIL - 1, -TAIL]]


@lru_cache(maxsize=8)
def _weights(clusters: int, seed: int) -> Array:
    """(resamples, clusters), how often each cluster was drawn."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(float)
