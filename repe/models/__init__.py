"""Everything about other people's models: no concept, and no edit. Nothing here loads torch until it is used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
