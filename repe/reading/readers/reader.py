"""What every reader shares: the contract, the orientation of its directions, and the scale on which it reads.

A reader is a binary scikit-learn classifier that is one pair of directions. A subclass says only how they are found.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Reader(ClassifierMixin, BaseEstimator):
    """The base of all readers. All sums are in float64, whatever the dtype of the activations.

    Attributes:
        classes_: (2,), the labels in order; the greater one is the positive pole.
        read_: (d_model,), the direction that reads, scaled so that `read_ @ write_ == 1`.
        write_: (d_model,), the direction that writes, of unit norm. Both have the sign by which the positive pole reads
            as the greater.
        midpoint_: the middle of the poles' mean projections on `read_`, in units of the residual stream.
        scale_: half the distance between them, in the same units. 0 where the poles' means cannot be told apart.
    """

    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Find the directions.

        Args:
            X: (n, d_model), activations.
            y: (n,), labels of two classes.
            groups: (n,), which contrast pair every row belongs to; None where the rows are not paired.

        Raises:
            ValueError: other than two classes, unequal lengths, or values that are not finite.
        """
        activations, labels = validate_data(self, X, y, dtype=np.float64)
        positive = self._positive(labels)
        pairs = None if groups is None else column_or_1d(groups)
        check_consistent_length(activations, pairs)

        read, write = self._directions(activations, positive, pairs)
        self.read_, self.write_ = normalised(read, write, mean_difference(activations, positive))
        projections = activations @ self.read_
        poles = projections[~positive].mean(), projections[positive].mean()
        self.midpoint_ = float(poles[0] + poles[1]) / 2
        self.scale_ = max(0.0, float(poles[1] - poles[0]) / 2)
        return self

    def _positive(self, labels: NDArray[Any]) -> Mask:
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        if len(self.classes_) > 2:
            kind = type_of_target(labels)
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        if len(self.classes_) < 2:
            raise ValueError(f"a reader needs both poles, and y has one class only: {self.classes_.tolist()}")
        return labels == self.classes_[1]

    def _directions(self, X: Floats, positive: Mask, groups: NDArray[Any] | None) -> tuple[Floats, Floats]:
        """The read and the write direction, of any length and sign."""
        raise NotImplementedError

    def decision_function(self, X: ArrayLike) -> Floats:
        """The scores (n,) of activations `X` (n, d_model): the poles' means stand at -1 and +1.

        Where the poles cannot be told apart (`scale_ == 0`) the distance from the midpoint is not divided.
        """
        check_is_fitted(self)
        activations: Floats = validate_data(self, X, dtype=np.float64, reset=False)
        return (activations @ self.read_ - self.midpoint_) / (self.scale_ or 1.0)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The label (n,) of the pole on whose side of the midpoint every row of `X` (n, d_model) is."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def mean_difference(X: Floats, positive: Mask) -> Floats:
    """The positive pole's mean less the negative's, (d_model,)."""
    return X[positive].mean(axis=0) - X[~positive].mean(axis=0)


def deviations(X: Floats, positive: Mask) -> Floats:
    """Every row less the mean of its own pole, (n, d_model): what varies within the classes."""
    return X - np.where(positive[:, None], X[positive].mean(axis=0), X[~positive].mean(axis=0))


def pattern(normal: Floats, X: Floats) -> Floats:
    """What a classifier's normal `r` responds to: `S r / (r^T S r)`, (d_model,), with `S` the covariance of `X`.

    Where nothing varies along the normal, the normal itself. `S` is never formed. It is the covariance of all rows, not
    that within the poles: both give the mean difference for the ideal normal, but with fewer rows than dimensions the
    covariance within the poles is mostly noise.

    Source: Haufe et al. 2014, "On the interpretation of weight vectors of linear models", theorem 1.
    """
    centred = X - X.mean(axis=0)
    along = centred @ normal
    if np.linalg.norm(along) <= 1e-10 * np.linalg.norm(centred) * np.linalg.norm(normal):
        return normal
    return centred.T @ along / (along @ along)


def normalised(read: Floats, write: Floats, difference: Floats) -> tuple[Floats, Floats]:
    """The same two directions with `|write| == 1` and `read @ write == 1`, reading `difference` as positive.

    Where the difference reads as exactly zero, the greatest component of `write` is the positive one.

    Raises:
        ValueError: the two are orthogonal, or point opposite ways: what is written could not be read.
    """
    read, write = unit(read), unit(write)
    cosine = read @ write
    if not cosine > 0:
        raise ValueError(f"read and write must point the same way: their cosine is {cosine:.3g}")
    orientation = np.sign(read @ difference) or np.sign(write[np.argmax(np.abs(write))])
    return orientation * read / cosine, orientation * write


def unit(direction: Floats) -> Floats:
    """The direction at length one; the first axis for the zero vector, which has none."""
    length = np.linalg.norm(direction)
    return direction / length if length > 0 else np.eye(1, len(direction))[0]
