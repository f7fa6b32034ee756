"""Steering that no number holds is an error or a warning, in every dtype; steering that all of them hold is neither."""

import warnings
from typing import Any

import pytest
import torch

import repe
from tests import oracles, zoo

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGE = 1e30


def constants(length: float) -> repe.ops.Coefficients:
    write, one = torch.eye(1, zoo.D_MODEL), torch.ones(1)
    return repe.ops.Coefficients(
        write, write, 0 * one, length * one, -torch.inf * one, torch.inf * one, needs_projection=False
    )


WAYS: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "add": (oracles.vector(), 1.0, {}),
    "a row": (oracles.vector(), 1.0, {"rows": True}),
    "raw": (oracles.vector(), 1.0, {"unit": "raw"}),
    "norm kept": (oracles.vector(), 1.0, {"keep_norm": True}),
    "clamp": (oracles.vector(), 1.0, {"edit": "clamp", "target": 1.0}),
    "clamp, norm kept": (oracles.vector(), 1.0, {"edit": "clamp", "target": 1.0, "keep_norm": True}),
    "floor": (oracles.vector(), 1.0, {"edit": "floor", "target": 1.0}),
    "ablate": (oracles.vector(), 1.0, {"edit": "ablate"}),
    "piecewise": (oracles.vector(), 1.0, {"edit": "piecewise"}),
    "the prompt": (oracles.vector(), 1.0, {"scope": "prompt"}),
    "constants": (constants, 1.0, {"blocks": 1}),
}


def run(model: Any, way: str, size: float) -> bool:
    """One forward of an edit of such a size; whether it was refused."""
    along, alpha, how = WAYS[way]
    how = dict(how)
    if callable(along):
        along = along(size)
    elif "target" in how:
        how["target"] *= size
    else:
        alpha *= size
    strengths = [alpha, 0.0, 0.0] if how.pop("rows", False) else alpha
    try:
        with repe.steer(model, along, strengths, **how), torch.no_grad():
            model(**zoo.inputs("llama"))
    except OverflowError:
        return True
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_what_no_number_holds_is_told_of_once(way: str, dtype: torch.dtype) -> None:
    model = zoo.build("llama").to(dtype)
    for size in (1.0, LARGE):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            refused = run(model, way, size)
        told = [str(w.message) for w in warned if w.category is RuntimeWarning]
        held = size == 1.0 or (dtype == torch.float64 and way == "clamp, norm kept")  # which holds the square
        assert refused + len(told) == (not held)
        assert all(f"overflowed {str(dtype)[6:]}: lower alpha" in text for text in told)
