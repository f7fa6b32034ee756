"""Theorems about blocks and sites, each proven on every family of the zoo."""

import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from repe.models.blocks import Stack, find_stack, hidden_of, with_hidden
from tests import zoo

STACKS = [(name, "decoder") for name in zoo.FAMILIES] + [(name, "encoder") for name in zoo.ENCODER_DECODERS]
EXPECTED_PATHS = {
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "opt": "model.decoder.layers",
    "mamba": "backbone.layers",
    "llava": "model.language_model.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "t5": "decoder.block",
    "bart": "model.decoder.layers",
}
TUPLE_BLOCKS = {"gptj", "falcon", "bloom", "mpt", "t5"}
CROSS_ATTENTION = {"t5": "layer.1.EncDecAttention", "bart": "encoder_attn"}
NORMS_AFTER_THE_SUMS = {
    ("bert", "decoder"): ("attention.output.LayerNorm", "output.LayerNorm"),
    ("roberta", "decoder"): ("attention.output.LayerNorm", "output.LayerNorm"),
    ("distilbert", "decoder"): ("sa_layer_norm", "output_layer_norm"),
    ("bart", "decoder"): ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ("bart", "encoder"): ("self_attn_layer_norm", "final_layer_norm"),
}
REFUSALS = {
    ("granite", "attention"): "is multiplied by residual_multiplier=0.5 before it is added",
    ("granite", "mlp"): "is multiplied by residual_multiplier=0.5 before it is added",
    ("opt", "mlp"): "its mlp runs with batch and tokens flattened into one dimension",
    ("mamba", "mlp"): r"none of its parts \(mixer, norm\) is known to put out just what its mlp adds",
}

every_family = pytest.mark.parametrize("name", zoo.FAMILIES)
every_stack = pytest.mark.parametrize(("name", "stack"), STACKS)


