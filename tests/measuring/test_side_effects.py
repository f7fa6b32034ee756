"""Side effects: the direction is that of the activations, the shares are those of the texts, and nothing is left."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import repe
from repe.data.items import RequestPair, load_requests
from repe.measuring import TransformersScorer, scoring, side_effects
from repe.measuring.curve import SideEffects, _built, _listed
from repe.measuring.intervals import proportion
from repe.measuring.side_effects import PAIRS, cosine, side_effects_at, usual_cosine
from repe.steering import Edit
from repe.testbed import FOLDER, world
from tests import zoo
from tests.oracles import hooks_of, vector

WORDS = ["ab", "cd", "ef", "gh", "ij", "kl"]
TEXTS = [RequestPair(f"please {word} yes", f"please {word} no") for word in WORDS]
CHATS = [
    RequestPair(*([{"role": "user", "content": text}] for text in (pair.harmful, pair.harmless))) for pair in TEXTS
]
MANY = [RequestPair(f"{a}{b} yes", f"{a}{b} no") for a in "abcdefg" for b in "hijk"]
LETTERS = np.random.default_rng(0).choice([*"abcdefghijklmnopqrstuvwxyz"], (len(MANY), 2, 6))
CHANCE = [RequestPair(*("".join(text) for text in pair)) for pair in LETTERS]
SHORT = {"requests": TEXTS, "max_new_tokens": 2}
RAW = {"unit": "raw", "blocks": [1, 2]}


def refusal_direction(model, tokenizer, pairs=TEXTS, block=1):
    """Text by text, by transformers' own way to look inside."""
    last = [
        [
            model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[block + 1][0, -1]
            for text in (pair.harmful, pair.harmless)
        ]
        for pair in pairs
    ]
    with torch.no_grad():
        means = torch.stack([torch.stack(row) for row in last]).double().mean(0)
    return (means[0] - means[1]).detach()


def along(*rows):
    """A vector that writes these directions."""
    write = torch.stack(rows).float()
    return replace(vector(n_blocks=len(rows)), write=write, read=write)


def unit(direction):
    return direction / direction.norm()


@pytest.fixture
def says(monkeypatch):
    """Lets the model say what a function of a prompt and a strength says, and keeps what it was asked."""
    asked = []

    def saying(of):
        def write(self, prompts, edit, alphas, *, max_new_tokens):
            asked.append((list(prompts), list(alphas), max_new_tokens))
            return [[of(prompt, alpha) for prompt in prompts] for alpha in alphas]

        monkeypatch.setattr(TransformersScorer, "write", write)
        return asked

    return saying


def seen(**changes):
    """Some side effects of two blocks, three strengths and four requests."""
    found = {
        "alphas": [-1, 0, 1], "blocks": [1, 2], "cosine": [0.1, -0.3], "random": 0.2, "ordered": [[1] * 6, [1] * 6],
        "harmful": [[0] * 4, [1] * 4, [1, 0, 0, 0]], "harmless": [[0] * 4, [0] * 4, [0, 1, 0, 0]],
    }  # fmt: skip
    return SideEffects(**(found | changes))


# the direction


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_the_cosine_is_that_with_the_difference_of_the_mean_last_activations(model, tokenizer, site):
    concept = vector(site=site)
    found = side_effects(model, tokenizer, concept, [1], **RAW, **SHORT)
    expected = [unit(concept.write[b].double()) @ unit(refusal_direction(model, tokenizer, block=b)) for b in (1, 2)]
    assert found.blocks.tolist() == [1, 2]
    np.testing.assert_allclose(found.cosine, expected, atol=1e-5)
    assert abs(found.cosine).max() > 0.02


@pytest.mark.parametrize("sign", [1, -1])
def test_the_refusal_direction_lies_along_itself_and_against_its_negative(model, tokenizer, sign):
    own = along(*(sign * unit(refusal_direction(model, tokenizer, block=b)) for b in range(zoo.N_BLOCKS - 1)))
    assert side_effects(model, tokenizer, own, [1], **RAW, **SHORT).cosine == pytest.approx([sign] * 2, abs=1e-5)
    scaled = side_effects(model, tokenizer, own, [1], blocks=1, unit="gap", **SHORT)
    assert scaled.cosine == pytest.approx([sign], abs=1e-5)


