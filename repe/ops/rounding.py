"""Stochastic rounding to bfloat16, which an edit below its resolution survives on average.

A float32 number is rounded up or down with the probabilities that make the expected value the number itself. The
randomness is a hash of the seed and of where the number stands, so that every implementation draws the same.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")

MIX = 0x7FEB352D, 0x846CA68B  # "lowbias32", the integer hash of Wellons (nullprogram.com/blog/2018/07/31)
LOW_32 = 0xFFFFFFFF
DROPPED = 16  # the bits of a float32 that a bfloat16 has no room for


def check_rounding(x: Tensor, rounding: str, seed: Tensor | None) -> None:
    """Raises ValueError if the stream cannot be rounded so, TypeError if the seed is no seed."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is not known: use one of {[*ROUNDINGS]}")
    if rounding == "nearest":
        if seed is not None:
            raise ValueError("rounding='nearest' takes no seed: leave it out, or pass rounding='stochastic'")
        return
    if x.dtype != torch.bfloat16:
        raise ValueError(f"rounding='stochastic' is for bfloat16 activations, got {x.dtype}: use rounding='nearest'")
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        got = "none" if seed is None else f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        raise TypeError(f"rounding='stochastic' needs a seed, one int64 on {x.device}, and got {got}")


def stochastic(wide: Tensor, seed: Tensor) -> Tensor:
    """`wide`, (rows, tokens, d_model) in float32, as bfloat16. Gradients pass as through a cast.

    The same seed rounds the same places alike: advance it, in place, between calls.
    """
    return _Stochastic.apply(wide, seed)


class _Stochastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor, seed: Tensor) -> Tensor:
        raised = wide.contiguous().view(torch.int32) + _noise(wide, seed)
        cut = (raised >> DROPPED << DROPPED).view(torch.float32)
        return torch.where(wide.isfinite(), cut, wide).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(torch.float32), None


def _noise(like: Tensor, seed: Tensor) -> Tensor:
    """Integers from 0 to 2 ** 16 - 1, in the shape of `like`, (rows, tokens, d_model)."""
    rows, tokens, d_model = like.shape
    number = torch.arange(rows * tokens, device=like.device).view(rows, tokens, 1)
    seed = seed.reshape(())
    key = _mix(number ^ _mix((seed & LOW_32) ^ _mix((seed >> 32) & LOW_32)))
    return (_mix(key ^ _mix(torch.arange(d_model, device=like.device))) >> DROPPED).to(torch.int32)


def _mix(h: Tensor) -> Tensor:
    """A hash of 32-bit numbers, held in int64 since PyTorch has no unsigned arithmetic."""
    h = ((h ^ (h >> 16)) * MIX[0]) & LOW_32
    h = ((h ^ (h >> 15)) * MIX[1]) & LOW_32
    return h ^ (h >> 16)
