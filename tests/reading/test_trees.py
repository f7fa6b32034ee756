"""Trees of prefixes: they hold the texts, a mask shows every node its ancestors, and models run on them are exact."""

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import repe
from repe.models import families
from repe.models.blocks import find_stack
from repe.reading import capture as capturing
from repe.reading import trees as prefixes
from repe.reading.trees import (
    Batch,
    Measurement,
    Tree,
    disagreement,
    dtype_of,
    in_rows,
    in_trees,
    inputs,
    limit_for,
    obstacle,
    pays,
    plant,
    witnesses,
)
from tests import oracles, zoo

# trees

Row = list[int]
texts_of_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)
limits = st.integers(1, 40)


def prefixes_of(rows: list[Any]) -> set[tuple]:
    return {tuple(row[: i + 1]) for row in rows for i in range(len(row))}


def by_text(trees: list[Tree]) -> dict[int, tuple[Tree, list[int]]]:
    placed = [
        (text, (tree, path.tolist())) for tree in trees for text, path in zip(tree.texts, tree.paths, strict=True)
    ]
    assert len(dict(placed)) == len(placed)
    return dict(placed)


@given(texts_of_ids, limits)
def test_paths_give_back_every_text_once(rows: list[Row], limit: int) -> None:
    placed = by_text(plant(rows, limit))
    assert sorted(placed) == list(range(len(rows)))
    for text, (tree, path) in placed.items():
        assert tree.tokens[path].tolist() == rows[text]
        assert tree.depth[path].tolist() == list(range(len(rows[text])))


@given(texts_of_ids, limits)
def test_a_node_is_a_prefix_that_no_other_node_is(rows: list[Row], limit: int) -> None:
    for tree in plant(rows, limit):
        assert len(tree) == len(prefixes_of([rows[text] for text in tree.texts]))
    assert [len(tree) for tree in plant(rows, 10_000)] == [len(prefixes_of(rows))]


@given(texts_of_ids, limits)
def test_trees_keep_to_the_limit_and_are_cut_only_for_it(rows: list[Row], limit: int) -> None:
    trees = plant(rows, limit)
    for tree in trees:
        assert len(tree) <= limit or len({tuple(rows[text]) for text in tree.texts}) == 1
    for tree, after in itertools.pairwise(trees):
        assert len(prefixes_of([rows[text] for text in (*tree.texts, after.texts[0])])) > limit


@given(texts_of_ids, limits)
def test_equal_texts_share_all_of_their_nodes(rows: list[Row], limit: int) -> None:
    placed = by_text(plant([*rows, *rows], limit))
    for text in range(len(rows)):
        (tree, path), (other, again) = placed[text], placed[text + len(rows)]
        assert tree is other
        assert path == again


@given(texts_of_ids, st.data())
def test_tokens_are_shared_only_where_all_marks_before_are_the_same(rows: list[Row], data: Any) -> None:
    marks = [[data.draw(st.sampled_from([None, "edited", 3])) for _ in row] for row in rows]
    (tree,) = plant(rows, 10_000, marks)
    assert len(tree) == len(prefixes_of([list(zip(row, m, strict=True)) for row, m in zip(rows, marks, strict=True)]))
    for text, (_, path) in by_text([tree]).items():
        assert tree.tokens[path].tolist() == rows[text]


