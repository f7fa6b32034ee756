"""The forecast: on the testbed, what it says of small strengths is what steering does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaModel

import repe
from repe.data.items import Item
from repe.measuring.costs import costs
from repe.measuring.forecast import ITEMS, Randoms
from repe.measuring.sweep import sweep
from repe.measuring.tasks import items_of, texts_of
from repe.reading.dose import TEXTS
from repe.reading.extract import _cosine_to_all, balanced, read_poles
from repe.reading.placing import placed, spread
from tests import oracles, zoo
from tests.test_display import Page

SMALL = 0.01  # of a dose: the testbed leaves the quadratic early


@pytest.fixture(scope="module")
def vector(loaded_testbed: Any) -> Any:
    return read_poles(*loaded_testbed, "honesty").fitted("mean")


@pytest.fixture(scope="module", params=["all", "answer"])
def found(request: Any, loaded_testbed: Any, vector: Any) -> Any:
    return repe.forecast(*loaded_testbed, vector, scope=request.param, draws=24), request.param


def test_gain_and_cost_are_those_of_a_small_strength(found: Any, loaded_testbed: Any, vector: Any) -> None:
    forecast, scope = found
    model, _ = loaded_testbed
    items = {"honesty": spread(items_of("honesty", model), ITEMS)}
    texts = texts_of("neutral", model)[::2][:TEXTS]
    for column, block in enumerate(forecast.blocks):
        dosed = replace(vector, dose=torch.tensor(forecast.dose[0], dtype=torch.float32))
        how = {"blocks": block, "scope": scope}
        minus, plus = sweep(*loaded_testbed, dosed, items, [-SMALL, SMALL], **how)["honesty"].difference.mean(1)
        assert forecast.slope[0, column] == pytest.approx((plus - minus) / (2 * SMALL), rel=0.05, abs=0.05)
        kl = costs(*loaded_testbed, dosed, texts, [-SMALL, SMALL], **how).kl.mean()
        assert kl / SMALL**2 == pytest.approx(0.1, rel=0.35)  # 480 samples of texts that differ much


def test_so_are_those_of_blocks_in_a_row(found: Any, loaded_testbed: Any, vector: Any) -> None:
    """The doses and the coherence of the forecast make of alpha, shared out over the run, what it says."""
    forecast, scope = found
    assert [len(run.blocks) for run in forecast.runs] == [2, 6]
    items = {"honesty": spread(items_of("honesty", loaded_testbed[0]), ITEMS)}
    texts = texts_of("neutral", loaded_testbed[0])[::2][:TEXTS]
    known = {name: torch.tensor(getattr(forecast, name)[0], dtype=torch.float32) for name in ("dose", "coherence")}
    steered = (*loaded_testbed, replace(vector, **known))
    for run in forecast.runs:
        how = {"blocks": run.blocks, "scope": scope}
        minus, plus = sweep(*steered, items, [-SMALL, SMALL], **how)["honesty"].difference.mean(1)
        assert run.slope == pytest.approx((plus - minus) / (2 * SMALL), rel=0.05)
        kl = costs(*steered, texts, [-SMALL, SMALL], **how).kl.mean()
        assert kl / SMALL**2 == pytest.approx(0.1, rel=0.35)
        assert run.efficiency.value == pytest.approx(run.slope / np.sqrt(0.2))
        assert run.above == 1.0


def test_a_run_is_the_best_of_its_length_and_ranked_with_the_blocks(
    found: Any, loaded_testbed: Any, vector: Any
) -> None:
    forecast, scope = found
    run, _ = forecast.runs
    every = [
        repe.forecast(*loaded_testbed, vector.at(block, block + 1), scope=scope, draws=24).runs[0] for block in range(5)
    ]
    assert max(every, key=lambda other: abs(other.efficiency.value)).blocks == run.blocks
    ranked = forecast.ranked()
    assert len(ranked) == 8
    assert (run.reader, run.blocks) in ranked
    single = [forecast.at(reader, *blocks) for reader, blocks in ranked if len(blocks) == 1]
    sizes = [abs(of.value) for of in single]
    assert sizes == sorted(sizes, reverse=True)
    above = ranked.index((run.reader, run.blocks))
    assert sum(size > abs(run.efficiency.value) for size in sizes) <= above


def test_no_run_holds_a_block_that_cannot_be_steered_along(loaded_testbed: Any, vector: Any) -> None:
    def runs(of: Any) -> list[tuple[int, ...]]:
        return [run.blocks for run in repe.forecast(*loaded_testbed, of, items=8, draws=1).runs]

    assert runs(replace(vector, scale=vector.scale * torch.tensor([1.0, -1.0] * 3))) == [(0, 2, 4)]
    (apart,) = repe.forecast(*loaded_testbed, vector.at(3, 0, 2), items=8, draws=1).runs
    assert (apart.blocks, str(apart)) == ((0, 2, 3), "3 of 0 to 3")
    assert runs(vector.at(3)) == []


def test_random_directions_of_a_run_are_as_long_as_the_concepts() -> None:
    """Direction by direction, by hand."""
    generator = torch.Generator().manual_seed(0)
    randoms = Randoms(torch.randn(5, 4, generator=generator), torch.randn(5, 7, 4, generator=generator))
    lengths = torch.tensor([1.0, 3.0, 2.0])
    for direction, found in enumerate(randoms.efficiency([1, 2, 3], lengths)):
        costs = randoms.costs[direction, :, 1:].numpy() @ lengths.numpy()
        moved = randoms.moved[direction, 1:].numpy() @ lengths.numpy()
        assert float(found) == pytest.approx(abs(moved) / np.sqrt((costs**2).mean()), rel=1e-5)


def test_the_sign_is_right_wherever_the_interval_is_clear_of_zero(found: Any) -> None:
    forecast, _ = found
    clear = (forecast.low > 0) | (forecast.high < 0)
    assert clear.any()
    assert (np.sign(forecast.efficiency) == np.sign(forecast.slope)).all()
    assert ((forecast.low <= forecast.efficiency) & (forecast.efficiency <= forecast.high)).all()


def test_honesty_is_written_in_the_middle_and_beats_random_directions(found: Any) -> None:
    forecast, _ = found
    assert forecast.best[1] in (2, 3, 4)
    assert forecast.is_written
    assert forecast.place.max() == 1.0
    assert forecast.wrong[0, forecast.blocks.index(forecast.best[1])] < 0.1


def test_a_random_direction_is_no_concept(loaded_testbed: Any, vector: Any) -> None:
    places = [
        repe.forecast(
            *loaded_testbed, repe.ConceptVector.random(vector, seed), alignment="honesty", items=20, draws=4
        ).place[0]
        for seed in range(4)
    ]
    assert 0.2 < np.mean(places) < 0.8


def test_several_vectors_are_forecast_from_the_same_gradients(loaded_testbed: Any, vector: Any) -> None:
    both = repe.forecast(*loaded_testbed, {"own": vector, "turned": -vector}, items=12, draws=2)
    alone = repe.forecast(*loaded_testbed, vector, items=12, draws=2)
    assert both.readers == ("own", "turned")
    np.testing.assert_allclose(both.efficiency[0], alone.efficiency[0], rtol=1e-5)
    np.testing.assert_allclose(both.efficiency[0], -both.efficiency[1], rtol=1e-4)
    np.testing.assert_allclose(both.wrong[0], 1 - both.wrong[1], atol=1e-9)


def test_it_shows_itself(loaded_testbed: Any, vector: Any) -> None:
    forecast = repe.forecast(*loaded_testbed, vector, items=12, draws=2)
    assert "← best" in str(forecast)
    page = Page(forecast._repr_html_())
    assert page.tags.count("tr") == 1 + 6 + 2  # its head, the blocks, the best two in a row, and all
    axes = forecast.plot()
    assert axes.get_xlabel() == "block"
    assert len(axes.lines[0].get_xdata()) == 6


def test_what_cannot_be_forecast_is_refused(tokenizer: Any) -> None:
    model, vector = zoo.build("llama"), oracles.vector()
    with pytest.raises(ValueError, match="no task is called 'concept 0'"):
        repe.forecast(model, tokenizer, vector)
    items = [Item("ab", ("c", "d"))] * 4
    with pytest.raises(ValueError, match="readers: name at least one"):
        repe.forecast(model, tokenizer, oracles.worded_pairs(), readers=[], alignment=items)
    with pytest.raises(ValueError, match="has no language-model head"):
        repe.forecast(LlamaModel(model.config), tokenizer, vector, alignment=items)


# extraction that reads no more than the answer needs


def test_any_first_part_of_the_balanced_order_has_every_template_alike() -> None:
    pairs = oracles.worded_pairs(templates=5, items=8)
    for seed in range(5):
        order = balanced(pairs, seed)
        assert sorted(map(repr, order)) == sorted(map(repr, pairs))
        for count in range(5, len(order), 5):
            templates = [pair.template for pair in order[:count]]
            counts = [templates.count(f"t{t}") for t in range(5)]
            assert max(counts) - min(counts) <= 1
        assert len({pair.item for pair in order[:10]}) >= 5
    assert balanced(pairs, 0) != balanced(pairs, 1)


@pytest.mark.parametrize("seen", [20, 60, 299])
def test_the_cosine_that_is_expected_is_that_of_the_mean_of_some_with_that_of_all(seen: int) -> None:
    generator = np.random.default_rng(0)
    told, true = [], []
    for _ in range(40):
        poles = generator.normal(size=(300, 2, 1, 50)) + np.array([0.1, 0.0])[:, None, None]
        means = [(some[:, 0] - some[:, 1]).mean(0)[0] for some in (poles[:seen], poles)]
        told.append(_cosine_to_all(poles[:seen], 300))
        true.append(means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]))
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.06)  # the root of a noisy share is low


def test_extraction_stops_when_the_direction_is_known_and_says_so(loaded_testbed: Any) -> None:
    whole = repe.extract(*loaded_testbed, "honesty", enough=None, writes=False)
    part = repe.extract(*loaded_testbed, "honesty", writes=False)
    assert part.provenance["pairs"] < whole.provenance["pairs"] == whole.provenance["pairs_there_are"]
    assert whole.provenance["cosine_to_all"] == 1
    assert part.provenance["cosine_to_all"] >= 0.88
    assert float(part.cosine(whole).median()) >= part.provenance["cosine_to_all"] - 0.02


def test_where_to_write_is_decided_by_writing_where_there_are_items(loaded_testbed: Any, tokenizer: Any) -> None:
    by_writing = repe.extract(*loaded_testbed, "honesty")
    assert by_writing.provenance["chosen_by"] == "writing"
    assert len(by_writing.provenance["efficiency"]) == 6
    by_reading = repe.extract(zoo.build("llama"), tokenizer, oracles.worded_pairs())
    assert by_reading.provenance["chosen_by"] == "reading"
    assert float(by_reading.dose[by_reading.row(by_reading.recommended[0])]) > 0


def test_where_the_poles_do_not_part_there_is_nothing_to_forecast(loaded_testbed: Any, vector: Any) -> None:
    best = repe.forecast(*loaded_testbed, vector, items=12, draws=2).best[1]
    parted = torch.tensor([block != best for block in vector.blocks])
    found = repe.forecast(*loaded_testbed, replace(vector, scale=vector.scale * parted), items=12, draws=2)
    assert found.best[1] != best
    assert np.isnan(found.at("mean", best).value)
    with pytest.raises(ValueError, match="no distance between the poles at any block"):
        repe.forecast(*loaded_testbed, replace(vector, scale=0 * vector.scale), items=12, draws=2)


def test_a_model_without_a_gradient_is_steered_along_instead_and_comes_out_alike(
    loaded_testbed: Any, vector: Any, monkeypatch: Any
) -> None:
    how = {"items": 12, "draws": 24, "neutral": texts_of("neutral", loaded_testbed[0])[:12]}
    by_gradients = repe.forecast(*loaded_testbed, {"own": vector, "turned": -vector}, **how)

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

    model, tokenizer = loaded_testbed
    taken_off = model.lm_head.register_forward_hook(lambda module, args, output: Kernel.apply(output))
    try:
        with pytest.warns(UserWarning, match="has none .* Every block is steered along instead"):
            measured = repe.forecast(model, tokenizer, {"own": vector, "turned": -vector}, **how)
    finally:
        taken_off.remove()
    np.testing.assert_allclose(measured.efficiency, by_gradients.efficiency, rtol=0.35, atol=4)
    np.testing.assert_allclose(measured.efficiency[0], -measured.efficiency[1], rtol=1e-3)
    assert np.corrcoef(measured.efficiency.ravel(), by_gradients.efficiency.ravel())[0, 1] > 0.97
    assert np.isnan(measured.place).all()
    assert measured.is_written
    assert measured.best[0] == "own"
    measured.plot()


def test_a_vector_knows_how_many_random_directions_are_less_efficient(loaded_testbed: Any) -> None:
    vector = repe.extract(*loaded_testbed, "honesty")
    block = vector.recommended[0]
    found = repe.forecast(*loaded_testbed, vector, items=16, draws=4)
    assert vector.above_random(block) == pytest.approx(found.place[0, vector.row(block)], abs=0.03)
    assert vector.is_written
    backwards = vector.blocks[int(np.argmin(found.efficiency[0]))]
    assert vector.at(backwards).is_written is False
    turned = placed(*loaded_testbed, (-vector).at(block), "honesty")
    assert turned.above_random(block) == 0
    assert turned.is_written is False
    assert repe.ConceptVector.random(vector, 0).is_written is None
    assert vector.at(block, backwards).is_written is None


def test_the_cost_does_not_hang_on_the_seed_of_its_samples(loaded_testbed: Any, vector: Any) -> None:
    """Tokens drawn outright would miss the rare ones that matter most: a scatter of a fifth."""
    how = {"items": 4, "neutral": texts_of("neutral", loaded_testbed[0])}
    doses = np.stack([repe.forecast(*loaded_testbed, vector, seed=seed, **how).dose[0] for seed in range(6)])
    assert (doses.std(0) < 0.13 * doses.mean(0)).all()


@pytest.mark.parametrize(
    ("scope", "error", "message"),
    [
        (torch.ones(1, 3, dtype=torch.bool), ValueError, "a mask of one batch is no scope for many"),
        ([-1], ValueError, "holds no token of the texts behind which another is predicted"),
        ([5000], ValueError, "items of honesty left out: the scope holds no token behind which"),
        ([-5000], IndexError, "lies before the start of a prompt"),
    ],
)
def test_a_scope_that_edits_nothing_cannot_be_forecast(
    scope: Any, error: Any, message: str, loaded_testbed: Any, vector: Any
) -> None:
    with pytest.raises(error, match=message):
        repe.forecast(*loaded_testbed, vector, items=4, draws=1, scope=scope)
