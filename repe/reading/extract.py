"""Extraction: contrast pairs and a reader to a concept vector, judged at every block on pairs held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import nn

from repe.data.catalogue import Pairs, concept_of
from repe.data.pairs import ContrastPair, split
from repe.models.blocks import find_stack
from repe.models.chats import VERSION
from repe.models.fingerprint import digest, fingerprint
from repe.models.load import home_of
from repe.models.tracking import trackers_of
from repe.reading import readers
from repe.reading.capture import capture
from repe.reading.readers.reader import Reader
from repe.reading.vector import ConceptVector

Floats = NDArray[np.float64]

NEARLY_EQUAL = 0.005  # of accuracy: blocks this near the best are told apart by their separation
LATEST = 0.8  # of the depth: what is written later is hardly acted upon any more (Arditi et al., arXiv 2406.11717)


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
    batch_size: int = 32,
    progress: bool = False,
) -> ConceptVector:
    """A concept's directions in a model, from the last token of contrast pairs.

    The reader is fitted to some pairs and judged on others. Where the pairs do not say which, those held out share
    neither template nor item with the rest; where they do, it is as they say (`repe.audit` tells what is shared).

    Args:
        model, tokenizer: neither is changed.
        concept: the name of a concept (see `repe.concepts`), the path of a file of pairs, or the pairs.
        name: what to call the concept, where the file or the pairs do not say it.
        reader: "mean", "pca", "probe", "lda", or an unfitted scikit-learn estimator with a linear direction.
        blocks: at which to fit; the vector recommends the best of them.
        site, stack, blocks_at: where in the model, as in `repe.steer`.
        held_out, seed: the share of templates and items held out, and its seed, where the pairs do not say.
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
        ConceptVector('honesty', 6 blocks x 128; best at block 3 (accuracy 1.00, scale 53.7))
    """
    found = find_stack(model, stack, blocks_at)
    if trackers_of(model):
        raise ValueError(
            "something steers this model, and would be extracted with the concept: remove it first (`repe.detach`), "
            "extract, and steer again"
        )
    source = concept_of(concept, home_of(model))
    fit, held = split(source.pairs, held_out, seed)
    numbers = (0,) if site == "embedding" else found.indices(blocks)
    texts = [text for pair in (*fit, *held) for text in (pair.positive, pair.negative)]
    activations = capture(
        model, tokenizer, texts, blocks=list(numbers), tokens="last", site=site, stack=stack, blocks_at=blocks_at,
        batch_size=batch_size, progress=progress,
    ).double().numpy()  # fmt: skip
    seen, unseen = activations[: 2 * len(fit)], activations[2 * len(fit) :]
    columns = [_at_one_block(readers.make(reader), seen[:, i], unseen[:, i]) for i in range(len(numbers))]
    tensors = {k: torch.tensor(np.stack([c[k] for c in columns]), dtype=torch.float32) for k in columns[0]}
    return ConceptVector(
        concept=name or source.name,
        blocks=numbers,
        recommended=(_best(numbers, found.n_blocks, tensors["accuracy"].tolist(), tensors["separation"].tolist()),),
        site=site,
        stack=stack,
        provenance={
            "reader": reader if isinstance(reader, str) else repr(reader),
            "pairs": len(fit),
            "held_out_pairs": len(held),
            "templates": sorted({p.template for p in fit}),
            "held_out_templates": sorted({p.template for p in held}),
            "model": name_of(model),
            "pairs_digest": digest_of(source.pairs),
            "rendering": rendering_of(tokenizer),
            "fingerprint": fingerprint(model),
        },
        **tensors,
    )


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
    """The directions fitted to `seen`, and how they do on `unseen`: rows are pairs, positive and negative in turn."""
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
    enough = max(accuracy for _, accuracy, _ in rows) - NEARLY_EQUAL
    return max((row for row in rows if row[1] >= enough), key=lambda row: row[2])[0]
