"""The pictures: what is drawn are the numbers, on the axes that were given, and all that is written can be read."""

from dataclasses import replace
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.text import Text

import repe
from repe import plot
from repe.curve import Baseline, Control, Scores, TradeoffCurve
from repe.fits import bell, saturating
from repe.reading import Reading

ALPHAS = np.linspace(-4, 4, 21).round(9)
THEMES = ["default", "dark_background"]
SIZES = [(6.4, 4.8), (6.4, 4.0), (4.0, 3.2), (10.0, 8.0)]
BARE = {"control": None, "baseline": None}


@pytest.fixture(autouse=True)
def _figures():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


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
    numbers = dict.fromkeys(("scale", "sigma", "norm", "separation"), ones)
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


def lines(ax, label):
    return [line for line in ax.lines if line.get_label() == label]


def shaded(ax):
    return [patch for patch in ax.patches if "loses" in patch.get_label()]


def levels(ax):
    """Where horizontal lines are, but for marks."""
    return [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]


def names(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# the trade-off


def test_the_lines_are_the_means_with_their_intervals_over_the_whole_grid():
    c = curve()
    for ax, name in zip(plot.tradeoff(c), ("behaviour", "helpfulness"), strict=True):
        (mean,) = lines(ax, "mean, 95% interval")
        np.testing.assert_array_equal(mean.get_xdata(), ALPHAS)
        np.testing.assert_array_equal(mean.get_ydata(), c.columns[name])
        corners = ax.collections[0].get_paths()[0].vertices
        for i, alpha in enumerate(ALPHAS):
            across = corners[corners[:, 0] == alpha, 1]
            assert across.min() == pytest.approx(max(c.columns[f"{name}_low"][i], -1))
            assert across.max() == pytest.approx(min(c.columns[f"{name}_high"][i], 1))
        low, high = ax.get_xlim()
        assert low < -4
        assert high > 4
        assert ax.get_ylim()[0] < min(corners[:, 1])


def test_the_fits_are_those_of_the_curve():
    c = curve()
    upper, lower = plot.tradeoff(c)
    for ax, fit, shape in (
        (upper, c.fits.behaviour, saturating),
        (lower, c.fits.bell, lambda *p: bell(*p, floor=0.25)),
    ):
        (line,) = lines(ax, "fit")
        x = line.get_xdata()
        assert (x.min(), x.max()) == (-4, 4)
        np.testing.assert_allclose(line.get_ydata(), shape(x, fit["a"].value, fit["b"].value))


def test_every_random_direction_is_drawn_for_either_quantity():
    c = curve()
    for ax, values in zip(plot.tradeoff(c), (c.control.behaviour, c.control.helpfulness), strict=True):
        np.testing.assert_array_equal([line.get_ydata() for line in lines(ax, "random directions")], values)


def test_levels_stand_beside_with_their_names():
    c = curve()
    upper, lower = plot.tradeoff(c, budget=0.1)
    assert {"prompt: positive", "prompt: negative"} < set(names(upper))
    assert set(names(lower)) == {"prompt: positive", "prompt: negative", "10% lost", "guessing"}
    start = c.columns["helpfulness"][10]
    assert levels(lower) == pytest.approx([0.9 * start, 0.25])
    for ax, scores in ((upper, c.baseline.alignment.behaviour), (lower, c.baseline.helpfulness.probability)):
        marks = [line.get_ydata().item() for line in ax.lines if list(line.get_xdata()) == [1] and line.get_marker()]
        assert set(scores.mean(1)) <= set(marks)
        pointed = {text.get_text(): text.xy[1] for text in ax.texts}
        assert pointed["prompt: negative"] == scores.mean(1)[1]


def test_the_window_is_where_every_loss_up_to_it_is_surely_within_the_budget():
    c = curve()
    for budget in (0.02, 0.05, 0.2):
        low, high = plot.efficient_window(c, budget)
        inside = (low <= ALPHAS) & (high >= ALPHAS)
        assert low < 0 < high
        assert (c.columns["loss_high"][inside] <= budget).all()
        assert all(c.columns["loss_high"][np.isclose(ALPHAS, end)] > budget for end in (low - 0.4, high + 0.4))
        for ax in plot.tradeoff(c, budget=budget):
            (span,) = shaded(ax)
            assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((low, high))
    assert plot.efficient_window(c, 0.99) == (-4, 4)


def test_an_island_beyond_a_dear_strength_is_not_in_the_window():
    c = curve()
    c.columns["loss_high"][:] = [1, 0, 0, 1, *[0] * 14, 1, 0, 0]
    assert plot.efficient_window(c) == (ALPHAS[4], ALPHAS[17])


def test_the_chosen_strength_is_ringed_and_named():
    c = curve()
    choice = c.best()
    at = choice.alpha == ALPHAS
    upper, lower = plot.tradeoff(c)
    assert f"chosen: alpha {choice.alpha:g}" in names(upper)
    for ax, name in ((upper, "behaviour"), (lower, "helpfulness")):
        (ring,) = (line for line in ax.lines if line.get_markersize() == 11)
        assert (*ring.get_xdata(), *ring.get_ydata()) == (choice.alpha, c.columns[name][at].item())


def test_where_no_strength_is_recommended_none_is_ringed():
    c = curve()
    upper, lower = plot.tradeoff(c, budget=0)
    assert c.best(0).reason
    assert "no strength is recommended" in names(upper)
    assert not shaded(upper) + shaded(lower)
    assert not [line for ax in (upper, lower, plot.frontier(c, budget=0)) for line in ax.lines if ring(line)]


def ring(line) -> bool:
    return line.get_markersize() == 11


def test_what_was_not_measured_is_left_out():
    upper, lower = plot.tradeoff(curve(**BARE))
    assert not lines(upper, "random directions") + lines(lower, "random directions")
    assert set(legend(lower)) == {"mean, 95% interval", "fit", "loses at most 5%"}
    assert set(names(lower)) == {"5% lost", "guessing"}
    assert set(legend(plot.frontier(curve(**BARE)))) == {
        "alpha 0",
        f"chosen: alpha {curve().best().alpha:g}",
        "5% lost",
    }


def test_three_strengths_have_no_fit_and_one_has_no_curve():
    for alphas in (np.array([-1.0, 0.0, 1.0]), np.zeros(1)):
        c = curve(alphas, **BARE)
        for ax in plot.tradeoff(c):
            assert not lines(ax, "fit")
        plot.frontier(c).figure.canvas.draw()


def test_where_intervals_are_infinite_the_band_is_all_that_is_possible():
    c = curve()
    few = replace(c, alignment=replace(c.alignment, groups=["one"] * 40))
    corners = plot.tradeoff(few)[0].collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (-1, 1)


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({}, "alpha (gaps)"),
        ({"unit": "gap"}, "alpha (gaps)"),
        ({"unit": "norm"}, "alpha (residual norms)"),
        ({"unit": "sigma"}, "alpha (standard deviations)"),
        ({"unit": "nats"}, "alpha (nats)"),
        ({"unit": None}, "alpha"),
    ],
)
def test_axes_are_labelled_with_units(provenance, expected):
    c = curve(provenance=provenance)
    upper, lower = plot.tradeoff(c)
    assert lower.get_xlabel() == expected
    assert "P(aligned)\n- P(others)" in upper.get_ylabel()
    assert "P(right)" in lower.get_ylabel()
    ax = plot.frontier(c)
    assert "P(aligned)" in ax.get_xlabel()
    assert "P(right)" in ax.get_ylabel()
    assert ax.figure.axes[-1].get_ylabel() == expected


