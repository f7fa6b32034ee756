"""Aiming: what is read stays, what is written turns to the items, and no item tells of itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import repe
from repe.data.items import Item
from repe.data.worded import worded
from repe.measuring.tasks import items_of
from repe.models.blocks import find_stack
from repe.reading.aiming import aimed, efficiency_left_out, name_of, towards, unseen
from repe.reading.extract import read_poles
from repe.reading.gradients import efficiency, gradients_of_answers, samples_of_divergence
from repe.reading.placing import as_questions, short_texts
from repe.reading.vector import ConceptVector
from tests import oracles, zoo

ITEMS = [Item(f"a {word} is", ("good", "bad"), 0, group) for word, group in zip("abcdef", "112233", strict=True)]


@pytest.fixture(scope="module")
def vector(loaded_testbed: Any) -> Any:
    return read_poles(*loaded_testbed, "honesty").fitted("mean")


@pytest.fixture(scope="module")
def turned(loaded_testbed: Any, vector: Any) -> Any:
    return aimed(*loaded_testbed, vector)


def drawn(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the direction


def test_half_of_what_is_written_is_what_of_the_gradient_is_not_read() -> None:
    vector, gradient = oracles.vector(), drawn(zoo.N_BLOCKS, zoo.D_MODEL)
    write = towards(vector, gradient).write
    read = torch.nn.functional.normalize(vector.read, dim=-1)
    left = torch.nn.functional.normalize(gradient - (gradient * read).sum(-1, keepdim=True) * read, dim=-1)
    torch.testing.assert_close((write * vector.write).sum(-1), (write * left).sum(-1))
    torch.testing.assert_close(write, torch.nn.functional.normalize(vector.write + left, dim=-1))


def test_what_was_read_is_read_as_it_was() -> None:
    """Scores of any activations, in the poles' own distance and in sigmas, with what was measured of them."""
    vector, activations = oracles.vector(), 9 * drawn(20, zoo.N_BLOCKS, zoo.D_MODEL, seed=1)
    turned = towards(vector, drawn(zoo.N_BLOCKS, zoo.D_MODEL))
    torch.testing.assert_close(turned.write.norm(dim=-1), torch.ones(zoo.N_BLOCKS))
    torch.testing.assert_close((turned.read * turned.write).sum(-1), torch.ones(zoo.N_BLOCKS))
    for unit in ("scale", "sigma"):
        before, after = (((activations - v.center) * v.read).sum(-1) / getattr(v, unit) for v in (vector, turned))
        torch.testing.assert_close(after, before)
    for name in ("accuracy", "separation", "center", "norm"):
        assert torch.equal(getattr(turned, name), getattr(vector, name))
    assert turned.dose.isnan().all()


def test_a_push_past_what_is_read_reads_as_the_gap_that_it_was() -> None:
    vector = oracles.vector()
    turned = towards(vector, drawn(zoo.N_BLOCKS, zoo.D_MODEL))
    before, after = ((v.displacement * vector.read).sum(-1) for v in (vector, turned))
    torch.testing.assert_close(after, before)


def test_without_a_gradient_nothing_turns() -> None:
    vector = oracles.vector()
    turned = towards(vector, 3 * vector.read)
    for name in ("write", "read", "scale"):
        torch.testing.assert_close(getattr(turned, name), getattr(vector, name))


# --- what is told of it


def test_noise_is_not_efficient_on_items_that_are_left_out_nor_on_their_twins() -> None:
    """Though on those that it is fitted to it is: so it is told from what carries over. Twins share a name."""
    vector = oracles.vector()
    once = drawn(41, zoo.N_BLOCKS, zoo.D_MODEL)
    gradients, names = torch.cat([once, once]), [f"fact {number}" for number in range(41)] * 2
    samples = drawn(400, zoo.N_BLOCKS, zoo.D_MODEL, seed=2)
    fitted = efficiency(gradients, samples, towards(vector, gradients.mean(0)).write)
    left_out = efficiency_left_out(vector, gradients, samples, names)
    half = efficiency(gradients, samples, vector.write) / 2**0.5  # what there is of the old direction
    assert (fitted - half).mean() > 0.5
    assert (left_out - half).mean().abs() < 0.15
    shared = gradients + 0.5 * drawn(zoo.N_BLOCKS, zoo.D_MODEL, seed=3)
    assert (efficiency_left_out(vector, shared, samples, names) > 1).all()


