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
from repe.measuring.calibrate import Calibration, Setting, Trial
from repe.measuring.choice import UNCHANGED, Outcome
from repe.measuring.curve import Baseline, Control, Costs, Scores, TradeoffCurve
from repe.measuring.fits import bell, saturating
from repe.measuring.intervals import Estimate
from repe.plot import text as plot_text
from repe.plot.axes import moved_apart
from repe.reading.read import Reading, score

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


def acts(texts: int = 40, blocks: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of two poles, which stand at -1 and +1 in the scores of `vector` at every block."""
    noise = torch.randn(2, texts, blocks, blocks) * 0.3
    direction = torch.eye(blocks)
    return direction * 2 + noise[0], noise[1]


def calibrated(alpha: float = 2.5) -> Calibration:
    def trial(reader: str, block: int, shift: float) -> Trial:
        gain = Estimate(0.1 * block + shift, 0.1 * block, 0.1 * block + 0.3)
        return Trial(reader, block, 4.0, alpha, Outcome(gain, UNCHANGED.loss), 0.5 + 0.1 * block - shift)

    trials = tuple(trial(r, b, s) for r, s in (("mean", 0.1), ("pca", 0.2)) for b in range(5))
    more = Setting(1, vector(), trials[7], UNCHANGED, trials)
    nothing = replace(trials[0], alpha=0.0, reason="none")
    return Calibration("honesty", 1.0, 0.05, more, Setting(-1, vector(), nothing, UNCHANGED, trials))


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
    apart = moved_apart(places, 0.1, (0, 1))
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


def test_a_scan_marks_the_recommended_blocks_and_what_has_no_score():
    r = reading(8)
    r.scores[:, 3] = torch.nan
    ax = plot.scan(r)
    bold = [label.get_text() for label in ax.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["1"]
    drawn = ax.images[0].cmap(ax.images[0].norm(ax.images[0].get_array()))
    np.testing.assert_allclose(drawn[3], np.tile(to_rgba("#999999"), (8, 1)), atol=0.01)
    assert not (drawn[2] == drawn[3]).all()


def test_profiles_of_several_are_a_line_each_by_name():
    one, other = vector(), replace(vector(), accuracy=torch.linspace(1, 0.5, 6), recommended=(0,))
    ax = plot.profile({"mean": one, "_pca": other})
    for name, v in (("mean", one), (" _pca", other)):
        (line,) = lines(ax, name)
        np.testing.assert_allclose(line.get_xydata(), np.stack([v.blocks, v.accuracy], 1))
    rings = [tuple(line.get_xydata()[0]) for line in lines(ax, "recommended")]
    assert rings == [(4, pytest.approx(0.88)), (0, 1)]
    assert legend(ax) == ["mean", " _pca", "recommended"]


def test_lines_that_are_the_same_are_both_seen():
    ax = plot.profile([vector(), vector()])
    widths = [lines(ax, name)[0].get_linewidth() for name in ("honesty", "honesty (2)")]
    assert widths[0] > 2 * widths[1]


def test_several_of_one_concept_are_told_apart_by_their_readers():
    made = [replace(vector(), provenance={"reader": reader}) for reader in ("mean", "pca", "pca")]
    assert legend(plot.profile(made))[:3] == ["honesty, mean", "honesty, pca", "honesty, pca (2)"]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.profile([])


# tokens


def test_the_line_of_a_reading_is_its_score_token_by_token():
    r = reading(12)
    for block, scores in ((None, r.best), (4, r.scores[:, 4])):
        ax = plot.tokens(r, block=block)
        (line,) = lines(ax, "honesty")
        np.testing.assert_allclose(line.get_ydata(), scores)
        heights = [bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(np.array(heights[:12]) + heights[12:], scores)
        assert f"at block {1 if block is None else block}" in ax.get_title()
        assert {"positive pole", "negative pole"} == set(names(ax))
    with pytest.raises(IndexError, match="block 9 was not read"):
        plot.tokens(r, block=9)
    assert len(plt.get_fignums()) == 2


def test_places_are_named_after_the_tokens_of_one_text_or_of_two():
    r = replace(reading(3, 1), recommended=(0,))
    texts = {"a": replace(r, tokens=(" a", "b", "c")), "b": replace(r, tokens=(" a", "x", "\n"))}
    ax = plot.tokens(texts)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b | x", "c | ·"]
    ax = plot.tokens(texts | {"c": replace(r, tokens=("z", "y", "c"))})
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a | z", "1", "c | ·"]
    shorter = Reading("honesty", (" a",), r.blocks, r.scores[:1], r.blocks)
    assert [label.get_text() for label in plot.tokens([r, shorter]).get_xticklabels()] == ["The | a", "quick", "·"]


def test_the_first_token_does_not_flatten_the_others():
    r = reading(12)
    r.scores[0] = -80
    low, high = plot.tokens(r).get_ylim()
    assert -3 < low < -1
    assert 1 < high < 3
    r.scores[5] = 4
    assert plot.tokens(r).get_ylim()[1] > 4


def test_a_token_without_a_score_is_a_gap_in_the_line():
    r = reading(12)
    r.scores[4] = torch.nan
    (line,) = lines(plot.tokens(r), "honesty")
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [4]


# vectors among each other


def concepts(count: int = 3, blocks: int = 4) -> list[repe.ConceptVector]:
    like = vector(blocks)
    drawn = [repe.ConceptVector.random(like, seed) for seed in range(count)]
    return [replace(v, concept=f"concept {i}") for i, v in enumerate(drawn)]


def test_cosines_are_those_of_the_vectors_and_stand_in_the_cells():
    several = concepts()
    for block in (None, 0):
        ax = plot.cosines(several, block=block)
        at = several[0].recommended[0] if block is None else block
        expected = [[one.cosine(other)[at].item() for other in several] for one in several]
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
        assert names(ax) == [f"{value + 0:.2f}".replace("-0.00", "0.00") for row in expected for value in row]
        assert [label.get_text() for label in ax.get_yticklabels()] == [v.concept for v in several]
        assert f"block {at}" in ax.get_title()
        assert ax.images[0].get_clim() == (-1, 1)


def test_a_cosine_of_nearly_nothing_has_no_sign():
    tilted = torch.tensor([[1.0, -0.001], [0.0, 1.0]])
    tilted /= tilted.norm(dim=1, keepdim=True)
    v = replace(vector(2), write=tilted, read=tilted, recommended=(0,))
    assert names(plot.cosines(v)) == ["1.00", "0.00", "0.00", "1.00"]


def test_one_vector_is_compared_with_itself_block_by_block():
    v = concepts()[0]
    ax = plot.cosines(v)
    np.testing.assert_allclose(ax.images[0].get_array(), v.write @ v.write.T, atol=1e-6)
    with pytest.raises(ValueError, match="compared block by block"):
        plot.cosines([v], block=1)


def test_what_is_read_can_be_compared_too():
    v = vector(3)
    read = v.write + torch.tensor([0.0, 1.0, 0.0])
    other = replace(v, concept="other", read=read / (read * v.write).sum(-1, keepdim=True))
    assert plot.cosines([v, other], block=0).images[0].get_array()[0, 1] == pytest.approx(1)
    ax = plot.cosines([v, other], block=0, direction="read")
    assert ax.images[0].get_array()[0, 1] == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="'write' and 'read', got 'both'"):
        plot.cosines([v, other], direction="both")


def test_vectors_of_other_models_or_without_the_block_are_refused_and_leave_no_figure():
    with pytest.raises(ValueError, match="d_model is 4 and 6"):
        plot.cosines([vector(4), replace(vector(6), recommended=(2,))], block=2)
    with pytest.raises(IndexError, match="no block 9"):
        plot.cosines(concepts(), block=9)
    assert not plt.get_fignums()


def test_letters_in_cells_can_be_read_on_their_ground():
    ax = plot.cosines(concepts(6, 12))
    image = ax.images[0]
    for text, value in zip(ax.texts, image.get_array().flat, strict=True):
        assert contrast(to_rgba(text.get_color()), image.cmap(image.norm(value))) > 4.5


def contrast(one, other) -> float:
    """The ratio of WCAG 2, 1 to 21."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


# the two poles


def test_the_poles_are_the_scores_of_their_texts():
    v, (positive, negative) = replace(vector(), scale=torch.full((6,), 2.0)), acts()
    for block in (None, 1):
        at = 4 if block is None else block
        for given in ({}, {"blocks": range(6)}):
            ax = plot.poles(v, positive, negative, block=block, **given)
            for name, side, right in (("positive", positive, lambda s: s > 0), ("negative", negative, lambda s: s < 0)):
                scores = score(side, v)[:, at]
                (outline,) = (p for p in ax.patches if p.get_label().startswith(name))
                covered = outline.get_xy()
                assert covered[:, 0].min() <= scores.min()
                assert covered[:, 0].max() >= scores.max() - 1e-6
                assert f"{name}: 40 texts, {right(scores).float().mean():.0%}" in outline.get_label()
                steps = covered[: len(covered) // 2 + 1]
                assert steps[1::2, 1].sum() == 40


def test_one_block_alone_and_other_blocks_than_the_vectors_are_found_by_number():
    v, (positive, negative) = vector(), acts()

    def drawn(*sides, **how):
        return [patch.get_xy().tolist() for patch in plot.poles(v, *sides, block=2, **how).patches]

    expected = drawn(positive, negative)
    assert drawn(positive[:, 2], negative[:, 2]) == expected
    assert drawn(positive[:, [2]], negative[:, [2]]) == expected
    assert drawn(positive[:, [1, 2]], negative[:, [1, 2]], blocks=[2, 1]) == expected
    for sides, how in (((positive[:, :3], negative[:, :3]), {}), ((positive, negative), {"blocks": [1, 2]})):
        with pytest.raises(ValueError, match="block 2 cannot be found among"):
            drawn(*sides, **how)
    with pytest.raises(ValueError, match=r"d_model 6\), as .* got \(40, 5\)"):
        drawn(positive[:, 2, :5], negative[:, 2, :5])


def test_poles_that_have_no_distance_have_no_picture():
    v = vector()
    with pytest.raises(ValueError, match="no distance at block 4"):
        plot.poles(replace(v, scale=torch.zeros(6)), *acts())
    assert not plt.get_fignums()


def test_pairs_of_a_vector_stand_at_their_scores_and_are_joined():
    v, (positive, negative) = vector(), acts()
    ax = plot.pairs(positive, negative, vector=v)
    for points, side in zip(ax.collections, (positive, negative), strict=True):
        np.testing.assert_allclose(points.get_offsets()[:, 0], score(side, v)[:, 4], atol=1e-6)
    joined = np.stack([line.get_xydata() for line in ax.lines[:40]])
    np.testing.assert_allclose(joined[:, 0], ax.collections[0].get_offsets())
    np.testing.assert_allclose(joined[:, 1], ax.collections[1].get_offsets())


def test_pairs_without_a_vector_keep_their_distances_where_two_directions_say_all():
    flat = torch.randn(2, 30, 2) @ torch.randn(2, 7) + 3
    ax = plot.pairs(*flat)
    places = np.concatenate([points.get_offsets() for points in ax.collections])
    every = flat.flatten(0, 1).numpy()
    for i in range(60):
        np.testing.assert_allclose(
            np.linalg.norm(places - places[i], axis=1), np.linalg.norm(every - every[i], axis=1), atol=1e-4
        )
    shares = [float(label.split("(")[1].split("%")[0]) for label in (ax.get_xlabel(), ax.get_ylabel())]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[0] >= shares[1]


def test_the_positive_pole_is_on_the_right():
    positive, negative = acts()
    for sides in ((positive, negative), (negative, positive)):
        first, second = plot.pairs(*sides, block=3).collections
        assert first.get_offsets()[:, 0].mean() > second.get_offsets()[:, 0].mean()


def test_pairs_need_as_many_of_either_pole_and_a_block_of_several():
    positive, negative = acts()
    with pytest.raises(ValueError, match="the poles of pairs have one shape"):
        plot.pairs(positive[:3], negative, block=2)
    with pytest.raises(ValueError, match="block None cannot be found"):
        plot.pairs(positive, negative)


# costs and calibration


def divergence(**changes) -> Costs:
    kl = 0.02 * ALPHAS[:, None] ** 2 * np.linspace(0.5, 1.5, 12)
    return Costs(**{"kl": kl, "kl_p95": 5 * kl.mean(1)} | changes)


def test_the_divergence_is_drawn_with_its_interval_as_far_as_it_was_measured():
    c = curve(costs=divergence())
    ax = plot.costs(c)
    (mean,) = lines(ax, "mean, 95% interval")
    np.testing.assert_array_equal(mean.get_ydata(), c.columns["kl"])
    corners = ax.collections[0].get_paths()[0].vertices
    for at in (0, 5, -1):
        across = corners[corners[:, 0] == ALPHAS[at], 1]
        ends = c.columns["kl_low"][at], c.columns["kl_high"][at]
        assert (across.min(), across.max()) == pytest.approx(ends)
    (tail,) = lines(ax, "95th percentile of tokens")
    np.testing.assert_array_equal(tail.get_ydata(), c.columns["kl_p95"])
    assert ax.get_xlabel() == "alpha (gaps)"
    assert legend(plot.costs(curve(costs=divergence(kl=None)))) == ["95th percentile of tokens"]
    assert legend(plot.costs(curve(costs=divergence(kl_p95=None)))) == ["mean, 95% interval"]
    with pytest.raises(ValueError, match="has no divergence"):
        plot.costs(curve())
    assert len(plt.get_fignums()) == 3


def test_a_calibration_is_drawn_by_reader_with_what_was_chosen_ringed():
    found = calibrated()
    upper, lower = plot.calibration(found)
    for panel, value in ((upper, lambda t: t.accuracy), (lower, lambda t: t.validation.gain.value)):
        for reader in ("mean", "pca"):
            (line,) = lines(panel, reader)
            expected = [(t.block, value(t)) for t in found.more.trials if t.reader == reader]
            np.testing.assert_allclose(line.get_xydata(), expected)
        (mark,) = lines(panel, "chosen: alpha 2.5, by pca")
        np.testing.assert_allclose(mark.get_xydata(), [(2, value(found.more.trial))])
    ends = np.concatenate([segment[:, 1] for c in lower.collections for segment in c.get_segments()])
    assert (ends.min(), ends.max()) == pytest.approx((0, 0.7))


def test_where_nothing_was_chosen_nothing_is_ringed():
    upper, lower = plot.calibration(calibrated(), sign=-1)
    assert legend(lower) == ["mean", "pca"]
    assert "less" in upper.get_title()
    with pytest.raises(ValueError, match=r"got 0$"):
        plot.calibration(calibrated(), sign=0)


# every picture, whatever the names

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


def test_numbers_of_many_blocks_do_not_touch():
    check_legible(plot.cosines(repe.ConceptVector.random(vector(36))).figure)


def test_letters_that_no_font_has_are_shown_as_such():
    assert plot_text.drawable("a漢\U000e0001$é") in ("a�$é", "a漢$é")
    with plt.rc_context({"font.family": ["DejaVu Sans Mono", "sans-serif"]}):
        assert plot_text.drawable("a\U0010fffd") == "a�"
        assert plot_text.fonts()[:2] == ["DejaVu Sans Mono", "sans-serif"]
