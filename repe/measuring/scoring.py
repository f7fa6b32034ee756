"""Scoring: how likely a model finds answers, and what it writes, at every strength of an edit.

The one way in which anything is measured: the sweep, the trade-off, the texts written and lm-eval's tasks all come of a
`Scorer`. `TransformersScorer` is the one for models of transformers, and measures besides what an edit costs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from repe.data.answers import Answer, answers_of
from repe.data.items import Item
from repe.display import bar_of
from repe.measuring.fanout import BATCH_TOKENS, Fanout, grow, why_padded
from repe.measuring.record import Record, missing, name_of
from repe.models.blocks import find_stack
from repe.models.counts import check_counts
from repe.models.finite import not_finite
from repe.models.generate import continuations
from repe.models.logits import check_causal, divergence, log_probabilities
from repe.models.tokens import Text, encode
from repe.reading.capture import evaluating, recording
from repe.reading.trees import Batch, Tree, in_trees, pays
from repe.steering.edit import Edit
from repe.steering.handle import Steering
from repe.steering.scope import Scope, check_for_many, check_inside
from repe.steering.steer import steer

LARGEST, ROUNDING = 1e30, 1e-3
LOG_P, LENGTH = (-LARGEST, 0.0), (0.0, LARGEST)  # what a value can be, but for rounding
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Of answers: log P behind their prompts in nats, summed over their tokens, and whether greedy decoding would write
    them; both (alphas, answers)."""

    log_p: Tensor
    greedy: Tensor


class Scorer(Protocol):
    """What measures a model under an edit, at every strength; None for no edit."""

    def log_likelihoods(self, answers: Sequence[Answer], edit: Edit | None, alphas: Sequence[float]) -> Likelihoods:
        """How likely the model finds answers, each of one token at least."""

    def write(
        self, prompts: Sequence[Text], edit: Edit | None, alphas: Sequence[float], *, max_new_tokens: int
    ) -> list[list[str]]:
        """What the model writes after prompts, greedily: the likeliest token each time. One row a strength."""


# what is taken of a batch


class AnswerFanout(Fanout):
    """Of answers: log P, and whether it is greedy."""

    kind, values = "log-likelihood", 2
    ranges = (LOG_P, (0.0, 1.0))

    @staticmethod
    def numbers(answer: Answer) -> int:
        return 1

    def at(self, batch: Batch, alphas: Tensor) -> Sequence[Tensor]:
        answers = [self.answers[text] for text in batch.texts]
        ends = [slots[answer.begins - 1 :] for answer, slots in zip(answers, batch.slots, strict=True)]
        owner = torch.arange(len(ends)).repeat_interleave(torch.tensor([len(end) for end in ends]))
        wanted, place = torch.cat(ends).unique(return_inverse=True)
        nodes, node = torch.stack([torch.tensor(batch.rows)[owner], place]).unique(dim=1, return_inverse=True)
        tokens = torch.tensor([token for answer in answers for token in answer.ids[answer.begins :]])
        log_p, missed = torch.zeros(2, len(alphas), len(answers))
        for chunk, logits in self.logits(batch, alphas, wanted, self.begin(batch)):
            rows, places, n, t = (index.to(logits.device) for index in (*nodes, node, tokens))
            at = logits[rows, :, places]
            log_p[chunk].index_add_(1, owner, log_probabilities(at)[n, :, t].T.float().cpu())
            missed[chunk].index_add_(1, owner, 1 - _are_greedy(at, n, t).T.float().cpu())
        return torch.stack([log_p, (missed == 0).float()])[..., None].unbind(2)


def _are_greedy(logits: Tensor, node: Tensor, tokens: Tensor) -> Tensor:
    """(tokens, strengths), whether each token is the likeliest at its node of (nodes, strengths, vocabulary)."""
    if logits.dtype in (torch.float32, torch.float64):
        return logits[node, :, tokens] == logits.amax(-1)[node]  # several times as quick
    return logits.argmax(-1)[node] == tokens[:, None]  # several are likeliest by rounding, and the first is written


