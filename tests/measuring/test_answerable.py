"""Items that can tell something: what is left out says nothing, and what is kept does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import repe
from repe.data.answers import Answer
from repe.data.items import Item
from repe.data.letters import turned
from repe.measuring.answerable import UNBOUND, UNMOVED, answerable
from repe.measuring.calibrate import halves
from repe.measuring.curve import LeftOut
from repe.measuring.scoring import Likelihoods
from repe.measuring.sweep import sweep
from repe.measuring.tasks import texts_of
from repe.testbed import FOLDER
from tests import oracles, zoo

WORDS = [Item(f"{word}?", ("yes", "no", "so it is")[: 2 + i % 2], i % 2) for i, word in enumerate("abcdef")]
LETTERS = [Item(f"{word}?\n(A) yes\n(B) no", ("A", "B"), 0) for word in "ghi"]
MIXED = [*WORDS[:2], LETTERS[0], *WORDS[2:5], *LETTERS[1:], WORDS[5]]
HOW = {"helpfulness": WORDS, "neutral": None, "requests": None, "controls": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.tokenizer()


class Says:
    """A scorer of a model that finds an option as likely as a function of the prompt and the option says."""

    def __init__(self, log_p: Callable[[str, str], float]) -> None:
        self.log_p, self.tokenizer, self.asked = log_p, zoo.tokenizer(), []

    def log_likelihoods(self, answers: Sequence[Answer], edit: Any, alphas: Sequence[float]) -> Likelihoods:
        assert (edit, [*alphas]) == (None, [0.0])
        self.asked += answers
        said = [self.log_p(*map(self.tokenizer.decode, (a.ids[: a.begins], a.ids[a.begins :]))) for a in answers]
        return Likelihoods(torch.tensor([said]), torch.zeros(1, len(said)))


def text_of(prompt: str, letter: str) -> str:
    return prompt.partition(f"({letter}) ")[2].partition("\n")[0]


def kept(scorer: Any, items: Sequence[Item], scope: Any = "all") -> tuple[Sequence[Item], tuple[LeftOut, ...]]:
    found, left_out = answerable(scorer, zoo.tokenizer(), {"x": items}, scope, {"x": "honesty"})
    return found["x"], left_out


# letters


@pytest.mark.parametrize("log_p", [lambda _, option: -ord(option), lambda *_: -1.0], ids=["first", "all alike"])
def test_a_model_that_names_a_place_loses_all_that_asks_for_a_letter(log_p: Any) -> None:
    found, left_out = kept(Says(log_p), MIXED)
    assert found == WORDS
    assert left_out == (LeftOut("honesty", 3, 9, UNBOUND),)


def test_a_model_that_names_a_text_loses_nothing() -> None:
    scorer = Says(lambda prompt, option: -len(text_of(prompt, option)))
    assert kept(scorer, MIXED) == (MIXED, ())


@pytest.mark.parametrize("options", [2, 3, 4])
def test_an_answer_follows_if_the_best_text_stands_out_from_every_place(options: int) -> None:
    """Where what a text and a place are worth add up, by hand for every way in which the texts can be turned."""
    generator = np.random.default_rng(options)
    letters, lost = "ABCD"[:options], 0
    for order in [*permutations(letters)] * 4:
        text, place = generator.normal(size=(2, options))
        lines = "\n".join(f"({letter}) text {number}" for number, letter in enumerate(letters))
        item = Item(f"which?\n{lines}", order, 0)
        scorer = Says(lambda prompt, o, t=text, p=place: t[int(text_of(prompt, o)[-1])] + p[ord(o) - 65] - 9.0)
        best = {int(np.argmax(text + np.roll(place, by))) for by in range(options)}
        found, left_out = kept(scorer, [*WORDS, item])
        assert (item in found) == (len(best) == 1)
        assert sum(told.count for told in left_out) + len(found) == len(WORDS) + 1
        lost += item not in found
    assert 0 < lost < 4 * len([*permutations(letters)])


def test_the_order_in_which_an_item_is_given_decides_nothing() -> None:
    scorer = Says(lambda prompt, o: {"A": -1.0, "B": -1.4}[o] - 0.1 * len(text_of(prompt, o)) * ("g" not in prompt))
    both = [*WORDS, *LETTERS, *map(turned, LETTERS)]
    assert kept(scorer, both)[1] == kept(scorer, [*WORDS, *map(turned, both[6:])])[1]


def test_words_are_asked_nothing_and_letters_once_in_every_order() -> None:
    scorer = Says(lambda prompt, option: -ord(option))
    kept(scorer, WORDS)
    assert scorer.asked == []
    kept(scorer, [*WORDS, *LETTERS, *map(turned, LETTERS), LETTERS[0]])
    assert len(scorer.asked) == len(set(scorer.asked)) == 2 * 2 * len(LETTERS)


# what nothing moves


@pytest.mark.parametrize("scope", ["all", "answer", "generated", slice(9, 12), (12,)], ids=str)
def test_what_the_scope_cannot_move_is_what_no_strength_moves(scope: Any, tokenizer: Any) -> None:
    items = [
        Item("a" * n, options, 0) for n in (3, 8, 9, 14, 15) for options in (("y", "n"), ("yes", "n"), ("yes", "no"))
    ]
    scores = sweep(zoo.build("llama"), tokenizer, oracles.vector(3), {"x": items}, [-3.0, 0.0, 3.0], scope=scope)["x"]
    is_moved = np.ptp(scores.log_likelihoods, axis=0).max(1) > 1e-4
    moved = [item for item, moves in zip(items, is_moved, strict=True) if moves]
    found, left_out = kept(Says(lambda *_: pytest.fail("asked")), items, scope)
    assert found == moved
    expected = [LeftOut("honesty", len(items) - len(moved), len(items), UNMOVED)] if len(moved) < len(items) else []
    assert [*left_out] == expected


def test_an_item_is_counted_once_whatever_speaks_against_it() -> None:
    found, left_out = kept(Says(lambda _, option: -ord(option)), [*MIXED, *WORDS], "generated")
    assert sum(told.count for told in left_out) + len(found) == len(MIXED) + len(WORDS)
    assert left_out == (LeftOut("honesty", 3, 15, UNMOVED),)


def test_a_scope_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask of one batch is no scope for many"):
        kept(None, WORDS, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(IndexError, match="lies before the start of a prompt"):
        kept(None, WORDS, (-9,))


# too few


@pytest.mark.parametrize(
    ("items", "scope", "says"),
    [
        (LETTERS, "all", "3 of 3 items of honesty left out: the answer does not follow .* of 0 groups, and 4 are "
            "needed: ask in words .letters=False., or measure on all items"),
        ([*LETTERS, *WORDS[:3]], "all", "What remains is of 3 groups"),
        ([*LETTERS, *(replace(item, group="g") for item in WORDS)], "all", "What remains is of 1 groups"),
        (LETTERS, "generated", "no token behind which .* name another scope, or measure on all items"),
    ],
)  # fmt: skip
def test_where_too_few_remain_it_is_said_what_to_do(items: Any, scope: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kept(Says(lambda _, option: -ord(option)), items, scope)


def test_few_items_are_enough_where_none_is_left_out() -> None:
    assert kept(Says(lambda *_: 0.0), WORDS[:1]) == (WORDS[:1], ())


# on what is measured


@pytest.fixture
def placing(tokenizer: Any) -> Any:
    """A model that names the first place, whatever stands there."""
    model = zoo.build("llama")
    bias = torch.zeros(model.lm_head.out_features)
    bias[tokenizer("A", add_special_tokens=False)["input_ids"]] = 50.0
    model.lm_head.bias = nn.Parameter(bias)
    return model


def test_a_curve_is_that_of_the_items_that_tell_something(placing: Any, tokenizer: Any) -> None:
    of_words = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], alignment=WORDS, **HOW)
    curve = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], alignment=MIXED, letters=True, **HOW)
    assert of_words.left_out == ()
    assert curve.left_out == (LeftOut("concept 3", 3, 9, UNBOUND),)
    np.testing.assert_allclose(curve.alignment.log_likelihoods, of_words.alignment.log_likelihoods, atol=1e-4)
    assert str(curve.left_out[0]) in str(curve)
    everything = {**HOW, "letters": True, "all_items": True}
    whole = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], alignment=MIXED, **everything)
    assert (len(whole.alignment.answers), whole.left_out) == (9, ())


def test_helpfulness_is_left_out_of_by_the_same_rule(placing: Any, tokenizer: Any) -> None:
    how = {**HOW, "helpfulness": MIXED, "letters": True}
    curve = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], alignment=WORDS, **how)
    assert curve.left_out == (LeftOut("helpfulness", 3, 9, UNBOUND),)
    assert len(curve.helpfulness.answers) == 6


def test_a_resumed_curve_is_a_fresh_one_and_scores_nothing_twice(
    placing: Any, tokenizer: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    how = {**HOW, "alignment": MIXED, "letters": True}
    fresh = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], **how)
    path = tmp_path / "kept.jsonl"
    first = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], resume=path, **how)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]))
    broken_off = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], resume=path, **how)
    assert len(path.read_bytes().splitlines()) == len(lines)
    monkeypatch.setattr("repe.measuring.scoring.AnswerFanout.at", lambda *_: pytest.fail("scored again"))
    resumed = repe.tradeoff(placing, tokenizer, oracles.vector(3), [1.0], resume=path, **how)
    assert resumed == broken_off
    for curve in (first, resumed):
        assert curve.left_out == fresh.left_out
        np.testing.assert_allclose(curve.alignment.log_likelihoods, fresh.alignment.log_likelihoods, atol=1e-4)


def test_a_forecast_is_that_of_the_items_that_tell_something(placing: Any, tokenizer: Any) -> None:
    how = {"neutral": ["a text of some length", "short"], "draws": 1}
    of_words, mixed = (
        repe.forecast(placing, tokenizer, oracles.vector(3), alignment=items, letters=True, **how)
        for items in (WORDS, MIXED)
    )
    assert mixed.left_out == (LeftOut("concept 3", 3, 9, UNBOUND),)
    np.testing.assert_allclose(mixed.slope, of_words.slope, rtol=1e-4)
    assert str(mixed.left_out[0]) in str(mixed)
    whole = repe.forecast(placing, tokenizer, oracles.vector(3), alignment=MIXED, letters=True, all_items=True, **how)
    assert whole.left_out == ()
    assert not np.allclose(whole.slope, of_words.slope, rtol=1e-4)


def test_a_calibration_halves_what_tells_something_and_says_what_was_left_out(
    loaded_testbed: Any, monkeypatch: Any
) -> None:
    """The testbed knows no letters: to it, all are the same unknown word."""
    facts, skills = (repe.data.load_items(FOLDER / "tasks" / f"{n}.jsonl")[::8] for n in ("honesty", "skills"))
    asked = [
        Item(f"{i.prompt[-1]['content']}\n(A) {i.options[0]}\n(B) {i.options[1]}", ("A", "B"), 0) for i in facts[:4]
    ]
    halved = []
    monkeypatch.setattr("repe.measuring.calibrate.halves", lambda *of: halved.append(of) or halves(*of))
    found = repe.calibrate(
        *loaded_testbed, "honesty", readers="mean", blocks=3, alignment=[*facts, *asked], helpfulness=skills,
        neutral=texts_of("neutral", loaded_testbed[0])[:4], requests=None, letters=True,
    )  # fmt: skip
    assert halved == [(facts, skills, 0)]
    assert found.left_out == (LeftOut("honesty", 4, len(facts) + 4, UNBOUND),)
    assert str(found.left_out[0]) in str(found)
