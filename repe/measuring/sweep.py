"""The sweep: a model's scores on tasks over many strengths, along a concept and along others beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from repe.data.items import Item
from repe.measuring.fanout import Batch, Fanout, Span, compare, trusted, why_padded, witnesses
from repe.measuring.scores import Scores
from repe.measuring.scoring import check_causal, encode_items
from repe.models.blocks import find_stack
from repe.models.fingerprint import digest, fingerprint
from repe.reading.capture import evaluating
from repe.reading.trees import dtype_of
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit
from repe.steering.gate import Gate
from repe.steering.handle import Steering, status
from repe.steering.steer import steer

log = logging.getLogger(__name__)

BATCH_TOKENS = 8192


def sweep(
    model: nn.Module,
    tokenizer: Any,
    concept: Any,
    tasks: Mapping[str, Sequence[Item]],
    alphas: Sequence[float] | Tensor,
    *,
    batch_tokens: int = BATCH_TOKENS,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **how: Any,
) -> dict[str, Scores]:
    """The log-likelihoods of all options, for every task and strength.

    The edits are where `how` says: with scope="answer" from the last prompt token on, everywhere by default.

    Args:
        model, tokenizer: neither is changed.
        concept: what is steered along, as in `repe.steer`.
        tasks: items by the name of their task.
        alphas: the strengths, finite; sorted, each once.
        batch_tokens: tokens a forward, at most: what bounds the memory. A batch holds one text at least.
        resume: a file that keeps what is measured; a sweep that was broken off goes on from there.
        progress: show a progress bar.
        how: for `repe.steer`, such as `blocks`, `edit` and `scope`.

    Returns:
        `Scores` by the name of the task, one row a strength, in ascending order.

    Raises:
        ValueError: no alphas, no tasks or no items; an option of no tokens; a scope that is a mask; a model that is not
            causal; or `resume` holds another sweep, or what `repe.steer` raises.
        IndexError: the scope names a position before the start of a prompt.
        OverflowError: a strength is too large for the model.

    Warns:
        UserWarning: trees of shared prefixes came out wrong for this model; they were discarded, and padded rows used.
    """
    return sweeps(
        model, tokenizer, concept, (), tasks, alphas, batch_tokens=batch_tokens, resume=resume, progress=progress, **how
    )[0]


def sweeps(
    model: nn.Module,
    tokenizer: Any,
    concept: Any,
    others: Sequence[ConceptVector],
    tasks: Mapping[str, Sequence[Item]],
    alphas: Sequence[float] | Tensor,
    *,
    batch_tokens: int = BATCH_TOKENS,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **how: Any,
) -> list[dict[str, Scores]]:
    """`sweep` along a concept, and along other vectors at the same blocks in its place. Blocks that no strength changes
    run once for all of them."""
    strengths = strengths_of(alphas)
    if not tasks or not all(map(len, tasks.values())):
        raise ValueError(f"a sweep needs at least one task with items, got { {k: len(v) for k, v in tasks.items()} }")
    _check(how.get("scope"), how.get("gate"), resume)
    check_causal(model, how.get("blocks_at"))
    spans = _spans(tokenizer, tasks)
    _by_task(torch.zeros(1, len(spans)), tasks)  # what cannot be scored is refused before anything is run
    obstacle = why_padded(model, find_stack(model, blocks_at=how.get("blocks_at")), how.get("gate"))
    with steer(model, concept, tokenizer=tokenizer, **how) as handle, evaluating(model), torch.no_grad():
        plans = _plans(handle, others)
        record = Record()
        if resume is not None:
            record = Record.open(resume, _key(model, handle, plans, spans, strengths))
            handle._touched = bool(record.kept)  # what is on record was edited when it was measured
        fan = Fanout(model, handle, obstacle, batch_tokens)
        scores = trusted(
            fan, spans, len(strengths), lambda fan, b: _scored(fan, b, spans, strengths, plans, record, progress)
        )
    return [_by_task(row, tasks) for row in scores]


def strengths_of(alphas: Any) -> Tensor:
    """(alphas,), float64, sorted, each once as float32 tells them apart, of whatever holds them in a row.

    Raises:
        ValueError: there are none, or something among them is not a finite number.
    """
    values = alphas.tolist() if hasattr(alphas, "tolist") else alphas
    try:
        given = [*values]
        numbers = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"alphas are numbers in a row, such as [-1, 0, 1]; got {alphas!r:.200}") from error
    if numbers.ndim != 1:
        raise ValueError(f"alphas are numbers in a row, such as [-1, 0, 1]; got {alphas!r:.200}")
    if not len(numbers) or not numbers.float().isfinite().all():
        raise ValueError(f"alphas are at least one finite number, got {alphas!r:.200}")
    told_apart = {float(number.float()): float(number) + 0.0 for number in reversed(numbers)}  # -0 is 0
    return torch.tensor([told_apart[number] for number in sorted(told_apart)], dtype=torch.float64)


def _check(scope: Any, gate: Any, resume: Any) -> None:
    if isinstance(scope, Tensor):
        raise ValueError("a mask of one batch is no scope for a sweep of many: name the scope, as in scope='answer'")
    if resume is not None and not (gate is None or isinstance(gate, Gate)):
        raise ValueError("whether a gate is the one of the file cannot be told of a function: pass a `repe.Gate`")


def _spans(tokenizer: Any, tasks: Mapping[str, Sequence[Item]]) -> list[Span]:
    """Every option of every item behind its prompt."""
    encoded = encode_items(tokenizer, [item for items in tasks.values() for item in items])
    return [Span((*item.prompt, *option), len(item.prompt)) for item in encoded for option in item.options]


def _plans(handle: Steering, others: Sequence[ConceptVector]) -> list[Edit]:
    """What is done along the concept, and the same along every other vector."""
    return [handle.edit, *(handle.edit.along(other) for other in others)]


# scoring


def _scored(
    fan: Fanout,
    batches: Sequence[Batch],
    spans: Sequence[Span],
    alphas: Tensor,
    plans: Sequence[Edit],
    record: Record,
    progress: bool,
) -> Tensor:
    """(plans, alphas, texts), log P of what follows the prompts."""
    log.info("%d texts, %d alphas, %d batches %s", len(spans), len(alphas), len(batches), _way(fan))
    padded = bool(fan.why_padded)
    scores = torch.full((len(plans), len(alphas), len(spans)), torch.nan)
    checked = set() if padded else {0, len(batches) - 1}
    with tqdm(total=len(plans) * len(batches), desc="sweep", unit="batch", disable=not progress) as bar:
        for number in (0, *range(len(batches) - 1, 0, -1)):  # the narrowest first, then from the widest on
            batch, outset = batches[number], None
            for row, plan in enumerate(plans):
                kept = record.get(padded, row, batch.texts)
                if kept is None:
                    if len(plans) > 1:
                        fan.handle.vector = plan.vectors[0]
                    outset = fan.begin(batch) if outset is None else outset
                    kept = gains(fan, batch, spans, alphas, outset)
                    if row == 0 and number in checked:
                        _compare(fan, batch, spans, alphas, kept)
                    _check_finite(kept, alphas)
                    record.put(padded, row, batch.texts, kept)
                scores[row][:, batch.texts] = kept
                bar.update()
    return scores


def _check_finite(found: Tensor, alphas: Tensor) -> None:
    if wild := alphas[~found.isfinite().all(1)].tolist():
        raise OverflowError(f"at the strengths {wild} the model puts out no numbers: leave them out")


def gains(fan: Fanout, batch: Batch, spans: Sequence[Span], alphas: Tensor, outset: Any) -> Tensor:
    """(alphas, texts of the batch), log P of every text's tokens behind its prompt, summed."""
    ends = [slots[spans[text].start - 1 :] for text, slots in zip(batch.texts, batch.slots, strict=True)]
    lengths = torch.tensor([len(end) for end in ends])
    owner = torch.arange(len(ends)).repeat_interleave(lengths)
    wanted, place = torch.cat(ends).unique(return_inverse=True)
    tokens = torch.tensor([token for text in batch.texts for token in spans[text].ids[spans[text].start :]])
    rows = torch.tensor(batch.rows)[owner]
    gained = torch.zeros(len(alphas), len(ends))
    for chunk, logits in fan.logits(batch, alphas, wanted, outset):
        r, p, t = (index.to(logits.device) for index in (rows, place, tokens))
        each = logits[r, :, p, t].float() - logits.float().logsumexp(-1)[r, :, p]
        gained[chunk] = torch.zeros(each.shape[1], len(ends)).index_add(1, owner, each.T.cpu())
    return gained


