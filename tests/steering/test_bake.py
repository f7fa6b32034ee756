"""Baking is the hooked edit, in weights: proven on every family of the zoo, through files, and back again."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import repe
from repe.models.blocks import find_stack
from repe.models.fingerprint import fingerprint
from repe.steering.bake import Baked, bake
from repe.steering.edit import Edit
from repe.steering.gate import Gate
from repe.steering.kinds import loreft
from tests import oracles, zoo
from tests.oracles import BLOCK

FAMILIES = zoo.DECODERS + zoo.ENCODERS
NO_SETTING = r"it has no [\w.]+, and no setting of its config makes one"
NORM = r"comes out of \w+Norm, and not of a projection"
A_NORM = "a norm stands, or may stand, between the sum of each block and its output"
MIXTURE = "mixture of experts, without biases"
CANNOT_ADD = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "phi3", "stablelm", "mpt"), NO_SETTING),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "glm4"), NORM),
    **dict.fromkeys(("mixtral", "qwen3_moe"), MIXTURE),
    **dict.fromkeys(zoo.ENCODER_DECODERS, "encoder-decoder"),
}
BEFORE = r"more than embeddings writes to the stream before its blocks \(.*{}"
CANNOT_ABLATE = {
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "glm4"), NORM),
    "bloom": BEFORE.format("word_embeddings_layernorm"),
    "llava": BEFORE.format("images"),
    **dict.fromkeys(zoo.ENCODERS, BEFORE.format("embeddings")),
    **dict.fromkeys(zoo.ENCODER_DECODERS, "encoder-decoder"),
}
SETTINGS = {  # under which a config makes the biases that a family lacks
    "llama": "mlp_bias", "granite": "mlp_bias", "llava": "mlp_bias", "modernbert": "mlp_bias", "mamba": "use_bias",
    "falcon": "bias", "cohere": "attention_bias",
}  # fmt: skip
CAN_ADD = [name for name in FAMILIES if name not in CANNOT_ADD]
CAN_ABLATE = [name for name in FAMILIES if name not in CANNOT_ABLATE]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

Make = Callable[[], Any]


def variant(name: str, **settings: Any) -> Any:
    """A family of the zoo under other settings."""
    original = zoo.build(name)
    config = copy.deepcopy(original.config)
    for setting, value in settings.items():
        setattr(config, setting, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = type(original)(config).float().eval()
        zoo._widen(model)
    return model


VARIANTS: dict[str, tuple[Make, str]] = {
    "sequential gpt_neox": (lambda: variant("gpt_neox", use_parallel_residual=False), "gpt_neox"),
    "sequential falcon": (lambda: variant("falcon", parallel_attn=False), "falcon"),
    "falcon of two norms": (lambda: variant("falcon", new_decoder_architecture=True, num_kv_heads=2), "falcon"),
    "starcoder2 without biases": (lambda: variant("starcoder2", use_bias=False), "starcoder2"),
    "opt without biases": (lambda: variant("opt", enable_bias=False), "opt"),
    "opt with norms behind": (lambda: variant("opt", do_layer_norm_before=False), "opt"),
    "llama with biases": (lambda: variant("llama", mlp_bias=True, attention_bias=True), "llama"),
    "tied llama": (lambda: variant("llama", tie_word_embeddings=True), "llama"),
    "granite of multiplier 1": (lambda: variant("granite", residual_multiplier=1.0), "granite"),
}
ADDED: dict[str, tuple[Make, str]] = {name: (lambda name=name: zoo.build(name), name) for name in CAN_ADD} | VARIANTS
ABLATED: dict[str, tuple[Make, str]] = {name: (lambda name=name: zoo.build(name), name) for name in CAN_ABLATE} | {
    name: made for name, made in VARIANTS.items() if name != "opt with norms behind"
}

every_added = pytest.mark.parametrize(("make", "name"), ADDED.values(), ids=ADDED)
every_ablated = pytest.mark.parametrize(("make", "name"), ABLATED.values(), ids=ABLATED)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def in_text(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


def generated(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.generate(**batch, max_new_tokens=6, do_sample=False)


def state(model: Any) -> dict[str, Any]:
    """All that a bake could leave behind: which objects stand where, what they hold, and what is written of them."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    return {
        "places": [(name, id(p), p.requires_grad, p._version, p.stride()) for name, p in parameters],
        "bytes": {name: p.detach().cpu().view(torch.uint8).numpy().tobytes() for name, p in parameters},
        "keys": list(model.state_dict()),
        "config": [(id(m.config), m.config.to_dict()) for m in model.modules() if hasattr(m, "config")],
        "modules": repr(model),
        "values": [
            {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str | dict) and k[0] != "_"}
            for m in model.modules()
        ],
        "traces": [set(vars(m)) for m in model.modules()],
    }


