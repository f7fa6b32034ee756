"""The one formula of every edit, in plain PyTorch. This file is its definition: any other implementation is tested
against it.

For the activation `x` of one token, with K read directions `R` and K write directions `W`:

    p  = R x
    c  = clip(slope * p + offset * gain(p), low, high)
    x' = x + strength * c W            only where strength is not 0
    x' = x' * |x| / |x'|               only with keep_norm

`strength` already holds everything that says where and how much: the row's alpha, zero outside the scope and where the
gate is shut. The file knows nothing of models, blocks or concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Gain = Literal["one", "sign", "norm"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

GAINS: dict[str, Callable[[Tensor], Tensor | float]] = {
    "one": lambda p: 1.0,
    "sign": torch.sign,
    "norm": lambda p: p.norm(dim=-1, keepdim=True),
}


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What one edit does at one block: the constants of the formula.

    Shapes: `read` and `write` (K, d_model); `slope`, `offset`, `low` and `high` (K,). All are float32 on one device.
    `gain` is what the offset is multiplied by: one; the sign of each projection (piece-wise control of Zou et al.,
    arXiv 2310.01405); or the norm of the projection on the K directions (setting an angle in a plane).
    Without `needs_projection` the slope is taken for 0 and the gain for one, and nothing is read.
    """

    read: Tensor
    write: Tensor
    slope: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    gain: Gain = "one"
    keep_norm: bool = False
    needs_projection: bool = True

    def __post_init__(self) -> None:
        if self.read.ndim != 2 or self.write.shape != self.read.shape:
            raise ValueError(
                "`read` and `write` are both (K, d_model); got the shapes "
                f"{tuple(self.read.shape)} and {tuple(self.write.shape)}"
            )
        for name in ("slope", "offset", "low", "high"):
            if getattr(self, name).shape != self.read.shape[:1]:
                raise ValueError(
                    f"`{name}` is one number a direction, ({len(self.read)},); got the shape "
                    f"{tuple(getattr(self, name).shape)}"
                )
        if self.gain not in GAINS:
            raise ValueError(f"gain={self.gain!r} is not known: use one of {[*GAINS]}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.read, self.write, self.slope, self.offset, self.low, self.high

    @property
    def device(self) -> torch.device:
        return self.write.device

    @property
    def shift(self) -> Tensor:
        """(d_model,), what strength 1 adds to every token, where that needs no projection."""
        return (self.offset.clamp(self.low, self.high)[:, None] * self.write).sum(0)

    @property
    def is_constant(self) -> bool:
        """Whether strength 1 adds the same to every token, until values here are replaced; trained ones change."""
        return not (self.needs_projection or self.keep_norm or any(t.requires_grad for t in self.tensors))

    def to(self, device: torch.device | str) -> Coefficients:
        read, write, slope, offset, low, high = (t.to(device) for t in self.tensors)
        return replace(self, read=read, write=write, slope=slope, offset=offset, low=low, high=high)

    def copy_(self, other: Coefficients) -> None:
        """Takes the values of `other` in place, so that code compiled for these tensors runs on."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)


def edit(x: Tensor, strength: Tensor, coefficients: Coefficients, *, everywhere: bool = False) -> Tensor:
    """The edited activations, in the shape and the dtype of `x`.

    Args:
        x: activations, (rows, tokens, d_model).
        strength: float32, broadcastable to (rows, tokens); 0 leaves a token exactly as it is, infinities included.
        coefficients: the constants of the formula.
        everywhere: the caller knows that no strength is 0, so that nothing has to be left as it is.

    Raises:
        TypeError: activations of this dtype cannot be edited.

    The arithmetic is done in float32 (float64 for float64 activations), whatever autocast says.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"activations of {x.dtype} cannot be edited: run the model in one of {[*map(str, DTYPES)]}")
    precision = torch.promote_types(x.dtype, torch.float32)
    wide, amount = x.to(precision), strength.to(precision).unsqueeze(-1)
    if not everywhere:
        wide = torch.where(amount != 0, wide, 0)  # what is left alone may be infinite, and spreads in gradients
    edited = wide + _change(wide, amount, coefficients)
    if coefficients.keep_norm:
        edited = edited * _norm_ratio(wide, edited)
    edited = edited.to(x.dtype)
    return edited if everywhere else torch.where(amount != 0, edited, x)


def _change(wide: Tensor, amount: Tensor, coefficients: Coefficients) -> Tensor:
    """strength * c W."""
    if not coefficients.needs_projection:
        return amount * coefficients.shift.to(wide.dtype)
    read, write, slope, offset, low, high = (t.to(wide.dtype) for t in coefficients.tensors)
    device = wide.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        p = wide @ read.T
        c = (slope * p + offset * GAINS[coefficients.gain](p)).clamp(low, high)
        return (amount * c) @ write


def _norm_ratio(before: Tensor, after: Tensor) -> Tensor:
    """|before| / |after| for every token, and something finite where nothing is left to be scaled."""
    norm = after.norm(dim=-1, keepdim=True)
    return before.norm(dim=-1, keepdim=True) / norm.masked_fill(norm == 0, 1)
