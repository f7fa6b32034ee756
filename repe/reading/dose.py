"""Dose: the length along a vector's directions at which plain text diverges by a tenth of a nat a token.

What carries over between models, blocks, readers and concepts is what a strength costs, so that it is the unit of
alpha. The divergence is quadratic near 0, and `repe.reading.gradients` gives it for every block at once; at the blocks
that are recommended it is then measured, and the others' are corrected alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from repe.models.finite import check_finite
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
ROUNDS = 12
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


def forecast_doses(vector: ConceptVector, information: Tensor) -> ConceptVector:
    """The vector with the doses and the coherence that a Fisher information (blocks, blocks) forecasts."""
    root = information.diagonal().sqrt()
    dose = (math.sqrt(2 * DIVERGENCE) / root).nan_to_num(posinf=math.nan)
    coherence = (information / (root * root[:, None])).nan_to_num().fill_diagonal_(1.0)  # 0 with what costs nothing
    return replace(vector, dose=dose.float(), coherence=coherence.float())


def dose_of(
    model: nn.Module,
    sites: Sequence[nn.Module],
    texts: Sequence[Answer],
    vector: ConceptVector,
    told: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> ConceptVector:
    """The vector with doses that are measured where it is recommended, and elsewhere corrected as these had to be.

    Its own are taken for a forecast; where there is none, what is not measured stays unknown. Several recommended
    blocks are pushed together, as steering there does, if it is known how coherent they are and a length is found.
    """
    dose, measured, why_not = vector.dose.clone(), {}, dict(told or {})
    each = [(block,) for block in vector.recommended]
    with bar_of(desc="dose", total=len(each), unit="block", progress=progress) as bar:
        places = [vector.recommended] if _is_coherent(vector) else each
        while places:
            blocks, *places = places
            rows, name = [vector.row(block) for block in blocks], ", ".join(map(str, blocks))
            dose[rows], found = _measured(model, sites, texts, vector, blocks)
            bar.update(len(blocks))
            if found:
                measured[name] = [round(kl, 5) for kl in found]
            elif len(blocks) > 1:
                places = each
            else:
                why_not[name] = (
                    f"no length up to {LONGEST:g} norms of {vector.norm[rows[0]]:g} was found that costs "
                    f"{DIVERGENCE:g} nats a token"
                )
    off = (dose / vector.dose).log()
    rest = torch.tensor([block not in vector.recommended for block in vector.blocks])
    known = off[~rest & off.isfinite()]
    if len(known):
        dose[rest] = vector.dose[rest] * known.mean().exp()
    made = {
        "divergence": DIVERGENCE,
        "texts": len(texts),
        "texts_digest": digest({"texts": [list(text.ids) for text in texts]}),
        "measured": measured,
        **({"unknown": why_not} if why_not else {}),
    }
    return replace(vector, dose=dose, provenance={**vector.provenance, "dose": made})


def _is_coherent(vector: ConceptVector) -> bool:
    """Whether it is known of the recommended blocks how alike their costs are."""
    rows = [vector.row(block) for block in vector.recommended]
    return not vector.coherence[rows][:, rows].isnan().any()


def _measured(
    model: nn.Module, sites: Sequence[nn.Module], texts: Sequence[Answer], vector: ConceptVector, blocks: Sequence[int]
) -> tuple[Tensor, tuple[float, float] | None]:
    """(blocks,), the doses that cost one together, and what either sign of it costs; NaN and None where none do."""
    rows = [vector.row(block) for block in blocks]
    guess = torch.where(vector.dose.isnan(), FIRST_GUESS * vector.norm, vector.dose)
    steps = replace(vector, dose=guess).lengths_at(blocks)
    pushes = {sites[row]: step * vector.write[row] for row, step in zip(rows, steps, strict=True)}
    longest = float((LONGEST * vector.norm[rows] / steps).min())
    times, found = _searched(model, pushes, texts, longest)
    return times * guess[rows], found


def _searched(
    model: nn.Module, pushes: Mapping[nn.Module, Tensor], texts: Sequence[Answer], longest: float
) -> tuple[float, tuple[float, float] | None]:
    """How many times pushes cost what alpha = 1 does, and what either sign of that costs; NaN and None where none do.

    The cost is taken for a power of the length: the square, and between a length that costs less and one that costs
    more, that which leads from one to the other.
    """
    less, more, power = (0.0, -math.inf), (math.inf, math.inf), 2.0
    times = min(1.0, longest)
    for _ in range(ROUNDS):
        found = divergences(model, pushes, texts, times)
        off = math.log(max(sum(found) / 2, 1e-9) / DIVERGENCE)
        less, more = ((times, off), more) if off < 0 else (less, (times, off))
        if math.isfinite(less[1]) and math.isfinite(more[1]):
            power = max((more[1] - less[1]) / math.log(more[0] / less[0]), 1.0)
        if abs(off) <= NEAR:
            return times * math.exp(-off / power), found
        if less[0] >= longest:
            break
        step = math.exp(-off / power) if math.isfinite(off) else 0.0
        times = min(times * min(max(step, 1 / LARGEST_STEP), LARGEST_STEP), longest)
        if not less[0] < times < more[0]:
            times = math.sqrt(less[0] * more[0])
    return math.nan, None


def divergences(
    model: nn.Module, pushes: Mapping[nn.Module, Tensor], texts: Sequence[Answer], times: float
) -> tuple[float, float]:
    """What pushes of modules' outputs cost, so many times forwards and backwards, in nats a token: the mean over texts
    of their means."""
    found: list[Tensor] = []
    room = max(1, min(BATCH_TOKENS, MOST_LOGITS // vocabulary_of(model)) // 3)
    for numbers in batches_of([len(text.ids) for text in texts], [1] * len(texts), room):
        chosen = [texts[number] for number in numbers]
        rows = [text.ids[:-1] for text in chosen for _ in range(3)]
        given = pad(rows, device=device_of(model))
        width = given["input_ids"].shape[1]
        ways = torch.tensor([0.0, times, -times]).repeat(len(chosen))[:, None, None]
        with ExitStack() as hooks:
            for site, push in pushes.items():
                hooks.callback(put(site, AddHook(ways * push)))
            told = prompts_end(model, torch.ones(len(rows), dtype=torch.long))
            with torch.inference_mode(False), torch.no_grad(), evaluating(model), told:
                logits = logits_at(model, given, torch.arange(width))
        log_p = log_probabilities(logits)
        for place, text in enumerate(chosen):
            plain, *steered = log_p[3 * place : 3 * place + 3, : len(text.ids) - 1]
            check_finite(plain.exp(), model)
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
