"""Attributes that are set together, and can be told to be as they were set: what changes a model and can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Swap:
    """An attribute of a module or a config that is `former` and becomes `latter`."""

    def __init__(self, owner: Any, name: str, label: str, latter: Any) -> None:
        self.owner, self.name, self.label, self.latter = owner, name, label, latter
        self.former = getattr(owner, name)
        self.seals = (seal(self.former), seal(latter))

    def is_untouched(self) -> bool:
        """Whether the latter is in place, and neither of the two was written to or moved."""
        present = getattr(self.owner, self.name)
        in_place = present is self.latter if isinstance(self.latter, Tensor) else present == self.latter
        return in_place and (seal(self.former), seal(present)) == self.seals


def seal(value: Any) -> Any:
    """What differs once a tensor was written to or moved: a sum of each row's bits, weighted by where they stand."""
    if not isinstance(value, Tensor):
        return None
    rows = value.detach().reshape(-1, value.shape[-1]).contiguous()
    words = rows.view(torch.uint8 if rows.shape[1] * rows.element_size() % 8 else torch.int64)
    weights = 2 * torch.arange(words.shape[1], device=words.device) + 1
    return value.device, value.dtype, (words * weights).sum(-1).tolist()


def put(values: Sequence[tuple[Any, str, Any]]) -> None:
    """Set attributes (owner, name, value), all of them or none."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
    except BaseException:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        raise
