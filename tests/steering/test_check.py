"""The check of a model finds the zoo as the library believes it to be, and whatever is wrong in an entry."""

import dataclasses
from typing import Any

import pytest
import torch

import repe
from repe.models import Family, families
from repe.models.blocks import find_stack
from repe.steering.check import Findings, check
from tests import zoo
from tests.steering.test_bake import CANNOT_ABLATE, CANNOT_ADD, VARIANTS, state

NORMS_BETWEEN = {"bert", "roberta", "distilbert", "bart"}
CANNOT = {
    "sites": {"granite", "opt", *NORMS_BETWEEN},
    "trees": {"bloom", "mpt", "mamba", *zoo.ENCODERS, *zoo.ENCODER_DECODERS},
    "add": set(CANNOT_ADD),
    "ablate": set(CANNOT_ABLATE),
}
STACKS = [(name, "decoder") for name in zoo.FAMILIES] + [(name, "encoder") for name in zoo.ENCODER_DECODERS]


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_the_zoo_is_what_it_is_believed_to_be(name: str, stack: str) -> None:
    found = check(zoo.build(name), stack=stack)
    assert found.wrong == {}
    assert set(found.refused) == {what for what, names in CANNOT.items() if name in names}
    assert {*found.exact, *found.refused} == set(CANNOT)
    assert found.family == find_stack(zoo.build(name), stack).family(0).name


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_wrong_under_other_settings(variant: str) -> None:
    assert check(VARIANTS[variant][0]()).wrong == {}


def test_a_model_is_left_as_it_was() -> None:
    model = zoo.build("gemma").train()
    before = state(model)
    check(model)
    assert state(model) == before
    assert all(module.training for module in model.modules())
    assert repe.status(model) == []


def test_what_was_found_is_shown() -> None:
    assert str(check(repe.load()[0])) == ("family 'llama'\nsites   exact\ntrees   exact\nadd     exact\nablate  exact")
    found = Findings("mine", ("sites",), {"add": "it has no bias"}, {"trees": "they differ by 2"})
    assert str(found) == "family 'mine'\nsites  exact\nadd    refused: it has no bias\ntrees  WRONG: they differ by 2"


# an entry that is wrong


def entered(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """The entry of a family, changed; under a new name it is one more."""
    (entry,) = (family for family in families.known_families() if family.name == name)
    others = [family for family in families.known_families() if family is not entry]
    monkeypatch.setattr(families, "_FAMILIES", [dataclasses.replace(entry, **changes), *others])


@pytest.mark.parametrize(
    ("model", "family", "changes", "wrong"),
    [
        ("llama", "llama", {"mlp": "post_attention_layernorm"}, "sites"),
        ("llama", "llama", {"attention": "mlp", "mlp": "self_attn.q_proj"}, "sites"),
        ("gemma2", "gemma2", {"attention": "self_attn", "mlp": "mlp"}, "sites"),
        ("gemma2", "gemma2", {"attention": "self_attn", "mlp": "mlp"}, "ablate"),
        ("bert", "bert", {"closing_norm": "", "types": ("bert",)}, "sites"),
        ("bert", "bert", {"closing_norm": "", "types": ("bert",)}, "add"),
    ],
)
def test_an_entry_that_tells_of_another_arithmetic_is_wrong(
    monkeypatch: pytest.MonkeyPatch, model: str, family: str, changes: dict[str, Any], wrong: str
) -> None:
    entered(monkeypatch, family, **changes)
    assert "differ by" in check(zoo.build(model)).wrong[wrong]


@pytest.mark.parametrize("name", ["bloom", "mpt", "mamba"])
def test_a_type_that_is_not_exact_on_trees_is_wrong(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    by_mistake = Family("by mistake", types=(name,), trees=True)
    monkeypatch.setattr(families, "_FAMILIES", [*families.known_families(), by_mistake])
    monkeypatch.setattr(families, "LAYER_TYPES", {*families.LAYER_TYPES, "linear_attention"})
    assert set(check(zoo.build(name)).wrong) == {"trees"}


def test_a_bias_that_the_mlp_would_read_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parallel block's attention may carry the edit, another's may not."""
    entered(monkeypatch, "llama", parallel=True, bias_settings=("attention_bias",))
    assert set(check(zoo.build("llama")).wrong) == {"add"}


def test_a_model_that_does_not_run_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="shape"):
        check(model)
    with pytest.raises(ValueError, match="no list fits"):
        check(torch.nn.Linear(2, 2))
