"""What a trade-off curve says in numbers: shapes fitted over the strength, each with intervals and R2.

The parameters of a fit are means over items, or linearised in them: see `repe.measuring.intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
from scipy import optimize, stats

from repe.measuring.intervals import Array, Estimate, Measured

DEPARTURE = 0.1  # of a line's gain: where what was measured has left the line
NEAR_LOSS = 0.1  # of helpfulness: how far the window of the quadratic reaches
KL_WINDOW = (1e-5, 1e-2)  # nats: above rounding, below saturation
NORMALTEST_ITEMS = 20  # the fewest that scipy's normaltest is to be trusted with
ROUNDING = 1e-9  # relative, and of alphas absolute
FLAT = 1e-6  # of a bell over the grid
PRECISELY = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}


@dataclass(frozen=True)
class Fit:
    """A formula fitted to what was measured, or the reason why it could not be.

    Attributes:
        formula: what was fitted, and to what.
        estimates: its parameters by name; `fit[name]` is short for them. Empty where nothing could be fitted.
        r2: share of the mean curve's variance that the formula explains; None where the curve has none.
        aic: Akaike's criterion for the mean curve, every alpha counted alike; None where nothing is compared.
        window: the least and the largest alpha that were fitted.
        facts: what else was found, by name.
        reason: why nothing could be fitted; empty where it could.
    """

    formula: str
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    r2: float | None = None
    aic: float | None = None
    window: tuple[float, float] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def __str__(self) -> str:
        said = [f"{name} {estimate}" for name, estimate in self.estimates.items()]
        said += [] if self.r2 is None else [f"R2 {self.r2:.4f}"]
        said += [] if self.aic is None else [f"AIC {self.aic:.1f}"]
        said += [] if self.window is None else [f"alpha from {self.window[0]:g} to {self.window[1]:g}"]
        said += [self.reason] if self.reason else []
        facts = [f"    {name.replace('_', ' ')}: {_shown(fact)}" for name, fact in self.facts.items()]
        return "\n".join([self.formula, f"    {'; '.join(said)}", *facts])


@dataclass(frozen=True)
class Fits:
    """Every fit of a curve; print it for a report.

    Attributes:
        line: the logit difference of the behaviour items near alpha 0.
        behaviour: tanh over the whole grid.
        helpfulness, log_helpfulness: quadratics near alpha 0, of P(right) and of its logarithm.
        bell: helpfulness over the whole grid.
        kl: the power of |alpha| that the KL divergence grows with.
        change: growth of the last hidden state's change.
        normality: spread of the helpfulness items' logit differences.
        steerability: the concept's slope against those of random directions.
    """

    line: Fit
    behaviour: Fit
    helpfulness: Fit
    log_helpfulness: Fit
    bell: Fit
    kl: Fit
    change: Fit
    normality: Fit
    steerability: Fit

    def __str__(self) -> str:
        return "\n".join(str(getattr(self, f.name)) for f in fields(self))


def fit_all(measured: Mapping[str, Measured], floor: float, *, reach: float = 2.0, slopes: Array | None = None) -> Fits:
    """Fit everything that was measured.

    Args:
        measured: by the names that a `TradeoffCurve` gives them; those of `kl`, `change` and the random directions may
            be missing.
        floor: the P(right) of guessing.
        reach: the largest |alpha| that counts as near 0, for all that is linear there.
        slopes: those of random directions that were forecast; None where none were.
    """
    line, growth = fit_line(measured["difference"], reach=reach), "norm of the last hidden state's change"
    kl, change, steerability = (Fit(what, reason="not measured") for what in ("KL divergence", growth, "control"))
    if "kl" in measured:
        kl = fit_kl(measured["kl"])
    if "change" in measured:
        change = fit_growth(growth, measured["change"], reach=reach)
    if "random_difference" in measured:
        steerability = fit_steerability(line, measured["random_difference"], measured["random_helpfulness"], slopes)
    return Fits(
        line,
        fit_tanh(measured["behaviour"]),
        *fit_quadratics(measured["helpfulness"], measured["log_helpfulness"]),
        fit_bell(measured["helpfulness"], floor),
        kl,
        change,
        fit_normality(measured["helpful_difference"], reach=reach),
        steerability,
    )


def fit_line(difference: Measured, *, reach: float = 2.0) -> Fit:
    """Fit the logit difference as a line in alpha, item by item, where |alpha| <= reach.

    Its facts: the quartiles of the items' R2, the share of items whose slope is negative, and on each side the first
    alpha at which the mean's gain over alpha 0 is more than a tenth off the line's; None where there is none.
    """
    formula, near = "logit difference = intercept + slope alpha, item by item", difference.near(reach)
    if reason := _too_few(near, 3, f"in |alpha| <= {reach:g}"):
        return Fit(formula, reason=reason)
    design = near.alphas[:, None] ** np.arange(2)
    parameters = np.linalg.lstsq(design, near.values, rcond=None)[0]
    total = ((near.values - near.values.mean(0)) ** 2).sum(0)
    explained = 1 - ((near.values - design @ parameters) ** 2).sum(0)[total > 0] / total[total > 0]
    alphas, line = difference.alphas, parameters[1].mean() * difference.alphas
    gone = alphas[np.abs(difference.mean - difference.at_zero.mean() - line) > DEPARTURE * np.abs(line)]
    facts = {
        "items_r2": tuple(np.quantile(explained, [0.25, 0.5, 0.75]).tolist()) if explained.size else None,
        "wrong_sign": near.estimates(parameters[1:] < 0)[0],
        "leaves_the_line_below": max(gone[gone < 0].tolist(), default=None),
        "leaves_the_line_above": min(gone[gone > 0].tolist(), default=None),
    }
    return _linear(formula, ("intercept", "slope"), design, near, **facts)


def fit_tanh(behaviour: Measured) -> Fit:
    """Fit mean behaviour, in [-1, 1], as tanh(a alpha + b) over the whole grid.

    Its facts: R2 and AIC of a line, AIC of a constant, and on each side where over-steering begins: the first alpha
    beyond the furthest mean at which it has come back by more than the interval of the difference; None for nowhere.
    """
    formula, alphas, mean = "behaviour = tanh(a alpha + b)", behaviour.alphas, behaviour.mean
    if reason := _too_few(behaviour, 4):
        return Fit(formula, reason=reason)
    line = np.polynomial.Polynomial.fit(alphas, mean, 1)(alphas)
    start = np.polyfit(alphas, np.arctanh(np.clip(mean, -0.99, 0.99)), 1)
    solution = optimize.least_squares(lambda p: saturating(alphas, *p) - mean, start, **PRECISELY).x
    facts = {
        "line_r2": _r2(mean, line),
        "line_aic": _aic(mean, line, 2),
        "constant_aic": _aic(mean, np.full_like(mean, mean.mean()), 1),
        "oversteered_below": _comes_back(behaviour, -1, -solution[0]),
        "oversteered_above": _comes_back(behaviour, +1, solution[0]),
    }
    return _curved(formula, ("a", "b"), saturating, behaviour, solution, **facts)


def fit_quadratics(probability: Measured, log_probability: Measured) -> tuple[Fit, Fit]:
    """Fit mean P(right) and mean log P(right) near 0 as c0 + c1 alpha + c2 alpha^2.

    Near is the largest symmetric window in which mean P loses no more than a tenth of its value at 0. Their fact:
    whether `|c1| w <= |c2| w^2 / 2` at the window's half-width w, so that the fall is quadratic first of all.
    """
    fits, sizes, loss = [], np.abs(probability.alphas).round(9), probability.loss.mean
    window = (sizes <= min(sizes[0], sizes[-1])) & (sizes < sizes[loss > NEAR_LOSS].min(initial=np.inf))
    for name, measured in (("P(right)", probability.at(window)), ("log P(right)", log_probability.at(window))):
        formula, width = f"{name} = c0 + c1 alpha + c2 alpha^2", measured.alphas.max()
        if reason := _too_few(measured, 5, f"alike on both sides of 0 where at most {NEAR_LOSS:.0%} is lost"):
            fits.append(Fit(formula, reason=reason))
            continue
        fit = _linear(formula, ("c0", "c1", "c2"), measured.alphas[:, None] ** np.arange(3), measured)
        quadratic = abs(fit["c1"].value) * width <= abs(fit["c2"].value) * width**2 / 2
        fits.append(replace(fit, facts={"quadratic_first_of_all": bool(quadratic)}))
    return fits[0], fits[1]


def fit_bell(probability: Measured, floor: float) -> Fit:
    """Fit mean P(right) over the whole grid as the `bell` of Wolf et al. (arXiv 2401.16332), a > 0 and b >= 0.

    Its facts: what the bell says at the grid's two ends, and what was measured there. The floor is that of guessing.
    """
    formula = "P(right) = 1/N + (1 - 1/N) / (1 + a + a b^2 alpha^2 / 2)"
    alphas, mean, top = probability.alphas, probability.mean, probability.at_zero.mean()
    if reason := _too_few(probability, 4):
        return Fit(formula, reason=reason)
    if top <= floor:
        return Fit(formula, reason=f"P(right) at alpha 0 is {top:.3g}, not above {floor:.3g}, that of guessing")
    shape = partial(bell, floor=floor)
    starts = [((1 - floor) / (top - floor) - 1 + ROUNDING, b) for b in np.geomspace(0.01, 100, 21)]
    start = min(starts, key=lambda p: ((shape(alphas, *p) - mean) ** 2).sum())
    solution = optimize.least_squares(lambda p: shape(alphas, *p) - mean, start, bounds=(0, np.inf), **PRECISELY).x
    fitted = shape(alphas, *solution)
    ends = {
        "predicted_at_the_ends": tuple(fitted[[0, -1]].tolist()),
        "measured_at_the_ends": tuple(mean[[0, -1]].tolist()),
    }
    if min(solution) * np.abs(alphas).max() < FLAT:
        reason = "P(right) does not fall with |alpha|, so that a or b is 0 and the other anything"
        return Fit(formula, r2=_r2(mean, fitted), window=_ends(alphas), facts=ends, reason=reason)
    return _curved(formula, ("a", "b"), shape, probability, solution, **ends)


def fit_kl(kl: Measured) -> Fit:
    """Fit the power of |alpha| that the mean KL divergence, in nats a token, grows with: 2 where it is quadratic.

    Both signs are averaged at each |alpha|; means between 1e-5 and 1e-2 nats count, and there must be three.

    Args:
        kl: values (alphas, texts), such as the `kl` of `Costs`.

    Example:
        >>> alphas = np.array([-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2])
        >>> print(fit_kl(Measured(alphas, 0.1 * alphas[:, None] ** 2 * np.ones(5)))["power"])
        2 [2, 2]
    """
    sizes, at = np.unique(np.abs(kl.alphas).round(9), return_inverse=True)
    both = replace(kl, alphas=sizes, values=np.stack([kl.values[at == i].mean(0) for i in range(len(sizes))]))
    low, high = KL_WINDOW
    inside = both.at((both.mean > low) & (both.mean < high) & (sizes > 0))
    formula = "log KL = constant + power log |alpha|"
    if reason := _too_few(inside, 3, f"with a mean KL between {low:g} and {high:g} nats, signs taken together"):
        return Fit(formula, reason=reason)
    design, mean = np.log(inside.alphas)[:, None] ** np.arange(2), inside.mean[:, None]
    linearised = replace(inside, values=np.log(mean) + inside.values / mean - 1)
    return _linear(formula, ("constant", "power"), design, linearised)


def fit_growth(what: str, measured: Measured, *, reach: float = 2.0, **facts: Any) -> Fit:
    """Fit what was measured, called `what` in the formula, as a line in |alpha| through 0, where |alpha| <= reach."""
    formula, near = f"{what} = growth |alpha|", measured.near(reach)
    if reason := _too_few(near, 3, f"in |alpha| <= {reach:g}"):
        return Fit(formula, facts=facts, reason=reason)
    return _linear(formula, ("growth",), np.abs(near.alphas)[:, None], near, **facts)


def fit_normality(difference: Measured, *, reach: float = 2.0) -> Fit:
    """Fit the spread over items of the logit difference's change from alpha 0, as a line in |alpha| through 0.

    Its facts, an entry for each of `alphas` where anything changed: `sd`, `skewness`, excess `kurtosis`, and `p` of a
    test of normality, D'Agostino and Pearson's, or Shapiro and Wilk's below 20 items.
    """
    what = "sd over items of the logit difference's change"
    if (items := difference.values.shape[1]) < 3:
        return Fit(what, reason=f"{items} items, where a spread needs at least 3")
    moved = difference.gain.values
    mean, sd = moved.mean(1, keepdims=True), moved.std(1, ddof=1, keepdims=True)
    spread = (sd > ROUNDING * np.abs(moved).max(1, keepdims=True))[:, 0]
    standard = (moved[spread] - mean[spread]) / sd[spread]
    test = stats.normaltest if items >= NORMALTEST_ITEMS else stats.shapiro
    facts = {
        "alphas": tuple(difference.alphas[spread].tolist()),
        "sd": tuple(sd[spread, 0].tolist()),
        "skewness": tuple(stats.skew(standard, axis=1).tolist()),
        "kurtosis": tuple(stats.kurtosis(standard, axis=1).tolist()),
        "p": tuple(test(standard, axis=1).pvalue.tolist()),
    }
    linearised = np.zeros_like(moved)
    linearised[spread] = sd[spread] * (1 + standard**2 / (standard**2).mean(1, keepdims=True)) / 2
    return fit_growth(what, replace(difference, values=linearised), reach=reach, **facts)


def fit_steerability(line: Fit, difference: Measured, helpfulness: Measured, slopes: Array | None = None) -> Fit:
    """Compare the concept's slope of the mean logit difference with that of random directions, in the line's window.

    Its facts: how many of the directions have a smaller |slope|, the share `p` that has not (the concept counted with
    them), the ratio of their median |slope| to the concept's, and the helpfulness that is lost at the largest |alpha|
    along those that were steered.

    Args:
        line: the concept's, of `fit_line`.
        difference, helpfulness: means over items of every random direction, which stands in an item's place.
        slopes: those of random directions that were forecast; by default they are fitted to what was steered.
    """
    formula = "|slope| of the mean logit difference, against random directions"
    if line.window is None:
        return Fit(formula, reason=line.reason)
    near = difference.at((difference.alphas >= line.window[0]) & (difference.alphas <= line.window[1]))
    random = np.abs(np.polyfit(near.alphas, near.values, 1)[0] if slopes is None else slopes)
    size = abs(line["slope"].value)
    sizes = np.abs(helpfulness.alphas).round(9)
    lost = 1 - helpfulness.values[sizes == sizes.max()].mean(0) / helpfulness.at_zero
    (slope,), (loss,) = (Measured(np.zeros(1), row[None], seed=difference.seed).estimates() for row in (random, lost))
    facts = {
        "directions": len(random),
        "smaller": int((random < size).sum()),
        "p": (1 + int((random >= size).sum())) / (1 + len(random)),
        "ratio": float(np.median(random) / size) if size > 0 else None,
        "control_loss": loss,
    }
    return Fit(formula, {"concept": line["slope"], "control": slope}, window=line.window, facts=facts)


def saturating(alphas: Array, a: float, b: float) -> Array:
    """tanh(a alpha + b)."""
    return np.tanh(a * alphas + b)


def bell(alphas: Array, a: float, b: float, *, floor: float) -> Array:
    """floor + (1 - floor) / (1 + a + a b^2 alpha^2 / 2); the floor is 1 / N for N options."""
    return floor + (1 - floor) / (1 + a + a * b**2 * alphas**2 / 2)


def _linear(formula: str, names: Sequence[str], design: Array, measured: Measured, **facts: Any) -> Fit:
    """Least squares on `design` (alphas, parameters), item by item, and the parameters' means."""
    parameters = np.linalg.lstsq(design, measured.values, rcond=None)[0]
    estimates = dict(zip(names, measured.estimates(parameters), strict=True))
    r2 = _r2(measured.mean, design @ parameters.mean(1))
    return Fit(formula, estimates, r2, window=_ends(measured.alphas), facts=facts)


