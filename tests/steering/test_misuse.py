"""Misuse: what cannot be meant is refused in words that help, and leaves the model as it was."""

import warnings

import pytest
import torch

import repe
from tests import zoo
from tests.oracles import hooks_of, plain_vector, worded_pairs


@pytest.fixture
def model():
    model = zoo.build("gpt2")
    before = hooks_of(model)
    yield model
    assert hooks_of(model) == before


@pytest.fixture
def prompt(tokenizer):
    return tokenizer("the quick", return_tensors="pt")


def test_a_handle_that_was_removed_is_not_entered_again(model, prompt):
    handle = repe.steer(model, plain_vector(model), 5.0)
    with handle:
        model(**prompt)
    with pytest.raises(RuntimeError, match=r"acts no more: call `repe.steer` again"), handle:
        pass


@pytest.mark.parametrize("name", ["alpah", "blocks", "site", "edit", "gate"])
def test_only_what_may_change_can_be_set(model, prompt, name):
    with repe.steer(model, plain_vector(model), 1.0) as handle:
        model(**prompt)
        with pytest.raises(AttributeError, match=f"'{name}' of a handle cannot be set: alpha, scope"):
            setattr(handle, name, 1)
        handle.alpha, handle.scope = -1.0, "prompt"


def test_nothing_is_extracted_from_a_steered_model(model, tokenizer, prompt):
    with repe.steer(model, plain_vector(model), 5.0):
        model(**prompt)
        with pytest.raises(ValueError, match=r"something steers this model.*remove it first"):
            repe.extract(model, tokenizer, worded_pairs())


def test_a_model_of_one_stack_knows_its_prompt_under_either_name(model, prompt):
    vector = plain_vector(model)
    with repe.steer(model, vector, 5.0, scope="answer"):
        expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    with repe.steer(model, vector, 5.0, scope="answer", stack="encoder"):
        assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("way", ["with", "detach", "remove"])
def test_the_warning_that_nothing_was_edited_points_to_the_caller(model, way):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "with":
            with repe.steer(model, plain_vector(model), 1.0):
                pass
        else:
            handle = repe.steer(model, plain_vector(model), 1.0)
            repe.detach(model) if way == "detach" else handle.remove()
    (warning,) = caught
    assert "edited nothing" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, t, v: repe.extract(t, m, worded_pairs()), TypeError, "expected a model.*is the order right"),
        (
            lambda m, t, v: repe.extract(m, t, [("yes", "no")] * 8),
            TypeError,
            r"pair 0 is a tuple: expected ContrastPair",
        ),
        (lambda m, t, v: repe.steer(m, v, "1"), TypeError, "alpha must be a number.*got '1'"),
        (lambda m, t, v: repe.steer(m, v, None), TypeError, "alpha must be a number.*got None"),
        (lambda m, t, v: repe.steer(m, v, scope=[]), TypeError, "at least one integer"),
        (lambda m, t, v: repe.read(m, t, "abc", "x"), TypeError, "expected a ConceptVector.*got str"),
        (lambda m, t, v: repe.Gate("x"), TypeError, "a gate reads along a ConceptVector, and got str"),
        (lambda m, t, v: repe.read(m, t, "abc", wider(v)), ValueError, "d_model 33.*extract it from this model"),
    ],
)
def test_it_is_refused_in_words_that_help(model, tokenizer, call, kind, message):
    with pytest.raises(kind, match=message):
        call(model, tokenizer, plain_vector(model))


def wider(vector):
    axes = torch.eye(33)[:4]
    ones = torch.ones(4)
    return repe.ConceptVector("wide", vector.blocks, (1,), axes, axes, torch.zeros(4, 33), *[ones] * 5)


def test_a_part_of_the_package_is_found_by_its_name():
    assert callable(repe.ops.pick)
