"""Chats on the templates of many families: all that was said stays, and the last token is where the answer begins."""

import copy
import warnings

import pytest

from repe.data.answers import answers_of
from repe.data.items import Item
from repe.models import chats
from repe.models.tokens import encode, encode_behind
from tests import zoo
from tests.chat_templates import ANSWER_OPENS_WITH, TEMPLATES, WITHOUT_SYSTEM

SYSTEM = {"role": "system", "content": "Be frank."}
QUESTION = {"role": "user", "content": "Is it so?"}
BEGUN = {"role": "assistant", "content": "Yes, it"}
EARLIER = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Good day."}]


LOOP = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
NO_SYSTEM = LOOP.replace("messages %}", "messages if m['role'] != 'system' %}")
ONE_SYSTEM = (  # any but the first is refused
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('Late system') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)
FIRST_SYSTEM = LOOP.replace("messages %}", "messages if m['role'] != 'system' or m == messages[0] %}")  # others drop


def tokenizer_of(family):
    return tokenizer_with(TEMPLATES[family])


def tokenizer_with(template):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = template
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


@pytest.mark.parametrize("family", TEMPLATES)
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
    with pytest.warns(
        UserWarning, match="does not take these system messages: they are put before the first message of the"
    ):
        text = chats.render(tokenizer, [SYSTEM, QUESTION])
    assert f"{SYSTEM['content']}\n\n{QUESTION['content']}" in text
    assert text == chats.render(tokenizer, [{"role": "user", "content": "Be frank.\n\nIs it so?"}])


def test_system_messages_come_first_even_where_the_assistant_opens():
    tokenizer = tokenizer_with(NO_SYSTEM)
    with pytest.warns(UserWarning, match="does not take these system"):
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
    with pytest.raises(ValueError, match="refuses a chat of the roles system, user, user: Conversation ro"):
        chats.render(tokenizer_of("gemma-2"), [SYSTEM, QUESTION, QUESTION])


@pytest.mark.parametrize("chat", [[], [{"role": "system", "content": " "}], [{"role": "assistant", "content": ""}]])
def test_a_chat_of_no_messages_is_refused(chat):
    with pytest.raises(ValueError, match="got a chat of no messages: give at least one"):
        chats.encode_chat(zoo.tokenizer(), chat)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "got None for a chat: expected a list of messages"),
        (QUESTION, "got {'role': 'user', .* for a chat: expected a list of messages"),
        (["hello"], "message 0 of the chat is 'hello': expected a mapping with a 'role' and a 'content'"),
        ([QUESTION, {"content": "x"}], "message 1 of the chat has the role None: expected one of system, user, assis"),
        ([{"role": "usr", "content": "x"}], "message 0 of the chat has the role 'usr': expected one of .* developer"),
        ([{"role": ["user"], "content": "x"}], r"message 0 of the chat has the role \['user'\]: expected one of"),
        ([{"role": "user"}], "message 0 of the chat has the content None: expected a text"),
        ([{"role": "user", "content": ["x"]}], r"message 0 of the chat has the content \['x'\]: expected a text"),
    ],
)
@pytest.mark.parametrize("has_template", [True, False])
def test_what_is_no_chat_says_what_was_got_and_expected(chat, message, has_template):
    with pytest.raises(ValueError, match=message):
        chats.encode_chat(zoo.tokenizer(chat=has_template), chat)


@pytest.mark.parametrize("family", TEMPLATES)
def test_neither_the_chat_nor_the_tokenizer_is_changed(family):
    tokenizer, chat = tokenizer_of(family), [dict(SYSTEM), dict(QUESTION)]
    before, template = copy.deepcopy(chat), tokenizer.chat_template
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chats.encode_chat(tokenizer, chat)
    assert chat == before
    assert tokenizer.chat_template == template


# System messages


def test_a_dropped_system_message_is_noticed_though_its_words_stand_elsewhere():
    """Be it in the user's message, or in what the template says itself."""
    for template, question in ((NO_SYSTEM, "Be frank. Is it so?"), ("Be frank." + NO_SYSTEM, "Is it so?")):
        with pytest.warns(UserWarning, match="does not take these system messages"):
            text = chats.render(tokenizer_with(template), [SYSTEM, {"role": "user", "content": question}])
        assert text.endswith(f"<user>Be frank.\n\n{question}")


def test_a_system_message_that_a_template_upper_cases_is_not_said_twice():
    template = LOOP.replace("m['content']", "m['content'] | upper if m['role'] == 'system' else m['content']")
    assert chats.render(tokenizer_with(template), [SYSTEM, QUESTION]) == "<system>BE FRANK.<user>Is it so?"


