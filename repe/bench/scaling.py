"""How the time grows with what is asked for, as the power of its size: 1 is in proportion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

import repe
from repe.bench.table import Row
from repe.bench.timing import Run, in_turns, slope
from repe.bench.workload import Workload, contrast
from repe.data.items import Item
from repe.measuring.sweep import sweep


def rows(work: Workload, turns: int) -> Iterator[Row]:
    model, tokenizer, small = work.model, work.tokenizer, work.small
    counts = (4, 8, 16) if small else (32, 64, 128, 256)

    def extracting(count: int) -> Run:
        pairs = contrast(work.pairs(count))
        return lambda: repe.extract(model, tokenizer, pairs, blocks=work.middle, enough=None, writes=False)

    def apart(count: int) -> Run:
        texts = work.unlike(count)
        return lambda: repe.capture(model, tokenizer, texts, blocks=work.middle)

    def reading(length: int) -> Run:
        text = work.unlike(1, length)
        return lambda: repe.capture(model, tokenizer, text, tokens="all")

    def up_to(block: int) -> Run:
        texts = work.unlike(16)
        return lambda: repe.capture(model, tokenizer, texts, blocks=block - 1)

    def sweeping(count: int) -> Run:
        items = [Item(prompt, (" capital", " anthem"), group=prompt) for prompt in work.prompts(8)]
        alphas = [0.1 * (n + 1) for n in range(count)]
        return lambda: sweep(model, tokenizer, work.vector, {"task": items}, alphas, blocks=work.middle, unit="gap")

    grow = partial(growth, turns=turns, device=work.device)
    yield grow("extract, with pairs that share prefixes", counts, extracting)
    yield grow("capture, with texts that share nothing", counts, apart)
    yield grow("capture, with the tokens of a text", (16, 32, 64) if small else (64, 128, 256, 512), reading)
    yield grow("capture, with the block it goes up to", (2, 4, 8) if small else (2, 4, 8, 16), up_to)
    yield grow("sweep, with strengths", (1, 2, 4) if small else (2, 4, 8, 16), sweeping)


def growth(what: str, sizes: Sequence[int], make: Callable[[int], Run], turns: int, device: str) -> Row:
    seconds = in_turns([make(size) for size in sizes], turns, device)
    medians = np.median(seconds, axis=0)
    took = ", ".join(f"{size}: {1000 * each:.3g} ms" for size, each in zip(sizes, medians, strict=True))
    return Row(f"time grows, {what}: as the power", slope(sizes, seconds), note=took)
