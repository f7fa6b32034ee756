"""Chats: messages to tokens by a model's own chat template, up to where its answer begins, or goes on.

Templates differ in what they can say. Where one does not take system messages as they stand, or drops them without a
word, they are joined in front, and where that does not help either put before the first message of the user; where
there is no template at all, a plain transcript is written. The last two are said in a warning. Thoughts that a template
would open are switched off, or closed where the tag that opens them is known: the last token then stands where the
answer begins.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from repe.models.ends import unended

Chat = Sequence[Mapping[str, str]]
Messages = list[dict[str, str]]

VERSION = 2  # of the rendering: to be raised when a chat comes to give other tokens on the same template
ROLES = ("system", "user", "assistant", "tool", "developer")
SPEAKERS = {"user": "User: ", "assistant": "Assistant: ", "tool": "Tool: ", "system": "", "developer": ""}
SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch that turns thoughts off
# The known endings of a prompt that are not yet the answer, and what leads from each to the answer. A tag that is not
# in this table is not closed.
OPENINGS = {
    "<think>": "\n</think>\n\n",
    "<thought>": "\n</thought>\n\n",
    "<seed:think>": "</seed:think>\n",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|start|>assistant": "<|channel|>final<|message|>",
}
WITHOUT_TEMPLATE = {"MistralCommonBackend", "MistralCommonTokenizer"}  # they render chats by code of their own


def encode_chat(tokenizer: Any, chat: Chat) -> list[int]:
    """The token ids of a chat.

    A chat that ends with an assistant's message is continued where that message ends; any other, and one whose last
    answer is empty, gets the prompt for the next answer. The template writes its own special tokens, so none is added
    twice. Neither the tokenizer nor the chat is changed.

    Raises:
        ValueError: this is no list of messages, or there are none, or the template refuses them.
    """
    return encode_answers(tokenizer, chat, [""])[0]


def encode_answers(tokenizer: Any, chat: Chat, answers: Sequence[str]) -> list[list[int]]:
    """The token ids of a chat with each of several answers in place of the next, or of the rest of one that is begun.

    Both are encoded together, but for what the template would put behind. Behind a transcript that waits for an answer
    it stands after a space. Raises as `encode_chat` does.
    """
    if _has_code(tokenizer):
        return [_encode_by_code(tokenizer, chat, answer) for answer in answers]
    if not getattr(tokenizer, "chat_template", None):
        text, waits = transcript(tokenizer, chat), bool(cue(tokenizer, chat))
        gaps = [" " * (waits and answer[:1].strip() != "") for answer in answers]
        return [unended(tokenizer, text + gap + answer) for gap, answer in zip(gaps, answers, strict=True)]
    text = render(tokenizer, chat)
    return [list(tokenizer(text + answer, add_special_tokens=False)["input_ids"]) for answer in answers]


def messages_of(chat: Chat) -> Messages:
    """The messages of a chat that say something, copied: no blank system message, and no empty answer at the end.

    Raises:
        ValueError: there are none, or one of them is no message.
    """
    if isinstance(chat, str | Mapping) or not isinstance(chat, Sequence):
        raise ValueError(f"got {chat!r:.60} for a chat: expected a list of messages")
    messages = [checked(message, f"message {number} of the chat") for number, message in enumerate(chat)]
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if messages and _goes_on(messages) and not messages[-1]["content"].strip():
        messages.pop()
    if not messages:
        raise ValueError("got a chat of no messages: give at least one that says something")
    return messages


def transcript(tokenizer: Any, chat: Chat) -> str:
    """A chat as plain text, with a warning. Raises ValueError as `messages_of` does."""
    messages = messages_of(chat)
    _say(f"{_name(tokenizer)} has no chat template: chats are written as plain transcripts, 'User: ... Assistant:'")
    lines = [SPEAKERS[m["role"]] + m["content"] for m in messages]
    return "\n\n".join(lines if _goes_on(messages) else [*lines, SPEAKERS["assistant"].strip()])


def cue(tokenizer: Any, chat: Chat) -> str:
    """What a transcript that waits for an answer ends with, and a space must follow; empty where a template is used."""
    has_template = _has_code(tokenizer) or getattr(tokenizer, "chat_template", None)
    return "" if has_template or _goes_on(messages_of(chat)) else SPEAKERS["assistant"].strip()


def render(tokenizer: Any, chat: Chat) -> str:
    """A chat as the tokenizer's template writes it, special tokens included.

    Raises:
        ValueError: it is no list of messages, or the template refuses it.
    """
    from jinja2 import TemplateError

    messages = messages_of(chat)
    try:
        if not any(m["role"] == "system" for m in messages):
            return _apply(tokenizer, messages)
        for form in (messages, _system_first(messages)):
            if _keeps_system(tokenizer, form):
                return _apply(tokenizer, form)
        text = _apply(tokenizer, _system_by_user(messages))
    except (TemplateError, ValueError) as error:
        raise _refusal(tokenizer, chat, error) from error
    _say(
        f"the chat template of {_name(tokenizer)} does not take these system messages: they are put before the first "
        "message of the user"
    )
    return text


# What a template does with a chat


def _apply(tokenizer: Any, chat: Messages) -> str:
    """The chat up to where its last answer goes on, or else to where the next one begins.

    An answer that is begun stands where the model would begin it. Thoughts of its own are kept as they are.
    """
    if not _goes_on(chat):
        return _open(_templated(tokenizer, chat, add_generation_prompt=True))
    before, answer = chat[:-1], chat[-1]["content"]
    if not before or _goes_on(before):
        return _templated(tokenizer, chat, continue_final_message=True)
    if own := next((opening for opening in OPENINGS if answer.lstrip().startswith(opening)), None):
        prompt = _templated(tokenizer, before, thoughts=True, add_generation_prompt=True)
        return (prompt.rstrip().removesuffix(own) if prompt.rstrip().endswith(own) else prompt) + answer
    prompt = _open(_templated(tokenizer, before, add_generation_prompt=True))
    text = _continued(tokenizer, chat)
    return text if text is not None and text.startswith(prompt.rstrip()) else prompt + answer


def _continued(tokenizer: Any, chat: Messages) -> str | None:
    """The chat with its last answer left open; None where the template rewrites or refuses one that is only begun."""
    from jinja2 import TemplateError

    try:
        return _templated(tokenizer, chat, continue_final_message=True)
    except (TemplateError, ValueError):
        return None


def _templated(tokenizer: Any, chat: Messages, thoughts: bool = False, **how: bool) -> str:
    switches = {name: thoughts for name in SWITCHES if name in str(tokenizer.chat_template)}
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **how, **switches))


def _open(text: str) -> str:
    """The prompt for an answer, up to the answer itself: past thoughts, and past the choice of a channel."""
    ending = next((ending for ending in OPENINGS if text.rstrip().endswith(ending)), None)
    return text if ending is None else text.rstrip() + OPENINGS[ending]


def _has_code(tokenizer: Any) -> bool:
    return any(kind.__name__ in WITHOUT_TEMPLATE for kind in type(tokenizer).__mro__)


def _encode_by_code(tokenizer: Any, chat: Chat, answer: str) -> list[int]:
    """The tokens of a chat and an answer by a tokenizer that has a method for it and no template."""
    messages = messages_of(chat)
    if answer:
        begun = messages.pop()["content"] if _goes_on(messages) else ""
        messages.append({"role": "assistant", "content": begun + answer})
    how = "continue_final_message" if _goes_on(messages) else "add_generation_prompt"
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **{how: True}))
    except Exception as error:  # of a library that need not be there
        raise _refusal(tokenizer, chat, error) from error


def _refusal(tokenizer: Any, chat: Chat, error: Exception) -> ValueError:
    roles = ", ".join(message["role"] for message in chat)
    return ValueError(f"the chat template of {_name(tokenizer)} refuses a chat of the roles {roles}: {error}")


# System messages


def _keeps_system(tokenizer: Any, chat: Messages) -> bool:
    """Whether the template writes every system message somewhere: tried with words that stand nowhere else."""
    from jinja2 import TemplateError

    marked = [{**m, "content": f"zqx{i}qxz"} if m["role"] == "system" else m for i, m in enumerate(chat)]
    try:
        text = _apply(tokenizer, marked).lower()
    except (TemplateError, ValueError):
        return False
    return all(m["content"] in text for m in marked if m["role"] == "system")


def _system_first(chat: Messages) -> Messages:
    """The chat with its system messages joined as its first."""
    return [{"role": "system", "content": _system(chat)}, *(m for m in chat if m["role"] != "system")]


def _system_by_user(chat: Messages) -> Messages:
    """The chat with its system messages put before the first message of the user."""
    system, rest = _system(chat), [m for m in chat if m["role"] != "system"]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def _system(chat: Messages) -> str:
    return "\n\n".join(m["content"].strip() for m in chat if m["role"] == "system")


# Messages


def checked(message: Any, where: str) -> dict[str, str]:
    """A copy of a message. Raises ValueError, which begins with `where`, if it is none."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {message!r:.60}: expected a mapping with a 'role' and a 'content'")
    if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
        raise ValueError(f"{where} has the role {message.get('role')!r:.60}: expected one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"{where} has the content {message.get('content')!r:.60}: expected a text")
    return dict(message)


def _goes_on(chat: Messages) -> bool:
    return chat[-1]["role"] == "assistant"


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _say(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=2)
