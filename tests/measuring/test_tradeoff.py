"""The trade-off: what is measured alone, put together."""

from dataclasses import replace

import numpy as np
import pytest

import repe
from repe.data.items import Item, RequestPair
from repe.measuring.chance import Sensitivity
from repe.measuring.costs import costs
from repe.measuring.curve import Scores
from repe.measuring.scoring import log_likelihoods
from repe.measuring.sweep import sweep
from repe.measuring.tasks import items_of, texts_of
from repe.models.blocks import find_stack
from repe.steering.steer import edit_of
from tests import oracles, zoo

TEXTS = ["a text of some length", "short", "another text, with the same b", "a text of some kind"]
SMALL = 0.02  # of a dose: the testbed leaves the quadratic early
ALPHAS = [-2.0, 0.0, 0.5, 3.0]
ITEMS = [
    Item(({"role": "user", "content": f"{word}?"},), ("yes", "no", "so it is")[: 2 + i % 2], i % 2, f"g{i // 2}")
    for i, word in enumerate("abcdefgh")
]


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.tokenizer()


# the trade-off


@pytest.fixture(scope="module")
def measured(tokenizer):
    model = zoo.build("llama")
    curve = repe.tradeoff(
        model, tokenizer, oracles.vector(3), [3, -2.0, 0.5, 3], alignment=ITEMS, helpfulness=ITEMS[:5], neutral=TEXTS,
        controls=2, baseline={"kind": "Be kind.", "rude": "Be rude."}, scope="answer",
    )  # fmt: skip
    return model, curve


def test_a_curve_holds_what_the_sweep_and_the_costs_measure(measured, tokenizer):
    model, curve = measured
    tasks = {"vector": ITEMS, "helpfulness": ITEMS[:5]}
    scores = sweep(model, tokenizer, oracles.vector(3), tasks, ALPHAS, scope="answer")
    assert curve.alphas.tolist() == ALPHAS
    np.testing.assert_allclose(curve.alignment.log_likelihoods, scores["vector"].log_likelihoods, atol=1e-5)
    np.testing.assert_allclose(curve.helpfulness.log_likelihoods, scores["helpfulness"].log_likelihoods, atol=1e-5)
    expected = costs(model, tokenizer, oracles.vector(3), TEXTS, ALPHAS, scope="answer")
    np.testing.assert_allclose(curve.costs.kl, expected.kl, atol=1e-6)
    assert curve.provenance["scope"] == "'answer'"
    assert curve.provenance["blocks"] == list(oracles.vector(3).recommended)
    assert curve.provenance["baseline"] == {"kind": "Be kind.", "rude": "Be rude."}


def test_the_control_is_a_sweep_along_random_directions_of_the_lengths_it_tells(measured, tokenizer):
    model, curve = measured
    for row, seed in enumerate(curve.control.seeds.tolist()):
        other, pushed = (
            repe.ConceptVector.random(oracles.vector(3), seed),
            curve.control.lengths[row] * np.array(ALPHAS),
        )
        scores = sweep(model, tokenizer, other, {"t": ITEMS, "h": ITEMS[:5]}, pushed, scope="answer")
        np.testing.assert_allclose(curve.control.behaviour[row], scores["t"].behaviour.mean(1), atol=1e-5)
        np.testing.assert_allclose(curve.control.difference[row], scores["t"].difference.mean(1), atol=1e-4)
        np.testing.assert_allclose(curve.control.helpfulness[row], scores["h"].probability.mean(1), atol=1e-5)


