"""Capture and reading: what is read is what stands in the stream, whatever the batch looks like."""

import copy
import threading
from dataclasses import replace

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

import repe
from repe.models.blocks import device_of, find_stack
from repe.models.tracking import tracker_of
from repe.reading import capture as capturing
from repe.reading.read import score
from repe.reading.trees import Batch
from tests import zoo
from tests.oracles import plain_vector

TEXTS = ["a", "bcd efg", "the quick brown fox", "hi there", "to be or not"]


def streams(model, tokenizer, text):
    """(tokens, blocks, d_model) of one text alone, by plain hooks on the blocks."""
    seen = []
    hooks = [b.register_forward_hook(lambda m, a, o: seen.append(o.detach()[0])) for b in find_stack(model).blocks]
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1)


def test_tokens_last_mean_and_all_are_those_of_each_text_alone(model, tokenizer):
    alone = [streams(model, tokenizer, text) for text in TEXTS]
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(
        repe.capture(model, tokenizer, TEXTS, batch_size=3), torch.stack([x[-1] for x in alone]), **close
    )
    means = torch.stack([x[1:].mean(0) if len(x) > 1 else x[0] for x in alone])
    torch.testing.assert_close(repe.capture(model, tokenizer, TEXTS, tokens="mean", batch_size=2), means, **close)
    for got, expected in zip(repe.capture(model, tokenizer, TEXTS, tokens="all"), alone, strict=True):
        torch.testing.assert_close(got, expected, **close)


def test_blocks_come_in_ascending_order_and_negatives_count_from_the_end(model, tokenizer):
    everything = repe.capture(model, tokenizer, TEXTS)
    assert torch.equal(repe.capture(model, tokenizer, TEXTS, blocks=[-1, 0]), everything[:, [0, 3]])


def test_the_head_is_never_run(model, tokenizer):
    model = copy.deepcopy(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    repe.capture(model, tokenizer, TEXTS)


def test_what_is_captured_is_steered(model, tokenizer):
    vector = repe.ConceptVector.random(plain_vector(model), 3)
    before = repe.capture(model, tokenizer, TEXTS)
    with repe.steer(model, vector, 2.0, blocks=1):
        after = repe.capture(model, tokenizer, TEXTS)
    assert torch.equal(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1] - before[:, 1], (2 * vector.displacement[1]).expand(len(TEXTS), -1))


def test_only_what_was_asked_for_is_kept(model, tokenizer):
    activations = repe.capture(model, tokenizer, TEXTS * 4, blocks=2)
    assert activations.shape == (20, 1, 32)
    assert activations.untyped_storage().nbytes() == 20 * 32 * 4


def test_captured_activations_can_be_trained_on(model, tokenizer):
    with torch.inference_mode():
        activations = repe.capture(model, tokenizer, TEXTS)
    weight = torch.ones(32, requires_grad=True)
    (activations[:, 0] @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"texts": []}, ValueError, "at least one text"),
        ({"texts": "one string"}, ValueError, "list of at least one text"),
        ({"texts": TEXTS, "tokens": "first"}, ValueError, "tokens='first'"),
        ({"texts": TEXTS, "blocks": 9}, IndexError, "lock 9"),
        ({"texts": TEXTS, "site": "head"}, ValueError, "site='head'"),
        ({"texts": TEXTS, "stack": "both"}, ValueError, "stack='both'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(model, tokenizer, arguments, kind, message):
    with pytest.raises(kind, match=message):
        repe.capture(model, tokenizer, **arguments)
    assert not any(m._forward_hooks for m in model.modules())


def test_text_of_no_tokens_is_refused(model):
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="no tokens"):
        repe.capture(model, tokenizer, ["a", ""])


def test_a_tokenizer_without_a_pad_token_works_and_is_not_changed(model):
    tokenizer = zoo.tokenizer(pad=False)
    assert torch.equal(repe.capture(model, tokenizer, TEXTS), repe.capture(model, zoo.tokenizer(), TEXTS))
    assert tokenizer.pad_token is None


