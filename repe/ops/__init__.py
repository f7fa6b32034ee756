"""Implementations of the edit formula, chosen by an argument.

`reference` is the definition, in plain PyTorch, and runs on every device. `triton` is one kernel, which reads and
writes the stream once; a call that needs a gradient takes the reference instead, also where the kernel was asked for.
`auto` is `triton` on GPUs where Triton works, and the reference elsewhere. In compiled code `auto` is the reference,
left to the compiler to fuse: which of the two is faster there has not been measured.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from repe.ops.reference import Coefficients, edit
from repe.ops.watched import under_a_transform

IMPLEMENTATIONS = ("auto", "reference", "triton")
WITH_KERNELS = ("cuda",)  # the devices on which "auto" tries the kernel

__all__ = ["Coefficients", "Implementation", "auto", "edit", "pick"]


class Implementation(Protocol):
    """See `repe.ops.reference.edit`."""

    def __call__(
        self, x: Tensor, strength: Tensor, coefficients: Coefficients, *, everywhere: bool = False
    ) -> Tensor: ...


def pick(impl: str) -> Implementation:
    """The implementation called `impl`: "auto", "reference" or "triton".

    Raises:
        ValueError: there is no such name.
        ImportError: Triton, which was asked for, is missing or broken.
    """
    if impl == "triton":
        return _kernels().edit
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not an implementation of the edit formula: use one of {[*IMPLEMENTATIONS]}")
    return auto if impl == "auto" else edit


def auto(x: Tensor, strength: Tensor, coefficients: Coefficients, *, everywhere: bool = False) -> Tensor:
    """The edit by whichever implementation suits the call; see `repe.ops.reference.edit`."""
    chosen: Implementation = edit
    if x.device.type in WITH_KERNELS and not torch.compiler.is_compiling() and type(x) in (Tensor, Parameter):
        kernels = _working_kernels(x.device) if may_be_probed() else None
        if kernels is not None and not kernels.why_not(x, strength, coefficients):
            chosen = kernels.edit
    return chosen(x, strength, coefficients, everywhere=everywhere)


def may_be_probed() -> bool:
    """Whether a few tokens may be edited now to see if the kernel works: not under a transform, nor while the GPU
    records a graph, as its failing there would say nothing of other calls."""
    return not under_a_transform() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _kernels() -> ModuleType:
    try:
        from repe.ops import kernel
    except Exception as error:
        raise ImportError(
            f"impl='triton': Triton cannot be imported ({type(error).__name__}: {error}): install triton, or use "
            "impl='auto'"
        ) from error
    return kernel


@functools.cache  # and so is warned about once
def _working_kernels(device: torch.device) -> ModuleType | None:
    try:
        kernels = _kernels()
        kernels.probe(device)
    except Exception as error:
        why = f"the fused edit does not run on {device}, and plain PyTorch is used instead: {error}"
        warnings.warn(why, RuntimeWarning, stacklevel=3)
        return None
    return kernels
