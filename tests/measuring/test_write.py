"""Writing: every text is what the model writes at that strength alone, and no call does work that was done before."""

import inspect
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import repe
from repe.data.items import Item
from repe.measuring import judges, log_likelihoods, scoring
from repe.measuring.intervals import Measured, proportion
from repe.measuring.write import write
from repe.measuring.writings import Judgement, Writings, distinct, repetition
from tests import zoo
from tests.oracles import plain_vector

PROMPTS = ["a", "the quick brown fox", [{"role": "user", "content": "count"}]]
ALPHAS = [30.0, -30.0]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def vector(model):
    return plain_vector(model)


@pytest.fixture
def generated(monkeypatch):
    """How many texts were generated, call by call."""
    counts, plain = [], scoring.continuations

    def counting(model, tokenizer, texts, **options):
        counts.append(len(texts))
        return plain(model, tokenizer, texts, **options)

    monkeypatch.setattr(scoring, "continuations", counting)
    return counts


def length(prompt, text):
    return len(text)


def assert_alike(one, other):
    """Equal, but for the rounding of likelihoods, which were computed in other batches."""
    np.testing.assert_allclose(one.cross_entropy, other.cross_entropy, rtol=1e-4)
    assert replace(one, cross_entropy=one.tokens) == replace(other, cross_entropy=one.tokens)


def alone(model, tokenizer, vector, alpha, prompt, **options):
    with repe.steer(model, vector, alpha):
        return repe.generate(model, tokenizer, [prompt], do_sample=False, **SHORT, **options)[0]


# the texts


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_text_is_what_the_model_writes_at_its_strength_alone(model, tokenizer, vector, batch_size):
    got = write(model, tokenizer, vector, PROMPTS, ALPHAS, batch_size=batch_size, **SHORT)
    assert got.alphas.tolist() == [-30, 0, 30]
    assert got.prompts == tuple(PROMPTS)
    expected = [[alone(model, tokenizer, vector, a, p) for p in PROMPTS] for a in got.alphas.tolist()]
    assert [list(row) for row in got.texts] == expected
    assert len({row[1] for row in got.texts}) == 3


def test_strengths_share_batches(model, tokenizer, vector, generated):
    write(model, tokenizer, vector, PROMPTS, ALPHAS, batch_size=4, **SHORT)
    assert generated == [4, 4, 1]


@pytest.mark.parametrize("alphas", [(1, -1, 1, 0), torch.tensor([1.0, -1.0]), np.array([-1, 1]), iter([1, -1])])
def test_strengths_are_sorted_and_distinct_and_hold_0(model, tokenizer, vector, alphas):
    assert write(model, tokenizer, vector, ["a"], alphas, max_new_tokens=1).alphas.tolist() == [-1, 0, 1]


@pytest.mark.parametrize("alphas", [[], [math.nan], [1, math.inf], 1.0, ["a"], [[1, 2]]], ids=repr)
def test_strengths_that_are_no_row_of_finite_numbers_are_refused(model, tokenizer, vector, alphas):
    with pytest.raises(ValueError, match="alphas are"):
        write(model, tokenizer, vector, PROMPTS, alphas)


@pytest.mark.parametrize("prompts", [[], "a"])
def test_no_prompts_are_refused(model, tokenizer, vector, prompts):
    with pytest.raises(ValueError, match="at least one prompt"):
        write(model, tokenizer, vector, prompts, ALPHAS)


def test_a_mask_is_no_scope(model, tokenizer, vector):
    with pytest.raises(ValueError, match="a mask of one batch is no scope for many"):
        write(model, tokenizer, vector, PROMPTS, ALPHAS, scope=torch.ones(1, 1, dtype=torch.bool))


def test_steering_goes_where_it_is_told_to(model, tokenizer, vector):
    got = write(model, tokenizer, vector, PROMPTS, [30.0], scope="generated", **SHORT)
    with repe.steer(model, vector, 30.0, scope="generated"):
        assert list(got.texts[1]) == [
            repe.generate(model, tokenizer, [p], do_sample=False, **SHORT)[0] for p in PROMPTS
        ]


def test_it_is_greedy_and_without_dropout_whatever_the_model_does_by_itself(tokenizer):
    model = zoo.build("llama")
    vector = plain_vector(model)
    expected = write(model, tokenizer, vector, PROMPTS, ALPHAS, **SHORT).texts
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=3)
    before = model.generation_config.to_dict()
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.9
    model.train()
    assert write(model, tokenizer, vector, PROMPTS, ALPHAS, **SHORT).texts == expected
    assert model.training
    assert model.generation_config.to_dict() == before
    assert not repe.status(model)