def test_a_reading_scores_every_token_at_every_block(model, tokenizer):
    vector = plain_vector(model)
    reading = repe.read(model, tokenizer, TEXTS[2], vector)
    expected = streams(model, tokenizer, TEXTS[2])
    assert reading.scores.shape == (len(reading.tokens), 4)
    for block in range(4):
        torch.testing.assert_close(reading.scores[:, block], expected[:, block, block], atol=1e-5, rtol=1e-4)
    assert torch.equal(reading.best, reading.scores[:, 1])
    assert "".join(reading.tokens[1:]) == TEXTS[2]


def test_several_texts_are_read_as_each_alone(model, tokenizer):
    vector = plain_vector(model)
    for text, reading in zip(TEXTS, repe.read(model, tokenizer, TEXTS, vector), strict=True):
        alone = repe.read(model, tokenizer, text, vector)
        assert reading.tokens == alone.tokens
        torch.testing.assert_close(reading.scores, alone.scores, atol=1e-5, rtol=1e-4)


def test_a_chat_is_one_text(model, tokenizer):
    chat = [{"role": "user", "content": "hello"}]
    reading = repe.read(model, tokenizer, chat, plain_vector(model))
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert len(reading.tokens) == len(rendered)


def test_activations_of_another_width_are_refused(model):
    with pytest.raises(ValueError, match="d_model 32 and the activations 16"):
        score(torch.zeros(2, 4, 16), plain_vector(model))


def test_a_reading_draws_itself_on_the_given_axes(model, tokenizer):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reading = repe.read(model, tokenizer, TEXTS[1], plain_vector(model))
    figure, axes = plt.subplots()
    assert reading.plot(ax=axes) is axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2", "3"]
    assert torch.equal(torch.tensor(axes.images[0].get_array().data), reading.scores.T)
    plt.close(figure)


