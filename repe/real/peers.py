"""Peers: our vector against other libraries' from the same pairs, on the same items, where plain text pays as much.

Every library extracts by its own example; what it found is then added to the output of blocks by our hooks, so strongly
that plain texts, which no dose was measured on, diverge by a tenth of a nat a token. The others' vectors are written at
our block as well, and ours at their blocks, to tell the place from the direction. They live in an environment of their
own: `make .venv-peers` sets it up.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import repe
from repe.bench.peer import Peer, hand_over
from repe.data.catalogue import concept_of
from repe.data.pairs import split
from repe.display import Table
from repe.measuring import TransformersScorer, texts_of
from repe.measuring.costs import costs_at
from repe.measuring.intervals import Array, Estimate, Measured
from repe.measuring.sweep import Exam
from repe.measuring.tasks import asked
from repe.models.blocks import find_stack
from repe.models.chats import render
from repe.models.load import home_of
from repe.models.tokens import Text, encode
from repe.reading.dose import LARGEST_STEP, short_texts
from repe.reading.extract import balanced
from repe.reading.placing import spread
from repe.reading.vector import DIVERGENCE
from repe.real.bench import Bench, LeftOut, Row, kept, table
from repe.steering.edit import Edit

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
CONCEPTS = ("happiness", "formality")
OURS = "repe"
PLACES = {OURS: "our block", "repeng": "the band", "repeng_pca_center": "the band", "steering_vectors": "all blocks"}
"""Where each library steers of itself. Repeng's default, "pca_diff", takes the mean difference away before it fits."""
BAND = slice(-17, -4)  # the blocks of repeng's example
TEXTS = 20
NEAR = 0.05  # how far from the divergence that is wanted, as a share
ROUNDS, STEEPEST = 20, 12.0


def tables(bench: Bench) -> Iterator[Table | str]:
    if not PYTHON.exists():
        why = "there are no other libraries; `make .venv-peers` sets them up"
        yield LeftOut(f"peers on {bench.name}: left out, as {why}")
        return
    concepts = bench.chosen(CONCEPTS)
    times = {concept: bench.row("peers", concept, partial(seconds, bench, concept), "seconds") for concept in concepts}
    note = "directions: ours without doses and the choice of a block, which no other makes"
    yield table(f"peers on {bench.name}: seconds to extract a vector, once each", "concept", times, note)
    places = [*dict.fromkeys(PLACES.values())]
    for concept in concepts:
        rows = {
            (name, place): bench.row("peers", concept, partial(row, bench, concept, name, place), name, place)
            for name, place in written(places)
        }
        title = f"peers on {bench.name}: log odds of {concept}, where plain text pays {DIVERGENCE:g} nats a token"
        where = ", ".join(f"{place}: {numbers(blocks_at(bench, concept, place))}" for place in places)
        note = f"{where}; *: where the library itself steers\ncosine: with our direction, the mean of blocks"
        yield table(title, "vector", compared(rows), note)


def written(places: Sequence[str]) -> list[tuple[str, str]]:
    """What is written where: every vector at its own place, then the others' at ours, and ours at theirs."""
    ours = PLACES[OURS]
    theirs = [(name, ours) for name in PLACES if name != OURS]
    return [*PLACES.items(), *theirs, *((OURS, place) for place in places if place != ours)]


def compared(rows: Mapping[tuple[str, str], Row]) -> dict[str, Row]:
    """The rows as they are shown, each with what its items move less than along our own vector at our own block."""
    ours = rows[OURS, PLACES[OURS]]
    shown: dict[str, Row] = {}
    for (name, place), row in rows.items():
        less = {} if row is ours else {"less than ours": kept(mean_of(np.subtract(ours["items"], row["items"]), row))}
        shown[f"{name} at {place}" + " *" * (PLACES[name] == place)] = {**row, **less}
    return shown


def mean_of(shifts: Array, row: Row) -> Estimate:
    """The mean of items (items,), with an interval over their groups."""
    return Measured(np.ones(1), shifts[None], row["groups"]).estimates()[0]


# what every library extracts


@dataclass(frozen=True)
class Extraction:
    """What a library extracted: its release, the seconds that it took, and its vector."""

    release: str
    seconds: float
    vector: repe.ConceptVector


def seconds(bench: Bench, concept: str) -> Row:
    """What extraction takes in every library, each once."""
    whole, alone = (
        timed(partial(repe.extract, bench.model, bench.tokenizer, concept, writes=writes)) for writes in (True, False)
    )
    theirs = {found.release: found.seconds for found in extractions(bench, concept).values()}
    ours = {"pairs": len(pairs_of(bench, concept)), OURS: whole, "directions": alone}
    return {**ours, **theirs, "threads": torch.get_num_threads()}


@cache  # a bench lives as long as its command
def extractions(bench: Bench, concept: str) -> Mapping[str, Extraction]:
    """Those of the others, by the names of the libraries.

    Raises:
        RuntimeError: a library is not there, or does not read the same model.
    """
    found, blocks = {}, range(find_stack(bench.model).n_blocks)
    with tempfile.TemporaryDirectory() as folder:
        hand_over(bench.model, bench.tokenizer, pairs_of(bench, concept), blocks, folder)
        for name in PLACES:
            if name == OURS:
                continue
            with Peer(PYTHON, name, folder) as peer:
                if peer.missing:
                    raise RuntimeError(f"{name} cannot be run: {peer.missing}; `make .venv-peers` sets it up")
                took = timed(peer)
                vector = vector_of(name, peer.directions, bench.vector(concept))
            found[name] = Extraction(peer.release, took, vector)
    return found


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pairs_of(bench: Bench, concept: str) -> list[tuple[str, str]]:
    """The pairs of a concept that our vector was fitted to and judged on, as texts."""
    made, sides = bench.vector(concept).provenance, split(concept_of(concept, home_of(bench.model)).pairs)
    counts = (bench.at_most(made[name]) for name in ("pairs", "held_out_pairs"))
    pairs = [pair for side, count in zip(sides, counts, strict=True) for pair in balanced(side)[:count]]
    return [(as_text(bench.tokenizer, pair.positive), as_text(bench.tokenizer, pair.negative)) for pair in pairs]


