"""Aiming: a vector that writes towards what a concept's behaviour items ask for, and reads as it did.

What tells the poles of contrast pairs apart is read, and need not be what moves a model's answers. What does is the
mean gradient of the items' log odds: a step along it gains most for its length. It is fitted to items, so that it says
nothing on these items of what it does: they are remembered, and measuring leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repe.data.catalogue import find_task
from repe.data.items import Item, load_items
from repe.data.worded import worded
from repe.models.blocks import find_stack
from repe.models.fingerprint import digest
from repe.models.load import home_of
from repe.models.logits import check_causal
from repe.models.tokens import Text
from repe.reading.dose import dose_of, forecast_doses, short_texts
from repe.reading.gradients import fisher, gradients_of_answers, information, samples_of_divergence, slopes
from repe.reading.placing import DRAWS, as_questions, compared, moved
from repe.reading.vector import AIMED_AT, ROUNDING, ConceptVector

FOLDS = 4  # in which the efficiency is found on items that the direction was not fitted to


def aimed(
    model: nn.Module,
    tokenizer: Any,
    vector: ConceptVector,
    items: Sequence[Item] | None = None,
    *,
    neutral: Sequence[Text] | None = None,
    blocks_at: str | None = None,
    progress: bool | None = None,
) -> ConceptVector:
    """The vector that writes halfway towards the gradient of behaviour items, and reads along what it read before.

    At every block its direction is the sum of what was written and of the gradient's part at right angles to what is
    read, at equal lengths. It recommends the block that is most efficient on items left out of the fit, in four folds,
    and its provenance tells this efficiency of every block, and how many random directions do less.

    Half of the concept's items are fitted to, every other group of them. `repe.forecast` and `repe.tradeoff` leave out
    what a vector was aimed at, however it is asked, and what shares its group in a file; whatever else measures it
    should, by `repe.reading.unseen`.

    Args:
        model, tokenizer: neither is changed. What is attached to the model applies.
        vector: as `repe.extract` makes it.
        items: what to fit to, all of which are used; of the concept's own every other group by default, asked in words.
        neutral: the texts that doses are measured on, as in `repe.reading.dosed`.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        progress: show progress bars; None: where a terminal or a notebook shows them.

    Raises:
        ValueError: the vector is aimed already; the concept has no behaviour items and none are given, or they are of
            one group; or the model does not predict every token from those before it alone.
        NotDifferentiableError: the model has no gradient, as with quantised kernels.

    Example:
        >>> vector = repe.extract(model, tokenizer, "honesty")
        >>> repe.reading.aimed(model, tokenizer, vector).separation.equal(vector.separation)
        True
    """
    check_causal(model, blocks_at)
    if AIMED_AT in vector.provenance:
        raise ValueError(f"{vector.concept}: the vector is aimed already: aim the one that was extracted")
    chosen = _every_other(vector.concept, model) if items is None else items
    groups = [group_of(item) for item in chosen]
    if len({*groups}) < 2:
        raise ValueError(
            f"{vector.concept}: a vector is aimed at items of two groups at least, and got {len({*groups})}"
        )
    stack, plain = find_stack(model, vector.stack, blocks_at), short_texts(model, tokenizer, neutral)
    sites = [stack.site(vector.site, block) for block in vector.blocks]
    gradients = gradients_of_answers(model, sites, as_questions(tokenizer, chosen), progress=progress)
    samples = samples_of_divergence(model, sites, plain, draws=DRAWS, progress=progress)
    efficient = efficiency_left_out(vector, gradients, samples, groups)
    turned = towards(vector, gradients.mean(0))
    turned = replace(turned, provenance={**vector.provenance, AIMED_AT: sorted({*map(name_of, chosen)})})
    turned = compared(moved(turned, efficient, stack.n_blocks), efficient, gradients.mean(0), samples)
    forecast = forecast_doses(turned, information(samples, turned.write))
    return dose_of(model, sites, plain, forecast, progress=progress)


def unseen(items: Sequence[Item], *vectors: ConceptVector) -> list[Item]:
    """The items that none of the vectors was aimed at, nor at another of them that shares their group.

    Raises:
        ValueError: there are items, and none is left.
    """
    seen = {name for vector in vectors for name in vector.provenance.get(AIMED_AT, ())}
    known = [name_of(item) in seen for item in items] if seen else [False] * len(items)
    groups = {group_of(item) for item, is_known in zip(items, known, strict=True) if is_known}
    left = [item for item in items if group_of(item) not in groups]
    if items and not left:
        names = ", ".join(vector.concept for vector in vectors)
        raise ValueError(f"{names}: aimed at all of these items, which cannot tell what it does: measure it on others")
    return left


def name_of(item: Item) -> str:
    """What an item is known by, however it is asked: a few digits of what it asks in words."""
    (asked,) = worded([item])
    return digest({"prompt": json.dumps(asked.prompt), "options": sorted(asked.options)})


def group_of(item: Item) -> str:
    """What an item shares with others of its file, or its own name where it has no group."""
    return item.group or name_of(item)


def _every_other(concept: str, model: nn.Module) -> list[Item]:
    items = worded(load_items(find_task(concept, home_of(model))))
    chosen = {*list(dict.fromkeys(map(group_of, items)))[::2]}
    return [item for item in items if group_of(item) in chosen]


# gradients -> directions


def towards(vector: ConceptVector, gradient: Tensor) -> ConceptVector:
    """The vector that writes along its direction and, as much, along what of a gradient (blocks, d_model) is not read.

    A push along the sum reads as one along the first did, but for its length: so `read` keeps its direction, and what
    was measured of it holds. Where nothing of the gradient is left, nothing changes.
    """
    read, write = vector.read.double(), vector.write.double()
    along = torch.nn.functional.normalize(read, dim=-1)
    left = gradient.double() - (gradient.double() * along).sum(-1, keepdim=True) * along
    left[left.norm(dim=-1) <= ROUNDING * gradient.norm(dim=-1)] = 0
    whole = write + torch.nn.functional.normalize(left, dim=-1)
    length = whole.norm(dim=-1)  # not 0, for read . whole = 1
    grown = length.float()
    return replace(
        vector, write=(whole / length[:, None]).float(), read=(read * length[:, None]).float(),
        scale=vector.scale * grown, sigma=vector.sigma * grown,
        dose=torch.full_like(vector.dose, torch.nan), coherence=torch.full_like(vector.coherence, torch.nan),
    )  # fmt: skip


def efficiency_left_out(vector: ConceptVector, gradients: Tensor, samples: Tensor, names: Sequence[str]) -> Tensor:
    """(blocks,), the efficiency of aiming on items that are not aimed at: every fold by the gradient of the others.

    What has one name stays in one fold.
    """
    distinct = [*dict.fromkeys(names)]
    fold = torch.tensor([distinct.index(name) % min(FOLDS, len(distinct)) for name in names])
    found = []
    for number in fold.unique():
        write = towards(vector, gradients[fold != number].mean(0)).write
        found.append(slopes(gradients[fold == number], write) / fisher(samples, write).sqrt())
    return torch.cat(found).mean(0)
