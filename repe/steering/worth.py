"""What a strength is worth: warnings of one that moves nothing, that nobody would feel, or that would break text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from repe.reading.vector import DIVERGENCE, UNUSUAL
from repe.steering.edit import Edit, Placement

FELT, BEARABLE = 0.0005, 0.5  # nats a token


class StrengthWarning(UserWarning):
    """A strength is expected to be felt by nobody, or to break the text."""


class NotWrittenWarning(UserWarning):
    """Steering along a vector moves its concept's behaviour no further than steering along many random ones does."""


def warn_of_strength(placement: Placement, alpha: float) -> bool:
    """Warn of a strength that will hardly be felt, or break the text, and tell whether it is one."""
    expected = placement.divergence(alpha)
    if FELT <= expected <= BEARABLE or math.isnan(expected):
        return False
    felt = "hardly a word will change" if expected < FELT else "the text is likely to break down"
    at_one = placement.divergence(1.0)
    enough = f"are alpha={(DIVERGENCE / at_one) ** 0.5:.3g}" if at_one else "are not expected of any alpha"
    warnings.warn(
        f"alpha={alpha:g} is expected to make plain text diverge by {expected:.2g} nats a token, at which {felt}: "
        f"{DIVERGENCE:g} nats, at which a concept is plain, {enough}",
        StrengthWarning,
        stacklevel=5,
    )
    return True


def warn_if_only_read(edit: Edit, blocks: Sequence[int]) -> None:
    """Warn of a vector that, where it is recommended, moves its behaviour no further than random directions do.

    That is known of adding it everywhere at its own site. Whoever names another block may want to see for himself.
    """
    is_alike = edit.kind == "add" and edit.scope == "all" and edit.gate is None and not edit.keep_norm
    if not is_alike or len(edit.vectors) != 1 or tuple(blocks) != edit.vectors[0].recommended or len(blocks) != 1:
        return
    (vector,), (block,) = edit.vectors, blocks
    above = vector.above_random(block) if edit.site == vector.site else None
    if above is not None and above < UNUSUAL:
        warnings.warn(
            f"{vector.concept!r} is read in this model at block {block}, not written: its behaviour items move further "
            f"than along {above:.0%} of random directions that cost as much, not {UNUSUAL:.0%}. `repe.forecast` tells "
            "of other blocks, readers and scopes",
            NotWrittenWarning,
            stacklevel=5,
        )
