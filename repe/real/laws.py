"""Laws: the gain is linear in a small alpha, the divergence quadratic, and random directions do less (Wolf et al.).

The fits are the trade-off curve's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import repe
from repe.display import Table
from repe.measuring import texts_of
from repe.measuring.fits import KL_WINDOW, Fit
from repe.measuring.tasks import asked
from repe.reading.placing import spread
from repe.real.bench import Bench, Row, kept, table

CONCEPT = "happiness"
STEPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.75, 1.0, 1.5)
ITEMS, SKILLS, TEXTS = 24, 6, 8


def tables(bench: Bench) -> Iterator[Table]:
    concepts = dict.fromkeys([CONCEPT, *bench.asked])
    rows = {concept: bench.row("laws", concept, partial(row, bench, concept)) for concept in concepts}
    title = f"laws on {bench.name}: difference = slope alpha, behaviour = tanh(a alpha + b), KL ~ |alpha|^power"
    low, high = KL_WINDOW
    note = f"power: KL between {low:g} and {high:g} nats; smaller: the share of random slopes that are"
    yield table(title, "concept", rows, note)


def row(bench: Bench, concept: str) -> Row:
    sizes = {concept: bench.at_most(ITEMS), "skills": bench.at_most(SKILLS)}
    items, skills = (spread(asked(name, bench.model, letters=False), count) for name, count in sizes.items())
    fits = repe.tradeoff(
        bench.model, bench.tokenizer, bench.vector(concept), [sign * step for step in STEPS for sign in (-1, 1)],
        alignment=items, helpfulness=skills, neutral=texts_of("neutral", bench.model)[1::2][: bench.at_most(TEXTS)],
        controls=1, baseline=False, requests=None,
    ).fits  # fmt: skip
    return {
        "slope": parameter(fits.line, "slope"),
        "R2": fits.line.r2,
        "tanh a": parameter(fits.behaviour, "a"),
        "its R2": fits.behaviour.r2,
        "power": parameter(fits.kl, "power"),
        "random slope": parameter(fits.steerability, "control"),
        "smaller": fits.steerability.facts["smaller"] / fits.steerability.facts["directions"],
    }


def parameter(fit: Fit, name: str) -> Any:
    """What was fitted, or why nothing could be."""
    return kept(fit[name]) if fit.estimates else fit.reason
