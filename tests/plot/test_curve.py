"""Pictures of what steering does: what is drawn are the numbers of the curve and of the calibration."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from repe import plot
from repe.measuring.curve import Baseline
from repe.measuring.fits import bell, saturating
from tests.drawn import (
    ALPHAS,
    BARE,
    THEMES,
    calibrated,
    check_legible,
    curve,
    divergence,
    legend,
    lines,
    names,
    overlap,
    ring,
    skills,
    truths,
    written,
)

SIZES = [(6.4, 4.8), (6.4, 4.0), (4.0, 3.2), (10.0, 8.0)]


def shaded(ax):
    return [patch for patch in ax.patches if "loses" in patch.get_label()]


def levels(ax):
    """Where horizontal lines are, but for marks."""
    return [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]


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
            expected = [(t.blocks[0], value(t)) for t in found.more.trials if t.reader == reader]
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
