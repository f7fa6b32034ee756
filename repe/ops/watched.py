"""Who looks on while PyTorch computes, and can look neither into a kernel nor at an operator told where to write."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd wants to know what becomes of them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def under_a_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
