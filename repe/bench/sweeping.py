"""What the sweep saves, against a loop over the strengths that steers and scores batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

import repe
from repe.bench.reading import medians
from repe.bench.table import Row
from repe.bench.timing import Estimate, in_turns
from repe.data.answers import answers_of
from repe.data.catalogue import find_task
from repe.data.items import Item, load_items
from repe.measuring.sweep import Exam, sweep
from repe.models.load import home_of
from repe.models.logits import log_probability
from repe.models.tokens import pad

ITEMS = 120
ALPHAS = tuple(np.linspace(-4, 4, 21).tolist())


def rows(small: bool, turns: int) -> Iterator[Row]:
    """On the testbed, whose tasks have two and four options."""
    model, tokenizer = repe.load()
    vector = repe.extract(model, tokenizer, "honesty", writes=False)
    alphas = ALPHAS[:3] if small else ALPHAS
    for name in ("honesty", "skills"):
        items = load_items(find_task(name, home_of(model)))[: 12 if small else ITEMS]
        found: dict[str, Any] = {}

        def fast(name: str = name, items: Sequence[Item] = items, found: dict[str, Any] = found) -> None:
            found["sweep"] = sweep(model, tokenizer, vector, {name: items}, alphas, unit="gap")[name].log_likelihoods

        def slow(items: Sequence[Item] = items, found: dict[str, Any] = found) -> None:
            found["loop"] = loop(model, tokenizer, vector, items, alphas)

        seconds = in_turns([slow, fast], turns)
        took = dict(zip(("loop", "sweep"), seconds.T, strict=True))
        yield Row(
            f"sweep, {len(alphas)} alphas, {len(items[0].options)} options: times faster than a loop over alphas",
            Estimate.of(took["loop"] / took["sweep"]),
            note=f"{medians(took, 'loop', 'sweep')}; log-likelihoods differ by {apart(found):.1e} at most",
        )  # fmt: skip


def apart(found: dict[str, Any]) -> float:
    return float(np.nanmax(np.abs(found["sweep"] - found["loop"])))


@torch.no_grad()
def loop(model: Any, tokenizer: Any, vector: Any, items: Sequence[Item], alphas: Sequence[float]) -> Any:
    """(alphas, items, options): for every alpha steer, then padded batches of 32 over every item and option."""
    answers = answers_of(tokenizer, items)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].ids))
    found = torch.zeros(len(alphas), len(answers))
    for row, alpha in enumerate(alphas):
        with repe.steer(model, vector, alpha, unit="gap"):
            for start in range(0, len(order), 32):
                chosen = order[start : start + 32]
                batch = pad([answers[i].ids for i in chosen])
                log_p = log_probability(model(**batch, use_cache=False).logits[:, :-1], batch["input_ids"][:, 1:])
                for i, tokens in zip(chosen, log_p, strict=True):
                    found[row, i] = tokens[answers[i].begins - 1 : len(answers[i].ids) - 1].sum()
    return Exam(tokenizer, {"task": items}).table(found)["task"].log_likelihoods