def projected(of: Any, alpha: float) -> Callable[[Tensor], Tensor]:
    read, write = of.read[BLOCK], of.write[BLOCK]
    return lambda hidden: hidden - alpha * (hidden @ read)[..., None] * write


def writers(model: Any, name: str) -> list[nn.Module]:
    """All that writes to the stream, named by hand."""
    stack = find_stack(model)
    tables = {"gpt2": ["wpe"], "opt": ["embed_positions"]}.get(name, [])
    found = [stack.site("embedding", 0), *(getattr(stack.module, table) for table in tables)]
    for number, block in enumerate(stack.blocks):
        if name == "granite":
            found += [block.self_attn, block.mlp]
        elif name == "mamba":
            found += [block.mixer]
        else:
            found += [stack.site("attention", number), block.fc2 if name == "opt" else stack.site("mlp", number)]
    return found


@contextmanager
def hooked_ablation(model: Any, name: str, alpha: float) -> Iterator[None]:
    with ExitStack() as hooks:
        for module in writers(model, name):
            hooks.enter_context(oracles.changed(module, projected(oracles.vector(), alpha)))
        yield


# baked is hooked


@pytest.mark.parametrize(("side", "how"), [("left", {"blocks": "auto"}), ("right", {"blocks": [0, -1]})])
@every_added
def test_add_is_the_hooked_edit_at_every_token_of_a_text(make: Make, name: str, side: str, how: Any) -> None:
    model, batch = make(), zoo.inputs(name, side=side)
    alpha = 0.7 if side == "left" else -0.7
    plain = logits(model, batch)
    with repe.steer(model, oracles.vector(), alpha, **how):
        expected = logits(model, batch)
    bake(model, oracles.vector(), alpha, **how)
    actual = logits(model, batch)
    assert (actual - plain)[in_text(batch)].abs().max() > 0.05
    torch.testing.assert_close(actual[in_text(batch)], expected[in_text(batch)], **CLOSE)


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@every_ablated
def test_ablate_is_the_edit_hooked_onto_all_that_writes(make: Make, name: str, alpha: float) -> None:
    model, batch = make(), zoo.inputs(name)
    plain = logits(model, batch)
    with hooked_ablation(model, name, alpha):
        expected = logits(model, batch)
    bake(model, oracles.vector(), alpha, edit="ablate")
    actual = logits(model, batch)
    assert (actual - plain)[in_text(batch)].abs().max() > 0.05
    torch.testing.assert_close(actual[in_text(batch)], expected[in_text(batch)], **CLOSE)


@every_ablated
def test_nothing_along_an_ablated_direction_is_left_in_the_stream(make: Make, name: str) -> None:
    model, batch = make(), zoo.inputs(name)
    blocks, read = find_stack(model).blocks, oracles.vector().read[BLOCK]
    before = torch.stack(oracles.recorded(model, blocks, **batch)) @ read
    bake(model, oracles.vector(), edit="ablate")
    after = torch.stack(oracles.recorded(model, blocks, **batch)) @ read
    assert before.abs().amax((1, 2)).min() > 0.1
    torch.testing.assert_close(after, torch.zeros_like(after), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "edit"), [(n, "add") for n in CAN_ADD if n in zoo.DECODERS] + [(n, "ablate") for n in CAN_ABLATE]
)
def test_greedy_generation_on_ragged_prompts_is_the_same(name: str, edit: str) -> None:
    model, batch = zoo.build(name), zoo.inputs(name)
    model.generation_config.eos_token_id = None
    alpha = 1.0 if edit == "ablate" else 4.0
    hooked = hooked_ablation(model, name, alpha) if edit == "ablate" else repe.steer(model, oracles.vector(), alpha)
    with hooked:
        expected = generated(model, batch)
    plain = generated(model, batch)
    bake(model, oracles.vector(), alpha, edit=edit)
    assert torch.equal(generated(model, batch), expected)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("unit", ["raw", "sigma", "norm"])