def test_a_model_that_computes_in_place_does_not_change_what_was_captured(tokenizer):
    """Falcon adds its attention to what its mlp put out, in place: the sites must still sum to the block's change."""
    falcon = zoo.build("falcon")
    attention, mlp = (repe.capture(falcon, tokenizer, TEXTS, site=site, blocks=1) for site in ("attention", "mlp"))
    before, after = repe.capture(falcon, tokenizer, TEXTS, blocks=[0, 1]).unbind(1)
    torch.testing.assert_close(after - before, (attention + mlp)[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", zoo.ENCODER_DECODERS)
def test_a_text_is_not_read_in_a_decoder_that_does_not_see_it(name, tokenizer):
    model, vector = zoo.build(name), plain_vector(zoo.build("llama"))
    for texts in (TEXTS, TEXTS[0]):
        with pytest.raises(ValueError, match='extract the vector with stack="encoder"'):
            repe.read(model, tokenizer, texts, vector)
    in_encoder = replace(vector.at(0, 1, 2), stack="encoder")
    reading = repe.read(model, tokenizer, TEXTS[2], in_encoder)
    assert reading.scores.shape == (len(reading.tokens), 3)


def test_blocks_can_be_named_for_a_reading(model, tokenizer):
    vector = plain_vector(model)
    everything = repe.read(model, tokenizer, TEXTS[2], vector)
    for blocks, numbers, recommended in [([1], (1,), (1,)), (-1, (3,), (3,)), ([3, 0, 1], (0, 1, 3), (1,))]:
        reading = repe.read(model, tokenizer, TEXTS[2], vector, blocks=blocks, batch_size=2)
        assert (reading.blocks, reading.recommended) == (numbers, recommended)
        assert torch.equal(reading.scores, everything.scores[:, list(numbers)])
    with pytest.raises(IndexError, match="has no block 3"):
        repe.read(model, tokenizer, TEXTS[2], vector.at(1, 2), blocks=[1, 3])


@pytest.mark.parametrize("places", [[0], [3], [0, 5]])
def test_attention_sinks_are_said_and_have_no_colour(model, tokenizer, places):
    """Whatever their tokens are, and only where they are such: behind the block that makes them long."""

    def lengthen(module, args, output):
        output[:, places] *= 50

    text, vector = "a fox and an ox", plain_vector(model)
    plain = repe.read(model, tokenizer, text, vector)
    taken_off = model.model.layers[1].register_forward_hook(lengthen)
    reading = repe.read(model, tokenizer, text, vector)
    taken_off.remove()
    for block in range(4):
        assert reading.sinks[:, block].nonzero()[:, 0].tolist() == (places if block else [])
    assert torch.equal(reading.told.scores.isnan(), reading.sinks)
    assert not reading.scores.isnan().any()
    named = ", ".join(repr(reading.tokens[place]) for place in places)
    assert f"(without {named}, an attention sink)" in reading.text(2, color=False)
    assert "sink" not in reading.text(0, color=False) + plain.text(2, color=False)
    assert reading.html(2).count("no score") == len(places)


def test_of_a_text_of_one_token_nothing_is_a_sink(model, tokenizer):
    assert not repe.read(model, tokenizer, "", plain_vector(model)).sinks.any()


def test_poles_without_distance_give_no_score(model):
    vector = replace(plain_vector(model), scale=torch.tensor([1.0, 0.0, 2.0, 0.0]))
    scores = score(torch.ones(3, 4, 32), vector)
    assert scores[:, [1, 3]].isnan().all()
    torch.testing.assert_close(scores[:, [0, 2]], torch.tensor([[1.0, 0.5]]).expand(3, 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "largest"), [("last", 1), ("mean", 1), ("all", 20)])
def test_what_is_held_of_a_block_is_what_was_asked_for(model, tokenizer, monkeypatch, tokens, largest, packed):
    held, gathered = [], capturing._gathered
    monkeypatch.setattr(capturing, "_gathered", lambda records: held.append(records) or gathered(records))
    repe.capture(model, tokenizer, [TEXTS[2]] * 3, tokens=tokens, packed=packed)
    rows = 1 if tokens == "all" else 3  # equal texts are the same nodes, or the same row
    assert len(held[0]) == 4
    assert {r.untyped_storage().nbytes() for r in held[0]} == {rows * largest * 32 * 4}


@pytest.mark.parametrize("packed", [False, True])
def test_texts_do_not_share_what_was_captured(model, tokenizer, packed):
    one, other = repe.capture(model, tokenizer, [TEXTS[2]] * 2, tokens="all", packed=packed)
    before = other.clone()
    one.zero_()
    assert torch.equal(other, before)


@pytest.mark.parametrize("tokens", ["last", "mean", "all"])
def test_what_was_kept_does_not_change_with_what_is_computed_in_place(tokens):
    batch = Batch([0, 1], [0, 1], [torch.arange(3), torch.arange(2)], 2, 3, dict)
    hidden = torch.randn(2, 3, 4)
    kept = capturing.KEEPERS[tokens](batch)(hidden)
    before = kept.clone()
    hidden.zero_()
    assert torch.equal(kept, before)


def test_only_tokens_of_a_text_count_in_its_mean():
    """Two texts of one tree, and a text of one token, whose only one is counted."""
    hidden = torch.tensor([[[9.0], [1.0], [3.0], [7.0]], [[5.0], [torch.nan], [torch.inf], [torch.nan]]])
    slots = [torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]), torch.tensor([0])]
    means = capturing.KEEPERS["mean"](Batch([0, 1, 2], [0, 0, 1], slots, 2, 4, dict))(hidden)
    assert means.tolist() == [[2.0], [4.0], [5.0]]


def test_offloaded_weights_are_given_inputs_where_they_compute(model, tokenizer):
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    assert device_of(offloaded).type == "cpu"
    torch.testing.assert_close(repe.capture(offloaded, tokenizer, TEXTS), repe.capture(model, tokenizer, TEXTS))
    torch.testing.assert_close(
        repe.capture(offloaded, tokenizer, TEXTS, blocks=0), repe.capture(model, tokenizer, TEXTS, blocks=0)
    )
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())


