"""Counts that a caller chooses: whole numbers, refused before anything is run."""

from __future__ import annotations

import operator
from typing import Any

MOST = 2**31 - 1


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raises ValueError, which names the argument, for what is no whole number in its range; None is left alone.

    Example:
        >>> check_counts(batch_size=32, batch_tokens=None)
    """
    for name, value in counts.items():
        if value is not None and not (is_whole(value) and least <= value <= MOST):
            raise ValueError(f"{name}={value!r:.80} must be a whole number, {least} at least and {MOST} at most")


def is_whole(value: Any) -> bool:
    """Whether it counts: of Python, NumPy or a tensor. True is an answer, and no number."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return "bool" not in str(getattr(value, "dtype", type(value)))
