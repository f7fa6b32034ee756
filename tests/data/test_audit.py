"""The audit finds what is planted, names it, and is silent where there is nothing."""

import json
import random
from dataclasses import replace

import pytest

import repe
from repe.data.audit import _advice, _contradicted, _repeated, _telling, _words
from repe.data.catalogue import concept_of
from repe.data.pairs import ContrastPair, split
from repe.models.load import home_of
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
        assert any(f"40 of 160 pairs (25%) end in different {unit}" in sentence for sentence in found.advice)


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
    assert any(sentence.startswith("1 pair stands there twice") for sentence in found.advice)
    turned = ContrastPair(pairs[5].negative, pairs[5].positive, pairs[5].template, pairs[5].item)
    found = repe.audit([*pairs, turned])
    assert found.contradicted == (5, len(pairs))
    assert any(sentence.startswith("2 pairs have a text that stands at the other pole") for sentence in found.advice)


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
    assert "<pre " in repe.audit(clean())._repr_html_()
    shown = replace(repe.audit(clean()), concept="<b>bold</b>")._repr_html_()
    assert "&lt;b&gt;bold" in shown
    assert "<b>" not in shown


@pytest.mark.parametrize(
    ("pairs", "message"), [([], "no contrast pairs"), (clean()[:2], "at least 2 of each are needed")]
)
def test_too_few_pairs_are_an_error(pairs, message):
    with pytest.raises(ValueError, match=message):
        repe.audit(pairs)


# What is given


def test_a_name_means_the_model_s_own_concept_or_the_library_s(testbed):
    model, tokenizer = testbed
    of_model, of_library = repe.audit("honesty", tokenizer, model=model), repe.audit("honesty")
    assert of_model.pairs == len(concept_of("honesty", home_of(model)).pairs)
    assert of_library.pairs == len(concept_of("honesty").pairs)
    assert of_model.pairs != of_library.pairs


@pytest.mark.parametrize("pairs", [None, clean()[0]])
def test_what_are_no_pairs_is_a_clear_error(pairs):
    with pytest.raises(TypeError, match=rf"got a {type(pairs).__name__}: expected the name of a concept, the path of"):
        repe.audit(pairs)


def test_a_name_of_a_tokenizer_is_none():
    with pytest.raises(TypeError, match=r"got 'gpt2' for a tokenizer: expected one as `repe.load` returns, or None"):
        repe.audit(clean(), "gpt2")


def test_the_split_is_as_in_extraction():
    for held_out, seed in ((0.25, 0), (0.5, 0), (0.25, 3)):
        fit, held = split(clean(), held_out, seed)
        found = repe.audit(clean(), held_out=held_out, seed=seed)
        assert (found.fit, found.held_out) == (len(fit), len(held))
    own = {c: (f"yea{i % 4}", f"nay{i % 4}") for i, c in enumerate(COLOURS)}  # two templates share a word

    def told(i, p):
        yea, nay = own[p.template]
        return ContrastPair(f"{yea} {p.positive}", f"{nay} {p.negative}", p.template, p.item)

    assert len({repe.audit(changed(told), seed=seed).wording for seed in range(8)}) > 1


# Limits, just inside and outside


def says(found, part):
    return any(part in sentence for sentence in found.advice)


def found_with(**changes):
    """A clean audit with other findings, and the advice on them."""
    found = replace(repe.audit(clean()), **changes)
    return replace(found, advice=tuple(_advice(found, "")))


@pytest.mark.parametrize(
    ("changes", "part", "is_said"),
    [
        ({"fit": 64}, "to fit on", False),
        ({"fit": 63}, "only 63 pairs to fit on", True),
        ({"lengths": (10.9, 10.0)}, "differ in length", False),
        ({"lengths": (11.1, 10.0)}, "differ in length, 11.1 against 10.0", True),
        ({"lengths": (10.0, 10.9)}, "differ in length", False),
        ({"lengths": (10.0, 11.1)}, "differ in length, 10.0 against 11.1", True),
        ({"telling": (("so", 0.50, 0.16),)}, "give the poles away", False),
        ({"telling": (("so", 0.50, 0.14), ("it", 0.5, 0.4))}, "give the poles away (so)", True),
        ({"telling": (("so", 0.14, 0.50),)}, "give the poles away (so)", True),
        ({"wording": 0.9}, "bag of words", False),
        ({"wording": 0.91}, "orders 91% of the held-out pairs rightly, so", True),
        ({"wording": 0.1}, "bag of words", False),
        (
            {"wording": 0.09},
            "orders 9% of the held-out pairs rightly (the words point the other way there, which",
            True,
        ),
    ],
)
def test_advice_begins_at_its_limit(changes, part, is_said):
    found = found_with(**changes)
    assert says(found, part) == is_said
    assert len(found.advice) == is_said


@pytest.mark.parametrize(("words", "is_uneven"), [(15, False), (16, True)])
@pytest.mark.parametrize("order", [1, -1])
def test_a_pair_is_uneven_beyond_half_as_long_again(words, is_uneven, order):
    pair = ContrastPair(*["a " * 10, "b " * words][::order], "odd", "odd")
    assert repe.audit([*clean(), pair]).uneven == ((len(clean()),) if is_uneven else ())


