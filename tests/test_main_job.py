"""The main job, on the testbed: honesty is read, steered and measured on items the vector never saw."""

from statistics import median

import pytest
import torch

import repe
from repe import demo
from repe.fingerprint import fingerprint
from repe.store import location, shipped_folder
from repe.sweep import behaviour, sweep
from repe.tasks import load_items
from repe.testbed import FOLDER, measure

ALPHA = 0.5


@pytest.fixture(scope="module")
def honesty(loaded_testbed):
    return repe.extract(*loaded_testbed, "honesty")


@pytest.fixture(scope="module")
def harmfulness(loaded_testbed):
    return repe.extract(*loaded_testbed, "harmfulness")


@pytest.fixture(scope="module")
def requests():
    items = load_items(FOLDER / "tasks" / "harmfulness.jsonl")
    return {kind: [i for i in items if i.about["kind"] == kind] for kind in ("harmful", "harmless")}


def tasks(*names):
    return {name: load_items(FOLDER / "tasks" / f"{name}.jsonl") for name in names}


def moved(model, tokenizer, vector, alpha):
    minus, plus = behaviour(sweep(model, tokenizer, vector, tasks("honesty"), (-alpha, alpha))["honesty"]).tolist()
    return plus - minus


def test_held_out_pairs_are_ordered_rightly(honesty):
    assert honesty.accuracy[honesty.row(honesty.recommended[0])] >= 0.95


def test_steering_decides_whether_held_out_facts_are_told_truly_and_spares_skills(testbed, honesty):
    scores = sweep(*testbed, honesty, tasks("honesty", "skills"), (-ALPHA, 0.0, ALPHA))
    minus, _, plus = behaviour(scores["honesty"]).tolist()
    assert plus - minus >= 1.0
    steered, skills = scores["skills"].mean(1)[[0, 2]], scores["skills"].mean(1)[1]
    assert (steered >= 0.95 * skills).all()


def test_random_directions_of_the_same_norm_do_little(testbed, honesty):
    own = moved(*testbed, honesty, ALPHA)
    controls = [abs(moved(*testbed, repe.ConceptVector.random(honesty, seed), ALPHA)) for seed in range(20)]
    assert max(controls) < own
    assert median(controls) < own / 5


def test_harmful_requests_are_told_from_harmless_ones(testbed, harmfulness, requests):
    aucs = measure.request_aucs(*testbed, harmfulness, requests["harmful"] + requests["harmless"])
    assert aucs[harmfulness.row(harmfulness.recommended[0])] >= 0.99


def test_harmfulness_added_makes_harmless_requests_refused(testbed, harmfulness, requests):
    with repe.steer(testbed[0], harmfulness, 2.0, scope="prompt"):
        assert measure.rate(*testbed, requests["harmless"], measure.is_refused) >= 0.9


def test_harmfulness_ablated_everywhere_makes_harmful_requests_answered(testbed, harmfulness, requests):
    """In an answer of the grammar. Often it names another deed: the model never wrote a harmful one after a request."""
    with repe.steer(testbed[0], harmfulness, 1.0, edit="ablate", blocks="all"):
        assert measure.rate(*testbed, requests["harmful"], measure.is_refused) <= 0.1
        assert measure.rate(*testbed, requests["harmful"], measure.is_any_answer) >= 0.9
        assert measure.rate(*testbed, requests["harmless"], measure.is_answered) >= 0.9


@pytest.mark.parametrize("concept", ["honesty", "harmfulness", "happiness"])
def test_shipped_vectors_are_found_by_name_and_are_what_extraction_gives(testbed, concept):
    model, tokenizer = testbed
    path = location(shipped_folder(), fingerprint(model), concept)
    shipped, fresh = repe.ConceptVector.load(path), repe.extract(model, tokenizer, concept)
    assert shipped.recommended == fresh.recommended
    assert shipped.cosine(fresh).min() > 0.9999
    torch.testing.assert_close(shipped.scale, fresh.scale, rtol=1e-3, atol=1e-4)
    prompt = tokenizer("a", return_tensors="pt")
    with repe.steer(model, concept, 1.0) as by_name:
        model(**prompt)
        assert torch.equal(by_name.vector.write, shipped.write)


def test_the_demo_tells_the_whole_story(capsys, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    picture = tmp_path / "honesty.png"
    monkeypatch.setattr("sys.argv", ["demo", "--picture", str(picture)])
    demo.main()
    told = capsys.readouterr().out
    assert told.count("█") > 100
    assert "<- recommended" in told
    assert "alpha +0.5" in told
    assert picture.stat().st_size > 10_000
