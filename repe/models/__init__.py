"""Everything about other people's models: no concept, and no edit."""

from repe.models.families import Family as Family
from repe.models.families import known_families as known_families
from repe.models.families import register as register
