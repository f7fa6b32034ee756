"""Dose: the length along a vector's directions at which plain text diverges by a tenth of a nat a token.

What carries over between models, blocks, readers and concepts is what a strength costs, so that it is the unit of
alpha. The divergence is quadratic near 0, and `repe.reading.gradients` gives it for every block at once; at the blocks
that are recommended it is then measured, and the others' are corrected alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repe.data.answers import Answer
from repe.data.catalogue import find_task
from repe.data.items import load_texts
from repe.display import bar_of
from repe.models.blocks import device_of, hidden_of, with_hidden
from repe.models.fingerprint import digest
from repe.models.load import home_of
from repe.models.logits import divergence, log_probabilities, logits_at, vocabulary_of
from repe.models.tokens import Text, encode, pad
from repe.models.tracking import Hook, prompts_end, put
from repe.reading.capture import evaluating
from repe.reading.gradients import MOST_LOGITS, batches_of
from repe.reading.vector import DIVERGENCE, ConceptVector

TEXTS, TOKENS = 20, 64  # how many plain texts, and how much of each
BATCH_TOKENS = 2048
NEAR = 0.25  # how far from the divergence that is wanted, as a share: the power says the rest
ROUNDS = 8
FIRST_GUESS, LONGEST = 0.05, 4.0  # norms of the activations
LARGEST_STEP = 8.0


def short_texts(model: nn.Module, tokenizer: Any, texts: Sequence[Text] | None = None) -> list[Answer]:
    """Plain texts as token ids, cut to a length, each written after its first token.

    Raises:
        ValueError: there are none of two tokens or more.
    """
    if texts is None:
        texts = load_texts(find_task("neutral", home_of(model)))[::2][:TEXTS]
    rows = [tuple(encode(tokenizer, text)[:TOKENS]) for text in texts]
    answers = [Answer(row, 1) for row in rows if len(row) > 1]
    if not answers:
        raise ValueError("doses are measured on at least one text of two tokens or more: got none")
    return answers


def dose_of(
    model: nn.Module,
    sites: Sequence[nn.Module],
    texts: Sequence[Answer],
    vector: ConceptVector,
    information: Tensor | None,
    told: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> ConceptVector:
    """The vector with doses: measured where it is recommended, elsewhere as a Fisher information (blocks,) forecasts.

    Without the information, what is not measured stays unknown.
    """
    unknown = torch.full_like(vector.scale, math.nan)
    forecast = unknown if information is None else (2 * DIVERGENCE / information).sqrt().nan_to_num(posinf=math.nan)
    dose, measured, why_not = forecast.clone(), {}, dict(told or {})
    for block in bar_of(vector.recommended, "dose", unit="block", progress=progress):
        row = vector.row(block)
        first = float(forecast[row]) if forecast[row].isfinite() else FIRST_GUESS * float(vector.norm[row])
        length, found = _searched(model, sites[row], vector.write[row], texts, first, float(vector.norm[row]))
        dose[row] = length
        if found:
            measured[str(block)] = [round(kl, 5) for kl in found]
        else:
            why_not[str(block)] = (
                f"no length up to {LONGEST:g} norms of {vector.norm[row]:g} costs {DIVERGENCE:g} nats a token"
            )
    rows = [vector.row(block) for block in vector.recommended]
    off = (dose[rows] / forecast[rows]).log()
    if off.isfinite().any():
        others = [row for row in range(len(dose)) if row not in rows]
        dose[others] = forecast[others] * off[off.isfinite()].mean().exp()
    made = {
        "divergence": DIVERGENCE,
        "texts": len(texts),
        "texts_digest": digest({"texts": [list(text.ids) for text in texts]}),
        "measured": measured,
        **({"unknown": why_not} if why_not else {}),
    }
    return replace(vector, dose=dose, provenance={**vector.provenance, "dose": made})


def _searched(
    model: nn.Module, site: nn.Module, direction: Tensor, texts: Sequence[Answer], first: float, norm: float
) -> tuple[float, tuple[float, float] | None]:
    """The length that costs what alpha = 1 does, and what either sign of it costs; NaN and None where there is none.

    The cost is taken for a power of the length, the square at first, and then what two lengths make it.
    """
    longest, power = LONGEST * norm, 2.0
    length, before = min(first, longest), None
    for _ in range(ROUNDS):
        found = divergences(model, site, direction, texts, length)
        off = math.log(max(sum(found) / 2, 1e-9) / DIVERGENCE)
        if not math.isfinite(off):
            length, before = length / LARGEST_STEP, None
            continue
        if abs(off) <= NEAR:
            return length * math.exp(-off / power), found
        if length >= longest and off < 0:
            break
        if before is not None:
            power = min(max((off - before[1]) / math.log(length / before[0]), 1.0), 4.0)
        before = length, off
        length = min(length * min(max(math.exp(-off / power), 1 / LARGEST_STEP), LARGEST_STEP), longest)
    return math.nan, None


def divergences(
    model: nn.Module, site: nn.Module, direction: Tensor, texts: Sequence[Answer], length: float
) -> tuple[float, float]:
    """What a push of a length costs, forwards and backwards, in nats a token: the mean over texts of their means."""
    found: list[Tensor] = []
    room = max(1, min(BATCH_TOKENS, MOST_LOGITS // vocabulary_of(model)) // 3)
    for numbers in batches_of([len(text.ids) for text in texts], [1] * len(texts), room):
        chosen = [texts[number] for number in numbers]
        rows = [text.ids[:-1] for text in chosen for _ in range(3)]
        given = pad(rows, device=device_of(model))
        width = given["input_ids"].shape[1]
        pushes = torch.tensor([0.0, length, -length]).repeat(len(chosen))[:, None, None] * direction
        taken_off = put(site, AddHook(pushes))
        try:
            told = prompts_end(model, torch.ones(len(rows), dtype=torch.long))
            with torch.inference_mode(False), torch.no_grad(), evaluating(model), told:
                logits = logits_at(model, given, torch.arange(width))
        finally:
            taken_off()
        log_p = log_probabilities(logits)
        for place, text in enumerate(chosen):
            plain, *steered = log_p[3 * place : 3 * place + 3, : len(text.ids) - 1]
            found.append(torch.stack([divergence(plain, other).mean() for other in steered]))
    forwards, backwards = torch.stack(found).double().mean(0).tolist()
    return forwards, backwards


class AddHook(Hook):
    """Adds a vector a row to a module's output."""

    def __init__(self, pushes: Tensor) -> None:
        self.pushes = pushes

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        return with_hidden(output, hidden + self.pushes.to(hidden))