def _compare(fan: Fanout, batch: Batch, spans: Sequence[Span], alphas: Tensor, found: Tensor) -> None:
    """Raises DisagreementError if texts of a batch are others in a row alone, at the least or the largest strength."""
    ends = [int(alphas.abs().argmin()), int(alphas.abs().argmax())]
    alone = Fanout(fan.model, fan.handle, "to compare with", fan.batch_tokens)
    for place in witnesses(batch, spans):
        span = [spans[batch.texts[place]]]
        (row,) = alone.batches(span, len(ends))
        plain = gains(alone, row, span, alphas[ends], None)[:, 0]
        compare(found[ends, place], plain, dtype_of(fan.stack.module))


def _way(fan: Fanout) -> str:
    return f"of padded rows: {fan.why_padded}" if fan.why_padded else f"of trees, past {len(fan.passed)} blocks"


def _by_task(found: Tensor, tasks: Mapping[str, Sequence[Item]]) -> dict[str, Scores]:
    """(alphas, texts) as the scores of every task."""
    sizes = [sum(len(item.options) for item in items) for items in tasks.values()]
    parts = zip(tasks.items(), found.split(sizes, dim=1), strict=True)
    return {name: _scores(name, items, part) for (name, items), part in parts}


def scores_of(name: str, items: Sequence[Item], rows: Sequence[Sequence[Tensor]]) -> Scores:
    """The scores of a task from the log-likelihoods of every item's options, (options,), for every row."""
    return _scores(name, items, torch.stack([torch.cat([*row]) for row in rows]))


