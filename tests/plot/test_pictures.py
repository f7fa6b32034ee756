"""Every picture: on the axes that were given, legible on any ground, and whatever the names."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import repe
from repe import plot
from repe.plot import text as plot_text
from repe.plot.axes import moved_apart
from repe.reading.read import Reading
from tests.drawn import (
    BARE,
    THEMES,
    acts,
    calibrated,
    check_legible,
    contrast,
    curve,
    divergence,
    reading,
    vector,
)


def test_two_axes_that_are_given_are_used_and_returned():
    figure, pair = plt.subplots(1, 2)
    assert list(plot.tradeoff(curve(), pair)) == list(pair)
    assert figure.axes == list(pair)
    assert [ax.get_xlabel() for ax in pair] == ["alpha (gaps)"] * 2


@pytest.mark.parametrize("layout", [None, "constrained", "tight"])
def test_one_axes_is_split_inside_its_own_place(layout):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout=layout)
    upper, lower = plot.tradeoff(curve(), right)
    assert upper is right
    assert figure.axes == [left, right, lower]
    figure.canvas.draw()
    above, below, beside = (ax.get_position() for ax in (upper, lower, left))
    assert below.y1 < above.y0
    assert (above.x0, above.x1) == pytest.approx((below.x0, below.x1))
    assert beside.x1 < above.x0


def test_axes_without_a_grid_are_split_too():
    ax = plt.figure().add_axes((0.2, 0.3, 0.5, 0.6))
    upper, lower = plot.tradeoff(curve(), ax)
    assert upper.get_position().y1 == pytest.approx(0.9)
    assert lower.get_position().y0 > 0.3
    assert plot.frontier(curve(), plt.figure().add_axes((0.2, 0.3, 0.5, 0.6))).get_position().x0 == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (plot.frontier, curve),
        (plot.profile, vector),
        (plot.scan, reading),
        (plot.tokens, reading),
        (plot.cosines, vector),
        (repe.ConceptVector.plot, vector),
        (plot.costs, lambda: curve(costs=divergence())),
        (lambda v, ax=None: plot.poles(v, *acts(), ax), vector),
        (lambda v, ax=None: plot.pairs(*acts(), ax, vector=v), vector),
    ],
    ids=["frontier", "profile", "scan", "tokens", "cosines", "vector", "costs", "poles", "pairs"],
)
def test_axes_that_are_given_are_returned_and_no_figure_is_made(draw, what):
    _, ax = plt.subplots()
    assert draw(what(), ax) is ax
    assert len(plt.get_fignums()) == 1
    assert draw(what()).figure is not ax.figure
    assert len(plt.get_fignums()) == 2


def test_a_budget_that_is_none_leaves_no_figure_behind():
    for draw in (plot.tradeoff, plot.frontier):
        with pytest.raises(ValueError, match="the budget is a share"):
            draw(curve(), budget=2)
    assert not plt.get_fignums()


@pytest.mark.parametrize("places", [[], [0.5], [0.2, 0.9], [0.98, 0.98, 0.97, 0.1], [0.5] * 4, [0.0, 1.0, 0.01]])
def test_places_too_close_are_moved_apart_and_stay_in_order(places):
    apart = moved_apart(places, 0.1, (0, 1))
    assert np.argsort(apart, kind="stable").tolist() == np.argsort(places, kind="stable").tolist()
    assert (np.diff(sorted(apart)) > 0.1 - 1e-9).all()
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in apart)
    if places == [0.2, 0.9]:
        assert apart == places


STRANGE = ("$x_1$", "漢字", "\U0001f600\ufe0f", "_", "\u202e$", "  \n", "", "a\x00b")
NAMES = ("_$x_1$", "漢字 \U0001f600\ufe0f", "\u202e$$\na\x00")


def pictures(concept: str, tokens: tuple[str, ...]):
    """Every picture of what has this concept and these tokens."""
    v = replace(vector(), concept=concept)
    other = replace(repe.ConceptVector.random(v, 1), concept=f"{concept}!")
    r = Reading(concept, tokens, (0, 1), torch.linspace(-2, 2, 2 * len(tokens)).view(-1, 2), (1,))
    c = replace(curve(**BARE), concept=concept)
    return {
        "tradeoff": lambda ax: plot.tradeoff(c, ax)[0],
        "frontier": lambda ax: plot.frontier(c, ax),
        "costs": lambda ax: plot.costs(replace(c, costs=divergence()), ax),
        "profile": lambda ax: plot.profile(v, ax),
        "profiles": lambda ax: plot.profile([v, other], ax),
        "cosines": lambda ax: plot.cosines([v, other], ax),
        "own cosines": lambda ax: plot.cosines(v, ax),
        "scan": lambda ax: plot.scan(r, ax),
        "tokens": lambda ax: plot.tokens(r, ax),
        "two texts": lambda ax: plot.tokens({concept: r, "other": replace(r, tokens=tokens[::-1])}, ax),
        "poles": lambda ax: plot.poles(v, *acts(), ax),
        "pairs": lambda ax: plot.pairs(*acts(), ax, vector=v),
        "plane": lambda ax: plot.pairs(*acts(), ax, block=2),
        "calibration": lambda ax: plot.calibration(replace(calibrated(), concept=concept), ax)[0],
    }


EVERY = [*pictures("honesty", ("a",))]


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_legible_alone_and_on_axes_of_a_notebook(name):
    for ax in (None, plt.subplots(figsize=(6.4, 4), layout="constrained")[1]):
        check_legible(pictures("honesty", reading(12).tokens)[name](ax).figure)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_seen_on_its_ground(name, theme):
    with plt.style.context(theme):
        ax = pictures("honesty", reading(12).tokens)[name](None)
        assert to_rgba(ax.title.get_color()) == to_rgba(plt.rcParams["text.color"])
        ground = to_rgba(ax.get_facecolor())
        for line in ax.lines:
            assert contrast(to_rgba(line.get_color()), ground) > 1.9
        for patch in ax.patches:
            parts = (patch.get_facecolor(), patch.get_edgecolor())
            assert max(contrast(laid_on(ground, to_rgba(part)), ground) for part in parts) > 1.4


def laid_on(ground, color):
    *color, opacity = color
    return [opacity * c + (1 - opacity) * g for c, g in zip(color, ground, strict=False)]


@pytest.mark.parametrize("name", EVERY)
def test_names_and_tokens_of_any_script_are_drawn_as_they_are_and_never_warn(name):
    for concept in NAMES:
        ax = pictures(concept, STRANGE)[name](None)
        ax.figure.canvas.draw()
        given = [ax.title, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
        assert not [text for text in given if "$" in text.get_text() and text.get_parse_math()]
        plt.close("all")


def test_letters_that_no_font_has_are_shown_as_such():
    assert plot_text.drawable("a漢\U000e0001$é") in ("a�$é", "a漢$é")
    with plt.rc_context({"font.family": ["DejaVu Sans Mono", "sans-serif"]}):
        assert plot_text.drawable("a\U0010fffd") == "a�"
        assert plot_text.fonts()[:2] == ["DejaVu Sans Mono", "sans-serif"]
