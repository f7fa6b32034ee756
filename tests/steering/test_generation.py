"""Scopes, under every way in which text is generated, against decoding by hand: one text, no cache, no padding."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

import repe
from repe.models import tokens
from repe.models.blocks import find_stack
from tests import oracles, zoo
from tests.oracles import BLOCK, SCOPES, Chosen

ALPHA = 1.5
N_NEW = 5
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # of float32 logits of size 10, after four blocks in another order of sums
PROMPTS = [[9, 17, 30, 12, 50], [44, 9, 21], [60, 61, 9, 17, 30, 33, 9]]

every_scope = pytest.mark.parametrize("scope", SCOPES)


def steer(model: Any, scope: Any, alpha: Any = ALPHA, **how: Any) -> Any:
    return repe.steer(model, oracles.vector(), alpha, scope=scope, **how)


def shift(alpha: float = ALPHA) -> Tensor:
    return oracles.shift_of(oracles.vector(), alpha)


def padded(prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    return tokens.pad(prompts, side)


def generate(model: Any, **arguments: Any) -> Any:
    how = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": zoo.PAD_ID}
    return model.generate(**how | arguments, return_dict_in_generate=True, output_logits=True)


def check(model: Any, output: Any, prompts: Sequence[Sequence[int]], chosen: Chosen, alphas: Sequence[float]) -> None:
    """Raises AssertionError unless every row decodes as by hand, in tokens and in logits."""
    new = output.sequences[:, -N_NEW:].tolist()
    logits = torch.stack(output.logits[-N_NEW:], dim=1)
    for row, (prompt, alpha) in enumerate(zip(prompts, alphas, strict=True)):
        written, expected = oracles.greedy(model, prompt, N_NEW, shift(alpha), chosen)
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        assert new[row] == written


def run(model: Any, prompts: Sequence[Sequence[int]], scope: str, **arguments: Any) -> None:
    named, chosen = SCOPES[scope]
    with steer(model, named):
        output = generate(model, **arguments)
    check(model, output, prompts, chosen, [ALPHA] * len(prompts))


# ways to generate

WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 2},
}


@every_scope
@pytest.mark.parametrize("way", WAYS)
def test_a_ragged_batch_decodes_as_its_texts_alone(way: str, scope: str) -> None:
    run(zoo.build("llama"), PROMPTS, scope, **padded(PROMPTS), **WAYS[way])


@pytest.mark.parametrize("scope", ["answer", "slice"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2", "gptj", "bloom", "falcon", "opt", "gpt_oss", "llava"])
def test_other_families_decode_as_by_hand(name: str, scope: str) -> None:
    run(zoo.build(name), PROMPTS, scope, **padded(PROMPTS))


@pytest.mark.parametrize("use_cache", [True, False])
@every_scope
def test_a_cache_without_a_length_decodes_as_by_hand(scope: str, use_cache: bool) -> None:
    """Mamba's decode steps carry neither a mask nor positions."""
    prompts = PROMPTS[:1]
    run(zoo.build("mamba"), prompts, scope, input_ids=torch.tensor(prompts), use_cache=use_cache)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", ["generated", "answer", "list from the end"])
def test_pad_tokens_are_padding_where_no_mask_is_given(way: str, scope: str) -> None:
    run(zoo.build("llama"), PROMPTS, scope, input_ids=padded(PROMPTS)["input_ids"], **WAYS[way])


