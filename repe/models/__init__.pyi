"""The public names of this room, and where they live."""

from .blocks import Stack as Stack
from .blocks import find_stack as find_stack
from .families import Family as Family
from .families import Registration as Registration
from .families import known_families as known_families
from .families import register as register
