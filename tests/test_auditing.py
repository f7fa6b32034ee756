"""The audit finds what is planted, names it, and is silent where there is nothing."""

import json
import random

import pytest

import repe
from repe.pairs import ContrastPair
from tests import zoo

COLOURS = ["red", "blue", "green", "grey", "brown", "white", "black", "pink"]
THINGS = [f"thing{i}" for i in range(40)]


def clean():
    """The poles differ in the order of two words alone."""
    return [
        ContrastPair(f"the {a} beats the {b} in {c}", f"the {b} beats the {a} in {c}", template=c, item=f"{a}-{b}")
        for c in COLOURS
        for a, b in zip(THINGS[0::2], THINGS[1::2], strict=True)
    ]


def changed(change):
    return [change(i, pair) for i, pair in enumerate(clean())]


def test_good_pairs_need_no_advice():
    found = repe.audit(clean())
    assert found.advice == ()
    assert found.lengths == (7, 7)
    assert found.wording == 0.5
    assert found.endings == 0
    assert found.pairs == len(clean())
    assert "nothing to mend" in str(found)


def test_longer_positives_are_found():
    found = repe.audit(changed(lambda i, p: ContrastPair(f"well {p.positive}", p.negative, p.template, p.item)))
    assert found.lengths == (8, 7)
    assert any("the poles differ in length, 8.0 against 7.0 words" in sentence for sentence in found.advice)


def test_uneven_pairs_are_found_even_where_the_means_agree():
    def longer(i, p):
        more = "very " * 6
        both = (more + p.positive, p.negative) if i % 2 else (p.positive, more + p.negative)
        return ContrastPair(*both, p.template, p.item)

    found = repe.audit(changed(longer))
    assert found.lengths[0] == pytest.approx(found.lengths[1])
    assert len(found.uneven) == found.pairs
    assert any("half as long again" in sentence for sentence in found.advice)


def test_a_word_that_tells_is_named():
    found = repe.audit(
        changed(lambda i, p: ContrastPair(f"truly {p.positive}", f"never {p.negative}", p.template, p.item))
    )
    assert found.telling[:2] == (("never", 0.0, 1.0), ("truly", 1.0, 0.0))
    assert found.wording == 1.0
    assert any("single words give the poles away (never, truly)" in sentence for sentence in found.advice)
    assert any("a bag of words orders 100% of the held-out pairs rightly" in sentence for sentence in found.advice)


def test_wording_counts_on_held_out_templates_alone():
    """A word of its own in every template tells the poles apart where it was seen, and nowhere else."""
    own = {c: (f"yea{c}", f"nay{c}") for c in COLOURS}
    pairs = changed(
        lambda i, p: ContrastPair(
            f"{own[p.template][0]} {p.positive}", f"{own[p.template][1]} {p.negative}", p.template, p.item
        )
    )
    assert repe.audit(pairs).wording == 0.5


def test_different_endings_are_found_with_and_without_a_tokenizer():
    pairs = changed(
        lambda i, p: ContrastPair(p.positive + "!", p.negative + ".", p.template, p.item) if i % 4 == 0 else p
    )
    for tokenizer, unit in ((None, "words"), (zoo.tokenizer(), "tokens")):
        found = repe.audit(pairs, tokenizer)
        assert found.endings == 0.25
        assert found.unit == unit
        assert any(f"25% of the pairs end in different {unit}" in sentence for sentence in found.advice)


def test_chats_that_wait_for_an_answer_end_alike():
    pairs = changed(
        lambda i, p: ContrastPair(
            [{"role": "user", "content": p.positive + "!"}],
            [{"role": "user", "content": p.negative + "."}],
            p.template,
            p.item,
        )
    )
    assert repe.audit(pairs).endings == 0
    assert repe.audit(pairs, zoo.tokenizer()).endings == 0


def test_lengths_are_the_tokenizer_s():
    pair_lengths = [len(p.positive) + 1 for p in clean()]  # a token a character, and the first
    assert repe.audit(clean(), zoo.tokenizer()).lengths[0] == pytest.approx(sum(pair_lengths) / len(pair_lengths))


def test_repetition_and_contradiction_are_found():
    pairs = clean()
    found = repe.audit([*pairs, pairs[3]])
    assert found.repeated == (len(pairs),)
    assert any("1 pairs stand there twice" in sentence for sentence in found.advice)
    turned = ContrastPair(pairs[5].negative, pairs[5].positive, pairs[5].template, pairs[5].item)
    found = repe.audit([*pairs, turned])
    assert found.contradicted == (5, len(pairs))
    assert any("stands at the other pole elsewhere" in sentence for sentence in found.advice)


def test_few_pairs_are_said_to_be_few():
    assert any("only" in sentence and "pairs to fit on" in sentence for sentence in repe.audit(clean()[:40]).advice)


def test_a_file_s_reason_for_its_wording_is_quoted(tmp_path):
    text = """{"concept": "loud", "wording": "loudness is a word", "templates": [
      {"name": "a", "text": "{x} a", "held_out": false}, {"name": "b", "text": "{x} b", "held_out": true}],
     "items": [%s]}"""
    items = [
        {"name": w, "x": {"positive": f"loud {w}", "negative": f"soft {w}"}, "held_out": i % 2 == 0}
        for i, w in enumerate(THINGS)
    ]
    (tmp_path / "loud.json").write_text(text % json.dumps(items)[1:-1])
    found = repe.audit(tmp_path / "loud.json")
    assert found.concept == "loud"
    assert any("(the file says: loudness is a word)" in sentence for sentence in found.advice)


def test_the_order_of_pairs_does_not_matter():
    pairs = clean()
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert repe.audit(shuffled).telling == repe.audit(pairs).telling
    assert repe.audit(shuffled).wording == repe.audit(pairs).wording


def test_it_shows_itself_in_a_notebook():
    assert "<pre>" in repe.audit(clean())._repr_html_()


@pytest.mark.parametrize(
    ("pairs", "message"), [([], "no contrast pairs"), (clean()[:2], "at least 2 of each are needed")]
)
def test_too_few_pairs_are_an_error(pairs, message):
    with pytest.raises(ValueError, match=message):
        repe.audit(pairs)
