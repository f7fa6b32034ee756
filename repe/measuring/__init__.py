"""Measuring: what a model makes of answers and texts at every strength of an edit, and what that costs.

The trade-off and its calibration are names of `repe` itself; lm-eval's tasks are measured by `repe.measuring.harness`,
and what judges texts is in `repe.measuring.judges`.
"""

from repe.data.answers import Answer
from repe.measuring.costs import costs
from repe.measuring.curve import Costs, LeftOut, Scores, SideEffects
from repe.measuring.scoring import Likelihoods, Scorer, TransformersScorer, log_likelihoods
from repe.measuring.side_effects import side_effects
from repe.measuring.sweep import sweep
from repe.measuring.tasks import items_of, texts_of
from repe.measuring.write import write
from repe.measuring.writings import Judgement, Writings

__all__ = [
    "Answer",
    "Costs",
    "Judgement",
    "LeftOut",
    "Likelihoods",
    "Scorer",
    "Scores",
    "SideEffects",
    "TransformersScorer",
    "Writings",
    "costs",
    "items_of",
    "log_likelihoods",
    "side_effects",
    "sweep",
    "texts_of",
    "write",
]