class TokenFanout(Fanout):
    """Of every token but the first: log P, KL(unsteered || steered), and the norm of the change of the last block's
    output."""

    kind, values = "costs", 3
    ranges = (LOG_P, LENGTH, LENGTH)

    @staticmethod
    def numbers(answer: Answer) -> int:
        return len(answer.ids) - 1

    def at(self, batch: Batch, alphas: Tensor) -> Sequence[Tensor]:
        outset = self.begin(batch)
        ((_, plain, hidden),) = self._states(batch, torch.zeros(1), outset)
        found = [torch.empty(3, len(alphas), len(slots)) for slots in batch.slots]
        for chunk, logits, state in self._states(batch, alphas, outset):
            for kept, text, row, slots in zip(found, batch.texts, batch.rows, batch.slots, strict=True):
                before = log_probabilities(plain[row][:, slots].double())
                steered = log_probabilities(logits[row][:, slots].double())
                targets = torch.tensor(self.answers[text].ids[1:], device=steered.device)
                kept[0, chunk] = steered[:, torch.arange(len(slots)), targets].float().cpu()
                kept[1, chunk] = divergence(before, steered).float().cpu()
                kept[2, chunk] = (state[row][:, slots] - hidden[row][:, slots]).float().norm(dim=-1).cpu()
        return found

    def _states(self, batch: Batch, alphas: Tensor, outset: Any) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of the strengths, and their logits and last hidden states, (rows, alphas, columns, ...)."""
        with recording([self.stack.blocks[-1]], lambda hidden: hidden.clone()) as records:
            for chunk, logits in self.logits(batch, alphas, torch.arange(batch.width), outset):
                yield chunk, logits, rearrange(records[0], "(rows alphas) n d -> rows alphas n d", rows=batch.height)


class TransformersScorer:
    """A scorer of models of transformers: many strengths a batch, with all that texts share computed once.

    What the user has attached to the model applies too. Afterwards the model is as it was.

    Args:
        model, tokenizer: neither is changed.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        batch_tokens: tokens a forward that scores, at most: what bounds the memory. It holds one text at least.
        batch_size: texts that are written at a time, of whatever strengths.
        resume: a file that keeps what is measured: see `repe.measuring.record`.
        progress: show progress bars; None: where a terminal or a notebook shows them.

    Raises:
        ValueError: the model does not predict every token from those before it alone, or `resume` holds something else.

    Example:
        >>> scorer = TransformersScorer(model, tokenizer)
        >>> edit = Edit.of(repe.extract(model, tokenizer, "honesty"))
        >>> scorer.log_likelihoods([Answer((1, 5, 6), begins=2)], edit, [-1.0, 0.0, 1.0]).log_p.shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        blocks_at: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int = 32,
        resume: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        check_counts(batch_tokens=batch_tokens, batch_size=batch_size)
        check_causal(model, blocks_at)
        self.model, self.tokenizer, self.blocks_at = model, tokenizer, blocks_at
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.record = Record() if resume is None else Record.open(resume, model, blocks_at)
        self.progress = progress
        self._grown: tuple[Any, tuple[list[Tree], list[Tensor]]] = (None, ([], []))

    def log_likelihoods(self, answers: Sequence[Answer], edit: Edit | None, alphas: Sequence[float]) -> Likelihoods:
        """Of answers, each of one token at least.

        Raises:
            ValueError: an answer of no tokens, an edit whose scope is a mask, or what `repe.steer` raises.
            IndexError: the scope names a position before the start of a prompt.
            OverflowError: at some strengths logits are not finite.

        Warns:
            UserWarning: trees of shared prefixes came out wrong for this model; padded rows were run instead.
        """
        if any(answer.begins == len(answer.ids) for answer in answers):
            raise ValueError("an answer of no tokens has no probability: give answers of one token at least")
        log_p, greedy = torch.cat(self._filled(AnswerFanout, answers, edit, alphas), dim=-1)
        return Likelihoods(log_p, greedy > 0)

    def costs(self, texts: Sequence[Answer], edit: Edit, alphas: Sequence[float]) -> list[Tensor]:
        """For every text (3, alphas, tokens) of all tokens but the first: log P in nats, KL(unsteered || steered) in
        nats, and the norm of the change of the last block's output. Raises and warns as `log_likelihoods` does."""
        return self._filled(TokenFanout, texts, edit, alphas)

    def write(
        self, prompts: Sequence[Text], edit: Edit | None, alphas: Sequence[float], *, max_new_tokens: int
    ) -> list[list[str]]:
        """What the model writes, greedily, whatever its own generation config says of sampling and beams.

        Raises:
            ValueError: as `log_likelihoods` raises it, or a prompt of no tokens.
        """
        check_counts(max_new_tokens=max_new_tokens)
        lengths = [len(encode(self.tokenizer, prompt)) for prompt in prompts]
        names = self.names_of(prompts, max_new_tokens)
        page = self.record.page("text", edit)
        known = page.known(names, lambda _, value: _is_text(value))
        texts = [dict(values) for values in known]
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        places = [(i, alpha) for i in order for alpha in alphas if alpha not in texts[i]]
        if places:
            greedily = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
            starts = range(0, len(places), self.batch_size)
            with self.steered(edit) as handle:
                for start in bar_of(starts, "writing", unit="batch", progress=self.progress):
                    batch = places[start : start + self.batch_size]
                    if handle is not None:
                        handle.alpha = [alpha for _, alpha in batch]
                    written = continuations(self.model, self.tokenizer, [prompts[i] for i, _ in batch], **greedily)
                    for (i, alpha), text in zip(batch, written, strict=True):
                        texts[i][alpha] = text
                    page.add([(names[i], [a], [texts[i][a]]) for i, a in batch])
        return [[texts[i][alpha] for i in range(len(prompts))] for alpha in alphas]

    def names_of(self, prompts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """What texts written after prompts are called in a record."""
        config = getattr(self.model, "generation_config", None)
        how = {"longest": max_new_tokens, "config": {} if config is None else config.to_dict()}
        return [name_of([encode(self.tokenizer, prompt), how]) for prompt in prompts]

    # what is known already, and what is run

    @torch.inference_mode(False)
    def _filled(
        self,
        kind: type[Fanout],
        answers: Sequence[Answer],
        edit: Edit | None,
        alphas: Sequence[float],
    ) -> list[Tensor]:
        """(values, alphas, numbers) of every answer."""
        asked = [0.0] * len(alphas) if edit is None else [alpha + 0.0 for alpha in alphas]  # -0 is 0
        strengths = [*dict.fromkeys(asked)]
        names = [name_of([answer.ids, answer.begins]) for answer in answers]
        found = [torch.empty(kind.values, len(strengths), kind.numbers(answer)) for answer in answers]
        page = self.record.page(kind.kind, edit)
        known = page.known(names, lambda i, value: _fits(value, kind, kind.numbers(answers[i])))
        for table, values in zip(found, known, strict=True):
            for column in (column for column, alpha in enumerate(strengths) if alpha in values):
                table[:, column] = torch.tensor(values[strengths[column]])
        for lacking, numbers in missing(known, strengths).items():
            columns = [strengths.index(alpha) for alpha in lacking]
            bar = bar_of(desc="scoring", total=len(numbers), unit="text", progress=self.progress)
            with bar, self._fanned(kind, [answers[i] for i in numbers], edit, lacking) as (fan, trees):
                for batch, results in fan.run(trees):
                    self._check_finite(results, lacking)
                    measured = {numbers[text]: result for text, result in zip(batch.texts, results, strict=True)}
                    for i, result in measured.items():
                        found[i][:, columns] = result
                    rows = ((names[i], lacking, result.transpose(0, 1).tolist()) for i, result in measured.items())
                    page.add(rows)
                    bar.update(len(measured))
        return [table[:, [strengths.index(alpha) for alpha in asked]] for table in found]

    def _check_finite(self, results: Sequence[Tensor], alphas: Sequence[float]) -> None:
        finite = torch.cat([*results], dim=-1).isfinite().all(-1).all(0)
        wild = [alpha for alpha, is_finite in zip(alphas, finite.tolist(), strict=True) if not is_finite]
        if wild:
            raise not_finite(self.model, f"non-finite logits at the strengths {wild}", is_steered=0.0 not in wild)

    @contextmanager
    def _fanned(
        self,
        kind: type[Fanout],
        answers: Sequence[Answer],
        edit: Edit | None,
        alphas: Sequence[float],
    ) -> Iterator[tuple[Fanout, list[Batch]]]:
        """What is to be run, and the trees to run it on."""
        stack = find_stack(self.model, "decoder" if edit is None else edit.stack, self.blocks_at)
        why_not = why_padded(self.model, stack, edit)
        scope = "all" if edit is None else edit.scope
        with self.steered(edit) as handle:
            if isinstance(scope, tuple):
                check_inside(scope, min(answer.begins for answer in answers))
            trees, edited = ([], []) if why_not else self._trees(answers, scope, stack.d_model)
            fan = kind(self.model, stack, handle, answers, torch.tensor(alphas), self.batch_tokens, edited)
            batches = in_trees(trees, stack.module, fan.fits)
            if trees and edit is None and not pays(batches, fan.rows, stack.d_model):
                batches, why_not = [], "they share too few of their tokens"
            way = f"in padded rows: {why_not}" if why_not else f"in {len(trees)} trees, past {len(fan.passed)} blocks"
            log.info("%d texts at %d strengths %s", len(answers), len(alphas), way)
            yield fan, batches

    def _trees(self, answers: Sequence[Answer], scope: Scope, d_model: int) -> tuple[list[Tree], list[Tensor]]:
        """Those of the latest answers are kept: they are asked for again with every edit."""
        asked = answers, scope
        if asked != self._grown[0]:
            self._grown = asked, grow(answers, scope, d_model, self.batch_tokens)
        return self._grown[1]

    @contextmanager
    def steered(self, edit: Edit | None) -> Iterator[Steering | None]:
        """The model as it is measured, with a handle of the edit."""
        if edit is not None:
            check_for_many(edit.scope)
        handle = None if edit is None else steer(self.model, edit, 0.0, blocks_at=self.blocks_at, only_here=True)
        if handle is not None:
            handle._is_weighed = True  # here strengths are not chosen: they are measured
        with handle or nullcontext(), evaluating(self.model), torch.inference_mode(False), torch.no_grad():
            yield handle


def _fits(value: Any, kind: type[Fanout], numbers: int) -> bool:
    """Whether plain data are what is measured: (values, numbers) of float32, each in its range."""
    try:
        array = np.asarray(value)
    except (ValueError, RecursionError):
        return False
    if array.shape != (kind.values, numbers) or array.dtype.kind not in "iuf":
        return False
    low, high = np.array(kind.ranges).T
    return bool(((low - ROUNDING <= array.T) & (high + ROUNDING >= array.T)).all())


def _is_text(value: Any) -> bool:
    """Whether it is a text that a tokenizer may have decoded: half a character is none."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


# for functions that take a model


def log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    blocks_at: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Tensor]:
    """log P(option | prompt) of the model as it is, steered or not: for every item a float32 tensor (options,).

    Args:
        model, tokenizer: neither is changed. Handles on the model are told where the prompts end, as scopes need.
        items: prompts and options, which are encoded together: see `answers_of`.
        blocks_at, batch_tokens: as in `TransformersScorer`.

    Raises:
        ValueError: an option of no tokens, or a model that does not predict every token from those before it alone.
        OverflowError: logits that are not finite.

    Example:
        >>> (found,) = log_likelihoods(model, tokenizer, [Item("one and one is", (" two", " three"))])
        >>> found.shape
        torch.Size([2])
    """
    scorer = TransformersScorer(model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens)
    found = scorer.log_likelihoods(answers_of(tokenizer, items), None, [0.0]).log_p[0]
    return list(found.split([len(item.options) for item in items]))


def strengths_of(alphas: Any) -> list[float]:
    """Strengths in ascending order, each once as float32 tells them apart, of whatever holds them in a row.

    Raises:
        ValueError: there are none, or something among them is not a finite number.
    """
    values = alphas.tolist() if hasattr(alphas, "tolist") else alphas
    try:
        numbers = torch.tensor([*values], dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"alphas are numbers in a row, such as [-1, 0, 1]; got {alphas!r:.200}") from error
    if numbers.ndim != 1:
        raise ValueError(f"alphas are numbers in a row, such as [-1, 0, 1]; got {alphas!r:.200}")
    if not len(numbers) or not numbers.float().isfinite().all():
        raise ValueError(f"alphas are at least one finite number, got {alphas!r:.200}")
    told_apart = {float(number.float()): float(number) + 0.0 for number in reversed(numbers)}  # -0 is 0
    return [told_apart[number] for number in sorted(told_apart)]
