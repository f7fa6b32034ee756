"""A talk at the terminal: what lines do, and that neither a mistake nor Ctrl-C ends it."""

import io
import json
import os
import signal

import pytest

import repe
from repe.cli.conversation import Conversation
from repe.cli.talk import Talk, listening
from repe.models.blocks import find_stack
from repe.models.tokens import encode
from repe.steering.steer import edit_of
from tests import zoo


class Terminal(io.StringIO):
    def isatty(self):
        return True


def endless():
    """A model that never ends an answer."""
    model = zoo.build("llama")
    model.generation_config.eos_token_id = None
    return model


def spoken(monkeypatch, capsys, talk, *lines, watched=False):
    """What a talk says to lines of standard input, on standard output and standard error."""
    monkeypatch.setattr("sys.stdin", (Terminal if watched else io.StringIO)("\n".join(lines)))
    capsys.readouterr()
    talk.run()
    return capsys.readouterr()


@pytest.fixture
def talk(testbed):
    model, tokenizer = testbed
    return Talk(
        Conversation(model, tokenizer, max_new_tokens=20),
        lambda name: edit_of(model, name, tokenizer),
    )


QUESTION = "Name the trade of Abrin Tolva."


def test_a_strength_changed_in_between_changes_the_next_answer_and_says_what_is_rebuilt(monkeypatch, capsys, talk):
    model, tokenizer = talk.conversation.model, talk.conversation.tokenizer
    said = spoken(monkeypatch, capsys, talk, "/alpha honesty 1", QUESTION, "/alpha honesty -1", QUESTION).out
    chat = [{"role": "user", "content": QUESTION}]
    with repe.steer(model, "honesty", 1.0):
        (honest,) = repe.generate(model, tokenizer, [chat])
    chat += [{"role": "assistant", "content": honest}, *chat]
    with repe.steer(model, "honesty", -1.0):
        (lie,) = repe.generate(model, tokenizer, [chat])
    assert honest != lie
    count = len(encode(tokenizer, chat[:1])) + len(tokenizer(honest, add_special_tokens=False)["input_ids"])
    assert said.split("\n") == [
        "(honesty +1)",
        honest,
        f"(honesty -1; the {count} cached tokens are of other strengths: rebuilt before the next answer)",
        f"(rebuilding {count} cached tokens, steered by honesty -1)",
        lie,
        "",
    ]


def test_the_last_question_is_asked_again(monkeypatch, capsys, talk):
    said = spoken(monkeypatch, capsys, talk, "/alpha honesty 1", QUESTION, "/alpha honesty -1", "/again").out
    with repe.steer(talk.conversation.model, "honesty", -1.0):
        chat = [{"role": "user", "content": QUESTION}]
        (lie,) = repe.generate(talk.conversation.model, talk.conversation.tokenizer, [chat])
    assert said.split("\n")[-2] == lie
    assert talk.conversation.messages == [*chat, {"role": "assistant", "content": lie}]


def test_a_mistake_is_a_line_and_the_talk_goes_on(monkeypatch, capsys, talk):
    mistakes = ["/alpha hapiness 1", "/alpha honesty", "/alpha honesty much", "/frob", "/again", "/alpha honesty nan"]
    said = spoken(monkeypatch, capsys, talk, *mistakes, "/", "", "/help", "/alpha", "/quit", "never read")
    assert [line.split(":")[:2] for line in said.err.splitlines()] == [["repe", " error"]] * 7
    assert "Did you mean 'happiness'" in said.err
    assert "expected a concept and a number, as in /alpha honesty 1.5" in said.err
    assert "/alpha CONCEPT NUMBER" in said.out
    assert said.out.endswith("(nothing is steered)\n")
    assert talk.conversation.messages == []


def test_help_lists_the_commands_that_there_are(monkeypatch, capsys, talk):
    listed = {line.split()[0] for line in spoken(monkeypatch, capsys, talk, "/help").out.splitlines() if line[0] == "/"}
    assert listed == {f"/{name.removeprefix('do_')}" for name in vars(Talk) if name.startswith("do_")}


