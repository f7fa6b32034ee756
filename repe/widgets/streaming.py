"""Streaming: what a model writes with and without steering, side by side, token by token, with what it costs.

One `generate` runs three rows of the same prompt, so that the two texts come in step. The first row is left alone, the
second is steered. The third is left alone, and made to write what the second writes: it tells what the unsteered model
makes of the steered text. All write the likeliest token, so what differs between them comes from the edits.
"""

from __future__ import annotations

import math
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor

from repe.models.blocks import device_of, find_stack
from repe.models.generate import Halt
from repe.models.logits import check_causal, divergence, log_probabilities
from repe.models.tokens import Pieces, Text, encode, pad
from repe.models.tracking import Hook, put
from repe.reading.capture import evaluating, recording
from repe.reading.read import score
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit, EditOptions
from repe.steering.handle import Steering, status
from repe.steering.steer import steer

UNSTEERED, STEERED, FOLLOWER = range(3)
ROWS = 3
PLAIN = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
LONGEST_WORD = 24  # what is longer comes from a script that does not part its words
LARGEST_EXPONENT = 700.0
NOTHING = torch.empty(0)
# Handles and hooks keep to their thread, but whether a model is in training mode is the same for all.
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Job:
    """What is to be written: after which text, at which strength for every concept, by which edit, how long."""

    text: Text
    alphas: tuple[float, ...]
    options: EditOptions = field(default_factory=EditOptions)
    max_new_tokens: int = 64


@dataclass(frozen=True, eq=False)
class Side:
    """A text that is being written, or has been.

    Attributes:
        pieces: what every token adds to the text; empty for one that ends it, or leaves a character incomplete.
        scores: (tokens, concepts), of the activations that the text was written with, edits and all; NaN for a last
            token that nothing read.
        unsteered_scores: the same, as the unsteered model reads the text.
        surprisal: -log p of every token, for the unsteered model, in nats.
        divergence: KL(unsteered || writer) of the distributions that every token was chosen from, in nats.
        ended: whether there is no more to come.
    """

    pieces: tuple[str, ...] = ()
    scores: Tensor = NOTHING
    unsteered_scores: Tensor = NOTHING
    surprisal: tuple[float, ...] = ()
    divergence: tuple[float, ...] = ()
    ended: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def perplexity(self) -> float:
        """Of the text, for the unsteered model; NaN where nothing is written."""
        mean = _mean(self.surprisal)
        return math.inf if mean > LARGEST_EXPONENT else math.exp(mean)

    @property
    def kl(self) -> float:
        """The mean divergence a token; NaN where nothing is written."""
        return _mean(self.divergence)

    @property
    def whole(self) -> int:
        """How many tokens make up words that no token to come can change."""
        end = len(self.text) if self.ended else whole_words(self.text)
        lengths = torch.tensor([len(piece) for piece in self.pieces], dtype=torch.long)
        return int((lengths.cumsum(0) <= end).sum())


Sides = tuple[Side, Side]
"""Unsteered and steered."""


def whole_words(text: str) -> int:
    """How many characters of an unfinished text are whole words: those before its last space."""
    last = max(text.rfind(space) for space in " \n\t")
    if len(text) - last > LONGEST_WORD or unicodedata.east_asian_width(text[-1:] or " ") == "W":
        return len(text)
    return max(last, 0)


