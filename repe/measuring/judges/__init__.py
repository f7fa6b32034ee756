"""Judges: what gives a text one number, such as `repe.measuring.write` and `Writings.judged_by` take.

Any function of a prompt and a text is one. But for `endpoint` these need no network; `check` finds out how often a
judge errs. How likely the unsteered model finds a text, and how often the text repeats itself, no judge need say: every
`Writings` has it.
"""

from repe.measuring.judges.check import Checked, Reliability, check
from repe.measuring.judges.endpoint import endpoint
from repe.measuring.judges.judge import Judge
from repe.measuring.judges.refusal import refusal
from repe.measuring.judges.sentiment import sentiment

__all__ = ["Checked", "Judge", "Reliability", "check", "endpoint", "refusal", "sentiment"]