def test_an_edit_that_depends_on_the_activation_has_the_direction_or_the_space_it_writes_in(model, tokenizer):
    first, second = vector(), vector(1)
    plain = side_effects(model, tokenizer, first, [1], blocks=1, unit="raw", **SHORT)
    for how in ({"edit": "ablate"}, {"edit": "clamp", "target": 1.0}):
        assert side_effects(model, tokenizer, first, [1], blocks=1, **how, **SHORT).cosine == pytest.approx(
            plain.cosine
        )
    both = side_effects(model, tokenizer, [first, second], [1], blocks=1, edit="ablate", **SHORT)
    of, rows = unit(refusal_direction(model, tokenizer)), torch.stack([first.write[1], second.write[1]]).double()
    inside = rows.T @ torch.linalg.lstsq(rows.T, of[:, None]).solution
    assert both.cosine == pytest.approx([float(inside.norm())], abs=1e-5)
    assert both.random == usual_cosine(2, zoo.D_MODEL) > plain.random == usual_cosine(1, zoo.D_MODEL)
    added = side_effects(model, tokenizer, [first, second], [1], blocks=1, unit="raw", **SHORT)
    assert added.cosine == pytest.approx([float(unit(rows.sum(0)) @ of)], abs=1e-5)
    assert added.random == plain.random


@pytest.mark.parametrize(("rows", "d_model"), [(1, 8), (1, 64), (3, 32)])
def test_95_of_100_random_directions_lie_within_the_range(rows, d_model):
    drawn, space = torch.randn(4000, d_model, dtype=torch.float64), torch.randn(rows, d_model, dtype=torch.float64)
    within = [abs(cosine(space, direction)) <= usual_cosine(rows, d_model) for direction in drawn]
    assert np.mean(within) == pytest.approx(0.95, abs=0.012)


def test_a_space_that_is_all_there_is_holds_every_direction():
    space, direction = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert cosine(space, direction) == pytest.approx(usual_cosine(3, 3)) == 1
    assert cosine(space[:1], torch.zeros(3, dtype=torch.float64)) == 0


def test_every_half_is_ordered_by_the_direction_of_the_other(model, tokenizer):
    found = side_effects(model, tokenizer, vector(), [1], requests=CHANCE, pairs=1, max_new_tokens=1, seed=3, **RAW)
    order = np.random.default_rng(3).permutation(len(CHANCE))
    for row, block in enumerate(found.blocks.tolist()):
        apart = torch.stack([refusal_direction(model, tokenizer, [pair], block) for pair in CHANCE])
        for fitted, held in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            assert found.ordered[row, held].tolist() == (apart[held] @ apart[fitted].mean(0) > 0).tolist()
    assert found.accuracy == proportion(round(found.ordered.mean(0).sum()), len(CHANCE))


def test_where_what_is_harmful_cannot_be_told_the_direction_is_not_known(model, tokenizer):
    known, unknown = (
        side_effects(model, tokenizer, vector(), [1], requests=pairs, pairs=1, max_new_tokens=1, **RAW)
        for pairs in (MANY, CHANCE)
    )
    assert known.is_known
    assert known.accuracy.value == 1
    assert "95% of random directions within" in str(known)
    assert not unknown.is_known
    assert str(unknown).startswith(f"refusal direction not known: it orders {unknown.accuracy.value:.0%} [")


# the refusals


def test_the_shares_are_those_of_the_texts_that_the_steered_model_writes(testbed):
    model, tokenizer = testbed
    strong = {"harmfulness": [-2.0, 0.5], "happiness": [1.0]}
    pairs = load_requests(FOLDER / "tasks" / "requests.jsonl")
    for concept, alphas in strong.items():
        found = side_effects(model, tokenizer, concept, alphas, blocks=1, pairs=32)
        assert found.alphas.tolist() == sorted([0.0, *alphas])
        for row, alpha in enumerate(found.alphas.tolist()):
            for kind in ("harmful", "harmless"):
                with repe.steer(model, concept, alpha, blocks=1, tokenizer=tokenizer):
                    texts = repe.generate(model, tokenizer, [getattr(p, kind) for p in pairs], max_new_tokens=32)
                assert getattr(found, kind)[row].tolist() == [world.is_refusal(text) for text in texts]


def test_a_direction_that_makes_the_model_comply_or_refuse_is_seen(testbed):
    found = side_effects(*testbed, "harmfulness", [-1, 0.5], blocks=1)
    complies, plain, refuses = ({k: found.estimates(k)[i].value for k in ("harmful", "harmless")} for i in range(3))
    assert plain == {"harmful": 1, "harmless": 0}
    assert complies["harmful"] < 0.2
    assert refuses["harmless"] > 0.8
    assert found.cosine[0] > 0.9 > found.random


def test_a_concept_apart_from_refusing_has_no_side_effects(testbed):
    found = side_effects(*testbed, "happiness", [0.5])
    assert abs(found.cosine.mean()) < found.random
    for kind in ("harmful", "harmless"):
        unsteered, steered = found.estimates(kind)
        assert steered == unsteered