def test_a_concept_is_found_by_its_name(testbed):
    model, tokenizer = testbed
    prompts = [[{"role": "user", "content": "What is 21 minus 4?"}]]
    named = write(model, tokenizer, "honesty", prompts, [1.0])
    assert named == write(model, tokenizer, repe.extract(model, tokenizer, "honesty"), prompts, [1.0])
    assert named.texts[0][0]


# what is said of them


def test_distinct_and_repetition_by_hand():
    ids = [1, 2, 1, 2, 1, 2]
    assert distinct(ids, 1) == 2 / 6
    assert distinct(ids, 2) == 2 / 5
    assert repetition(ids) == pytest.approx(1 - 2 / 3)  # 1212 2121 1212
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 103) == pytest.approx(0.99)
    assert all(map(math.isnan, (repetition([1, 2, 3]), distinct([1], 2), distinct([], 1))))


def test_every_text_is_measured(model, tokenizer, vector):
    got = write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=length, max_new_tokens=12)
    for i, row in enumerate(got.texts):
        for j, text in enumerate(row):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert got.tokens[i, j] == len(ids)
            expected = [repetition(ids), distinct(ids, 1), distinct(ids, 2), len(text)]
            judged = got.judged["length"].values
            measured = [a[i, j] for a in (got.repetition, got.distinct_1, got.distinct_2, judged)]
            np.testing.assert_array_equal(measured, expected)


def small():
    arrays = [np.array([[3.0, 5.0], [0.0, 4.0]]), *(np.array([[0.5, 0.25], [np.nan, np.nan]]) for _ in range(4))]
    return Writings(np.array([0.0, 2.0]), ("p", "q"), (("a", "b"), ("", "d")), *arrays)


def test_it_is_told_in_a_line_a_strength():
    lines = str(small()).splitlines()
    assert lines[0] == "texts after 2 prompts, means by strength"
    assert lines[1].split() == ["alpha", "tokens", "repetition", "perplexity"]
    assert lines[2].split() == ["0", "4", "0.375", f"{math.exp(0.375):.3g}"]
    assert lines[3].split() == ["2", "2", "nan", "nan"]
    assert lines[4:] == ["", "after the prompt 'p'", "alpha  text", "0      a", "2"]


def test_a_frame_has_a_row_a_text():
    frame = small().to_frame()
    measured = ["tokens", "repetition", "distinct_1", "distinct_2", "cross_entropy"]
    assert list(frame.columns) == ["alpha", "prompt", "text", *measured]
    assert frame[["alpha", "prompt", "text", "tokens"]].to_numpy().tolist() == [
        [0, "p", "a", 3], [0, "q", "b", 5], [2, "p", "", 0], [2, "q", "d", 4],
    ]  # fmt: skip


def test_what_was_measured_stays():
    with pytest.raises(ValueError, match="read-only"):
        small().tokens[0, 0] = 7


# judging


def test_a_judge_sees_prompt_and_text_of_a_model_that_nothing_steers(model, tokenizer, vector):
    seen = []

    def judge(prompt, text):
        assert not repe.status(model)
        seen.append((prompt, text))
        return np.float32(len(seen))

    got = write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=judge, **SHORT)
    judged = got.judged["judge"].values
    assert judged.shape == (3, 3)
    assert sorted(judged.ravel()) == list(range(1, 10))
    for i, row in enumerate(got.texts):
        for j, text in enumerate(row):
            assert seen[int(judged[i, j]) - 1] == (PROMPTS[j], text)


@pytest.mark.parametrize(
    "given", [math.nan, None, np.array([True, False]), math.inf, "1", [1.0], torch.ones(2), 1j], ids=repr
)
def test_a_judge_that_gives_no_number_is_told_of_which_text(model, tokenizer, vector, given):
    with pytest.raises(ValueError, match="a judge gives one finite number, and gave") as raised:
        write(model, tokenizer, vector, ["the fox"], [30.0], judge={"a": lambda prompt, text: given}, **SHORT)
    assert "alpha=0 after the prompt 'the fox'" in str(raised.value)
    assert repr(alone(model, tokenizer, vector, 0.0, "the fox")) in str(raised.value)
    assert not repe.status(model)


