"""Doses: what a strength of 1 costs is what was said, on a model of any family."""

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import repe
from repe.models.blocks import find_stack
from repe.reading import dose
from repe.reading.dose import forecast_doses, short_texts
from repe.reading.gradients import information, samples_of_divergence
from repe.reading.placing import dosed
from repe.steering.edit import Edit
from tests import oracles, zoo

TEXTS = ["a text of some length", "another one, longer than the first", "and a third", "short"]


@cache
def model_of(family: str) -> Any:
    return zoo.build(family)


@torch.no_grad()
def cost_of(model: Any, texts: Any, pushes: dict[int, torch.Tensor]) -> float:
    """Nats a token of texts that stand alone, pushed at blocks by plain hooks either way."""
    found = []
    for text in texts:
        ids = torch.tensor([text.ids[:-1]])
        plain = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        for sign in (1, -1):
            with ExitStack() as hooks:
                for block, push in pushes.items():
                    add = partial(torch.add, sign * push)
                    hooks.enter_context(oracles.changed(find_stack(model).blocks[block], add))
                steered = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            found.append(float((plain.exp() * (plain - steered)).sum(-1).mean()))
    return sum(found) / len(found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon", "gemma2", "mamba"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_dose_costs_a_tenth_of_a_nat_where_it_is_recommended(family: str, block: int) -> None:
    model, tokenizer = model_of(family), zoo.tokenizer()
    vector = dosed(model, tokenizer, oracles.vector(recommended=(block,)), TEXTS)
    row = vector.row(block)
    push = vector.dose[row] * vector.write[row]
    assert cost_of(model, short_texts(model, tokenizer, TEXTS), {block: push}) == pytest.approx(0.1, rel=0.1)
    assert str(block) in vector.provenance["dose"]["measured"]
    assert (vector.dose > 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_several_blocks_that_are_recommended_cost_a_dose_together(family: str) -> None:
    model, tokenizer = model_of(family), zoo.tokenizer()
    vector = dosed(model, tokenizer, oracles.vector(recommended=(1, 2, 3)), TEXTS)
    assert [*vector.provenance["dose"]["measured"]] == ["1, 2, 3"]
    lengths = Edit.of(vector).on(find_stack(model)).lengths
    pushes = {block: length * vector.write[block] for block, (length, _) in lengths.items()}
    assert cost_of(model, short_texts(model, tokenizer, TEXTS), pushes) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("blocks", [(0,), (0, 1), (1, 3), (0, 1, 2, 3)])
def test_a_small_strength_costs_what_is_expected_of_it_at_any_blocks(blocks: tuple[int, ...], tokenizer: Any) -> None:
    """Of random directions, whose costs are hardly alike: shares that sum to 1 would cost half of it or less."""
    model, alpha = model_of("llama"), 0.1
    samples_of = partial(samples_of_divergence, model, find_stack(model).blocks, draws=200)
    texts, vector = short_texts(model, tokenizer, TEXTS), oracles.vector()
    vector = forecast_doses(vector, information(samples_of(texts), vector.write))
    placement = Edit.of(vector, blocks=blocks).on(find_stack(model))
    pushes = {b: alpha * length * vector.write[b] for b, (length, _) in placement.lengths.items()}
    assert placement.divergence(alpha) == pytest.approx(0.1 * alpha**2, rel=1e-4)
    assert cost_of(model, texts, pushes) == pytest.approx(placement.divergence(alpha), rel=0.15)
    doses = torch.tensor([placement.lengths[b][0] / float(vector.dose[b]) for b in blocks])
    assert len(blocks) == 1 or float(doses.sum()) > 1.1


@pytest.mark.parametrize("unit", ["kl", "gap"])
def test_a_random_vector_is_pushed_as_far_as_the_one_it_stands_for(unit: str, tokenizer: Any) -> None:
    model = model_of("llama")
    vector = dosed(model, tokenizer, oracles.vector(recommended=(1, 2)), TEXTS)
    random = repe.ConceptVector.random(vector, 3)
    own, other = (Edit.of(v, unit=unit).on(find_stack(model)).lengths for v in (vector, random))
    assert {b: length for b, (length, _) in own.items()} == pytest.approx({b: x for b, (x, _) in other.items()})
    expected = vector.lengths_at((1, 2)) if unit == "kl" else vector.scale[[1, 2]] / 2
    assert [length for length, _ in own.values()] == pytest.approx(expected.tolist())


def test_a_dose_is_found_where_costs_leap(testbed: Any) -> None:
    """The testbed's harmfulness costs .03 nats at a length and .29 at a third more: mere steps swing about the dose."""
    vector = dosed(*testbed, repe.extract(*testbed, "harmfulness", writes=False).at(2, 3, 4))
    assert [*vector.provenance["dose"]["measured"]] == ["2, 3, 4"]
    assert np.mean(vector.provenance["dose"]["measured"]["2, 3, 4"]) == pytest.approx(0.1, rel=0.3)


def test_where_blocks_cost_no_dose_together_each_is_measured(tokenizer: Any, monkeypatch: Any) -> None:
    model, measured = model_of("llama"), dose._measured

    def alone(*args: Any) -> Any:
        return measured(*args) if len(args[-1]) == 1 else (torch.full((len(args[-1]),), math.nan), None)

    monkeypatch.setattr(dose, "_measured", alone)
    vector = dosed(model, tokenizer, oracles.vector(recommended=(1, 2)), TEXTS)
    assert [*vector.provenance["dose"]["measured"]] == ["1", "2"]
    assert (vector.dose > 0).all()


def test_two_concepts_at_several_blocks_cost_what_each_does(tokenizer: Any) -> None:
    """In doses, as two sides of a right angle: random directions have next to nothing to do with each other."""
    model, alpha = model_of("llama"), 0.1
    pair = [dosed(model, tokenizer, oracles.vector(seed, recommended=(1, 2, 3)), TEXTS) for seed in (0, 1)]
    placement = Edit.of(pair).on(find_stack(model))
    assert placement.divergence(alpha) == pytest.approx(0.2 * alpha**2)
    lengths = [v.lengths_at((1, 2, 3)) for v in pair]
    pushes = {b: sum(alpha * x[b - 1] * v.write[b] for v, x in zip(pair, lengths, strict=True)) for b in (1, 2, 3)}
    found = cost_of(model, short_texts(model, tokenizer, TEXTS), pushes)
    assert found == pytest.approx(placement.divergence(alpha), rel=0.5)


def test_a_dose_elsewhere_is_forecast_and_near(tokenizer: Any) -> None:
    model = model_of("llama")
    vector = dosed(model, tokenizer, oracles.vector(recommended=(2,)), TEXTS)
    for block in (1, 3):
        push = vector.dose[block] * vector.write[block]
        assert 0.02 < cost_of(model, short_texts(model, tokenizer, TEXTS), {block: push}) < 0.5


def test_a_strength_of_one_adds_a_dose(tokenizer: Any) -> None:
    model = model_of("llama")
    vector = dosed(model, tokenizer, oracles.vector(recommended=(2,)), TEXTS)
    batch = zoo.inputs("llama")
    with repe.steer(model, vector, -1.0) as handle:
        steered = oracles.recorded(model, [find_stack(model).blocks[2]], **batch)[0]
    (plain,) = oracles.recorded(model, [find_stack(model).blocks[2]], **batch)
    moved = (steered - plain)[batch["attention_mask"].bool()]
    torch.testing.assert_close(moved, (-vector.dose[2] * vector.write[2]).expand_as(moved), atol=1e-4, rtol=1e-3)
    assert handle.divergence == pytest.approx(0.1)


def test_where_no_length_will_do_the_dose_is_unknown_and_the_reason_told(tokenizer: Any) -> None:
    """The head of this model sees nothing of what a direction adds."""
    model = zoo.build("llama")
    axis = torch.nn.functional.normalize(torch.ones(zoo.D_MODEL), dim=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    same = axis.expand(zoo.N_BLOCKS, -1).clone()
    vector = dosed(model, tokenizer, replace(oracles.vector(), write=same, read=same), TEXTS)
    assert math.isnan(vector.dose[oracles.BLOCK])
    assert "costs 0.1 nats a token" in vector.provenance["dose"]["unknown"][str(oracles.BLOCK)]
    with pytest.raises(ValueError, match="does not know its dose"):
        repe.steer(model, vector, 1.0)


def test_a_model_that_cannot_be_differentiated_is_measured(tokenizer: Any, monkeypatch: Any) -> None:
    model, expected = model_of("llama"), dosed(model_of("llama"), tokenizer, oracles.vector(), TEXTS)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no derivative of this kernel")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.warns(UserWarning, match="which has none .no derivative of this kernel.*reading alone chose"):
        vector = dosed(model, tokenizer, oracles.vector(), TEXTS)
    assert float(vector.dose[oracles.BLOCK]) == pytest.approx(float(expected.dose[oracles.BLOCK]), rel=0.1)
    assert vector.dose.isnan().sum() == zoo.N_BLOCKS - 1
    assert "no derivative of this kernel" in vector.provenance["dose"]["unknown"]["forecast"]


def test_a_lack_of_memory_is_no_lack_of_gradients(tokenizer: Any, monkeypatch: Any) -> None:
    def fill(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.autograd, "grad", fill)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        dosed(model_of("llama"), tokenizer, oracles.vector(), TEXTS)


def test_what_has_no_next_token_has_no_dose(tokenizer: Any) -> None:
    sizes = {"hidden_size": zoo.D_MODEL, "num_hidden_layers": zoo.N_BLOCKS, "num_attention_heads": 4}
    bert = BertModel(BertConfig(**sizes, intermediate_size=48, vocab_size=zoo.VOCABULARY))
    with pytest.raises(ValueError, match="not causal"):
        dosed(bert, tokenizer, oracles.vector(), TEXTS)
    with pytest.raises(ValueError, match="at least one text of two tokens"):
        dosed(model_of("llama"), tokenizer, oracles.vector(), [])