def test_a_text_refuses_where_the_judge_says_so_or_where_it_begins_as_the_pair_says(model, tokenizer, says):
    says(lambda prompt, alpha: "I can't help with that." if alpha else "\nNever ever, sir.")
    spoken = [replace(pair, refusals=("Never", "Not I")) for pair in TEXTS]
    judged = side_effects(model, tokenizer, vector(), [1], **SHORT, unit="raw")
    begun = side_effects(model, tokenizer, vector(), [1], **SHORT | {"requests": spoken}, unit="raw")
    for kind in ("harmful", "harmless"):
        assert getattr(judged, kind).tolist() == [[0] * 6, [1] * 6]
        assert getattr(begun, kind).tolist() == [[1] * 6, [0] * 6]


def test_refusals_of_harmful_requests_are_not_taken_for_those_of_harmless_ones(model, tokenizer, says):
    says(lambda prompt, alpha: "I can't help with that." if prompt.endswith("yes") else "Of course.")
    found = side_effects(model, tokenizer, vector(), [1], **SHORT, unit="raw")
    assert found.harmful.all()
    assert not found.harmless.any()


def test_as_many_pairs_are_answered_as_is_said_and_at_the_strengths_that_are_asked_for(model, tokenizer, says):
    asked = says(lambda prompt, alpha: "")
    for seed in (0, 0, 1):
        side_effects(model, tokenizer, vector(), [2, -1, 2], **SHORT | {"pairs": 3, "seed": seed}, unit="raw")
    (prompts, alphas, longest), again, other = asked
    assert (alphas, longest) == ([-1, 0, 2], 2)
    assert [prompt.replace("yes", "no") for prompt in prompts[:3]] == prompts[3:]
    assert (prompts, alphas, longest) == again
    assert {*prompts} < {text for pair in TEXTS for text in (pair.harmful, pair.harmless)}
    assert prompts != other[0]
    assert sorted(map(prompts.index, prompts[:3])) == [0, 1, 2]


def test_by_default_the_requests_are_the_models_own_or_the_librarys(testbed, model, tokenizer, says):
    asked = says(lambda prompt, alpha: "")
    side_effects(*testbed, "honesty", [1])
    side_effects(model, tokenizer, vector(), [1], unit="raw")
    for (prompts, _, _), home in zip(asked, (FOLDER, repe.data.catalogue.LIBRARY), strict=True):
        own = load_requests(home / "tasks" / "requests.jsonl")
        assert len(prompts) == 2 * PAIRS
        assert {*map(str, prompts[:PAIRS])} <= {str(pair.harmful) for pair in own}
        assert {*map(str, prompts[PAIRS:])} <= {str(pair.harmless) for pair in own}


def test_no_text_is_written_twice(model, tokenizer, tmp_path, monkeypatch):
    how = {**SHORT, "unit": "raw", "resume": tmp_path / "record.jsonl"}
    first = side_effects(model, tokenizer, vector(), [1], **how)
    monkeypatch.setattr(scoring, "continuations", lambda *_, **__: pytest.fail("written again"))
    assert side_effects(model, tokenizer, vector(), [1], **how) == first


# what is not measured


def test_chats_without_a_template_are_not_measured_and_texts_are(model):
    bare = zoo.tokenizer(chat=False)
    found = side_effects(model, bare, vector(), [1], requests=CHATS, **RAW)
    assert str(found) == ("side effects not measured: the requests are chats, and the tokenizer has no chat template")
    assert not found.is_known
    assert found.harmful is None
    for ask in (lambda: found.accuracy, lambda: found.estimates("harmful")):
        with pytest.raises(ValueError, match="were not measured: the requests are chats"):
            ask()
    assert not side_effects(model, bare, vector(), [1], **RAW, **SHORT).not_measured