@pytest.mark.parametrize("given", [True, 2, np.float32(0.5), torch.tensor(3)], ids=repr)
def test_a_judge_may_give_any_one_number(model, tokenizer, vector, given):
    got = write(model, tokenizer, vector, ["a"], [0.0], judge={"a": lambda prompt, text: given}, max_new_tokens=1)
    assert got.judged["a"].values.tolist() == [[float(given)]]


def test_a_judge_that_fails_is_told_of_which_text(model, tokenizer, vector):
    def judge(prompt, text):
        return {}[prompt]

    with pytest.raises(ValueError, match=r"the judge failed on the text .* alpha=-30 after the prompt 'a'.*KeyError"):
        write(model, tokenizer, vector, ["a"], [-30.0], judge=judge, **SHORT)


# going on


def test_a_call_that_was_broken_off_goes_on_from_there(model, tokenizer, vector, generated, monkeypatch, tmp_path):
    path, counting = tmp_path / "new" / "writings.jsonl", scoring.continuations

    def interrupted(*args, **options):
        if len(generated) == 2:
            raise KeyboardInterrupt
        return counting(*args, **options)

    monkeypatch.setattr(scoring, "continuations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, tokenizer, vector, PROMPTS, ALPHAS, batch_size=2, resume=path, **SHORT)
    assert not repe.status(model)
    monkeypatch.setattr(scoring, "continuations", counting)
    with path.open("a") as file:
        file.write('{"alpha": 30.0, "prompt": 2, "te')
    got = write(model, tokenizer, vector, PROMPTS, ALPHAS, batch_size=2, resume=path, **SHORT)
    assert generated == [2, 2, 2, 2, 1]
    assert_alike(got, write(model, tokenizer, vector, PROMPTS, ALPHAS, **SHORT))
    assert [json.loads(line).get("kind") for line in path.read_text().splitlines()].count("text") == 9


def test_what_is_whole_is_not_done_again_and_more_strengths_may_follow(model, tokenizer, vector, generated, tmp_path):
    path, asked = tmp_path / "writings.jsonl", []

    def judge(prompt, text):
        asked.append(text)
        return len(text)

    first = write(model, tokenizer, vector, PROMPTS, [30.0], judge=judge, resume=path, **SHORT)
    again = write(model, tokenizer, vector, PROMPTS, [30.0], judge=judge, resume=path, batch_size=1, **SHORT)
    assert again == first
    assert (generated, len(asked)) == ([6], 6)
    more = write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=judge, resume=path, **SHORT)
    assert (generated, len(asked)) == ([6, 3], 9)
    assert more.texts[1:] == first.texts
    assert_alike(more, write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=judge, **SHORT))


def test_a_mended_judge_of_another_name_needs_no_text_anew_and_judges_all(
    model, tokenizer, vector, generated, tmp_path
):
    path, asked = tmp_path / "writings.jsonl", []

    def make(broken):
        def judge(prompt, text):
            asked.append(text)
            return None if broken and len(asked) == 3 else 7.0

        return judge

    with pytest.raises(ValueError, match="gave None"):
        write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=make(True), resume=path, **SHORT)
    mended = write(model, tokenizer, vector, PROMPTS, ALPHAS, judge={"mended": make(False)}, resume=path, **SHORT)
    assert (generated, len(asked)) == ([9], 3 + 9)
    assert (mended.judged["mended"].values == 7).all()


def test_the_same_judge_goes_on_where_it_failed(model, tokenizer, vector, generated, tmp_path):
    path, asked = tmp_path / "writings.jsonl", []

    def judge(prompt, text):
        asked.append(text)
        return {3: None}.get(len(asked), 7.0)

    with pytest.raises(ValueError, match="gave None"):
        write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=judge, resume=path, **SHORT)
    write(model, tokenizer, vector, PROMPTS, ALPHAS, judge=judge, resume=path, **SHORT)
    assert (generated, len(asked)) == ([9], 3 + 7)


def scaled(prompt, text, by=1.0):
    return by * len(text)


@pytest.mark.parametrize("judge", [partial(scaled, by=2.0), lambda prompt, text: 1.0], ids=["partial", "lambda"])
def test_a_judge_without_a_name_is_given_one(model, tokenizer, vector, generated, judge):
    how = {"max_new_tokens": 1, "judge": judge}
    with pytest.raises(ValueError, match=r"kept under the judge's name, and .* has none: name it, as in judge="):
        write(model, tokenizer, vector, ["a"], [1.0], **how)
    assert not generated
    assert [*write(model, tokenizer, vector, ["a"], [1.0], **how | {"judge": {"of mine": judge}}).judged] == ["of mine"]


