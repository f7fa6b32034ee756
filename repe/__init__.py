"""Representation engineering: read the concepts a language model represents, steer along them, measure the trade-off.

model, tokenizer = repe.load()
with repe.steer(model, "honesty", 0.5):
    print(*repe.generate(model, tokenizer, ["..."]))
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repe.auditing import Audit as Audit
    from repe.auditing import audit as audit
    from repe.baking import bake as bake
    from repe.calibration import calibrate as calibrate
    from repe.capturing import capture as capture
    from repe.catalogue import concepts as concepts
    from repe.curve import TradeoffCurve as TradeoffCurve
    from repe.edits import loreft as loreft
    from repe.extraction import extract as extract
    from repe.gates import Gate as Gate
    from repe.generation import generate as generate
    from repe.loading import load as load
    from repe.measuring import tradeoff as tradeoff
    from repe.pairs import ContrastPair as ContrastPair
    from repe.reading import Reading as Reading
    from repe.reading import read as read
    from repe.steering import Steering as Steering
    from repe.steering import detach as detach
    from repe.steering import status as status
    from repe.steering import steer as steer
    from repe.vector import ConceptVector as ConceptVector

_HOMES = {
    "Audit": "auditing",
    "ConceptVector": "vector",
    "ContrastPair": "pairs",
    "Gate": "gates",
    "Reading": "reading",
    "Steering": "steering",
    "TradeoffCurve": "curve",
    "audit": "auditing",
    "bake": "baking",
    "calibrate": "calibration",
    "capture": "capturing",
    "concepts": "catalogue",
    "detach": "steering",
    "extract": "extraction",
    "generate": "generation",
    "load": "loading",
    "loreft": "edits",
    "read": "reading",
    "status": "steering",
    "steer": "steering",
    "tradeoff": "measuring",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if importlib.util.find_spec(f"repe.{name}") is not None:
            return importlib.import_module(f"repe.{name}")
        raise AttributeError(f"module 'repe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"repe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