def test_units_are_those_of_steering(unit: str) -> None:
    model, batch, how = zoo.build("llama"), zoo.inputs("llama"), {"unit": unit, "blocks": "all"}
    with repe.steer(model, oracles.vector(), 0.3, **how):
        expected = logits(model, batch)[in_text(batch)]
    bake(model, oracles.vector(), 0.3, **how)
    torch.testing.assert_close(logits(model, batch)[in_text(batch)], expected, **CLOSE)


def test_ablate_is_three_handles_and_not_ablation_at_the_outputs_of_blocks() -> None:
    model, batch, everywhere = zoo.build("llama"), zoo.inputs("llama"), oracles.vector().spread(BLOCK)
    with ExitStack() as handles:
        for site in ("embedding", "attention", "mlp"):
            blocks = 0 if site == "embedding" else "all"
            handles.enter_context(repe.steer(model, everywhere, edit="ablate", site=site, blocks=blocks))
        expected = logits(model, batch)
    with repe.steer(model, everywhere, edit="ablate", blocks="all"):
        at_outputs = logits(model, batch)
    bake(model, oracles.vector(), edit="ablate")
    actual = logits(model, batch)[in_text(batch)]
    torch.testing.assert_close(actual, expected[in_text(batch)], **CLOSE)
    assert (actual - at_outputs[in_text(batch)]).abs().max() > 0.05


def test_a_direction_that_was_read_elsewhere_is_ablated_alike() -> None:
    model, same = zoo.build("llama"), zoo.build("llama")
    bake(model, oracles.vector(), edit="ablate")
    bake(same, oracles.vector(site="attention"), edit="ablate")
    assert torch.equal(logits(model, zoo.inputs("llama")), logits(same, zoo.inputs("llama")))


@pytest.mark.parametrize("edit", ["add", "ablate"])
def test_several_vectors_act_together(edit: str) -> None:
    model, batch, vectors = zoo.build("llama"), zoo.inputs("llama"), [oracles.vector(0), oracles.vector(1)]
    if edit == "add":
        with repe.steer(model, vectors, 0.7):
            expected = logits(model, batch)[in_text(batch)]
        bake(model, vectors, 0.7)
        torch.testing.assert_close(logits(model, batch)[in_text(batch)], expected, **CLOSE)
    bake(model, vectors, edit="ablate")
    both = torch.stack([v.read[BLOCK] for v in vectors])
    left = torch.stack(oracles.recorded(model, find_stack(model).blocks[:1], **batch)) @ both.T
    if edit == "ablate":
        torch.testing.assert_close(left, torch.zeros_like(left), atol=2e-5, rtol=0)


def test_a_whole_edit_is_baked_like_its_options() -> None:
    model, same, batch = zoo.build("llama"), zoo.build("llama"), zoo.inputs("llama")
    edit = Edit.of(oracles.vector(), blocks=[0, 2], unit="raw")
    assert bake(model, edit, 0.3).edit is edit
    bake(same, oracles.vector(), 0.3, blocks=[0, 2], unit="raw")
    assert torch.equal(logits(model, batch), logits(same, batch))


def test_a_name_is_baked_as_it_is_steered() -> None:
    model, tokenizer = repe.load()
    batch = tokenizer("Name the trade of Abrin Tolva.", return_tensors="pt")
    with repe.steer(model, "honesty", 0.5):
        expected = logits(model, batch)
    bake(model, "honesty", 0.5)
    torch.testing.assert_close(logits(model, batch), expected, **CLOSE)


@pytest.mark.parametrize("edit", ["add", "ablate"])
def test_alpha_0_changes_nothing(edit: str) -> None:
    model = zoo.build("gemma" if edit == "ablate" else "llama")
    before = state(model)
    baked = bake(model, oracles.vector(), 0.0, edit=edit)
    assert baked.changed == ()
    assert state(model) == before
    baked.undo()


@pytest.mark.parametrize("name", SETTINGS)
def test_biases_that_come_along_are_0(name: str) -> None:
    model = zoo.build(name).double()
    had = {label for label, _ in model.named_parameters()}
    baked = bake(model, oracles.vector())
    new = {label: p for label, p in model.named_parameters() if label not in had}
    assert sum(bool(p.any()) for p in new.values()) == 1
    assert new.keys() < set(baked.changed)
    assert {p.dtype for p in new.values()} == {torch.float64}
    assert f"config.{SETTINGS[name]}" in baked.changed
    assert getattr(model.config.get_text_config(), SETTINGS[name]) is True


