"""Doses: what alpha 1 and alpha .5 cost on texts that no dose was measured on, against a tenth and its quarter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from repe.display import Table
from repe.measuring import costs, texts_of
from repe.measuring.intervals import Measured
from repe.reading.vector import DIVERGENCE
from repe.real.bench import Bench, Row, kept, table

TEXTS = 20
ALPHAS = (-1.0, -0.5, 0.5, 1.0)
NEAR = (0.2, 0.25)  # as shares of what is claimed


def tables(bench: Bench) -> Iterator[Table]:
    rows = {concept: bench.row("doses", concept, partial(row, bench, concept)) for concept in bench.concepts}
    yield table(f"doses on {bench.name}: nats a token on texts that no dose was measured on", "concept", rows)


def row(bench: Bench, concept: str) -> Row:
    texts = texts_of("neutral", bench.model)[1::2][: bench.at_most(TEXTS)]  # doses are measured on the others
    kl = costs(bench.model, bench.tokenizer, bench.vector(concept), texts, ALPHAS).kl
    assert kl is not None
    whole, half = (kl[0] + kl[3]) / 2, (kl[1] + kl[2]) / 2
    of_one, of_half = Measured(np.array([1.0, 0.5]), np.stack([whole, half])).estimates()
    return {
        "at +1": float(kl[3].mean()),
        "at -1": float(kl[0].mean()),
        "at 1, both signs": kept(of_one),
        "is": nearness(of_one.value, DIVERGENCE),
        "at .5": kept(of_half),
        "this is": nearness(of_half.value, DIVERGENCE / 4),
    }


def nearness(found: float, claimed: float) -> str:
    """How far it is off, and within which share of what is claimed."""
    off = found / claimed - 1
    near = next((share for share in NEAR if abs(off) <= share), None)
    return f"{off:+.0%}, " + (f"beyond {NEAR[-1]:.0%}" if near is None else f"within {near:.0%}")