def test_random_directions_are_pushed_until_they_cost_what_the_concept_costs(loaded_testbed):
    model, tokenizer = loaded_testbed
    vector = repe.extract(model, tokenizer, "honesty")
    items, texts, small = items_of("honesty", model)[:20], texts_of("neutral", model)[:20], 5 * SMALL
    how = {"alignment": items, "helpfulness": items, "neutral": texts, "controls": 3, "blocks": 4}
    curve = repe.tradeoff(model, tokenizer, vector, [-small, small], **how)
    for seed, length in zip(curve.control.seeds.tolist(), curve.control.lengths, strict=True):
        other, pushed = repe.ConceptVector.random(vector, seed), [-small * length, small * length]
        spent = costs(model, tokenizer, other, texts[::2], pushed, blocks=4).kl.mean()
        assert spent == pytest.approx(curve.costs.kl[[0, 2], ::2].mean(), rel=0.3)


@pytest.mark.parametrize("blocks", [[2], [1, 3]])
def test_the_slopes_of_random_directions_are_what_steering_along_them_gives(blocks, loaded_testbed):
    model, tokenizer = loaded_testbed
    vector = repe.extract(model, tokenizer, "honesty")
    items = items_of("honesty", model)[:20]
    how = {"alignment": items, "helpfulness": items, "neutral": texts_of("neutral", model)[:20], "blocks": blocks}
    curve = repe.tradeoff(model, tokenizer, vector, [-SMALL, SMALL], controls=12, **how)
    edit = edit_of(model, vector, tokenizer, blocks=blocks)
    lengths = [length for length, _ in edit.on(find_stack(model)).lengths.values()]
    sites = [find_stack(model).blocks[block] for block in blocks]
    found = Sensitivity.of(model, tokenizer, sites, items, how["neutral"], "all")
    pushes = np.array(lengths)[:, None]

    def along(unit):
        return (found.gradients.mean(0).numpy() * pushes * unit).sum((-2, -1))

    steered = (curve.control.difference[:, 2] - curve.control.difference[:, 0]) / (2 * SMALL)
    for seed, slope, ratio in zip(range(12), steered, curve.control.lengths, strict=True):
        other = repe.ConceptVector.random(vector, seed)
        expected = ratio * along(np.stack([other.write[other.row(block)] for block in blocks]))
        assert slope == pytest.approx(expected, rel=0.1, abs=0.05)

    def root(unit):
        return np.sqrt((np.einsum("nsd,...sd->...n", found.samples.numpy(), pushes * unit) ** 2).mean(-1))

    drawn = np.random.default_rng(0).normal(size=(3000, len(blocks), vector.d_model))
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    own = root(np.stack([vector.write[vector.row(block)] for block in blocks]))
    assert len(curve.control.slopes) == 1000
    assert curve.control.slopes.std() == pytest.approx((along(drawn) * own / root(drawn)).std(), rel=0.08)


@pytest.mark.parametrize("how", [{"keep_norm": True}, {"edit": "piecewise"}])
def test_what_no_gradient_knows_is_steered_along_more_of_them(how, tokenizer):
    given = {"alignment": ITEMS[:4], "helpfulness": ITEMS[:4], "neutral": None}
    many, few = (
        repe.tradeoff(zoo.build("llama"), tokenizer, oracles.vector(3), [1.0], **given, **options)
        for options in (how, {})
    )
    assert (len(many.control.seeds), many.control.slopes) == (20, None)
    assert (len(few.control.seeds), len(few.control.slopes)) == (4, 1000)
    assert (many.control.lengths == 1).all()


def test_items_that_ask_for_a_letter_are_asked_in_words_unless_letters_are_wanted(tokenizer):
    lettered = [replace(i, prompt=f"{i.prompt[0]['content']}\n(A) yes\n(B) no", options=("A", "B")) for i in ITEMS]
    asked = {"alignment": lettered, "helpfulness": lettered, "neutral": None, "controls": 0, "all_items": True}
    for letters, options in ((False, ("yes", "no")), (True, ("A", "B"))):
        model = zoo.build("llama")
        curve = repe.tradeoff(model, tokenizer, oracles.vector(3), [1.0], letters=letters, **asked)
        prompt = lettered[0].prompt if letters else lettered[0].prompt.partition("\n")[0]
        expected = log_likelihoods(model, tokenizer, [Item(prompt, options)])[0]
        np.testing.assert_allclose(curve.alignment.log_likelihoods[0, 0], expected, atol=1e-4)
        assert curve.provenance["worded"] is not letters


