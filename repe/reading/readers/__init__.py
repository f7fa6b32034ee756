"""Readers: scikit-learn estimators that fit a concept's directions from activations.

Each is a binary classifier over activations (n, d_model) that has, once fitted, a direction that reads (`read_`), one
that writes (`write_`), and the `midpoint_` and `scale_` that put the two poles at -1 and +1. They know nothing of
models or tokens, and go through scikit-learn's own checks, so that its cross-validation and searches work on them.
"""

from __future__ import annotations

from difflib import get_close_matches

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_X_y

from repe.reading.readers.linear_discriminant import LinearDiscriminant
from repe.reading.readers.logistic_probe import LogisticProbe
from repe.reading.readers.mean_difference import MeanDifference
from repe.reading.readers.principal_direction import PrincipalDirection
from repe.reading.readers.reader import Floats, mean_difference, normalised, pattern

__all__ = [
    "LinearDiscriminant",
    "LogisticProbe",
    "MeanDifference",
    "PrincipalDirection",
    "directions",
    "make",
]

NAMES = {
    "mean": MeanDifference,
    "pca": PrincipalDirection,
    "probe": LogisticProbe,
    "lda": LinearDiscriminant,
}


def make(reader: str | BaseEstimator) -> BaseEstimator:
    """An unfitted reader, by name or as an unfitted copy of the caller's estimator.

    Raises:
        ValueError: the name is not known.
        TypeError: it is not a scikit-learn estimator.
    """
    if not isinstance(reader, str):
        return clone(reader)
    if reader not in NAMES:
        near = get_close_matches(reader.lower(), NAMES, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no reader is called {reader!r}: {hint}There are {', '.join(map(repr, NAMES))}")
    return NAMES[reader]()


def directions(estimator: BaseEstimator, X: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """The read and the write direction, each (d_model,), of any linear binary classifier.

    They are its `read_` and `write_` if it has them. Else its `coef_`, (1, d_model) or (d_model,), reads, and the
    pattern of Haufe et al. 2014 writes. `|write| == 1`, `read @ write == 1`, and the greater label is positive.

    Args:
        estimator: fitted.
        X, y: the activations (n, d_model) and labels (n,) that it was fitted to.

    Raises:
        TypeError: it has neither.
        ValueError: its directions do not fit the activations, or there are not two labels.
    """
    activations, labels = check_X_y(X, y, dtype=np.float64)
    classes = np.unique(labels)
    if len(classes) != 2:
        raise ValueError(f"y must have two classes, one a pole, and it has {len(classes)}")
    positive = labels == classes[1]
    width = activations.shape[1]
    if hasattr(estimator, "read_") and hasattr(estimator, "write_"):
        read, write = _direction(estimator, "read_", width), _direction(estimator, "write_", width)
    elif hasattr(estimator, "coef_"):
        read = _direction(estimator, "coef_", width)
        write = pattern(read, activations)
    else:
        raise TypeError(
            f"{type(estimator).__name__} has no direction: after fit it has neither `read_` and `write_` nor `coef_`. "
            "Give an estimator with `coef_` in the activations' own coordinates; for a pipeline that standardises "
            "before it classifies, that is LogisticProbe"
        )
    return normalised(read, write, mean_difference(activations, positive))


def _direction(estimator: BaseEstimator, attribute: str, width: int) -> Floats:
    values = np.asarray(getattr(estimator, attribute), dtype=np.float64)
    if values.shape not in {(width,), (1, width)}:
        raise ValueError(
            f"{type(estimator).__name__}.{attribute} has shape {values.shape}, and one direction of these activations "
            f"has shape ({width},): the estimator must have been fitted to the same two classes"
        )
    return values.reshape(-1)
