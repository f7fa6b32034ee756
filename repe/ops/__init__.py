"""Implementations of the edit formula, chosen by an argument.

`reference` is the definition, in plain PyTorch, and runs on every device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from repe.ops.reference import Coefficients, edit

Implementation = Callable[[Tensor, Tensor, Coefficients], Tensor]
IMPLEMENTATIONS: dict[str, Implementation] = {"auto": edit, "reference": edit}

__all__ = ["Coefficients", "Implementation", "edit", "pick"]


def pick(impl: str) -> Implementation:
    """The implementation called `impl`: "auto" or "reference". Raises ValueError for any other name."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not an implementation of the edit formula: use one of {[*IMPLEMENTATIONS]}")
    return IMPLEMENTATIONS[impl]
