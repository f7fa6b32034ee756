"""The simplest edit: the same displacement for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from repe.ops.watched import needs_gradient, under_a_transform


def plus(x: Tensor, displacement: Tensor) -> Tensor:
    """What `edit` makes of `x`, (rows, tokens, d_model), where all that it does is to add (d_model,) to every token.

    The displacement is in float32, or float64 for float64 activations.
    """
    if needs_gradient(x) or under_a_transform():
        return (x + displacement).to(x.dtype)
    return torch.add(x, displacement, out=torch.empty_like(x))  # one read and one write, where a cast would be another
