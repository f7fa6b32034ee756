"""Extraction: contrast pairs and a reader to a concept vector, judged at every block on pairs held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from repe.data.catalogue import Pairs, concept_of
from repe.data.pairs import ContrastPair, split
from repe.display import bar_of
from repe.models.blocks import find_stack
from repe.models.chats import VERSION
from repe.models.counts import check_counts
from repe.models.fingerprint import digest, fingerprint
from repe.models.load import home_of
from repe.models.logits import why_not_causal
from repe.models.tokens import Text
from repe.models.tracking import trackers_of
from repe.reading import readers
from repe.reading.capture import capture
from repe.reading.placing import LATEST, placed
from repe.reading.readers.reader import Reader
from repe.reading.vector import ConceptVector

Floats = NDArray[np.float64]

EQUALLY_READ = 0.005  # of accuracy: blocks this near the best are told apart by their separation
ENOUGH = 0.88  # the cosine to the direction of all pairs
FIRST, LEAST_HELD_OUT = 48, 32  # pairs


def extract(
    model: nn.Module,
    tokenizer: Any,
    concept: Pairs,
    *,
    name: str | None = None,
    reader: str | BaseEstimator = "mean",
    blocks: Any = "all",
    site: str = "block",
    stack: str = "decoder",
    blocks_at: str | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    enough: float | None = ENOUGH,
    neutral: Sequence[Text] | None = None,
    writes: bool = True,
    batch_size: int = 32,
    progress: bool | None = None,
) -> ConceptVector:
    """A concept's directions in a model, from the last token of contrast pairs.

    The reader is fitted to some pairs and judged on others. Where the pairs do not say which, those held out share
    neither template nor item with the rest; where they do, it is as they say (`repe.audit` tells what is shared).
    Pairs are read in an order in which every part is a fair sample, and no more of them than the answer needs.

    Where to write is decided by writing: a block is recommended by its efficiency, how far the model's answers on the
    concept's behaviour items move for the square root of what plain text pays (`repe.reading.gradients`). Where there
    are no such items, or a model without a next token, reading alone decides. `provenance["chosen_by"]` says which.

    Args:
        model, tokenizer: neither is changed.
        concept: the name of a concept (see `repe.concepts`), the path of a file of pairs, or the pairs.
        name: what to call the concept, where the file or the pairs do not say it.
        reader: "mean", "pca", "probe", "lda", or an unfitted scikit-learn estimator with a linear direction.
        blocks: at which to fit; the vector recommends the best of them.
        site, stack, blocks_at: where in the model, as in `repe.steer`.
        held_out, seed: the share of templates and items held out, and its seed, where the pairs do not say.
        enough: pairs are read until the mean difference is known to point where that of all pairs would, by its own
            uncertainty: the cosine that is expected at the median block. None reads all.
        neutral: the texts that doses are measured on, as in `repe.reading.dosed`.
        writes: whether the vector is to be written along, and needs doses and a block where that works; without, it
            takes less time.
        batch_size, progress: as in `repe.capture`.

    Returns:
        A vector of all the blocks. Its `scale`, `accuracy`, `separation` and `sigma` are measured on held-out pairs.

    Raises:
        ValueError: the concept is not known, or there are too few pairs, or an empty or one-sided one; or the model is
            being steered.
        TypeError: what is given as pairs are none.
        FileNotFoundError: the file of pairs is not there. `repe.data.load_concept` says what such a file holds.

    Sources: the mean difference of Rimsky et al. (arXiv 2312.06681), the principal direction of Zou et al. (arXiv
    2310.01405), the pattern of a probe of Haufe et al. (2014).

    Example:
        >>> repe.extract(model, tokenizer, "honesty")
        ConceptVector('honesty', 6 blocks x 128; best at block 3 (accuracy 1.00, scale 53.9))
    """
    poles = read_poles(
        model, tokenizer, concept, blocks=blocks, site=site, stack=stack, blocks_at=blocks_at, held_out=held_out,
        seed=seed, enough=enough, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    vector = poles.fitted(reader, name)
    if not writes or stack != "decoder" or why_not_causal(model, blocks_at):
        return vector
    return placed(model, tokenizer, vector, poles.concept, neutral, blocks_at=blocks_at, progress=progress)


@dataclass(frozen=True, eq=False)
class Poles:
    """What was read of a concept's pairs, for readers to be fitted to.

    Attributes:
        concept: its name.
        blocks, depth, site, stack: where in the model, which has so many blocks.
        seen: (pairs, poles, blocks, d_model), the positive pole first, to fit on.
        unseen: the same of the pairs held out.
        provenance: of the vectors.
    """

    concept: str
    blocks: tuple[int, ...]
    depth: int
    site: str
    stack: str
    seen: Floats
    unseen: Floats
    provenance: Mapping[str, Any]

    def fitted(self, reader: str | BaseEstimator, name: str | None = None) -> ConceptVector:
        """The vector of a reader, which recommends the block that reads best."""
        columns = [
            _at_one_block(readers.make(reader), self.seen[:, :, i], self.unseen[:, :, i])
            for i in range(len(self.blocks))
        ]
        tensors = {k: torch.tensor(np.stack([c[k] for c in columns]), dtype=torch.float32) for k in columns[0]}
        best = _best(self.blocks, self.depth, tensors["accuracy"].tolist(), tensors["separation"].tolist())
        return ConceptVector(
            concept=name or self.concept,
            blocks=self.blocks,
            recommended=(best,),
            site=self.site,
            stack=self.stack,
            provenance={"reader": reader if isinstance(reader, str) else repr(reader), **self.provenance},
            **tensors,
        )


def read_poles(
    model: nn.Module,
    tokenizer: Any,
    concept: Pairs,
    *,
    blocks: Any = "all",
    site: str = "block",
    stack: str = "decoder",
    blocks_at: str | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    enough: float | None = ENOUGH,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Poles:
    """The activations at the last tokens of a concept's pairs; arguments and errors are those of `extract`."""
    found = find_stack(model, stack, blocks_at)
    if trackers_of(model):
        raise ValueError(
            "something steers this model, and would be extracted with the concept: remove it first (`repe.detach`), "
            "extract, and steer again"
        )
    source = concept_of(concept, home_of(model))
    check_counts(0, seed=seed)
    fit, held = (balanced(pairs, seed) for pairs in split(source.pairs, held_out, seed))
    numbers = (0,) if site == "embedding" else found.indices(blocks)
    read: Any = partial(
        capture, model, tokenizer, blocks=list(numbers), tokens="last", site=site, stack=stack, blocks_at=blocks_at,
        batch_size=batch_size, progress=False,
    )  # fmt: skip
    with bar_of(desc="pairs", total=len(fit) + len(held), unit="pair", progress=progress) as bar:
        seen, cosine = _read_until(read, fit, enough, bar)
        unseen = _activations(read, held[: max(LEAST_HELD_OUT, round(len(held) * len(seen) / len(fit)))], bar)
    provenance = {
        "pairs": len(seen),
        "held_out_pairs": len(unseen),
        "pairs_there_are": len(fit),
        "cosine_to_all": round(cosine, 4),
        "chosen_by": "reading",
        "templates": sorted({p.template for p in fit[: len(seen)]}),
        "held_out_templates": sorted({p.template for p in held[: len(unseen)]}),
        "model": name_of(model),
        "pairs_digest": digest_of(source.pairs),
        "rendering": rendering_of(tokenizer),
        "fingerprint": fingerprint(model),
    }
    return Poles(source.name, numbers, found.n_blocks, site, stack, seen, unseen, provenance)


