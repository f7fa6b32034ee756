"""Costs, the trade-off and its calibration: against slow loops on small models, and on the testbed's known truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import repe
from repe.data.items import Item, load_items
from repe.measuring.calibrate import halves
from repe.measuring.costs import costs
from repe.measuring.curve import Scores
from repe.measuring.scoring import log_likelihoods
from repe.measuring.sweep import sweep
from repe.measuring.tradeoff import texts_of
from repe.models.tokens import encode
from repe.steering.steer import steer
from repe.testbed import FOLDER
from tests import oracles, zoo

TEXTS = ["a text of some length", "short", "another text, with the same b", "a text of some kind"]
ALPHAS = [-2.0, 0.0, 0.5, 3.0]
ITEMS = [
    Item(({"role": "user", "content": f"{word}?"},), ("yes", "no", "so it is")[: 2 + i % 2], i % 2, f"g{i // 2}")
    for i, word in enumerate("abcdefgh")
]


def plain_vector(d_model=zoo.D_MODEL, seed=0):
    return oracles.vector(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.tokenizer()


# costs


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bloom"])
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_costs_are_those_of_a_slow_loop(name, scope, tokenizer):
    """KL(unsteered || steered), cross-entropy and change of the last block's output, text by text in float64."""
    model, vector = zoo.build(name), oracles.vector(3)
    found = costs(model, tokenizer, vector, TEXTS, ALPHAS, scope=scope, batch_tokens=64)
    last = repe.models.blocks.find_stack(model).blocks[-1]
    every = []
    for column, text in enumerate(TEXTS):
        ids = torch.tensor([encode(tokenizer, text)])
        plain, hidden = run(model, last, ids)
        for row, alpha in enumerate(ALPHAS):
            with steer(model, vector, alpha, scope=scope) as handle:
                if scope == "generated":
                    handle.scope = torch.arange(ids.shape[1])[None] >= 1
                steered, moved = run(model, last, ids)
            kl = (plain.exp() * (plain - steered)).sum(-1)[:-1]
            every.append((row, kl))
            entropy = -steered[:-1].gather(-1, ids[0, 1:, None])
            assert found.kl[row, column] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-6)
            assert found.cross_entropy[row, column] == pytest.approx(entropy.mean().item(), rel=1e-4)
            change = (moved - hidden)[:-1].norm(dim=-1).mean().item()
            assert found.change[row, column] == pytest.approx(change, rel=1e-3, abs=1e-4)
    for row in range(len(ALPHAS)):
        tokens = torch.cat([kl for of, kl in every if of == row]).numpy()
        assert found.kl_p95[row] == pytest.approx(max(0, np.quantile(tokens, 0.95)), rel=1e-3, abs=1e-6)
    assert found.kl[1].max() < 1e-9
    assert found.change[1].max() < 1e-4


def run(model, last, ids):
    with torch.no_grad():
        hidden = []
        hook = last.register_forward_hook(lambda module, args, output: hidden.append(output))
        logits = model(ids, use_cache=False).logits[0]
        hook.remove()
    output = hidden[0] if isinstance(hidden[0], torch.Tensor) else hidden[0][0]
    return logits.double().log_softmax(-1), output[0].double()


def test_costs_refuse_what_cannot_be_measured(tokenizer):
    model, vector = zoo.build("llama"), oracles.vector(3)
    with pytest.raises(ValueError, match="at least one text, each of two tokens or more"):
        costs(model, tokenizer, vector, [], [0.0, 1.0])
    with pytest.raises(ValueError, match="against alpha 0, which is not among"):
        costs(model, tokenizer, vector, TEXTS, [1.0])


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