def _curved(
    formula: str, names: Sequence[str], shape: Callable[..., Array], measured: Measured, solution: Array, **facts: Any
) -> Fit:
    """The fit of a curve to the mean over items, its parameters linearised in the items."""
    alphas, mean = measured.alphas, measured.mean
    moved = _sensitivity(shape, alphas, mean, solution) @ (measured.values - mean[:, None])
    estimates = dict(zip(names, measured.estimates(solution[:, None] + moved), strict=True))
    fitted = shape(alphas, *solution)
    return Fit(formula, estimates, _r2(mean, fitted), _aic(mean, fitted, len(names)), _ends(alphas), facts)


def _sensitivity(shape: Callable[..., Array], x: Array, y: Array, solution: Array) -> Array:
    """(parameters, points): how a least-squares solution moves with `y`, by the implicit function theorem.

    The shape is differentiated by a complex step, the gradient of its squared error by a real one.
    """

    def jacobian(p: Array) -> Array:
        return np.stack([shape(x, *step).imag / 1e-30 for step in p + 1e-30j * np.eye(len(p))], 1)

    def gradient(p: Array) -> Array:
        return jacobian(p).T @ (shape(x, *p) - y)

    hessian = optimize.approx_fprime(solution, gradient, 1e-7 * np.maximum(1e-2, np.abs(solution)))
    return np.linalg.pinv(hessian) @ jacobian(solution).T


