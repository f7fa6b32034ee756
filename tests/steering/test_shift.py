"""The short way of the simplest edit is the long way to the last bit, and is taken where it may be and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import repe
from repe.models.tracking import Attachment
from repe.ops import may_be_probed
from repe.ops.reference import may_write_out
from repe.steering import handle as handle_file
from tests import oracles, zoo

BLOCKS = [1, 2]


@pytest.fixture
def model() -> Any:
    return zoo.build("llama")


def vector_of(seed: int = 0) -> repe.ConceptVector:
    return oracles.vector(seed)


@pytest.fixture
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every time that the short way was taken, in any dtype."""
    taken: list[None] = []
    plain = repe.Steering.shift

    def counting(self: Any, hidden: Tensor, block: int) -> Tensor | None:
        added = plain(self, hidden, block)
        taken.extend([] if added is None else [None])
        return added

    monkeypatch.setattr(repe.Steering, "shift", counting)
    return taken


def the_long_way(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(handle_file, "is_uniform", lambda *_: False)
        return run()


def generate(model: Any, prompts: Any = None, **how: Any) -> Tensor:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])} if prompts is None else prompts
    scores = model.generate(
        **inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True, eos_token_id=None, **how
    ).logits
    return torch.stack(scores)


GREEDY: dict[str, Any] = {"do_sample": False}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "all": ({}, GREEDY, True),
    "generated": ({"scope": "generated"}, GREEDY, True),
    "answer": ({"scope": "answer"}, GREEDY, True),
    "prompt": ({"scope": "prompt"}, GREEDY, False),
    "a position": ({"scope": [1]}, GREEDY, False),
    "alphas a row": ({"alpha": [1.0, 0.0]}, GREEDY, False),
    "alphas a row, none of them 0": ({"alpha": [1.0, 2.0]}, GREEDY, False),
    "gate": ({"gate": lambda mean, last: torch.tensor([True, False])}, GREEDY, False),
    "norm kept": ({"keep_norm": True}, GREEDY, False),
    "ablate": ({"edit": "ablate"}, GREEDY, False),
    "piecewise": ({"edit": "piecewise"}, GREEDY, False),
    "beams": ({}, GREEDY | {"num_beams": 2}, True),
    "guided": ({"scope": "generated"}, GREEDY | {"guidance_scale": 2.0}, False),
    "guided, all": ({}, GREEDY | {"guidance_scale": 2.0}, True),
    "static cache": ({"scope": "generated"}, GREEDY | {"cache_implementation": "static"}, True),
    "no cache": ({"scope": "generated"}, GREEDY | {"use_cache": False}, False),
    "padded": ({}, GREEDY | {"prompts": zoo.inputs("llama")}, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_short_way_is_the_long_way(
    model: Any, way: str, monkeypatch: pytest.MonkeyPatch, shortcuts: list[None]
) -> None:
    steered, call, is_short = WAYS[way]

    def run() -> Tensor:
        with repe.steer(model, vector_of(), **{"alpha": 1.5, "blocks": BLOCKS} | steered):
            return generate(model, **call)

    expected = the_long_way(monkeypatch, run)
    assert not shortcuts
    assert torch.equal(run(), expected)
    assert bool(shortcuts) is is_short


def test_a_prompt_that_nothing_says_is_padded_is_no_written_text(
    model: Any, monkeypatch: pytest.MonkeyPatch, shortcuts: list[None]
) -> None:
    model.generation_config.pad_token_id = model.config.pad_token_id = None

    def run() -> Tensor:
        with repe.steer(model, vector_of(), 1.5, blocks=BLOCKS, scope="generated"):
            return generate(model, **GREEDY)

    expected = the_long_way(monkeypatch, run)
    assert torch.equal(run(), expected)
    assert shortcuts


def test_values_that_change_are_heard(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        heard = []
        with repe.steer(model, vector_of(), 1.0, blocks=BLOCKS) as handle:
            heard.append(generate(model, **GREEDY))
            handle.alpha = -2.0
            heard.append(generate(model, **GREEDY))
            handle.vector = vector_of(seed=1)
            heard.append(generate(model, **GREEDY))
            handle.alpha = 0.0
            heard.append(generate(model, **GREEDY))
            handle.alpha, handle.scope = 0.5, "prompt"
            heard.append(generate(model, **GREEDY))
        return torch.stack(heard)

    assert torch.equal(run(), the_long_way(monkeypatch, run))


def test_the_dtype_may_change_while_the_handle_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        model = zoo.build("llama")
        with repe.steer(model, vector_of(), 3.0, blocks=BLOCKS):
            return torch.stack(
                [generate(model.to(dtype), **GREEDY).double() for dtype in (torch.double, torch.bfloat16)]
            )

    assert torch.equal(run(), the_long_way(monkeypatch, run))


def test_a_forward_that_begins_while_the_handle_is_attached_is_left_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the hooks are on by then: it is steered at no block, and not at some."""
    ids, seen = {"input_ids": torch.tensor([[5, 6, 7]])}, []
    plain, hook = model(**ids).logits, Attachment.hook

    def and_run(self: Any, *args: Any) -> None:
        hook(self, *args)
        seen.append(model(**ids).logits)

    monkeypatch.setattr(Attachment, "hook", and_run)
    with repe.steer(model, vector_of(), 2.0, blocks=BLOCKS):
        assert not torch.equal(model(**ids).logits, plain)
    assert len(seen) == len(BLOCKS)
    assert all(torch.equal(logits, plain) for logits in seen)


def test_alpha_may_become_one_a_row_in_the_middle_of_a_forward(model: Any) -> None:
    def set_rows(*_: Any) -> None:
        (handle,) = repe.status(model)
        handle.alpha = [1.0, 2.0]

    model.model.layers[1].register_forward_hook(set_rows)
    with repe.steer(model, vector_of(), 2.0, blocks=[2]):
        assert model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]])).logits.isfinite().all()


def test_no_operator_is_told_where_to_write_while_a_transform_looks_on() -> None:
    x, seen = torch.ones(2, 3, 4), []

    def looked_at(x: Tensor) -> Tensor:
        seen.extend([may_write_out(x), may_be_probed()])
        return x.sum()

    torch.func.vmap(looked_at)(x)
    with torch.autograd.forward_ad.dual_level():
        looked_at(x)
    torch.func.grad(looked_at)(x)
    assert not any(seen)
    assert not may_write_out(x.clone().requires_grad_())
    assert may_write_out(x)
    assert may_be_probed()


def test_overflow_in_float16_is_noticed(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda m, a, out: out + 6e4)
    with repe.steer(model, vector_of(), 2e4, blocks=BLOCKS, scope="generated"):
        generate(model, **GREEDY)
        with pytest.warns(RuntimeWarning, match="overflowed float16"):
            generate(model.half(), **GREEDY)


def test_constants_with_gradients_take_the_long_way(model: Any, shortcuts: list[None]) -> None:
    write = torch.zeros(1, 32)
    write[0, 3] = 1.0
    ones = torch.ones(1)
    offset = torch.ones(1, requires_grad=True)
    constants = repe.ops.Coefficients(
        write, write, 0 * ones, offset, -torch.inf * ones, torch.inf * ones, needs_projection=False
    )
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(2):
        with repe.steer(model, constants, 1.0, blocks=1):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert offset.grad is not None
    assert not shortcuts


def test_what_was_put_out_is_not_written_over(model: Any) -> None:
    """Others may hold the output of a block, as residuals do."""
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, a, out: seen.append((out, out.clone())))
    with repe.steer(model, vector_of(), 2.0, blocks=BLOCKS):
        generate(model, **GREEDY)
    assert all(torch.equal(held, copied) for held, copied in seen)
