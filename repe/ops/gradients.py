"""The derivative of the edit formula, in plain PyTorch: what a fused forward, which autograd cannot look into, needs.

The names are those of `ops/reference.py`; `d_p` is the gradient of the loss with respect to `p`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repe.ops.reference import GAINS, Coefficients


@dataclass(frozen=True, eq=False)
class Gradients:
    """With respect to every argument of `edit`; None where the argument is not looked at."""

    x: Tensor
    strength: Tensor
    read: Tensor | None
    write: Tensor
    slope: Tensor | None
    offset: Tensor
    low: Tensor
    high: Tensor


def gradients(grad: Tensor, x: Tensor, strength: Tensor, coefficients: Coefficients) -> Gradients:
    """The gradients of `edit(x, strength, coefficients)` where that of its result is `grad`, (rows, tokens, d_model).

    Rounding is taken for a cast, whichever it was.
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    read, write, slope, offset, low, high = (t.to(precision) for t in coefficients.tensors)
    amount = strength.to(precision).expand(x.shape[:-1]).unsqueeze(-1)
    on = amount != 0
    wide, d_edited = torch.where(on, x.to(precision), 0), torch.where(on, grad.to(precision), 0)
    with torch.autocast(x.device.type, enabled=False):
        p = wide @ read.T
        gain = GAINS[coefficients.gain](p)
        u = slope * p + offset * gain if coefficients.needs_projection else offset.expand_as(p)
        c = u.clamp(low, high)
        d_wide = torch.zeros_like(wide)
        if coefficients.keep_norm:
            d_wide, d_edited = _through_norms(d_edited, wide, wide + (amount * c) @ write)
        d_shift = d_edited @ write.T
        d_c = amount * d_shift
        d_u = torch.where((u >= low) & (u <= high), d_c, 0)
        d_wide = d_wide + d_edited
        d_read = d_slope = None
        if coefficients.needs_projection:
            d_p = slope * d_u + _through_gain(offset * d_u, p, gain, coefficients.gain)
            d_wide = d_wide + d_p @ read
            d_read, d_slope = _outer(d_p, wide), _total(d_u * p)
        return Gradients(
            x=torch.where(on, d_wide.to(x.dtype), grad),
            strength=(d_shift * c).sum(-1).sum_to_size(strength.shape),
            read=d_read,
            write=_outer(amount * c, d_edited),
            slope=d_slope,
            offset=_total(d_u * gain if coefficients.needs_projection else d_u),
            low=_total(torch.where((u < low) & (low < high), d_c, 0)),
            high=_total(torch.where((u > high) | (high < low), d_c, 0)),
        )


def _through_norms(d_scaled: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `after * |before| / |after|` to those of `before` and `after`."""
    norm, kept = (t.norm(dim=-1, keepdim=True) for t in (after, before))
    empty, zero = norm == 0, kept == 0
    ratio = torch.where(empty, 1, kept / norm.masked_fill(empty, 1))
    along = (d_scaled * after).sum(-1, keepdim=True) / norm.masked_fill(empty, 1)
    d_kept = torch.where(empty | zero, 0, along / kept.masked_fill(zero, 1))
    d_norm = torch.where(empty, 0, ratio * along / norm.masked_fill(empty, 1))
    return d_kept * before, ratio * d_scaled - d_norm * after


def _through_gain(d_gain: Tensor, p: Tensor, gain: Tensor, name: str) -> Tensor:
    if name != "norm":
        return torch.zeros_like(p)
    zero = gain == 0
    return torch.where(zero, 0, d_gain.sum(-1, keepdim=True) * p / gain.masked_fill(zero, 1))


def _outer(coefficients: Tensor, tokens: Tensor) -> Tensor:
    """(K, d_model), summed over all tokens."""
    return coefficients.flatten(0, 1).T @ tokens.flatten(0, 1)


def _total(of_tokens: Tensor) -> Tensor:
    return of_tokens.flatten(0, 1).sum(0)
