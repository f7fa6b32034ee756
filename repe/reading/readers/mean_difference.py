"""The mean difference: what the poles differ by on average. It reads and writes along the same direction."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from repe.reading.readers.reader import Floats, Mask, Reader, mean_difference


class MeanDifference(Reader):
    """The positive pole's mean less the negative's. Pairs do not matter: their mean difference is the same.

    The best direction to write along, and the best to read along where the classes' noise is isotropic.
    Source: Rimsky et al. 2023, arXiv 2312.06681; the "mass mean" of Li et al. 2023, arXiv 2306.03341.
    """

    def _directions(self, X: Floats, positive: Mask, groups: NDArray[Any] | None) -> tuple[Floats, Floats]:
        difference = mean_difference(X, positive)
        return difference, difference
