"""Readers: scikit-learn's own checks, and theorems about the directions that they find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import svd
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from repe.reading.readers import (
    NAMES,
    LinearDiscriminant,
    LogisticProbe,
    MeanDifference,
    PrincipalDirection,
    directions,
    make,
)

READERS = [make(name) for name in NAMES]
D = 8


@parametrize_with_checks(READERS)
def test_scikit_learn_accepts_it(estimator, check):
    check(estimator)


@pytest.fixture(params=READERS, ids=lambda reader: type(reader).__name__)
def reader(request):
    return make(request.param)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def planted(n=400, d=D, noise=None, seed=0, gap=2.0):
    """Pairs around common item means, at a distance `gap` along a random unit direction, in noise `noise @ z`."""
    rng = np.random.default_rng(seed)
    concept = rng.normal(size=d)
    concept /= np.linalg.norm(concept)
    labels, groups = np.tile([1, 0], n // 2), np.repeat(np.arange(n // 2), 2)
    rows = rng.normal(size=(n, d)) @ (np.eye(d) if noise is None else noise).T + 3.0
    return rows + gap * (labels - 0.5)[:, None] * concept, labels, groups, concept


# The contract


def test_read_and_write_are_normalised_and_the_poles_stand_at_one(reader):
    X, y, groups, _ = planted(noise=np.diag(np.arange(1, D + 1)))
    reader.fit(X, y, groups)
    assert reader.read_.dtype == reader.write_.dtype == np.float64
    assert np.linalg.norm(reader.write_) == pytest.approx(1)
    assert reader.read_ @ reader.write_ == pytest.approx(1)
    assert isinstance(reader.midpoint_, float)
    assert isinstance(reader.scale_, float)
    scores = reader.decision_function(X)
    assert scores[y == 1].mean() == pytest.approx(1)
    assert scores[y == 0].mean() == pytest.approx(-1)
    np.testing.assert_array_equal(reader.predict(X), scores > 0)


def test_writing_one_scale_moves_the_score_by_one(reader):
    X, y, groups, _ = planted(noise=np.diag(np.arange(1, D + 1)))
    reader.fit(X, y, groups)
    moved = reader.decision_function(X + reader.scale_ * reader.write_)
    np.testing.assert_allclose(moved - reader.decision_function(X), 1)


@pytest.mark.parametrize("poles", [("dishonest", "honest"), (-1, 1), (False, True), (0.0, 2.0)])
def test_the_greater_label_is_the_positive_pole(reader, poles):
    X, y, _, concept = planted()
    reader.fit(X, np.array(poles)[y])
    assert reader.classes_.tolist() == list(poles)
    assert reader.read_ @ concept > 0
    assert reader.predict(X + 100 * concept)[0] == poles[1]


@pytest.mark.parametrize(
    ("y", "groups", "message"),
    [
        ([1, 1, 1, 1], None, "one class only: \\[1\\]"),
        ([0, 1, 2, 1], None, "Only binary classification is supported. The type of the target is multiclass"),
        ([0, 1, 0, 1], [0, 0, 1], "inconsistent numbers of samples: \\[4, 3\\]"),
        ([0, 1, 0], None, "inconsistent numbers of samples"),
        ([0.5, 1.5, 0.5, 1.5], None, "Unknown label type: continuous"),
    ],
)
def test_labels_and_groups_that_cannot_be_fitted_say_why(reader, y, groups, message):
    with pytest.raises(ValueError, match=message):
        reader.fit(np.arange(8.0).reshape(4, 2), y, groups)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(reader, value):
    X, y, groups, _ = planted()
    X[3, 3] = value
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        reader.fit(X, y, groups)


@pytest.mark.parametrize("X", [np.ones((6, 3)), np.eye(3)[[0, 0, 1, 1, 2, 2]]], ids=["constant", "equal means"])
@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 2, 2]])
def test_poles_that_do_not_differ_have_scale_zero_and_finite_scores(reader, X, groups):
    reader.fit(X, [0, 1] * 3, groups)
    again = make(reader).fit(X, [0, 1] * 3, groups)
    assert reader.scale_ == pytest.approx(0, abs=1e-12)
    assert np.linalg.norm(reader.write_) == pytest.approx(1)
    np.testing.assert_array_equal(reader.write_, again.write_)
    assert np.isfinite(make(reader).fit(X, [0, 1] * 3, groups).decision_function(X)).all()


def test_two_rows_and_features_that_never_vary_are_enough(reader):
    reader.fit([[1.0, 5, 0], [3.0, 5, 2]], [0, 1])
    np.testing.assert_allclose(reader.write_, np.array([1, 0, 1]) / np.sqrt(2), atol=1e-9)
    np.testing.assert_allclose(reader.read_, reader.write_, atol=1e-9)


def test_more_dimensions_than_rows(reader):
    X, y, groups, concept = planted(n=100, d=1000, gap=20)
    reader.fit(X, y, groups)
    assert cosine(reader.write_, concept) > 0.9
    assert reader.score(X, y) == 1


# What is found


@pytest.mark.parametrize("paired", [True, False])
def test_the_planted_direction_is_found_ever_better_in_isotropic_noise(reader, paired):
    errors = []
    for n in (100, 1_600, 25_600):
        X, y, groups, concept = planted(n)
        reader.fit(X, y, groups if paired else None)
        errors.append([1 - cosine(reader.read_, concept), 1 - cosine(reader.write_, concept)])
    first, second, third = np.array(errors)
    assert (third < 2e-3).all()
    assert (third < second).all()
    assert (second < first).all()


@pytest.mark.parametrize("reader", [LogisticProbe(C=1e3), LinearDiscriminant()])
def test_in_anisotropic_noise_reading_is_whitened_and_writing_is_not(reader):
    noise = orthogonal(np.random.default_rng(1), D) @ np.diag([0.2, 0.3, 0.5, 1, 1, 1.5, 2, 3])
    X, y, _, concept = planted(100_000, noise=noise, gap=1.0)
    reader.fit(X, y)
    normal = np.linalg.solve(noise @ noise.T, concept)
    assert cosine(normal, concept) < 0.5
    assert cosine(reader.read_, normal) > 0.999
    assert cosine(reader.write_, concept) > 0.998


def test_the_discriminant_is_that_of_the_dense_formula_and_of_scikit_learn():
    X, y, _, _ = planted(60, d=20, noise=np.diag(np.arange(1, 21)))
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    within = Z - np.stack([Z[y == 0].mean(axis=0), Z[y == 1].mean(axis=0)])[y]
    S, moment = within.T @ within / 60, np.mean(within**2)
    spread = np.mean([np.sum((np.outer(row, row) - S) ** 2) for row in within]) / 60
    amount = spread / np.sum((S - moment * np.eye(20)) ** 2)
    assert 0.05 < amount < 0.95
    shrunk = (1 - amount) * S + amount * moment * np.eye(20)
    expected = np.linalg.solve(shrunk, Z[y == 1].mean(axis=0) - Z[y == 0].mean(axis=0)) / X.std(axis=0)

    read = LinearDiscriminant().fit(X, y).read_
    assert cosine(read, expected) == pytest.approx(1, abs=1e-9)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(X, y)
    assert cosine(read, theirs.coef_[0]) > 0.98


def test_the_probe_is_that_of_a_standardised_pipeline():
    X, y, _, _ = planted(noise=np.diag(np.arange(1, D + 1)))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8)).fit(X, y)
    logits = pipeline.decision_function(X)
    projections = X @ LogisticProbe(C=0.1).fit(X, y).read_
    assert np.corrcoef(logits, projections)[0, 1] == pytest.approx(1, abs=1e-9)


def test_the_probes_pattern_is_that_of_the_dense_covariance():
    X, y, _, _ = planted(noise=np.diag(np.arange(1, D + 1)))
    probe = LogisticProbe().fit(X, y)
    assert cosine(probe.write_, np.cov(X.T) @ probe.read_) == pytest.approx(1)
    assert cosine(probe.write_, probe.read_) < 0.9


def test_the_order_inside_pairs_is_nothing_to_the_principal_direction_and_ruins_a_centring_one():
    X, y, groups, concept = planted(gap=6, noise=np.diag(np.arange(1, D + 1)) / 2)
    ordered = X[y == 1] - X[y == 0]
    centring = PCA(1, svd_solver="full").fit(ordered).components_[0]
    signs = np.random.default_rng(0).choice([-1, 1], len(ordered))
    shuffled = svd(signs[:, None] * ordered)[2][0]
    direction = PrincipalDirection().fit(X, y, groups).write_
    assert abs(cosine(centring, concept)) < 0.5
    assert cosine(direction, concept) > 0.95
    assert abs(cosine(direction, shuffled)) == pytest.approx(1)


@pytest.mark.parametrize(("n", "d"), [(20, 100), (100, 20), (2, 5), (40, 20)])
def test_the_principal_direction_is_the_first_right_singular_vector(n, d):
    X, y, groups, _ = planted(n, d)
    expected = svd(X[y == 1] - X[y == 0])[2][0]
    assert abs(PrincipalDirection().fit(X, y, groups).read_ @ expected) == pytest.approx(1)


def test_pairing_removes_from_the_principal_direction_what_the_poles_share():
    X, y, groups, concept = planted()
    rng = np.random.default_rng(2)
    item = rng.normal(size=D)
    shared = X + 5 * rng.normal(size=len(X) // 2)[groups, None] * item
    assert cosine(PrincipalDirection().fit(shared, y, groups).read_, concept) > 0.95
    assert cosine(PrincipalDirection().fit(shared, y).read_, concept) < 0.7


def test_without_pairs_the_principal_direction_is_that_of_every_positive_against_every_negative():
    X, y, _, _ = planted(60, noise=np.diag(np.arange(1, D + 1)))
    X, y = X[:50], y[:50]
    y[:9] = 1
    every = (X[y == 1][:, None] - X[y == 0][None]).reshape(-1, D)
    expected = svd(every, full_matrices=False)[2][0]
    assert abs(PrincipalDirection().fit(X, y).read_ @ expected) == pytest.approx(1)


def test_a_pair_may_have_several_rows_of_a_pole_and_needs_both():
    X = np.array([[3.0, 1], [5, 1], [0, 0], [4, 0], [0, 3]])
    direction = PrincipalDirection().fit(X, [1, 1, 0, 1, 0], list("aaabb")).write_
    expected = svd([[4, 1], [4, -3]])[2][0]
    assert abs(direction @ expected) == pytest.approx(1)
    with pytest.raises(ValueError, match="pair b has no negative: every pair needs both poles"):
        PrincipalDirection().fit(X, [1, 1, 0, 1, 1], list("aaabb"))


# Invariances. LogisticRegression stops at a tolerance: its directions agree to 1e-4, the others' to 1e-7.


def close(a, b, reader):
    np.testing.assert_allclose(a, b, atol=1e-4 if isinstance(reader, LogisticProbe) else 1e-7)


def fitted(reader, X, y, groups):
    return make(reader).fit(X, y, groups)


@pytest.fixture(params=[True, False], ids=["paired", "unpaired"])
def data(request):
    X, y, groups, _ = planted(200, noise=orthogonal(np.random.default_rng(3), D) @ np.diag(np.arange(1, D + 1) / 2))
    return X, y, groups if request.param else None


def test_adding_a_constant_to_all_activations_changes_no_direction_and_no_score(reader, data):
    X, y, groups = data
    constant = np.linspace(-1000, 1000, D)
    here, there = fitted(reader, X, y, groups), fitted(reader, X + constant, y, groups)
    close(here.read_, there.read_, reader)
    close(here.write_, there.write_, reader)
    np.testing.assert_allclose(here.decision_function(X), there.decision_function(X + constant), atol=1e-3)


def test_exchanging_the_poles_negates(reader, data):
    X, y, groups = data
    here, there = fitted(reader, X, y, groups), fitted(reader, X, 1 - y, groups)
    close(here.read_, -there.read_, reader)
    close(here.write_, -there.write_, reader)
    assert here.midpoint_ == pytest.approx(-there.midpoint_, rel=1e-3)
    assert here.scale_ == pytest.approx(there.scale_, rel=1e-3)


def test_the_order_of_the_rows_and_the_names_of_the_pairs_change_nothing(reader, data):
    X, y, groups = data
    order = np.random.default_rng(4).permutation(len(X))
    names = None if groups is None else np.array([f"pair {(7 * group) % 100}" for group in groups])[order]
    here, there = fitted(reader, X, y, groups), fitted(reader, X[order], y[order], names)
    close(here.read_, there.read_, reader)
    close(here.write_, there.write_, reader)


@pytest.mark.parametrize("reader", [MeanDifference(), PrincipalDirection()])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_rotating_the_space_rotates_the_directions(reader, seed):
    X, y, groups, _ = planted(60)
    rotation = orthogonal(np.random.default_rng(seed), D)
    here, there = fitted(reader, X, y, groups), fitted(reader, X @ rotation.T, y, groups)
    close(rotation @ here.read_, there.read_, reader)


@pytest.mark.parametrize("reader", [LogisticProbe(), LinearDiscriminant()])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_rescaling_the_features_rescales_what_is_written_and_leaves_what_is_read(reader, seed):
    X, y, groups, _ = planted(60)
    sizes = np.exp(np.random.default_rng(seed).normal(size=D))
    here, there = fitted(reader, X, y, groups), fitted(reader, X * sizes, y, groups)
    assert cosine(here.read_ / sizes, there.read_) == pytest.approx(1, abs=1e-6)
    assert cosine(here.write_ * sizes, there.write_) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(here.decision_function(X), there.decision_function(X * sizes), atol=1e-3)


def test_scaling_all_activations_scales_the_poles(reader, data):
    X, y, groups = data
    here, there = fitted(reader, X, y, groups), fitted(reader, 1000 * X, y, groups)
    close(here.write_, there.write_, reader)
    assert there.scale_ == pytest.approx(1000 * here.scale_, rel=1e-3)
    assert there.midpoint_ == pytest.approx(1000 * here.midpoint_, rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sums_are_in_float64_whatever_the_dtype(reader, data, dtype):
    X, y, groups = data
    narrow = (X * 1000).astype(dtype)
    here, there = fitted(reader, narrow, y, groups), fitted(reader, narrow.astype(np.float64), y, groups)
    np.testing.assert_array_equal(here.read_, there.read_)
    np.testing.assert_array_equal(here.decision_function(narrow), there.decision_function(narrow.astype(np.float64)))


def test_the_callers_arrays_are_left_alone(reader, data):
    X, y, groups = data
    copy = X.copy()
    X.flags.writeable = False
    reader.fit(X, y, groups).decision_function(X)
    np.testing.assert_array_equal(X, copy)


# By name, and other people's


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mean", MeanDifference), ("pca", PrincipalDirection), ("probe", LogisticProbe), ("lda", LinearDiscriminant)],
)
def test_readers_by_name(name, kind):
    assert type(make(name)) is kind


def test_an_estimator_is_copied_unfitted():
    X, y, _, _ = planted()
    mine = LogisticProbe(C=3).fit(X, y)
    made = make(mine)
    assert made is not mine
    assert made.C == 3
    assert not hasattr(made, "read_")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maen", "no reader is called 'maen': did you mean 'mean'.*There are 'mean', 'pca', 'probe', 'lda'"),
        ("PCA", "did you mean 'pca'"),
        ("xyz", "no reader is called 'xyz': There are"),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_what_is_no_estimator_is_refused():
    with pytest.raises(TypeError, match="scikit-learn estimator"):
        make(object())


def test_the_directions_of_a_reader_are_its_own(reader, data):
    X, y, groups = data
    read, write = directions(reader.fit(X, y, groups), X, y)
    np.testing.assert_allclose(read, reader.read_)
    np.testing.assert_allclose(write, reader.write_)


@pytest.mark.parametrize("estimator", [LogisticRegression(), LinearDiscriminantAnalysis(), RidgeClassifier()])
def test_any_linear_classifier_reads_with_its_normal_and_writes_with_its_pattern(estimator, data):
    X, y, _ = data
    read, write = directions(estimator.fit(X, y), X, y)
    normal = estimator.coef_.ravel()
    assert cosine(read, normal) == pytest.approx(1)
    assert cosine(write, np.cov(X.T) @ normal) == pytest.approx(1)
    assert np.linalg.norm(write) == pytest.approx(1)
    assert read @ write == pytest.approx(1)


class Fixed(BaseEstimator):
    """An estimator that was fitted to whatever it is told."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_a_flat_normal_and_foreign_directions_are_oriented_and_normalised(data):
    X, y, _ = data
    mean = MeanDifference().fit(X, y).write_
    for estimator in (Fixed(coef_=mean), Fixed(coef_=-7 * mean[None])):
        assert cosine(directions(estimator, X, y)[0], mean) == pytest.approx(1)
    read, write = directions(Fixed(read_=-3 * mean, write_=-5 * mean), X, y)
    np.testing.assert_allclose(read, mean)
    np.testing.assert_allclose(write, mean)


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (
            make_pipeline(StandardScaler(), LogisticRegression()),
            TypeError,
            "Pipeline has no direction: .* LogisticProbe",
        ),
        (Fixed(coef_=np.ones((3, D))), ValueError, r"Fixed.coef_ has shape \(3, 8\), .* shape \(8,\)"),
        (Fixed(coef_=np.ones(D + 1)), ValueError, r"Fixed.coef_ has shape \(9,\), .* shape \(8,\)"),
        (Fixed(read_=np.eye(D)[0], write_=np.eye(D)[1]), ValueError, "must point the same way: their cosine is 0"),
        (Fixed(read_=np.ones(D), write_=-np.ones(D)), ValueError, "must point the same way: their cosine is -1"),
    ],
)
def test_an_estimator_without_one_direction_is_refused(data, estimator, error, message):
    X, y, _ = data
    with pytest.raises(error, match=message):
        directions(estimator, X, y)


def test_directions_need_two_poles(data):
    X, y, _ = data
    with pytest.raises(ValueError, match="y must have two classes, one a pole, and it has 1"):
        directions(Fixed(coef_=np.ones(D)), X, 0 * y)


def test_with_few_rows_the_probe_still_writes_as_well_as_the_mean_difference():
    noise = orthogonal(np.random.default_rng(1), 500) @ np.diag(5 * np.arange(1, 501) ** -0.5)
    X, y, _, concept = planted(100, d=500, noise=noise)
    within = X - np.stack([X[y == 0].mean(axis=0), X[y == 1].mean(axis=0)])[y]
    probe, mean = LogisticProbe().fit(X, y), MeanDifference().fit(X, y)
    assert cosine(probe.write_, concept) > 0.9 * cosine(mean.write_, concept) > 0.4
    assert cosine(within.T @ (within @ probe.read_), concept) < 0.5 * cosine(probe.write_, concept)


def test_readers_go_through_scikit_learns_searches():
    X, y, _, _ = planted()
    search = GridSearchCV(LogisticProbe(), {"C": [0.01, 1]}, cv=3).fit(X, y)
    assert search.best_score_ > 0.7
