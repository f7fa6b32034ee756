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
    from repe.data.audit import Audit as Audit
    from repe.data.audit import audit as audit
    from repe.data.catalogue import concepts as concepts
    from repe.data.pairs import ContrastPair as ContrastPair
    from repe.measuring.calibrate import calibrate as calibrate
    from repe.measuring.curve import TradeoffCurve as TradeoffCurve
    from repe.measuring.tradeoff import tradeoff as tradeoff
    from repe.models.generate import generate as generate
    from repe.models.load import load as load
    from repe.reading.capture import capture as capture
    from repe.reading.extract import extract as extract
    from repe.reading.read import Reading as Reading
    from repe.reading.read import read as read
    from repe.reading.vector import ConceptVector as ConceptVector
    from repe.steering.bake import bake as bake
    from repe.steering.gate import Gate as Gate
    from repe.steering.handle import Steering as Steering
    from repe.steering.handle import detach as detach
    from repe.steering.handle import status as status
    from repe.steering.kinds import loreft as loreft
    from repe.steering.steer import steer as steer

_HOMES = {
    "Audit": "data.audit",
    "ConceptVector": "reading.vector",
    "ContrastPair": "data.pairs",
    "Gate": "steering.gate",
    "Reading": "reading.read",
    "Steering": "steering.handle",
    "TradeoffCurve": "measuring.curve",
    "audit": "data.audit",
    "bake": "steering.bake",
    "calibrate": "measuring.calibrate",
    "capture": "reading.capture",
    "concepts": "data.catalogue",
    "detach": "steering.handle",
    "extract": "reading.extract",
    "generate": "models.generate",
    "load": "models.load",
    "loreft": "steering.kinds",
    "read": "reading.read",
    "status": "steering.handle",
    "steer": "steering.steer",
    "tradeoff": "measuring.tradeoff",
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
