"""Answers are tokens of the text that prompt and option make together, on tokenizers of every kind."""

from itertools import product

import pytest

from repe.data.answers import answers_of
from repe.data.items import Item
from repe.models.tokens import encode
from tests.subwords import ADDED, KINDS, subwords

PROMPTS = ("The capital of France is", "un", "A: do un", "Answer: ", "Question: is it so?\nAnswer:", "is<eos>")
OPTIONS = (" Paris", "able", " Rome.", "ing it", "Yes", "\nNo", " able, unable", "<eos>", ".")
CHAT = [{"role": "user", "content": "is it so?"}]
TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"


def wholly_encoded(tokenizer, text, added):
    """The tokens of a text, but for an end token that is known to be added."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ADDED[added].endswith("<eos>") else ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", ADDED)
def test_an_answer_is_the_end_of_the_text_s_own_tokens(kind, added):
    tokenizer = subwords(kind, added)
    for prompt, option in product(PROMPTS, OPTIONS):
        ids, text = wholly_encoded(tokenizer, prompt, added), wholly_encoded(tokenizer, prompt + option, added)
        begins = next(n for n in range(len(ids), -1, -1) if ids[:n] == text[:n])
        if begins == 0:
            with pytest.raises(ValueError, match=r"no token of the prompt .* stays as it is before the options"):
                answers_of(tokenizer, [Item(prompt, (option,))])
        else:
            (answer,) = answers_of(tokenizer, [Item(prompt, (option,))])
            assert (answer.ids, answer.begins) == (tuple(text), begins)


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_of_an_item_begin_at_one_place_behind_tokens_that_all_share(kind):
    tokenizer = subwords(kind)
    for prompt in PROMPTS:
        answers = answers_of(tokenizer, [Item(prompt, OPTIONS)])
        (before,) = {answer.ids[: answer.begins] for answer in answers}
        assert tuple(encode(tokenizer, prompt))[: len(before)] == before
        assert len({answer.ids[len(before)] for answer in answers}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_behind_a_prompt_is_the_word_that_stands_in_texts(kind):
    """A space of its own before the word is what SentencePiece would put before a text."""
    tokenizer = subwords(kind)
    (answer,) = answers_of(tokenizer, [Item("The capital of France is", (" Paris",))])
    assert tokenizer.decode(answer.ids[answer.begins :]).strip().lower() == "paris"
    assert list(answer.ids) == tokenizer("The capital of France is Paris")["input_ids"]
    assert answer.ids[: answer.begins] == tuple(tokenizer("The capital of France is")["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", ["begin", "both"])
@pytest.mark.filterwarnings("ignore:.*has no chat template")
def test_behind_a_chat_an_answer_stands_where_it_is_opened(kind, added):
    tokenizer = subwords(kind, added)
    answers = answers_of(tokenizer, [Item(CHAT, (" yes", "yes"))])
    text = tuple(wholly_encoded(tokenizer, "User: is it so?\n\nAssistant: yes", added))
    assert [answer.ids for answer in answers] == [text, text]
    tokenizer.chat_template = TEMPLATE
    for option, answer in zip(OPTIONS, answers_of(tokenizer, [Item(CHAT, OPTIONS)]), strict=True):
        text = tokenizer(f"<bos>is it so? Answer:{option}", add_special_tokens=False)["input_ids"]
        assert list(answer.ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_that_a_tokenizer_leaves_out_is_refused(kind):
    with pytest.raises(ValueError, match="the option '' has no tokens"):
        answers_of(subwords(kind, "both"), [Item("The capital", (" is", ""))])