def test_a_curve_ends_with_the_side_effects_of_what_it_recommends(loaded_testbed):
    model, tokenizer = loaded_testbed
    given = {"alignment": items_of("honesty", model)[:24], "helpfulness": items_of("skills", model)[:40]}
    curve = repe.tradeoff(model, tokenizer, "honesty", [-0.5, 0.5], neutral=None, controls=1, **given)
    assert curve.best().alpha == 0.5
    expected = repe.measuring.side_effects(model, tokenizer, "honesty", [0.5])
    assert curve.side_effects == expected
    assert str(curve).endswith(str(expected))
    nothing = repe.tradeoff(model, tokenizer, "honesty", [0.3, 0.9], neutral=None, **dict.fromkeys(given, ITEMS[:4]))
    assert nothing.best().alpha == 0
    assert nothing.side_effects.alphas.tolist() == [0, 0.9]
    without = repe.tradeoff(model, tokenizer, "honesty", [0.5], neutral=None, requests=None, controls=0, **given)
    assert without.side_effects is None


def test_what_it_takes_is_said_before_it_starts_and_not_when_it_goes_on(tokenizer, capfd, tmp_path):
    said = []
    for resume in (None, tmp_path / "kept.jsonl", tmp_path / "kept.jsonl"):
        repe.tradeoff(
            zoo.build("llama"), tokenizer, oracles.vector(3), [1.0, 2.0], alignment=ITEMS, helpfulness=ITEMS,
            neutral=None, progress=True, resume=resume,
        )  # fmt: skip
        said.append("items at 15 strengths, random directions included: about" in capfd.readouterr().err)
    assert said == [True, True, False]


def test_the_baseline_is_the_unsteered_model_under_each_prompt(measured, tokenizer):
    model, curve = measured
    assert curve.baseline.prompts == ("kind", "rude")
    for row, prompt in enumerate(("Be kind.", "Be rude.")):
        asked = [replace(item, prompt=({"role": "system", "content": prompt}, *item.prompt)) for item in ITEMS]
        for found, expected in zip(
            curve.baseline.alignment.log_likelihoods[row], log_likelihoods(model, tokenizer, asked), strict=True
        ):
            np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)


def test_a_prompt_stands_before_what_the_system_message_says(tokenizer):
    model = zoo.build("llama")
    items = [replace(i, prompt=({"role": "system", "content": "Be brief."}, *i.prompt)) for i in ITEMS]
    curve = repe.tradeoff(
        model, tokenizer, oracles.vector(3), [1.0], alignment=items, helpfulness=items, neutral=None, controls=0,
        baseline={"kind": "Be kind."},
    )  # fmt: skip
    asked = [replace(i, prompt=({"role": "system", "content": "Be kind. Be brief."}, i.prompt[1])) for i in items]
    expected = log_likelihoods(model, tokenizer, asked)[0]
    np.testing.assert_allclose(curve.baseline.alignment.log_likelihoods[0, 0, : len(expected)], expected, atol=1e-5)
    assert curve.control is None
    assert curve.costs.kl is None