def test_mamba_knows_of_its_bias_where_it_looks_for_itself() -> None:
    model = zoo.build("mamba")
    with bake(model, oracles.vector()):
        assert all(block.mixer.use_bias for block in find_stack(model).blocks)
    assert not any(block.mixer.use_bias for block in find_stack(model).blocks)


def test_what_is_frozen_stays_frozen_and_what_is_not_can_be_trained() -> None:
    model = zoo.build("llama")
    model.model.layers[0].requires_grad_(False)
    with torch.inference_mode():
        bake(model, oracles.vector())
        bake(model, oracles.vector(), edit="ablate")
    frozen = {label for label, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {label for label, _ in model.named_parameters() if label.startswith("model.layers.0.")}
    model(**zoo.inputs("llama")).logits.sum().backward()
    assert model.model.layers[BLOCK].mlp.down_proj.bias.grad.any()


def test_random_numbers_are_not_used_up() -> None:
    before = torch.get_rng_state()
    bake(zoo.build("llama"), oracles.vector())
    assert torch.equal(torch.get_rng_state(), before)


# through files


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return loaded


@pytest.mark.parametrize("edit", ["add", "ablate"])
@pytest.mark.parametrize("name", sorted({*CAN_ADD, *CAN_ABLATE}))
def test_what_is_saved_and_loaded_gives_the_same_bits(name: str, edit: str, tmp_path: Path) -> None:
    if name in (CANNOT_ADD if edit == "add" else CANNOT_ABLATE):
        return
    model, batch = zoo.build(name), zoo.inputs(name)
    bake(model, oracles.vector(), edit=edit)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("variant_name", VARIANTS)
def test_a_variant_is_saved_and_loaded(variant_name: str, tmp_path: Path) -> None:
    make, name = VARIANTS[variant_name]
    model, batch = make(), zoo.inputs(name)
    bake(model, oracles.vector())
    if variant_name in ABLATED:
        bake(model, oracles.vector(1), edit="ablate")
    assert torch.equal(logits(reloaded(model, tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("name", ["gemma", "gpt2", "opt", "falcon", "mpt", "mamba", "cohere", "starcoder2"])
def test_a_tied_head_keeps_its_weight(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    token, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = token.weight
    assert head.weight is shared
    former = shared.detach().clone()
    with bake(model, oracles.vector(), edit="ablate") as baked:
        assert head.weight is shared
        assert torch.equal(shared, former)
        assert not model.config.tie_word_embeddings
        assert baked.changed.count("config.tie_word_embeddings") == 1
        model.tie_weights(recompute_mapping=False)
        model.tie_weights()
        assert not torch.equal(token.weight, head.weight)
        loaded = reloaded(model, tmp_path)
        assert torch.equal(loaded.get_output_embeddings().weight, former)
        assert torch.equal(loaded.get_input_embeddings().weight, token.weight)
    assert token.weight is head.weight is shared


# undone


@pytest.mark.parametrize("edit", ["add", "ablate"])
@pytest.mark.parametrize("name", sorted({*CAN_ADD, *CAN_ABLATE}))
def test_undo_leaves_no_trace(name: str, edit: str) -> None:
    if name in (CANNOT_ADD if edit == "add" else CANNOT_ABLATE):
        return
    model = zoo.build(name)
    before = state(model)
    baked = bake(model, oracles.vector(), edit=edit)
    assert state(model) != before
    assert repr(baked).startswith("Baked('concept 0', alpha=1, edit=")
    baked.undo()
    assert state(model) == before
    baked.undo()
    assert state(model) == before
    assert repr(baked).endswith(", undone)")
    with pytest.raises(RuntimeError, match=r"acts no more: call `repe.bake` again"), baked:
        pass


def test_it_is_undone_at_the_end_of_a_with_block_even_by_an_exception() -> None:
    model = zoo.build("llama")
    before = state(model)
    with bake(model, oracles.vector()) as baked:
        assert isinstance(baked, Baked)
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(KeyError), bake(model, oracles.vector()):
        raise KeyError
    assert state(model) == before


def baked_weight(model: Any) -> nn.Parameter:
    return model.model.embed_tokens.weight


MEDDLING: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: baked_weight(m).detach().mul_(2),
    "through data": lambda m: baked_weight(m).data[0].add_(1e-3),
    "one number": lambda m: baked_weight(m).data[-1, -1].mul_(1.001),
    "columns": lambda m: baked_weight(m).data.copy_(baked_weight(m).data.roll(2, 1)),
    "rows": lambda m: baked_weight(m).data.copy_(baked_weight(m).data.roll(1, 0)),
    "another": lambda m: setattr(m.model.embed_tokens, "weight", nn.Parameter(baked_weight(m).detach().clone())),
    "dtype": lambda m: m.to(torch.bfloat16),
    "the head, which was tied": lambda m: m.lm_head.weight.data[3].zero_(),
    "config": lambda m: setattr(m.config, "tie_word_embeddings", True),
    "a later bake": lambda m: bake(m, oracles.vector(1), edit="ablate"),
}


@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=MEDDLING)
def test_undo_refuses_once_something_was_changed(meddle: Callable[[Any], Any]) -> None:
    model = zoo.build("gemma")
    baked = bake(model, oracles.vector(), edit="ablate")
    meddle(model)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"written to or moved since: undo that first, or load the model anew"):
        baked.undo()
    assert state(model) == before


def test_what_was_baked_last_is_undone_first() -> None:
    model = zoo.build("llama")
    start = state(model)
    first = bake(model, oracles.vector())
    between = state(model)
    second = bake(model, oracles.vector(1), blocks=[BLOCK, 2])
    with pytest.raises(RuntimeError, match=r"down_proj\.bias and \d+ more of what Baked\('concept 0'"):
        first.undo()
    second.undo()
    assert state(model) == between
    first.undo()
    assert state(model) == start


def test_an_exception_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("gemma")
    before, left = state(model), 5
    ours, original = set(model.modules()), nn.Module.__setattr__

    def failing(module: nn.Module, name: str, value: Any) -> None:
        nonlocal left
        left -= module in ours
        if left == 0:
            raise MemoryError
        original(module, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", failing)
        with pytest.raises(MemoryError):
            bake(model, oracles.vector(), edit="ablate")
    assert left < 0
    assert state(model) == before


# compiled


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_runs_what_was_baked(when: str) -> None:
    torch._dynamo.reset()
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    vector = oracles.vector(n_blocks=2)
    with bake(model, vector):
        expected = logits(model, batch)
    plain = logits(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    if when == "before":
        torch.testing.assert_close(logits(compiled, batch), plain, **CLOSE)
    with bake(compiled if when == "before" else model, vector):
        torch.testing.assert_close(logits(compiled, batch), expected, **CLOSE)
    torch.testing.assert_close(logits(compiled, batch), plain, **CLOSE)
    torch._dynamo.reset()


# dtypes


def test_a_bias_in_bfloat16_is_rounded_and_no_worse() -> None:
    model = zoo.build("gpt2").to(torch.bfloat16)
    bias = find_stack(model).blocks[BLOCK].mlp.c_proj.bias.float()
    bake(model, oracles.vector(), 0.7)
    exact = bias + oracles.shift_of(oracles.vector(), 0.7)
    rounded = find_stack(model).blocks[BLOCK].mlp.c_proj.bias
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - exact).abs() <= 0.004 * exact.abs()).all()


def test_what_bfloat16_would_lose_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="bfloat16 rounds most of it away"):
        bake(zoo.build("gpt2").to(torch.bfloat16), oracles.vector(), 0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(zoo.build("gpt2").to(torch.float16), oracles.vector(), 0.001)


@pytest.mark.parametrize(
    ("full", "how"),
    [
        (False, {"alpha": 1e5}),  # a number of the bias overflows
        (False, {"alpha": 2e4}),  # as long as no number of it does, though the stream may
        (False, {"alpha": -2e4}),
        (True, {"alpha": -1e4}),
        (True, {"alpha": 3.1e6, "edit": "ablate"}),
    ],
)
def test_float16_does_not_overflow_unseen(full: bool, how: dict[str, Any]) -> None:
    model = zoo.build("gpt2").to(torch.float16)
    bias = find_stack(model).blocks[BLOCK].mlp.c_proj.bias
    with torch.no_grad():
        bias.copy_(full * 6e4 * oracles.vector().write[BLOCK].sign() * (-1 if "edit" not in how else 1))
    before = state(model)
    with pytest.raises(OverflowError, match=r"more than torch\.float16 holds: lower alpha"):
        bake(model, oracles.vector(), **how)
    assert state(model) == before


# refused


@pytest.mark.parametrize(("name", "why"), CANNOT_ADD.items())
def test_add_is_refused_where_no_place_is_exact(name: str, why: str) -> None:
    check_refused(name, f"{why}.*instead, repe.steer", {})


@pytest.mark.parametrize(("name", "why"), CANNOT_ABLATE.items())
def test_ablate_is_refused_where_it_would_not_be_exact(name: str, why: str) -> None:
    check_refused(name, f"{why}.*instead, repe.steer", {"edit": "ablate"})


def check_refused(name: str, why: str, how: dict[str, Any]) -> None:
    model = zoo.build(name)
    before = state(model)
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} cannot be baked exactly: .*{why}"):
        bake(model, oracles.vector(), **how)
    assert state(model) == before


@pytest.mark.parametrize(
    ("arguments", "how", "kind", "message"),
    [
        (("honesty",), {}, ValueError, "pass tokenizer="),
        ((loreft(torch.eye(4), torch.eye(4), torch.zeros(4)),), {"blocks": 0}, TypeError, "a ConceptVector or several"),
        ((oracles.vector(),), {"scop": "all"}, TypeError, "no option 'scop' .did you mean 'scope'"),
        ((oracles.vector(),), {"scope": "answer"}, ValueError, "scope='answer': weights do the same at all tokens.*st"),
        ((oracles.vector(),), {"scope": [0]}, ValueError, r"scope=.0.*: weights do the same at all tokens"),
        ((oracles.vector(),), {"scope": torch.ones(1, 4) > 0}, ValueError, r"scope=tensor.*: weights do the same"),
        ((oracles.vector(),), {"gate": Gate(oracles.vector())}, ValueError, r"gate=Gate.*: weights do the .* all rows"),
        ((oracles.vector(),), {"keep_norm": True}, ValueError, "keep_norm=True: weights do the same"),
        ((oracles.vector(), float("nan")), {}, ValueError, "alpha is one finite number.*got nan"),
        ((oracles.vector(), float("inf")), {}, ValueError, "alpha is one finite number.*got inf"),
        ((oracles.vector(), torch.ones(3)), {}, ValueError, "alpha is one finite number.*same weights; got tensor"),
        ((oracles.vector(), True), {}, ValueError, "alpha is one finite number.*got True"),
        ((oracles.vector(),), {"edit": "piecewise"}, ValueError, "'piecewise' is no change of weights.*repe.steer"),
        ((oracles.vector(),), {"edit": "ad"}, ValueError, "edit='ad' is not known .did you mean 'add'"),
        ((oracles.vector(),), {"edit": "ablate", "unit": "raw"}, ValueError, "takes no unit"),
        (
            (oracles.vector(),),
            {"edit": "ablate", "blocks": "all"},
            ValueError,
            r"blocks=\[0, 1, 2, 3\] are several: na",
        ),
        ((oracles.vector(),), {"site": "mlp"}, ValueError, "site='mlp': 'add' is baked at the site 'block' alone"),
        ((oracles.vector(site="attention"),), {}, ValueError, "site='attention': 'add' is baked at the site 'block'"),
        ((oracles.vector(),), {"edit": "ablate", "site": "mlp"}, ValueError, "site='mlp'.*'ablate' everywhere"),
        ((oracles.vector(),), {"blocks": 4}, IndexError, "Block 4 does not exist"),
        ((oracles.vector(d_model=33),), {}, ValueError, "d_model .33. and the model 32"),
        ((oracles.vector(),), {"blocks_at": "model.nowhere"}, ValueError, "is not a list of blocks"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    model: Any, arguments: tuple[Any, ...], how: dict[str, Any], kind: type[Exception], message: str
) -> None:
    before = state(model)
    with pytest.raises(kind, match=message):
        bake(model, *arguments, **how)
    assert state(model) == before


def test_a_steered_model_is_refused() -> None:
    model, vector = zoo.build("llama"), oracles.vector()
    with repe.steer(model, vector):
        logits(model, zoo.inputs("llama"))
        with pytest.raises(ValueError, match=r"something steers this model.*repe.detach"):
            bake(model, vector)
    bake(model, vector)


def test_an_adapter_must_be_merged_first() -> None:
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        lora = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
        prompt = peft.get_peft_model(zoo.build("llama"), prompts)
    for wrapped in (lora, lora.base_model.model, prompt):
        with pytest.raises(ValueError, match=r"adapter of PEFT: merge it first, model = model.merge_and_unload\(\)"):
            bake(wrapped, oracles.vector())
    bake(lora.merge_and_unload(), oracles.vector())


def quantised(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.to(torch.int32), requires_grad=False)


class Packed(nn.Parameter):
    """What stands for a weight where libraries quantise or shard it."""


@pytest.mark.parametrize("edit", ["add", "ablate"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (quantised, r"Parameter \(torch.int32, cpu\) and no plain weight"),
        (lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False), r"\(torch.float8_e4m3fn, cpu\)"),
        (lambda w: Packed(w), r"is a Packed \(torch.float32, cpu\) and no plain weight"),
        (lambda w: nn.Parameter(w.to("meta")), r"\(torch.float32, meta\) and no plain weight: load the model whole"),
    ],
)
def test_weights_that_are_not_plain_are_refused(
    kind: Callable[[Tensor], nn.Parameter], message: str, edit: str
) -> None:
    model = zoo.build("llama")
    projection = model.model.layers[BLOCK].mlp.down_proj
    projection.weight = kind(projection.weight.detach())
    places = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"down_proj.*{message}"):
        bake(model, oracles.vector(), edit=edit)
    assert {name: id(p) for name, p in model.named_parameters()} == places
    assert model.config.mlp_bias is False


def test_a_weight_that_serves_elsewhere_too_is_refused() -> None:
    model = zoo.build("gpt2")
    blocks = find_stack(model).blocks
    blocks[0].mlp.c_proj.bias = blocks[BLOCK].mlp.c_proj.bias
    with pytest.raises(ValueError, match=r"c_proj.bias is shared with another module"):
        bake(model, oracles.vector())
    model = zoo.build("gpt2")
    model.another = nn.Linear(zoo.D_MODEL, zoo.VOCABULARY)
    model.another.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"token embedding's weight is shared, and no setting"):
        bake(model, oracles.vector(), edit="ablate")


