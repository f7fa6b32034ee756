"""The public names, and where they live: `repe/__init__.py` reads this list when it is run, type checkers as it is."""

from . import cli as cli
from . import data as data
from . import display as display
from . import measuring as measuring
from . import models as models
from . import ops as ops
from . import plot as plot
from . import reading as reading
from . import steering as steering
from . import testbed as testbed
from . import widgets as widgets
from .data.audit import Audit as Audit
from .data.audit import audit as audit
from .data.catalogue import concepts as concepts
from .data.pairs import ContrastPair as ContrastPair
from .measuring.calibrate import calibrate as calibrate
from .measuring.curve import TradeoffCurve as TradeoffCurve
from .measuring.forecast import Forecast as Forecast
from .measuring.forecast import forecast as forecast
from .measuring.tradeoff import tradeoff as tradeoff
from .models.generate import generate as generate
from .models.load import load as load
from .reading.capture import capture as capture
from .reading.extract import extract as extract
from .reading.read import Reading as Reading
from .reading.read import read as read
from .reading.vector import ConceptVector as ConceptVector
from .steering.bake import bake as bake
from .steering.check import check as check
from .steering.gate import Gate as Gate
from .steering.handle import Steering as Steering
from .steering.handle import detach as detach
from .steering.handle import status as status
from .steering.kinds import loreft as loreft
from .steering.steer import steer as steer

__version__: str