def test_judgements_are_kept_by_the_name_of_the_judge(model, tokenizer, vector, tmp_path):
    how = {"max_new_tokens": 6, "resume": tmp_path / "kept"}
    by_length = write(model, tokenizer, vector, PROMPTS, [1.0], judge=length, **how)
    twice = {"length": scaled, "twice": partial(scaled, by=2.0)}
    both = write(model, tokenizer, vector, PROMPTS, [1.0], judge=twice, **how)
    assert both.judged["length"] == by_length.judged["length"]
    assert (both.judged["twice"].values == 2 * both.judged["length"].values).all()


def test_judges_stand_side_by_side_whether_at_once_or_afterwards(model, tokenizer, vector):
    at_once = write(model, tokenizer, vector, PROMPTS, [1.0], judge=[length, scaled], **SHORT)
    plain = write(model, tokenizer, vector, PROMPTS, [1.0], **SHORT)
    assert plain.judged_by(length).judged_by(scaled) == at_once
    assert plain.judged == {}
    assert [*plain.judged_by(length, name="letters").judged] == ["letters"]


@pytest.mark.parametrize(
    ("judge", "said"),
    [([length, length], r"several judges are called \['length'\]"), ({"tokens": length}, r"\['tokens'\] are columns")],
    ids=["twice", "a column"],
)
def test_a_name_that_is_taken_is_refused_before_anything_is_written(model, tokenizer, vector, generated, judge, said):
    with pytest.raises(ValueError, match=said):
        write(model, tokenizer, vector, PROMPTS, [1.0], judge=judge, **SHORT)
    assert not generated


def test_a_judge_without_its_package_says_so_itself(model, tokenizer, vector):
    def judge(prompt, text):
        raise ImportError("pip install it")

    with pytest.raises(ImportError, match="pip install it"):
        write(model, tokenizer, vector, ["a"], [1.0], judge=judge, **SHORT)


# how likely the texts are


def test_a_text_is_as_likely_as_the_model_finds_it_when_nothing_steers_it(model, tokenizer, vector):
    got = write(model, tokenizer, vector, PROMPTS, ALPHAS, **SHORT)
    for i, row in enumerate(got.texts):
        items = [Item(prompt, (text,)) for prompt, text in zip(PROMPTS, row, strict=True)]
        expected = -torch.cat(log_likelihoods(model, tokenizer, items)) / torch.tensor(got.tokens[i])
        np.testing.assert_allclose(got.cross_entropy[i], expected, rtol=1e-4)
    np.testing.assert_allclose(got.perplexity, np.exp(got.cross_entropy))


def test_a_text_of_no_tokens_has_no_likelihood(model, tokenizer, vector, monkeypatch):
    monkeypatch.setattr(scoring.TransformersScorer, "write", lambda self, prompts, *_, **__: [[""] * 3] * 3)
    assert np.isnan(write(model, tokenizer, vector, PROMPTS, ALPHAS, **SHORT).cross_entropy).all()


def test_a_handle_of_the_users_own_counts_as_the_model(model, tokenizer, vector):
    plain = write(model, tokenizer, vector, ["the fox"], [0.0], **SHORT)
    with repe.steer(model, vector, 30.0):
        own = write(model, tokenizer, vector, ["the fox"], [0.0], **SHORT)
        (found,) = log_likelihoods(model, tokenizer, [Item("the fox", own.texts[0])])
    np.testing.assert_allclose(own.cross_entropy[0], -found.numpy() / own.tokens[0], rtol=1e-4)
    assert own.texts != plain.texts


def test_texts_are_a_hundred_tokens_long_where_nothing_else_is_said():
    assert inspect.signature(write).parameters["max_new_tokens"].default >= 100


# what is known of the judges


def judged(values, reliability=None, prompts=None):
    """Writings whose judge gave `values` (prompts,) at the strength 0."""
    prompts = prompts or tuple(map(str, range(len(values))))
    ones = np.ones((1, len(values)))
    texts = (tuple("t" for _ in values),)
    by = {"yes": Judgement(np.array([values], dtype=float), reliability)}
    return Writings(np.zeros(1), prompts, texts, *[ones] * 5, judged=by)


