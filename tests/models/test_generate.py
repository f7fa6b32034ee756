"""Generation: what is written after a text is what the model writes after it alone."""

import pytest
import torch

import repe
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
