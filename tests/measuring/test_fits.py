"""The fits: planted shapes are found again, intervals cover the truth, and independent oracles agree."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

import repe.measuring.fits
from repe.measuring.fits import (
    Fit,
    bell,
    fit_bell,
    fit_growth,
    fit_kl,
    fit_line,
    fit_normality,
    fit_quadratics,
    fit_tanh,
    saturating,
)
from repe.measuring.intervals import RESAMPLES, TAIL, Estimate, Measured

GRID = np.linspace(-4, 4, 17)
seeds = st.integers(0, 2**16)


def groups_of(generator: np.random.Generator, clusters: int) -> list[str]:
    """Clusters of 2 to a dozen items or so."""
    sizes = 1 + generator.geometric(0.25, clusters)
    return [f"g{cluster}" for cluster in np.repeat(np.arange(clusters), sizes)]


def shared(generator: np.random.Generator, groups: list[str], draw) -> tuple[np.ndarray, np.ndarray]:
    """What items share with their cluster, and what they have of their own, both drawn alike."""
    names, numbers = np.unique(groups, return_inverse=True)
    return draw(generator, len(names))[numbers], draw(generator, len(groups))


def exponential(generator, size):
    return generator.exponential(size=size) - 1


def lognormal(generator, size):
    return np.exp(0.5 * generator.normal(size=size) - 0.125)


def uniform(generator, size):
    return generator.uniform(size=size)


def noisy(mean, items: int = 40, noise: float = 0.1, seed: int = 0, alphas=GRID, clusters: int = 12) -> Measured:
    """Items around a mean curve, which is their mean exactly."""
    generator = np.random.default_rng(seed)
    offsets = noise * generator.normal(size=(len(alphas), items))
    offsets -= offsets.mean(1, keepdims=True)
    groups = [f"g{i}" for i in generator.integers(clusters, size=items)]
    return Measured(alphas, np.asarray(mean)[:, None] + offsets, groups)


# intervals


class Coverage:
    """Skewed items in clusters of unequal size that share half of what moves them, with known means."""

    ALPHAS = np.linspace(-0.5, 0.5, 9)
    SLOPE, BEHAVIOUR, FALL, RIGHT = 1.0, 1 - 2 * 0.25, 0.3, 0.6

    def __init__(self, generator: np.random.Generator, clusters: int):
        alphas, self.groups = self.ALPHAS[:, None], groups_of(generator, clusters)
        slope = self.SLOPE + 0.7 * sum(shared(generator, self.groups, exponential))
        self.difference = -0.5 + slope * alphas
        self.behaviour = 1 - 2 * np.prod(shared(generator, self.groups, uniform), axis=0) + 0 * alphas
        fall = self.FALL * np.prod(shared(generator, self.groups, lognormal), axis=0)
        right = 0.2 + 0.4 * sum(shared(generator, self.groups, uniform))
        self.right = right * (1 - fall * alphas**2)

    def estimates(self) -> list[Estimate]:
        difference, behaviour, right = (
            Measured(self.ALPHAS, v, self.groups) for v in (self.difference, self.behaviour, self.right)
        )
        c2 = fit_quadratics(right, right)[0]["c2"]
        return [fit_line(difference)["slope"], behaviour.estimates()[0], c2, right.loss.estimates()[-1]]

    TRUTH = (SLOPE, BEHAVIOUR, -RIGHT * FALL, FALL * 0.25)


def test_intervals_cover_the_truth():
    inside = np.zeros((1000, 4))
    for repeat in range(1000):
        world = Coverage(np.random.default_rng([8, repeat]), clusters=(12, 20, 36, 60)[repeat % 4])
        estimates = world.estimates()
        inside[repeat] = [e.low <= truth <= e.high for e, truth in zip(estimates, Coverage.TRUTH, strict=True)]
    covered = inside.mean(0)
    assert (covered >= 0.92).all(), covered
    assert (covered <= 0.98).all(), covered


def test_the_resampling_is_that_of_a_slow_loop_over_clusters():
    generator = np.random.default_rng(3)
    groups = groups_of(generator, 9)
    values = generator.exponential(size=len(groups))
    clusters = [values[np.array(groups) == name] for name in np.unique(groups)]
    centre = values.mean()
    roots = []
    for counts in np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), RESAMPLES):
        drawn = [cluster for cluster, count in zip(clusters, counts, strict=True) for _ in range(count)]
        items = np.concatenate(drawn)
        variance = 9 / 8 * sum((cluster - items.mean()).sum() ** 2 for cluster in drawn) / len(items) ** 2
        roots.append((items.mean() - centre) / np.sqrt(variance))
    without = [np.concatenate(clusters[:i] + clusters[i + 1 :]).mean() for i in range(9)]
    error = np.sqrt(sum((mean - centre) ** 2 for mean in without))
    (estimate,) = Measured(np.zeros(1), values[None], groups, seed=5).estimates()
    low, high = centre - error * np.sort(roots)[-TAIL], centre - error * np.sort(roots)[TAIL - 1]
    np.testing.assert_allclose([estimate.value, estimate.low, estimate.high], [centre, low, high])


@given(seeds, st.floats(-5, 5), st.floats(0.1, 10))
def test_intervals_move_and_stretch_with_what_was_measured(seed, shift, factor):
    measured = noisy(np.zeros(3), seed=seed, alphas=np.array([-1.0, 0.0, 1.0]))
    for plain, moved, turned in zip(
        measured.estimates(),
        measured.estimates(shift + factor * measured.values),
        measured.estimates(-measured.values),
        strict=True,
    ):
        ends = [plain.value, plain.low, plain.high]
        np.testing.assert_allclose([moved.value, moved.low, moved.high], shift + factor * np.array(ends), atol=1e-9)
        np.testing.assert_allclose([-turned.value, -turned.high, -turned.low], ends, atol=1e-9)


def test_the_order_of_the_items_says_nothing_and_the_clusters_do():
    measured = noisy(np.zeros(1), alphas=np.zeros(1))
    order = np.random.default_rng(1).permutation(40)
    shuffled = replace(measured, values=measured.values[:, order], groups=[measured.groups[i] for i in order])
    np.testing.assert_allclose(
        [measured.estimates()[0].low, measured.estimates()[0].high],
        [shuffled.estimates()[0].low, shuffled.estimates()[0].high],
        rtol=1e-9,
    )
    thrice = Measured(np.zeros(1), np.repeat(measured.values, 3, axis=1), [f"c{i // 3:02}" for i in range(120)])
    alone = replace(measured, groups=None).estimates()[0]
    np.testing.assert_allclose([thrice.estimates()[0].low, thrice.estimates()[0].high], [alone.low, alone.high])
    independent = replace(thrice, groups=None).estimates()[0]
    assert independent.high - independent.low < 0.7 * (alone.high - alone.low)


def test_an_item_without_a_group_is_a_cluster_of_its_own():
    measured = noisy(np.zeros(1), alphas=np.zeros(1))
    alone, unnamed = replace(measured, groups=None), replace(measured, groups=[""] * 40)
    assert alone.estimates()[0].high == pytest.approx(unnamed.estimates()[0].high)


def test_what_does_not_vary_has_no_width_and_one_cluster_an_infinite_one():
    same = Measured(np.zeros(1), np.full((1, 8), 0.3), list("aabbccdd")).estimates()[0]
    np.testing.assert_allclose([same.value, same.low, same.high], 0.3)
    assert Measured(np.zeros(1), np.eye(1, 8), ["a"] * 8).estimates()[0] == Estimate(0.125, -np.inf, np.inf)
    few = Measured(np.zeros(1), np.eye(1, 8), list("aaabbccc")).estimates()[0]
    assert (few.low, few.high) == (-np.inf, np.inf)


def test_one_odd_cluster_of_many_has_a_finite_interval():
    odd = Measured(np.zeros(1), np.eye(1, 100)).estimates()[0]
    assert odd.value == 0.01
    assert 0.03 < odd.high < 0.1  # Clopper and Pearson: 0.054
    zero = Measured(np.zeros(1), 1e-200 * np.eye(1, 100)).estimates()[0]
    assert np.isfinite([zero.low, zero.high]).all()


def test_the_same_seed_gives_the_same_interval():
    measured = noisy(np.zeros(2), alphas=np.array([0.0, 1.0]))
    assert measured.estimates() == replace(measured).estimates()
    assert measured.estimates() != replace(measured, seed=1).estimates()


def test_a_loss_is_that_of_the_means_and_its_spread_that_of_the_ratio():
    generator = np.random.default_rng(0)
    values = generator.uniform(0.2, 1, size=(3, 400))
    loss = Measured(np.array([-1.0, 0.0, 1.0]), values).loss
    np.testing.assert_allclose(loss.mean, 1 - values.mean(1) / values[1].mean(), atol=1e-12)
    np.testing.assert_allclose(loss.at_zero, 0, atol=1e-12)
    draws = generator.integers(400, size=(4000, 400))
    resampled = 1 - values[2][draws].mean(1) / values[1][draws].mean(1)
    assert loss.values[2].std() / 20 == pytest.approx(resampled.std(), rel=0.06)


# the line


def test_the_line_of_every_item_is_polyfits():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(17, 30)) + generator.normal(1, 1, size=30) * GRID[:, None]
    near = np.abs(GRID) <= 1.5
    slopes, intercepts = np.polyfit(GRID[near], values[near], 1)
    fit = fit_line(Measured(GRID, values), reach=1.5)
    assert fit["slope"].value == pytest.approx(slopes.mean())
    assert fit["intercept"].value == pytest.approx(intercepts.mean())
    assert fit.facts["wrong_sign"].value == (slopes < 0).mean()
    correlations = [np.corrcoef(GRID[near], row)[0, 1] ** 2 for row in values[near].T]
    np.testing.assert_allclose(fit.facts["items_r2"], np.quantile(correlations, [0.25, 0.5, 0.75]))
    assert fit.r2 == pytest.approx(np.corrcoef(GRID[near], values[near].mean(1))[0, 1] ** 2)
    assert fit.window == (-1.5, 1.5)


def test_a_planted_line_is_found_and_so_is_where_it_is_left():
    saturated = 0.3 + 2 * np.clip(GRID, -2.5, 3)
    fit = fit_line(noisy(saturated, noise=1e-9))
    assert (fit["slope"].value, fit["intercept"].value) == (pytest.approx(2), pytest.approx(0.3))
    assert fit.r2 == pytest.approx(1)
    assert (fit.facts["leaves_the_line_below"], fit.facts["leaves_the_line_above"]) == (-3.0, 3.5)
    straight = fit_line(noisy(2 * GRID + 0.3, noise=1e-9))
    assert (straight.facts["leaves_the_line_below"], straight.facts["leaves_the_line_above"]) == (None, None)


def test_items_that_do_not_move_have_no_r2():
    assert fit_line(Measured(GRID, np.ones((17, 5)))).facts["items_r2"] is None
    assert fit_line(Measured(GRID, np.ones((17, 5)))).r2 is None


# tanh


def test_planted_tanh_is_found_and_beats_a_line():
    fit = fit_tanh(noisy(np.tanh(0.8 * GRID - 0.3)))
    assert (fit["a"].value, fit["b"].value) == (pytest.approx(0.8), pytest.approx(-0.3))
    assert fit.r2 == pytest.approx(1)
    assert fit.aic < fit.facts["line_aic"] < fit.facts["constant_aic"]
    assert fit.facts["line_r2"] == pytest.approx(np.corrcoef(GRID, np.tanh(0.8 * GRID - 0.3))[0, 1] ** 2)
    assert fit["a"].low < 0.8 < fit["a"].high


def test_a_planted_line_beats_tanh():
    fit = fit_tanh(noisy(0.2 * GRID + 0.01 * np.sin(99 * GRID)))
    assert fit.facts["line_aic"] < fit.aic


def test_akaikes_criterion_is_that_of_normal_errors():
    mean = np.random.default_rng(2).uniform(-0.5, 0.5, size=17)
    residuals = mean - mean.mean()
    likelihood = stats.norm.logpdf(residuals, scale=residuals.std()).sum()
    fit = fit_tanh(noisy(mean))
    constant = 17 * (np.log(2 * np.pi) + 1)  # the same in every criterion
    assert fit.facts["constant_aic"] + constant == pytest.approx(2 * 2 - 2 * likelihood)


def test_parameters_move_with_the_mean_as_refits_do():
    mean = np.tanh(0.6 * GRID + 0.4) + 0.1 * np.cos(5 * GRID)

    def refit(y):
        return optimize.curve_fit(saturating, GRID, y, p0=(0.6, 0.4), xtol=1e-14, ftol=1e-14)[0]

    expected = [(refit(mean + 1e-3 * e) - refit(mean - 1e-3 * e)) / 2e-3 for e in np.eye(17)]
    found = repe.measuring.fits._sensitivity(saturating, GRID, mean, refit(mean))
    np.testing.assert_allclose(found, np.transpose(expected), atol=1e-4)


def test_intervals_of_a_curve_are_as_wide_as_a_bootstrap_of_refits_has_them():
    measured = noisy(np.tanh(0.6 * GRID + 0.4), items=400, noise=0.5, clusters=100)
    generator = np.random.default_rng(0)
    members = [np.flatnonzero(np.array(measured.groups) == name) for name in np.unique(measured.groups)]
    refits = []
    for _ in range(300):
        drawn = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        refits.append(optimize.curve_fit(saturating, GRID, measured.values[:, drawn].mean(1), p0=(0.6, 0.4))[0])
    fit = fit_tanh(measured)
    widths = [fit[name].high - fit[name].low for name in ("a", "b")]
    np.testing.assert_allclose(widths, 2 * 1.96 * np.std(refits, axis=0), rtol=0.15)


def test_oversteering_is_found_where_behaviour_comes_back():
    there_and_back = np.where(np.abs(GRID) <= 2, GRID, np.sign(GRID) * (4 - np.abs(GRID))) / 3
    facts = fit_tanh(noisy(there_and_back, noise=1e-3)).facts
    assert (facts["oversteered_below"], facts["oversteered_above"]) == (-2.5, 2.5)
    mirrored = fit_tanh(noisy(-there_and_back, noise=1e-3)).facts
    assert (mirrored["oversteered_below"], mirrored["oversteered_above"]) == (-2.5, 2.5)
    one_sided = fit_tanh(noisy(np.maximum(there_and_back, GRID / 5), noise=1e-3)).facts
    assert (one_sided["oversteered_below"], one_sided["oversteered_above"]) == (-3.0, None)
    drowned = fit_tanh(noisy(there_and_back, noise=50.0)).facts
    assert (drowned["oversteered_below"], drowned["oversteered_above"]) == (None, None)


# quadratics


def test_the_quadratic_is_polyfits_on_the_largest_cheap_window():
    mean = 0.8 - 0.02 * GRID**2 + 0.01 * GRID
    measured = noisy(mean)
    logarithm = replace(measured, values=np.log(np.abs(measured.values)))
    fit, log_fit = fit_quadratics(measured, logarithm)
    width = 1.5  # at 2, 0.06 is lost of 0.8 on one side, at -2, 0.1
    assert (1 - mean / 0.8)[GRID == -1.5] < 0.1 < (1 - mean / 0.8)[GRID == -2]
    assert fit.window == log_fit.window == (-width, width)
    near = np.abs(GRID) <= width
    for found, values in ((fit, measured.values), (log_fit, logarithm.values)):
        c2, c1, c0 = np.polyfit(GRID[near], values[near].mean(1), 2)
        np.testing.assert_allclose([found["c0"].value, found["c1"].value, found["c2"].value], [c0, c1, c2], rtol=1e-6)
    assert fit.facts["quadratic_first_of_all"] == (abs(0.01) * width <= 0.02 * width**2 / 2) is True
    steep = fit_quadratics(noisy(0.8 - 0.02 * GRID**2 + 0.02 * GRID), logarithm)[0]
    assert steep.facts["quadratic_first_of_all"] is False


def test_the_window_is_symmetric_on_a_lopsided_grid_and_may_be_too_small():
    alphas = np.array([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0])
    flat = noisy(np.full(7, 0.8), alphas=alphas, noise=0)
    assert fit_quadratics(flat, flat)[0].window == (-1.0, 1.0)
    narrow = noisy(0.8 - 0.1 * GRID**2, noise=0)
    for fit in fit_quadratics(narrow, narrow):
        assert fit.reason == "3 alphas alike on both sides of 0 where at most 10% is lost, where a fit needs at least 5"
        assert not fit.estimates
    one_sided = noisy(np.full(7, 0.8), alphas=np.arange(7.0))
    assert fit_quadratics(one_sided, one_sided)[0].reason.startswith("1 alphas alike on both sides")


# the bell


@pytest.mark.parametrize(("a", "b", "floor"), [(0.2, 1.0, 0.25), (0.01, 3.0, 0.5), (1.5, 0.1, 0.0), (0.3, 0.02, 0.25)])
def test_a_planted_bell_is_found(a, b, floor):
    mean = bell(GRID, a, b, floor=floor)
    fit = fit_bell(noisy(mean, noise=0.01), floor)
    assert (fit["a"].value, fit["b"].value) == (pytest.approx(a, rel=1e-4), pytest.approx(b, rel=1e-4))
    assert fit.r2 == pytest.approx(1)
    assert fit.facts["predicted_at_the_ends"] == pytest.approx(fit.facts["measured_at_the_ends"])
    assert fit["b"].low < b < fit["b"].high


def test_the_bell_is_the_papers():
    assert bell(np.zeros(1), 0.5, 2.0, floor=0.25) == pytest.approx(0.25 + 0.75 / 1.5)
    assert bell(np.full(1, 3.0), 0.5, 2.0, floor=0.25) == pytest.approx(0.25 + 0.75 / (1.5 + 0.5 * 4 * 9 / 2))
    assert bell(np.full(1, 1e9), 0.5, 2.0, floor=0.25) == pytest.approx(0.25)


def test_a_bell_that_fits_badly_says_so():
    lopsided = 0.25 + 0.6 / (1 + np.exp(GRID))
    fit = fit_bell(noisy(lopsided), 0.25)
    assert fit.r2 is not None
    assert fit.r2 < 0.2
    predicted, measured = fit.facts["predicted_at_the_ends"], fit.facts["measured_at_the_ends"]
    assert measured == pytest.approx((lopsided[0], lopsided[-1]))
    assert abs(predicted[0] - measured[0]) > 0.1


def test_no_bell_below_guessing_nor_where_nothing_falls():
    assert fit_bell(noisy(np.full(17, 0.2)), 0.25).reason == (
        "P(right) at alpha 0 is 0.2, not above 0.25, that of guessing"
    )
    rising = fit_bell(noisy(0.5 + 0.02 * GRID**2), 0.25)
    assert rising.reason.startswith("P(right) does not fall with |alpha|")
    assert not rising.estimates


# costs


def test_the_power_of_the_kl_is_two_whatever_is_odd_in_it():
    texts = np.random.default_rng(0).uniform(0.5, 2, size=20)
    kl = 1e-3 * texts * (GRID**2 * (1 + 0.2 * GRID))[:, None]
    fit = fit_kl(Measured(GRID, kl))
    assert fit["power"].value == pytest.approx(2, abs=1e-9)
    assert fit["constant"].value == pytest.approx(np.log(1e-3 * texts.mean()))
    assert fit.window == (0.5, 2.5)  # above, more than 1e-2 nats
    assert fit_kl(Measured(GRID, kl / 1e6)).reason == (
        "0 alphas with a mean KL between 1e-05 and 0.01 nats, signs taken together, where a fit needs at least 3"
    )


def test_the_powers_interval_knows_the_texts():
    generator = np.random.default_rng(0)
    powers = 2 + 0.3 * generator.normal(size=(1, 60))
    kl = 1e-3 * np.abs(GRID[:, None]) ** powers
    fit = fit_kl(Measured(GRID, kl))
    inside = kl[(GRID > 0) & (kl.mean(1) < 1e-2)]
    x = np.log(GRID[(GRID > 0) & (kl.mean(1) < 1e-2)])
    draws = generator.integers(60, size=(2000, 60))
    slopes = np.polyfit(x, np.log(inside[:, draws].mean(2)), 1)[0]
    assert fit["power"].high - fit["power"].low == pytest.approx(2 * 1.96 * slopes.std(), rel=0.2)


def test_growth_is_the_slope_through_zero_and_says_how_straight_it_is():
    texts = np.random.default_rng(0).uniform(0.5, 2, size=20)
    fit = fit_growth("change", Measured(GRID, texts * np.abs(GRID)[:, None]))
    assert fit["growth"].value == pytest.approx(texts.mean())
    assert fit.r2 == pytest.approx(1)
    curved = fit_growth("change", Measured(GRID, texts * GRID[:, None] ** 2), reach=4)
    assert curved.r2 is not None
    assert curved.r2 < 0.95
    x = np.abs(GRID)
    assert curved["growth"].value == pytest.approx(texts.mean() * (x**3).sum() / (x**2).sum())


# normality


def test_normal_differences_are_normal_and_skewed_ones_are_not():
    generator = np.random.default_rng(0)
    slopes = generator.normal(size=200)
    start = generator.normal(size=200)
    fit = fit_normality(Measured(GRID, start + slopes * GRID[:, None]))
    assert fit["growth"].value == pytest.approx(slopes.std(ddof=1))
    assert fit.r2 == pytest.approx(1)
    assert fit.facts["alphas"] == tuple(GRID[GRID != 0])
    np.testing.assert_allclose(fit.facts["sd"], np.abs(GRID[GRID != 0]) * slopes.std(ddof=1))
    np.testing.assert_allclose(fit.facts["skewness"], np.sign(GRID[GRID != 0]) * stats.skew(slopes))
    np.testing.assert_allclose(fit.facts["kurtosis"], stats.kurtosis(slopes))
    np.testing.assert_allclose(fit.facts["p"], stats.normaltest(slopes).pvalue)
    skewed = fit_normality(Measured(GRID, generator.exponential(size=200) * GRID[:, None]))
    assert max(skewed.facts["p"]) < 1e-6 < min(fit.facts["p"])


def test_the_spreads_interval_is_that_of_resampled_spreads():
    slopes = np.random.default_rng(0).normal(size=200)
    fit = fit_normality(Measured(GRID, slopes * GRID[:, None]))
    draws = np.random.default_rng(1).integers(200, size=(3000, 200))
    expected = 2 * 1.96 * slopes[draws].std(1).std()
    assert fit["growth"].high - fit["growth"].low == pytest.approx(expected, rel=0.1)


def test_few_items_are_tested_another_way_and_a_common_shift_has_no_spread():
    values = np.random.default_rng(0).normal(size=8) * GRID[:, None]
    assert fit_normality(Measured(GRID, values)).facts["p"][0] == pytest.approx(stats.shapiro(values[0]).pvalue)
    shifted = fit_normality(Measured(GRID, values[0] + 0.1 * GRID[:, None]))
    assert shifted.facts["alphas"] == ()
    assert shifted["growth"] == Estimate(0, 0, 0)
    assert fit_normality(Measured(GRID, values[:, :2])).reason == "2 items, where a spread needs at least 3"


# in general


@pytest.mark.parametrize(
    ("fit", "needed"),
    [
        (lambda m: fit_line(m), "2 alphas in |alpha| <= 2, where a fit needs at least 3"),
        (lambda m: fit_growth("x", m), "2 alphas in |alpha| <= 2, where a fit needs at least 3"),
        (lambda m: fit_tanh(m), "2 alphas on the grid, where a fit needs at least 4"),
        (lambda m: fit_bell(m, 0.25), "2 alphas on the grid, where a fit needs at least 4"),
        (lambda m: fit_normality(m), "2 alphas in |alpha| <= 2, where a fit needs at least 3"),
    ],
)
def test_too_few_alphas_are_no_fit_with_a_reason(fit, needed):
    got = fit(Measured(np.array([0.0, 1.0]), np.random.default_rng(0).uniform(0.5, 1, size=(2, 8))))
    assert got.reason == needed
    assert not got.estimates
    assert needed in str(got)


def test_a_fit_prints_what_it_found():
    text = str(Fit("y = a x", {"a": Estimate(1, 0.5, 2)}, 0.9, -3.0, (-1.0, 1.0), {"so_many": 3, "none_of": None}))
    assert text.splitlines() == [
        "y = a x",
        "    a 1 [0.5, 2]; R2 0.9000; AIC -3.0; alpha from -1 to 1",
        "    so many: 3",
        "    none of: none",
    ]
    assert re.search(r"sd: \d\.\d+ to \d", str(fit_normality(noisy(GRID, noise=1))))