def test_the_frontier_joins_the_strengths_in_order_and_colours_them_around_zero():
    c = curve()
    ax = plot.frontier(c)
    (points,) = ax.collections
    joined = np.stack([c.columns["behaviour"], c.columns["helpfulness"]], 1)
    np.testing.assert_array_equal(points.get_offsets(), joined)
    np.testing.assert_array_equal(points.get_array(), ALPHAS)
    assert points.get_clim() == (-4, 4)
    assert any(np.array_equal(line.get_xydata(), joined) for line in ax.lines)
    for i, line in enumerate(lines(ax, "random directions")):
        np.testing.assert_array_equal(line.get_xydata().T, [c.control.behaviour[i], c.control.helpfulness[i]])
    for row, prompt in enumerate(c.baseline.prompts):
        (mark,) = lines(ax, f"prompt: {prompt}")
        place = c.baseline.alignment.behaviour[row].mean(), c.baseline.helpfulness.probability[row].mean()
        assert tuple(mark.get_xydata()[0]) == place
    (chosen,) = filter(ring, ax.lines)
    assert tuple(chosen.get_xydata()[0]) == tuple(joined[c.best().alpha == ALPHAS][0])


def test_alpha_zero_has_the_middle_colour_where_the_grid_is_lopsided():
    assert plot.frontier(curve(ALPHAS[5:], **BARE)).collections[0].get_clim() == (-4, 4)


