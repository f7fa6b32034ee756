"""Judges: each is right where its docstring says so, and how often a judge errs is found as it is."""

import json
import math
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from repe.measuring import judges
from repe.measuring.intervals import proportion
from repe.measuring.judges import Reliability, check, endpoint, refusal, sentiment
from repe.measuring.judges import endpoint as made
from repe.measuring.judges.sentiment import _analyzer

GRADED = [json.loads(line) for line in (Path(__file__).parent / "refusals.jsonl").read_text("utf-8").splitlines()]


# refusal


@pytest.mark.parametrize(("seen", "missed", "alarms", "each"), [(True, 1, 1, 93), (False, 9, 7, 40)])
def test_refusals_are_told_from_compliances_as_often_as_is_said(seen, missed, alarms, each):
    known = check(refusal, [("", row["text"], row["refuses"]) for row in GRADED if row["seen"] is seen]).reliability
    assert (known.missed, known.positives, known.false_alarms, known.negatives) == (missed, each, alarms, each)
    said = " ".join(refusal.__doc__.split())
    assert f"{each}" in said
    assert f"it misses {missed} and " in said


def test_the_graded_texts_are_all_different():
    assert len({row["text"] for row in GRADED}) == len(GRADED)


@pytest.mark.parametrize(
    "text",
    [
        "I cannot wait to help you.", '"I can\'t help you," said the fox.', "If the dough can't hold, add flour.", "",
        "He lay down. It rained. They slept. I can't help with that.", "“I won’t help you,” she said.",
    ],
)  # fmt: skip
def test_what_only_sounds_like_a_refusal_is_none(text):
    assert refusal("", text) == 0


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.", "I CAN’T HELP WITH THAT", "Hello!\nI’m not able to\nassist.",
        "He asked.\n\nI won't.", "Sorry, I must not take part in this.", "I mustn't help.",
        "As a chatbot, I'm not equipped to assist with that.",
        "I'm sorry, but I don't have the capability to create it.", "I do not have the capacity to do this.",
    ],
)  # fmt: skip
def test_a_refusal_is_one_in_whatever_letters_and_lines(text):
    assert refusal([{"role": "user", "content": "?"}], text) == 1


# sentiment


def test_sentiment_is_the_mean_over_sentences():
    good, bad = sentiment("", "I love this wonderful day."), sentiment("", "He hates it!")
    assert bad < 0 < good
    assert sentiment("", "I love this wonderful day. He hates it!") == pytest.approx((good + bad) / 2)
    assert sentiment("", "The table is of wood.") == sentiment("", "") == 0


def test_without_its_package_sentiment_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    _analyzer.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'repe-torch\[judges\]'"):
        sentiment("", "good")


# endpoints


@contextmanager
def serving(*answers):
    """The address of a server that gives these answers, of a status and a body, and the requests it gets."""
    requests, left = [], [*answers]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, dict(self.headers), json.loads(body)))
            status, answer = left.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


def said(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


CHAT = [{"role": "user", "content": "How are you?"}]


def test_an_endpoint_is_asked_the_question_of_the_prompt_and_the_text(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with serving(said("7"), said("Score: -0.5.")) as (url, requests):
        judge = endpoint(url, "large", "How polite?", name="polite", key_from="SOME_KEY", options={"max_tokens": 5})
        assert [judge("Hello", "Go away."), judge(CHAT, "Fine")] == [7, -0.5]
    (path, heads, body), (_, _, second) = requests
    assert path == "/v1/chat/completions"
    assert heads["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"]) == ("large", 5)
    (message,) = body["messages"]
    assert message["role"] == "user"
    for part in ("How polite?", "<prompt>\nHello\n</prompt>", "<text>\nGo away.\n</text>"):
        assert part in message["content"]
    assert "<prompt>\nuser: How are you?\n</prompt>" in second["messages"][0]["content"]
    assert judge.__name__ == "polite"


def test_without_a_key_none_is_sent_and_answers_are_the_likeliest():
    with serving(said("1")) as (url, requests):
        endpoint(url + "/", "m", "?", name="a")("", "")
    ((path, heads, body),) = requests
    assert path == "/v1/chat/completions"
    assert "Authorization" not in heads
    assert body["temperature"] == 0


def test_a_busy_endpoint_is_asked_again_after_longer_and_longer(pauses):
    with serving((429, b""), (503, b""), (500, b""), said("3")) as (url, requests):
        assert endpoint(url, "m", "?", name="a")("", "") == 3
    assert len(requests) == 4
    assert pauses == [1, 2, 4]


def test_an_endpoint_that_stays_busy_or_refuses_is_an_error_that_says_what_came_back(pauses):
    with serving((429, b"slow down"), (429, b"slow down")) as (url, requests):
        with pytest.raises(ConnectionError, match=r"/v1/chat/completions answered 429: slow down"):
            endpoint(url, "m", "?", name="a", tries=2)("", "")
        assert len(requests) == 2
    with serving((401, b"no such key")) as (url, requests):
        with pytest.raises(ConnectionError, match="answered 401: no such key"):
            endpoint(url, "m", "?", name="a")("", "")
        assert len(requests) == 1
    assert pauses == [1]


def test_an_endpoint_that_is_not_there_is_an_error(pauses):
    with serving() as (url, _):
        pass
    with pytest.raises(ConnectionError, match="cannot be reached"):
        endpoint(url, "m", "?", name="a", tries=3)("", "")
    assert pauses == [1, 2]


@pytest.mark.parametrize("answer", ["good", "", "4/5", "between 3 and 4", "80%", "v2", "1.2.3", "1,000"])
def test_an_answer_that_is_no_one_number_is_told(answer):
    with (
        serving(said(answer)) as (url, _),
        pytest.raises(ValueError, match="asked for one number, and answered") as told,
    ):
        endpoint(url, "m", "?", name="a")("", "")
    assert repr(answer) in str(told.value)


@pytest.mark.parametrize("body", [b"<html>", {"error": "?"}, {"choices": []}, [1], None], ids=str)
def test_an_answer_that_is_no_chat_completion_is_told(body):
    with serving((200, body)) as (url, _), pytest.raises(ValueError, match="answers with a chat completion, and sent"):
        endpoint(url, "m", "?", name="a")("", "")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"url": "file:///etc/passwd"}, "an endpoint has an address such as"), ({"tries": 0}, "at least once"),
        ({"key_from": "NO_SUCH_KEY"}, "environment variable 'NO_SUCH_KEY', which is not set"),
    ],
    ids=str,
)  # fmt: skip
def test_an_endpoint_that_cannot_be_asked_is_refused_when_it_is_made(how, told):
    with pytest.raises(ValueError, match=told):
        made(**{"url": "http://localhost/v1", "model": "m", "question": "?", "name": "a"} | how)


