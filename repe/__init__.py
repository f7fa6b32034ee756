"""Representation engineering: read the concepts a language model represents, steer along them, measure the trade-off.

model, tokenizer = repe.load()
with repe.steer(model, "honesty", 0.5):
    print(*repe.generate(model, tokenizer, ["..."]))
"""

import importlib.util

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
# rooms are there by name alone: a star would load them all, and some need more than the library does
__all__ = [name for name in _names if importlib.util.find_spec(f"repe.{name}") is None]