class SideBySide:
    """Writes texts with and without steering. Between two texts the model carries nothing of it.

    Attributes:
        others: the handles of somebody else that steered both sides of the latest text.

    Raises:
        ValueError, TypeError: the model writes no text from left to right, or a vector was made for another.
    """

    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any, vectors: Sequence[ConceptVector]) -> None:
        check_causal(model)
        self.model, self.tokenizer, self.vectors = model, tokenizer, tuple(vectors)
        self.others: list[Steering] = []
        self._writer = _writer_of(model)
        for vector in self.vectors:
            Edit.of(vector).on(find_stack(model, vector.stack))

    def write(
        self,
        job: Job,
        show: Callable[[Sides], None] = lambda sides: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Sides:
        """Write both texts, unsteered and steered.

        Args:
            show: is given the texts as they grow, token by token.
            is_stopped: asked at every token; once true, what is written so far is returned.

        Raises:
            ValueError, TypeError: as `repe.steer` and `repe.generate` do.
        """
        batch = pad([encode(self.tokenizer, job.text)] * ROWS, device=device_of(self.model))
        rows = ((UNSTEERED, UNSTEERED), (STEERED, FOLLOWER))
        pair = tuple(Line(self.tokenizer, row, reader, self._ends()) for row, reader in rows)
        with (
            suppress(StoppedError),
            _alone(is_stopped),
            evaluating(self.model),
            self._steering(job),
            self._reading() as read,
        ):
            watch = Watch(pair, batch["input_ids"].shape[1], read, show)
            written = self.model.generate(
                **batch, **PLAIN, max_new_tokens=job.max_new_tokens,
                logits_processor=[watch], stopping_criteria=[Halt(is_stopped)],
            )  # fmt: skip
            if is_stopped():
                raise StoppedError  # and no warning of a handle that had no time to edit anything
            watch.finish(written)
        return sides_of(pair)

    @contextmanager
    def _steering(self, job: Job) -> Iterator[None]:
        """The handles of all concepts whose alpha is not 0, for the second row alone."""
        self.others = status(self.model)
        with ExitStack() as handles:
            for vector, alpha in zip(self.vectors, job.alphas, strict=True):
                if alpha:
                    handles.enter_context(steer(self.model, vector, [0.0, alpha, 0.0], only_here=True, **job.options))
            yield

    @contextmanager
    def _reading(self) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """What the latest forward says of its last token, on the CPU: logits (rows, vocabulary), and scores (rows,
        concepts)."""
        places = [
            find_stack(self.model, vector.stack).site(vector.site, block)
            for vector in self.vectors
            for block in vector.recommended
        ]
        head = LogitsHook()
        with ExitStack() as hooks:
            hooks.callback(put(self._writer, head))
            records = hooks.enter_context(recording(places, _last_token))
            yield lambda: (head.last_token, self._scores(records))

    def _scores(self, records: Sequence[Tensor]) -> Tensor:
        """(rows, concepts) of records of (rows, d_model), at every vector's recommended blocks."""
        rest, columns = list(records), []
        for vector in self.vectors:
            at = [rest.pop(0) for _ in vector.recommended]
            rows = torch.tensor([vector.row(block) for block in vector.recommended])
            columns.append(score(torch.stack(at, dim=1), vector, rows).mean(-1))
        return torch.stack(columns, dim=-1) if columns else torch.empty(ROWS, 0)

    def _ends(self) -> set[int]:
        ends = self._writer.generation_config.eos_token_id
        return set() if ends is None else set(ends if isinstance(ends, list | tuple) else [ends])


class Line:
    """One text while it grows: of the row that writes it, and of the row that tells what the unsteered model thinks."""

    def __init__(self, tokenizer: Any, row: int, reader: int, ends: set[int]) -> None:
        self.tokenizer, self.row, self.reader, self.ends = tokenizer, row, reader, ends
        self.written = Pieces(tokenizer)
        self.side = Side()

    def add(self, tokens: Tensor, log_p: Tensor, scores: Tensor) -> None:
        """Take the token of its row: `tokens` (rows,), chosen from `log_p` (rows, vocabulary), read as `scores`."""
        side, token, reader = self.side, int(tokens[self.row]), log_p[self.reader]
        if not side.ended:
            self.side = Side(
                (*side.pieces, self.written.add(token)),
                torch.cat([side.scores, scores[None, self.row]]),
                torch.cat([side.unsteered_scores, scores[None, self.reader]]),
                (*side.surprisal, -float(reader[token])),
                (*side.divergence, float(divergence(reader, log_p[self.row]))),
                token in self.ends,
            )

    def end(self) -> None:
        """No more is to come: the decoder has the last word, which may tidy up what it wrote before."""
        *pieces, last = *self.side.pieces, self.written.rest()
        if pieces:
            pieces[-1] += last
        whole = str(self.tokenizer.decode(self.written.ids, skip_special_tokens=True))
        if whole != "".join(pieces):
            pieces = [*[""] * (len(pieces) - 1), whole]
        self.side = replace(self.side, pieces=tuple(pieces), ended=True)


class Watch(LogitsProcessor):
    """Follows a generation: one call a step, when the newest tokens have been read and the next are to be chosen."""

    def __init__(
        self,
        pair: tuple[Line, ...],
        prompt: int,
        read: Callable[[], tuple[Tensor, Tensor]],
        show: Callable[[Sides], None],
    ) -> None:
        self.pair, self.seen, self.read, self.show = pair, prompt, read, show
        self.log_p = self.readings = torch.empty(0)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logits, self.readings = self.read()
        self._take(input_ids, self.readings)
        self.log_p = log_probabilities(logits)
        scores = scores.clone()
        scores[FOLLOWER] = scores[STEERED]
        return scores

    def finish(self, written: Tensor) -> None:
        """Take the last tokens, which nothing has read."""
        self._take(written, torch.full_like(self.readings, math.nan))
        for line in self.pair:
            line.end()
        self.show(sides_of(self.pair))

    def _take(self, ids: Tensor, readings: Tensor) -> None:
        if ids.shape[1] > self.seen:
            self.seen = ids.shape[1]
            for line in self.pair:
                line.add(ids[:, -1].cpu(), self.log_p, readings)
            self.show(sides_of(self.pair))


class LogitsHook(Hook):
    """Keeps what a model puts out for the last token, (rows, vocabulary), before anything else is done with it.

    What another thread runs meanwhile is left alone.
    """

    last_token: Tensor

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self.thread:
            self.last_token = output.logits[:, -1].float().cpu()


class StoppedError(Exception):
    """Nobody wants any more what is being written."""


@contextmanager
def _alone(is_stopped: Callable[[], bool]) -> Iterator[None]:
    while not ONE_AT_A_TIME.acquire(timeout=0.05):
        if is_stopped():
            raise StoppedError
    try:
        yield
    finally:
        ONE_AT_A_TIME.release()


def _writer_of(model: nn.Module) -> Any:
    """The module that generates, whatever is wrapped around it."""
    writer = next((m for m in model.modules() if isinstance(m, GenerationMixin)), None)
    if writer is None or not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} has no `generate`: give a causal language model of transformers")
    return writer


def _last_token(hidden: Tensor) -> Tensor:
    """(rows, d_model), a copy."""
    return hidden[:, -1].to("cpu", torch.float32, copy=True)


def sides_of(pair: Sequence[Line]) -> Sides:
    return pair[0].side, pair[1].side


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
