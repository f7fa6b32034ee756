"""The sweep: a model's scores on tasks over many strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from repe.steering import steer
from repe.tasks import Item, check_causal, encode_items, probabilities, score_encoded
from repe.vector import ConceptVector


def sweep(
    model: nn.Module,
    tokenizer: Any,
    concept: str | ConceptVector,
    tasks: Mapping[str, Sequence[Item]],
    alphas: Sequence[float] | Tensor,
    *,
    progress: bool = False,
    **how: Any,
) -> dict[str, Tensor]:
    """P(answer) among the options, for every task as (alphas, items).

    Args:
        model, tokenizer: neither is changed.
        concept: what is steered along.
        tasks: items by the name of their task.
        alphas: the strengths; a tensor or an array of them too.
        progress: show a progress bar.
        how: for `repe.steer`, such as `blocks`, `edit` and `scope`.

    Raises:
        ValueError: no alphas or no tasks, a model that is not causal, or what `repe.steer` raises.
    """
    strengths = _numbers(alphas)
    if not strengths or not tasks:
        raise ValueError(f"a sweep needs at least one alpha and one task, got {strengths} and {list(tasks)}")
    check_causal(model, how.get("blocks_at"))
    encoded = {name: encode_items(tokenizer, items) for name, items in tasks.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in tasks}
    with steer(model, concept, tokenizer=tokenizer, **how) as handle:
        for alpha in tqdm(strengths, desc="sweep", unit="alpha", disable=not progress):
            handle.alpha = alpha
            for name, items in tasks.items():
                likelihoods = score_encoded(model, encoded[name], steering=[handle])
                scores[name].append(probabilities(likelihoods, items))
    return {name: torch.stack(rows) for name, rows in scores.items()}


def behaviour(probability: Tensor) -> Tensor:
    """(alphas,), P(aligned) - P(misaligned) in [-1, 1], from P(aligned) of every item (alphas, items)."""
    return (2 * probability - 1).mean(-1)


def _numbers(alphas: Any) -> list[float]:
    """Strengths as numbers, from whatever sequence, tensor or array holds them."""
    values = alphas.tolist() if hasattr(alphas, "tolist") else alphas
    try:
        return [float(alpha) for alpha in values]
    except TypeError as error:
        raise ValueError(f"alphas are numbers in a row, such as [-1, 0, 1]; got {alphas!r:.200}") from error
