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
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from repe.ops.rounding import Rounding, check_rounding, stochastic

Gain = Literal["one", "sign", "norm"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "sign": torch.sign,
    "norm": lambda p: p.norm(dim=-1, keepdim=True).expand_as(p),
}


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What one edit does at one block: the constants of the formula.

    Shapes: `read` and `write` (K, d_model); `slope`, `offset`, `low` and `high` (K,). All are float32 on one device.
    `gain` is what the offset is multiplied by: one; the sign of each projection (piece-wise control of Zou et al.,
    arXiv 2310.01405); or the norm of the projection on the K directions (setting an angle in a plane).

    Values that are not trained change by `copy_` alone, as what follows from them is kept.
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
    _shift: Tensor | None = field(init=False, repr=False)

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
        with torch.inference_mode(False), torch.no_grad():  # autograd must be able to save it later
            object.__setattr__(self, "_shift", None if self.needs_projection else self._displacement())

    @property
    def shift(self) -> Tensor:
        """(d_model,), what strength 1 adds to every token, where that needs no projection."""
        return self._shift if self._shift is not None and self.is_fixed else self._displacement()

    @property
    def is_fixed(self) -> bool:
        """Whether nothing here is trained, so that values change by `copy_` alone."""
        return not any(t.requires_grad for t in self.tensors)

    @property
    def is_constant(self) -> bool:
        """Whether strength 1 adds the same to every token until the values here are replaced."""
        return self._shift is not None and self.is_fixed and not self.keep_norm

    def _displacement(self) -> Tensor:
        return (self.offset.clamp(self.low, self.high)[:, None] * self.write).sum(0)

    @property
    def device(self) -> torch.device:
        return self.write.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.read, self.write, self.slope, self.offset, self.low, self.high

    def to(self, device: torch.device | str) -> Coefficients:
        read, write, slope, offset, low, high = (t.to(device) for t in self.tensors)
        return replace(self, read=read, write=write, slope=slope, offset=offset, low=low, high=high)

    def copy_(self, other: Coefficients) -> None:
        """Takes the values of `other` in place, so that code compiled for these tensors runs on."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)
        if self._shift is not None:
            self._shift.copy_(other.shift)


def edit(
    x: Tensor,
    strength: Tensor,
    coefficients: Coefficients,
    *,
    rounding: Rounding = "nearest",
    seed: Tensor | None = None,
    out: Tensor | None = None,
    everywhere: bool = False,
) -> Tensor:
    """The edited activations, in the shape and the dtype of `x`.

    Args:
        x: activations, (rows, tokens, d_model).
        strength: float32, broadcastable to (rows, tokens); 0 leaves a token exactly as it is, infinities included.
        coefficients: the constants of the formula.
        rounding: to the dtype of `x`; "stochastic" is for bfloat16, whose resolution the edit may lie below.
        seed: of stochastic rounding, one int64; the same seed rounds alike.
        out: where to write the result: `x` itself, or memory that it has no part in. Not differentiable.
        everywhere: the caller knows that no strength is 0, so that nothing has to be left as it is.

    Raises:
        ValueError, TypeError: an option cannot be meant.

    The arithmetic is done in float32 (float64 for float64 activations), whatever autocast says.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"activations of {x.dtype} cannot be edited: run the model in one of {[*map(str, DTYPES)]}")
    check_rounding(x, rounding, seed)
    check_out(x, strength, coefficients, out)
    precision = torch.promote_types(x.dtype, torch.float32)
    wide, amount = x.to(precision), strength.to(precision).unsqueeze(-1)
    if coefficients.keep_norm or coefficients.gain == "norm":
        wide = torch.where(amount != 0, wide, 0)  # a norm's gradient at infinity is NaN, even when multiplied by 0
    edited = wide + (
        _projected(wide, amount, coefficients)
        if coefficients.needs_projection
        else amount * coefficients.shift.to(precision)
    )
    if coefficients.keep_norm:
        edited = edited * _norm_ratio(wide, edited)
    rounded = edited.to(x.dtype) if seed is None else stochastic(edited, seed)
    result = rounded if everywhere else torch.where(amount != 0, rounded, x)
    return result if out is None else out.copy_(result)


def plus(x: Tensor, displacement: Tensor) -> Tensor:
    """What `edit` makes of `x`, (rows, tokens, d_model), where all that it does is to add (d_model,) to every token.

    The displacement is in float32, or float64 for float64 activations.
    """
    if x.dtype == displacement.dtype or not may_write_out(x) or not x.is_cuda:
        return (x + displacement).to(x.dtype)
    return torch.add(x, displacement, out=torch.empty_like(x))  # one read and one write, where a cast would be another


def may_write_out(x: Tensor) -> bool:
    """Whether an operator may be told where to write: neither autograd nor a transform of torch.func looks on."""
    return not under_a_transform() and not (torch.is_grad_enabled() and x.requires_grad)


def under_a_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _projected(wide: Tensor, amount: Tensor, coefficients: Coefficients) -> Tensor:
    """What an edit adds that depends on the activation."""
    if torch.is_autocast_enabled(wide.device.type):
        with torch.autocast(wide.device.type, enabled=False):
            return _projected(wide, amount, coefficients)
    read, write, slope, offset, low, high = (t.to(wide.dtype) for t in coefficients.tensors)
    p = wide @ read.T
    gained = offset if coefficients.gain == "one" else offset * GAINS[coefficients.gain](p)
    return (amount * (slope * p + gained).clamp(low, high)) @ write


def needs_gradient(x: Tensor, strength: Tensor, coefficients: Coefficients) -> bool:
    """Whether autograd would want to know of the edit."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, strength, *coefficients.tensors))


def check_out(x: Tensor, strength: Tensor, coefficients: Coefficients, out: Tensor | None) -> None:
    """Raises ValueError if the edited activations cannot be written into `out`."""
    if out is None:
        return
    if needs_gradient(x, strength, coefficients):
        raise ValueError("what is written into `out` has no gradient: leave it out, or use torch.no_grad()")
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"`out` must be as x is, {x.dtype} {tuple(x.shape)} on {x.device}; got {out.dtype} {tuple(out.shape)} on "
            f"{out.device}"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("`out` is expanded, so that several activations lie in one place: pass memory of its own")


def _norm_ratio(before: Tensor, after: Tensor) -> Tensor:
    """|before| / |after| for every token, and 1 where nothing is left to be scaled."""
    norm = after.norm(dim=-1, keepdim=True)
    empty = norm == 0
    return torch.where(empty, torch.ones_like(norm), before.norm(dim=-1, keepdim=True) / norm.masked_fill(empty, 1))
