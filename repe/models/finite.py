"""Numbers that are none: what a model puts out is checked where the library takes it, and refused with its cause."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from repe.models.tracking import trackers_of


def check_finite(numbers: Tensor, model: nn.Module, place: str = "as logits") -> None:
    """Raises OverflowError where not all numbers that a model puts out at some place are finite."""
    if not numbers.isfinite().all():
        raise not_finite(model, f"{'NaN' if numbers.isnan().any() else 'infinity'} {place}")


def not_finite(model: nn.Module, what: str, is_steered: bool | None = None) -> OverflowError:
    """The error for a model that puts out `what`: which weights are to blame, else what to do about its dtype."""
    if is_steered is None:
        is_steered = any(tracker.users for tracker in trackers_of(model))
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    advice = [
        *["load it in bfloat16 or float32, as float16 ends at 65504"] * (torch.float16 in dtypes),
        *["lower alpha, or remove what steers it"] * is_steered,
    ]
    if spoilt := [name for name, p in model.named_parameters() if _is_spoilt(p)]:
        whole = "load it from a file that is whole, in bfloat16 or float32"
        advice = [f"tensors of its weights are not finite, {len(spoilt)} with {spoilt[0]!r}: {whole}"]
    told = ", or ".join(advice) or "its weights are finite: load it in float32"
    return OverflowError(f"{type(model).__name__} puts out {what}, in {', '.join(sorted(map(str, dtypes)))}: {told}")


def _is_spoilt(weight: Tensor) -> bool:
    is_readable = weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta
    return is_readable and not bool(weight.detach().isfinite().all())


class FiniteLogits(LogitsProcessor):
    """Sees the logits of a generation in its context, at whose end it raises OverflowError if there was NaN among them.

    Nothing waits for the device meanwhile. Infinity is no fault there: it forbids a token.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, torch.zeros((), dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.found = scores.isnan().any() | self.found.to(scores.device)
        return scores

    def __enter__(self) -> FiniteLogits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if (kind is None or issubclass(kind, RuntimeError)) and self.found:  # from NaN nothing can be drawn
            raise not_finite(self.model, "NaN as logits") from error