def as_text(tokenizer: Any, text: Text) -> str:
    """The text that has the tokens of a chat: where the tokenizer itself writes the first, it is not written twice."""
    if isinstance(text, str):
        return text
    whole, ids = render(tokenizer, text), encode(tokenizer, text)
    forms = (whole, whole.removeprefix(tokenizer.bos_token or ""))
    return next(form for form in forms if encode(tokenizer, form) == ids)


def vector_of(name: str, directions: Mapping[int, Tensor], ours: repe.ConceptVector) -> repe.ConceptVector:
    """A vector whose gap is, block by block, what a library adds to the output of the block; its doses are ours."""
    blocks = tuple(sorted(directions))
    pushes = torch.stack([directions[block].float() for block in blocks])
    length = pushes.norm(dim=-1)
    write = pushes / length[:, None]
    unknown, rows = torch.full_like(length, torch.nan), [ours.row(block) for block in blocks]
    return repe.ConceptVector(
        name, blocks, blocks, write=write, read=write, center=torch.zeros_like(write), scale=length, sigma=unknown,
        norm=ours.norm[rows], accuracy=unknown, separation=unknown, dose=ours.dose[rows],
    )  # fmt: skip


# what a vector does at a place


def row(bench: Bench, concept: str, name: str, place: str) -> Row:
    """What a library's vector does to items, at the strength that costs what a dose does."""
    ours, blocks = bench.vector(concept), blocks_at(bench, concept, place)
    vector = ours if name == OURS else extractions(bench, concept)[name].vector
    blocks = tuple(b for b in blocks if b in vector.blocks and vector.scale[vector.row(b)] > 0)
    edit = Edit.of(vector, blocks=blocks, unit="kl" if name == OURS else "gap")
    cosines = [cosine_similarity(vector.write[vector.row(b)], ours.write[ours.row(b)], dim=0) for b in blocks]
    return {**moved(bench, concept, edit), "cosine": float(torch.stack(cosines).mean())}


def moved(bench: Bench, concept: str, edit: Edit) -> Row:
    """How far the log odds of items move at equal divergence: half of what lies between the two signs."""
    scorer = TransformersScorer(bench.model, bench.tokenizer)
    alpha, kl = equally_dear(bench, scorer, edit)
    items = asked(concept, bench.model, letters=False)
    exam = Exam(bench.tokenizer, {concept: spread(items, bench.at_most(len(items)))})
    scores = exam.scores(scorer, edit, [-alpha, alpha])[concept]
    back, forth = scores.difference
    shifts, groups = (forth - back) / 2, {"groups": list(scores.groups)}
    shift = mean_of(shifts, groups)
    return {
        "shift": kept(shift),
        "wrong way": float((shifts < 0).mean()),
        "efficiency": shift.value / (2 * kl) ** 0.5,
        "KL": kl,
        "items": shifts.tolist(),
        **groups,
    }


def equally_dear(bench: Bench, scorer: TransformersScorer, edit: Edit) -> tuple[float, float]:
    """The strength at which plain text pays what a dose costs, the mean of both signs, and what it then pays."""
    texts = texts_of("neutral", bench.model)[1::2][: bench.at_most(TEXTS)]  # doses are measured on the others
    plain = short_texts(bench.model, bench.tokenizer, texts)

    def cost(alpha: float) -> float:
        kl = costs_at(scorer, plain, edit, [-alpha, alpha]).kl
        assert kl is not None
        return float(kl.mean())

    return strength(cost, 1 / edit.on(find_stack(bench.model)).doses)


def strength(cost: Callable[[float], float], first: float) -> tuple[float, float]:
    """The strength that costs what a dose does, and what it costs: by secants of the logarithms, the first a square's.

    Raises:
        ValueError: it was not found.
    """
    alpha, power, before = first, 2.0, (0.0, 0.0)
    for _ in range(ROUNDS):
        found = cost(alpha)
        off = math.log(found / DIVERGENCE)
        if abs(off) <= NEAR:
            return alpha, found
        if before[0]:
            power = min(max((off - before[1]) / math.log(alpha / before[0]), 1.0), STEEPEST)
        before = alpha, off
        alpha *= min(max(math.exp(-off / power), 1 / LARGEST_STEP), LARGEST_STEP)
    raise ValueError(
        f"no strength that costs {DIVERGENCE:g} nats a token was found in {ROUNDS} steps: at last {before}"
    )


def blocks_at(bench: Bench, concept: str, place: str) -> tuple[int, ...]:
    every = tuple(range(find_stack(bench.model).n_blocks))
    return {PLACES[OURS]: bench.vector(concept).recommended, "the band": every[BAND], "all blocks": every}[place]


def numbers(blocks: tuple[int, ...]) -> str:
    return f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else str(blocks[0])
