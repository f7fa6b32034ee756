"""Families: the table fits the models it names, and a family that a user registers is known to all of the library."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import repe
from repe.models import Family, known_families, register
from repe.models.blocks import find_stack
from repe.models.families import UNKNOWN, family_of, types_on_trees
from repe.reading.trees import obstacle
from tests import oracles, zoo

# the table

IN_THE_ZOO = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral", "qwen3_moe", "granite", "starcoder2"),
        "llama",
    ),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2"), "gemma2"),
    **dict.fromkeys(("phi", "cohere"), "cohere"),
    **dict.fromkeys(("gpt2", "gptj", "modernbert"), "gpt2"),
    **dict.fromkeys(("falcon", "bloom"), "falcon"),
    **dict.fromkeys(("bert", "roberta"), "bert"),
    **dict.fromkeys(("stablelm", "llava"), "llama"),
}
NEEDED = {  # by a config whose defaults make no model
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_blocks_of_the_zoo_are_told_by_their_parts(name: str) -> None:
    stack = find_stack(zoo.build(name))
    assert {stack.family(block).name for block in range(stack.n_blocks)} == {IN_THE_ZOO.get(name, name)}


@pytest.mark.filterwarnings("ignore")  # of configs at their defaults
@pytest.mark.parametrize(("name", "model_type"), [(f.name, t) for f in known_families() if f.parts for t in f.types])
def test_the_blocks_of_a_type_have_the_parts_of_its_family(name: str, model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **NEEDED.get(model_type, {}))
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stack = find_stack(model)
    assert [stack.family(block).name for block in range(stack.n_blocks)] == [name] * stack.n_blocks
    for block in range(stack.n_blocks):
        assert all(isinstance(module, nn.Module) for module in find_paths(stack, block))


def find_paths(stack: Any, block: int) -> Iterator[Any]:
    family = stack.family(block)
    for path in (family.attention, family.mlp, family.closing_norm):
        if path:
            yield stack.blocks[block].get_submodule(path)


def test_a_type_comes_before_parts_and_what_is_neither_is_unknown() -> None:
    parts = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    assert [family_of(t, parts).name for t in ("llama", "unheard_of", None, "minimax")] == [*["llama"] * 3, "minimax"]
    assert family_of("llama", parts | {"another"}) is UNKNOWN
    opt = frozenset({"self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"})
    assert [family_of(t, opt).name for t in ("opt", "unheard_of")] == ["opt", "bart"]


def test_the_table_needs_no_torch() -> None:
    code = "import sys, repe.models; repe.models.known_families(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# an architecture that nobody has heard of


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, depth: int = 4, has_bias: bool = False, **more: Any) -> None:
        self.depth, self.hidden_size, self.vocab_size, self.has_bias = depth, zoo.D_MODEL, zoo.VOCABULARY, has_bias
        super().__init__(**more)


class Mixing(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ask, self.answer, self.carry = (nn.Linear(d_model, d_model) for _ in range(3))
        self.give = nn.Linear(d_model, d_model, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = self.ask(hidden) @ self.answer(hidden).mT / hidden.shape[-1] ** 0.5
        return self.give((scores + mask).softmax(-1) @ self.carry(hidden))


class Feeding(nn.Module):
    def __init__(self, d_model: int, has_bias: bool) -> None:
        super().__init__()
        self.take, self.give = nn.Linear(d_model, 48), nn.Linear(48, d_model, bias=has_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.give(self.take(hidden).relu())


class ToyBlock(nn.Module):
    def __init__(self, d_model: int, has_bias: bool) -> None:
        super().__init__()
        self.mixing, self.feeding = Mixing(d_model), Feeding(d_model, has_bias)
        self.calm, self.calmer = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.mixing(self.calm(hidden), mask)
        return hidden + self.feeding(self.calmer(hidden))


class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words, self.places = nn.Embedding(config.vocab_size, zoo.D_MODEL), nn.Embedding(64, zoo.D_MODEL)
        self.steps = nn.ModuleList([ToyBlock(zoo.D_MODEL, config.has_bias) for _ in range(config.depth)])
        self.calmest = nn.LayerNorm(zoo.D_MODEL)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (seen.cumsum(-1) - 1).clamp_min(0) if position_ids is None else position_ids
        if seen.ndim == 2:
            length = input_ids.shape[1]
            visible = (torch.ones(length, length).tril() * seen[:, None, :] + torch.eye(length)) > 0
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        else:
            mask = seen[:, 0]
        hidden = self.words(input_ids) + self.places(places)
        for step in self.steps:
            hidden = step(hidden, mask)
        return self.calmest(hidden)


FAMILY = Family(
    "toy", types=("toy",), parts=("mixing feeding calm calmer",), attention="mixing", mlp="feeding",
    last=("give",), final_norms=("calmest",), bias_settings=("has_bias",), trees=True,
)  # fmt: skip
TEXTS = ["the quick brown " + end for end in ("fox", "fox jumps", "dog", "d", "")] + ["the lazy dog"]


@pytest.fixture
def toy() -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Toy(ToyConfig()).eval()
        zoo._widen(model)
    return model


def what_is_refused(model: Any) -> list[str]:
    refused = []
    for what, call in {
        "attention": lambda: find_stack(model).site("attention", 0),
        "mlp": lambda: find_stack(model).site("mlp", 0),
        "trees": lambda: repe.capture(model, zoo.tokenizer(), TEXTS, packed=True),
        "add": lambda: repe.bake(model, oracles.vector()).undo(),
        "ablate": lambda: repe.bake(model, oracles.vector(), edit="ablate").undo(),
    }.items():
        try:
            call()
        except ValueError:
            refused.append(what)
    return refused


EVERYTHING = ["attention", "mlp", "trees", "add", "ablate"]


def test_what_is_registered_is_known_everywhere_until_it_is_taken_back(toy: Toy) -> None:
    before = known_families()
    assert what_is_refused(toy) == EVERYTHING
    with register(FAMILY) as registration:
        assert registration.family is FAMILY
        assert what_is_refused(toy) == []
    assert what_is_refused(toy) == EVERYTHING
    handle = register(FAMILY)
    assert what_is_refused(toy) == []
    handle.remove()
    handle.remove()
    assert what_is_refused(toy) == EVERYTHING
    assert known_families() == before


@pytest.fixture
def registered() -> Iterator[None]:
    with register(FAMILY):
        yield


def batch() -> dict[str, Tensor]:
    return zoo.inputs("toy")


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model(**batch())[batch()["attention_mask"].bool()]


@pytest.mark.usefixtures("registered")
def test_the_sites_of_a_registered_family_sum_to_the_stream(toy: Toy) -> None:
    stack = find_stack(toy)
    assert stack.site("attention", 1) is toy.steps[1].mixing
    modules = [stack.blocks[0], stack.site("attention", 1), stack.site("mlp", 1), stack.blocks[1]]
    before, attention, mlp, after = oracles.recorded(toy, modules, **batch())
    torch.testing.assert_close(before + attention + mlp, after)


@pytest.mark.usefixtures("registered")
def test_trees_of_a_registered_family_are_exact(toy: Toy) -> None:
    assert obstacle(toy) == ""
    packed, padded = (repe.capture(toy, zoo.tokenizer(), TEXTS, packed=packed) for packed in (True, False))
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("registered")
def test_a_registered_family_is_baked_exactly(toy: Toy) -> None:
    with repe.steer(toy, oracles.vector(), 0.7):
        expected = output(toy)
    with repe.bake(toy, oracles.vector(), 0.7) as baked:
        assert "config.has_bias" in baked.changed
        torch.testing.assert_close(output(toy), expected, atol=1e-4, rtol=1e-4)
    with repe.bake(toy, oracles.vector(), edit="ablate"):
        left = torch.stack(oracles.recorded(toy, toy.steps, **batch())) @ oracles.vector().read[1]
    torch.testing.assert_close(left, torch.zeros_like(left), atol=2e-5, rtol=0)


def test_a_class_is_decorated_and_stays_as_it_is() -> None:
    registration = register(FAMILY)
    assert registration(Toy) is Toy
    registration.remove()

    class Other(Toy):
        config_class = type("OtherConfig", (ToyConfig,), {"model_type": "other"})

    before = known_families()
    with pytest.raises(ValueError, match=r"'toy' is for the model types .'toy',., and Other has the type 'other'"):
        register(FAMILY)(Other)
    assert known_families() == before


def test_types_that_are_exact_on_trees_are_registered_alone() -> None:
    with register(Family("as others", types=("bloom",), trees=True)):
        assert "bloom" in types_on_trees()
        assert find_stack(zoo.build("bloom")).family(0).name == "falcon"
    assert "bloom" not in types_on_trees()


def test_a_type_can_be_told_from_others_of_the_same_parts(toy: Toy) -> None:
    model = zoo.build("bloom")
    (falcon,) = (family for family in known_families() if family.name == "falcon")
    mine = dataclasses.replace(falcon, name="bloom", types=("bloom",), by_parts=False, without={"bake": "it is mine"})
    with register(mine), pytest.raises(ValueError, match="BloomForCausalLM cannot be baked exactly: it is mine"):
        repe.bake(model, oracles.vector())
    repe.bake(model, oracles.vector())


# what cannot be meant


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"name": "llama"}, ValueError, "there is a family 'llama' already: choose another name"),
        (
            {"attention": "attn"},
            ValueError,
            r"'toy': attention='attn' is not in all of its parts=.'mixing f",
        ),
        ({"mlp": "feeding2.give"}, ValueError, "mlp='feeding2.give' is not in all of its parts"),
        ({"parts": ("mixing feeding", "mixing")}, ValueError, "mlp='feeding' is not in all of its parts"),
        ({"parts": ()}, ValueError, r"attention='mixing' is not in all of its parts=\(\)"),
        ({"closing_norm": "norm"}, ValueError, "closing_norm='norm' is not in all of its parts"),
        ({"types": "toy"}, TypeError, r"types='toy' is one string, and a tuple is expected: \('toy',\)"),
        ({"parts": "mixing feeding"}, TypeError, "parts='mixing feeding' is one string, and a tuple is expected"),
        ({"types": ()}, ValueError, "would hold for no model: name its types=, or its parts= and by_parts=True"),
        ({"without": {"head": "?"}}, ValueError, r"without=.'head'. is not known: say it of 'attention', 'mlp' or 'b"),
        (
            {"types": ("gpt2",), "parts": ("mlp attn ln_2 ln_1",), "attention": "attn", "mlp": "mlp"},
            ValueError,
            "the family 'gpt2' says what blocks of 'attn ln_1 ln_2 mlp' do in models of type 'gpt2'",
        ),
        (
            {"parts": ("attn ln_1 ln_2 mlp",), "by_parts": True, "attention": "attn", "mlp": "mlp"},
            ValueError,
            "the family 'gpt2' says already what blocks of 'attn ln_1 ln_2 mlp' do in any model: leave out by_parts=",
        ),
    ],
)
def test_an_entry_that_cannot_be_meant_is_refused(changes: Any, kind: type[Exception], message: str) -> None:
    before = known_families()
    with pytest.raises(kind, match=message):
        register(dataclasses.replace(FAMILY, **changes))
    assert known_families() == before


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a Family, got 'toy'"):
        register("toy")  # type: ignore[arg-type]


def test_a_part_that_a_block_does_not_have_is_an_error_that_names_the_entry(toy: Toy) -> None:
    wrong = dataclasses.replace(FAMILY, attention="mixing.giving")
    with register(wrong):
        message = "no site 'attention': it has no part 'mixing.giving', of which the family 'toy' tells"
        with pytest.raises(ValueError, match=message):
            find_stack(toy).site("attention", 0)
        with pytest.raises(ValueError, match=r"cannot be baked exactly: it has no part 'mixing.giving'"):
            repe.bake(toy, oracles.vector())


# the page that says how

PAGE = (Path(repe.__file__).parents[1] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs_and_makes_the_model_known(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    before, names = known_families(), {"model": toy}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    first, second = re.findall(r"family .*\n" + 3 * r".*\n" + ".*", capsys.readouterr().out)
    assert first.count("refused") == 4
    assert second.count("exact") == 4
    assert known_families() == before


def test_the_page_tells_of_every_field() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.split("## The fields")[1], re.MULTILINE)
    assert re.findall(r"\w+", " ".join(rows)) == [field.name for field in dataclasses.fields(Family)]
