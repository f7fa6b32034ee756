"""Generation: what is written after a text is what the model writes after it alone."""

import copy

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import repe
from repe.models.tokens import INCOMPLETE, Pieces
from repe.widgets.streaming import Job, SideBySide
from tests import zoo
from tests.oracles import plain_vector

TEXTS = ["a", "the quick brown fox", [{"role": "user", "content": "count"}]]


def alone(model, tokenizer, text):
    ids = (
        tokenizer(text, return_tensors="pt")["input_ids"]
        if isinstance(text, str)
        else tokenizer.apply_chat_template(text, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    )
    with torch.no_grad():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_texts_of_different_lengths_are_continued_as_each_alone(model, tokenizer):
    written = repe.generate(model, tokenizer, TEXTS, max_new_tokens=6, do_sample=False)
    assert written == [alone(model, tokenizer, text) for text in TEXTS]


def test_what_is_attached_steers_it(model, tokenizer):
    plain = repe.generate(model, tokenizer, TEXTS, max_new_tokens=6, do_sample=False)
    with repe.steer(model, plain_vector(model), 30.0):
        steered = repe.generate(model, tokenizer, TEXTS, max_new_tokens=6, do_sample=False)
        assert steered == [alone(model, tokenizer, text) for text in TEXTS]
    assert steered != plain


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_a_model_whose_weights_are_all_elsewhere_writes_the_same(model, tokenizer, offload, tmp_path):
    place = [tmp_path] if offload == "disk_offload" else []
    offloaded = getattr(accelerate, offload)(copy.deepcopy(model), *place, execution_device=torch.device("cpu"))
    vector, how = plain_vector(model), {"max_new_tokens": 3, "progress": False, "unit": "raw"}
    expected, got = (repe.measuring.write(m, tokenizer, vector, TEXTS, [30.0], **how) for m in (model, offloaded))
    assert got.texts == expected.texts
    job = Job(TEXTS[2], (30.0,), {"unit": "raw"}, max_new_tokens=3)
    expected, got = (
        [side.pieces for side in SideBySide(m, tokenizer, [vector]).write(job)] for m in (model, offloaded)
    )
    assert got == expected


def test_it_needs_no_pad_token_and_changes_no_tokenizer(model):
    tokenizer = zoo.tokenizer(pad=False)
    repe.generate(model, tokenizer, TEXTS, max_new_tokens=2, do_sample=False)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, zoo.tokenizer(pad=False).padding_side)


def test_no_texts_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one text"):
        repe.generate(model, tokenizer, [])


@pytest.mark.parametrize("chat", [TEXTS[2], tuple(TEXTS[2]), TEXTS[2][0]])
def test_one_chat_instead_of_a_list_is_refused(model, tokenizer, chat):
    with pytest.raises(ValueError, match="got one chat: put it in a list"):
        repe.generate(model, tokenizer, chat)


# encoder-decoders and encoders

ASKED = ["a b", "what is rain?", "c"]
WORDLESS = [*range(len(zoo.SPECIAL_TOKENS)), *range(len(zoo.tokenizer()), zoo.VOCABULARY)]
WORDS = {"suppress_tokens": WORDLESS, "max_new_tokens": 6, "use_cache": False}


def answered(model, tokenizer, text, begun):
    """Token by token from the logits of the text alone."""
    given, ids = tokenizer(text, return_tensors="pt"), [*begun]
    for _ in range(WORDS["max_new_tokens"]):
        logits = model(input_ids=given["input_ids"], decoder_input_ids=torch.tensor([ids])).logits[0, -1]
        logits[WORDLESS] = -torch.inf
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids[len(begun) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", zoo.ENCODER_DECODERS)
@pytest.mark.parametrize("begun", [[], [20, 31]], ids=["from nothing", "from a beginning"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["as it begins", "as it goes on"])
def test_an_encoder_decoder_answers_every_text_as_if_it_were_alone(name, tokenizer, begun, is_whole):
    """Whatever its decoder begins with is no part of the answer, nor is a token that comes before that."""
    model = zoo.build(name)
    start = [model.config.decoder_start_token_id]
    expected = [answered(model, tokenizer, text, [*start, *begun]) for text in ASKED]
    given = torch.tensor([[*start * is_whole, *begun]] * len(ASKED))
    more = {"decoder_input_ids": given} if begun else {}
    assert all(expected)
    assert repe.generate(model, tokenizer, ASKED, **WORDS, **more) == expected
    with repe.steer(model, plain_vector(model), 30.0, unit="raw"):
        assert repe.generate(model, tokenizer, ASKED, **WORDS, **more) != expected


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_whole_output_and_several_answers_are_texts_too(name, tokenizer):
    model, how = zoo.build(name), {"max_new_tokens": 4, "use_cache": False, "num_beams": 3}
    plain = repe.generate(model, tokenizer, ASKED, **how)
    assert repe.generate(model, tokenizer, ASKED, **how, return_dict_in_generate=True, output_scores=True) == plain
    several = repe.generate(model, tokenizer, ASKED, **how, num_return_sequences=3)
    assert several[::3] == plain


@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_what_does_not_write_is_refused(name, tokenizer):
    with pytest.raises(ValueError, match="does not write, as it is no language model that predicts the next token"):
        repe.generate(zoo.build(name), tokenizer, ASKED)


def test_tokens_are_no_texts(model, tokenizer):
    for tokens in (tokenizer(ASKED, padding=True, return_tensors="pt"), torch.ones(1, 3, dtype=torch.long)):
        with pytest.raises(TypeError, match="expected texts or chats, which are tokenised here, and got tokens"):
            repe.generate(model, tokenizer, tokens)


# piece by piece


def pieces_of(tokenizer, ids):
    pieces = Pieces(tokenizer)
    return [*map(pieces.add, ids), pieces.rest()]


@pytest.mark.parametrize(
    "text", ["a b  c\n\nd", "héllo, wörld", "日本語 中文", "😀👩‍👩‍👧 x", "the trade of Abrin Tolva"]
)
def test_pieces_are_the_text_and_no_character_comes_broken(loaded_testbed, text):
    tokenizer = loaded_testbed[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    *pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert INCOMPLETE not in "".join(pieces)
    assert rest == ""
    assert len([*filter(None, pieces)]) > 1


@given(st.text())
def test_every_character_comes_with_its_last_byte(text):
    *pieces, rest = pieces_of(zoo.Bytes(), text.encode())
    assert "".join(pieces) + rest == text
    whole = text.partition(INCOMPLETE)[0]  # one that stands in the text itself looks like one that is incomplete
    assert pieces[: len(whole.encode())] == [p for c in whole for p in ("",) * (len(c.encode()) - 1) + (c,)]


@given(st.binary())
def test_what_is_no_text_comes_as_it_is_decoded(written):
    """Strongly steered models write such bytes."""
    *pieces, rest = pieces_of(zoo.Bytes(), written)
    assert len(pieces) == len(written)
    assert set("".join(pieces) + rest) <= set(zoo.Bytes().decode(written)) | {INCOMPLETE}


def test_a_character_that_was_cut_off_comes_in_the_end():
    assert pieces_of(zoo.Bytes(), "a€".encode()[:-1]) == ["a", "", "", INCOMPLETE]


def test_a_decoder_that_drops_the_first_space_of_a_text_drops_no_other():
    class Stripping(zoo.Bytes):
        def decode(self, ids, skip_special_tokens=True):
            return super().decode(ids).removeprefix(" ")

    assert "".join(pieces_of(Stripping(), b" a b  c ")) == "a b  c "