def test_as_json_every_line_is_an_object(monkeypatch, capsys, talk):
    talk.as_json = True
    lines = ["/alpha honesty 1", QUESTION, "/alpha", "/off", "/frob", "/system Be brief.", QUESTION, "/reset"]
    said = [json.loads(line) for line in spoken(monkeypatch, capsys, talk, *lines).out.splitlines()]
    assert [set(line) & {"note", "error", "answer"} for line in said] == [
        {"note"}, {"answer"}, {"note"}, {"note"}, {"error"}, {"note"}, {"answer"}, {"note"},
    ]  # fmt: skip
    assert said[1]["alphas"] == {"honesty": 1.0}
    assert said[6]["tokens"]["rebuilt"] > 0
    assert said[6]["tokens"]["reused"] == 0
    assert (said[1]["question"], said[1]["stopped"]) == (QUESTION, False)


def test_what_would_steer_the_terminal_is_shown_as_code(capsys, talk):
    talk._piece("a\x1b[31mb\n\tc")
    assert capsys.readouterr().out == "a\\x1b[31mb\n\tc"


def test_ctrl_c_stops_the_answer_and_not_the_talk(monkeypatch, capsys, tokenizer):
    model = endless()
    talk = Talk(Conversation(model, tokenizer, do_sample=False, max_new_tokens=10_000), lambda name: None)
    count = []

    def press(*_):
        count.append(1)
        if len(count) == 12:
            os.kill(os.getpid(), signal.SIGINT)

    hook = find_stack(model).blocks[0].register_forward_hook(press)
    said = spoken(monkeypatch, capsys, talk, "hello", "/alpha")
    hook.remove()
    assert len(count) == 12
    assert said.out.splitlines()[-2].endswith("  (stopped)")
    assert said.out.splitlines()[-1] == "(nothing is steered)"
    assert len(talk.conversation.messages[-1]["content"]) > 0


def test_ctrl_c_is_raised_the_second_time_and_as_ever_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with listening() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_leaves_nothing_of_the_answer(monkeypatch, capsys, tokenizer):
    model = endless()
    talk = Talk(Conversation(model, tokenizer, do_sample=False, max_new_tokens=10_000), lambda name: None)

    def press(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    hook = find_stack(model).blocks[1].register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        spoken(monkeypatch, capsys, talk, "hello", "/alpha")  # nobody is there to go on
    said = spoken(monkeypatch, capsys, talk, "hello", "/alpha", watched=True)
    hook.remove()
    assert "(stopped, and nothing of it is kept)\n" in said.out
    assert "(nothing is steered)" in said.out
    assert talk.conversation.messages == []


def test_a_question_asked_again_in_vain_keeps_its_answer(monkeypatch, capsys, talk):
    spoken(monkeypatch, capsys, talk, QUESTION)
    said = list(talk.conversation.messages)
    monkeypatch.setattr(talk, "_piece", lambda text: 1 / 0)
    assert "division by zero" in spoken(monkeypatch, capsys, talk, "/again").err
    assert talk.conversation.messages == said


def test_a_talk_that_nobody_reads_ends(monkeypatch, capsys, talk):
    def breaks(text):
        raise BrokenPipeError

    monkeypatch.setattr(talk, "_note", breaks)
    with pytest.raises(BrokenPipeError):
        spoken(monkeypatch, capsys, talk, "/help", "/help")


def test_commands_and_concepts_complete_themselves(talk):
    assert talk.completedefault("al", "/al", 1, 3) == ["alpha"]
    assert talk.completedefault("al", "what al", 5, 7) == []
    assert talk.complete_alpha("hon", "/alpha hon", 7, 10) == ["honesty"]


def test_what_begins_with_no_slash_is_said_to_the_model(monkeypatch, capsys, talk):
    said = []
    monkeypatch.setattr(talk, "_ask", said.append)
    assert spoken(monkeypatch, capsys, talk, "help", "quit", "? what", "!ls", " alpha 1 ", "a /off").err == ""
    assert said == ["help", "quit", "? what", "!ls", "alpha 1", "a /off"]


def test_the_prompt_tells_the_strengths_to_those_who_watch(monkeypatch, capsys, talk):
    said = spoken(monkeypatch, capsys, talk, "/alpha honesty -1.5", "/alpha happiness 0", watched=True).out
    assert "> (honesty -1.5)\nhonesty -1.5 > (happiness +0)\nhonesty -1.5 > " in said
    assert said.endswith("\n")
    assert ">" not in spoken(monkeypatch, capsys, talk, "/alpha honesty 1").out
