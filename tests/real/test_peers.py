"""Other libraries' vectors: they arrive at their blocks and with their sign, and are pushed until all cost as much."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import repe
from repe.bench import peer
from repe.bench.peer import Peer, hand_over
from repe.measuring import TransformersScorer
from repe.models.blocks import find_stack
from repe.real import peers
from repe.real.bench import Bench
from repe.steering.edit import Edit
from repe.steering.steer import steer

WORKER = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import peer_worker

def library(model, tokenizer, pairs, blocks):
    return "library 1.0", lambda: {{block: np.full(4, block, np.float32) for block in blocks}}

peer_worker.LIBRARIES = {{"library": library}}
peer_worker.main(*sys.argv[1:])
"""


@pytest.fixture
def bench(testbed, tmp_path) -> Bench:
    return Bench("testbed", *testbed, tmp_path, ("happiness",), small=True)


@pytest.fixture
def handed_over(bench, tmp_path):
    folder = tmp_path / "peer"
    hand_over(bench.model, bench.tokenizer, peers.pairs_of(bench, "happiness"), range(6), folder)
    return folder


# what they extract


def test_a_direction_comes_back_for_every_block(handed_over, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(folder=str(Path(peer.__file__).parent)))
    monkeypatch.setattr(peer, "WORKER", worker)
    (tmp_path / "numpy.py").write_text("raise ImportError('the environment came before the packages')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Peer(sys.executable, "library", handed_over) as library:
        assert (library.release, library.missing) == ("library 1.0", "")
        library()
        assert {block: row.tolist() for block, row in library.directions.items()} == {b: [b] * 4 for b in range(6)}


@pytest.mark.parametrize(("wrong", "said"), [({"loss": 0.0}, "a loss of"), ({"ids": [1]}, "its tokenizer reads")])
def test_a_library_that_reads_another_model_says_so(wrong, said, handed_over):
    asked = handed_over / "workload.json"
    asked.write_text(json.dumps(json.loads(asked.read_text()) | wrong))
    with Peer(sys.executable, "repeng", handed_over) as library:
        assert said in library.missing


def test_older_releases_find_how_positions_are_turned(bench, tmp_path):
    bench.model.config.rope_parameters = (before := bench.model.config.rope_parameters) | {"rope_theta": 123.0}
    try:
        hand_over(bench.model, bench.tokenizer, [("a", "b")], [0], tmp_path)
    finally:
        bench.model.config.rope_parameters = before
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 123


def test_the_pairs_are_those_that_our_vector_was_fitted_to_and_their_texts_have_the_tokens_of_our_chats(
    bench, monkeypatch
):
    ours = repe.extract(*model_of(bench), "formality", writes=False)
    monkeypatch.setattr("repe.real.bench.resolve", lambda *_: ours)
    fitted = ours.provenance["pairs"]
    assert fitted < ours.provenance["pairs_there_are"]
    pairs = peers.pairs_of(replace(bench, small=False), "formality")
    assert len(pairs) == fitted + ours.provenance["held_out_pairs"]
    found = repe.capture(*model_of(bench), [text for pair in pairs[:fitted] for text in pair], tokens="last").double()
    difference = found[::2].mean(0) - found[1::2].mean(0)
    assert torch.nn.functional.cosine_similarity(difference, ours.write, dim=-1).min() > 0.99999


def model_of(bench: Bench):
    return bench.model, bench.tokenizer


@pytest.mark.skipif(not peers.PYTHON.exists(), reason="`make .venv-peers` sets up what is compared with")
def test_the_mean_difference_of_another_library_is_that_of_the_same_blocks(bench):
    theirs = peers.extractions(bench, "happiness")["steering_vectors"].vector
    texts = [text for pair in peers.pairs_of(bench, "happiness") for text in pair]
    found = repe.capture(*model_of(bench), texts, tokens="last")
    assert theirs.blocks == tuple(range(6))
    torch.testing.assert_close(theirs.displacement, found[::2].mean(0) - found[1::2].mean(0), rtol=1e-3, atol=1e-3)


# what is pushed


def test_what_a_library_adds_is_added_to_the_output_of_its_blocks(bench):
    model, ids = bench.model, torch.tensor([[5, 6, 7]])
    directions = {1: torch.randn(128), 4: 3 * torch.randn(128)}
    edit = Edit.of(peers.vector_of("theirs", directions, bench.vector("happiness")), blocks=(1, 4), unit="gap")
    with steer(model, edit, 2 * 0.7), torch.no_grad():  # shared out over two blocks
        found = model(ids).logits
    hooks = [
        block.register_forward_hook(lambda module, args, output, push=0.7 * push: output + push)
        for block, push in ((find_stack(model).blocks[b], push) for b, push in directions.items())
    ]
    try:
        with torch.no_grad():
            torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("power", [1.0, 2.0, 9.0])
@pytest.mark.parametrize("first", [1e-3, 3.0, 500.0])
def test_the_strength_is_found_however_the_cost_grows(power, first):
    alpha, found = peers.strength(lambda alpha: 0.1 * (alpha / 3) ** power, first)
    assert found == pytest.approx(0.1, rel=0.06)
    assert alpha == pytest.approx(3, rel=0.06)


def test_a_cost_that_is_never_reached_is_said():
    with pytest.raises(ValueError, match=r"no strength that costs 0\.1 nats"):
        peers.strength(lambda alpha: 0.05, 1.0)


def test_strengths_cost_as_much_wherever_and_however_long_a_vector_is(bench):
    scorer, ours = TransformersScorer(*model_of(bench)), bench.vector("happiness")
    pushes = {block: ours.displacement[ours.row(block)] for block in (2, 4)}
    found = {}
    for length in (1.0, 30.0):
        vector = peers.vector_of("theirs", {b: length * push for b, push in pushes.items()}, ours)
        found[length], kl = peers.equally_dear(bench, scorer, Edit.of(vector, unit="gap"))
        assert kl == pytest.approx(0.1, rel=0.06)
    assert found[1.0] == pytest.approx(30 * found[30.0], rel=0.03)


def test_our_own_direction_from_elsewhere_does_what_ours_does_and_its_reverse_the_opposite(bench, monkeypatch):
    ours = bench.vector("happiness")
    pushes = dict(zip(ours.blocks, ours.displacement, strict=True))

    def moved(sign: float):
        vector = peers.vector_of("repeng", {block: sign * push for block, push in pushes.items()}, ours)
        monkeypatch.setattr(peers, "extractions", lambda *_: {"repeng": peers.Extraction("repeng 1", 1.0, vector)})
        return peers.row(bench, "happiness", "repeng", "our block")

    own, same, reverse = peers.row(bench, "happiness", "repe", "our block"), moved(1.0), moved(-1.0)
    assert same["shift"]["value"] == pytest.approx(own["shift"]["value"], rel=0.05)
    assert reverse["shift"]["value"] == pytest.approx(-own["shift"]["value"], rel=0.05)
    assert (own["wrong way"], reverse["wrong way"]) == (0, 1)
    assert (same["cosine"], reverse["cosine"]) == (pytest.approx(1), pytest.approx(-1))
    shown = peers.compared({("repe", "our block"): own, ("repeng", "our block"): reverse})
    assert shown["repeng at our block"]["less than ours"]["low"] > 0
    assert list(shown) == ["repe at our block *", "repeng at our block"]


def test_without_the_other_libraries_the_part_says_how_to_get_them(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PYTHON", tmp_path / "none")
    (said,) = peers.tables(replace(bench))
    assert "`make .venv-peers` sets them up" in said
