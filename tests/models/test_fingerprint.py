"""Fingerprints: the same weights are known in whatever form they are loaded, and no others are taken for them."""

import copy
import json
import warnings
from collections.abc import Callable

import accelerate
import gguf
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from repe.models.fingerprint import PARTS, agrees, fingerprint, nearness
from tests import ggufs, zoo

SOME = ["llama", "gpt2", "gemma3", "qwen3_moe", "mamba", "llava", "bert", "t5"]


def changed(model: nn.Module, relative: float) -> nn.Module:
    """The same model, trained a little further, as far as its numbers tell."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + relative * torch.randn(p.shape, generator=generator))
    return model


def other_seed(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(123)
        return zoo.FAMILIES[name]()


def sketch(**parts: dict) -> dict:
    return {"key": "k", "sketch": {part: {} for part in PARTS} | parts}


# the same


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_same_weights_agree_in_every_dtype_and_no_others_do(name):
    mine = fingerprint(zoo.build(name))
    assert sum(map(len, mine["sketch"].values())) > 4
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert agrees(mine, fingerprint(zoo.build(name).to(dtype)))
        assert nearness(mine, fingerprint(zoo.build(name).to(dtype))) > 0.995
    assert agrees(fingerprint(zoo.build(name).bfloat16()), fingerprint(zoo.build(name).half()))
    other = fingerprint(other_seed(name))
    assert not agrees(mine, other)
    assert nearness(mine, other) < 0.5
    assert not agrees(mine, fingerprint(changed(zoo.build(name), 1e-2)))
    assert json.loads(json.dumps(mine, allow_nan=False)) == mine


def rounded(model: nn.Module, levels: int, dim: int) -> nn.Module:
    """Every matrix to so many levels a row, or a column."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                step = p.abs().amax(dim, keepdim=True).clamp(min=1e-9) / (levels // 2 - 1)
                p.copy_((p / step).round() * step)
    return model


def in_blocks(model: nn.Module, kind: str) -> nn.Module:
    """Every matrix to what a GGUF file would hold of it."""
    quantised = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.shape[-1] % 32 == 0:
                p.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(p.numpy(), quantised), quantised)))
    return model


QUANTISATIONS: dict[str, tuple[Callable, float]] = {
    "Q8_0": (lambda model: in_blocks(model, "Q8_0"), 0.99),
    "Q5_1": (lambda model: in_blocks(model, "Q5_1"), 0.95),
    "Q4_1": (lambda model: in_blocks(model, "Q4_1"), 0.89),
    "Q4_0": (lambda model: in_blocks(model, "Q4_0"), 0.89),
    "8 bits a row": (lambda model: rounded(model, 256, -1), 0.98),
    "4 bits a row": (lambda model: rounded(model, 16, -1), 0.8),
    "4 bits a column": (lambda model: rounded(model, 16, -2), 0.8),
}


@pytest.mark.parametrize("how", QUANTISATIONS)
@pytest.mark.parametrize("name", SOME)
def test_a_quantised_model_is_the_same_and_says_how_near(name, how):
    quantise, near = QUANTISATIONS[how]
    plain, quantised = fingerprint(zoo.build(name)), fingerprint(quantise(zoo.build(name)))
    assert agrees(plain, quantised)
    assert agrees(quantised, plain)
    assert near < nearness(plain, quantised) == nearness(quantised, plain) < 1
    assert agrees(fingerprint(zoo.build(name).bfloat16()), fingerprint(quantise(zoo.build(name)).half()))
    assert not agrees(fingerprint(other_seed(name)), quantised)
    assert not agrees(plain, fingerprint(quantise(changed(zoo.build(name), 1e-2))))  # norms and biases tell