@pytest.mark.parametrize("scope", ["slice", "list from the end"])
def test_what_a_configuration_leaves_open_is_the_models(scope: str) -> None:
    model = zoo.build("llama")
    model.generation_config.eos_token_id = None
    assert model.generation_config.pad_token_id == zoo.PAD_ID
    named, chosen = SCOPES[scope]
    config = GenerationConfig(max_new_tokens=N_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with steer(model, named):
        output = model.generate(padded(PROMPTS)["input_ids"], config)
    check(model, output, PROMPTS, chosen, [ALPHA] * len(PROMPTS))


def test_guidance_of_the_model_beside_a_given_configuration() -> None:
    model, ids = zoo.build("llama"), torch.tensor(PROMPTS[:1])
    model.generation_config.guidance_scale = 1.7
    with steer(model, "generated"):
        expected = generate(model, input_ids=ids, guidance_scale=1.7)
        found = generate(model, input_ids=ids, generation_config=GenerationConfig(max_new_tokens=N_NEW))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("scope", ["prompt", "generated", "answer", "list from the end"])
def test_a_prompt_length_that_is_told_holds_outside_of_generate_alone(scope: str) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    with steer(model, named, prompt_length=2):
        output = generate(model, **padded(PROMPTS))
    check(model, output, PROMPTS, chosen, [ALPHA] * len(PROMPTS))


VIRTUAL = 4


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("scope", [*SCOPES, "mask"])
def test_virtual_tokens_are_no_tokens_of_the_text(scope: str, kind: str) -> None:
    make = peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig
    with warnings.catch_warnings(action="ignore"):
        adapter = make(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
        model = peft.get_peft_model(zoo.build("llama"), adapter).eval()
    batch = padded(PROMPTS)
    columns = batch["input_ids"].shape[1]
    picked = torch.zeros(len(PROMPTS), columns, dtype=torch.bool)
    picked[:, -2:] = True
    named, chosen = SCOPES.get(scope, (picked, lambda position, length: length - 2 <= position < length))
    done = -VIRTUAL if kind == "prompt" else 0

    def is_edited(column: int, length: int) -> bool:
        position = column - columns + length
        return column >= 0 and position >= 0 and chosen(position, length)

    def change(hidden: Tensor) -> Tensor:
        nonlocal done
        places = range(done, done + hidden.shape[1])
        done += hidden.shape[1]
        mask = torch.tensor([[is_edited(column, len(prompt)) for column in places] for prompt in PROMPTS])
        return hidden + mask[..., None] * shift()

    with oracles.changed(find_stack(model).blocks[BLOCK], change):
        expected = generate(model, **batch)
    with steer(model, named):
        output = generate(model, **batch)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("way", ["dynamic cache", "static cache"])
def test_where_the_prompt_stands_is_worked_out_once_a_generation(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found, work_out = zoo.build("llama"), [], tokens.Columns.of

    def count(mask: Tensor) -> tokens.Columns:
        found.append(mask)
        return work_out(mask)

    monkeypatch.setattr(tokens.Columns, "of", count)
    with steer(model, "answer"):
        generate(model, **padded(PROMPTS), **WAYS[way])
    assert len(found) == 1


@pytest.mark.parametrize("scope", ["all", "generated", "slice"])
def test_pad_tokens_that_also_end_a_text_are_not_padding(scope: str) -> None:
    prompts = [[zoo.PAD_ID, 9, 17], [44, 9, 21]]
    ids = torch.tensor(prompts)
    run(zoo.build("llama"), prompts, scope, input_ids=ids, eos_token_id=[zoo.EOS_ID, zoo.PAD_ID])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", ["generated", "answer", "slice", "list from the end"])
def test_a_mask_of_ones_says_that_nothing_is_padding(way: str, scope: str) -> None:
    prompts = [[zoo.PAD_ID, 9, 17], [44, 9, zoo.PAD_ID]]
    ids = torch.tensor(prompts)
    run(zoo.build("llama"), prompts, scope, input_ids=ids, attention_mask=torch.ones_like(ids), **WAYS[way])


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer", "list from the end"])
def test_embeddings_in_place_of_tokens(scope: str) -> None:
    model, batch = zoo.build("llama"), padded(PROMPTS)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    run(model, PROMPTS, scope, inputs_embeds=embeds, attention_mask=batch["attention_mask"])


@every_scope
def test_several_tokens_a_step_when_the_prompt_is_looked_up(scope: str) -> None:
    prompts = [[9, 17, 30, 9, 17, 30, 9]]
    run(zoo.build("llama"), prompts, scope, input_ids=torch.tensor(prompts), prompt_lookup_num_tokens=2)


@every_scope
def test_a_draft_model_is_not_steered_and_changes_nothing(scope: str) -> None:
    prompts, draft = PROMPTS[:1], zoo.build("llama")
    run(zoo.build("llama"), prompts, scope, input_ids=torch.tensor(prompts), assistant_model=draft)
    assert repe.status(draft) == []


@pytest.mark.parametrize("way", ["dynamic cache", "static cache"])
@pytest.mark.parametrize("scope", ["all", "generated", "answer"])
def test_one_alpha_a_row(way: str, scope: str) -> None:
    model, (named, chosen), alphas = zoo.build("llama"), SCOPES[scope], [1.0, 0.0, -2.0]
    with steer(model, named, alphas):
        output = generate(model, **padded(PROMPTS), **WAYS[way])
    check(model, output, PROMPTS, chosen, alphas)


# rows that are repeated


def by_columns(
    model: Any, prompts: Sequence[Sequence[int]], chosen: Chosen, alphas: Sequence[float], **how: Any
) -> Any:
    """Generates without a cache from prompts of one length, edited by a plain hook: a column is a position."""
    length = len(prompts[0])

    def change(hidden: Tensor) -> Tensor:
        copies = hidden.shape[0] // len(prompts)
        rows = torch.tensor(alphas).repeat_interleave(copies)[:, None, None]
        columns = torch.tensor([chosen(column, length) for column in range(hidden.shape[1])])[None, :, None]
        return hidden + rows * columns * shift(1.0)

    with oracles.changed(find_stack(model).blocks[BLOCK], change):
        return generate(model, input_ids=torch.tensor(prompts), use_cache=False, **how)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer", "list from the end"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True, "top_k": 0},
    ],
    ids=str,
)
def test_rows_that_are_repeated_keep_their_alpha_and_their_prompt(scope: str, how: dict[str, Any], cache: str) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    prompts, alphas = [[9, 17, 30], [44, 9, 21]], [1.0, -1.5]
    torch.manual_seed(0)
    expected = by_columns(model, prompts, chosen, alphas, **how)
    torch.manual_seed(0)
    with steer(model, named, alphas):
        output = generate(model, input_ids=torch.tensor(prompts), cache_implementation=cache, **how)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("scope", ["prompt", "answer", "slice", "list from the end"])
def test_beams_of_a_ragged_batch(scope: str) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    with steer(model, named):
        output = generate(model, **padded(PROMPTS), num_beams=3)
    for row, prompt in enumerate(PROMPTS):
        expected = by_columns(model, [prompt], chosen, [ALPHA], num_beams=3)
        assert output.sequences[row, -N_NEW:].tolist() == expected.sequences[0, -N_NEW:].tolist()
        torch.testing.assert_close(output.logits[0][3 * row], expected.logits[0][0], **CLOSE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, [33, 34, 9, 50, 51, 52]])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer", "list", "list from the end"])
