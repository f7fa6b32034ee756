"""Costs: what steering does to texts that have nothing to do with the concept, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from repe.measuring.fanout import Batch, Fanout, Span, compare, trusted, why_padded, witnesses
from repe.measuring.scores import Costs
from repe.measuring.scoring import check_causal
from repe.measuring.sweep import BATCH_TOKENS, strengths_of
from repe.models.blocks import find_stack
from repe.models.tokens import Text, encode
from repe.reading.capture import evaluating, recording
from repe.reading.trees import dtype_of
from repe.steering.scope import needs_prompt_length
from repe.steering.steer import steer


def costs(
    model: nn.Module,
    tokenizer: Any,
    concept: Any,
    texts: Sequence[Text],
    alphas: Sequence[float] | Tensor,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    **how: Any,
) -> Costs:
    """The KL divergence from the unsteered model, the cross-entropy, and how far the last hidden state moves.

    A text counts as written after its first token, which is what the scopes take for its prompt; with scope="prompt",
    or positions from the prompt's end, all of it counts as prompt. The divergence is `KL(unsteered || steered)`, at
    every token that predicts another. The hidden state is that of the last block's output, before the final norm; its
    change is the norm of the difference.

    Args:
        model, tokenizer, concept, batch_tokens, progress, how: as in `repe.measuring.sweep.sweep`.
        texts: neutral ones, of two tokens at least.
        alphas: the strengths; sorted, each once, and 0 must be among them.

    Raises:
        ValueError: there are no texts, one is too short, or 0 is not among the alphas.
    """
    strengths = strengths_of(alphas)
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts, got {texts!r:.80}")
    rows = [tuple(encode(tokenizer, text)) for text in texts]
    spans = [Span(row, len(row) if _is_of_the_prompt(how.get("scope", "all")) else 1) for row in rows]
    if not spans or any(len(span.ids) < 2 for span in spans):
        raise ValueError("costs are measured on at least one text, each of two tokens or more")
    if 0 not in strengths:
        raise ValueError(f"costs are measured against alpha 0, which is not among {strengths.tolist()}")
    check_causal(model, how.get("blocks_at"))
    obstacle = why_padded(model, find_stack(model, blocks_at=how.get("blocks_at")), how.get("gate"))
    with (
        steer(model, concept, tokenizer=tokenizer, **how) as handle,
        evaluating(model),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        fan = Fanout(model, handle, obstacle, batch_tokens)
        found = trusted(fan, spans, len(strengths), lambda fan, b: _measured(fan, b, spans, strengths, progress))
    return _gathered(found)


def _is_of_the_prompt(scope: Any) -> bool:
    return needs_prompt_length(scope) and scope not in ("answer", "generated")


def _measured(
    fan: Fanout, batches: Sequence[Batch], spans: Sequence[Span], alphas: Tensor, progress: bool
) -> list[Tensor]:
    """For every text (3, alphas, tokens): divergence, cross-entropy, and change of the hidden state."""
    found: dict[int, Tensor] = {}
    for number, batch in enumerate(tqdm(batches, "costs", unit="batch", disable=not progress)):
        kept = _of_batch(fan, batch, spans, alphas)
        if not fan.why_padded and number in (0, len(batches) - 1):
            _compare(fan, batch, spans, alphas, kept)
        found |= dict(zip(batch.texts, kept, strict=True))
    return [found[text] for text in range(len(spans))]


def _compare(fan: Fanout, batch: Batch, spans: Sequence[Span], alphas: Tensor, found: Sequence[Tensor]) -> None:
    """Raises DisagreementError if texts of a batch are others in a row alone, at the largest strength."""
    ends = [int((alphas == 0).nonzero()), int(alphas.abs().argmax())]
    alone = Fanout(fan.model, fan.handle, "to compare with", fan.batch_tokens)
    for place in witnesses(batch, spans):
        span = [spans[batch.texts[place]]]
        (plain,) = _of_batch(alone, alone.batches(span, len(ends))[0], span, alphas[ends])
        compare(found[place][1, ends], plain[1], dtype_of(fan.stack.module))


def _of_batch(fan: Fanout, batch: Batch, spans: Sequence[Span], alphas: Tensor) -> list[Tensor]:
    """For every text of a batch (3, alphas, tokens): divergence, cross-entropy, and change of the hidden state."""
    wanted, outset = torch.arange(batch.width), fan.begin(batch)
    ((_, plain, hidden),) = _states(fan, batch, torch.zeros(1), wanted, outset)
    kept = [torch.empty(3, len(alphas), len(slots)) for slots in batch.slots]
    for chunk, logits, state in _states(fan, batch, alphas, wanted, outset):
        for k, (text, row, slots) in enumerate(zip(batch.texts, batch.rows, batch.slots, strict=True)):
            before = plain[row][:, slots].double().log_softmax(-1)
            steered = logits[row][:, slots].double().log_softmax(-1)
            targets = torch.tensor(spans[text].ids[1:], device=steered.device).expand(steered.shape[:2])
            kept[k][0, chunk] = (before.exp() * (before - steered)).sum(-1).float().cpu()
            kept[k][1, chunk] = -steered.gather(-1, targets[..., None])[..., 0].float().cpu()
            kept[k][2, chunk] = (state[row][:, slots] - hidden[row][:, slots]).float().norm(dim=-1).cpu()
    for tokens in kept:
        _check_finite(tokens, alphas)
    return kept


def _check_finite(found: Tensor, alphas: Tensor) -> None:
    if wild := alphas[~found.isfinite().all(-1).all(0)].tolist():
        raise OverflowError(f"at the strengths {wild} the model puts out no numbers: leave them out")


def _states(
    fan: Fanout, batch: Batch, alphas: Tensor, wanted: Tensor, outset: Any
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the strengths, and their logits and last hidden states, (rows, alphas, tokens, ...)."""
    with recording([fan.stack.blocks[-1]], lambda hidden: hidden.clone()) as records:
        for chunk, logits in fan.logits(batch, alphas, wanted, outset):
            yield chunk, logits, rearrange(records[0], "(rows alphas) n d -> rows alphas n d", rows=batch.height)


def _gathered(found: Sequence[Tensor]) -> Costs:
    """Costs of texts, from those of their tokens."""
    kl, entropy, change = torch.stack([tokens.mean(-1) for tokens in found], dim=-1).double().numpy()
    every = torch.cat([tokens[0] for tokens in found], dim=-1).double().numpy()
    return Costs(np.maximum(kl, 0), np.maximum(np.quantile(every, 0.95, axis=1), 0), entropy, change)
