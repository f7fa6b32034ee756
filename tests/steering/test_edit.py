"""The edit as a value: equal by content, the same in every process, and refused where `steer` refuses it."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import repe
from repe.steering.edit import Edit, EditOptions
from repe.steering.kinds import KINDS, UNITS, loreft, options_of
from repe.steering.steer import edit_of, steer
from tests import oracles, zoo


class Dimensions(NamedTuple):
    d_model: int = zoo.D_MODEL
    n_blocks: int = zoo.N_BLOCKS


SHAPE = Dimensions()
NEEDED = {"target": 0.5, "theta": 0.3}


def edit(kind: str = "add", **options: Any) -> Edit:
    vectors = [oracles.vector(1), oracles.vector(2)] if kind in ("rotate", "angle") else oracles.vector(1)
    needed = {name: value for name, value in NEEDED.items() if name in options_of(kind)}
    return Edit.of(vectors, edit=kind, **needed | options)


scopes = st.one_of(
    st.sampled_from(["all", "prompt", "generated", "answer"]),
    st.lists(st.integers(-9, 9), min_size=1),
    st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(1, 3)),
    st.lists(st.booleans(), min_size=1, max_size=4).map(lambda row: torch.tensor([row])),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "scope": scopes,
        "blocks": st.sampled_from(["auto", "all", 2, -1, [0, 3], slice(1, 3)]),
        "keep_norm": st.booleans(),
        "gate": st.sampled_from(
            [None, repe.Gate(oracles.vector(5), 0.5, block=0), repe.Gate(oracles.vector(5), 1.5, block=0)]
        ),
    },
)


@given(st.sampled_from([*KINDS]), options)
def test_json_makes_the_same_edit_again(kind: str, chosen: dict[str, Any]) -> None:
    made = edit(kind, **chosen)
    again = Edit.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert hash(again) == hash(made)
    assert again.key() == made.key()
    placed, replaced = made.on(SHAPE), again.on(SHAPE)
    assert placed.blocks == replaced.blocks
    for block in placed.blocks:
        for one, other in zip(placed.constants[block].tensors, replaced.constants[block].tensors, strict=True):
            assert torch.equal(one, other)


def test_bare_constants_come_back_from_json() -> None:
    constants = loreft(torch.eye(zoo.D_MODEL)[:2], torch.ones(2, zoo.D_MODEL), torch.ones(2))
    made = Edit.of(constants, blocks=1)
    assert Edit.from_json(json.loads(json.dumps(made.to_json()))) == made


@given(options, options)
def test_edits_are_equal_where_they_do_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = json.dumps(edit(**one).to_json()) == json.dumps(edit(**other).to_json())
    assert (edit(**one) == edit(**other)) is same
    assert (edit(**one).key() == edit(**other).key()) is same


@pytest.mark.parametrize(
    "change", [{"write": -1}, {"read": -1}, {"scale": 2}, {"center": 2}, {"sigma": 2}, {"norm": 2}], ids=str
)
def test_the_key_changes_with_all_that_steering_depends_on(change: dict[str, float]) -> None:
    vector = oracles.vector(1)
    tensors = {name: getattr(vector, name) * factor for name, factor in change.items()}
    if "write" in change or "read" in change:
        tensors = {"write": -vector.write, "read": -vector.read}
    moved = Edit.of(replace(vector, **tensors))
    assert moved.key() != Edit.of(vector).key()
    assert moved != Edit.of(vector)


def test_what_steering_does_not_depend_on_changes_no_key() -> None:
    vector = oracles.vector(1)
    told = replace(vector, concept="else", provenance={"made": "elsewhere"}, accuracy=0 * vector.scale)
    assert Edit.of(told).key() == Edit.of(vector).key()


def test_the_key_is_the_same_in_every_process() -> None:
    code = (
        "import torch; from tests.steering.test_edit import edit;"
        "print(edit('cap', scope=[1, -2], blocks=[0, 3], keep_norm=True).key())"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in "12"
    }  # fmt: skip
    assert keys == {edit("cap", scope=[1, -2], blocks=[0, 3], keep_norm=True).key()}


def test_a_gate_of_a_function_has_no_name_but_is_equal_to_itself() -> None:
    def gate(mean: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return last[:, 0] > 0

    assert edit(gate=gate) == edit(gate=gate)
    assert edit(gate=gate) != edit()
    assert len({edit(gate=gate), edit(gate=gate)}) == 1
    for name in ("key", "to_json"):
        with pytest.raises(ValueError, match=r"cannot be told of a function: pass a `repe\.Gate`"):
            getattr(edit(gate=gate), name)()


def test_an_edit_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        edit().scope = "prompt"  # type: ignore[misc]


# the same refusals with and without a model


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"scope": "promt"}, ValueError, "scope='promt' is not known"),
        ({"edit": "ablat"}, ValueError, "did you mean 'ablate'"),
        ({"blocks": 4}, IndexError, "Block 4 does not exist"),
        ({"blocks": []}, IndexError, "names none of this model's 4 blocks"),
        ({"blocks": "some"}, TypeError, "Blocks are an int, ints, a slice"),
        ({"site": "mlp"}, ValueError, "does not hold at 'mlp'"),
        ({"edit": "clamp"}, ValueError, "edit='clamp' needs target=, the score to set"),
        ({"gate": 3}, TypeError, "a gate is a `repe.Gate` or a function"),
        ({"gate": repe.Gate(oracles.vector(5), block=2)}, ValueError, "after the first edit"),
    ],
    ids=str,
)
def test_an_edit_is_refused_without_a_model_as_steering_refuses_it(wrong: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        Edit.of(oracles.vector(1), **wrong).on(SHAPE)
    model = zoo.build("llama")
    with pytest.raises(error, match=match):
        repe.steer(model, oracles.vector(1), **wrong)
    assert repe.status(model) == []


@pytest.mark.parametrize(
    ("name", "near"), [("scoep", "scope"), ("block", "blocks"), ("keepnorm", "keep_norm"), ("units", "unit")]
)
def test_a_wrong_option_is_a_type_error_that_names_the_near_one(name: str, near: str) -> None:
    model = zoo.build("llama")
    for call in (partial(repe.steer, model), Edit.of):
        with pytest.raises(TypeError, match=f"an edit has no option '{name}' .did you mean '{near}'"):
            call(oracles.vector(1), **{name: 1})
    assert repe.status(model) == []


def test_a_whole_edit_is_steered_along_as_its_options_are() -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    chosen = {"scope": "prompt", "blocks": [0, 2], "unit": "raw"}
    with repe.steer(model, oracles.vector(1), 2.0, **chosen) as handle:
        expected, made = model(**batch).logits, handle.edit
    with repe.steer(model, made, 2.0):
        assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(TypeError, match="an Edit holds its options: leave out scope"):
        repe.steer(model, made, 2.0, scope="all")
    assert edit_of(model, oracles.vector(1), **chosen) == made


def test_the_door_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(steer).parameters
    assert shown.keys() >= EditOptions.__annotations__.keys()
    assert "options" not in shown
    spelt = {name: shown[name].default for name in EditOptions.__annotations__}
    assert Edit.of(oracles.vector(1), **spelt) == Edit.of(oracles.vector(1))


# what each of the lists says


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_taken_by_edits_with_a_length(unit: str) -> None:
    assert edit("add", unit=unit).on(SHAPE).lengths.keys() == {1}
    assert edit("ablate").on(SHAPE).lengths == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_edit_along_another_vector(kind: str) -> None:
    made, count = edit(kind, scope="answer"), len(edit(kind).vectors)
    others = [oracles.vector(seed) for seed in range(7, 7 + count)]
    moved = made.along(*others)
    assert (moved.kind, moved.scope, moved.vectors) == (kind, "answer", tuple(others))
    with pytest.raises(ValueError, match=f"this edit has {count} vectors, and got {count + 1} in their place"):
        made.along(*others, others[0])
    with pytest.raises(ValueError, match="do not belong to one model and site"):
        made.along(*[oracles.vector(7, site="mlp")] * count)


def test_an_edit_stays_what_it_is_when_the_mask_it_was_made_of_changes() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    edit = Edit.of(oracles.vector(), scope=mask)
    key = edit.key()
    mask[0, 0] = False
    assert edit == Edit.of(oracles.vector(), scope=torch.ones(2, 3, dtype=torch.bool))
    assert edit.key() == key
    empty = Edit.of(oracles.vector(), scope=torch.ones(0, 3, dtype=torch.bool))
    assert Edit.from_json(json.loads(json.dumps(empty.to_json()))) == empty


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_any_library_make_the_same_edit(number: Any) -> None:
    vector = oracles.vector()
    for made, plain in (
        (Edit.of(vector, edit="clamp", target=number), Edit.of(vector, edit="clamp", target=0.5)),
        (
            Edit.of(vector, gate=repe.Gate(vector, threshold=number)),
            Edit.of(vector, gate=repe.Gate(vector, threshold=0.5)),
        ),
    ):
        assert made == plain
        assert Edit.from_json(json.loads(json.dumps(made.to_json()))) == plain


def test_what_is_no_number_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"target='high' must be a number, the score to set"):
        Edit.of(oracles.vector(), edit="clamp", target="high")