# axes and figures


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
    ("draw", "what"), [(plot.frontier, curve), (plot.profile, vector), (plot.scan, reading)], ids=lambda f: f.__name__
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


# legible


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


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("draw", [plot.tradeoff, plot.frontier], ids=lambda f: f.__name__)
def test_nothing_written_is_clipped_or_over_another_or_over_data(draw, size, theme):
    with plt.style.context(theme):
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        draw(curve(), ax)
        check_legible(figure)
        assert not [text for text, box in written(figure) for ax in figure.axes if overlap(box, ax.bbox)]


@pytest.mark.parametrize("draw", [plot.tradeoff, plot.frontier], ids=lambda f: f.__name__)
def test_room_is_made_where_no_layout_engine_makes_it(draw):
    figure, ax = plt.subplots()
    draw(curve(), ax)
    check_legible(figure)


def test_names_of_prompts_are_cut_short_and_never_formulas():
    prompts = ("$x", "You are honest: you tell people only what you yourself believe", "a$b$", "_plain")
    four = Baseline(prompts, truths(np.array([0.8, 0.7, -0.9, -0.8])), skills(np.full(4, 0.5)))
    for ax in (plot.tradeoff(curve(baseline=four))[1], plot.frontier(curve(baseline=four))):
        said = {*names(ax), *legend(ax)}
        assert {"prompt: $x", "prompt: You are honest: you…", "prompt: a$b$", "prompt: _plain"} < said
        assert not [text for text in (*ax.texts, *ax.get_legend().get_texts()) if text.get_parse_math()]
        check_legible(ax.figure)


@pytest.mark.parametrize("theme", THEMES)
def test_what_is_drawn_in_ink_has_the_colour_of_text(theme):
    with plt.style.context(theme):
        ink, ground = to_rgba(plt.rcParams["text.color"]), to_rgba(plt.rcParams["axes.facecolor"])
        for ax in (*plot.tradeoff(curve()), plot.frontier(curve())):
            (chosen,) = filter(ring, ax.lines)
            assert to_rgba(chosen.get_color()) == ink
            assert not [line for line in ax.lines if to_rgba(line.get_color()) == ground]
            assert {to_rgba(text.get_color()) for text in ax.texts} <= {ink}


@pytest.mark.parametrize("places", [[], [0.5], [0.2, 0.9], [0.98, 0.98, 0.97, 0.1], [0.5] * 4, [0.0, 1.0, 0.01]])
def test_places_too_close_are_moved_apart_and_stay_in_order(places):
    apart = plot.moved_apart(places, 0.1, (0, 1))
    assert np.argsort(apart, kind="stable").tolist() == np.argsort(places, kind="stable").tolist()
    assert (np.diff(sorted(apart)) > 0.1 - 1e-9).all()
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in apart)
    if places == [0.2, 0.9]:
        assert apart == places


# reading


def test_a_profile_is_the_accuracy_of_every_block_and_marks_those_recommended():
    v = vector()
    ax = plot.profile(v)
    bars = {bar.get_x() + bar.get_width() / 2: bar for bar in ax.patches}
    heights = [bars[block].get_height() for block in sorted(bars)]
    np.testing.assert_allclose(heights, v.accuracy.numpy())
    assert [block for block, bar in bars.items() if bar.get_alpha() is None and bar.get_facecolor()[3] == 1] == [4]
    assert legend(ax) == ["recommended"]
    assert names(ax) == ["chance"]


def test_a_profile_of_many_blocks_can_be_read():
    for blocks in (2, 6, 32, 80):
        check_legible(plot.profile(vector(blocks)).figure)


def test_a_profile_without_held_out_pairs_has_no_bars():
    v = vector()
    ax = plot.profile(replace(v, accuracy=torch.full((6,), torch.nan)))
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("tokens", "blocks"), [(8, 6), (60, 6), (60, 32), (200, 80)])
def test_a_scan_can_be_read(tokens, blocks):
    r = reading(tokens, blocks)
    ax = plot.scan(r)
    np.testing.assert_array_equal(ax.images[0].get_array().data, r.scores.T)
    assert ax.figure.get_figwidth() <= 12
    check_legible(ax.figure)
    assert min(label.get_fontsize() for label in ax.get_xticklabels()) >= 6
    if tokens <= 60:
        shown = [" ".join(token.split()) or "·" for token in r.tokens]
        assert [label.get_text() for label in ax.get_xticklabels()] == shown


def test_in_narrow_axes_a_scan_names_some_of_the_tokens():
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    plot.scan(reading(), ax)
    check_legible(figure)
    assert 20 <= len(ax.get_xticklabels()) < 60