def _scores(name: str, items: Sequence[Item], found: Tensor) -> Scores:
    """The scores of a task from (rows, texts), the options of one item after those of another."""
    counts = np.array([len(item.options) for item in items])
    there = np.arange(counts.max()) < counts[:, None]
    table = np.full((len(found), *there.shape), np.nan)
    table[:, there] = found.numpy()
    return Scores(name, table, np.array([item.answer for item in items]), [item.group for item in items])


# what was measured already


@dataclass
class Record:
    """A file of lines: what is measured, and then what came of each batch, as it comes. Without a path, nothing.

    `kept` holds (alphas, texts) by the way of running, the number of the vector, and the numbers of the texts.
    """

    path: Path | None = None
    kept: dict[tuple[bool, int, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str], key: str) -> Record:
        """What the file at a path holds already of the sweep that goes by this key; a line broken off is forgotten.

        Raises:
            ValueError: the file holds another sweep, or something else.
        """
        record, head = cls(Path(path)), json.dumps({"sweep": key}).encode() + b"\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a+b") as file:
            file.seek(0)
            written = file.read()
            whole = written[: written.rfind(b"\n") + 1]
            if not (whole.startswith(head) or head.startswith(written)):
                raise ValueError(
                    f"{path} holds another sweep, or something else: of another model, vector, task or strength. Name "
                    "another file, or delete it"
                )
            for number, line in enumerate(whole.splitlines()[1:], start=2):
                record._read(number, line)
            file.truncate(len(whole))
            file.write(b"" if whole else head)
        return record

    def get(self, padded: bool, row: int, texts: Sequence[int]) -> Tensor | None:
        return self.kept.get((padded, row, tuple(texts)))

    def put(self, padded: bool, row: int, texts: Sequence[int], scores: Tensor) -> None:
        if self.path is not None:
            line = {"padded": padded, "vector": row, "texts": list(texts), "scores": scores.tolist()}
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")

    def _read(self, number: int, line: bytes) -> None:
        try:
            data = json.loads(line)
            self.kept[data["padded"], data["vector"], tuple(data["texts"])] = torch.tensor(data["scores"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}, line {number}: not the scores of a batch. Delete the file") from error


def _key(model: nn.Module, handle: Steering, plans: Sequence[Edit], spans: Sequence[Span], alphas: Tensor) -> str:
    """A few digits that change with anything that changes the scores."""
    beside = [other for other in status(model) if other is not handle]
    return digest(
        {
            "model": fingerprint(model),
            "dtype": str(dtype_of(handle.stack.module)),
            "edits": [[plan.key(), handle.blocks] for plan in plans],
            "beside": [[_plain(other.alpha), other.edit.key(), other.blocks] for other in beside],
            "texts": [(span.ids, span.start) for span in spans],
            "alphas": alphas.tolist(),
        }
    )


def _plain(value: Any) -> Any:
    """Plain JSON data that are others whenever the value is."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
    if is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    return repr(value)
