"""The principal direction: along which the pairs differ most. The labels give it its sign and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from repe.reading.readers.reader import Floats, Mask, Reader, deviations, mean_difference


class PrincipalDirection(Reader):
    """The first principal component of the pairs' differences, taken with both signs.

    With both signs the differences have mean zero: the order inside the pairs cannot matter, and centring cannot remove
    the mean difference, which is the concept. A pair with several rows of a pole differs by its poles' means.
    Rows without `groups` are compared as if every positive were paired with every negative.

    Raises:
        ValueError: from `fit`, for a pair that lacks a pole.

    Source: Zou et al. 2023, arXiv 2310.01405, section 3.1 (there, the order inside the pairs is random).
    """

    def _directions(self, X: Floats, positive: Mask, groups: NDArray[Any] | None) -> tuple[Floats, Floats]:
        differences = _differences_of_all(X, positive) if groups is None else _differences(X, positive, groups)
        direction = _first_component(differences)
        return direction, direction


def _first_component(rows: Floats) -> Floats:
    """The direction (d_model,) of the greatest second moment of the rows (n, d_model), at any length.

    From the smaller of the two Gram matrices, which has the same first eigenvalue: much faster than a whole SVD.
    """
    wide = rows.shape[0] < rows.shape[1]
    gram = rows @ rows.T if wide else rows.T @ rows
    last = len(gram) - 1
    first = eigh(gram, subset_by_index=[last, last])[1][:, 0]
    return rows.T @ first if wide else first


def _differences(X: Floats, positive: Mask, groups: NDArray[Any]) -> Floats:
    """Each pair's positive mean less its negative mean, (pairs, d_model)."""
    names, pair = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), 2))
    np.add.at(counts, (pair, positive.astype(int)), 1)
    for row, pole in np.argwhere(counts == 0):
        raise ValueError(f"pair {names[row]} has no {('negative', 'positive')[pole]}: every pair needs both poles")

    weights = np.where(positive, 1.0, -1.0) / counts[pair, positive.astype(int)]
    differences = np.zeros((len(names), X.shape[1]))
    np.add.at(differences, pair, weights[:, None] * X)
    return differences


def _differences_of_all(X: Floats, positive: Mask) -> Floats:
    """Rows (n + 1, d_model) with the second moment of the differences of every positive from every negative.

    That moment is `S+ + S- + d d^T`, the poles' covariances and mean difference, so that n^2 / 4 pairs need no room.
    """
    weights = np.where(positive, positive.sum(), (~positive).sum()) ** -0.5
    return np.vstack([weights[:, None] * deviations(X, positive), mean_difference(X, positive)])