KNOWN = judges.Reliability(0.5, missed=1, positives=10, false_alarms=2, negatives=10, auc=0.9)


def test_a_share_has_wilsons_interval_and_a_mean_that_of_the_bootstrap():
    assert judged([0] * 20).estimates("yes") == [proportion(0, 20)]
    values = np.linspace(-1, 1, 20)
    assert judged(values).estimates("yes") == Measured(np.zeros(1), values[None]).estimates()


def test_a_prompt_given_twice_counts_once():
    assert judged([1, 0, 1, 1], prompts=("a", "b", "a", "a")).estimates("yes") == [proportion(1, 2)]


def test_texts_without_a_number_are_left_out_of_the_mean():
    values = np.array([[1.0, np.nan, 2.0, 4.0, 3.0]])
    got = replace(judged([0] * 5), repetition=values)
    assert got.estimates("repetition") == Measured(np.zeros(1), values[:, [0, 2, 3, 4]]).estimates()


def test_an_unknown_column_is_refused():
    with pytest.raises(KeyError, match=r"there is no column 'no', only .*'yes', 'perplexity'"):
        judged([0, 1]).estimates("no")


def test_a_share_is_corrected_for_the_errors_of_the_judge():
    assert judged([1] * 6 + [0] * 4, KNOWN).corrected("yes") == [KNOWN.corrected(6, 10)]
    for writings in (judged([0, 1]), judged([0.5, 1], KNOWN)):
        with pytest.raises(ValueError, match=r"corrected of a judge whose errors are known .*; 'yes' is none"):
            writings.corrected("yes")


def test_every_judgement_is_shown_with_what_is_known_of_its_errors():
    one = judged([1] * 6 + [0] * 4, KNOWN)
    both = replace(one, judged={**one.judged, "mood": Judgement(np.linspace(-1, 1, 10)[None])})
    text = str(both)
    assert text.splitlines()[1].split() == [
        "alpha",
        "yes",
        "yes,",
        "corrected",
        "mood",
        "tokens",
        "repetition",
        "perplexity",
    ]
    assert f"yes: {KNOWN}; mood: unchecked" in text
    for shown in (text, both._repr_html_()):
        for cell in (proportion(6, 10), KNOWN.corrected(6, 10), both.estimates("mood")[0], "after the prompt", KNOWN):
            assert str(cell) in shown.replace("&#x27;", "'")


def test_a_checked_judge_brings_what_is_known_of_it(model, tokenizer, vector):
    examples = [("", "yes", True), ("", "no", False)]
    known = judges.check(lambda prompt, text: float(text == "yes"), examples, name="is yes")
    got = write(model, tokenizer, vector, ["a"], [1.0], judge=[known, length], **SHORT)
    assert got.judged["is yes"].reliability == known.reliability
    assert got.judged["length"].reliability is None


def test_samples_are_beginnings_at_the_ends_and_at_0():
    texts = tuple((f"{row}" * 200,) for row in range(5))
    ones = np.ones((5, 1))
    got = Writings(np.array([-2.0, -1, 0, 1, 2]), ("p",), texts, *[ones] * 5)
    assert [row[0] for row in got.samples().rows] == ["-2", "0", "2"]
    assert [row[1] for row in got.samples().rows] == [f"{row}" * 160 + "…" for row in (0, 2, 4)]


# going on with other questions


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": [*PROMPTS, "b"]}, {"max_new_tokens": 7}, {"scope": "generated"}, {"blocks": 0},
        {"concept": "another"}, {"temperature": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_be_written_otherwise_is_written_anew(model, tokenizer, vector, generated, tmp_path, other):
    path, asked = tmp_path / "writings.jsonl", {"concept": vector, "prompts": PROMPTS, **SHORT}
    write(model, tokenizer, alphas=ALPHAS, resume=path, **asked)
    if other == {"concept": "another"}:
        other = {"concept": repe.ConceptVector.random(vector, 0)}
    before = model.generation_config.temperature
    model.generation_config.temperature = other.pop("temperature", before)
    try:
        generated.clear()
        found = write(model, tokenizer, alphas=ALPHAS, resume=path, **asked | other)
        assert sum(generated) == (3 if "prompts" in other else 9)
        assert_alike(found, write(model, tokenizer, alphas=ALPHAS, **asked | other))
    finally:
        model.generation_config.temperature = before