# pairs -> activations


def balanced(pairs: Sequence[ContrastPair], seed: int = 0) -> list[ContrastPair]:
    """The pairs in a random order in which the first of them, however many, have every template equally often, and as
    many different items as there can be."""
    rng = random.Random(seed)
    items = [pair.item or index for index, pair in enumerate(pairs)]
    templates = _numbered(rng, [pair.template for pair in pairs])
    places, apart = _numbered(rng, items), max(1, len(set(items)) // len(templates))
    ranks = [(places[item] + apart * templates[p.template]) % len(places) for p, item in zip(pairs, items, strict=True)]
    order = sorted(rng.sample(range(len(pairs)), len(pairs)), key=ranks.__getitem__)
    return [pairs[index] for index in order]


def _numbered(rng: random.Random, names: Sequence[Hashable]) -> dict[Hashable, int]:
    distinct = [*dict.fromkeys(names)]
    return {name: place for place, name in enumerate(rng.sample(distinct, len(distinct)))}


def _read_until(
    read: Callable[[list[Text]], Tensor], pairs: Sequence[ContrastPair], enough: float | None, bar: Any
) -> tuple[Floats, float]:
    """The activations of as many pairs as tell the direction, (pairs, 2, blocks, d_model), and how well they do."""
    seen = _activations(read, pairs[: len(pairs) if enough is None else FIRST], bar)
    while (cosine := _cosine_to_all(seen, len(pairs))) < (enough or 0) and len(seen) < len(pairs):
        seen = np.concatenate([seen, _activations(read, pairs[len(seen) : len(seen) + FIRST], bar)])
    return seen, cosine


def _activations(read: Callable[[list[Text]], Tensor], pairs: Sequence[ContrastPair], bar: Any) -> Floats:
    texts = [text for pair in pairs for text in (pair.positive, pair.negative)]
    found = rearrange(read(texts).double().numpy(), "(pairs poles) blocks d -> pairs poles blocks d", poles=2)
    bar.update(len(pairs))
    return found


def _cosine_to_all(seen: Floats, of: int) -> float:
    """The cosine that is expected, at the median block, between the mean difference of the pairs that were seen, drawn
    from so many, and that of all."""
    differences = seen[:, 0] - seen[:, 1]
    size = np.square(differences.mean(0)).sum(-1)
    error = differences.var(0, ddof=1).sum(-1) / len(seen) * (1 - len(seen) / of)
    share = 1 - error / np.maximum(size, np.finfo(float).tiny)
    return float(np.median(np.sqrt(share.clip(0, 1))))


def digest_of(pairs: Sequence[ContrastPair]) -> str:
    """A few digits that change with the pairs."""
    return digest({"pairs": [asdict(pair) for pair in pairs]})


def rendering_of(tokenizer: Any) -> str:
    """A few digits that change with how chats become tokens: with the template, and with what renders it."""
    return digest({"version": VERSION, "template": str(getattr(tokenizer, "chat_template", None) or "")})


def name_of(model: nn.Module) -> str:
    """What a model is called: its name on the hub, or the end of its folder, whose place is nobody's business.

    Of a GGUF file it is the file's name.
    """
    path = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "")))
    if path.suffix == ".gguf":
        return path.stem
    return "/".join(path.parts[-2:]) or type(model).__name__