# stopping early

STACKS = [(name, "decoder") for name in (*zoo.DECODERS, *zoo.ENCODERS)] + [(n, "encoder") for n in zoo.ENCODER_DECODERS]


def forbid(module, monkeypatch):
    """Fails where the module is run. It is no hook: a hooked model is not packed."""
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: pytest.fail("it was run"))


def bare(model):
    """Whether nothing of ours is left on a model."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_nothing_behind_the_last_wanted_block_is_run(name, stack, tokenizer, monkeypatch):
    model = zoo.build(name)
    everything = repe.capture(model, tokenizer, TEXTS, stack=stack)
    assert bare(model)
    forbid(find_stack(model, stack).blocks[2], monkeypatch)
    assert torch.equal(repe.capture(model, tokenizer, TEXTS, blocks=[1, 0], stack=stack), everything[:, :2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("wanted", "not_run"),
    [
        ({"blocks": -2}, "layers.3"),
        ({"blocks": "all"}, "norm"),
        ({"site": "embedding"}, "layers.0"),
        ({"site": "attention", "blocks": 1}, "layers.1.mlp"),
        ({"site": "mlp", "blocks": [0, 1]}, "layers.2"),
    ],
)
def test_a_forward_ends_where_all_is_read(model, tokenizer, monkeypatch, wanted, not_run, packed):
    forbid(model.model.get_submodule(not_run), monkeypatch)
    repe.capture(model, tokenizer, TEXTS, packed=packed, **wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_is_what_it_was_after_a_forward_that_ended_early(model, tokenizer, packed):
    model = copy.deepcopy(model)
    model.model.layers[2].train()
    modes = [m.training for m in model.modules()]
    batch = zoo.inputs("llama")
    before = model(**batch).logits
    repe.capture(model, tokenizer, TEXTS, blocks=1, packed=packed)
    assert bare(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model(**batch).logits, before)


def test_sites_are_read_in_whatever_order_they_run():
    falcon = zoo.build("falcon")
    block = find_stack(falcon).blocks[0]
    wanted = [block, block.mlp, block.self_attention, block.mlp]
    with capturing.recording(wanted, torch.clone, stop=True) as records:
        falcon(**zoo.inputs("falcon"))
        pytest.fail("it did not stop")
    assert all(len(record) for record in records)
    assert torch.equal(records[1], records[3])


def test_a_decoder_that_shares_its_embedding_is_read_where_it_answers(tokenizer):
    t5 = zoo.build("t5")
    t5.decoder.embed_tokens = t5.encoder.embed_tokens
    start = t5.get_input_embeddings()(torch.tensor(t5.config.decoder_start_token_id))
    embedded = repe.capture(t5, tokenizer, TEXTS, site="embedding")
    torch.testing.assert_close(embedded, start.detach().expand_as(embedded))


def test_steering_goes_on_after_a_forward_that_ended_early(model, tokenizer, monkeypatch):
    vector, batch = plain_vector(model), zoo.inputs("llama")
    with repe.steer(model, vector, 2.0, blocks=1):
        steered = model(**batch).logits
        everything = repe.capture(model, tokenizer, TEXTS)
        with monkeypatch.context() as patch:
            forbid(model.model.layers[3], patch)
            assert torch.equal(repe.capture(model, tokenizer, TEXTS, blocks=[1, 2]), everything[:, 1:3])
        assert tracker_of(model.model).forwards == {}
        assert tracker_of(model.model).forward is None
        assert torch.equal(model(**batch).logits, steered)
    assert bare(model)


def test_an_error_of_the_model_is_raised_and_leaves_nothing_behind(model, tokenizer, monkeypatch):
    model = copy.deepcopy(model).train()

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].mlp, "forward", broken)
        with pytest.raises(ZeroDivisionError):
            repe.capture(model, tokenizer, TEXTS)
    assert bare(model)
    assert all(m.training for m in model.modules())


def counting(counts, name):
    return lambda *call: counts.update({name: counts.get(name, 0) + 1})


@pytest.mark.parametrize(
    ("site", "around", "ends"),
    [("block", "", True), ("block", "layers.0", False), ("attention", "layers.0", True), ("attention", "norm", False)],
)
def test_who_waits_for_the_end_of_a_forward_sees_it(model, tokenizer, site, around, ends):
    """Of modules that are around what is wanted; one beside it, or the wanted one itself, is in nobody's way."""
    for wrapped in (False, True):
        ours, counts = copy.deepcopy(model).model, {}
        waiting = ours.get_submodule(around)
        ours.layers[1].register_forward_hook(counting(counts, "later"))
        if wrapped:
            forward, seen = waiting.forward, counting(counts, "end")
            waiting.forward = lambda *a, forward=forward, seen=seen, **k: (forward(*a, **k), seen())[0]
        else:
            waiting.register_forward_hook(counting(counts, "end"))
        repe.capture(ours, tokenizer, TEXTS, blocks=0, site=site)
        assert ("later" in counts) == ends
        assert counts.get("end", 0) == (1 if ends or around == "layers.0" else 0)