def test_biases_that_an_implementation_leaves_out_are_refused() -> None:
    model = variant("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ValueError, match="under pretraining_tp its projections leave their biases out"):
        bake(model, oracles.vector())
    bake(variant("bloom", slow_but_exact=True), oracles.vector())


def test_parts_that_are_not_known_are_refused() -> None:
    model = zoo.build("llama")
    for block in find_stack(model).blocks:
        block.mlp.inner_norm = nn.LayerNorm(zoo.D_MODEL)
    for edit in ("add", "ablate"):
        with pytest.raises(ValueError, match="comes out of LlamaMLP, and not of a projection"):
            bake(model, oracles.vector(), edit=edit)
    block.another = nn.LayerNorm(zoo.D_MODEL)
    with pytest.raises(ValueError, match="the arithmetic of its blocks, LlamaDecoderLayer, is not known"):
        bake(model, oracles.vector(), blocks=3)


@pytest.mark.parametrize("edit", ["add", "ablate"])
@pytest.mark.parametrize("weight", [0.5, nn.Parameter(torch.ones(zoo.D_MODEL))], ids=["number", "tensor"])
def test_blocks_that_weigh_what_they_add_are_refused(weight: Any, edit: str) -> None:
    model = zoo.build("llama")
    find_stack(model).blocks[BLOCK].layer_scale = weight
    with pytest.raises(ValueError, match="the arithmetic of its blocks, LlamaDecoderLayer, is not known"):
        bake(model, oracles.vector(), edit=edit)


def test_norms_behind_the_sum_cannot_be_ablated() -> None:
    model = variant("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match=A_NORM):
        bake(model, oracles.vector(), edit="ablate")


def test_a_vector_of_other_weights_warns() -> None:
    model, other = zoo.build("llama"), variant("llama")
    vector = oracles.vector()
    vector = type(vector)(**{**vars(vector), "provenance": {"fingerprint": fingerprint(other), "model": "other"}})
    with pytest.warns(UserWarning, match="extracted from other weights") as caught:
        bake(model, vector)
    assert caught[0].filename == __file__


def test_a_mixture_that_holds_more_than_its_experts_is_refused() -> None:
    sizes = {**zoo._LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=24))
    with pytest.raises(ValueError, match="comes out of Qwen2MoeSparseMoeBlock, and not of a projection"):
        bake(model, oracles.vector(), edit="ablate")


def test_experts_behind_which_a_norm_stands_are_refused() -> None:
    model = zoo.build("mixtral")
    find_stack(model).blocks[0].mlp.experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="comes out of MixtralSparseMoeBlock, and not of a projection"):
        bake(model, oracles.vector(), edit="ablate")