@pytest.mark.parametrize(
    ("rows", "marks", "message"),
    [([[1], []], None, "no tokens"), ([[1, 2]], [[None]], "shorter"), ([[1]], [[None], [None]], "longer")],
)
def test_texts_that_have_no_tree_are_refused(rows: list[Row], marks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plant(rows, marks=marks)


def test_no_texts_are_no_trees() -> None:
    assert plant([]) == []


# masks


def ancestors(tree: Tree, window: int | None = None) -> Tensor:
    """Who sees whom (nodes, nodes), by walking every path."""
    sees = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for path in tree.paths:
        for place, node in enumerate(path):
            sees[node, path[max(0, place + 1 - (window or len(path))) : place + 1]] = True
    return sees


@given(texts_of_ids, limits)
def test_the_mask_is_the_relation_of_ancestors_and_filler_sees_itself_alone(rows: list[Row], limit: int) -> None:
    trees = plant(rows, limit)
    batch = inputs(trees, torch.float32)
    width = max(map(len, trees))
    assert batch["attention_mask"].shape == (len(trees), 1, width, width)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (len(trees), width)
    for row, tree in enumerate(trees):
        expected = torch.eye(width, dtype=torch.bool)
        expected[: len(tree), : len(tree)] = ancestors(tree)
        assert torch.equal(batch["attention_mask"][row, 0] == 0, expected)
        assert torch.equal(batch["input_ids"][row, : len(tree)], tree.tokens)
        assert torch.equal(batch["position_ids"][row, : len(tree)], tree.depth)
    hidden = batch["attention_mask"][batch["attention_mask"] != 0]
    assert (hidden == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_mask_is_in_the_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    mask = inputs(plant([[1, 2], [1, 3]]), dtype)["attention_mask"]
    assert mask.dtype == dtype
    assert mask.min() == torch.finfo(dtype).min


SHARED = [[5, 6, 7, 8, 1], [5, 6, 7, 8, 2, 3, 4], [5, 6, 9], [4]]


@pytest.mark.parametrize(
    ("layer_types", "windows"),
    [
        (None, {"": 3}),
        (["full_attention", "sliding_attention"], {"full_attention": None, "sliding_attention": 3}),
        (["full_attention"], {"": None}),
    ],
)
def test_a_window_counts_depth(layer_types: Any, windows: dict) -> None:
    (tree,) = plant(SHARED)
    config = SimpleNamespace(sliding_window=3, layer_types=layer_types)
    masks = inputs([tree], torch.float32, config=config)["attention_mask"]
    masks = {"": masks} if isinstance(masks, Tensor) else masks
    assert masks.keys() == windows.keys()
    for name, window in windows.items():
        assert torch.equal(masks[name][0, 0] == 0, ancestors(tree, window))


# families

SHALLOW = ["a", "ab", "abc", "a", "b", "bc"]  # with BOS no longer than the zoo's windows of 4
DEEP = ["the quick brown " + end for end in ("fox", "fox jumps", "dog", "d", "")] + ["the lazy dog", "a", "the"]
SLIDING = ["sliding_attention", "full_attention"] * (zoo.N_BLOCKS // 2)
_BASE = zoo._LLAMA
_HEADED = zoo._LLAMA_WITH_HEAD_DIM
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "topk_group": 1,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "apertus": _BASE,
    "arcee": _BASE,
    "biogpt": {**zoo._SIZES, "intermediate_size": 48, "max_position_embeddings": zoo.MAX_TOKENS},
    "codegen": {**zoo._GPT, **zoo._NO_GPT_DROPOUT, "rotary_dim": 4},
    "cohere2": {**_BASE, "sliding_window": 4, "layer_types": SLIDING},
    "cwm": {**_HEADED, "sliding_window": 4, "layer_types": SLIDING},
    "deepseek_v2": {**_BASE, **_LATENT},
    "deepseek_v3": {**_BASE, **_LATENT},
    "dots1": {**_BASE, **_LATENT, "head_dim": 8},
    "ernie4_5": _HEADED,
    "ernie4_5_moe": {**_BASE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "exaone4": {**_BASE, "sliding_window": 4, "layer_types": SLIDING},
    "flex_olmo": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "glm": _HEADED,
    "glm4_moe": {**_HEADED, **_LATENT, "num_key_value_heads": 2},
    "gpt_bigcode": zoo._GPT,
    "granitemoe": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {
        **_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24,
    },
    "helium": _HEADED,
    "hunyuan_v1_dense": _HEADED,
    "hunyuan_v1_moe": {**_HEADED, "num_experts": 4, "moe_topk": 2},
    "ministral": {**_HEADED, "sliding_window": 4, "layer_types": SLIDING},
    "ministral3": {**_HEADED, "sliding_window": 4},
    "mixtral": {**_BASE, "sliding_window": 4, "num_local_experts": 4},
    "nemotron": _BASE,
    "olmo": _BASE,
    "olmo3": {**_BASE, "sliding_window": 4, "layer_types": SLIDING},
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": _BASE,
    "phi3": {**_BASE, "sliding_window": 4},
    "phimoe": {**_BASE, "num_local_experts": 4, "sliding_window": 4},
    "qwen2": {**_BASE, "use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING},
    "qwen2_moe": {**_BASE, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {**_HEADED, "use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING},
    "qwen3_moe": {**_HEADED, **_EXPERTS, "use_sliding_window": True, "sliding_window": 4},
    "seed_oss": _HEADED,
    "smollm3": {**_BASE, "use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING},
    "starcoder2": {**_BASE, "sliding_window": 4},
    "vaultgemma": {**_HEADED, "sliding_window": 4, "layer_types": SLIDING},
    "xglm": {
        **zoo._IDS, "d_model": zoo.D_MODEL, "ffn_dim": 48, "num_layers": zoo.N_BLOCKS, "attention_heads": 4,
        "max_position_embeddings": zoo.MAX_TOKENS,
    },
}  # fmt: skip
REFUSED = {
    "bloom": "'bloom' is not among those",
    "mpt": "'mpt' is not among those",
    "mamba": "layers of linear_attention",
    **dict.fromkeys(zoo.ENCODERS, "not causal"),
    **dict.fromkeys(zoo.ENCODER_DECODERS, "into its encoder"),
}
PACKED = [name for name in zoo.FAMILIES if name not in REFUSED]


def made(model_type: str, attention: str | None = None, **sizes: Any) -> Any:
    """A small random model of a family that is not in the zoo, or with sizes that it does not have there."""
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
        zoo._widen(model)
    return model


def type_of(model: Any) -> str:
    return find_stack(model).module.config.model_type


def farthest(packed: Any, padded: Any) -> float:
    """Largest distance of two activations, as a share of their norm."""
    pairs = zip(packed, padded, strict=True)
    return max(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in pairs)


def assert_packed_is_padded(model: Any, texts: list[str], tokens: str = "last") -> None:
    tokenizer = zoo.tokenizer()
    packed = repe.capture(model, tokenizer, texts, tokens=tokens, packed=True)
    assert farthest(packed, repe.capture(model, tokenizer, texts, tokens=tokens, packed=False)) < 1e-4


@pytest.mark.parametrize("texts", [SHALLOW, DEEP], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", PACKED)
def test_what_comes_of_trees_is_what_comes_of_padded_rows(name: str, texts: list[str]) -> None:
    model = zoo.build(name)
    for tokens in capturing.KEEPERS:
        assert_packed_is_padded(model, texts, tokens)


@pytest.mark.parametrize("model_type", MORE)
def test_families_outside_of_the_zoo_are_exact_on_trees_too(model_type: str) -> None:
    assert_packed_is_padded(made(model_type, **MORE[model_type]), DEEP)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "llama", "gpt2"])
def test_eager_attention_takes_the_mask_as_well(model_type: str) -> None:
    name = "gemma3" if model_type == "gemma3_text" else model_type
    model = zoo.build(name)
    assert find_stack(model).module.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert_packed_is_padded(model, DEEP)


def test_every_family_of_the_list_is_tried() -> None:
    assert {type_of(zoo.build(name)) for name in PACKED} | set(MORE) == families.types_on_trees()


@pytest.mark.parametrize("name", PACKED)
def test_rounding_alone_is_no_disagreement(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        repe.capture(zoo.build(name).to(dtype), zoo.tokenizer(), DEEP, packed=True)


def test_a_model_gets_a_mask_in_its_own_dtype() -> None:
    model, dtypes = zoo.build("gpt_oss").bfloat16(), set()
    attend = model.model.layers[0].self_attn.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        if kwargs["attention_mask"].is_floating_point():
            dtypes.add(kwargs["attention_mask"].dtype)
        return attend(*args, **kwargs)

    model.model.layers[0].self_attn.forward = spy
    repe.capture(model, zoo.tokenizer(), DEEP, packed=True)
    assert dtypes == {torch.bfloat16}


def test_autocast_is_no_disagreement() -> None:
    model = zoo.build("gpt_oss")
    assert dtype_of(model) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert dtype_of(model) == torch.bfloat16
        repe.capture(model, zoo.tokenizer(), DEEP, packed=True)
    assert dtype_of(model.half()) == torch.float16


# what stands in the way


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_trees_are_wrong_for_say_so(name: str, caplog: Any) -> None:
    model, tokenizer = zoo.build(name), zoo.tokenizer()
    with pytest.raises(ValueError, match=f"packed=True.*{REFUSED[name]}"):
        repe.capture(model, tokenizer, DEEP, packed=True)
    with caplog.at_level(logging.INFO, "repe"):
        repe.capture(model, tokenizer, DEEP)
    assert f"{len(DEEP)} texts in padded rows" in caplog.text
    assert REFUSED[name] in caplog.text


def test_an_encoder_of_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="not causal"):
        repe.capture(zoo.build("bart"), zoo.tokenizer(), DEEP, stack="encoder", packed=True)


def test_alibi_is_refused() -> None:
    falcon = made("falcon", **zoo._SIZES, alibi=True)
    assert "ALiBi" in obstacle(falcon.transformer)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged|sdpa", None])
def test_attention_that_takes_no_added_mask_is_refused(attention: Any) -> None:
    model = zoo.build("llama")
    assert obstacle(model.model) == ""
    model.config._attn_implementation_internal = attention
    assert f"attention is {attention!r}" in obstacle(model.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stack: setattr(stack.layers[2].self_attn, "is_causal", False), "not causal"),
        (lambda stack: setattr(stack.config, "layer_types", ["chunked_attention"]), "layers of chunked_attention"),
        (lambda stack: setattr(stack.config, "model_type", "llama5"), "'llama5' is not among"),
        (lambda stack: stack.layers[1].compile(backend="eager"), "compiled"),
        (lambda stack: stack.layers.__setitem__(1, torch.compile(stack.layers[1], backend="eager")), "compiled"),
        (lambda stack: stack.layers[1].mlp.register_forward_hook(lambda *call: None), "something is attached"),
        (lambda stack: stack.register_forward_pre_hook(lambda *call: None), "something is attached"),
    ],
)
def test_what_does_not_know_trees_is_in_their_way(change: Any, message: str) -> None:
    model = zoo.build("llama")
    change(model.model)
    assert message in obstacle(model.model)


def test_a_module_without_a_config_is_refused() -> None:
    assert "None is not among" in obstacle(torch.nn.Linear(1, 1))


def test_what_transformers_attaches_is_not_in_the_way() -> None:
    model = zoo.build("llama")
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(part._forward_hooks for part in model.modules())
    assert obstacle(model.model) == ""


def test_a_steered_model_is_run_on_rows(caplog: Any) -> None:
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    with repe.steer(model, oracles.vector(), 1.0):
        with pytest.raises(ValueError, match="steering"):
            repe.capture(model, tokenizer, DEEP, packed=True)
        steered = repe.capture(model, tokenizer, DEEP, packed=False)
        with caplog.at_level(logging.INFO, "repe"):
            assert torch.equal(repe.capture(model, tokenizer, DEEP), steered)
    assert "something is attached" in caplog.text


# the check


def listed(monkeypatch: Any, model_type: str) -> None:
    by_mistake = families.Family("listed by mistake", types=(model_type,), trees=True)
    monkeypatch.setattr(families, "_FAMILIES", [*families.known_families(), by_mistake])
    monkeypatch.setattr(families, "LAYER_TYPES", {*families.LAYER_TYPES, "linear_attention"})


GPT_NEO = {
    **zoo._IDS, "hidden_size": zoo.D_MODEL, "num_layers": zoo.N_BLOCKS, "num_heads": 4, "window_size": 4,
    "attention_types": [[["global", "local"], zoo.N_BLOCKS // 2]], "max_position_embeddings": zoo.MAX_TOKENS,
}  # fmt: skip


@pytest.mark.parametrize("tokens", capturing.KEEPERS)
@pytest.mark.parametrize("model_type", ["bloom", "mpt", "mamba", "gpt_neo"])
def test_a_family_that_is_listed_by_mistake_is_found_out(monkeypatch: Any, model_type: str, tokens: str) -> None:
    model = made("gpt_neo", **GPT_NEO) if model_type == "gpt_neo" else zoo.build(model_type)
    tokenizer = zoo.tokenizer()
    padded = repe.capture(model, tokenizer, DEEP, tokens=tokens, packed=False)
    listed(monkeypatch, model_type)
    with pytest.warns(UserWarning, match="does not give texts in trees.*padded rows instead") as warned:
        found_out = repe.capture(model, tokenizer, DEEP, tokens=tokens)
    assert len(warned) == 1
    assert all(map(torch.equal, found_out, padded))
    with pytest.raises(RuntimeError, match=r"packed=True: .* does not give texts in trees"):
        repe.capture(model, tokenizer, DEEP, tokens=tokens, packed=True)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_window_that_a_config_does_not_tell_of_is_found_out(monkeypatch: Any) -> None:
    """It is wrong for the long text alone, which is not the last of the tree."""
    monkeypatch.setattr(prefixes, "_windowed", lambda visible, depth, config: [("", visible)])
    texts = ["a long text, a", "z", "zz", "zy"]
    with pytest.raises(RuntimeError, match="differ by"):
        repe.capture(zoo.build("mistral"), zoo.tokenizer(), texts, packed=True)


class Numbers(Measurement[Tensor]):
    """Measures the length of texts; `off` says by how much in a batch of trees."""

    def __init__(self, rows: list[Row], off: Any = lambda batch: 0.0) -> None:
        self.module, self.rows, self.off = zoo.build("llama").model, rows, off
        self.told: list[tuple[bool, int]] = []

    def trees(self, limit: int = 1) -> list[Batch]:
        return in_trees(plant(self.rows, limit), self.module, lambda height, width: height == 1)

    def measured(self, batch: Batch) -> list[Tensor]:
        self.told.append((bool(batch.trees), batch.width))
        off = self.off(batch) if batch.trees else 0.0
        return [torch.tensor([len(self.rows[text]) + off]) for text in batch.texts]

    def compared(self, result: Tensor) -> Tensor:
        return result

    def in_rows(self, texts: Any) -> list[Batch]:
        return in_rows(self.rows, texts, self.module, lambda height, width: height <= 2)


LENGTHS = [[n] * n for n in (3, 1, 4, 2, 5)]


def test_nothing_of_trees_is_given_out_before_the_ends_are_checked_and_wide_ones_come_first() -> None:
    """The check runs their texts in rows."""
    numbers, given = Numbers(LENGTHS), []
    for batch, results in numbers.run(numbers.trees()):
        given.append(batch.width)
        assert [float(result) for result in results] == [batch.width]
        if len(given) == 1:
            assert numbers.told == [(True, 1), (True, 5), (False, 1), (False, 5)]
    assert given == [1, 5, 4, 3, 2]


@pytest.mark.parametrize("wrong", [1, 5])
def test_wrong_trees_are_found_out_in_the_narrowest_and_the_widest_batch(wrong: int) -> None:
    numbers = Numbers(LENGTHS, lambda batch: 0.5 * (batch.width == wrong))
    with pytest.warns(UserWarning, match=r"does not give texts in trees.*they differ by.*padded rows instead"):
        given = list(numbers.run(numbers.trees()))
    assert all(not batch.trees for batch, _ in given)
    with pytest.raises(RuntimeError, match=r"packed=True: .*does not give texts in trees"):
        list(numbers.run(numbers.trees(), must=True))


def test_what_breaks_late_is_run_in_rows_and_the_rest_is_kept() -> None:
    def breaking(batch: Batch) -> float:
        return 1 / (batch.width - 3)

    numbers = Numbers(LENGTHS, lambda batch: 0 * breaking(batch))
    with pytest.warns(UserWarning, match=r"does not give texts in trees.*ZeroDivisionError.*padded rows instead"):
        given = list(numbers.run(numbers.trees()))
    found = {text: float(result) for batch, results in given for text, result in zip(batch.texts, results, strict=True)}
    assert found == {text: len(row) for text, row in enumerate(LENGTHS)}
    assert len(given) == len(LENGTHS) - 1  # of 1, 5 and 4 tokens in trees, then 2 and 3 as two rows
    assert numbers.told[-1] == (False, 3)


@pytest.mark.parametrize("error", [OSError, OverflowError, MemoryError, torch.OutOfMemoryError])
def test_what_rows_would_not_change_is_raised(error: type[Exception]) -> None:
    def breaking(batch: Batch) -> float:
        raise error("of the machine")

    numbers = Numbers(LENGTHS, breaking)
    with pytest.raises(error, match="of the machine"):
        list(numbers.run(numbers.trees()))


def test_rows_are_run_at_once_where_there_are_no_trees() -> None:
    numbers = Numbers(LENGTHS)
    assert [batch.texts for batch, _ in numbers.run([])] == [[1, 3], [0, 2], [4]]


def test_witnesses_are_the_longest_and_the_last_of_a_batch() -> None:
    rows = [[1, 2, 3, 4], [1, 2], [5], [6, 7], [6, 8]]
    (batch,) = in_trees(plant(rows, limit=6), zoo.build("llama").model, lambda height, width: True)
    assert batch.texts == [3, 4, 1, 0, 2]
    assert witnesses(batch) == {0: 3, 2: 4}


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.float16, 0.02), (torch.bfloat16, 0.1)],
    ids=str,
)
def test_disagreement_is_a_share_of_the_size(dtype: torch.dtype, allowed: float) -> None:
    plain = torch.tensor([[[3e3, 4e3], [0.3, -0.4]]]).double()
    off = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]) * plain.norm(dim=-1, keepdim=True)
    assert disagreement(plain + 0.9 * allowed * off, plain, dtype) == ""
    assert "differ by" in disagreement(plain + 1.1 * allowed * off, plain, dtype)
    assert disagreement(plain + 1.1 * allowed * off, plain, dtype, smallest=1.0) == ""
    assert disagreement(0 * plain, 0 * plain, dtype) == ""


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_agrees_with_its_like_alone(value: float) -> None:
    plain = torch.tensor([1.0, value, 3.0])
    assert disagreement(plain, plain, torch.float32) == ""
    assert "differ by" in disagreement(torch.tensor([1.1, value, 3.0]), plain, torch.float32)
    for one, other in ((plain, torch.ones(3)), (torch.ones(3), plain)):
        assert "differ by" in disagreement(one, other, torch.float32)


# where it pays


@pytest.mark.parametrize(("texts", "way"), [(DEEP * 3, "in 1 trees"), (["abc", "def", "ghi"], "share too few")])
def test_texts_are_packed_where_it_pays_and_the_log_says_so(texts: list[str], way: str, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "repe"):
        repe.capture(zoo.build("llama"), zoo.tokenizer(), texts)
    assert way in caplog.text
    assert ("padded" in caplog.text) == ("few" in way)


def paying(rows: list[Row], d_model: int) -> bool:
    return pays(in_trees(plant(rows), zoo.build("llama").model, lambda height, width: False), rows, d_model)


def test_the_check_is_counted_where_it_is_decided_what_pays() -> None:
    assert [paying([[1, 2, 3]] * times, d_model=4096) for times in (1, 2, 3)] == [False, False, True]


def test_a_node_costs_the_more_the_larger_its_tree_and_the_narrower_the_model() -> None:
    rows = [[*range(500), end, end] for end in (1000, 2000)]  # 504 nodes and 502 tokens to check, of 1,004 tokens
    more = rows * 2
    assert [paying(more, d_model) for d_model in (32, 128, 512)] == [False, True, True]
    assert not paying(rows, 4096)
    assert [limit_for(d_model) for d_model in (32, 128, 256, 400, 512, 8192)] == [256, 256, 384, 600, 768, 768]


def test_a_batch_of_trees_holds_no_more_than_one_of_rows(monkeypatch: Any) -> None:
    held = []
    real = prefixes.inputs

    def spy(trees: Any, *how: Any) -> Any:
        batch = real(trees, *how)
        held.append(batch["input_ids"].shape)
        return batch

    monkeypatch.setattr(prefixes, "inputs", spy)
    monkeypatch.setattr(capturing, "limit_for", lambda d_model: 25)
    texts = [begin + " quick brown"[:length] for begin in "abcd" for length in (3, 7, 11)]
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    for batch_size, most in ((1, 1), (2, 1), (16, 2)):
        held.clear()
        packed = repe.capture(model, tokenizer, texts, packed=True, batch_size=batch_size)
        assert farthest(packed, repe.capture(model, tokenizer, texts, packed=False)) < 1e-4
        assert max(rows for rows, _ in held) == most
        assert all(rows * nodes**2 <= batch_size * 13**2 or rows == 1 for rows, nodes in held)
        assert all(nodes <= 13 * batch_size for _, nodes in held)
