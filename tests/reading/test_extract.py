"""Extraction: the directions are those of the pairs, and what is said of them was measured on pairs held out."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import repe
from repe.data import pairs as pairs_file
from repe.data.pairs import split
from repe.reading.read import score
from repe.reading.readers import MeanDifference
from tests import zoo
from tests.oracles import NEGATIVE, POSITIVE, hooks_of, worded_pairs


def last_activations(model, tokenizer, texts):
    """An oracle that pads nothing: one text at a time, from the model's own hidden states."""
    rows = []
    with torch.no_grad():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            rows.append(torch.stack([s[0, -1] for s in states[1:-1]]))
    return torch.stack(rows).double()


def test_the_mean_reader_finds_the_difference_of_the_fitted_pairs(model, tokenizer):
    pairs = worded_pairs()
    vector = repe.extract(model, tokenizer, pairs)
    fit, _ = split(pairs)
    x, y = (last_activations(model, tokenizer, [getattr(p, pole) for p in fit]) for pole in ("positive", "negative"))
    difference = (x - y).mean(0)
    expected = difference / difference.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(vector.write[:-1].double(), expected, atol=1e-4, rtol=1e-4)


def test_scale_midpoint_accuracy_and_sigma_are_those_of_held_out_pairs(model, tokenizer):
    pairs = worded_pairs()
    vector = repe.extract(model, tokenizer, pairs)
    _, held = split(pairs)
    x, y = (last_activations(model, tokenizer, [getattr(p, pole) for p in held]) for pole in ("positive", "negative"))
    p, n = ((a * vector.read[:-1].double()).sum(-1) for a in (x, y))
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(vector.scale[:-1].double(), (p.mean(0) - n.mean(0)) / 2, **close)
    torch.testing.assert_close(vector.midpoint[:-1].double(), (p.mean(0) + n.mean(0)) / 2, **close)
    torch.testing.assert_close(vector.sigma[:-1].double(), ((p.var(0) + n.var(0)) / 2).sqrt(), **close)
    torch.testing.assert_close(vector.accuracy[:-1].double(), (p > n).double().mean(0))