def _comes_back(behaviour: Measured, side: int, slope: float) -> float | None:
    """Where on one side over-steering begins; outwards from 0, behaviour goes there as `slope` does."""
    outwards = np.flatnonzero(side * behaviour.alphas >= 0)[::side]
    rising = np.sign(slope) * behaviour.values[outwards]
    furthest = rising.mean(1).argmax()
    beyond = zip(outwards[furthest + 1 :], behaviour.estimates(rising[furthest] - rising[furthest + 1 :]), strict=True)
    return next((behaviour.alphas[i].item() for i, fallen in beyond if fallen.low > 0), None)


def _r2(measured: Array, fitted: Array) -> float | None:
    total = ((measured - measured.mean()) ** 2).sum()
    return float(1 - ((measured - fitted) ** 2).sum() / total) if total > 0 else None


def _aic(measured: Array, fitted: Array, parameters: int) -> float:
    """Akaike's criterion for normal errors, whose spread is one parameter more."""
    mean_square = max(((measured - fitted) ** 2).mean(), np.finfo(float).tiny)
    return float(len(measured) * np.log(mean_square) + 2 * (parameters + 1))


def _ends(alphas: Array) -> tuple[float, float]:
    return alphas.min().item(), alphas.max().item()


def _too_few(measured: Measured, needed: int, where: str = "on the grid") -> str:
    got = len(measured.alphas)
    return "" if got >= needed else f"{got} alphas {where}, where a fit needs at least {needed}"


def _shown(fact: Any) -> str:
    if isinstance(fact, tuple):
        return ", ".join(map(_shown, fact)) if len(fact) <= 3 else f"{_shown(min(fact))} to {_shown(max(fact))}"
    return "none" if fact is None else f"{fact:.3g}" if isinstance(fact, float) else str(fact)