@pytest.mark.parametrize("template", [ONE_SYSTEM, FIRST_SYSTEM])
def test_system_messages_are_joined_in_front_where_one_alone_is_taken(template):
    chat = [SYSTEM, QUESTION, {"role": "system", "content": "Be brief."}]
    assert chats.render(tokenizer_with(template), chat) == "<system>Be frank.\n\nBe brief.<user>Is it so?"


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_blank_system_message_is_the_template_s_to_write_and_no_default_comes_back(content):
    blank = {"role": "system", "content": content}
    for family in sorted(set(TEMPLATES) - WITHOUT_SYSTEM):
        tokenizer = tokenizer_of(family)
        written = tokenizer.apply_chat_template([blank, QUESTION], tokenize=False, add_generation_prompt=True)
        question = written[: written.index(QUESTION["content"])]
        assert rendered(family, blank, QUESTION).startswith(question)
    assert "You are helpful" not in rendered("qwen2.5", blank, QUESTION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost where there is no place for it
        for family in sorted(WITHOUT_SYSTEM):
            assert chats.render(tokenizer_of(family), [blank, QUESTION]) == rendered(family, QUESTION)


# What a message holds besides its content


def call(**arguments):
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def thought(text, content=""):
    return {"role": "assistant", "content": content, "reasoning_content": text}


RESULT = {"role": "tool", "content": "blue", "tool_call_id": "1"}
EVERYTHING = (  # as Qwen 3 and its kin write it
    "{% for m in messages %}<{{ m.role }}>{% if m.tools %}[{{ m.tools }}]{% endif %}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BACKWARDS = LOOP.replace("{% endfor %}", "{{ m.reasoning_content }}{% endfor %}")  # lost where the text is to go on


@pytest.mark.parametrize("more", [
    [call(of="sky")], [thought("It is.")], [call(of="sky") | {"content": "Well."}], [call(of="sky"), RESULT],
    [thought("It is.", "Yes."), QUESTION], [call(of="sky"), RESULT, thought("Blue."), QUESTION],
    [{**QUESTION, "name": "Ann"}], [{"role": "system", "content": "Be frank.", "tools": [{"name": "f"}]}, QUESTION],
])  # fmt: skip
def test_what_is_rendered_is_what_the_template_renders_of_exactly_these_messages(more):
    tokenizer, chat = tokenizer_with(EVERYTHING), [QUESTION, *more]
    opens = more[-1]["role"] != "assistant"
    assert chats.render(tokenizer, chat) == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=opens
    )


def test_an_answer_that_is_begun_behind_thoughts_goes_on_behind_both():
    text = chats.render(tokenizer_with(EVERYTHING), [QUESTION, thought("It is.", "Yes, it")])
    assert text == "<user>Is it so?<end><assistant><think>It is.</think>Yes, it"


@pytest.mark.parametrize("family", [*TEMPLATES, BACKWARDS, None])
@pytest.mark.parametrize(
    ("more", "key"),
    [
        ([call(of="sky")], "tool_calls"),
        ([call(of="sky"), RESULT], "tool_calls"),
        ([thought("It is.")], "reasoning_content"),
        ([thought("It is.", "Yes.")], "reasoning_content"),
        ([{**QUESTION, "tools": [{"name": "f"}]}], "tools"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no chat template")
def test_what_a_template_would_leave_out_is_refused_by_name(family, more, key):
    tokenizer = tokenizer_with(TEMPLATES.get(family, family))
    if family == BACKWARDS and more == [thought("It is.")]:
        assert chats.render(tokenizer, [QUESTION, *more]).endswith("<assistant>It is.")
        return
    with pytest.raises(
        ValueError, match=f"it leaves out '{key}' of message|would write .*'{key}'|roles must|the last message"
    ):
        encode(tokenizer, [*([QUESTION] if more[0]["role"] != "user" else []), *more])


def test_no_option_stands_behind_an_answer_that_is_whole():
    with pytest.raises(ValueError, match="no answer stands behind a chat that ends with one that is whole"):
        options_of(tokenizer_with(EVERYTHING), [QUESTION, call(of="sky")], "Yes", "No")


# Answers that are begun


def test_thoughts_are_closed_before_an_answer_that_is_begun():
    assert rendered("deepseek-r1", QUESTION, BEGUN).endswith("<|Assistant|><think>\n</think>\n\nYes, it")


TRACE = {"role": "assistant", "content": "<think>Well.</think>Yes, it"}


@pytest.mark.parametrize(
    ("family", "before"),
    [("deepseek-r1", "<|Assistant|>"), ("qwen3", "<|im_start|>assistant\n"), ("gemma-2", "model\n")],
)
def test_thoughts_that_are_given_are_kept_and_not_opened_twice(family, before):
    text = rendered(family, QUESTION, TRACE)
    assert text.endswith(before + TRACE["content"])
    assert text.count("<think>") == 1


@pytest.mark.parametrize(("opening", "closing"), [("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"), ("<thought>", "</thought>"), ("<|START_THINKING|>", "<|END_THINKING|>")])  # fmt: skip
def test_known_openings_of_thoughts_are_closed(opening, closing):
    tokenizer = tokenizer_with(LOOP + "{% if add_generation_prompt %}<assistant>" + opening + "\n{% endif %}")
    for chat, end in (([QUESTION], ""), ([QUESTION, BEGUN], "Yes, it")):
        before, after = chats.render(tokenizer, chat).removesuffix(end).split(opening)
        assert before.endswith("<assistant>")
        assert after.strip() == closing


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_empty_answer_is_none(family):
    assert rendered(family, QUESTION, {"role": "assistant", "content": ""}) == rendered(family, QUESTION)


def test_an_answer_is_begun_where_a_template_opens_none_for_a_chat_that_waits():
    assert chats.render(tokenizer_with(LOOP), [QUESTION, BEGUN]) == "<user>Is it so?<assistant>Yes, it"


@pytest.mark.parametrize("chat", [[BEGUN], [QUESTION, BEGUN, BEGUN]], ids=len)
def test_what_a_template_refuses_before_an_answer_is_not_passed_over(chat):
    roles = ", ".join(message["role"] for message in chat)
    with pytest.raises(ValueError, match=f"refuses a chat of the roles {roles}: Conversation roles must alternate"):
        chats.render(tokenizer_of("gemma-2"), chat)


# Switches, transcripts, tokenizers with code of their own


def spied(tokenizer, monkeypatch, change=lambda messages: None):
    """The keywords of all calls of its template, which may also change the messages it is given."""
    calls, apply = [], tokenizer.apply_chat_template

    def recorded(messages, **options):
        calls.append(options)
        text = apply(messages, **options)
        change(messages)
        return text

    monkeypatch.setattr(tokenizer, "apply_chat_template", recorded)
    return calls


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thoughts_are_switched_off_by_whatever_name_the_template_has(switch):
    template = LOOP + "{% if " + switch + " is defined and not " + switch + " %}OFF{% else %}ON{% endif %}"
    assert chats.render(tokenizer_with(template), [QUESTION]).endswith("OFF")


def test_a_template_without_a_switch_is_given_none(monkeypatch):
    tokenizer = tokenizer_with(LOOP)
    calls = spied(tokenizer, monkeypatch)
    chats.render(tokenizer, [QUESTION])
    assert calls == [{"tokenize": False, "add_generation_prompt": True}]


def test_a_tokenizer_that_changes_messages_changes_none_of_the_caller_s(monkeypatch):
    tokenizer, chat = tokenizer_with(LOOP), [dict(SYSTEM), dict(QUESTION)]
    spied(tokenizer, monkeypatch, change=lambda messages: [message.clear() for message in messages[1:]])
    with pytest.raises(KeyError):
        chats.encode_chat(tokenizer, chat)
    assert chat == [SYSTEM, QUESTION]


@pytest.mark.filterwarnings("ignore:.*has no chat template")
def test_every_role_has_a_place_in_a_transcript():
    chat = [{"role": role, "content": role[:3]} for role in ("developer", "system", "user", "tool")]
    assert chats.transcript(zoo.tokenizer(chat=False), chat) == "dev\n\nsys\n\nUser: use\n\nTool: too\n\nAssistant:"
    chat = [{"role": "system", "content": " "}, QUESTION, {"role": "assistant", "content": ""}]
    assert chats.transcript(zoo.tokenizer(chat=False), chat) == "User: Is it so?\n\nAssistant:"


class MistralCommonBackend:
    """What renders chats by code: no template, and no text in between."""

    chat_template = convert_ids_to_tokens = None

    def apply_chat_template(self, messages, *, tokenize, return_dict, **how):
        if any(m["role"] == "tool" for m in messages):
            raise RuntimeError("Unexpected role tool")
        assert tokenize
        assert not return_dict
        return [len(messages), *map(ord, "+".join(how))]


def test_a_tokenizer_with_code_for_chats_and_no_template_is_asked():
    class Derived(MistralCommonBackend):
        pass

    for tokenizer in (MistralCommonBackend(), Derived()):
        assert encode(tokenizer, [SYSTEM, QUESTION]) == [2, *map(ord, "add_generation_prompt")]
        assert encode(tokenizer, [QUESTION, BEGUN]) == [2, *map(ord, "continue_final_message")]
        assert (
            encode_behind(tokenizer, [QUESTION, BEGUN], ["", " is."]) == [[2, *map(ord, "continue_final_message")]] * 2
        )
        assert encode_behind(tokenizer, [QUESTION], ["Yes"]) == [[2, *map(ord, "continue_final_message")]]
        with pytest.raises(ValueError, match="refuses a chat of the roles tool: Unexpected role tool"):
            encode(tokenizer, [{"role": "tool", "content": "3"}])


def options_of(tokenizer, prompt, *options):
    return [tokenizer.decode(a.ids[a.begins :]) for a in answers_of(tokenizer, [Item(prompt, options)])]


@pytest.mark.filterwarnings("ignore:.*has no chat template")
def test_an_option_stands_after_a_space_in_a_transcript_and_nowhere_else():
    plain, templated = zoo.tokenizer(chat=False), zoo.tokenizer()
    assert options_of(plain, [QUESTION], "Yes", " No") == [" Yes", " No"]
    assert options_of(plain, [QUESTION, BEGUN], "Yes", " No") == ["Yes", " No"]
    assert options_of(plain, "Is it so?", "Yes", " No") == ["Yes", " No"]
    assert options_of(templated, [QUESTION], "Yes", " No") == ["Yes", " No"]
    for tokenizer in (plain, templated):
        with pytest.raises(ValueError, match="the option '' has no tokens"):
            options_of(tokenizer, [QUESTION], "Yes", "")
