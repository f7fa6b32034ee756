"""Sweeps: every option of every item at every strength, and what is refused before anything is run."""

from typing import Any

import numpy as np
import pytest
import torch

import repe
from repe.data.items import Item
from repe.measuring.scoring import strengths_of
from repe.measuring.sweep import Exam, sweep
from tests import oracles, zoo
from tests.measuring.test_fanout import ALPHAS, ITEMS, TASKS, built, state_of


@pytest.fixture(scope="module")
def vector() -> Any:
    return oracles.vector(recommended=(2,))


@pytest.fixture
def forwards(monkeypatch: Any, model: Any) -> list[tuple[int, ...]]:
    """The shapes of a Llama's forwards, as they come. Its class is watched: a hook would stop trees."""
    shapes: list[tuple[int, ...]] = []
    kind = type(model.model)
    real = kind.forward

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return shapes


def test_a_task_has_its_own_answers_and_groups_and_the_order_of_its_items(model: Any, tokenizer: Any, vector: Any):
    for name, scores in sweep(model, tokenizer, vector, TASKS, ALPHAS).items():
        assert scores.name == name
        assert scores.answers.tolist() == [item.answer for item in TASKS[name]]
        assert list(scores.groups) == [item.group for item in TASKS[name]]


def test_a_table_has_the_options_of_an_item_in_its_row_and_no_others(tokenizer: Any) -> None:
    exam = Exam(tokenizer, TASKS)
    numbers = -1.0 - torch.arange(2 * len(exam.answers)).reshape(2, -1)
    found = exam.table(numbers)
    rest = numbers.T.tolist()
    for name, items in TASKS.items():
        for column, item in enumerate(items):
            expected = np.array([rest.pop(0) for _ in item.options]).T
            np.testing.assert_array_equal(found[name].log_likelihoods[:, column, : len(item.options)], expected)
            assert np.isnan(found[name].log_likelihoods[:, column, len(item.options) :]).all()


# what cannot be meant


@pytest.mark.parametrize(
    "alphas",
    [
        (0.5, -2, 0), [0.5, -2, -0.0], [0, 0.5, -2.0, 0, 0.5], torch.tensor([0.5, -2.0, 0.0]), np.array([0.5, 0, -2]),
        torch.tensor([0, 0.5, -2]).double(), {0.5, -2, 0}, [np.float32(0.5), torch.tensor(-2), 0], iter((0.5, -2, 0)),
    ],
)  # fmt: skip
def test_strengths_are_sorted_and_each_once_whatever_holds_them(alphas: Any) -> None:
    strengths = strengths_of(alphas)
    assert strengths == [-2.0, 0.0, 0.5]
    assert not np.signbit(strengths[1])


def test_strengths_that_are_one_in_float32_are_one() -> None:
    assert strengths_of([0.1, np.float32(0.1)]) == [0.1]


def test_integers_are_strengths(model: Any, tokenizer: Any, vector: Any) -> None:
    found = sweep(model, tokenizer, vector, TASKS, torch.tensor([2, -1]))
    assert found == sweep(model, tokenizer, vector, TASKS, [-1.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        (1.0, "numbers in a row"), (torch.tensor(1.0), "numbers in a row"), (torch.ones(2, 2), "numbers in a row"),
        ("12", "numbers in a row"), (["1"], "numbers in a row"), ([None], "numbers in a row"),
        (None, "numbers in a row"), ([[1.0], 2.0], "numbers in a row"), ([1j], "numbers in a row"),
        ([], "at least one finite"), ([0.0, np.nan], "at least one finite"), ([np.inf], "at least one finite"),
        ([1e300], "numbers in a row|at least one finite"),
    ],
    ids=repr,
)  # fmt: skip
def test_strengths_that_are_no_row_of_finite_numbers_are_refused(
    model: Any, tokenizer: Any, vector: Any, alphas: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"alphas are ({message})"):
        sweep(model, tokenizer, vector, TASKS, alphas)
    assert not repe.status(model)


@pytest.mark.parametrize(
    ("tasks", "how", "error", "message"),
    [
        ({}, {}, ValueError, "at least one task with items, got {}"),
        ({"t": ITEMS, "u": []}, {}, ValueError, r"at least one task with items, got {'t': 4, 'u': 0}"),
        ({"t": [Item("a", ("b", ""))]}, {}, ValueError, "the option '' has no tokens"),
        ({"t": [*ITEMS, Item("a", ("b",))]}, {}, ValueError, r"items \[4\] of 't' have fewer than two options"),
        (TASKS, {"scope": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "a mask of one batch is no scope"),
        (TASKS, {"scope": [-5]}, IndexError, "position -5 lies before the start of a prompt of 3 tokens"),
        (TASKS, {"scope": "answers"}, ValueError, "scope='answers' is not known"),
        (TASKS, {"scop": "all"}, TypeError, r"an edit has no option 'scop' \(did you mean 'scope'\?\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_before_anything_is_run(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tasks: Any, how: dict, error: type, message: str
) -> None:
    before = state_of(model)
    with pytest.raises(error, match=message):
        sweep(model, tokenizer, vector, tasks, ALPHAS, **how)
    assert not forwards
    assert state_of(model) == before


@pytest.mark.parametrize("name", [*zoo.ENCODERS, *zoo.ENCODER_DECODERS])
def test_models_that_see_the_option_are_refused(name: str, tokenizer: Any, vector: Any) -> None:
    with pytest.raises(ValueError, match=r"(is an encoder-decoder|is not causal).*need a causal language model"):
        sweep(built(name), tokenizer, vector, TASKS, ALPHAS)


def test_a_scope_that_names_no_token_is_not_silent(model: Any, tokenizer: Any, vector: Any) -> None:
    with pytest.warns(UserWarning, match="edited nothing in its lifetime"):
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS, scope=[100])
    assert np.ptp(got["some"].log_likelihoods[:, 0], axis=0).max() == 0


def test_progress_is_shown_where_it_is_asked_for(model: Any, tokenizer: Any, vector: Any, capsys: Any) -> None:
    sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert not capsys.readouterr().err
    sweep(model, tokenizer, vector, TASKS, ALPHAS, progress=True)
    assert "scoring: 100%" in capsys.readouterr().err


def test_the_log_says_in_what_way_texts_are_run(model: Any, tokenizer: Any, vector: Any, caplog: Any) -> None:
    with caplog.at_level("INFO", "repe"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS)
        sweep(built("bloom"), tokenizer, vector, TASKS, ALPHAS)
    assert "in 1 trees, past 3 blocks" in caplog.text
    assert "in padded rows: model type 'bloom' is not among" in caplog.text
