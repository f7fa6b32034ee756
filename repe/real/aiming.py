"""Aiming: what a vector that is turned towards half of the items does to the others, beside what it did before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import repe
from repe.display import Table
from repe.measuring import sweep
from repe.measuring.intervals import Measured
from repe.measuring.tasks import asked
from repe.reading import aimed, unseen
from repe.reading.placing import spread
from repe.real.bench import Bench, Row, kept, table

ALPHAS = np.array([0.0, 1.0])
BEFORE, AIMED = "before", "aimed"


def tables(bench: Bench) -> Iterator[Table]:
    found = {concept: bench.row("aiming", concept, partial(row, bench, concept)) for concept in bench.concepts}
    rows = {
        f"{concept}, {how}": {head.partition(" ")[2]: cell for head, cell in cells.items() if head.startswith(how)}
        for concept, cells in found.items()
        for how in (BEFORE, AIMED)
    }
    note = "each where it recommends: a block that these items helped to choose before, and those aimed at after"
    yield table(f"aiming on {bench.name}: items that nothing was aimed at, at alpha 1", "vector", rows, note)


def row(bench: Bench, concept: str) -> Row:
    """Efficiency as gradients forecast it, and the shift of the log odds at alpha 1."""
    model, tokenizer, vector = bench.model, bench.tokenizer, bench.vector(concept)
    turned = aimed(model, tokenizer, vector)
    left = unseen(asked(concept, model, letters=False), turned)
    items = spread(left, bench.at_most(len(left)))
    both = {BEFORE: vector, AIMED: turned}
    blocks = sorted({block for of in both.values() for block in of.recommended})
    found = repe.forecast(model, tokenizer, {how: of.at(*blocks) for how, of in both.items()}, alignment=items)
    told: dict[str, object] = {}
    for how, of in both.items():
        scores = sweep(model, tokenizer, of, {concept: items}, ALPHAS.tolist())[concept]
        moved = Measured(ALPHAS, scores.difference, scores.groups).gain
        told |= {
            f"{how} items": len(items),
            f"{how} block": of.recommended[0],
            f"{how} efficiency": kept(found.at(how, of.recommended[0])),
            f"{how} shift": kept(moved.estimates()[1]),
            f"{how} wrong way": float((moved.values[1] < 0).mean()),
        }
    return told