def test_experts_whose_weights_need_not_sum_to_1_are_refused() -> None:
    model = zoo.build("gpt_oss")
    for block in find_stack(model).blocks:
        block.mlp.router.__class__ = type("SigmoidRouter", (type(block.mlp.router),), {})
    with pytest.raises(ValueError, match=MIXTURE):
        bake(model, oracles.vector())


def test_weights_that_are_infinite_already_are_no_reason_to_refuse() -> None:
    model = zoo.build("gpt2")
    with torch.no_grad():
        find_stack(model).blocks[BLOCK].mlp.c_proj.bias[0] = torch.inf
    bake(model, oracles.vector())


def test_a_head_that_no_setting_unties_is_refused() -> None:
    class AlwaysTied(transformers.GPT2LMHeadModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head.weight = self.transformer.wte.weight

    with pytest.raises(ValueError, match=r"shared, and no setting of its config unties it alone"):
        bake(AlwaysTied(zoo.build("gpt2").config), oracles.vector(), edit="ablate")


def test_other_ties_than_the_heads_are_kept() -> None:
    model, others = zoo.build("gpt2"), {"another.bias": "transformer.ln_f.bias"}
    model.all_tied_weights_keys |= others
    with bake(model, oracles.vector(), edit="ablate"):
        assert model.all_tied_weights_keys == others


def test_undo_refuses_a_bias_of_0_in_another_dtype() -> None:
    model = zoo.build("llama")
    baked = bake(model, oracles.vector())
    model.model.layers[0].mlp.gate_proj.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="written to or moved"):
        baked.undo()