def test_longer_negatives_are_found():
    found = repe.audit(changed(lambda i, p: ContrastPair(p.positive, f"well {p.negative}", p.template, p.item)))
    assert says(found, "the poles differ in length, 7.0 against 8.0 words")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"repeated": (3,)}, "1 pair stands there twice"),
        ({"repeated": (3, 4)}, "2 pairs stand there twice"),
        ({"contradicted": (3,)}, "1 pair has a text"),
        ({"uneven": (3,)}, "1 pair has one pole more than half as long again as the other, such as pair 3"),
        ({"uneven": (3, 4)}, "2 pairs have one pole"),
        ({"fit": 1}, "only 1 pair to fit on"),
        ({"endings": 1 / 160}, "1 of 160 pairs (1%) ends in different words"),
        ({"seen_items": ("a",)}, "1 item stands on both sides of the split"),
        ({"seen_templates": ("a", "b")}, "2 templates stand on both sides of the split"),
    ],
)
def test_one_and_many_are_spoken_of_as_such(changes, sentence):
    assert [found.startswith(sentence) for found in found_with(**changes).advice] == [True]


# Words


def test_words_that_tell_are_counted_once_a_text_whatever_their_case_and_without_signs():
    poles = [("So, SO it is!", "It was. is?"), ("so it is!", "It is not."), ("It is so!", "Not so.")]
    pairs = [ContrastPair(*pole, item=str(i)) for i, pole in enumerate(poles)]
    assert {word: shares for word, *shares in _telling(pairs)} == {
        "so": [1, 1 / 3], "not": [0, 2 / 3], "it": [1, 2 / 3], "is": [1, 2 / 3], "was": [0, 1 / 3],
    }  # fmt: skip


def test_words_of_equal_shares_do_not_tell():
    assert repe.audit(clean()).telling == ()
    assert "words that tell most, in positives / in negatives: none" in str(repe.audit(clean()))


def marked(positive, negative):
    """Pairs of one of two signs, and as many of a third as make them different pairs."""
    return [
        ContrastPair(f"{positive} {'~' * i}", f"{negative} {'~' * i}", f"t{i % 8}", f"i{i // 8}") for i in range(1, 161)
    ]


def test_emoji_count_as_words_and_signs_do_not():
    found = repe.audit(marked("😀", "😡"))
    assert found.telling == (("😀", 1.0, 0.0), ("😡", 0.0, 1.0))
    assert found.wording == 1.0
    found = repe.audit(marked("!", "?"))
    assert (found.telling, found.wording) == ((), 0.5)


def test_scripts_without_spaces_are_compared_by_their_characters():
    between = "天地玄黄宇宙洪荒日月盈昃"
    pairs = [ContrastPair(f"{a}{b}很好", f"{a}{b}不好", a, b) for a in between for b in between]
    found = repe.audit(pairs)
    assert found.telling == (("不", 0.0, 1.0), ("很", 1.0, 0.0))
    assert found.wording == 1.0
    assert found.lengths == (4, 4)
    assert _words("ฉันok") == ["ฉ", "ั", "น", "ok"]


def test_words_that_point_the_other_way_on_held_out_pairs_are_found():
    def turning(i, p):
        held = p.template in COLOURS[:2]
        words = ("aye", "nay")[:: -1 if held else 1]
        return ContrastPair(f"{words[0]} {p.positive}", f"{words[1]} {p.negative}", p.template, p.item, held_out=held)

    found = repe.audit(changed(turning))
    assert found.wording == 0.0
    assert says(found, "orders 0% of the held-out pairs rightly (the words point the other way there")


def test_who_waits_is_the_last_word_of_a_chat():
    user, begun = {"role": "user", "content": "so?"}, {"role": "assistant", "content": "well"}
    assert _words((user,)) == ["so", "?", "assistant"]
    assert _words((user, begun)) == ["so", "?", "well"]
    assert _words((user, {**begun, "content": ""})) == ["so", "?", "assistant"]


# Sides


def test_the_same_words_of_another_speaker_are_another_text():
    user, system, tool = (({"role": role, "content": "so it is"},) for role in ("user", "system", "tool"))
    other = ({"role": "user", "content": "so it was"},)
    assert _contradicted([ContrastPair(user, system), ContrastPair(system, other)]) == (0, 1)
    assert _contradicted([ContrastPair(user, tool), ContrastPair(system, other)]) == ()
    assert _repeated([ContrastPair(user, p) for p in (system, tool, system)]) == (2,)


@pytest.mark.parametrize("pair", [ContrastPair("b", "e"), ContrastPair("e", "a")])
def test_a_pair_is_contradicted_by_either_of_its_poles(pair):
    assert _contradicted([ContrastPair("a", "b"), ContrastPair("c", "d"), pair]) == (0, 2)


def test_items_and_templates_on_both_sides_of_a_decided_split_are_found():
    found = repe.audit(changed(lambda i, p: replace(p, held_out=i % 4 == 0)))
    assert found.seen_templates == tuple(sorted(COLOURS))
    assert says(found, "8 templates stand on both sides of the split: the accuracy is partly of texts seen")
    assert found.seen_items == ()
    by_template = repe.audit(changed(lambda i, p: replace(p, held_out=p.template in COLOURS[:2])))
    assert by_template.seen_templates == ()
    assert by_template.seen_items == tuple(sorted({p.item for p in clean()}))
    assert says(by_template, "20 items stand on both sides of the split: the accuracy is partly of texts seen")


def test_what_has_no_name_or_no_choice_or_is_drawn_is_on_no_two_sides():
    for change in ({"template": "", "item": ""}, {"template": "one", "item": ""}):
        found = repe.audit(changed(lambda i, p, c=change: replace(p, **c, held_out=i % 4 == 0)))
        assert (found.seen_items, found.seen_templates) == ((), ())
    found = repe.audit(changed(lambda i, p: replace(p, template="one")))
    assert (found.seen_items, found.seen_templates) == ((), ())
