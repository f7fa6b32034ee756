"""Chats: messages to tokens by a model's own chat template, up to where its answer begins, or goes on.

Templates differ in what they can say. Where one has no system role, refuses it, or drops it without a word, system
messages are put before the first message of the user; where there is no template at all, a plain transcript is written.
Both are said in a warning. Thoughts that a template would open are switched off, or closed: the last token stands where
the answer begins, for any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

Chat = Sequence[Mapping[str, str]]

SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch that turns thoughts off
OPENINGS = {"<think>": "\n</think>\n\n", "<|start|>assistant": "<|channel|>final<|message|>"}
SPEAKERS = {"user": "User: ", "assistant": "Assistant: ", "system": ""}


def encode_chat(tokenizer: Any, chat: Chat) -> list[int]:
    """The token ids of a chat.

    A chat that ends with an assistant's message is continued where that message ends; any other gets the prompt for the
    next answer. The template writes its own special tokens, so none is added twice. The tokenizer is not changed.

    Raises:
        ValueError: there are no messages, or the template refuses them.
    """
    if not chat:
        raise ValueError("got a chat of no messages: give at least one")
    messages = [dict(message) for message in chat]
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(transcript(tokenizer, messages))["input_ids"])
    return list(tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"])


def transcript(tokenizer: Any, chat: Chat) -> str:
    """A chat as plain text."""
    _say(f"{_name(tokenizer)} has no chat template: chats are written as plain transcripts, 'User: ... Assistant:'")
    lines = [f"{SPEAKERS.get(m['role'], m['role'] + ': ')}{m['content']}" for m in chat]
    return "\n\n".join(lines if _goes_on(chat) else [*lines, SPEAKERS["assistant"].strip()])


def render(tokenizer: Any, chat: Chat) -> str:
    """A chat as the tokenizer's template writes it, special tokens included.

    Raises:
        ValueError: the template refuses it.
    """
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system").strip()
    if not system:
        return _apply(tokenizer, chat)
    try:
        text = _apply(tokenizer, chat)
        if all(message["content"].strip() in text for message in chat if message["role"] == "system"):
            return text
    except ValueError:
        pass
    text = _apply(tokenizer, _without_system(chat, system))
    _say(
        f"the chat template of {_name(tokenizer)} has no system role: system messages are put before the first message "
        "of the user"
    )
    return text


def _apply(tokenizer: Any, chat: Chat) -> str:
    if not _goes_on(chat):
        return _open(_templated(tokenizer, chat, add_generation_prompt=True))
    try:
        return _templated(tokenizer, chat, continue_final_message=True)
    except ValueError:  # the template rewrites or refuses an answer that is only begun
        return _open(_templated(tokenizer, chat[:-1], add_generation_prompt=True)) + chat[-1]["content"]


def _templated(tokenizer: Any, chat: Chat, **how: bool) -> str:
    from jinja2 import TemplateError

    switches = {name: False for name in SWITCHES if name in str(tokenizer.chat_template)}
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **how, **switches))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise ValueError(
            f"the chat template of {_name(tokenizer)} refuses a chat of the roles {roles or 'none'}: {error}"
        ) from error


def _open(text: str) -> str:
    """The prompt for an answer, up to the answer itself: past thoughts, and past the choice of a channel."""
    ending = next((ending for ending in OPENINGS if text.rstrip().endswith(ending)), None)
    return text if ending is None else text.rstrip() + OPENINGS[ending]


def _without_system(chat: Chat, system: str) -> Chat:
    """The chat with its system messages put before the first message of the user."""
    rest = [message for message in chat if message["role"] != "system"]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def _goes_on(chat: Chat) -> bool:
    return chat[-1]["role"] == "assistant"


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _say(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=2)
