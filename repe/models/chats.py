"""Chats: messages to tokens by a model's own chat template, up to where its answer begins, or goes on.

Templates differ in what they can say. Where one does not take system messages as they stand, or drops them without a
word, they are joined in front, and where that does not help either put before the first message of the user; where
there is no template at all, a plain transcript is written. The last two are said in a warning. Thoughts that a template
would open are switched off, or closed where the tag that opens them is known: the last token then stands where the
answer begins. What else a message holds, such as tool calls, is the template's to write; where it leaves that out, or
there is none, the chat is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from repe.models.ends import unended

Chat = Sequence[Mapping[str, Any]]
Messages = list[dict[str, Any]]

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
THOUGHTS = {"reasoning_content", "reasoning", "thinking"}  # of earlier answers, templates tend to leave them out
LABELS = {"name", "tool_call_id"}  # what templates may leave out of any message
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
    if any(answers) and _is_whole(messages_of(chat)):
        raise ValueError("no answer stands behind a chat that ends with one that is whole: leave it out, or ask again")
    if _has_code(tokenizer):
        return [_encode_by_code(tokenizer, chat, answer) for answer in answers]
    if not getattr(tokenizer, "chat_template", None):
        text, waits = transcript(tokenizer, chat), bool(cue(tokenizer, chat))
        gaps = [" " * (waits and answer[:1].strip() != "") for answer in answers]
        return [unended(tokenizer, text + gap + answer) for gap, answer in zip(gaps, answers, strict=True)]
    text = render(tokenizer, chat)
    return [list(tokenizer(text + answer, add_special_tokens=False)["input_ids"]) for answer in answers]


def messages_of(chat: Chat) -> Messages:
    """The messages of a chat, copied, without an empty answer at the end.

    Raises:
        ValueError: none says something, or one of them is no message.
    """
    if isinstance(chat, str | Mapping) or not isinstance(chat, Sequence):
        raise ValueError(f"got {chat!r:.60} for a chat: expected a list of messages")
    messages = [checked(message, f"message {number} of the chat") for number, message in enumerate(chat)]
    if messages and _goes_on(messages) and not (messages[-1]["content"].strip() or _more(messages[-1]) - LABELS):
        messages.pop()
    if all(_is_blank_system(message) for message in messages):
        raise ValueError("got a chat of no messages: give at least one that says something")
    return messages


def transcript(tokenizer: Any, chat: Chat) -> str:
    """A chat as plain text, with a warning.

    Raises:
        ValueError: as `messages_of` raises it, or a message holds more than a transcript can say.
    """
    messages = [m for m in messages_of(chat) if not _is_blank_system(m)]
    if more := sorted({key for message in messages for key in _more(message)}):
        raise ValueError(f"{_name(tokenizer)} has no chat template that would write {', '.join(map(repr, more))}")
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
        ValueError: it is no list of messages, or the template refuses it, or leaves out what a message holds.
    """
    from jinja2 import TemplateError

    messages = messages_of(chat)
    try:
        if lost := _lost(tokenizer, messages):
            raise ValueError(f"it leaves out {lost}")
        if not any(m["role"] == "system" for m in messages):
            return _apply(tokenizer, messages)
        for form in (messages, _system_first(messages)):
            if _keeps_system(tokenizer, form):
                return _apply(tokenizer, form)
        text = _apply(tokenizer, _system_by_user(messages))
        if not _system(messages):
            return text
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

    An answer that is begun stands where the model would begin it. Thoughts of its own are kept as they are. One that
    has more to it than a text is as the template has it, up to the text's end, or else whole.
    """
    if _is_whole(chat):
        return _templated(tokenizer, chat, thoughts=True)
    if not _goes_on(chat):
        return _open(_templated(tokenizer, chat, add_generation_prompt=True))
    before, answer = chat[:-1], chat[-1]["content"]
    if not before or _goes_on(before) or _more(chat[-1]):
        return _templated(tokenizer, chat, bool(_more(chat[-1])), continue_final_message=True)
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
    options = {} if _is_whole(messages) else {how: True}
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))
    except Exception as error:  # of a library that need not be there
        raise _refusal(tokenizer, chat, error) from error


def _refusal(tokenizer: Any, chat: Chat, error: Exception) -> ValueError:
    roles = ", ".join(message["role"] for message in chat)
    return ValueError(f"the chat template of {_name(tokenizer)} refuses a chat of the roles {roles}: {error}")


def _lost(tokenizer: Any, chat: Messages) -> str:
    """What of a message, besides its content, makes no difference to what the template writes; "" for nothing."""
    how = {"continue_final_message": _goes_on(chat) and not _is_whole(chat)}
    for number, message in enumerate(chat):
        is_last = number == len(chat) - 1
        for key in _more(message) - LABELS - (set() if is_last else THOUGHTS):
            others = [{k: v for k, v in m.items() if k != key} if m is message else m for m in chat]
            written = [_templated(tokenizer, form, thoughts=True, **how) for form in (chat, others)]
            if written[0] == written[1]:
                return f"{key!r} of message {number}"
    return ""


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
    if not system:
        return rest
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def _system(chat: Messages) -> str:
    return "\n\n".join(m["content"].strip() for m in chat if m["role"] == "system" and m["content"].strip())


def _is_blank_system(message: Mapping[str, Any]) -> bool:
    return message["role"] == "system" and not message["content"].strip() and not _more(message)


# Messages


def checked(message: Any, where: str) -> dict[str, Any]:
    """A copy of a message. Raises ValueError, which begins with `where`, if it is none."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {message!r:.60}: expected a mapping with a 'role' and a 'content'")
    if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
        raise ValueError(f"{where} has the role {message.get('role')!r:.60}: expected one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(
            f"{where} has the content {message.get('content')!r:.60}: expected a text, '' where it has none"
        )
    return dict(message)


def _more(message: Mapping[str, Any]) -> set[str]:
    """What a message holds besides its content."""
    return {key for key, value in message.items() if key not in ("role", "content") and value}


def _is_whole(chat: Messages) -> bool:
    """Whether the last answer cannot go on where its text ends: it has calls, or no text but something else."""
    more = _more(chat[-1]) - LABELS if _goes_on(chat) else set()
    return bool(more - THOUGHTS) or (bool(more) and not chat[-1]["content"].strip())


def _goes_on(chat: Messages) -> bool:
    return chat[-1]["role"] == "assistant"


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _say(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=2)
