"""Times of things that run in turns, and what can be said of their ratios."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

LEAST = 6  # turns: of fewer no 95% interval of a median can be told
Run = Callable[[], Any]


@dataclass(frozen=True)
class Estimate:
    """A median of `n` samples, and its 95% interval by the sign test, which supposes nothing of their distribution."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Estimate:
        """Raises ValueError for fewer than six samples."""
        if (n := len(samples)) < LEAST:
            raise ValueError(f"got {n} samples, and the interval of a median needs {LEAST}: run more turns")
        ordered = np.sort(np.asarray(samples, dtype=float))
        outside = int(stats.binom.ppf(0.025, n, 0.5))
        return cls(float(np.median(ordered)), float(ordered[outside - 1]), float(ordered[n - outside]), n)

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """Of what was counted."""
        return cls(value, value, value, 1)


def in_turns(runs: Sequence[Run], turns: int, device: str = "cpu", warm: int = 1) -> np.ndarray:
    """(turns, runs), the seconds of each; every turn begins with another, as one leaves the caches to the next."""
    for run in [*runs] * warm:
        run()
    seconds = np.empty((turns, len(runs)))
    with undisturbed():
        for turn in range(turns):
            for place in range(len(runs)):
                which = (place + turn) % len(runs)
                seconds[turn, which] = timed(runs[which], device)
    return seconds


def timed(run: Run, device: str = "cpu") -> float:
    finish(device)
    began = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - began


def finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No collection of garbage while the context lasts, as in `timeit`."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def slope(sizes: Sequence[float], seconds: np.ndarray) -> Estimate:
    """The power of the size that the time grows with, from (turns, sizes): a line through the logarithms a turn."""
    logs = np.log(np.asarray(sizes, dtype=float))
    return Estimate.of([np.polyfit(logs, np.log(turn), 1)[0] for turn in seconds])