def test_a_model_of_a_gguf_file_is_the_one_that_was_quantised(tmp_path):
    from repe.models.load import load

    model, _ = load(ggufs.write(tmp_path / "toy.gguf", zoo.build("llama"), "Q4_0"))
    assert agrees(fingerprint(zoo.build("llama")), fingerprint(model))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_a_few_small_steps_of_training_are_enough_for_another(name, optimiser):
    model = zoo.build(name)
    before = fingerprint(model)
    steps = optimiser(model.parameters(), lr=1e-3)
    ids = torch.tensor([[5, 9, 17, 30]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
    for _ in range(3):
        model(**inputs).logits.log_softmax(-1)[..., 3].sum().backward()
        steps.step()
    after = fingerprint(model)
    assert not agrees(before, after)
    assert nearness(before, after) > 0.5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_moe", "mamba", "llava", "bert", "t5", "gpt_neox"])
def test_a_model_without_its_head_is_the_same(tmp_path, name):
    model = zoo.build(name)
    model.save_pretrained(tmp_path)
    bare = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(bare) is not type(model)
    assert agrees(fingerprint(model), fingerprint(bare))
    assert nearness(fingerprint(model), fingerprint(bare)) == 1
    assert len(fingerprint(bare)["sketch"]["matrices"]) > 3
    assert not agrees(fingerprint(changed(zoo.build(name), 1e-2)), fingerprint(bare))


@pytest.mark.parametrize("size", [zoo.VOCABULARY + 1, 4 * zoo.VOCABULARY, zoo.VOCABULARY // 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "t5"])
def test_a_resized_vocabulary_changes_nothing(name, size):
    model = zoo.build(name)
    before = fingerprint(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    after = fingerprint(model)
    assert after == before
    with torch.no_grad():
        model.get_input_embeddings().weight[32:48].add_(1)
    assert not agrees(fingerprint(model), before)


def test_a_head_of_its_own_is_left_out():
    model = zoo.build("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert fingerprint(model) == before


def test_norms_are_compared_closely_though_their_values_repeat():
    model = zoo.build("llama")
    norms = [p for p in model.parameters() if p.ndim == 1]
    with torch.no_grad():
        for p in norms:
            p.copy_((8 * p).round() / 8)
        before = fingerprint(model)
        for p in norms:
            p.mul_(1.02)
    assert not agrees(before, fingerprint(model))


def test_architectures_do_not_agree():
    keys = {fingerprint(zoo.build(name))["key"] for name in zoo.FAMILIES}
    assert len(keys) == len(zoo.FAMILIES)
    same_weights = {**fingerprint(zoo.build("llama")), "key": "another"}
    assert not agrees(same_weights, fingerprint(zoo.build("llama")))
    assert nearness(same_weights, fingerprint(zoo.build("llama"))) == 0


# what is around a model


class Wrapper(nn.Module):
    """What DDP does to names and attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_change_nothing():
    model = zoo.build("llama")
    mine = fingerprint(model)
    assert fingerprint(Wrapper(model)) == fingerprint(torch.compile(model, backend="aot_eager")) == mine
    assert fingerprint(torch.compile(Wrapper(model), backend="aot_eager")) == mine
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="aot_eager")
    assert fingerprint(model) == mine


def test_names_that_only_end_like_wrappers_are_kept():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.submodule = nn.Linear(3, 3)

    found = fingerprint(Model())
    assert [[*found["sketch"][part]] for part in PARTS] == [["submodule.bias"], ["submodule.weight"], []]
    assert found["key"].startswith("model-NonexNone-")


def lora(model: nn.Module, name: str = "default", seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **options)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    return wrapped(model, config, adapter_name=name)


def wrapped(model: nn.Module, config: peft.PeftConfig, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        return peft.get_peft_model(model, config, **options)


def test_which_adapter_acts_is_part_of_a_fingerprint():
    plain = fingerprint(zoo.build("llama"))
    model = lora(lora(zoo.build("llama"), "one", 1), "two", 2)
    one = fingerprint(model)
    model.set_adapter("two")
    two = fingerprint(model)
    with model.disable_adapter():
        assert fingerprint(model) == plain
    for a, b in ((plain, one), (plain, two), (one, two)):
        assert not agrees(a, b)
        assert not agrees(b, a)
        assert nearness(a, b) < 0.5
    assert one["sketch"]["matrices"] == plain["sketch"]["matrices"]
    assert fingerprint(lora(zoo.build("llama"), "another name", 2)) == two
    assert agrees(two, fingerprint(lora(zoo.build("llama"), "two", 2).bfloat16()))
    assert not agrees(two, fingerprint(lora(changed(zoo.build("llama"), 1e-2), "two", 2)))
    model.base_model.set_adapter(["one", "two"])
    assert not agrees(fingerprint(model), one)
    assert not agrees(fingerprint(model), two)


def test_whole_modules_of_an_adapter_are_part_of_it():
    plain = zoo.build("llama")
    model = lora(zoo.build("llama"), modules_to_save=["norm"])
    before = fingerprint(model)
    assert agrees(before, fingerprint(lora(zoo.build("llama"), modules_to_save=["norm"])))
    assert before["sketch"]["scales"] == fingerprint(plain)["sketch"]["scales"]
    with model.disable_adapter():
        assert fingerprint(model) == fingerprint(plain)


ADAPTERS = {
    "ADALORA": {"init_r": 2, "total_step": 10, "target_modules": ["q_proj", "v_proj"]},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "IA3": {"target_modules": ["v_proj"], "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "LORA": {"r": 2, "target_modules": ["q_proj"], "use_dora": True, "trainable_token_indices": [9]},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "TRAINABLE_TOKENS": {"token_indices": [9, 10], "target_modules": ["embed_tokens"]},
    "VERA": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}


def trained(kind: str, seed: int) -> nn.Module:
    """A model with an adapter of one of PEFT's kinds, whose numbers are others for every seed."""
    torch.manual_seed(seed)
    model = wrapped(zoo.build("llama"), peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **ADAPTERS[kind]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_any_kind_is_part_of_a_fingerprint_while_it_acts(kind):
    plain, model = fingerprint(zoo.build("llama")), trained(kind, 1)
    mine = fingerprint(model)
    assert not agrees(mine, plain)
    assert not agrees(mine, fingerprint(trained(kind, 2)))
    assert agrees(mine, fingerprint(trained(kind, 1).bfloat16()))
    with model.disable_adapter():
        assert fingerprint(model) == plain
    assert fingerprint(model) == mine


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.scaling.update(default=0.7),
        lambda layer: layer.lora_B["default"].weight.data[:8].neg_(),
        lambda layer: layer.enable_adapters(False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_of_an_adapter_tells_it_from_another(change, dtype):
    """Which layers are sampled must not decide whose vector is found."""
    everywhere = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = wrapped(zoo.build("llama"), peft.LoraConfig(r=2, init_lora_weights=False, **everywhere)).to(dtype)
    layers = [m for m in model.base_model.model.model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    before = fingerprint(model)
    for layer in (layers[0], layers[-5]):
        state = copy.deepcopy(layer)
        change(layer)
        assert not agrees(before, fingerprint(model))
        layer.__dict__.update(state.__dict__)
        assert fingerprint(model) == before


def test_what_is_off_and_still_merged_into_the_weights_is_a_model_of_its_own():
    """The next forward takes it out again."""
    plain, merged = fingerprint(zoo.build("llama")), lora(zoo.build("llama"))
    merged.merge_adapter()
    with merged.disable_adapter():
        off = fingerprint(merged)
        merged(input_ids=torch.tensor([[5]]))
        assert nearness(fingerprint(merged), plain) > 0.9999
    for other in (
        plain,
        fingerprint(lora(zoo.build("llama"))),
        fingerprint(lora(zoo.build("llama")).merge_and_unload()),
    ):
        assert not agrees(off, other)


@pytest.mark.parametrize("name", ["weight", "lora_A", "layers", "0"])
def test_what_an_adapter_is_called_says_nothing(name):
    assert fingerprint(lora(lora(zoo.build("llama"), name), "another", 2)) == fingerprint(lora(zoo.build("llama")))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # peft's own
def test_adapters_that_transformers_itself_loads_are_those_of_peft():
    model, plain = zoo.build("llama"), fingerprint(zoo.build("llama"))
    for seed, name in enumerate(["one", "two"]):
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False), name)
    for seed, name in enumerate(["one", "two"]):
        model.set_adapter(name)
        assert fingerprint(model) == fingerprint(lora(zoo.build("llama"), seed=seed))
    model.disable_adapters()
    assert fingerprint(model) == plain


# what is left to compare


@pytest.mark.parametrize("how", ["cpu", "disk", "parts"])
def test_offloaded_weights_are_known_as_those_they_are(how, tmp_path):
    """Two models of one shape, all of whose weights are elsewhere, would else be taken for each other."""
    cpu = torch.device("cpu")

    def offloaded(model: nn.Module, folder: str) -> nn.Module:
        if how == "cpu":
            return accelerate.cpu_offload(model, execution_device=cpu)
        if how == "disk":
            return accelerate.disk_offload(model, tmp_path / folder, execution_device=cpu)
        places = {"model.layers.1": "disk", "model.norm": "disk", "model.layers.3.mlp": "disk"}
        names = [name for name, m in model.named_modules() if not [*m.children()]]
        device_map = {
            name: next((to for place, to in places.items() if name.startswith(place)), "cpu") for name in names
        }
        return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / folder)

    mine = fingerprint(offloaded(zoo.build("llama"), "mine"))
    assert mine == fingerprint(zoo.build("llama"))
    assert not agrees(mine, fingerprint(offloaded(changed(zoo.build("llama"), 1e-2), "theirs")))


def test_what_cannot_be_sampled_is_left_out():
    model = zoo.build("llama")
    model.model.embed_tokens.to("meta")
    found = fingerprint(model)["sketch"]["matrices"]
    assert found
    assert "embed_tokens.weight" not in found
    assert "embed_tokens.weight" in fingerprint(zoo.build("llama"))["sketch"]["matrices"]


@pytest.mark.parametrize(
    "data",
    [
        None, [], 3, "k", {}, {"key": "k"}, {"sketch": {}}, {"key": "k", "sketch": []},
        {"key": "k", "sketch": {"w": [0.1]}},  # of version 0.1.0
        sketch(matrices=3), sketch(matrices={"w": 3}), sketch(matrices={"w": [["1"]]}), sketch(scales={"w": [1.0]}),
        sketch(matrices={"w": [[None]]}), sketch(matrices={"w": []}), sketch(matrices={"w": [[float("nan")]]}),
        {"sketch": sketch()["sketch"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_fingerprint_agrees_with_none(data):
    good = sketch(matrices={"w": [[1.0]]})
    assert agrees(good, good)
    for one, other in ((data, good), (good, data)):
        assert not agrees(one, other)
        assert nearness(one, other) == 0


def test_models_of_one_kind_that_can_both_not_be_sampled_agree():
    assert agrees(sketch(), sketch())
    assert not agrees(sketch(), {**sketch(), "key": "another"})
    assert not agrees(sketch(), sketch(matrices={"w": [[1.0]]}))


def test_two_shared_tensors_are_enough_to_compare_and_one_is_not():
    full = sketch(matrices={name: [[1.0, 2.0]] for name in "abcdefgh"})
    for names, agree in (("ab", True), ("bcd", True), ("a", False), ("", False)):
        partial = sketch(matrices={name: [[1.0, 2.0]] for name in names})
        assert agrees(full, partial) == agrees(partial, full) == agree
    assert not agrees(full, sketch(matrices={"a": [[1.0, 2.0]], "b": [[1.0, 3.0]]}))


def packed(model: nn.Module) -> nn.Module:
    """As bitsandbytes leaves a model in 4 bits: every linear layer but the head holds packed bytes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            bits = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = nn.Parameter(bits, requires_grad=False)
    return model


def test_a_packed_model_is_known_by_what_is_left_of_it():
    plain, four_bits = fingerprint(zoo.build("llama")), fingerprint(packed(zoo.build("llama")))
    assert [*four_bits["sketch"]["matrices"]] == ["embed_tokens.weight"]
    assert agrees(plain, four_bits)
    assert agrees(four_bits, four_bits)
    assert not agrees(plain, fingerprint(packed(changed(zoo.build("llama"), 1e-2))))


def test_a_deep_model_is_sampled_at_every_kind_of_matrix():
    config = copy.deepcopy(zoo.build("llama").config)
    config.num_hidden_layers = 32
    found = fingerprint(LlamaForCausalLM(config))["sketch"]
    names = [name.split(".") for name in found["matrices"]]
    assert names[0] == ["embed_tokens", "weight"]
    assert all("norm" in name for name in found["scales"])
    assert len({name[3] for name in names[1:]}) == 7
    assert len({name[1] for name in names[1:]}) >= 10
