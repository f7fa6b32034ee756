"""Steering, capturing and reading, proven on every family of the zoo."""

from typing import Any

import pytest
import torch
from torch import Tensor

import repe
from repe.models.blocks import find_stack, hidden_of
from repe.steering.handle import Steering
from tests import oracles, zoo
from tests.oracles import BLOCK

STACKS = [(name, "decoder") for name in zoo.FAMILIES] + [(name, "encoder") for name in zoo.ENCODER_DECODERS]
SITES = [
    (name, site)
    for name in zoo.DECODERS
    for site in ("attention", "mlp", "embedding")
    if (name, site) not in {("granite", "attention"), ("granite", "mlp"), ("opt", "mlp"), ("mamba", "mlp")}
    and (name, site) != ("llava", "embedding")  # it embeds outside of its language model: see the test of the refusal
]
SHIFT_TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # of float32 sums of activations of size 1 to 10

every_stack = pytest.mark.parametrize(("name", "stack"), STACKS)
every_stack_that_reads = pytest.mark.parametrize(  # the decoder of an encoder-decoder sees no text
    ("name", "stack"), [(n, stack) for n, stack in STACKS if stack == "encoder" or n not in zoo.ENCODER_DECODERS]
)


def n_blocks(stack: str) -> int:
    return zoo.N_ENCODER_BLOCKS if stack == "encoder" else zoo.N_BLOCKS


def steered(model: Any, stack: str, alpha: Any, **how: Any) -> Steering:
    return repe.steer(model, oracles.vector(n_blocks=n_blocks(stack), stack=stack), alpha, **how)


def not_padding(name: str, stack: str, batch: dict[str, Tensor]) -> Tensor:
    """Where the blocks of a stack see tokens of a text: the zoo's `decoder_input_ids` hold no padding."""
    mask = batch["attention_mask"].bool()
    return torch.ones_like(mask) if name in zoo.ENCODER_DECODERS and stack == "decoder" else mask


def rows(batch: dict[str, Tensor], chosen: slice) -> dict[str, Tensor]:
    return {key: value[chosen] for key, value in batch.items()}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


# exact