def test_the_poles_of_held_out_pairs_stand_at_plus_and_minus_one(model, tokenizer):
    pairs = worded_pairs()
    vector = repe.extract(model, tokenizer, pairs, reader="probe")
    _, held = split(pairs)
    for pole, expected in (("positive", 1.0), ("negative", -1.0)):
        scores = score(repe.capture(model, tokenizer, [getattr(p, pole) for p in held]), vector).mean(0)
        torch.testing.assert_close(scores, torch.full_like(scores, expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reader", ["mean", "pca", "probe", "lda", MeanDifference(), LogisticRegression()])
def test_every_reader_gives_directions_that_read_what_they_write(model, tokenizer, reader):
    before = copy.deepcopy(reader)
    vector = repe.extract(model, tokenizer, worded_pairs(), reader=reader)
    torch.testing.assert_close((vector.read * vector.write).sum(-1), torch.ones(4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vector.write.norm(dim=-1), torch.ones(4))
    assert vector.accuracy.max() == 1
    assert repr(reader) == repr(before)
    assert not hasattr(reader, "coef_")


def test_the_poles_swapped_give_the_opposite_vector(model, tokenizer):
    pairs = worded_pairs()
    swapped = [repe.ContrastPair(p.negative, p.positive, p.template, p.item) for p in pairs]
    vector, opposite = (repe.extract(model, tokenizer, p) for p in (pairs, swapped))
    torch.testing.assert_close(vector.displacement, -opposite.displacement, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vector.center, opposite.center, atol=1e-5, rtol=1e-4)


def test_the_batch_size_does_not_matter(model, tokenizer):
    one, many = (repe.extract(model, tokenizer, worded_pairs(), batch_size=size) for size in (1, 64))
    torch.testing.assert_close(one.displacement, many.displacement, atol=1e-5, rtol=1e-4)


def test_shuffled_labels_find_nothing():
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 12)) for _ in range(240)]
    pairs = [
        repe.ContrastPair(a, b, f"t{i % 6}", f"i{i // 6}")
        for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    vector = repe.extract(model, tokenizer, pairs, held_out=0.5)
    assert vector.accuracy.max() <= 0.75


def test_the_recommended_block_is_the_best_of_those_that_were_fitted(model, tokenizer):
    vector = repe.extract(model, tokenizer, worded_pairs(), blocks=[0, 1, 2])
    best = max(vector.blocks, key=lambda b: (vector.accuracy[vector.row(b)], vector.separation[vector.row(b)]))
    assert vector.recommended == (best,)


def test_the_end_of_the_model_is_recommended_only_where_nothing_else_was_fitted(model, tokenizer):
    assert repe.extract(model, tokenizer, worded_pairs()).recommended != (3,)
    assert repe.extract(model, tokenizer, worded_pairs(), blocks=[3]).recommended == (3,)


def test_extraction_leaves_the_model_and_its_modes_as_they_were(model, tokenizer):
    model = copy.deepcopy(model).train()
    model.model.layers[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, hooks = [m.training for m in model.modules()], hooks_of(model)
    repe.extract(model, tokenizer, worded_pairs())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert hooks_of(model) == hooks


def test_the_provenance_changes_with_the_pairs(model, tokenizer):
    pairs = worded_pairs()
    digests = {
        repe.extract(model, tokenizer, of, blocks=0).provenance["pairs_digest"]
        for of in (pairs, list(pairs), pairs[:-1], [replace(p, positive=f"{p.positive}!") for p in pairs])
    }
    assert len(digests) == 3


def test_pairs_are_checked_once(model, tokenizer, monkeypatch):
    checked, check = [], pairs_file.check
    monkeypatch.setattr(pairs_file, "check", lambda pairs: checked.append(pairs) or check(pairs))
    repe.extract(model, tokenizer, worded_pairs(), blocks=0)
    assert len(checked) == 1


def test_the_provenance_says_what_was_held_out(model, tokenizer):
    vector = repe.extract(model, tokenizer, worded_pairs())
    fit, held = set(vector.provenance["templates"]), set(vector.provenance["held_out_templates"])
    assert fit
    assert held
    assert not fit & held


@pytest.mark.parametrize(
    ("name", "stack"),
    [("bert", "encoder"), ("t5", "decoder"), ("t5", "encoder"), ("bart", "encoder"), ("mamba", "decoder")],
)
def test_other_kinds_of_models_are_read_too(name, stack, tokenizer):
    vector = repe.extract(zoo.build(name), tokenizer, worded_pairs(), stack=stack)
    assert vector.accuracy.max() == 1
    assert vector.stack == stack


def test_a_site_other_than_the_stream_is_read_where_it_is(model, tokenizer):
    vector = repe.extract(model, tokenizer, worded_pairs(), site="mlp", blocks=[1])
    assert (vector.site, vector.blocks) == ("mlp", (1,))
    embedding = repe.extract(model, tokenizer, worded_pairs(), site="embedding")
    assert embedding.blocks == (0,)
    table = model.get_input_embeddings().weight
    ends = [tokenizer(word)["input_ids"][-1] for word in (POSITIVE, NEGATIVE)]
    difference = (table[ends[0]] - table[ends[1]]).detach()
    torch.testing.assert_close(embedding.write[0], difference / difference.norm(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no contrast pairs"),
        ([repe.ContrastPair("", "no")] * 8, "positive"),
        ([repe.ContrastPair("yes", "yes")] * 8, "differ|same|identical"),
        ([repe.ContrastPair("yes", "no")], "at least 2"),
    ],
)
def test_pairs_that_cannot_work_are_refused(model, tokenizer, pairs, message):
    with pytest.raises(ValueError, match=message):
        repe.extract(model, tokenizer, pairs)


def test_an_unknown_concept_names_the_near_ones(testbed):
    model, tokenizer = testbed
    with pytest.raises(ValueError, match=r"'honestly'.*Did you mean 'honesty'"):
        repe.extract(model, tokenizer, "honestly")


def test_a_name_can_be_given(model, tokenizer):
    assert repe.extract(model, tokenizer, worded_pairs()).concept == "concept"
    assert repe.extract(model, tokenizer, worded_pairs(), name="agreement").concept == "agreement"


def test_a_vector_does_not_tell_where_the_model_lay(tmp_path, tokenizer):
    zoo.build("llama").save_pretrained(tmp_path / "some" / "model")
    tokenizer.save_pretrained(tmp_path / "some" / "model")
    vector = repe.extract(*repe.load(tmp_path / "some" / "model"), worded_pairs())
    assert vector.provenance["model"] == "some/model"
    assert str(tmp_path) not in str(vector.provenance)
