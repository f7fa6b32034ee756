"""Logits: whether a model puts out those of the next token, at which columns it is asked for them, and what they say.

This is the one place where probabilities are computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repe.models.blocks import find_stack, is_encoder_decoder


def picks_columns(model: nn.Module) -> bool:
    """Whether a model runs its head on chosen columns alone."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model knows: the most that one of its embeddings has."""
    return max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)


def logits_at(model: nn.Module, given: Mapping[str, Any], columns: Tensor) -> Tensor:
    """(rows, columns, vocabulary), the logits at some columns of `given`, which holds `input_ids` at least."""
    if picks_columns(model):
        return model(**given, use_cache=False, logits_to_keep=columns).logits
    logits = model(**given, use_cache=False).logits
    return logits[:, columns + logits.shape[1] - given["input_ids"].shape[1]]  # virtual tokens may stand before


def check_causal(model: nn.Module, blocks_at: str | None = None) -> None:
    """Raises ValueError where a prompt's continuation has no probability: the model reads both ways, or has no head."""
    if why_not := why_not_causal(model, blocks_at):
        raise ValueError(
            f"{why_not}: likelihoods of options need a causal language model, such as AutoModelForCausalLM loads"
        )


def why_not_causal(model: nn.Module, blocks_at: str | None = None) -> str:
    """Why a prompt's continuation has no probability, or "" if it has."""
    kind = type(model).__name__
    if is_encoder_decoder(model):
        return f"{kind} is an encoder-decoder, whose encoder would see the option it is to predict"
    if any(getattr(m, "is_causal", True) is False for m in find_stack(model, blocks_at=blocks_at).module.modules()):
        return f"the attention of {kind} is not causal, so every token is predicted from itself"
    parts: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    if parts and all(part.get_output_embeddings() is None for part in parts):
        return f"{kind} has no language-model head"
    return ""


# from logits


def log_probabilities(logits: Tensor) -> Tensor:
    """log P of every token of the vocabulary, the last dimension, in nats; in float32 where `logits` are rougher."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """log P of `tokens` (...,), each at its logits (..., vocabulary), in nats.

    Example:
        >>> log_probability(torch.zeros(4), torch.tensor(2)).exp()
        tensor(0.2500)
    """
    return log_probabilities(logits).gather(-1, tokens[..., None])[..., 0]


def log_odds(log_p: Tensor, right: int) -> Tensor:
    """log P of the right option (options,) against that of all the others, in nats."""
    return log_p[right] - torch.cat([log_p[:right], log_p[right + 1 :]]).logsumexp(0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (..., vocabulary), in nats; NaN where either is."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