def test_the_control_is_a_sweep_along_random_directions_of_the_same_norm(measured, tokenizer):
    model, curve = measured
    for row, seed in enumerate(curve.control.seeds.tolist()):
        other = repe.ConceptVector.random(oracles.vector(3), seed)
        scores = sweep(model, tokenizer, other, {"t": ITEMS, "h": ITEMS[:5]}, ALPHAS, scope="answer")
        np.testing.assert_allclose(curve.control.behaviour[row], scores["t"].behaviour.mean(1), atol=1e-5)
        np.testing.assert_allclose(curve.control.difference[row], scores["t"].difference.mean(1), atol=1e-4)
        np.testing.assert_allclose(curve.control.helpfulness[row], scores["h"].probability.mean(1), atol=1e-5)


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
        ({"controls": -1}, "controls=-1: a number of random directions, 0 or more"),
        ({"baseline": "Be kind."}, "baseline is system prompts by name"),
        ({"alignment": [replace(ITEMS[0], prompt="a?")], "baseline": {"x": "Be kind."}}, "system prompts need chats"),
        ({"helpfulness": Scores("h", np.log(np.full((3, 2, 2), 0.5)), np.zeros(2, int), ("a", "b"))}, "at 3 alphas"),
        ({"neutral": "a text"}, "no task is called 'a text'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_run(wrong, message, tokenizer, monkeypatch):
    monkeypatch.setattr("repe.measuring.tradeoff.sweeps", lambda *_, **__: pytest.fail("it ran"))
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


def test_costs_in_trees_that_come_out_wrong_are_measured_in_rows(tokenizer, monkeypatch):
    monkeypatch.setattr("repe.measuring.fanout.obstacle", lambda module: "")
    model, vector = zoo.build("mpt"), oracles.vector(3)
    with pytest.warns(UserWarning, match="does not give texts in trees of shared prefixes what it gives them alone"):
        found = costs(model, tokenizer, vector, TEXTS, ALPHAS)
    monkeypatch.undo()
    assert found.kl == pytest.approx(costs(model, tokenizer, vector, TEXTS, ALPHAS).kl, rel=1e-3, abs=1e-5)


def test_costs_of_the_prompt_are_those_of_the_whole_text(tokenizer):
    model, vector = zoo.build("llama"), oracles.vector(3)
    whole = costs(model, tokenizer, vector, TEXTS, ALPHAS, scope="all")
    prompt = costs(model, tokenizer, vector, TEXTS, ALPHAS, scope="prompt")
    np.testing.assert_allclose(prompt.kl, whole.kl, rtol=1e-3, atol=1e-6)


def test_nothing_stays_on_the_model(measured):
    assert repe.detach(measured[0]) == 0
    assert not any("forward" in vars(module) for module in measured[0].modules())


def test_an_unknown_task_says_which_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"no task is called 'skils'\. Did you mean 'skills'"):
        repe.tradeoff(zoo.build("llama"), tokenizer, oracles.vector(3), alignment=ITEMS, helpfulness="skils")


# calibration


def test_halves_keep_groups_together():
    items = [Item(f"{i}?", ("yes", "no"), group=f"g{i // 2}") for i in range(24)]
    first, second = halves(items, items[:20], seed=0)
    for task in (0, 1):
        groups = [{item.group for item in half[task]} for half in (first, second)]
        assert groups[0]
        assert groups[1]
        assert not groups[0] & groups[1]
    assert {i.group for i in first[1]} <= {i.group for i in first[0]}
    with pytest.raises(ValueError, match="items of at least 8 groups: one half chooses"):
        halves(items[:6], items, seed=0)


@pytest.fixture(scope="module")
def calibrated(loaded_testbed):
    facts = load_items(FOLDER / "tasks" / "honesty.jsonl")[::3]
    skills = load_items(FOLDER / "tasks" / "skills.jsonl")[::5]
    return facts, repe.calibrate(
        *loaded_testbed, "honesty", readers=["mean"], blocks=[0, 1, 3], alignment=facts, helpfulness=skills, limit=0.5
    )


def test_a_block_is_chosen_by_what_writing_does_there(calibrated):
    """Block 1 reads as well as block 3, and writing there does next to nothing."""
    _, calibration = calibrated
    for setting, sign in ((calibration.more, 1), (calibration.less, -1)):
        assert setting.trial.block == 3
        assert setting.vector.recommended == (3,)
        assert sign * setting.alpha > 0
        assert setting.test.gain.low > 0.5
        assert setting.test.loss.value <= calibration.budget
        read = {trial.block: trial.accuracy for trial in setting.trials}
        gained = {trial.block: trial.validation.gain.value for trial in setting.trials}
        assert read[1] > 0.99
        assert gained[1] < gained[3] / 2


def test_the_farthest_alpha_is_where_the_divergence_reaches_the_limit(calibrated, loaded_testbed):
    model, tokenizer = loaded_testbed
    trial = next(t for t in calibrated[1].more.trials if t.block == 3)
    texts = texts_of("neutral", model)[:24]
    vector = replace(calibrated[1].more.vector, recommended=(3,))
    p95 = costs(model, tokenizer, vector, texts, [0.0, trial.farthest]).kl_p95[1]
    assert 0.4 < p95 <= 0.5


def test_calibration_reports_on_items_that_had_no_part_in_it(calibrated, loaded_testbed):
    facts, calibration = calibrated
    skills = load_items(FOLDER / "tasks" / "skills.jsonl")[::5]
    _, second = halves(facts, skills, 0)
    setting = calibration.more
    scores = sweep(*loaded_testbed, setting.vector, {"facts": second[0]}, [0.0, setting.alpha])["facts"]
    assert setting.test.gain.value == pytest.approx(float(np.diff(scores.behaviour.mean(1))[0]), abs=1e-4)


def test_a_vector_cannot_be_calibrated(tokenizer):
    with pytest.raises(TypeError, match="got a vector, and calibration fits one for every reader: give the concept's"):
        repe.calibrate(zoo.build("llama"), tokenizer, oracles.vector(3))


@pytest.mark.parametrize("wrong", [{"limit": 0.0}, {"budget": -1.0}])
def test_a_limit_and_a_budget_are_positive(wrong, loaded_testbed):
    with pytest.raises(ValueError, match="are positive, got"):
        repe.calibrate(*loaded_testbed, "honesty", **wrong)
