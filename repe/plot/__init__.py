"""Pictures on matplotlib axes. Every function takes the axes to draw on, makes them where none are given, and returns
them; what is drawn was computed elsewhere, and what was not measured is left out. Purple is more of a concept and
orange is less, in every picture.

Example:
    >>> vector = repe.extract(model, tokenizer, "honesty")
    >>> repe.plot.profile({"mean": vector}).get_xlabel()
    'block'
"""

from repe.plot.activations import pairs, poles
from repe.plot.curve import calibration, costs, efficient_window, frontier, tradeoff
from repe.plot.forecasts import forecast
from repe.plot.readings import scan, tokens
from repe.plot.vectors import cosines, profile

__all__ = [
    "calibration",
    "cosines",
    "costs",
    "efficient_window",
    "forecast",
    "frontier",
    "pairs",
    "poles",
    "profile",
    "scan",
    "tokens",
    "tradeoff",
]