def test_a_setting_that_makes_other_than_the_biases_of_all_blocks_is_refused() -> None:
    class Patchy(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[3].mlp.down_proj = nn.Linear(48, zoo.D_MODEL, bias=False)

    class Growing(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if config.mlp_bias:
                self.more = nn.Linear(zoo.D_MODEL, zoo.D_MODEL)

    config = zoo.build("llama").config
    bake(Patchy(config), oracles.vector(), blocks=[0, 1]).undo()
    for kind in (Patchy, Growing):
        with pytest.raises(ValueError, match=NO_SETTING):
            bake(kind(config), oracles.vector(), blocks="all")


def test_tokens_that_are_embedded_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = zoo.build("llama"), nn.Embedding(zoo.VOCABULARY, zoo.D_MODEL)
    monkeypatch.setattr(type(model.model), "get_input_embeddings", lambda self: table)
    with pytest.raises(ValueError, match="more than embeddings writes to the stream before its blocks"):
        bake(model, oracles.vector(), edit="ablate")


def test_a_weight_of_another_shape_is_refused() -> None:
    model = zoo.build("llama")
    projection = model.model.layers[BLOCK].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.detach().flatten())
    with pytest.raises(ValueError, match=r"o_proj\.weight has the shape \(1024,\), and what it writes another than"):
        bake(model, oracles.vector(), edit="ablate")


AFTER_THE_SUM: dict[str, Make] = {
    "OpenAIGPT": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**zoo._GPT)),
    "Bart": lambda: transformers.BartForCausalLM(
        transformers.BartConfig(
            **zoo._IDS, d_model=zoo.D_MODEL, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48
        )
    ),
    "MiniMax": lambda: transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(**zoo._LLAMA, head_dim=8, num_local_experts=4, block_size=8)
    ),
}


@pytest.mark.parametrize("edit", ["add", "ablate"])
@pytest.mark.parametrize("make", AFTER_THE_SUM.values(), ids=AFTER_THE_SUM)
def test_norms_after_the_sum_are_not_overlooked_where_parts_are_named_as_elsewhere(make: Make, edit: str) -> None:
    with pytest.raises(ValueError, match=f"{A_NORM}|more than embeddings writes"):
        bake(make(), oracles.vector(), edit=edit)


def test_a_multiplier_is_known_in_blocks_like_granites_alone() -> None:
    model = zoo.build("granite")
    for block in find_stack(model).blocks:
        block.post_norm = nn.LayerNorm(zoo.D_MODEL)
    with pytest.raises(ValueError, match="the arithmetic of its blocks, GraniteDecoderLayer, is not known"):
        bake(model, oracles.vector())
