"""Representation engineering: read the concepts a language model represents, steer along them, measure the trade-off.

model, tokenizer = repe.load()
with repe.steer(model, "honesty", 1.5):
    model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repe.capturing import capture
    from repe.catalogue import concepts
    from repe.edits import loreft
    from repe.extraction import extract
    from repe.gates import Gate
    from repe.loading import load
    from repe.pairs import ContrastPair
    from repe.reading import Reading, read
    from repe.steering import Steering, detach, status, steer
    from repe.vector import ConceptVector

_HOMES = {
    "ConceptVector": "vector",
    "ContrastPair": "pairs",
    "Gate": "gates",
    "Reading": "reading",
    "Steering": "steering",
    "capture": "capturing",
    "concepts": "catalogue",
    "detach": "steering",
    "extract": "extraction",
    "load": "loading",
    "loreft": "edits",
    "read": "reading",
    "status": "steering",
    "steer": "steering",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'repe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"repe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