def test_every_other_group_is_fitted_to_and_measuring_leaves_it_out(
    loaded_testbed: Any, vector: Any, turned: Any
) -> None:
    model, tokenizer = loaded_testbed
    items = worded(items_of("honesty", model))
    groups = list(dict.fromkeys(item.group for item in items))
    assert turned.provenance["aimed_at"] == sorted({name_of(item) for item in items if item.group in groups[::2]})
    left = unseen(items, vector, turned)
    assert {item.group for item in left} == {*groups[1::2]}
    assert unseen(items, vector) == items
    found, expected = (
        repe.forecast(model, tokenizer, turned, alignment=given, items=12, draws=2) for given in (None, left)
    )
    assert (found.slope == expected.slope).all()
    curve = repe.tradeoff(model, tokenizer, turned, [1], helpfulness=items[:8], neutral=None, controls=0, requests=None)
    assert set(curve.alignment.groups) == {item.group for item in left}


def test_what_is_made_of_an_aimed_vector_remembers_what_it_was_aimed_at(turned: Any, vector: Any) -> None:
    for made in (turned + vector, vector - turned, -turned, 2 * turned, turned.orthogonal_to(vector)):
        assert made.provenance["aimed_at"] == turned.provenance["aimed_at"]
    for made in (vector + vector, ConceptVector.random(turned)):
        assert "aimed_at" not in made.provenance


def test_it_gains_more_on_items_that_it_was_not_aimed_at(loaded_testbed: Any, vector: Any, turned: Any) -> None:
    model, tokenizer = loaded_testbed
    stack, (block,) = find_stack(model), turned.recommended
    left = unseen(worded(items_of("honesty", model)), turned)
    sites = [stack.site("block", block)]
    gradients = gradients_of_answers(model, sites, as_questions(tokenizer, left))
    samples = samples_of_divergence(model, sites, short_texts(model, tokenizer), draws=4)
    before, after = (float(efficiency(gradients, samples, v.at(block).write)) for v in (vector, turned))
    assert after > 1.1 * before > 0
    assert turned.provenance["efficiency"][turned.row(block)] == pytest.approx(after, rel=0.3)
    assert turned.is_written
    assert turned.dose[turned.row(block)] > 0


# --- what cannot be


def test_a_vector_is_aimed_once_and_at_two_groups_at_least(tokenizer: Any) -> None:
    model, vector = zoo.build("llama"), oracles.vector()
    turned = aimed(model, tokenizer, vector, ITEMS, neutral=["a text of some length"])
    assert turned.provenance["aimed_at"] == sorted(map(name_of, ITEMS))
    with pytest.raises(ValueError, match="aimed already"):
        aimed(model, tokenizer, turned, ITEMS)
    with pytest.raises(ValueError, match="two groups at least, and got 1"):
        aimed(model, tokenizer, vector, ITEMS[:2])
    with pytest.raises(ValueError, match="'concept 0'"):
        aimed(model, tokenizer, vector)


def test_items_that_are_all_fitted_to_cannot_tell() -> None:
    with pytest.raises(ValueError, match="concept 0: aimed at all of these items"):
        unseen(ITEMS, aimed_at(*ITEMS[::2]))
    assert unseen([], aimed_at(*ITEMS)) == []


def aimed_at(*items: Item) -> ConceptVector:
    return replace(oracles.vector(), provenance={"aimed_at": [name_of(item) for item in items]})


def test_an_item_is_known_by_what_it_asks_however_it_asks() -> None:
    asked = Item("a b is?\n(A) good\n(B) bad\nAnswer with the letter only.", ("A", "B"))
    (plain,), other = worded([asked]), Item("a c is", ("good", "bad"))
    twins = [asked, repe.data.letters.turned(asked), plain, replace(plain, options=plain.options[::-1], answer=1)]
    for one in twins:
        assert unseen([*twins, other], aimed_at(one)) == [other]


def test_a_group_is_left_out_with_one_of_its_items_and_not_for_its_name() -> None:
    """Files name their groups without knowing of each other."""
    assert unseen(ITEMS, aimed_at(ITEMS[0])) == ITEMS[2:]
    others = [Item("another file's", ("yes", "no"), 0, item.group) for item in ITEMS]
    assert unseen(others, aimed_at(*ITEMS)) == others


def test_neither_task_of_a_curve_is_what_the_vector_was_aimed_at(model: Any, tokenizer: Any) -> None:
    tasks = {
        name: [Item(f"{w}?", ("yes", "no"), 0, w) for w in words] for name, words in (("a", "abcde"), ("h", "fghij"))
    }
    vector = aimed_at(tasks["a"][0], tasks["h"][1])
    how = {"neutral": None, "controls": 0, "requests": None}
    curve = repe.tradeoff(model, tokenizer, vector, [1], alignment=tasks["a"], helpfulness=tasks["h"], **how)
    assert ("".join(curve.alignment.groups), "".join(curve.helpfulness.groups)) == ("bcde", "fhij")
    assert [told.count for told in curve.left_out] == [1, 1]
