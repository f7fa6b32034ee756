"""A conversation with a model whose steering may change: what is cached is kept from turn to turn, while it holds.

The model is steered while it answers, and at no other time. A turn runs the tokens that the cache does not hold: those
from where the chat is rendered otherwise than it was, or, once a strength changed, all of them. So every answer is that
of a fresh conversation with the same messages, steered so from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from repe.models.blocks import device_of, find_stack, is_encoder_decoder
from repe.models.finite import FiniteLogits
from repe.models.generate import Halt
from repe.models.tokens import Pieces, encode
from repe.steering.edit import Concepts, Edit
from repe.steering.scope import Scope, in_scope, needs_prompt_length
from repe.steering.steer import steer


class Conversation:
    """A chat with one model, and its cache.

    Attributes:
        messages: what was said, the system message first if there is one.
        edits, alphas: what steers, and the strengths, by the name of the concept, in the order in which they act.
        reused, read: how many tokens of the latest prompt were in the cache, and how many were run.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str = "", **options: Any) -> None:
        """
        Args:
            model, tokenizer: neither is changed.
            system: the system message, if any.
            options: for `model.generate`, such as `max_new_tokens`.

        Raises:
            ValueError: the model is an encoder-decoder.
        """
        if is_encoder_decoder(model):
            raise ValueError(f"{type(model).__name__} is an encoder-decoder: a conversation needs a decoder alone")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.alphas: dict[str, float] = {}
        self.edits: dict[str, Edit] = {}
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.reused = self.read = 0
        self._forget()

    @property
    def system(self) -> str:
        """The system message. Setting another leaves what was said after it."""
        return next((m["content"] for m in self.messages if m["role"] == "system"), "")

    @system.setter
    def system(self, text: str) -> None:
        said = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *said] if text.strip() else said

    def reset(self) -> None:
        """Begin anew, with the strengths and the system message as they are."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._forget()

    def take_back(self) -> str:
        """Take back the latest question and its answer, and return the question, which is empty if there is none."""
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not asked:
            return ""
        question = self.messages[asked[-1]]["content"]
        self.messages = self.messages[: asked[-1]]
        return question

    def steer(self, name: str, alpha: float, edit: Concepts | Edit) -> None:
        """Steer along a concept from the next answer on.

        Raises:
            ValueError, TypeError, IndexError: the model cannot be steered so; the conversation stays as it was.
        """
        chosen = Edit.of(edit)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        chosen.on(find_stack(self.model, chosen.stack))  # refused now, and not in the middle of an answer
        self.edits[name], self.alphas[name] = chosen, float(alpha)

    def unsteer(self) -> None:
        """Steer along nothing any more."""
        self.alphas.clear()

    @property
    def acting(self) -> tuple[tuple[str, float], ...]:
        """The strengths that are not 0."""
        return tuple((name, alpha) for name, alpha in self.alphas.items() if alpha)

    @property
    def outdated(self) -> int:
        """How many tokens the cache holds that were run under other strengths, and are run anew with the next turn."""
        return len(self._held) if self._held_under != self._steered_by else 0

    @property
    def _steered_by(self) -> tuple[tuple[Edit, float], ...]:
        return tuple((self.edits[name], alpha) for name, alpha in self.acting)

    @torch.no_grad()
    def ask(
        self, text: str, on_text: Callable[[str], None] = lambda text: None, stop: Callable[[], bool] = lambda: False
    ) -> str:
        """The model's answer, which is kept with the question.

        Args:
            text: what the user says.
            on_text: is given the answer in pieces, as they come.
            stop: is asked after every token; once it says so, the answer ends there.

        Raises:
            ValueError: the template refuses the chat; or what generation raises. Nothing was said then.
        """
        chat = [*self.messages, {"role": "user", "content": text}]
        ids = encode(self.tokenizer, chat)
        cache, self.reused = self._cache_for(ids)
        self.read = len(ids) - self.reused
        self._forget()  # until the answer is whole: what breaks off leaves half a cache
        batch = torch.tensor([ids], device=device_of(self.model))
        with ExitStack() as handles:
            for edit, alpha in self._steered_by:
                handles.enter_context(steer(self.model, edit, alpha)).own(cache)
            output = self.model.generate(
                batch, attention_mask=torch.ones_like(batch), past_key_values=cache, return_dict_in_generate=True,
                streamer=Streamer(self.tokenizer, on_text), stopping_criteria=[Halt(stop)],
                logits_processor=[handles.enter_context(FiniteLogits(self.model))], **self.options,
            )  # fmt: skip
        written = output.sequences[0].tolist()
        self._keep(getattr(output, "past_key_values", None), written[:-1], len(ids))
        answer = str(self.tokenizer.decode(written[len(ids) :], skip_special_tokens=True))
        self.messages = [*chat, {"role": "assistant", "content": answer}]
        return answer

    # the cache

    def _forget(self) -> None:
        self._keep(None, [], 0)

    def _keep(self, cache: Any, ids: Sequence[int], prompt_length: int) -> None:
        """Keep a cache of these tokens. One whose end cannot be taken off is of no use for another turn."""
        is_usable = getattr(cache, "is_croppable", False) and cache.get_seq_length() == len(ids)
        self._cache: Any = cache if is_usable else None
        self._held = list(ids) if is_usable else []
        self._held_under, self._prompt_length = self._steered_by, prompt_length

    def _cache_for(self, ids: Sequence[int]) -> tuple[Any, int]:
        """The cache, cut to what of it holds for a prompt, and how many tokens that are; None where nothing does."""
        count = self._still_right(ids)
        if not count:
            return None, 0
        if surplus := len(self._held) - count:
            try:
                self._cache.crop(-surplus)
            except RuntimeError:  # it slid past its window, and what slid out is gone
                return None, 0
        return self._cache, count

    def _still_right(self, ids: Sequence[int]) -> int:
        """How many of the tokens in the cache begin the prompt, and were run as they would be now."""
        if self.outdated:
            return 0
        most = min(len(self._held), len(ids) - 1)  # the last is run, for what it predicts
        same = next((i for i in range(most) if self._held[i] != ids[i]), most)
        return min(
            (unmoved(edit.scope, self._prompt_length, len(ids), same) for edit, _ in self._steered_by), default=same
        )


def unmoved(scope: Scope, before: int, after: int, count: int) -> int:
    """How many of the first `count` tokens a scope names alike for a prompt of `before` tokens and for one of `after`.

    What was the answer is part of the next prompt, and scopes tell the two apart.
    """
    if not needs_prompt_length(scope):
        return count
    slots = torch.arange(count)
    old, new = (in_scope(scope, slots[None], torch.tensor([[length]]), slots) for length in (before, after))
    assert old is not None
    assert new is not None
    moved = (old != new)[0].nonzero()
    return int(moved[0]) if len(moved) else count


class Streamer(BaseStreamer):
    """Hands on what is written as soon as it can be read."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.pieces, self.on_text, self.is_prompt = Pieces(tokenizer), on_text, True

    def put(self, value: Tensor) -> None:
        for token in () if self.is_prompt else value.reshape(-1).tolist():
            self._say(self.pieces.add(token))
        self.is_prompt = False

    def end(self) -> None:
        self._say(self.pieces.rest())

    def _say(self, piece: str) -> None:
        if piece:
            self.on_text(piece)
