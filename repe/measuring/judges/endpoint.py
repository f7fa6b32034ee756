"""Endpoint: a language model that judges, behind any address that takes chat completions as OpenAI's does."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from repe.measuring.judges.judge import Judge

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w%]|\.\d)")
FIRST_PAUSE = 1.0  # seconds, doubled with every try

ASKED = "Answer with one number and nothing else."
DEFAULTS = {"temperature": 0}
HEADERS = {"Content-Type": "application/json"}


def endpoint(
    url: str,
    model: str,
    question: str,
    *,
    name: str,
    key_from: str | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    tries: int = 5,
) -> Judge:
    """Make a judge that puts a question on every text to a language model, and takes the one number that it answers.

    What is judged may talk to the judge ("give this a 10"): look at texts of a surprising score.

    Args:
        url: up to the version, as in "http://localhost:8000/v1"; POSTs go to its /chat/completions.
        model: by the endpoint's name.
        question: what the number says, and between which numbers; the prompt and the text follow it.
        name: what its judgements are kept under: another for another question, or another model.
        key_from: the environment variable that holds the key, which is sent as a bearer token; None for no key.
        options: of the request besides, such as a longest answer; {"temperature": 0} by default.
        timeout: seconds until an answer is given up.
        tries: how often it is asked where it is busy (429), fails (5xx), or cannot be reached; the pause doubles.

    Raises:
        ValueError: the address is not of http or https, `tries` is less than 1, or the environment variable is not set.
            The judge raises it where the answer is no one number, and ConnectionError where there is none.

    Example:
        >>> question = "How polite is the text, from 0 (rude) to 10 (most polite)?"
        >>> polite = endpoint("http://localhost:8000/v1", "a-large-model", question, name="polite")
        >>> polite.__name__
        'polite'
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"an endpoint has an address such as 'http://localhost:8000/v1', got {url!r}")
    if tries < 1:
        raise ValueError(f"an endpoint is asked at least once, got tries={tries}")
    if key_from is not None and key_from not in os.environ:
        raise ValueError(f"the key is to be in the environment variable {key_from!r}, which is not set")

    def judge(prompt: Any, text: str) -> float:
        content = f"{question}\n\n<prompt>\n{_told(prompt)}\n</prompt>\n\n<text>\n{text}\n</text>\n\n{ASKED}"
        asked = {"model": model, "messages": [{"role": "user", "content": content}], **(options or DEFAULTS)}
        request = Request(f"{url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), HEADERS)
        if key_from is not None:  # a key follows no redirect to somewhere else
            request.add_unredirected_header("Authorization", f"Bearer {os.environ[key_from]}")
        return _number(_answer(_sent(request, timeout, tries)))

    judge.__name__ = name
    return judge


def _told(prompt: Any) -> str:
    """A prompt as text: of a chat, who says what."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _sent(request: Request, timeout: float, tries: int) -> bytes:
    """What comes back. Raises ConnectionError where nothing does, or a refusal."""
    for pause in [FIRST_PAUSE * 2**tried for tried in range(tries - 1)] + [None]:
        try:
            with urlopen(request, timeout=timeout) as response:
                return bytes(response.read())
        except HTTPError as error:
            with error:
                told = f"{request.full_url} answered {error.code}: {error.read().decode(errors='replace'):.300}"
            may_pass = error.code == 429 or error.code >= 500
        except (URLError, HTTPException, OSError) as error:
            told, may_pass = f"{request.full_url} cannot be reached: {error}", True
        if pause is None or not may_pass:
            break
        time.sleep(pause)
    raise ConnectionError(told)


def _answer(body: bytes) -> str:
    """The text of a chat completion."""
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"a judge's endpoint answers with a chat completion, and sent {body[:300]!r}") from error


def _number(answer: str) -> float:
    if len(found := NUMBER.findall(answer)) != 1:
        raise ValueError(f"a judge was asked for one number, and answered {answer!r:.300}: let the question say so")
    return float(found[0])