def test_what_is_no_chat_has_no_baseline_and_scores_may_come_from_elsewhere(tokenizer):
    model = zoo.build("llama")
    plain = [replace(item, prompt=item.prompt[0]["content"]) for item in ITEMS]
    elsewhere = Scores("harness", np.log(np.full((2, 3, 2), 0.5)), np.zeros(3, int), ("a", "b", "c"))
    curve = repe.tradeoff(
        model, tokenizer, oracles.vector(3), [1.0], alignment=plain, helpfulness=elsewhere, neutral=None
    )
    assert curve.baseline is None
    assert curve.control is None
    assert curve.helpfulness == replace(elsewhere, name="helpfulness")
    assert curve.alphas.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"controls": 1, "edit": "ablate"}, "controls=1: the edit 'ablate' has no length"),
        ({"controls": -1}, "controls=-1 must be a whole number, 0 at least"),
        ({"baseline": "Be kind."}, "baseline is system prompts by name"),
        ({"alignment": [replace(ITEMS[0], prompt="a?")], "baseline": {"x": "Be kind."}}, "system prompts need chats"),
        ({"helpfulness": Scores("h", np.log(np.full((3, 2, 2), 0.5)), np.zeros(2, int), ("a", "b"))}, "at 3 alphas"),
        ({"neutral": "a text"}, "no task is called 'a text'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_run(wrong, message, tokenizer, monkeypatch):
    monkeypatch.setattr("repe.measuring.scoring.TransformersScorer._filled", lambda *_: pytest.fail("it ran"))
    given = {"alignment": ITEMS, "helpfulness": ITEMS, "neutral": TEXTS, **wrong}
    with pytest.raises(ValueError, match=message):
        repe.tradeoff(zoo.build("llama"), tokenizer, oracles.vector(3), [1.0], **given)


def test_an_edit_without_a_length_has_no_control(tokenizer):
    model = zoo.build("llama")
    curve = repe.tradeoff(
        model, tokenizer, oracles.vector(3), [1.0], alignment=ITEMS, helpfulness=ITEMS, neutral=None, edit="ablate"
    )
    assert curve.control is None


def test_controls_know_the_concept_s_lengths_in_every_unit(tokenizer):
    model = zoo.build("llama")
    curve = repe.tradeoff(
        model, tokenizer, oracles.vector(3), [1.0], alignment=ITEMS, helpfulness=ITEMS, neutral=None, unit="sigma",
        controls=1,
    )  # fmt: skip
    assert np.isfinite(curve.control.behaviour).all()


def test_nothing_stays_on_the_model(measured):
    assert repe.detach(measured[0]) == 0
    assert not any("forward" in vars(module) for module in measured[0].modules())


def test_an_unknown_task_says_which_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"no task is called 'skils'\. Did you mean 'skills'"):
        repe.tradeoff(zoo.build("llama"), tokenizer, oracles.vector(3), alignment=ITEMS, helpfulness="skils")


def test_requests_that_cannot_be_used_are_refused_before_anything_is_run(tokenizer, monkeypatch):
    monkeypatch.setattr("repe.measuring.scoring.TransformersScorer._filled", lambda *_: pytest.fail("it ran"))
    pair = RequestPair("Tell a lie.", "Tell a tale.")
    for requests, error in (([pair] * 2, ValueError), (["a", "b", "c", "d"], TypeError)):
        with pytest.raises(error, match=r"requests|request 0"):
            repe.tradeoff(
                zoo.build("llama"), tokenizer, oracles.vector(3), [1.0], alignment=ITEMS, helpfulness=ITEMS,
                requests=requests,
            )  # fmt: skip


def test_a_forecast_is_not_resumed_where_other_answers_are_aligned(tokenizer, tmp_path):
    given = {"helpfulness": ITEMS, "neutral": None, "requests": None, "controls": 1}
    turned = [replace(item, answer=1 - item.answer) if i % 2 else item for i, item in enumerate(ITEMS)]
    reaches = []
    for items, kept in ((ITEMS, "kept"), (turned, "kept"), (turned, "fresh")):
        curve = repe.tradeoff(
            zoo.build("llama"), tokenizer, oracles.vector(3), [1.0], alignment=items, resume=tmp_path / kept, **given
        )
        reaches.append(float(np.abs(curve.control.slopes).mean()))
    assert reaches[1] == pytest.approx(reaches[2], rel=1e-5)
    assert reaches[0] != pytest.approx(reaches[1], rel=1e-3)
