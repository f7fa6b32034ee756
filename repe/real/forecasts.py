"""Forecasts: what gradients say of blocks and readers, against what a small push there does to items and to texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import repe
from repe.data.worded import worded
from repe.display import Table
from repe.measuring import TransformersScorer, items_of, texts_of
from repe.measuring.costs import costs_at
from repe.measuring.forecast import Forecast
from repe.measuring.intervals import Array
from repe.measuring.sweep import Exam
from repe.reading.dose import short_texts
from repe.reading.extract import read_poles
from repe.reading.placing import spread
from repe.reading.vector import DIVERGENCE
from repe.real.bench import Bench, Row, table
from repe.steering.edit import Edit

CONCEPTS = ("happiness", "honesty", "confidence", "formality")
READERS = ("mean", "pca")
STEP = 2  # of blocks
ITEMS, TEXTS, DRAWS = 24, 8, 20  # as many samples of the divergence as `repe.forecast` takes
ALPHA = 0.25  # forecast to cost a sixteenth of a dose's divergence
LIMIT = 0.03  # nats a token, up to which a push counts as small


def tables(bench: Bench) -> Iterator[Table]:
    places = {c: bench.row("forecasts", c, partial(row, bench, c)) for c in bench.chosen(CONCEPTS)}
    title = f"forecasts on {bench.name}: every block and reader, against what alpha {ALPHA} of the forecast dose does"
    note = (
        f"slopes off: the median and the worst relative error where the divergence is at most {LIMIT} nats; KL off:\n"
        "the median error of the divergence; clear: of 0, by the interval; Spearman: of efficiency"
    )
    yield table(title, "concept", {c: compared(r) for c, r in places.items()}, note)
    title = f"where to write on {bench.name}: measured efficiency, reader 'mean', as a share of the best block's"
    yield table(title, "concept", {c: placed(bench.vector(c), r) for c, r in places.items()})


def row(bench: Bench, concept: str) -> Row:
    """Columns of places: every reader at every block that is tried."""
    model, tokenizer = bench.model, bench.tokenizer
    poles = read_poles(model, tokenizer, concept)
    vectors = {reader: poles.fitted(reader) for reader in READERS}
    recommended = bench.vector(concept).recommended[0]
    blocks = sorted({*poles.blocks[::STEP], recommended, reads_best(vectors["mean"])})
    vectors = {reader: pushable(vector.at(*blocks)) for reader, vector in vectors.items()}
    items = spread(worded(items_of(concept, model)), bench.at_most(ITEMS))
    texts = texts_of("neutral", model)[: 2 * bench.at_most(TEXTS)]  # of which a forecast reads every other
    found = repe.forecast(model, tokenizer, vectors, alignment=items, items=len(items), neutral=texts, draws=DRAWS)
    forecast = {name: getattr(found, name).ravel().tolist() for name in ("slope", "efficiency", "low", "high")}
    edits = pushes(found, vectors)
    scorer, exam = TransformersScorer(model, tokenizer), Exam(tokenizer, {concept: items})
    plain = short_texts(model, tokenizer, texts[::2])
    slope, kl = [], []
    for edit in edits:
        back, forth = exam.scores(scorer, edit, [-ALPHA, ALPHA])[concept].difference.mean(1)
        slope.append(float(forth - back) / (2 * ALPHA))
    for edit in edits:
        cost = costs_at(scorer, plain, edit, [-ALPHA, ALPHA]).kl
        assert cost is not None
        kl.append(float(cost.mean()))
    return {
        "reader": [reader for reader in vectors for _ in blocks],
        "block": blocks * len(vectors),
        **{f"forecast {name}": values for name, values in forecast.items()},
        "slope": slope,
        "kl": kl,
    }


def pushable(vector: repe.ConceptVector) -> repe.ConceptVector:
    """The same directions, which can be pushed along whether or not held-out pairs show a distance along them."""
    return replace(vector, scale=torch.ones_like(vector.scale))


def pushes(found: Forecast, vectors: Mapping[str, repe.ConceptVector]) -> list[Edit]:
    """The edit of every reader at every block, its alpha counted in the doses that are forecast."""
    doses = zip(vectors.values(), torch.tensor(found.dose).float(), strict=True)
    return [Edit.of(replace(vector, dose=dose), blocks=block) for vector, dose in doses for block in found.blocks]


def reads_best(vector: repe.ConceptVector) -> int:
    return max(vector.blocks, key=lambda b: [float(of[vector.row(b)]) for of in (vector.accuracy, vector.separation)])


def efficiency(slope: Any, kl: Any) -> Array:
    """What was measured: nats of log odds for a square root of the Fisher information, both a dose."""
    return np.asarray(slope) / np.sqrt(2 * np.asarray(kl) / ALPHA**2)


def compared(places: Row) -> Row:
    """What the forecast of places is worth."""
    places = {name: np.array(column) for name, column in places.items()}
    slope, kl = places["slope"], places["kl"]
    small, clear = kl <= LIMIT, (places["forecast low"] > 0) | (places["forecast high"] < 0)
    off = np.abs(places["forecast slope"] / slope - 1)
    right = np.sign(places["forecast efficiency"]) == np.sign(slope)
    return {
        "places": len(slope),
        "small": int(small.sum()),
        "Spearman": float(spearmanr(places["forecast efficiency"], efficiency(slope, kl))[0]),
        "slopes off": float(np.median(off[small])) if small.any() else np.nan,
        "worst": float(off[small].max(initial=0)),
        "worst of clear": float(off[small & clear].max(initial=0)),
        "KL off": float(np.median(np.abs(kl / (DIVERGENCE * ALPHA**2) - 1))),
        "clear": int(clear.sum()),
        "right sign of clear": float(right[clear].mean()) if clear.any() else np.nan,
    }


def placed(vector: repe.ConceptVector, places: Row) -> Row:
    """How good the recommended block is, and the one that reads best, beside the best of those that were tried."""
    measured = efficiency(places["slope"], places["kl"]).tolist()
    by_block = {b: e for r, b, e in zip(places["reader"], places["block"], measured, strict=True) if r == "mean"}
    best, chosen, reading = max(by_block, key=by_block.__getitem__), vector.recommended[0], reads_best(vector)
    return {
        "recommended block": chosen, "share": by_block[chosen] / by_block[best],
        "best block": best, "its efficiency": by_block[best],
        "block that reads best": reading, "its share": by_block[reading] / by_block[best],
    }  # fmt: skip
