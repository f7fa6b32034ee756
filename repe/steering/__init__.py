"""Steering: what is edited and where as a value, kinds of edit, scopes and gates, the live handle, and baking."""

from repe.steering.bake import Baked, bake
from repe.steering.check import Findings, check
from repe.steering.edit import Edit, EditOptions, Placement
from repe.steering.gate import Gate
from repe.steering.handle import Steering, detach, status
from repe.steering.kinds import KINDS, UNITS, loreft
from repe.steering.scope import NAMED_SCOPES, Scope
from repe.steering.steer import edit_of, steer

__all__ = [
    "KINDS",
    "NAMED_SCOPES",
    "UNITS",
    "Baked",
    "Edit",
    "EditOptions",
    "Findings",
    "Gate",
    "Placement",
    "Scope",
    "Steering",
    "bake",
    "check",
    "detach",
    "edit_of",
    "loreft",
    "status",
    "steer",
]