@pytest.mark.parametrize("blocks", [[0, 1, 2, 3], [3]])
def test_a_forward_of_compiled_blocks_is_not_broken_off(model, tokenizer, blocks):
    expected = repe.capture(model, tokenizer, TEXTS, blocks=1)
    ours, counts = copy.deepcopy(model), {}
    for block in blocks:
        ours.model.layers[block].compile(backend="eager")
    ours.model.norm.register_forward_hook(counting(counts, "norm"))
    torch.testing.assert_close(repe.capture(ours, tokenizer, TEXTS, blocks=1), expected)
    assert counts == {"norm": 1}


def test_what_another_thread_runs_is_neither_read_nor_broken_off(model):
    batch, outputs = zoo.inputs("llama"), []
    other = threading.Thread(target=lambda: outputs.append(model(**batch).logits))
    with torch.no_grad(), capturing.recording([model.model.layers[0]], torch.clone, stop=True) as records:
        other.start()
        other.join()
        assert records[0].numel() == 0
        model(**batch)
        pytest.fail("it did not stop")
    assert records[0].shape == (3, 7, 32)
    assert torch.equal(outputs[0], model(**batch).logits)


# lengths


@pytest.mark.parametrize(
    ("name", "room"), [("gpt2", 256), ("opt", 256), ("bert", 256), ("distilbert", 256), ("roberta", 255)]
)
def test_a_text_that_is_longer_than_the_positions_is_refused(name, room, tokenizer):
    model = zoo.build(name)
    repe.capture(model, tokenizer, ["a" * (room - 1)], blocks=0)
    with pytest.raises(ValueError, match=f"a text of {room + 1} tokens is longer than the {room} "):
        repe.capture(model, tokenizer, ["b", "a" * room], blocks=0)


def test_rotary_positions_have_no_end(model, tokenizer):
    repe.capture(model, tokenizer, ["a" * 300], blocks=0)


ROPES = {
    "llama": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "phi3": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ROPES)
def test_a_long_text_does_not_change_how_its_neighbours_are_rotated(family, tokenizer):
    """What is far apart decides how all of a batch is rotated, where the rotary embedding grows with the text."""
    config = copy.deepcopy(zoo.build(family).config)
    config.max_position_embeddings, config.rope_parameters = 24 if family == "llama" else 256, ROPES[family]
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = ["a b c d e f g h", "i j k", "to be or not to be " * 6, "to be or not to be that is " * 5, "l m n o"]
    alone = torch.cat([repe.capture(model, tokenizer, [text], packed=False) for text in texts])
    torch.testing.assert_close(repe.capture(model, tokenizer, texts), alone, atol=1e-4, rtol=1e-4)