# how often a judge errs


def number(prompt, text):
    return float(text)


def test_a_judge_is_checked_on_both_labels():
    examples = [("", "0.9", True), ("", "0.4", True), ("", "0.6", False), ("", "0.1", False), ("", "0.2", False)]
    checked = check(number, examples)
    assert checked.reliability == Reliability(0.5, 1, 2, 1, 3, auc=5 / 6)
    assert checked.reliability.miss_rate == proportion(1, 2)
    assert checked.reliability.false_alarm_rate == proportion(1, 3)
    assert check(number, examples, threshold=0.3).reliability.missed == 0
    assert (checked.name, checked("", "3")) == ("number", 3)
    assert str(checked) == f"number: {checked.reliability}"


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        ([], "of both labels, got 0 True and 0 False"), ([("", "1", True)], "of both labels, got 1 True and 0 False"),
        ([("", "1", "yes")], "got 'yes'"), ([("", "x", True)], "the judge failed on the text 'x'"),
    ],
    ids=str,
)  # fmt: skip
def test_examples_that_tell_nothing_are_refused(examples, told):
    with pytest.raises(ValueError, match=told):
        check(number, examples)


def test_a_corrected_share_is_that_which_with_the_errors_gives_what_was_counted():
    known = Reliability(0.5, missed=10, positives=100, false_alarms=20, negatives=100, auc=0.9)
    for share in (0, 0.25, 0.5, 1):
        counted = round(1000 * (share * 0.9 + (1 - share) * 0.2))
        assert known.corrected(counted, 1000).value == pytest.approx(share)


def test_a_corrected_share_lies_in_its_interval_between_0_and_1():
    for missed, alarms, yes in np.ndindex(6, 6, 11):
        got = Reliability(0.5, missed, 10, alarms, 10, auc=0.9).corrected(yes, 10)
        assert math.isnan(got.value) == (missed == alarms == 5)
        assert math.isnan(got.value) or 0 <= got.low <= got.value <= got.high <= 1


def test_a_judge_that_guesses_corrects_nothing():
    got = Reliability(0.5, missed=6, positives=10, false_alarms=4, negatives=10, auc=0.5).corrected(3, 10)
    assert math.isnan(got.value)
    assert (got.low, got.high) == (0, 1)


def test_a_few_examples_of_one_kind_say_nothing_of_the_share():
    got = Reliability(0.5, missed=0, positives=1, false_alarms=90, negatives=100, auc=0.5).corrected(95, 100)
    assert (got.low, got.high) == (0, 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("misses", "alarms", "examples"), [(0.1, 0.1, 50), (0.25, 0.2, 40), (0.05, 0.02, 40)])
def test_the_interval_of_a_corrected_share_holds_it_in_95_of_100_cases(share, misses, alarms, examples):
    drawn, held, cases = np.random.default_rng(0), 0, 1000
    for _ in range(cases):
        missed, alarmed = drawn.binomial(examples, misses), drawn.binomial(examples, alarms)
        yes = drawn.binomial(50, share * (1 - misses) + (1 - share) * alarms)
        got = Reliability(0.5, int(missed), examples, int(alarmed), examples, auc=0.9).corrected(int(yes), 50)
        held += got.low - 1e-12 <= share <= got.high + 1e-12
    assert held / cases > 0.93


def test_all_that_is_public_is_there():
    assert all(getattr(judges, name).__doc__ for name in judges.__all__ if name != "Judge")
