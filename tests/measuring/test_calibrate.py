"""Calibration: on the testbed, whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

import repe
from repe.data.items import Item, load_items
from repe.measuring.calibrate import _placed, halves
from repe.measuring.costs import costs
from repe.measuring.sweep import sweep
from repe.measuring.tasks import items_of, texts_of
from repe.models.blocks import find_stack
from repe.reading.dose import divergences, short_texts
from repe.reading.extract import read_poles
from repe.steering.edit import Edit
from repe.testbed import FOLDER
from tests import oracles, zoo


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
        *loaded_testbed,
        "honesty",
        readers=["mean"],
        blocks=[0, 1, 3],
        alignment=facts,
        helpfulness=skills,
        limit=0.5,
        tried=None,
    )


def test_a_block_is_chosen_by_what_writing_does_there(calibrated):
    """Block 1 reads as well as block 3, and writing there does next to nothing."""
    _, calibration = calibrated
    for setting, sign in ((calibration.more, 1), (calibration.less, -1)):
        assert setting.trial.blocks == (3,)
        assert setting.vector.recommended == (3,)
        assert sign * setting.alpha > 0
        assert setting.test.gain.low > 0.5
        assert setting.test.loss.value <= calibration.budget
        read = {trial.blocks[0]: trial.accuracy for trial in setting.trials}
        gained = {trial.blocks[0]: trial.validation.gain.value for trial in setting.trials}
        assert read[1] > 0.99
        assert gained[1] < 0.6 * gained[3]


def test_only_what_is_forecast_to_be_best_is_tried(loaded_testbed):
    model, tokenizer = loaded_testbed
    poles = read_poles(model, tokenizer, "honesty")
    vectors, items = {name: poles.fitted(name) for name in ("mean", "probe")}, items_of("honesty", model)[::8]
    how = {"alignment": items, "neutral": texts_of("neutral", model), "blocks_at": None, "progress": False}
    found = repe.forecast(model, tokenizer, vectors, **how)
    tried = _placed(model, tokenizer, vectors, 5, **how)
    assert [(v.provenance["reader"], v.recommended) for v in tried] == found.ranked()[:5]
    assert any(len(v.recommended) > 1 for v in tried)
    singles = _placed(model, tokenizer, vectors, None, **how)
    assert [(v.provenance["reader"], v.recommended) for v in singles] == [(n, (b,)) for n in vectors for b in range(6)]
    for vector in (*tried, *singles):
        lengths = Edit.of(vector).on(find_stack(model)).lengths
        pushes = {find_stack(model).blocks[b]: x * vector.write[vector.row(b)] for b, (x, _) in lengths.items()}
        assert np.mean(divergences(model, pushes, short_texts(model, tokenizer), 1.0)) == pytest.approx(0.1, rel=0.12)


def test_blocks_in_a_row_are_tried_together_with_the_others(loaded_testbed):
    """What is said of the chosen ones is what steering there does, at doses that were measured together."""
    found = repe.calibrate(*loaded_testbed, "honesty", readers="mean", tried=2, blocks=[2, 3], requests=None)
    together = [trial for trial in found.more.trials if trial.blocks == (2, 3)]
    assert len(found.more.trials) == 2
    assert len(together) == 1
    assert together[0].where == "blocks 2 to 3"
    assert together[0].validation.gain.low > 0.3
    many = repe.calibrate(*loaded_testbed, "honesty", readers="mean", tried=9, blocks=[2, 3], requests=None)
    assert [trial.blocks for trial in many.more.trials].count((2, 3)) == 1
    assert len(many.more.trials) == 3


def test_nothing_is_tried_before_a_gate(loaded_testbed):
    """However few are tried, and however efficient it is to steer there; the gate's block itself may be."""
    gate = repe.Gate(read_poles(*loaded_testbed, "harmfulness").fitted("mean"), block=3)
    found = repe.calibrate(*loaded_testbed, "honesty", readers="mean", tried=2, requests=None, gate=gate)
    assert [min(trial.blocks) >= 3 for trial in found.more.trials] == [True, True]
    with pytest.raises(ValueError, match="reads behind every block"):
        repe.calibrate(*loaded_testbed, "honesty", readers="mean", blocks=[0, 1], requests=None, gate=gate)


def test_a_place_without_a_dose_is_told_and_not_tried(loaded_testbed, monkeypatch):
    monkeypatch.setattr(repe.reading.dose, "LONGEST", 1e-4)
    found = repe.calibrate(*loaded_testbed, "honesty", readers="mean", tried=2, requests=None)
    assert "norms of" in found.more.trial.reason
    assert not found.more.alpha


def test_the_farthest_alpha_is_where_the_divergence_reaches_the_limit(calibrated, loaded_testbed):
    model, tokenizer = loaded_testbed
    trial = next(t for t in calibrated[1].more.trials if t.blocks == (3,))
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


def test_what_is_chosen_comes_with_its_side_effects(calibrated, loaded_testbed):
    for setting in (calibrated[1].more, calibrated[1].less):
        found = repe.measuring.side_effects(*loaded_testbed, setting.vector, [setting.alpha])
        assert setting.side_effects == found
        assert all(line.strip() in str(calibrated[1]) for line in str(found).splitlines())


def test_a_vector_cannot_be_calibrated(tokenizer):
    with pytest.raises(TypeError, match="got a vector, and calibration fits one for every reader: give the concept's"):
        repe.calibrate(zoo.build("llama"), tokenizer, oracles.vector(3))


@pytest.mark.parametrize("wrong", [{"limit": 0.0}, {"budget": -1.0}])
def test_a_limit_and_a_budget_are_positive(wrong, loaded_testbed):
    with pytest.raises(ValueError, match="are positive, got"):
        repe.calibrate(*loaded_testbed, "honesty", **wrong)
