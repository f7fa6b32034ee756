"""The trade-off curve: what it derives, what it refuses, its files, and the strength that it recommends."""

import json
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repe.measuring.choice import affordable, first_half
from repe.measuring.curve import Baseline, Control, Costs, LeftOut, Scores, SideEffects, TradeoffCurve
from repe.measuring.intervals import clusters_of
from tests import drawn

ALPHAS = np.array([-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0])
NAN = np.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    filled = np.where(np.isnan(logits), -np.inf, logits)
    return logits - np.log(np.exp(filled).sum(-1, keepdims=True))


def scores(seed: int = 0, rows: int = 9, groups=("a", "a", "b", "", "c", "c"), name="sums") -> Scores:
    """Items of two to four options, and answers among them."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, len(groups), 4))
    options = generator.integers(2, 5, size=len(groups))
    logits[:, np.arange(4) >= options[:, None]] = NAN
    return Scores(name, log_softmax(logits) - 0.1, generator.integers(options), groups)


def pairs(logit_difference: np.ndarray, groups, name: str = "honesty") -> Scores:
    """Two options with a given logit difference, the aligned one first."""
    options = [-np.logaddexp(0, -logit_difference), -np.logaddexp(0, logit_difference)]
    return Scores(name, np.stack(options, -1), np.zeros(logit_difference.shape[1], int), groups)


def control(rows: int = 9, directions: int = 5, seed: int = 0) -> Control:
    slopes = np.random.default_rng(seed).normal(0, 0.05, size=(directions, 1)) * np.linspace(-2, 2, rows)
    return Control(np.arange(directions), np.tanh(slopes), slopes, 0.9 - 0.1 * np.abs(slopes))


def curve(seed: int = 0, **changes) -> TradeoffCurve:
    generator = np.random.default_rng(seed)
    texts = generator.uniform(0.5, 2, size=7)
    squares = texts * ALPHAS[:, None] ** 2
    costs = Costs(kl=1e-3 * squares, kl_p95=3e-3 * ALPHAS**2, cross_entropy=2 + 0.01 * squares, change=np.sqrt(squares))
    given = {
        "concept": "honesty",
        "alphas": ALPHAS,
        "alignment": scores(seed, name="honesty"),
        "helpfulness": scores(seed + 1),
        "costs": costs,
        "control": control(),
        "baseline": Baseline(("positive", "negative"), scores(2, rows=2), scores(3, rows=2)),
        "left_out": (LeftOut("honesty", 3, 20, "nothing moves them"), LeftOut("skills", 1, 9, "the answer stays")),
        "provenance": {"model": "m", "blocks": [3], "unit": "gap", "ä": {"x": None}},
    }
    return TradeoffCurve(**given | changes)


def traded(seed: int, clusters: int = 24, cost: float = 0.1, alphas=ALPHAS, rise: float = 1.0) -> TradeoffCurve:
    """Behaviour that rises along alpha and helpfulness that falls with its square, in clusters of unequal size."""
    generator = np.random.default_rng(seed)
    x = np.asarray(alphas)[:, None]

    def shared(scale: float) -> tuple[list[str], np.ndarray]:
        numbers = np.repeat(np.arange(clusters), 1 + generator.geometric(0.3, clusters))
        own = generator.normal(size=len(numbers))
        return [f"g{n}" for n in numbers], scale * (generator.normal(size=clusters)[numbers] + own)

    groups, noise = shared(0.3)
    alignment = pairs(-0.3 + (rise + noise) * x, groups)
    groups, noise = shared(0.5)
    helpfulness = pairs(-np.log(0.15 * np.exp(noise) * (1 + cost * 10 * np.exp(noise) * x**2)), groups, "sums")
    return TradeoffCurve("honesty", alphas, alignment, helpfulness)


# what is derived


@given(st.integers(0, 2**16))
def test_scores_are_those_of_a_softmax_over_the_options_there_are(seed):
    s = scores(seed)
    for row in range(9):
        for item, answer in enumerate(s.answers):
            likelihoods = s.log_likelihoods[row, item]
            there = np.exp(likelihoods[~np.isnan(likelihoods)])
            right = there[answer]
            assert s.probability[row, item] == pytest.approx(right / there.sum())
            assert s.log_probability[row, item] == pytest.approx(np.log(right / there.sum()))
            assert s.full[row, item] == pytest.approx(right)
            assert s.difference[row, item] == pytest.approx(np.log(right / (there.sum() - right)))
            assert s.behaviour[row, item] == pytest.approx((right - (there.sum() - right)) / there.sum())
            assert s.accuracy[row, item] == (right == there.max())
    assert s.floor == pytest.approx(np.mean([1 / (~np.isnan(row)).sum() for row in s.log_likelihoods[0]]))


def test_two_options_have_a_logit_difference():
    differences = np.linspace(-800, 800, 9)[:, None]
    s = pairs(differences, ["a"])
    np.testing.assert_allclose(s.difference, differences, atol=1e-12)
    np.testing.assert_allclose(s.behaviour, np.tanh(differences / 2), atol=1e-12)
    assert s.floor == 0.5


def test_options_that_are_equally_likely_are_no_right_answer():
    assert not pairs(np.zeros((1, 1)), ["a"]).accuracy.any()


def test_arrays_are_copies_and_cannot_be_changed():
    given = np.zeros((1, 2, 2)) - 1
    s = Scores("x", given, [0, 1], ["", ""])
    given[:] = -5
    assert (s.log_likelihoods == -1).all()
    with pytest.raises(ValueError, match="read-only"):
        s.log_likelihoods[0] = 0


def test_the_columns_are_means_with_their_intervals():
    c = curve()
    np.testing.assert_allclose(c.columns["behaviour"], c.alignment.behaviour.mean(1))
    np.testing.assert_allclose(c.columns["helpfulness"], c.helpfulness.probability.mean(1))
    np.testing.assert_allclose(
        c.columns["loss"], 1 - c.columns["helpfulness"] / c.columns["helpfulness"][4], atol=1e-12
    )
    np.testing.assert_allclose(c.columns["perplexity"], np.exp(c.costs.cross_entropy.mean(1)))
    for name in ("behaviour", "difference", "helpfulness", "full", "loss", "kl", "cross_entropy", "change"):
        assert (c.columns[f"{name}_low"] <= c.columns[name] + 1e-12).all()
        assert (c.columns[f"{name}_high"] >= c.columns[name] - 1e-12).all()
    assert "kl" not in replace(c, costs=Costs()).columns


def test_a_frame_has_a_row_a_strength():
    pandas = pytest.importorskip("pandas")
    frame = curve().to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["alpha"].tolist() == ALPHAS.tolist()
    assert {"behaviour_low", "loss_high", "kl_p95", "perplexity"} <= set(frame.columns)


def test_without_pandas_a_frame_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas, which is not installed: pip install pandas"):
        curve().to_frame()


def test_what_was_left_out_is_said_under_the_table():
    c = curve()
    for told in (
        "3 of 20 items of honesty left out: nothing moves them",
        "1 of 9 items of skills left out: the answer",
    ):
        assert told in str(c)
        assert told in c._repr_html_()
    assert "left out" not in str(replace(c, left_out=()))


@pytest.mark.parametrize(
    ("count", "items", "says"), [(0, 3, "0 of 3"), (4, 3, "4 of 3"), (True, 3, "True of 3"), (1.0, 3, "1.0 of 3")]
)
def test_what_is_left_out_is_some_of_what_there_is(count, items, says):
    with pytest.raises(ValueError, match=f"some or all are left out; got {says}"):
        LeftOut("honesty", count, items, "why")


def test_the_table_marks_the_strength_that_is_recommended():
    c = traded(0)
    choice = c.best()
    marked = [line for line in str(c).splitlines() if " *" in line and not line.startswith("*")]
    assert len(marked) == 1
    assert marked[0].startswith(f"{choice.alpha:g} *")
    assert str(choice) in str(c)
    assert f"<td>{choice.alpha:g} *</td>" in c._repr_html_()
    assert "<script>" not in replace(c, concept="<script>")._repr_html_()
    long = traded(0, alphas=np.linspace(-2, 2, 101))
    assert len(str(long).splitlines()) <= 11 + 2 + 3


# fits


def test_the_fits_are_made_once_of_what_was_measured():
    c = curve()
    assert c.fits is c.fits
    assert c.fits.kl["power"].value == pytest.approx(2)
    assert c.fits.change["growth"].value == pytest.approx(np.sqrt(c.costs.change[-1] ** 2 / 4).mean())
    assert c.fits.line["slope"].value == pytest.approx(np.polyfit(ALPHAS, c.alignment.difference, 1)[0].mean())
    assert c.fits.bell.formula in str(c.fits)
    less = replace(c, costs=Costs(), control=None).fits
    assert [less.kl.reason, less.change.reason, less.steerability.reason] == ["not measured"] * 3
    assert less.line == c.fits.line


def test_the_fits_are_of_the_tasks_they_name():
    c = traded(0, cost=0.02)
    fits = c.fits
    assert fits.helpfulness["c0"].value == pytest.approx(c.helpfulness.probability[4].mean(), rel=0.02)
    assert fits.log_helpfulness["c0"].value == pytest.approx(c.helpfulness.log_probability[4].mean(), rel=0.15)
    assert fits.behaviour["a"].value == pytest.approx(0.5, rel=0.2)
    moved = (c.helpfulness.difference - c.helpfulness.difference[4])[-1]
    assert fits.normality.facts["sd"][-1] == pytest.approx(moved.std(ddof=1))


def test_steerability_counts_the_directions_that_steer_less():
    slopes = np.array([0.1, -0.2, 3.0, 0.4])[:, None] * ALPHAS
    right = 0.8 - 0.05 * np.array([[1], [2], [3], [4]]) * (np.abs(ALPHAS) == 2)
    c = replace(curve(), alignment=pairs(1.5 * ALPHAS[:, None] + np.zeros((9, 6)), list("abcdef")))
    fit = replace(c, control=Control(range(4), np.tanh(slopes), slopes, right)).fits.steerability
    assert fit["concept"].value == pytest.approx(1.5)
    assert fit["control"].value == pytest.approx(np.mean([0.1, 0.2, 3.0, 0.4]))
    assert (fit.facts["directions"], fit.facts["smaller"], fit.facts["p"]) == (4, 3, 2 / 5)
    assert fit.facts["ratio"] == pytest.approx(0.3 / 1.5)
    assert fit.facts["control_loss"].value == pytest.approx(0.05 * 2.5 / 0.8)


# what is refused


def changed(**changes):
    return lambda: curve(**changes)


def scored(likelihoods, answers=(0,), groups=("",), name="x"):
    return lambda: Scores(name, likelihoods, answers, groups)


PAIR = [[[-1.0, -2.0]]]


@pytest.mark.parametrize(("provenance", "reach"), [({"unit": "kl"}, 0.5), ({"unit": "gap"}, 2.0), ({}, 2.0)])
def test_what_is_linear_is_fitted_near_0_as_the_unit_has_it(provenance, reach):
    found = drawn.curve(np.array([-4, -2, -0.5, -0.25, 0, 0.25, 0.5, 2, 4.0]), provenance=provenance)
    assert found.fits.line.window == (-reach, reach)
    assert found.fit(reach=0.25).line.window == (-0.25, 0.25)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (changed(alphas=ALPHAS[::-1]), "alphas are sorted, none twice; got [2.0,"),
        (changed(alphas=np.where(ALPHAS == 2, 1.5, ALPHAS)), "alphas are sorted, none twice"),
        (changed(alphas=np.where(ALPHAS == 2, np.inf, ALPHAS)), "`alphas` holds non-finite values"),
        (changed(alphas=ALPHAS + 0.1), "alphas hold 0, against which all is measured; got [-1.9,"),
        (changed(alphas=[]), "`alphas` holds numbers in 1 dimensions, at least one in each; got shape (0,)"),
        (changed(alphas=["a"]), "`alphas` holds numbers in 1 dimensions, at least one in each; got ['a']"),
        (changed(alphas=[[0], [1, 2]]), "`alphas` holds numbers in 1 dimensions"),
        (changed(alphas=[True]), "got shape (1,) of bool"),
        (changed(alignment=scores(rows=3)), "`alignment` has 3 rows for 9 alphas"),
        (changed(helpfulness=None), "`helpfulness` is of Scores, got NoneType"),
        (changed(costs=Costs(kl=np.ones((3, 2)))), "there are 9 alphas, but {'kl': 3} rows"),
        (changed(costs=None), "`costs` is of Costs, got NoneType"),
        (changed(control=control(rows=4)), "there are 9 alphas, but {'control': 4} rows"),
        (changed(concept=3), "`concept` is text, got [3]"),
        (changed(provenance={"x": object()}), "provenance is a mapping of plain JSON data: Object of type object"),
        (changed(provenance={"x": NAN}), "provenance is a mapping of plain JSON data"),
        (changed(provenance=3), "provenance is a mapping of plain JSON data"),
        (scored(PAIR, answers=(2,)), "items [0] of 'x' have no right option"),
        (scored(PAIR, answers=(-1,)), "items [0] of 'x' have no right option"),
        (scored([[[-1.0, -2.0, NAN]]], answers=(2,)), "items [0] of 'x' have no right option"),
        (scored(PAIR, answers=(0.5,)), "`answers` holds whole numbers in 1 dimensions"),
        (scored([[[NAN, NAN]]]), "all log-likelihoods of 'x' are NaN"),
        (scored([[[-1.0, -2.0]], [[NAN, NAN]]]), "rows [1] of 'x' are NaN where others have numbers"),
        (scored([[[NAN, NAN]], [[-1.0, -2.0]]]), "rows [0] of 'x' are NaN where others have numbers"),
        (scored([[[-1.0, NAN]]]), "items [0] of 'x' have fewer than two options"),
        (scored([[[1.0, -2.0]]]), "a log-likelihood is at most 0, got 1 in 'x'"),
        (scored([[[-np.inf, -2.0]]]), "`log_likelihoods` holds non-finite values"),
        (scored([[-1.0, -2.0]]), "`log_likelihoods` holds numbers in 3 dimensions"),
        (scored(PAIR, answers=(0, 1)), "`log_likelihoods` are of 1 items, but there are 2 answers and 1 groups"),
        (scored(PAIR, groups="a"), "`groups` is text, got 'a'"),
        (scored(PAIR, groups=(1,)), "`groups` is text, got (1,)"),
        (scored(PAIR, name=None), "`name` is text, got [None]"),
        (lambda: Costs(kl=[[1.0, NAN]]), "`kl` holds non-finite values"),
        (lambda: Control([0, 1], np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4))),
         "`helpfulness` of the control has shape (2, 4), expected (2, 3) (seeds, alphas)"),
        (lambda: Control([10**30], [[1.0]], [[1.0]], [[1.0]]), "`seeds` holds whole numbers"),
        (lambda: Baseline(("positive",), scores(rows=2), scores(rows=2)), "`alignment` has 2 rows for 1 prompts"),
        (lambda: curve().best(1.0), "the budget is a share of helpfulness, at least 0 and below 1; got 1.0"),
        (lambda: curve().best(NAN), "the budget is a share of helpfulness"),
        (lambda: curve().best(sign=0), "sign is +1 for more of the concept, -1 for less or None for either; got 0"),
        (lambda: curve().rehearse(0), "a rehearsal needs at least one split, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_curve_is_refused(make, says):
    with pytest.raises(ValueError) as raised:
        make()
    assert says in str(raised.value)


# files

numbers = st.floats(-1e300, 0, allow_nan=False)


@settings(max_examples=25)
@given(st.data())
def test_a_curve_comes_back_from_its_file_to_the_last_bit(tmp_path_factory, data):
    items = data.draw(st.integers(1, 3))
    likelihoods = data.draw(st.lists(numbers, min_size=3 * items * 3, max_size=3 * items * 3))
    drawn = np.array(likelihoods).reshape(3, items, 3)
    drawn[:, 0, 2] = NAN
    task = Scores(
        data.draw(st.text()), drawn, [0] * items, data.draw(st.lists(st.text(), min_size=items, max_size=items))
    )
    alphas = [-data.draw(st.floats(1e-300, 1e300)), 0.0, data.draw(st.floats(1e-300, 1e300))]
    c = TradeoffCurve(data.draw(st.text()), alphas, task, task, Costs(kl_p95=[0.1, 0, 1 / 3]), control(rows=3))
    path = tmp_path_factory.mktemp("curves") / "deep" / "curve.json"
    assert c.save(path) == path
    back = TradeoffCurve.load(path)
    assert back == c
    assert back.alignment.log_likelihoods.tobytes() == c.alignment.log_likelihoods.tobytes()
    assert back.alphas.tobytes() == c.alphas.tobytes()


def test_everything_that_a_curve_holds_comes_back(tmp_path):
    c = curve()
    back = TradeoffCurve.load(c.save(tmp_path / "c.json"))
    assert back == c
    assert back.provenance == c.provenance
    assert str(back) == str(c)
    assert back.fits == c.fits
    text = (tmp_path / "c.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["format"] == "repe.curve/1"


@pytest.mark.parametrize("name", [f.name for f in fields(TradeoffCurve)])
def test_curves_that_differ_anywhere_are_not_equal(name):
    other = {
        "concept": "x", "alphas": ALPHAS * 2, "alignment": scores(7), "helpfulness": scores(7), "costs": Costs(),
        "control": None, "baseline": None, "side_effects": SideEffects([0], [3], not_measured="x"), "left_out": (),
        "provenance": {},
    }  # fmt: skip
    assert curve() == curve()
    assert curve() != replace(curve(), **{name: other[name]})
    assert curve() != "a curve"


def test_what_was_measured_is_not_equal_to_what_was_not():
    measured = Costs(kl=[[0.0, 1.0], [2.0, 3.0]])
    assert measured != Costs()
    assert Costs() != measured


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = curve().save(tmp_path / "c.json")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        curve(1).save(path)
    assert TradeoffCurve.load(path) == curve()
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


@cache
def saved() -> str:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return curve().save(f"{folder}/c.json").read_text()


def edited(**changes) -> str:
    return json.dumps(json.loads(saved()) | changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (lambda: saved()[:-9], "Expecting"),
        (lambda: "", "Expecting value"),
        (lambda: "[" * 100_000, "maximum recursion depth"),
        (lambda: "[]", "it is not of the format repe.curve/1"),
        (lambda: edited(format="repe.curve/2"), "it is of the format repe.curve/2, and this version of repe reads "),
        (lambda: edited(format="repe.curve/1.1"), "it is not of the format repe.curve/1"),
        (lambda: edited(format=["repe.curve/1"]), "it is not of the format repe.curve/1"),
        (lambda: json.dumps({"format": "repe.curve/1"}), "the curve lacks ['alignment', 'alphas', 'concept', 'help"),
        (lambda: edited(alignment=None), "`alignment` is of Scores, got NoneType"),
        (lambda: edited(alignment=[1]), "`alignment` is an object with the fields of Scores, got [1]"),
        (lambda: edited(control={"seeds": [1]}), "`control` lacks ['behaviour', 'difference', 'helpfulness']"),
        (lambda: edited(alphas=ALPHAS[1:].tolist()), "`alignment` has 9 rows for 8 alphas"),
        (lambda: edited(alphas="0"), "`alphas` holds numbers in 1 dimensions"),
        (lambda: edited(alphas=[{}, 0]), "`alphas` holds numbers in 1 dimensions"),
        (lambda: edited(alphas=[10**400]), "`alphas` holds numbers in 1 dimensions"),
        (lambda: edited(alphas=[0, None]), "`alphas` holds non-finite values"),
        (lambda: edited(alphas=[0, NAN]), "NaN is no JSON number"),
        (lambda: edited(costs={"kl": [[1]]}), "there are 9 alphas, but {'kl': 1} rows"),
        (lambda: edited(left_out=[{"task": "x"}]), "`left_out` lacks ['count', 'items', 'why']"),
        (lambda: edited(left_out=3), "`left_out` is an object with the fields of LeftOut, got 3"),
        (lambda: edited(costs=3), "`costs` is an object with the fields of Costs, got 3"),
        (lambda: edited(provenance=[1]), "provenance is a mapping of plain JSON data"),
        (lambda: edited(concept=None), "`concept` is text"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_curve_is_named_with_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "broken.json"
    path.write_text(text())
    with pytest.raises(ValueError) as raised:
        TradeoffCurve.load(path)
    assert str(raised.value).startswith(f"{path} cannot be read as a trade-off curve: ")
    assert says in str(raised.value)


LATER = {"control": None, "baseline": None, "left_out": (), "provenance": {}}
"""What a file may lack, and what stands for it."""


def test_a_file_of_another_version_of_the_format_is_read(tmp_path):
    data = json.loads(saved())
    newer = data | {"added": {"x": [1]}, "alignment": data["alignment"] | {"added": 1}}
    older = {name: value for name, value in data.items() if name not in LATER}
    older["costs"] = {"kl": data["costs"]["kl"]}
    for text, expected in (
        (newer, curve()),
        (older, replace(curve(), **LATER, costs=Costs(kl=curve().costs.kl))),
    ):
        (tmp_path / "c.json").write_text(json.dumps(text))
        assert TradeoffCurve.load(tmp_path / "c.json") == expected


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="cannot be read as a trade-off curve: 'utf-8' codec"):
        TradeoffCurve.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="there is no trade-off curve at"):
        TradeoffCurve.load(tmp_path / "y")


# the choice


def test_the_choice_is_what_its_two_halves_say():
    c = traded(3)
    choice = c.best(0.1, seed=5)
    assert choice == c.best(0.1, seed=5)
    assert choice != c.best(0.1, seed=6)
    row = int(np.flatnonzero(c.alphas == choice.alpha)[0])
    first = first_half(set(named(c.alignment)), set(named(c.helpfulness)), np.random.default_rng(5))
    for outcome, wanted in ((choice.chosen, True), (choice.tested, False)):
        right = c.helpfulness.probability[:, np.isin(named(c.helpfulness), first) == wanted].mean(1)
        assert outcome.loss.value == pytest.approx(1 - right[row] / right[4])
        rise = c.alignment.behaviour[:, np.isin(named(c.alignment), first) == wanted].mean(1)
        assert outcome.gain.value == pytest.approx(rise[row] - rise[4])
        assert outcome.gain.low < outcome.gain.value < outcome.gain.high
    assert choice.chosen.loss.high <= 0.1
    assert not choice.reason


def named(task: Scores) -> list[str]:
    return clusters_of(task.groups)


@given(st.sets(st.integers(0, 30), min_size=4), st.sets(st.integers(0, 30), min_size=4), st.integers(0, 99))
def test_either_half_has_clusters_of_both_tasks(one, other, seed):
    one, other = {str(n) for n in one}, {str(n) for n in other}
    first = set(first_half(one, other, np.random.default_rng(seed)))
    assert first <= one | other
    for task in (one, other):
        assert abs(len(task & first) - len(task - first)) <= 2
        assert len(task & first) >= 2 <= len(task - first)


def test_the_sign_is_the_direction_of_what_is_wanted():
    c = traded(0, cost=0.01, rise=1.0)
    more, less, either = (c.best(0.2, sign=sign) for sign in (1, -1, None))
    assert more.alpha > 0 > less.alpha
    assert more.tested.gain.value > 0 < less.tested.gain.value
    assert (more.sign, less.sign) == (1, -1)
    assert either in (more, less)
    assert either.chosen.gain.value == max(more.chosen.gain.value, less.chosen.gain.value)
    reversed_concept = traded(0, cost=0.01, rise=-1.0)
    assert reversed_concept.best(0.2).alpha < 0 < reversed_concept.best(0.2, sign=-1).alpha


def test_the_largest_affordable_gain_is_taken():
    c = traded(0, cost=1e-5)
    assert c.best(0.05).alpha == 2.0
    assert c.best(0.05).chosen.gain.value == pytest.approx(c.best(0.05, seed=0).chosen.gain.value)


def test_where_every_gain_costs_too_much_the_strength_is_zero_and_the_reason_says_so():
    choice = traded(0, cost=3.0).best(0.01)
    assert choice.alpha == 0
    assert choice.kept
    assert choice.reason.startswith("no alpha that gains is sure to stay within a loss of 0.01, all between it and 0")
    assert "the cheapest, alpha 0.5, loses 0." in choice.reason
    assert choice.reason in str(choice)


def test_a_gain_behind_a_dip_of_helpfulness_is_not_taken():
    right = np.where(ALPHAS == 0.5, 0.0, 2.0)[:, None] + np.zeros((9, 8))
    dip = replace(traded(0), helpfulness=pairs(right, list("abcdefgh")))
    assert dip.best().alpha == 0
    assert dip.best().reason.endswith("all between it and 0 included: the cheapest, alpha 1, loses 0 (at most 0)")
    assert dip.best(sign=-1).alpha == -2
    assert replace(dip, helpfulness=pairs(2 + 0 * right, list("abcdefgh"))).best().alpha == 2


def test_where_nothing_gains_the_reason_says_so():
    c = traded(0)
    flat = replace(c, alignment=pairs(np.zeros((9, 8)), [""] * 8))
    assert (
        flat.best().reason
        == "no alpha on the grid surely gains anything in the wanted direction, and more than random directions do"
    )
    assert flat.best(sign=None).alpha == 0


def test_three_clusters_are_too_few_to_choose_and_test():
    c = replace(curve(), alignment=pairs(ALPHAS[:, None] + np.zeros((9, 6)), list("aabbcc"), "asks"))
    assert c.best().reason == "the items of behaviour are of 3 clusters, too few to choose and test: 4"
    assert c.best().alpha == 0


def test_an_affordable_strength_behind_one_that_is_not_is_not_taken():
    cheap = np.array([True, False, True, True, True, True, False, True, True])
    within = affordable(ALPHAS, cheap)
    assert ALPHAS[within].tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert affordable(ALPHAS, np.ones(9, bool)).all()
    assert not affordable(ALPHAS, ALPHAS != 0).any()


def test_the_budget_is_seldom_broken_on_the_other_half():
    alphas = np.linspace(-1, 1.0, 21).round(9)
    splits = [
        choice
        for seed in range(40)
        for choice in traded(seed, clusters=(12, 20, 30, 48)[seed % 4], alphas=alphas)
        .rehearse(5, 0.05, seed=seed)
        .choices
    ]
    made = [choice for choice in splits if not choice.reason]
    assert len(splits) == 200
    assert len(made) > 160
    assert sum(not choice.kept for choice in made) <= 0.1 * len(made)
    assert np.mean([choice.tested.loss.value for choice in made]) > 0.01  # the budget is made use of


def test_a_rehearsal_counts_its_splits():
    rehearsal = traded(1).rehearse(12, 0.1)
    assert len(rehearsal.choices) == 12
    assert rehearsal == traded(1).rehearse(12, 0.1)
    assert rehearsal.broken == np.mean([c.tested.loss.value > 0.1 for c in rehearsal.choices])
    assert rehearsal.refused == pytest.approx(np.mean([bool(c.reason) for c in rehearsal.choices]))
    assert "12 splits: no strength on" in str(rehearsal)
    nothing = traded(1, cost=5.0).rehearse(2, 0.001)
    assert (nothing.refused, nothing.broken, nothing.made) == (1, 0, ())
    assert str(nothing) == "2 splits: no strength on 100.0%"


# the control, and what cannot be measured on


def test_a_gain_counts_where_it_is_more_than_random_directions_are_forecast_to_give():
    c = traded(0, cost=0.0)
    gained = float((c.alignment.difference[-1] - c.alignment.difference[c.alphas == 0][0]).mean())
    still = np.zeros((2, len(c.alphas)))
    for share, chosen in ((0.5, True), (1.5, False)):
        slopes = np.random.default_rng(0).permutation(np.linspace(-1, 1, 1001)) * share * gained / c.alphas[-1] / 0.95
        known = replace(c, control=Control([0, 1], still, still, still + 0.9, slopes=slopes))
        assert bool(known.best().alpha) is chosen
        assert known.control.reach(c.alphas) == pytest.approx(
            np.abs(c.alphas) * share * gained / c.alphas[-1], rel=0.01
        )
        assert known.fits.steerability.facts["directions"] == 1001
        assert known.fits.steerability.facts["smaller"] == pytest.approx(1001 * min(1, 0.95 / share), rel=0.15)


def test_what_was_steered_goes_further_than_what_was_forecast():
    c = control(directions=3)
    moved = np.abs(c.difference - c.difference[:, ALPHAS == 0]).max(0)
    forecast = replace(c, slopes=[1e-6, -1e-6])
    np.testing.assert_allclose(forecast.reach(ALPHAS), np.maximum(moved, np.abs(ALPHAS) * 1e-6))
    np.testing.assert_allclose(
        c.reach(ALPHAS), np.quantile(np.abs(c.difference - c.difference[:, ALPHAS == 0]), 0.95, 0)
    )


def test_a_control_of_an_older_file_has_the_concept_s_lengths(tmp_path):
    path = curve().save(tmp_path / "curve.json")
    data = json.loads(path.read_text())
    del data["control"]["lengths"], data["control"]["slopes"]
    path.write_text(json.dumps(data))
    assert TradeoffCurve.load(path) == curve()


def test_where_the_unsteered_model_guesses_no_loss_is_said_and_no_strength_recommended():
    c = traded(0, cost=0.0)
    numbers = np.arange(c.helpfulness.difference.shape[1])
    steps = np.where(numbers % 2, 1.0, -1.0) + 0 * c.alphas[:, None]
    guessing = replace(c, helpfulness=pairs(steps, [f"g{n}" for n in numbers], "sums"))
    assert c.best().alpha
    assert not c.guesses
    assert guessing.guesses
    assert guessing.best().alpha == 0
    assert "where guessing gets 0.5: no loss can be seen" in guessing.best().reason
    assert "loss" in c._table().heads
    assert "loss" not in guessing._table().heads


def test_what_one_split_finds_by_luck_is_not_what_is_recommended():
    c = traded(3, clusters=12, cost=0.05, alphas=np.linspace(-2, 2, 17))
    settled = [c.best(seed=seed).alpha for seed in range(8)]
    single = [c._trade(seed).choose().alpha for seed in range(8)]
    assert np.ptp(single) > 0
    assert np.std(settled) < 0.5 * np.std(single)
    middle = np.median([choice.alpha for choice in c.rehearse(200).choices])
    assert np.mean(settled) == pytest.approx(middle, abs=0.25)


def test_a_gain_is_seen_in_logits_where_probabilities_hide_it():
    """Half of the items are sure of their answer at every strength: their probabilities say nothing, and spread."""
    c = traded(0, cost=0.0)
    rising = c.alphas[:, None] * np.linspace(0.8, 1.2, 24)
    sure = np.where(np.arange(24) % 12 < 11, np.where(np.arange(24) % 2, 14.0, -14.0), 0.0)
    hidden = replace(c, alignment=pairs(rising + sure, [""] * 24))
    gains = hidden._measured(0)["behaviour"].gain.estimates()
    assert not any(gain.low > 0 for gain in gains[5:])
    assert hidden.best().alpha > 0
    still = replace(c, alignment=pairs(0 * rising + sure, [""] * 24))
    assert still.best().alpha == 0
