"""The main job on the testbed, from pairs to a steered model: `python -m repe.demo [--picture FILE]`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import repe
from repe.generation import generate
from repe.sweep import behaviour, sweep
from repe.tasks import Item, load_items
from repe.testbed import FOLDER

ALPHAS = (-4.0, -2.0, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
SHOWN = 0.5
QUESTIONS = 4
BAR = 40


def main() -> None:
    parser = argparse.ArgumentParser(description="Read honesty out of the testbed, and steer it.")
    parser.add_argument("--picture", help="also draw the result into this file")
    picture = parser.parse_args().picture

    began = time.perf_counter()
    model, tokenizer = repe.load()
    print(f"the testbed: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} blocks\n")
    vector = repe.extract(model, tokenizer, "honesty")
    show_blocks(vector)

    facts, skills = load_items(FOLDER / "tasks" / "honesty.jsonl"), load_items(FOLDER / "tasks" / "skills.jsonl")
    show_answers(model, tokenizer, vector, spread(facts, QUESTIONS))
    scores = sweep(model, tokenizer, vector, {"facts": facts, "skills": skills}, ALPHAS)
    show_strengths(scores["facts"], scores["skills"])
    if picture:
        draw(vector, scores, picture)
    print(f"\nin {time.perf_counter() - began:.0f} s")


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
    print(f"\n{'question, with no persona':<44}{'truth':<14}" + "".join(f"{f'alpha {a:+g}':<14}" for a in alphas))
    for item, *answers in zip(items, *columns, strict=True):
        question = item.prompt[-1]["content"]
        print(f"{question:<44}{item.options[item.answer]:<14}" + "".join(f"{a:<14}" for a in answers))


def show_strengths(facts: Tensor, skills: Tensor) -> None:
    print("\nalpha   behaviour: P(true) - P(false)   helpfulness: P(right) on skills")
    for alpha, truth, right in zip(ALPHAS, behaviour(facts).tolist(), skills.mean(1).tolist(), strict=True):
        print(f"{alpha:+5.2f}   {truth:+.3f} {gauge(truth, -1):<24}   {right:.3f} {gauge(right, 0)}")


def gauge(value: float, lowest: float, width: int = 20) -> str:
    return "▏" + "█" * round(width * (value - lowest) / (1 - lowest))


def draw(vector: repe.ConceptVector, scores: dict[str, Tensor], path: str) -> None:
    import matplotlib.pyplot as plt

    from repe import plot

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    plot.profile(vector, left)
    plot.strengths(ALPHAS, behaviour(scores["facts"]), scores["skills"].mean(1), right)
    figure.savefig(path, dpi=110)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
