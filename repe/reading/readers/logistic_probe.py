"""The logistic probe: it reads along the normal of its boundary and writes along what that normal responds to."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from repe.reading.readers.reader import Floats, Mask, Reader, pattern


class LogisticProbe(Reader):
    """Logistic regression on standardised activations, its normal brought back to the activations' own units.

    The normal turns away from directions of much noise, and so does not point from pole to pole: written along, it
    leaves the data. What is written is the pattern of Haufe et al. 2014 (see `reader.pattern`).

    Args:
        C: the inverse of the L2 penalty's strength, as in scikit-learn.

    Source: Alain and Bengio 2016, arXiv 1610.01644, for the probe.
    """

    def __init__(self, C: float = 1.0) -> None:
        self.C = C

    def _directions(self, X: Floats, positive: Mask, groups: NDArray[Any] | None) -> tuple[Floats, Floats]:
        scaler = StandardScaler().fit(X)
        probe = LogisticRegression(C=self.C, tol=1e-6, max_iter=10_000).fit(scaler.transform(X), positive)
        normal = probe.coef_[0] / scaler.scale_
        return normal, pattern(normal, X)
