"""Times: the seconds that extracting, forecasting, measuring and calibrating happiness take, each run once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import repe
from repe.display import Table
from repe.real.bench import Bench, Row, table

CONCEPT = "happiness"
VERBS: dict[str, Callable[..., Any]] = {
    "extract": repe.extract, "forecast": repe.forecast, "tradeoff": repe.tradeoff, "calibrate": repe.calibrate,
}  # fmt: skip
SMALLER: dict[str, dict[str, Any]] = {
    "forecast": {"items": 4, "draws": 1},
    "tradeoff": {"alphas": [1.0], "controls": 1},
    "calibrate": {"readers": "mean", "blocks": 3},
}


def tables(bench: Bench) -> Iterator[Table]:
    rows = {name: bench.row("times", CONCEPT, partial(row, bench, name), name) for name in VERBS}
    yield table(f"times on {bench.name}, after {bench.loading:.1f} s of loading", "verb", rows)


def row(bench: Bench, name: str) -> Row:
    start = time.perf_counter()
    VERBS[name](bench.model, bench.tokenizer, CONCEPT, **SMALLER.get(name, {}) if bench.small else {})
    return {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
