"""Chats on the templates of many families: all that was said stays, and the last token is where the answer begins."""

import copy
import warnings

import pytest

from repe import chats
from repe.tokens import encode
from tests import zoo
from tests.chat_templates import ANSWER_OPENS_WITH, TEMPLATES, WITHOUT_SYSTEM

SYSTEM = {"role": "system", "content": "Be frank."}
QUESTION = {"role": "user", "content": "Is it so?"}
BEGUN = {"role": "assistant", "content": "Yes, it"}
EARLIER = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Good day."}]


def tokenizer_of(family):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def rendered(family, *chat):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if family in WITHOUT_SYSTEM else "error")
        return chats.render(tokenizer_of(family), chat)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("chat", [[QUESTION], [SYSTEM, QUESTION], [SYSTEM, *EARLIER, QUESTION]], ids=len)
def test_an_answer_is_opened_behind_all_that_was_said(family, chat):
    text = rendered(family, *chat)
    assert text.endswith(ANSWER_OPENS_WITH[family])
    places = [text.index(message["content"]) for message in chat]
    assert places == sorted(places)
    assert all(text.count(message["content"]) == 1 for message in chat)


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_answer_goes_on_where_it_was_begun(family):
    text = rendered(family, SYSTEM, *EARLIER, QUESTION, BEGUN)
    assert text.endswith(BEGUN["content"])
    assert text.count(BEGUN["content"]) == 1
    assert SYSTEM["content"] in text


@pytest.mark.parametrize("family", sorted(TEMPLATES.keys() - {"deepseek-r1"}))
def test_a_begun_answer_stands_where_the_model_would_begin_it(family):
    opened, begun = rendered(family, QUESTION), rendered(family, QUESTION, BEGUN)
    assert begun.removesuffix(BEGUN["content"]).rstrip() == opened.rstrip()


@pytest.mark.parametrize("family", TEMPLATES)
def test_there_is_one_bos_if_the_template_writes_one_and_none_if_not(family):
    tokenizer = tokenizer_of(family)
    ids = encode(tokenizer, [QUESTION])
    writes = "bos_token" in TEMPLATES[family]
    assert ids.count(zoo.BOS_ID) == writes
    assert (ids[0] == zoo.BOS_ID) == writes


@pytest.mark.parametrize("family", sorted(WITHOUT_SYSTEM))
def test_system_messages_without_a_role_are_said_by_the_user_with_a_warning(family):
    tokenizer = tokenizer_of(family)
    with pytest.warns(UserWarning, match="has no system role: system messages are put before the first message of the"):
        text = chats.render(tokenizer, [SYSTEM, QUESTION])
    assert f"{SYSTEM['content']}\n\n{QUESTION['content']}" in text
    assert text == chats.render(tokenizer, [{"role": "user", "content": "Be frank.\n\nIs it so?"}])


def test_system_messages_come_first_even_where_the_assistant_opens():
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    with pytest.warns(UserWarning, match="no system role"):
        text = chats.render(tokenizer, [SYSTEM, {"role": "assistant", "content": "Hm."}, QUESTION])
    assert text.startswith("<user>Be frank.<assistant>Hm.<user>Is it so?")


def test_without_a_template_a_transcript_is_written_and_said():
    tokenizer = zoo.tokenizer(chat=False)
    with pytest.warns(UserWarning, match="has no chat template: chats are written as plain transcripts"):
        ids = encode(tokenizer, [SYSTEM, *EARLIER, QUESTION])
    assert ids.count(zoo.BOS_ID) == 1
    said = tokenizer.decode(ids, skip_special_tokens=True)
    assert said == "Be frank.\n\nUser: Hello there.\n\nAssistant: Good day.\n\nUser: Is it so?\n\nAssistant:"
    with pytest.warns(UserWarning, match="no chat template"):
        assert tokenizer.decode(encode(tokenizer, [QUESTION, BEGUN])).endswith("User: Is it so?\n\nAssistant: Yes, it")


def test_what_a_template_refuses_is_a_clear_error():
    with pytest.raises(ValueError, match="refuses a chat of the roles user, user: Conversation roles must alternate"):
        chats.render(tokenizer_of("gemma-2"), [QUESTION, QUESTION])
    with pytest.raises(ValueError, match="refuses a chat of the roles user, user: Conversation roles must alternate"):
        chats.render(tokenizer_of("gemma-2"), [SYSTEM, QUESTION, QUESTION])


def test_a_chat_of_no_messages_is_refused():
    with pytest.raises(ValueError, match="got a chat of no messages: give at least one"):
        chats.encode_chat(zoo.tokenizer(), [])


@pytest.mark.parametrize("family", TEMPLATES)
def test_neither_the_chat_nor_the_tokenizer_is_changed(family):
    tokenizer, chat = tokenizer_of(family), [dict(SYSTEM), dict(QUESTION)]
    before, template = copy.deepcopy(chat), tokenizer.chat_template
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chats.encode_chat(tokenizer, chat)
    assert chat == before
    assert tokenizer.chat_template == template