@pytest.mark.parametrize("requests", [None, []])
def test_without_requests_nothing_is_measured(model, tokenizer, requests):
    assert (
        side_effects(model, tokenizer, vector(), [1], requests=requests, **RAW).not_measured == "there are no requests"
    )


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ({"requests": TEXTS[:3]}, ValueError, "got 3 pairs of requests, and at least 4 are needed"),
        ({"requests": [*TEXTS, "a"]}, TypeError, r"request 6 is a str: expected RequestPair\(harmful, harmless\)"),
        ({"requests": "request"}, ValueError, "no task is called 'request'. Did you mean 'requests'"),
        ({"pairs": 0}, ValueError, "pairs=0 must be a whole number, 1 at least"),
        ({"alphas": [float("nan")]}, ValueError, "alphas are at least one finite number"),
        ({"scope": torch.ones(1, 2, dtype=torch.bool)}, ValueError, "a mask of one batch is no scope for many"),
        ({"blocks": 9}, IndexError, "9"), ({"untt": "raw"}, TypeError, "did you mean 'unit'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(model, tokenizer, how, error, told):
    with pytest.raises(error, match=told):
        side_effects(model, tokenizer, vector(), **{"alphas": [1], **SHORT, "unit": "raw"} | how)
    assert repe.status(model) == []


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_exception_leaves_the_model_and_the_requests_as_they_were(model, tokenizer, monkeypatch, fails_at):
    before, weights, calls = hooks_of(model), [p.clone() for p in model.parameters()], []
    plain, asked = scoring.continuations, list(TEXTS)

    def failing(*args, **options):
        calls.append(options)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return plain(*args, **options)

    monkeypatch.setattr(scoring, "continuations", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        side_effects(model, tokenizer, vector(), [1], batch_size=4, unit="raw", **SHORT | {"requests": asked})
    assert hooks_of(model) == before
    assert repe.status(model) == []
    assert not model.training
    assert asked == TEXTS
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


# the value


def test_the_inner_function_measures_with_the_scorer_and_the_edit_it_gets(model, tokenizer):
    scorer, edit = TransformersScorer(model, tokenizer), Edit.of(vector(), unit="raw")
    inner = side_effects_at(scorer, edit, [1.0], TEXTS, max_new_tokens=2)
    assert inner == side_effects(model, tokenizer, vector(), [1], unit="raw", **SHORT)


@pytest.mark.parametrize(
    "found", [seen(), SideEffects([0, 1], [2], not_measured="there are no requests")], ids=["", "not"]
)
def test_a_file_gives_back_the_same(found):
    text = json.dumps(asdict(found), default=_listed, allow_nan=False)
    back = _built(SideEffects, json.loads(text), "side effects")
    assert back == found
    assert str(back) == str(found)


def test_all_of_it_is_shown_in_a_line_a_strength():
    none, all_of_4, one = "0% [0, 49]", "100% [51, 100]", "25% [5, 70]"
    assert str(seen()).splitlines() == [
        "cosine with the refusal direction -0.30 at most, at block 2 (95% of random directions within ±0.20)",
        f"refused at alpha -1: harmful {none} (unsteered {all_of_4}), harmless {none} (unsteered {none})",
        f"refused at alpha 1: harmful {one} (unsteered {all_of_4}), harmless {one} (unsteered {none})",
    ]
    unsteered = seen(alphas=[0], harmful=[[1] * 4], harmless=[[0] * 4])
    assert str(unsteered).endswith("\nrefused unsteered: harmful 100% [51, 100], harmless 0% [0, 49]")


def test_where_the_model_refuses_nothing_it_is_said():
    doubt = "; unsteered, harmful requests are not surely refused more than harmless ones)"
    for harmful, harmless, refuses in (([1] * 4, [0] * 4, True), ([0] * 4, [0] * 4, False), ([0] * 4, [1] * 4, False)):
        found = seen(harmful=[[0] * 4, harmful, [0] * 4], harmless=[[0] * 4, harmless, [0] * 4])
        assert found.refuses == refuses
        assert (doubt in str(found).splitlines()[0]) != refuses
    assert not SideEffects([0], [1], not_measured="no requests").refuses


def test_arrays_are_read_only_and_copies():
    given = np.array([[1, 0]] * 3)
    found = seen(harmful=given, harmless=given)
    given[:] = 0
    assert found.harmful.tolist() == [[1, 0]] * 3
    with pytest.raises(ValueError, match="read-only"):
        found.harmful[0, 0] = 0


@pytest.mark.parametrize("name", ["alphas", "blocks", "cosine", "random", "ordered", "harmful", "harmless"])
def test_side_effects_that_differ_anywhere_are_not_equal(name):
    other = {"alphas": [-2, 0, 1], "blocks": [0, 2], "cosine": [0.1, 0.3], "random": 0.1, "ordered": [[0] * 6] * 2}
    other |= dict.fromkeys(("harmful", "harmless"), [[0, 0, 0, 1]] * 3)
    assert seen() == seen()
    assert seen() != seen(**{name: other[name]})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alphas": [1, 0, -1]}, "alphas are sorted"), ({"alphas": [1, 2, 3]}, "0 is among them"),
        ({"cosine": [0.1]}, "`cosine` has 1 rows for 2 blocks"), ({"ordered": [[1]]}, "`ordered` has 1 rows for 2"),
        ({"harmful": [[1]]}, "`harmful` has 1 rows for 3 alphas"), ({"harmless": [[2]] * 3}, r"alone, got \[2\]"),
        ({"random": 2.0}, "a cosine from 0 to 1, got 2.0"), ({"cosine": None}, "all of them, or `not_measured`"),
        ({"not_measured": "no"}, "all of them, or"), ({"harmful": [[0.5]] * 3}, "`harmful` holds whole numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_side_effects_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        seen(**changes)


def test_there_are_two_kinds_of_requests():
    with pytest.raises(KeyError, match="there are no 'rude' requests"):
        seen().estimates("rude")
