"""The linear discriminant: the mean difference, whitened to read and as it is to write."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from repe.reading.readers.reader import Floats, Mask, Reader, deviations, mean_difference


class LinearDiscriminant(Reader):
    """Fisher's discriminant `S^-1 d` for mean difference `d` and shrunk within-class covariance `S`.

    `S` is shrunk towards the diagonal by the amount of Ledoit and Wolf 2004, on standardised activations. What is
    written is the pattern of Haufe et al. 2014 for that direction, `S (S^-1 d) = d`: the mean difference.
    """

    def _directions(self, X: Floats, positive: Mask, groups: NDArray[Any] | None) -> tuple[Floats, Floats]:
        scaler = StandardScaler().fit(X)
        standardised = scaler.transform(X)
        # A ridge regression of the labels has S^-1 d for its normal. With fewer rows than dimensions it solves a system
        # of the rows, where LinearDiscriminantAnalysis solves one of the dimensions, in time cubic in d_model.
        ridge = Ridge(_penalty(deviations(standardised, positive))).fit(standardised, positive)
        return ridge.coef_ / scaler.scale_, mean_difference(X, positive)


def _penalty(within: Floats) -> float:
    """The ridge penalty `n a m / (1 - a)` that shrinks as `(1 - a) S + a m I`, m the mean variance, does.

    Where nothing varies within the poles, any penalty finds their difference.
    """
    amount = min(ledoit_wolf_shrinkage(within, assume_centered=True), 1 - 1e-6)
    return float(amount / (1 - amount) * np.square(within).sum() / within.shape[1]) or 1.0