def _at_one_block(estimator: BaseEstimator, seen: Floats, unseen: Floats) -> dict[str, Floats]:
    """The directions fitted to `seen`, and how they do on `unseen`: (pairs, positive and negative, d_model)."""
    seen, unseen = (rearrange(poles, "pairs poles d -> (pairs poles) d") for poles in (seen, unseen))
    labels = np.tile([1, 0], len(seen) // 2)
    takes_groups = isinstance(estimator, Reader)
    more = {"groups": np.repeat(np.arange(len(seen) // 2), 2)} if takes_groups else {}
    estimator.fit(seen, labels, **more)
    read, write = readers.directions(estimator, seen, labels)
    center = (seen[0::2].mean(0) + seen[1::2].mean(0)) / 2
    positive, negative = unseen[0::2] @ read, unseen[1::2] @ read
    distance = positive.mean() - negative.mean()
    sigma = np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    ordered = np.where(positive == negative, 0.5, positive > negative)
    return {
        "read": read,
        "write": write,
        "center": _moved_to(center, read, write, (positive.mean() + negative.mean()) / 2),
        "scale": distance / 2,
        "sigma": sigma,
        "norm": np.linalg.norm(np.concatenate([seen, unseen]), axis=-1).mean(),
        "accuracy": ordered.mean(),
        "separation": distance / max(sigma, np.finfo(float).tiny) if distance else np.float64(0),
    }


def _moved_to(center: Floats, read: Floats, write: Floats, midpoint: float) -> Floats:
    """The centre of what was seen, moved along `write` so that it reads as the midpoint of what was not."""
    return center + (midpoint - center @ read) * write


def _best(blocks: Sequence[int], depth: int, accuracy: Sequence[float], separation: Sequence[float]) -> int:
    """The block that orders held-out pairs best, and of nearly equal ones the one whose poles are furthest apart.

    The last fifth of the model is left out, unless nothing else was fitted.
    """
    rows = list(zip(blocks, accuracy, separation, strict=True))
    rows = [row for row in rows if row[0] < LATEST * depth] or rows
    enough = max(accuracy for _, accuracy, _ in rows) - EQUALLY_READ
    return max((row for row in rows if row[1] >= enough), key=lambda row: row[2])[0]