@every_stack
def test_alpha_0_and_removal_leave_every_bit(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    plain = logits(model, batch)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = steered(model, stack, 0.0, blocks="all")
    assert torch.equal(logits(model, batch), plain)
    handle.alpha = 1.0
    assert not torch.equal(logits(model, batch), plain)
    handle.remove()
    assert torch.equal(logits(model, batch), plain)
    assert repe.status(model) == []
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not {"forward", "generate"} & set(vars(module))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("side", ["left", "right"])
@every_stack
def test_an_edit_adds_alpha_times_scale_times_write_at_every_token_of_a_text(name: str, stack: str, side: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name, side=side)
    blocks = find_stack(model, stack).blocks
    before = oracles.recorded(model, blocks, **batch)
    with steered(model, stack, 0.7) as handle:
        after = oracles.recorded(model, blocks, **batch)
    added = after[BLOCK] - before[BLOCK]
    in_text = not_padding(name, stack, batch)
    expected = oracles.shift_of(handle.vector, 0.7).expand(int(in_text.sum()), -1)
    torch.testing.assert_close(added[in_text], expected, **SHIFT_TOLERANCE)
    assert not added[~in_text].any()
    assert all(torch.equal(before[i], after[i]) for i in range(BLOCK))


@every_stack
def test_all_that_follows_is_what_a_plain_hook_would_give(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    in_text = not_padding(name, stack, batch)[..., None]
    shift = oracles.shift_of(oracles.vector(n_blocks=n_blocks(stack), stack=stack), 0.7)
    with oracles.changed(find_stack(model, stack).blocks[BLOCK], lambda hidden: hidden + in_text * shift):
        expected = logits(model, batch)
    with steered(model, stack, 0.7):
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-4)


@every_stack
def test_a_block_returns_what_it_returned(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    block = find_stack(model, stack).blocks[BLOCK]
    outputs: list[Any] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output)

    block.register_forward_hook(keep)
    logits(model, batch)
    with steered(model, stack, 1.0):
        block.register_forward_hook(keep)
        logits(model, batch)
    plain, _before_the_edit, edited = outputs
    assert type(edited) is type(plain)
    assert hidden_of(edited).dtype == hidden_of(plain).dtype
    assert hidden_of(edited).shape == hidden_of(plain).shape
    if isinstance(plain, tuple):
        assert len(edited) == len(plain)
        assert [type(part) for part in edited] == [type(part) for part in plain]


@every_stack
def test_rows_know_nothing_of_each_other(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    alphas = torch.tensor([0.5, 0.0, -2.0])
    in_text = not_padding(name, stack, batch)
    with steered(model, stack, alphas) as handle:
        together = logits(model, batch)
        handle.alpha = torch.tensor([0.5, 4.0, -2.0])
        other_neighbour = logits(model, batch)
        for row, alpha in enumerate(alphas):
            handle.alpha = alpha.item()
            alone = logits(model, rows(batch, slice(row, row + 1)))[0]
            torch.testing.assert_close(together[row][in_text[row]], alone[in_text[row]], atol=1e-4, rtol=1e-4)
    if name not in ("mixtral", "qwen3_moe", "gpt_oss"):  # a batched expert sums its tokens in another order
        assert torch.equal(together[[0, 2]], other_neighbour[[0, 2]])
    torch.testing.assert_close(together[[0, 2]], other_neighbour[[0, 2]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "site"), SITES)
def test_what_attention_and_mlp_and_embedding_add_is_edited_where_it_is_added(name: str, site: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    module = find_stack(model).site(site, BLOCK)
    in_text = not_padding(name, "decoder", batch)[..., None]
    shift = oracles.shift_of(oracles.vector(), 0.7)
    with oracles.changed(module, lambda hidden: hidden + in_text * shift):
        expected = logits(model, batch)
    with repe.steer(model, oracles.vector(site=site), 0.7):
        actual = logits(model, batch)
    assert not torch.allclose(actual, logits(model, batch), atol=1e-3)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_an_embedding_outside_of_its_stack_is_refused() -> None:
    model, batch = zoo.build("llava"), zoo.inputs("llava")
    handle = repe.steer(model, oracles.vector(site="embedding"), 1.0)
    with pytest.raises(RuntimeError, match="outside of the forward of its stack"):
        logits(model, batch)
    with pytest.warns(UserWarning, match="edited nothing"):
        handle.remove()


# capture and read


def texts() -> list[str]:
    return ["steer", "a longer text", "ab"]


def alone(model: Any, name: str, text: str, stack: str) -> list[Tensor]:
    """Every block's (tokens, d_model) for one text, by plain hooks."""
    ids = torch.tensor([zoo.tokenizer()(text)["input_ids"]])
    batch = {"input_ids": ids}
    if name in zoo.ENCODER_DECODERS:
        batch["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    return [hidden[0] for hidden in oracles.recorded(model, find_stack(model, stack).blocks, **batch)]


@every_stack
def test_capture_in_a_batch_is_what_every_text_gives_alone(name: str, stack: str) -> None:
    model, tokenizer = zoo.build(name), zoo.tokenizer()
    captured = repe.capture(model, tokenizer, texts(), stack=stack)
    everything = repe.capture(model, tokenizer, texts(), stack=stack, tokens="all")
    means = repe.capture(model, tokenizer, texts(), stack=stack, tokens="mean")
    for row, text in enumerate(texts()):
        expected = torch.stack(alone(model, name, text, stack), dim=1)
        torch.testing.assert_close(captured[row], expected[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(everything[row], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(means[row], expected[1 if len(expected) > 1 else 0 :].mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in zoo.FAMILIES if n not in zoo.ENCODER_DECODERS])
def test_capture_agrees_with_hidden_states_up_to_the_final_norm(name: str) -> None:
    model, tokenizer = zoo.build(name), zoo.tokenizer()
    ids = torch.tensor([tokenizer("steer")["input_ids"]])
    with torch.no_grad():
        hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
    captured = repe.capture(model, tokenizer, ["steer"], tokens="all")[0]
    assert len(hidden_states) == zoo.N_BLOCKS + 1
    first = 0 if name == "mamba" else 1  # all others begin with the embeddings
    for block in range(zoo.N_BLOCKS - 1):
        torch.testing.assert_close(captured[:, block], hidden_states[first + block][0], atol=1e-5, rtol=1e-5)


@every_stack
def test_capture_sees_what_is_steered(name: str, stack: str) -> None:
    model, tokenizer = zoo.build(name), zoo.tokenizer()
    plain = repe.capture(model, tokenizer, texts(), blocks=BLOCK, stack=stack)
    with steered(model, stack, 1.0) as handle:
        moved = repe.capture(model, tokenizer, texts(), blocks=BLOCK, stack=stack)
    expected = oracles.shift_of(handle.vector, 1.0).expand(len(texts()), 1, -1)
    torch.testing.assert_close(moved - plain, expected, atol=1e-5, rtol=1e-5)


@every_stack_that_reads
def test_a_reading_is_the_projection_between_the_poles(name: str, stack: str) -> None:
    model, tokenizer = zoo.build(name), zoo.tokenizer()
    vector = oracles.vector(n_blocks=n_blocks(stack), stack=stack)
    reading = repe.read(model, tokenizer, "steer", vector)
    for block, hidden in enumerate(alone(model, name, "steer", stack)):
        midpoint = vector.read[block] @ vector.center[block]
        expected = (hidden @ vector.read[block] - midpoint) / vector.scale[block]
        torch.testing.assert_close(reading.scores[:, block], expected, atol=1e-4, rtol=1e-4)


@every_stack_that_reads
def test_steering_by_alpha_moves_the_score_by_alpha(name: str, stack: str) -> None:
    model, tokenizer = zoo.build(name), zoo.tokenizer()
    vector = oracles.vector(n_blocks=n_blocks(stack), stack=stack).at(BLOCK)
    plain = repe.read(model, tokenizer, "steer", vector).scores
    with repe.steer(model, vector, 1.5):
        moved = repe.read(model, tokenizer, "steer", vector).scores
    torch.testing.assert_close(moved - plain, torch.full_like(plain, 1.5), atol=1e-4, rtol=1e-4)
