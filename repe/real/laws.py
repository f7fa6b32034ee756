"""Laws: the gain is linear in a small alpha, the divergence quadratic, and random directions do less (Wolf et al.).

The fits are the trade-off curve's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import repe
from repe.data.worded import worded
from repe.display import Table
from repe.measuring import items_of, texts_of
from repe.measuring.fits import KL_WINDOW, Fit
from repe.reading.placing import spread
from repe.real.bench import Bench, Row, kept, table

CONCEPT = "happiness"
STEPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.75, 1.0, 1.5)
FEW_STEPS = (0.5,)  # for the random directions
ITEMS, SKILLS, TEXTS, CONTROLS = 24, 6, 8, 20


def tables(bench: Bench) -> Iterator[Table]:
    concepts = dict.fromkeys([CONCEPT, *bench.asked])
    rows = {concept: bench.row("laws", concept, partial(row, bench, concept)) for concept in concepts}
    title = f"laws on {bench.name}: difference = slope alpha, behaviour = tanh(a alpha + b), KL ~ |alpha|^power"
    low, high = KL_WINDOW
    note = f"power: KL between {low:g} and {high:g} nats; smaller: the share of {bench.at_most(CONTROLS)} random slopes"
    yield table(title, "concept", rows, note)


def row(bench: Bench, concept: str) -> Row:
    def curve(steps: tuple[float, ...], **how: Any) -> repe.TradeoffCurve:
        alphas = [sign * step for step in steps for sign in (-1, 1)]
        on: Any = {"alignment": items, "helpfulness": skills, "baseline": False}
        return repe.tradeoff(bench.model, bench.tokenizer, bench.vector(concept), alphas, **on, **how)

    items = spread(worded(items_of(concept, bench.model)), bench.at_most(ITEMS))
    skills = spread(items_of("skills", bench.model), bench.at_most(SKILLS))
    texts = texts_of("neutral", bench.model)[1::2][: bench.at_most(TEXTS)]
    fits = curve(STEPS, neutral=texts, controls=0).fits
    control = curve(FEW_STEPS, neutral=None, controls=bench.at_most(CONTROLS)).fits.steerability
    return {
        "slope": parameter(fits.line, "slope"),
        "R2": fits.line.r2,
        "tanh a": parameter(fits.behaviour, "a"),
        "its R2": fits.behaviour.r2,
        "power": parameter(fits.kl, "power"),
        "random slope": parameter(control, "control"),
        "smaller": control.facts["smaller"] / control.facts["directions"],
    }


def parameter(fit: Fit, name: str) -> Any:
    """What was fitted, or why nothing could be."""
    return kept(fit[name]) if fit.estimates else fit.reason
