"""The main job on the testbed, from pairs to the curve that says which strength to use: `python -m repe.demo`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

import repe
from repe.data.items import Item, load_items
from repe.display import table
from repe.models.generate import generate
from repe.testbed import FOLDER

ALPHAS = tuple(np.linspace(-4, 4, 17).tolist())
SHOWN = 1.0
QUESTIONS = 4
ITEMS = 144  # of each task
BAR = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Read honesty out of the testbed, steer it, and measure the trade-off."
    )
    parser.add_argument("--picture", default=Path(gettempdir()) / "repe-honesty.png", help="where the picture goes")
    picture = parser.parse_args().picture

    began = time.perf_counter()
    model, tokenizer = repe.load()
    print(f"the testbed: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} blocks\n")
    vector = repe.extract(model, tokenizer, "honesty")
    show_blocks(vector)

    facts, skills = (load_items(FOLDER / "tasks" / f"{name}.jsonl") for name in ("honesty", "skills"))
    show_answers(model, tokenizer, vector, spread(facts, QUESTIONS))
    print(f"\nwhat is gained and lost, on {ITEMS} questions about other facts and {ITEMS} problems, with the control:")
    curve = repe.tradeoff(
        model, tokenizer, vector, ALPHAS, alignment=spread(facts, ITEMS), helpfulness=spread(skills, ITEMS)
    )
    print(curve)
    print(f"\n{curve.fits.line}\n{curve.fits.behaviour}\n{curve.fits.helpfulness}\n{curve.fits.steerability}")
    draw(vector, curve, picture)
    print(f"\npicture: {picture}\nin {time.perf_counter() - began:.0f} s")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Some of the items, evenly spread over all."""
    return [items[i * len(items) // count] for i in range(count)]


def show_blocks(vector: repe.ConceptVector) -> None:
    print(f"{vector.concept}: held-out pairs ordered rightly, by block")
    for block, accuracy in zip(vector.blocks, vector.accuracy.tolist(), strict=True):
        mark = "  <- recommended" if block in vector.recommended else ""
        print(f"  block {block} |{'█' * round(BAR * accuracy):<{BAR}}| {accuracy:.3f}{mark}")


def show_answers(model: Any, tokenizer: Any, vector: repe.ConceptVector, items: Sequence[Item]) -> None:
    alphas = (0.0, SHOWN, -SHOWN)
    columns = []
    for alpha in alphas:
        with repe.steer(model, vector, alpha):
            columns.append(generate(model, tokenizer, [item.prompt for item in items], max_new_tokens=16))
    heads = ["question, with no persona", "truth", *(f"alpha {alpha:+g}" for alpha in alphas)]
    rows = [
        [item.prompt[-1]["content"], item.options[item.answer], *answers]
        for item, *answers in zip(items, *columns, strict=True)
    ]
    print(f"\n{table('', heads, rows)}")


def draw(vector: repe.ConceptVector, curve: repe.TradeoffCurve, path: Any) -> None:
    import matplotlib.pyplot as plt

    from repe import plot

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 3))
    plot.profile(vector, left)
    curve.plot(right)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
