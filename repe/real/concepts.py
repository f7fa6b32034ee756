"""Concepts: how well each is read, whether it is written, and what steering along it does, in groups of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

import repe
from repe.display import Table
from repe.measuring import Scores, side_effects, sweep
from repe.measuring.curve import REQUESTS
from repe.measuring.intervals import Array, Measured, proportion
from repe.measuring.side_effects import PAIRS
from repe.measuring.tasks import asked
from repe.reading.placing import spread
from repe.real.bench import Bench, Row, kept, table

ALPHAS = np.array([0.0, 0.5, 1.0])


def tables(bench: Bench) -> Iterator[Table]:
    for title, columns in GROUPS.items():
        rows = {c: bench.row("concepts", c, partial(columns, bench, c), title) for c in bench.concepts}
        yield table(f"concepts on {bench.name}, {title}", "concept", rows)


def written(bench: Bench, concept: str) -> Row:
    """At the recommended block; the place is one among random directions there."""
    vector = bench.vector(concept)
    block = vector.recommended[0]
    found = repe.forecast(bench.model, bench.tokenizer, vector.at(block))
    return {
        "block": block,
        "read rightly": float(vector.accuracy[vector.row(block)]),
        "efficiency": kept(found.at(*found.best)),
        "above random": float(found.place[0, 0]),
        "is": "written" if found.is_written else "read, not written",
    }


def steered(bench: Bench, concept: str) -> Row:
    """The log odds of behaviour items; of skills what is lost, what is right unsteered, and whether that is surely more
    than guessing. All are asked in words."""
    tasks = {name: asked(name, bench.model, letters=False) for name in (concept, "skills")}
    few = {name: spread(items, bench.at_most(len(items))) for name, items in tasks.items()}
    found = sweep(bench.model, bench.tokenizer, bench.vector(concept), few, ALPHAS.tolist())
    moved, skills = of_items(found[concept], found[concept].difference).gain, found["skills"]
    _, half, whole = moved.estimates()
    wrong, right = moved.values[2] < 0, of_items(skills, skills.accuracy).estimates()[0]
    return {
        "shift at .5": kept(half),
        "shift at 1": kept(whole),
        "wrong way": kept(proportion(int(wrong.sum()), len(wrong))),
        "loss at 1": kept(of_items(skills, skills.probability).loss.estimates()[2]),
        "right at 0": kept(right),
        f"above {skills.floor:.2g}": "yes" if right.low > skills.floor else "no",
    }


def refused(bench: Bench, concept: str) -> Row:
    """What alpha 1 does to refusing; of the cosine, that at the first recommended block."""
    count = bench.at_most(PAIRS)
    found = side_effects(bench.model, bench.tokenizer, bench.vector(concept), [1.0], pairs=count)
    if found.cosine is None or found.random is None:
        return {"refusals": found.not_measured}
    shares = {f"{name} at {alpha}": kept(found.estimates(name)[alpha]) for name in REQUESTS for alpha in (0, 1)}
    return {"cosine with refusal": float(found.cosine[0]), "random within": found.random, **shares}


def of_items(scores: Scores, values: Array) -> Measured:
    return Measured(ALPHAS, values, scores.groups)


GROUPS: Mapping[str, Callable[[Bench, str], Row]] = {
    "read and written": written, "steered": steered, "side effects, of requests how many are refused": refused
}  # fmt: skip
"""By their titles, functions of a bench and a concept that measure the columns of a table."""