@contextmanager
def hooked(modules: dict[Any, nn.Module], hook: Callable[[Any, Any], Any]) -> Iterator[None]:
    """While open, `hook(key, output)` sees the output of every module, and may replace it."""
    handles = [
        module.register_forward_hook(lambda _module, _args, output, key=key: hook(key, output))
        for key, module in modules.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def record(model: nn.Module, modules: dict[Any, nn.Module], batch: dict[str, Tensor]) -> list[tuple[Any, Tensor]]:
    """What each module put out, in the order of the calls."""
    seen: list[tuple[Any, Tensor]] = []
    # Falcon adds the attention to its mlp's output in place: what is not cloned changes later.
    with hooked(modules, lambda key, output: seen.append((key, hidden_of(output).clone()))):
        model(**batch)
    return seen


def block_modules(stack: Stack) -> dict[Any, nn.Module]:
    return dict(enumerate(stack.blocks))


def tower(stack: str) -> str:
    return "encoder_hidden_states" if stack == "encoder" else "decoder_hidden_states"


# --- finding


@every_stack
def test_blocks_are_called_once_each_in_order_under_their_names(name: str, stack: str) -> None:
    model = zoo.build(name)
    found = find_stack(model, stack)
    assert found.n_blocks == len(found.blocks) == (zoo.N_ENCODER_BLOCKS if stack == "encoder" else zoo.N_BLOCKS)
    assert found.d_model == zoo.D_MODEL
    assert model.get_submodule(found.name) is found.module
    assert [model.get_submodule(path) for path in found.names] == list(found.blocks)
    assert [number for number, _ in record(model, block_modules(found), zoo.inputs(name))] == [*range(found.n_blocks)]


@every_family
def test_blocks_are_where_the_family_keeps_them(name: str) -> None:
    path = EXPECTED_PATHS.get(name, "model.layers")
    assert find_stack(zoo.build(name)).names == tuple(f"{path}.{number}" for number in range(zoo.N_BLOCKS))


@every_stack
def test_outputs_are_the_hidden_states_of_transformers(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    outputs = [hidden for _, hidden in record(model, block_modules(find_stack(model, stack)), batch)]
    with torch.no_grad():
        result = model(**batch, output_hidden_states=True)
    expected = result[tower(stack)] if name in zoo.ENCODER_DECODERS else result.hidden_states
    if name == "mamba":  # it leaves the embedding out of its hidden states
        expected = (None, *expected)
    for ours, theirs in zip(outputs[:-1], expected[1:-1], strict=False):  # the last of theirs is after the final norm
        assert torch.equal(ours, theirs)


@every_stack
def test_the_module_takes_the_inputs_of_the_stack(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    found = find_stack(model, stack)
    seen: list[dict[str, Any]] = []

    def look(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs)

    with found.module.register_forward_pre_hook(look, with_kwargs=True), torch.no_grad():
        model(**batch)
    (given_inputs,) = seen
    ids = batch["decoder_input_ids" if stack == "decoder" and name in zoo.ENCODER_DECODERS else "input_ids"]
    embeds = given_inputs.get("inputs_embeds")
    assert (given_inputs["input_ids"] if embeds is None else embeds[..., 0]).shape == ids.shape
    if embeds is None:
        assert torch.equal(given_inputs["input_ids"], ids)


class Parallel(nn.Module):
    """Keeps the model under the name that DistributedDataParallel and DataParallel give it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def lora(model: nn.Module, *targets: str) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets or ["down_proj"]), r=2))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


@pytest.fixture
def nothing_stays_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def wrapped_three_times(model: nn.Module) -> nn.Module:
    return compiled(Parallel(lora(model)))


asks_transformers_by_the_old_name = pytest.mark.filterwarnings(  # PEFT does
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@asks_transformers_by_the_old_name
@pytest.mark.usefixtures("nothing_stays_compiled")
@pytest.mark.parametrize("wrap", [Parallel, lora, compiled, wrapped_three_times])
def test_wrappers_do_not_hide_the_blocks(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = zoo.build("llama")
    bare = find_stack(model)
    wrapper = wrap(model)
    found = find_stack(wrapper)
    assert found.blocks == bare.blocks
    assert found.module is wrapper.get_submodule(found.name) is bare.module
    assert [wrapper.get_submodule(path) for path in found.names] == list(bare.blocks)
    assert found.site("mlp", 1) is bare.site("mlp", 1)
    assert found.site("embedding", 0) is bare.site("embedding", 0)
    assert [number for number, _ in record(wrapper, block_modules(found), zoo.inputs("llama"))] == [*range(4)]


@asks_transformers_by_the_old_name
def test_a_site_that_peft_has_adapted_is_the_adapted_module() -> None:
    model = zoo.build("bloom")
    before = find_stack(model).site("attention", 0)
    after = find_stack(lora(model, "dense")).site("attention", 0)
    assert isinstance(after, peft.tuners.lora.LoraLayer)
    assert after.base_layer is before


def test_blocks_that_are_compiled_one_by_one_keep_their_sites() -> None:
    model = zoo.build("llama")
    bare = find_stack(model)
    for number, block in enumerate(bare.blocks):
        model.model.layers[number] = compiled(block)
    found = find_stack(model)
    assert found.blocks == tuple(model.model.layers) != bare.blocks
    assert found.site("attention", 2) is bare.site("attention", 2)


def test_unknown_models_get_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(ValueError) as error:
        find_stack(nn.Sequential(nn.Linear(2, 2)))
    assert str(error.value) == (
        "Cannot tell which modules of Sequential are its decoder blocks: no list fits. "
        'Lists of modules found: none at all. Pass the path of the right one, e.g. blocks_at="model.layers".'
    )


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


class TwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 2)
        self.first = nn.ModuleList([block(), block()])
        self.second = nn.ModuleList([block(), block(), block()])
        self.empty = nn.ModuleList()
        self.heads = nn.ModuleList([nn.Linear(2, 2)])


def test_ambiguity_is_an_error_that_lists_the_choices_and_blocks_at_resolves_it() -> None:
    model = TwoLists()
    with pytest.raises(ValueError, match=r"several lists fit.*'first' \(2 long\), 'second' \(3 long\)\. Pass the path"):
        find_stack(model)
    found = find_stack(model, blocks_at="second")
    assert found.blocks == tuple(model.second)
    assert found.names == ("second.0", "second.1", "second.2")
    assert (found.d_model, found.name) == (2, "")
    assert found.site("embedding", 0) is model.embedding


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("secnd", "'second' (3 long)"), ("second.0", "'second' (3 long)"), ("empty", "'empty' (0 long)")],
)
def test_a_wrong_path_gets_the_nearest_names(path: str, nearest: str) -> None:
    expected = f"blocks_at='{path}' is not a list of blocks in this TwoLists. Lists of modules with the nearest names: "
    with pytest.raises(ValueError, match=re.escape(expected + nearest)):
        find_stack(TwoLists(), blocks_at=path)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, pixel_values: Tensor) -> Tensor: ...


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.ModuleList([block(), block()])), block()])

    def forward(self, input_ids: Tensor) -> Tensor: ...


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()
        self.text = Text()

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor: ...


def test_neither_a_tower_of_images_nor_lists_inside_a_block_are_mistaken_for_the_blocks() -> None:
    model = Multimodal()
    found = find_stack(model)
    assert found.blocks == tuple(model.text.blocks)
    assert (found.module, found.name) == (model.text, "text")
    assert find_stack(model, blocks_at="visual.blocks").blocks == tuple(model.visual.blocks)


def test_one_block_that_runs_many_times_is_not_a_stack() -> None:
    config = transformers.AlbertConfig(
        vocab_size=zoo.VOCABULARY, hidden_size=8, embedding_size=8, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(ValueError, match=r"no list fits.*'encoder.albert_layer_groups' \(1 long\)"):
        find_stack(transformers.AlbertModel(config))


def test_a_list_that_repeats_one_block_is_not_a_stack() -> None:
    model = zoo.build("llama")
    model.model.layers[3] = model.model.layers[2]
    with pytest.raises(ValueError, match=r"no list fits.*'model.layers' \(4 long\)"):
        find_stack(model)


def test_a_model_without_a_known_token_embedding_has_no_such_site() -> None:
    model = TwoLists()
    model.positions = nn.Embedding(9, 2)
    model.config = SimpleNamespace(hidden_size=2, n_layer=3)
    with pytest.raises(ValueError, match=r'TwoLists has no get_input_embeddings\(\), so it has no site "embedding"'):
        find_stack(model).site("embedding", 0)


def test_the_encoder_of_a_model_that_has_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"its encoder blocks: no list fits.*'model.decoder.layers' \(4 long\)"):
        find_stack(zoo.build("opt"), "encoder")
    with pytest.raises(ValueError, match="stack='Encoder' does not exist: choose one of 'decoder', 'encoder'"):
        find_stack(zoo.build("opt"), "Encoder")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_gradient_checkpointing_calls_the_blocks_once(name: str, reentrant: bool) -> None:
    model = zoo.build(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    stack = find_stack(model)
    calls: list[int] = []
    needs_grad = hooked({0: stack.site("embedding", 0)}, lambda _, output: output.requires_grad_())
    with needs_grad, hooked(block_modules(stack), lambda number, _: calls.append(number)):
        model(**zoo.inputs(name), use_cache=False).logits.sum().backward()
    assert calls == [*range(stack.n_blocks)]


# --- replacing


@every_stack
def test_an_unchanged_output_changes_no_bit_and_another_one_the_later_blocks_alone(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    found = find_stack(model, stack)
    modules, edited = block_modules(found), found.n_blocks // 2
    before = record(model, modules, batch)
    with torch.no_grad():
        logits = model(**batch).logits
        with hooked(modules, lambda _, output: with_hidden(output, hidden_of(output))):
            assert torch.equal(model(**batch).logits, logits)
    with hooked({0: modules[edited]}, lambda _, output: with_hidden(output, hidden_of(output).flip(-1))):
        after = record(model, modules, batch)
    same = [torch.equal(old, new) for (_, old), (_, new) in zip(before, after, strict=True)]
    assert same == [number < edited for number in range(found.n_blocks)]
    assert torch.equal(after[edited][1], before[edited][1].flip(-1))


@every_stack
def test_an_output_goes_back_as_the_type_it_came(name: str, stack: str) -> None:
    model = zoo.build(name)
    batch = zoo.inputs(name)
    rows = len(batch["input_ids"])
    came: list[Any] = []
    with hooked(block_modules(find_stack(model, stack)), lambda _, output: came.append(output)), torch.no_grad():
        model(**batch)
    for output in came:
        assert isinstance(output, tuple if name in TUPLE_BLOCKS else Tensor)
        assert hidden_of(output).shape == (rows, batch["input_ids"].shape[1], zoo.D_MODEL)
        new = torch.zeros_like(hidden_of(output))
        back = with_hidden(output, new)
        assert type(back) is type(output)
        assert hidden_of(back) is new
        if isinstance(output, tuple):
            assert all(ours is theirs for ours, theirs in zip(back[1:], output[1:], strict=True))


Pair = namedtuple("Pair", "hidden weights")
OUTPUTS = [
    torch.ones(3, 2),
    (torch.ones(3, 2), "weights"),
    [torch.ones(3, 2), "weights"],
    Pair(torch.ones(3, 2), "weights"),
    BaseModelOutput(last_hidden_state=torch.ones(3, 2), attentions=("weights",)),
]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_with_hidden_replaces_the_hidden_tensor_of_a_copy(output: Any) -> None:
    old, new = hidden_of(output), torch.zeros(3, 2)
    back = with_hidden(output, new)
    assert type(back) is type(output)
    assert hidden_of(back) is new
    assert hidden_of(output) is old
    assert torch.equal(old, torch.ones(3, 2))
    if not isinstance(output, Tensor):
        assert back[1:] == output[1:]


@pytest.mark.parametrize("output", [None, (), [], (None, torch.ones(2)), {"hidden": torch.ones(2)}, BaseModelOutput()])
def test_an_output_without_a_hidden_tensor_is_a_type_error(output: Any) -> None:
    message = f"output of type {type(output).__name__}: expected a tensor, or a tuple, list or ModelOutput"
    with pytest.raises(TypeError, match=message):
        hidden_of(output)
    with pytest.raises(TypeError, match=message):
        with_hidden(output, torch.ones(2))


# --- sites


def addends(name: str, stack: str, found: Stack, number: int) -> list[tuple[nn.Module, nn.Module]]:
    """The modules whose outputs are added to the stream in turn, each with the norm that follows the sum, if any."""
    block = found.blocks[number]
    added = [found.site(site, number) for site in ("attention", "mlp") if (name, site) not in REFUSALS]
    if stack == "decoder" and name in CROSS_ATTENTION:
        added.insert(1, block.get_submodule(CROSS_ATTENTION[name]))
    norms = [block.get_submodule(path) for path in NORMS_AFTER_THE_SUMS.get((name, stack), ())]
    return list(zip(added, norms or [nn.Identity()] * len(added), strict=True))


@pytest.mark.parametrize(("name", "stack"), [key for key in STACKS if key[0] not in {"granite", "opt"}])
def test_sites_sum_to_what_the_block_does(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    found = find_stack(model, stack)
    for number, block in enumerate(found.blocks):
        stream = stream_into(model, block, batch)
        terms = addends(name, stack, found, number)
        seen = record(model, {**{term: module for term, (module, _) in enumerate(terms)}, "block": block}, batch)
        assert [key for key, _ in seen] == [*range(len(terms)), "block"]
        for (_, added), (_, norm) in zip(seen[:-1], terms, strict=True):
            assert added.shape == stream.shape
            assert added.std() > 1e-2
            stream = norm(stream + added).detach()
        torch.testing.assert_close(stream, seen[-1][1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def stream_into(model: nn.Module, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with module.register_forward_pre_hook(look, with_kwargs=True):
        model(**batch)
    return seen[0]


@every_stack
def test_the_block_site_is_the_block_and_the_embedding_is_that_of_the_tokens(name: str, stack: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    found = find_stack(model, stack)
    assert [found.site("block", number) for number in range(found.n_blocks)] == list(found.blocks)
    assert found.site("block", -1) is found.blocks[-1]
    ids = batch["decoder_input_ids" if stack == "decoder" and name in zoo.ENCODER_DECODERS else "input_ids"]
    ((_, embedded),) = record(model, {0: found.site("embedding", 0)}, batch)
    assert embedded.shape == (*ids.shape, zoo.D_MODEL)
    for token in ids.unique():  # the same token, the same vector; another, another
        rows = embedded[ids == token]
        assert torch.equal(rows, rows[:1].expand_as(rows))
    assert len(embedded.flatten(0, 1).unique(dim=0)) == len(ids.unique())


@pytest.mark.parametrize(("name", "site"), REFUSALS)
def test_a_site_that_no_module_puts_out_is_refused_with_the_reason(name: str, site: str) -> None:
    stack = find_stack(zoo.build(name))
    with pytest.raises(
        ValueError, match=rf"Block {stack.names[1]} .*no site '{site}': .*{REFUSALS[name, site]}.*block"
    ):
        stack.site(site, 1)


def test_granite_without_a_multiplier_has_its_sites() -> None:
    model = zoo.build("granite")
    stack = find_stack(model)
    stack.blocks[0].residual_multiplier = 1.0
    assert stack.site("attention", 0) is stack.blocks[0].self_attn


def test_blocks_that_weigh_their_sums_or_are_unheard_of_have_no_known_sites() -> None:
    stack = find_stack(zoo.build("llama"))
    stack.blocks[0].residual_weight = nn.Parameter(torch.ones(zoo.D_MODEL))
    stack.blocks[1].register_buffer("layer_scalar", torch.ones(1))
    stack.blocks[2].third_branch = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"tensors of its own \(residual_weight\)"):
        stack.site("mlp", 0)
    with pytest.raises(ValueError, match=r"tensors of its own \(layer_scalar\)"):
        stack.site("attention", 1)
    with pytest.raises(ValueError, match=r"none of its parts .*third_branch"):
        stack.site("mlp", 2)


def test_an_unknown_site_or_block_is_an_error() -> None:
    stack = find_stack(zoo.build("llama"))
    with pytest.raises(ValueError, match="site='head' does not exist: choose one of 'block', 'embedding', 'attention'"):
        stack.site("head", 0)
    with pytest.raises(IndexError, match="Block 4 does not exist"):
        stack.site("attention", 4)


# --- block numbers

N_BLOCKS = 5
stack_of_five = Stack(nn.Identity(), "", (nn.Identity(),) * N_BLOCKS, ("",) * N_BLOCKS, d_model=1)
numbers = st.integers(-N_BLOCKS, N_BLOCKS - 1)


@given(st.lists(numbers, min_size=1))
def test_indices_are_those_of_a_python_list_sorted_and_each_once(chosen: list[int]) -> None:
    expected = tuple(sorted({list(range(N_BLOCKS))[number] for number in chosen}))
    for spelled in (chosen, tuple(chosen), set(chosen), iter(chosen), np.array(chosen), torch.tensor(chosen)):
        assert stack_of_five.indices(spelled) == expected
    assert stack_of_five.indices(expected) == expected
    for spelled in (chosen[0], np.int64(chosen[0]), torch.tensor(chosen[0])):
        assert stack_of_five.indices(spelled) == stack_of_five.indices([chosen[0]])


@given(st.slices(N_BLOCKS))
def test_slices_and_all_are_those_of_a_python_list(chosen: slice) -> None:
    expected = tuple(sorted(list(range(N_BLOCKS))[chosen]))
    if expected:
        assert stack_of_five.indices(chosen) == expected
    else:
        with pytest.raises(IndexError, match="names none of this model's 5 blocks: name at least one"):
            stack_of_five.indices(chosen)
    assert stack_of_five.indices("all") == stack_of_five.indices(slice(None)) == tuple(range(N_BLOCKS))


@given(st.one_of(st.integers(max_value=-N_BLOCKS - 1), st.integers(min_value=N_BLOCKS)))
def test_a_block_that_does_not_exist_is_an_index_error(number: int) -> None:
    message = f"Block {number} does not exist: this model has 5 blocks. Use 0 to 4, or -1 to -5 to count from the end"
    for spelled in (number, [0, number]):
        with pytest.raises(IndexError, match=message):
            stack_of_five.indices(spelled)


JUNK = [
    True,
    1.0,
    "1",
    "everything",
    None,
    b"all",
    np.bool_(True),
    np.float64(1),
    torch.tensor(True),
    torch.tensor(1.0),
]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_what_is_no_block_number_is_a_type_error(junk: Any) -> None:
    for spelled in (junk, [0, junk]):
        with pytest.raises(TypeError, match='Blocks are an int, ints, a slice or "all", not '):
            stack_of_five.indices(spelled)


def test_no_block_at_all_is_an_error() -> None:
    with pytest.raises(IndexError, match=r"blocks=\[\] names none of this model's 5 blocks"):
        stack_of_five.indices([])