def test_guidance_steers_its_second_stream_alike(scope: str, negative: list[int] | None, use_cache: bool) -> None:
    model, (named, chosen), guidance = zoo.build("llama"), SCOPES[scope], 1.7
    prompt = PROMPTS[0]
    other = [prompt[-1]] if negative is None else negative
    if scope == "list from the end" and negative is None:
        named, chosen = [-1], lambda position, length: position == length - 1
    ids, expected = [], []
    for _ in range(N_NEW):
        streams = [
            oracles.greedy(model, start + ids, 1, shift(), chosen, start=len(start))[1][0].log_softmax(-1)
            for start in (prompt, other)
        ]
        expected.append(streams[1] + guidance * (streams[0] - streams[1]))
        ids.append(int(expected[-1].argmax()))
    second = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    with steer(model, named):
        output = generate(
            model, input_ids=torch.tensor([prompt]), guidance_scale=guidance, use_cache=use_cache, output_scores=True,
            **second,
        )  # fmt: skip
    torch.testing.assert_close(torch.stack(output.scores)[:, 0], torch.stack(expected), **CLOSE)


# conversations


def told_of_the_cache(scope: str) -> Any:
    """What was cached before a handle came stays as it was, which is said where it would have been edited."""
    return pytest.warns(UserWarning, match="not steered along") if scope in ("all", "prompt") else nullcontext()


