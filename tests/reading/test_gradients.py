"""Gradients: what they forecast of a small push is what one does, block by block, in every family."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from repe.data.answers import Answer
from repe.models.blocks import find_stack
from repe.models.logits import log_odds
from repe.reading.gradients import (
    efficiency,
    everywhere,
    fisher,
    gradients_of_answers,
    samples_of_divergence,
    slopes,
)
from tests import oracles, zoo

FAMILIES = ("llama", "gpt2", "gpt_neox", "falcon", "qwen3", "mamba")
QUESTIONS = [
    ([Answer((9, 17, 30, 44), 2), Answer((9, 17, 51), 2)], 0),
    ([Answer((60, 9, 8, 7, 70, 71), 4), Answer((60, 9, 8, 7, 72), 4), Answer((60, 9, 8, 7, 73, 9), 4)], 2),
    ([Answer((5, 6, 80), 2), Answer((5, 6, 81), 2)], 1),
]
TEXTS = [Answer((9, 17, 30, 44, 50, 51, 60), 1), Answer((70, 9, 8), 1), Answer((33, 34, 35, 36, 37), 1)]
LENGTH = 0.02


@cache
def model_of(family: str) -> Any:
    return zoo.build(family).double()


def directions(model: Any) -> Tensor:
    drawn = torch.randn(
        find_stack(model).n_blocks, find_stack(model).d_model, generator=torch.Generator().manual_seed(3)
    )
    return torch.nn.functional.normalize(drawn, dim=-1)


def sites_of(model: Any) -> list[Any]:
    stack = find_stack(model)
    return [stack.site("block", block) for block in range(stack.n_blocks)]


def in_answer(answer: Answer) -> Tensor:
    return torch.arange(len(answer.ids) - 1) >= answer.begins - 1


def odds_under(model: Any, question: Any, push: Tensor, block: int, edited: Any) -> float:
    """Of texts that stand alone, pushed by a plain hook."""
    found = []
    for answer in question[0]:
        shift = torch.cat([edited(answer), torch.zeros(1, dtype=torch.bool)])[:, None] * push
        with oracles.changed(find_stack(model).blocks[block], lambda hidden, shift=shift: hidden + shift):
            found.append(oracles.log_p(model, answer.ids[: answer.begins], answer.ids[answer.begins :])[0])
    return float(log_odds(torch.tensor(found, dtype=torch.float64), question[1]))


@torch.no_grad()
def divergence_under(model: Any, text: Answer, push: Tensor, block: int) -> float:
    """Nats a token of a text that stands alone."""
    ids = torch.tensor([text.ids[:-1]])
    plain = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    with oracles.changed(find_stack(model).blocks[block], lambda hidden: hidden + push):
        steered = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float((plain.exp() * (plain - steered)).sum(-1).mean())


@pytest.mark.parametrize("edited", [everywhere, in_answer])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_slope_is_that_of_a_small_push(family: str, edited: Any) -> None:
    model = model_of(family)
    along = directions(model).double()
    found = slopes(gradients_of_answers(model, sites_of(model), QUESTIONS, edited=edited), along.float())
    for block in range(len(along)):
        for row, question in enumerate(QUESTIONS):
            ahead, back = (odds_under(model, question, sign * LENGTH * along[block], block, edited) for sign in (1, -1))
            assert float(found[row, block]) == pytest.approx((ahead - back) / (2 * LENGTH), rel=1e-2, abs=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_the_information_is_the_divergence_of_a_small_push(family: str) -> None:
    """As far as 2,000 samples tell, which are nearly Gaussian: to 3%, and a few times that is allowed."""
    model = model_of(family)
    along = directions(model).double()
    found = fisher(samples_of_divergence(model, sites_of(model), TEXTS, draws=700), along.float())
    for block in range(len(along)):
        push = LENGTH * along[block]
        both = [divergence_under(model, text, sign * push, block) for text in TEXTS for sign in (1, -1)]
        measured = 2 * sum(both) / len(both) / LENGTH**2
        assert float(found[block]) == pytest.approx(measured, rel=0.12)


def test_efficiency_has_no_length() -> None:
    model = model_of("llama")
    along = directions(model)
    gradients = gradients_of_answers(model, sites_of(model), QUESTIONS)
    samples = samples_of_divergence(model, sites_of(model), TEXTS, draws=4)
    torch.testing.assert_close(efficiency(gradients, samples, along), efficiency(gradients, samples, 7 * along))
    torch.testing.assert_close(efficiency(gradients, samples, along), -efficiency(gradients, samples, -along))


def test_batches_change_nothing() -> None:
    model = model_of("llama")
    sites = sites_of(model)
    together = gradients_of_answers(model, sites, QUESTIONS)
    torch.testing.assert_close(gradients_of_answers(model, sites, QUESTIONS, batch_tokens=1), together)
    torch.testing.assert_close(gradients_of_answers(model, sites, QUESTIONS[::-1]).flip(0), together)


def test_samples_are_the_same_for_the_same_seed_and_text() -> None:
    model = model_of("llama")
    first, again, other = (samples_of_divergence(model, sites_of(model), TEXTS, draws=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (len(TEXTS) * 2, zoo.N_BLOCKS, zoo.D_MODEL)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen: bool) -> None:
    model = zoo.build("llama").train()
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    before, weights = oracles.hooks_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        found = gradients_of_answers(model, sites_of(model), QUESTIONS)
        samples = samples_of_divergence(model, sites_of(model), TEXTS, draws=1)
    assert not found.requires_grad
    assert not samples.requires_grad
    assert found.abs().sum() > 0
    assert model.training
    assert oracles.hooks_of(model) == before
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad != frozen
        assert torch.equal(weights[name], parameter)
