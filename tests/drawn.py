"""Things to draw, and what can be told of a picture."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import repe
from repe.measuring.calibrate import Calibration, Setting, Trial
from repe.measuring.choice import UNCHANGED, Outcome
from repe.measuring.curve import Baseline, Control, Costs, Scores, TradeoffCurve
from repe.measuring.intervals import Estimate
from repe.reading.read import Reading

ALPHAS = np.linspace(-4, 4, 21).round(9)
THEMES = ["default", "dark_background"]
BARE = {"control": None, "baseline": None}


def options(first: np.ndarray, count: int, name: str) -> Scores:
    """Items whose first option has these probabilities, and the others share what is left; an item a group."""
    rest = np.repeat(((1 - first) / (count - 1))[..., None], count - 1, axis=-1)
    items = first.shape[1]
    logs = np.log(np.concatenate([first[..., None], rest], -1))
    return Scores(name, logs, np.zeros(items, int), [f"{name} {i}" for i in range(items)])


def truths(alphas: np.ndarray) -> Scores:
    lean = np.random.default_rng(0).normal(0, 0.2, 40)
    back = np.where(np.abs(alphas) > 2, 0.15 * (np.abs(alphas) - 2), 0)[:, None]
    return options(0.5 + 0.5 * np.tanh(1.1 * alphas[:, None] + lean) * (1 - back), 2, "honesty")


def skills(alphas: np.ndarray) -> Scores:
    strain = np.exp(np.random.default_rng(1).normal(0, 0.3, 60))
    return options(0.25 + 0.75 / (1.02 + 0.03 * strain * alphas[:, None] ** 2), 4, "skills")


def curve(alphas=ALPHAS, **changes) -> TradeoffCurve:
    slopes = np.array([[-0.05], [0.02], [0.1]]) * alphas
    given = {
        "control": Control([0, 1, 2], np.tanh(slopes), slopes, 0.98 - 0.02 * alphas**2 - 0.01 * np.abs(slopes)),
        "baseline": Baseline(("positive", "negative"), truths(np.array([0.8, -0.9])), skills(np.array([0.5, 0.6]))),
        "provenance": {"unit": "gap"},
    }
    return TradeoffCurve("honesty", alphas, truths(alphas), skills(alphas), **given | changes)


def vector(blocks: int = 6) -> repe.ConceptVector:
    ones, directions = torch.ones(blocks), torch.eye(blocks)
    numbers = dict.fromkeys(("scale", "sigma", "norm", "separation", "dose"), ones)
    accuracy = torch.linspace(0.4, 1, blocks)
    return repe.ConceptVector(
        "honesty", tuple(range(blocks)), (blocks - 2,), directions, directions, directions, accuracy=accuracy, **numbers
    )


def reading(tokens: int = 60, blocks: int = 6) -> Reading:
    words = ["The", " quick", "\n\n", " $", " unbelievably", "$", "!"]
    return Reading(
        "honesty",
        tuple(words[i % len(words)] for i in range(tokens)),
        tuple(range(blocks)),
        torch.linspace(-2, 2, tokens * blocks).view(tokens, blocks),
        (1,),
    )


def acts(texts: int = 40, blocks: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of two poles, which stand at -1 and +1 in the scores of `vector` at every block."""
    noise = torch.randn(2, texts, blocks, blocks) * 0.3
    direction = torch.eye(blocks)
    return direction * 2 + noise[0], noise[1]


def calibrated(alpha: float = 2.5) -> Calibration:
    def trial(reader: str, block: int, shift: float) -> Trial:
        gain = Estimate(0.1 * block + shift, 0.1 * block, 0.1 * block + 0.3)
        return Trial(reader, (block,), 4.0, alpha, Outcome(gain, UNCHANGED.loss), 0.5 + 0.1 * block - shift)

    trials = tuple(trial(r, b, s) for r, s in (("mean", 0.1), ("pca", 0.2)) for b in range(5))
    more = Setting(1, vector(), trials[7], UNCHANGED, trials)
    nothing = replace(trials[0], alpha=0.0, reason="none")
    return Calibration("honesty", 1.0, 0.05, more, Setting(-1, vector(), nothing, UNCHANGED, trials))


def lines(ax, label):
    return [line for line in ax.lines if line.get_label() == label]


def names(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ring(line) -> bool:
    return line.get_markersize() == 11


def written(figure):
    """Every text that is drawn, with the box around its letters."""
    drawn, draw = [], Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, *given: (drawn.append(text), draw(text, *given)))
        figure.canvas.draw()
    return [(text.get_text(), Text.get_window_extent(text)) for text in drawn if text.get_text().strip()]


def overlap(one, other) -> bool:
    apart = one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1
    return not apart


def check_legible(figure):
    texts = written(figure)
    assert len(texts) > 8
    collisions = [(a, b) for (a, one), (b, other) in combinations(texts, 2) if overlap(one, other)]
    assert not collisions
    width, height = figure.bbox.size
    assert not [t for t, box in texts if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]


def contrast(one, other) -> float:
    """The ratio of WCAG 2, 1 to 21."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def divergence(**changes) -> Costs:
    kl = 0.02 * ALPHAS[:, None] ** 2 * np.linspace(0.5, 1.5, 12)
    return Costs(**{"kl": kl, "kl_p95": 5 * kl.mean(1)} | changes)