@pytest.mark.parametrize("given", ["all ids", "all ids and a mask", "new ids and a mask"])
@every_scope
def test_a_second_turn_goes_on_from_its_cache(scope: str, given: str) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    first = generate(model, **padded(PROMPTS[:1]))
    history, new = first.sequences[0].tolist(), [40, 41, 42]
    cached = len(history) - 1
    prompt = history + new
    ids = torch.tensor([prompt[cached:] if given == "new ids and a mask" else prompt])
    mask = {} if given == "all ids" else {"attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
    if not any(chosen(position, len(prompt)) for position in range(cached, len(prompt) + N_NEW)):
        pytest.skip("the scope lies in the first turn")
    with steer(model, named), told_of_the_cache(scope):
        output = generate(model, input_ids=ids, past_key_values=first.past_key_values, **mask)
    check(model, output, [prompt], lambda position, length: position >= cached and chosen(position, length), [ALPHA])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer", "list from the end"])
def test_a_second_turn_of_a_ragged_batch(scope: str, masked: bool) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    batch = padded(PROMPTS)
    first = generate(model, **batch)
    new = torch.tensor([[40, 41, 42]] * len(PROMPTS))
    ids = torch.cat([first.sequences, new], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), N_NEW + 3, dtype=torch.long)], dim=1)
    with steer(model, named), told_of_the_cache(scope):
        told = {"attention_mask": mask} if masked else {}
        output = generate(model, input_ids=ids, past_key_values=first.past_key_values, **told)
    for row, prompt in enumerate(oracles.rows_of({"input_ids": ids, "attention_mask": mask})):
        cached = len(prompt) - 4
        _, expected = oracles.greedy(
            model, prompt, N_NEW, shift(), lambda p, length, cached=cached: p >= cached and chosen(p, length)
        )
        torch.testing.assert_close(torch.stack(output.logits)[:, row], expected, **CLOSE)


# encoder-decoders


def encoder_decoder(name: str) -> Any:
    """The zoo's T5 has a decoder of more blocks than its encoder, for which `generate` makes too short a cache."""
    model = zoo.build(name)
    if name != "t5":
        return model
    model.config.num_layers = zoo.N_BLOCKS
    return type(model)(model.config).eval()


@pytest.mark.parametrize("way", ["dynamic cache", "static cache", "no cache"])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer"])
@pytest.mark.parametrize("name", zoo.ENCODER_DECODERS)
def test_the_decoder_of_an_encoder_decoder(name: str, scope: str, way: str) -> None:
    model, (named, chosen) = encoder_decoder(name), SCOPES[scope]
    batch = padded(PROMPTS, side="right")  # BART counts its positions from the first column
    start = model.config.decoder_start_token_id
    with steer(model, named):
        output = generate(model, **batch, **WAYS[way])
    for row, source in enumerate(PROMPTS):
        ids = [start]
        expected = []
        for _ in range(N_NEW):
            expected.append(_decoded(model, source, ids, chosen, 1))
            ids.append(int(expected[-1].argmax()))
        torch.testing.assert_close(torch.stack(output.logits)[:, row], torch.stack(expected), **CLOSE)


