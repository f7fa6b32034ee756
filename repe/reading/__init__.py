"""Reading: activations, directions extracted from contrast pairs, vectors and their store, and texts scored along them.

The verbs of this room are names of `repe` itself. Nothing here loads torch until it is used: readers need none.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
