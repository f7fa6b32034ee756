"""The public names of this room, and where they live."""

from .aiming import aimed as aimed
from .aiming import unseen as unseen
from .placing import dosed as dosed
from .read import Reading as Reading
from .read import score as score
from .readers import LinearDiscriminant as LinearDiscriminant
from .readers import LogisticProbe as LogisticProbe
from .readers import MeanDifference as MeanDifference
from .readers import PrincipalDirection as PrincipalDirection
from .store import resolve as resolve
from .vector import ConceptVector as ConceptVector