@torch.no_grad()
def _decoded(model: Any, source: list[int], ids: list[int], chosen: Chosen, length: int) -> Tensor:
    """The last token's logits, of one text, without a cache."""
    columns = torch.tensor([chosen(column, length) for column in range(len(ids))])[None, :, None]
    with oracles.changed(find_stack(model).blocks[BLOCK], lambda hidden: hidden + columns * shift()):
        batch = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
        return model(**batch, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("scope", ["generated", "slice", "list from the end"])
def test_prompts_of_a_decoder_that_are_padded(scope: str) -> None:
    model, (named, chosen) = encoder_decoder("t5"), SCOPES[scope]
    starts = [[zoo.PAD_ID, 40, 41], [50, 51]]
    decoder, sources = padded(starts), torch.tensor([PROMPTS[0]] * 2)
    with steer(model, named):
        output = generate(
            model, input_ids=sources, decoder_input_ids=decoder["input_ids"],
            decoder_attention_mask=decoder["attention_mask"],
        )  # fmt: skip
    for row, ids in enumerate(starts):
        length = len(ids)
        for step in range(N_NEW):
            expected = _decoded(model, PROMPTS[0], ids, chosen, length)
            torch.testing.assert_close(output.logits[step][row], expected, **CLOSE)
            ids.append(int(expected.argmax()))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("scope", ["all", "prompt", "answer", "slice", "list from the end"])
@pytest.mark.parametrize("name", zoo.ENCODER_DECODERS)
def test_the_encoder_of_an_encoder_decoder(name: str, scope: str, beams: int) -> None:
    model, (named, chosen) = encoder_decoder(name), SCOPES[scope]
    vector = oracles.vector(n_blocks=zoo.N_ENCODER_BLOCKS, stack="encoder")
    with repe.steer(model, vector, ALPHA, scope=named):
        output = generate(model, **padded(PROMPTS, side="right"), num_beams=beams)
    for row, source in enumerate(PROMPTS):
        columns = torch.tensor([chosen(column, len(source)) for column in range(len(source))])[None, :, None]
        by = oracles.shift_of(vector, ALPHA)
        with oracles.changed(find_stack(model, "encoder").blocks[BLOCK], lambda h, c=columns, by=by: h + c * by):
            expected = generate(model, input_ids=torch.tensor([source]), num_beams=beams)
        assert output.sequences[row].tolist() == expected.sequences[0].tolist()
        torch.testing.assert_close(output.logits[0][row * beams], expected.logits[0][0], **CLOSE)


# forwards outside of `generate`


@torch.no_grad()
def bare(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    return model(**batch, **more).logits


def by_hand(model: Any, text: Sequence[int], chosen: Chosen, length: int) -> Tensor:
    """The logits at every token of one text."""
    return torch.stack(
        [oracles.greedy(model, text[:end], 1, shift(), chosen, start=length)[1][0] for end in range(1, len(text) + 1)]
    )


@every_scope
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_on_an_empty_cache_is_all_prompt(side: str, scope: str) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    batch = zoo.inputs("llama", side=side)
    if scope in ("generated", "list in the answer"):
        pytest.skip("nothing of the scope lies in a prompt")
    with steer(model, named):
        logits = bare(model, batch)
    for row, text in enumerate(oracles.rows_of(batch)):
        expected = by_hand(model, text, chosen, len(text))
        torch.testing.assert_close(logits[row][batch["attention_mask"][row].bool()], expected, **CLOSE)


@every_scope
@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config, max_cache_len=16)])
def test_a_text_in_pieces_with_the_prompt_length_told(scope: str, make_cache: Any) -> None:
    model, (named, chosen) = zoo.build("llama"), SCOPES[scope]
    text, length = PROMPTS[2] + PROMPTS[0], 7
    cache, pieces = make_cache(config=model.config), []
    with steer(model, named, prompt_length=length):
        for piece in (text[:3], text[3:9], text[9:10], text[10:]):
            pieces.append(bare(model, {"input_ids": torch.tensor([piece])}, past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(pieces), by_hand(model, text, chosen, length), **CLOSE)


def test_a_mask_names_the_columns_of_its_own_batch() -> None:
    model, batch = zoo.build("llama"), padded(PROMPTS)
    mask = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with steer(model, mask):
        output = generate(model, **batch)
    for row, prompt in enumerate(PROMPTS):
        picked = mask[row, -len(prompt) :].tolist()
        _, expected = oracles.greedy(model, prompt, N_NEW, shift(), lambda p, _, k=picked: p < len(k) and k[p])
        torch.testing.assert_close(torch.stack(output.logits)[:, row], expected, **CLOSE)


def test_a_mask_holds_for_every_beam_of_its_row() -> None:
    model, prompts = zoo.build("llama"), [[9, 17, 30], [44, 9, 21]]
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with steer(model, mask):
        output = generate(model, input_ids=torch.tensor(prompts), num_beams=2)
    for row, prompt in enumerate(prompts):
        picked = mask[row].nonzero().flatten().tolist()
        expected = by_columns(model, [prompt], lambda column, _, picked=picked: column in picked, [ALPHA], num_beams=2)
        assert torch.equal(output.sequences[row], expected.sequences[0])
        torch.testing.assert_close(output.logits[0][2 * row], expected.logits[0][0], **CLOSE)


def wide_mask(batch: dict[str, Tensor], kind: str) -> Any:
    """The batch's mask as (rows, 1, tokens, columns): boolean, added to attention, or one for each kind of it."""
    mask = batch["attention_mask"].bool()
    seen = torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask[:, None, :] & mask[:, :, None]
    if kind == "boolean":
        return seen[:, None]
    added = torch.zeros(seen[:, None].shape).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    return added if kind == "added" else {"sliding_attention": added, "full_attention": added}


@pytest.mark.parametrize("kind", ["boolean", "added", "of several kinds"])
@pytest.mark.parametrize("scope", ["all", "answer", "slice", "list from the end"])
def test_padding_in_a_mask_of_four_dimensions(scope: str, kind: str) -> None:
    model, batch, named = zoo.build("gemma3"), padded(PROMPTS), SCOPES[scope][0]
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    block = find_stack(model).blocks[BLOCK]
    mask = wide_mask(batch, kind)
    with steer(model, named):
        (expected,) = oracles.recorded(model, [block], **batch, position_ids=places)
    plain = oracles.recorded(model, [block], **batch, position_ids=places)[0]
    wanted = (expected - plain).abs().sum(-1) > 1e-3
    (before,) = oracles.recorded(model, [block], input_ids=batch["input_ids"], attention_mask=mask, position_ids=places)
    with steer(model, named):
        (after,) = oracles.recorded(
            model, [block], input_ids=batch["input_ids"], attention_mask=mask, position_ids=places
        )
    torch.testing.assert_close(after - before, wanted[..., None] * shift(), atol=1e-4, rtol=1e-4)


# what is refused


def refused(model: Any, scope: Any, error: type[Exception], match: str, alpha: Any = ALPHA) -> Any:
    """A context that expects an error of what is run in it, and takes the steering off without a word."""
    handle = steer(model, scope, alpha)
    return _Refused(handle, pytest.raises(error, match=match))


class _Refused:
    def __init__(self, handle: Any, raises: Any) -> None:
        self.handle, self.raises = handle, raises

    def __enter__(self) -> None:
        self.raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        with warnings.catch_warnings(action="ignore"):
            self.handle.remove()
        return bool(self.raises.__exit__(*error))


@pytest.mark.parametrize("scope", ["prompt", "generated", "answer", [-1], slice(-2, None)], ids=str)
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_loop_without_a_cache_does_not_tell_where_the_prompt_ends(scope: Any, name: str) -> None:
    """The second forward holds what was written since, unless somebody says where; another text is another prompt."""
    model, batch = zoo.build(name), padded(PROMPTS[:2])
    longer = {n: torch.cat([t, torch.ones(2, 1, dtype=torch.long)], dim=1) for n, t in batch.items()}
    other = {**longer, "input_ids": longer["input_ids"].flip(1)}
    with refused(model, scope, ValueError, "one that goes on from the forward before it does not tell"):
        bare(model, batch)
        bare(model, longer)
    with steer(model, scope) as handle:
        for given in (batch, other, batch, batch):
            bare(model, given)
        handle.prompt_length = batch["attention_mask"].sum(1)
        bare(model, longer)
    with steer(model, "all"):
        for given in (batch, longer):
            bare(model, given)


@pytest.mark.parametrize("scope", ["prompt", "answer", [-1], slice(0, 2)], ids=str)
def test_texts_that_are_read_are_no_loop_though_one_begins_as_another(scope: Any) -> None:
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    texts = ["abc", "abcd", "abcde", "abcd"]
    with steer(model, scope):
        (first, *_), *rest = [repe.capture(model, tokenizer, [text]) for text in texts]
        together = repe.capture(model, tokenizer, texts, batch_size=1)
        repe.read(model, tokenizer, texts, oracles.vector())
        items = [repe.data.Item(text, ("x", "y")) for text in texts]
        repe.measuring.log_likelihoods(model, tokenizer, items)
    torch.testing.assert_close(together[0], first, **CLOSE)
    assert len(rest) == 3


@pytest.mark.parametrize("scope", ["prompt", "generated", "answer", [-1], slice(-2, None)], ids=str)
def test_a_filled_cache_does_not_tell_where_the_prompt_ends(scope: Any) -> None:
    model = zoo.build("llama")
    first = generate(model, **padded(PROMPTS[:1]))
    with refused(model, scope, ValueError, "where the prompt ends, and a forward on a filled cache does not tell"):
        bare(model, {"input_ids": torch.tensor([[9]])}, past_key_values=first.past_key_values)


LINEAR, FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize("layers", [[LINEAR, FULL], [LINEAR, LINEAR, FULL, LINEAR], [FULL, LINEAR], [LINEAR]], ids=str)
@every_scope
def test_a_cache_whose_first_layer_counts_nothing(scope: str, layers: list[str]) -> None:
    """Nor does any, in a model of states alone: the generation knows what it has processed."""
    model, (named, chosen) = zoo.minimax(layers * (zoo.N_BLOCKS // len(layers))), SCOPES[scope]
    prompt = PROMPTS[2]
    with steer(model, named):
        output = generate(model, input_ids=torch.tensor([prompt]))
    check(model, output, [prompt], chosen, [ALPHA])


@pytest.mark.parametrize("scope", ["prompt", "generated", "answer", slice(0, 2)], ids=str)
def test_outside_of_a_generation_a_cache_that_counts_nothing_is_refused(scope: Any) -> None:
    model = zoo.minimax([LINEAR] * zoo.N_BLOCKS)
    first = {"input_ids": torch.tensor([PROMPTS[2]])}

    def go_on(**second: Any) -> Tensor:
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
        return bare(model, {"input_ids": torch.tensor([[9]])}, past_key_values=cache, use_cache=True, **second)

    with refused(model, scope, ValueError, "holds a state and does not count its tokens"):
        go_on()
    with steer(model, "all"):
        everywhere = go_on()[0, -1]
    text = [*PROMPTS[2], 9]
    torch.testing.assert_close(everywhere, by_hand(model, text, SCOPES["all"][1], len(text))[-1], **CLOSE)


def test_a_state_that_does_not_count_its_tokens() -> None:
    model, text = zoo.build("mamba"), PROMPTS[2]

    def two_pieces(**second: Any) -> Tensor:
        with torch.no_grad():
            cache = model(input_ids=torch.tensor([text[:-1]]), use_cache=True).cache_params
        return bare(model, {"input_ids": torch.tensor([text[-1:]])}, cache_params=cache, use_cache=True, **second)

    with refused(model, slice(0, 1), ValueError, "does not count its tokens: pass the attention_mask of all"):
        two_pieces()
    with steer(model, "all"):
        everywhere = two_pieces()[0, -1]
    torch.testing.assert_close(everywhere, by_hand(model, text, SCOPES["all"][1], len(text))[-1], **CLOSE)
    told = {"attention_mask": torch.ones(1, len(text), dtype=torch.long)}
    with steer(model, slice(len(text) - 1, None)):
        at_the_last = two_pieces(**told)[0, -1]
    chosen = SCOPES["generated"][1]
    torch.testing.assert_close(at_the_last, by_hand(model, text, chosen, len(text) - 1)[-1], **CLOSE)


def test_masks_that_do_not_tell_what_is_padding() -> None:
    model, batch = zoo.build("llama"), padded(PROMPTS)
    mask = torch.ones(3, 1, 3, batch["input_ids"].shape[1], dtype=torch.bool)
    with refused(model, "all", ValueError, r"does not tell what is padding, of the shape \(3, 1, 3, 7\)"):
        bare(model, {"input_ids": batch["input_ids"], "attention_mask": mask})
    cache = bare_cache(model, batch)
    wide = torch.ones(3, 1, 1, batch["input_ids"].shape[1] + 1, dtype=torch.bool)
    with refused(model, slice(0, 2), ValueError, "does not tell what of the cache is padding"):
        bare(model, {"input_ids": torch.tensor([[9]] * 3), "attention_mask": wide}, past_key_values=cache)


@torch.no_grad()
def bare_cache(model: Any, batch: dict[str, Tensor]) -> Any:
    return model(**batch).past_key_values


@pytest.mark.parametrize("alpha", [[1.0, 2.0], [1.0] * 4, [1.0] * 6])
def test_alphas_of_another_number_than_the_rows(alpha: list[float]) -> None:
    model = zoo.build("llama")
    with refused(model, "all", ValueError, f"alpha has {len(alpha)} rows, and the batch 3", alpha):
        bare(model, padded(PROMPTS))
    with refused(model, "all", ValueError, f"alpha has {len(alpha)} rows, and the batch 3", alpha):
        generate(model, **padded(PROMPTS), num_beams=2)


def test_positions_before_the_start_of_the_shortest_prompt() -> None:
    model = zoo.build("llama")
    with refused(model, [-4], IndexError, "position -4 lies before the start of a prompt of 3 tokens"):
        generate(model, **padded(PROMPTS))


@pytest.mark.parametrize("shape", [(2, 7), (3, 8), (1, 7)])
def test_masks_of_another_shape(shape: tuple[int, int]) -> None:
    model = zoo.build("llama")
    with refused(model, torch.ones(shape, dtype=torch.bool), ValueError, r"mask of .*, and the batch is \(3, 7\)"):
        bare(model, padded(PROMPTS))


def test_a_wrong_prompt_length_and_a_mask_that_leaves_out_the_cache() -> None:
    model = zoo.build("llama")
    with refused(model, "prompt", ValueError, "prompt_length has 2 rows, and the batch 3") as _:
        repe.status(model)[0].prompt_length = torch.tensor([2, 3])
        bare(model, padded(PROMPTS))
    with steer(model, "all", 1.0) as handle:
        handle.prompt_length = torch.tensor([2, 3])
        bare(model, padded(PROMPTS))  # nothing needs to know
    cache = generate(model, **padded(PROMPTS[:1])).past_key_values
    with refused(model, "all", ValueError, "a mask covers what is cached too"):
        bare(model, {"input_ids": torch.tensor([[9]]), "attention_mask": torch.tensor([[1]])}, past_key_values=cache)


@pytest.mark.parametrize(
    "packed",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 5])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1]])},
    ],
    ids=lambda packed: next(iter(packed)),
)
def test_packed_rows(packed: dict[str, Tensor]) -> None:
    model = zoo.build("llama")
    with refused(model, "all", ValueError, "packed or continuously batched"):
        bare(model, {"input_ids": torch.tensor(PROMPTS[:1])}, **packed)


@pytest.mark.parametrize("scope", ["everything", slice(0, 4, -1), [], [True], 1.5, torch.ones(2, 2)], ids=str)
def test_scopes_that_mean_nothing_leave_the_model_alone(scope: Any) -> None:
    model = zoo.build("llama")
    with pytest.raises((ValueError, TypeError), match="scope"):
        steer(model, scope)
    assert repe.status(model) == []
