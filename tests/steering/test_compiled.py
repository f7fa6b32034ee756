"""Steering and capturing models that are compiled, before or after: never silently skipped, and compiled anew once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import repe
from repe.models.blocks import find_stack
from repe.reading.vector import ConceptVector
from tests import oracles, zoo
from tests.oracles import BLOCK

N_BLOCKS = 2
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # of float32 logits of size 10


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    """Counts the graphs that are compiled. What is compiled anew is decided before a backend is asked."""
    return CompileCounterWithBackend("eager")


@pytest.fixture
def model() -> Any:
    return build()


def build() -> Any:
    """Two blocks compile in half the time of four."""
    model = zoo.build("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:N_BLOCKS], N_BLOCKS
    return model


def vector_of(seed: int = 0, **where: str) -> ConceptVector:
    return oracles.vector(seed, N_BLOCKS, **where)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return zoo.inputs("llama")


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits


def eager(batch: dict[str, Tensor], **how: Any) -> Tensor:
    """The same steering of a model that was never compiled."""
    model = build()
    with repe.steer(model, how.pop("vector", vector_of()), how.pop("alpha", 1.0), **how):
        return logits(model, batch)


def whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def its_forward(model: Any, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model


def in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def its_stack(model: Any, backend: Any) -> Any:
    model.model.compile(backend=backend, fullgraph=True)
    return model


def one_block(model: Any, backend: Any) -> Any:
    find_stack(model).blocks[BLOCK].compile(backend=backend)
    return model


def one_block_wrapped(model: Any, backend: Any) -> Any:
    model.model.layers[BLOCK] = torch.compile(model.model.layers[BLOCK], backend=backend)
    return model


def graphs_of_hooks(way: Callable[[Any, Any], Any]) -> int:
    """A module that is compiled itself has its own hooks compiled beside its forward."""
    return 1 if way in (its_stack, one_block, one_block_wrapped) else 0


WAYS: list[Callable[[Any, Any], Any]] = [whole, its_forward, in_place, its_stack, one_block, one_block_wrapped]


@pytest.mark.parametrize(
    ("compile", "site", "scope"),
    [(way, "block", "answer") for way in WAYS] + [(whole, "mlp", "all"), (one_block, "attention", "all")],
    ids=lambda case: getattr(case, "__name__", case),
)
def test_steering_after_compiling_compiles_once_and_values_never(
    model: Any, batch: dict, counter: Any, compile: Any, site: str, scope: str
) -> None:
    compiled, vector = compile(model, counter), vector_of(site=site)
    plain = logits(compiled, batch)
    before = counter.frame_count
    assert before == 1
    with repe.steer(compiled, vector, 1.0, scope=scope) as handle:
        torch.testing.assert_close(logits(compiled, batch), eager(batch, vector=vector, scope=scope), **CLOSE)
        attached = counter.frame_count
        assert attached <= before + 1 + graphs_of_hooks(compile)
        for alpha in (-2.0, 0.5, 3.25):
            handle.alpha = alpha
            expected = eager(batch, vector=vector, alpha=alpha, scope=scope)
            torch.testing.assert_close(logits(compiled, batch), expected, **CLOSE)
        handle.vector = other = vector_of(seed=1, site=site)
        expected = eager(batch, vector=other, alpha=3.25, scope=scope)
        torch.testing.assert_close(logits(compiled, batch), expected, **CLOSE)
        masked = zoo.inputs("llama", lengths=(7, 2, 4))
        expected = eager(masked, vector=other, alpha=3.25, scope=scope)
        torch.testing.assert_close(logits(compiled, masked), expected, **CLOSE)
        assert counter.frame_count == attached
    torch.testing.assert_close(logits(compiled, batch), plain, atol=0, rtol=0)
    assert counter.frame_count <= attached + 1
    assert repe.status(model) == []


@pytest.mark.parametrize("compile", [whole, its_stack, one_block_wrapped], ids=lambda way: way.__name__)
def test_steering_before_compiling(model: Any, batch: dict, counter: Any, compile: Any) -> None:
    plain = logits(model, batch)
    with repe.steer(model, vector_of(), 1.0) as handle:
        compiled = compile(model, counter)
        torch.testing.assert_close(logits(compiled, batch), eager(batch), **CLOSE)
        handle.alpha = -1.0
        torch.testing.assert_close(logits(compiled, batch), eager(batch, alpha=-1.0), **CLOSE)
        attached = counter.frame_count
        assert attached == 1 + graphs_of_hooks(compile)
    torch.testing.assert_close(logits(compiled, batch), plain, **CLOSE)
    assert counter.frame_count <= attached + 1


def test_where_nothing_is_padding_values_compile_nothing_either(model: Any, counter: Any) -> None:
    """Then no mask stands between alpha and the formula, and eager code takes a shorter way."""
    batch = {"input_ids": zoo.inputs("llama")["input_ids"]}
    compiled = whole(model, counter)
    with repe.steer(model, vector_of(), 1.0) as handle:
        logits(compiled, batch)
        for alpha in (0.0, -2.0, 0.5):
            handle.alpha = alpha
            torch.testing.assert_close(logits(compiled, batch), eager(batch, alpha=alpha), **CLOSE)
    assert counter.frame_count == 1


def test_alphas_a_row_recompile_nothing(model: Any, batch: dict, counter: Any) -> None:
    compiled = whole(model, counter)
    with repe.steer(model, vector_of(), [1.0, 0.0, -1.0]) as handle:
        torch.testing.assert_close(logits(compiled, batch), eager(batch, alpha=[1.0, 0.0, -1.0]), **CLOSE)
        for alpha in ([0.0, 2.0, 1.0], [-1.0, -1.0, 0.5]):
            handle.alpha = torch.tensor(alpha)
            torch.testing.assert_close(logits(compiled, batch), eager(batch, alpha=alpha), **CLOSE)
    assert counter.frame_count == 1


def test_a_second_handle_at_the_same_block_is_not_skipped(model: Any, batch: dict, counter: Any) -> None:
    compiled = whole(model, counter)
    with repe.steer(model, vector_of(), 1.0):
        first = logits(compiled, batch)
        with repe.steer(model, vector_of(seed=1), 1.0):
            both = logits(compiled, batch)
        torch.testing.assert_close(logits(compiled, batch), first, atol=0, rtol=0)
    other = build()
    with repe.steer(other, vector_of(), 1.0), repe.steer(other, vector_of(seed=1), 1.0):
        torch.testing.assert_close(both, logits(other, batch), **CLOSE)


def test_attached_again_and_again(model: Any, batch: dict, counter: Any) -> None:
    compiled = whole(model, counter)
    plain = logits(compiled, batch)
    for alpha in (1.0, -1.0):
        with repe.steer(model, vector_of(), alpha):
            torch.testing.assert_close(logits(compiled, batch), eager(batch, alpha=alpha), **CLOSE)
        torch.testing.assert_close(logits(compiled, batch), plain, atol=0, rtol=0)


@pytest.mark.parametrize("edit", ["add", "ablate"])
def test_edits_leave_the_graph_whole(model: Any, batch: dict, edit: str) -> None:
    with repe.steer(model, vector_of(), 1.0, edit=edit, blocks="all", keep_norm=True):
        explained = torch._dynamo.explain(model)(**batch, use_cache=False)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_a_gate_in_compiled_code(model: Any, batch: dict, counter: Any) -> None:
    gate = repe.Gate(vector_of(seed=3), block=0)
    expected = eager(batch, gate=gate)
    compiled = whole(model, counter)
    with repe.steer(model, vector_of(), 1.0, gate=gate):
        torch.testing.assert_close(logits(compiled, batch), expected, **CLOSE)


def test_gradients_of_a_compiled_model(model: Any, batch: dict) -> None:
    def gradient(run: Any, of: nn.Module) -> Tensor:
        run(**batch, use_cache=False).logits.square().mean().backward()
        return find_stack(of).blocks[0].mlp.down_proj.weight.grad

    plain = build()
    with repe.steer(plain, vector_of(), 1.0), repe.steer(model, vector_of(), 1.0):
        expected = gradient(plain, plain)
        torch.testing.assert_close(gradient(whole(model, "aot_eager"), model), expected, atol=1e-5, rtol=1e-4)


# generation


def generate(model: Any, **how: Any) -> Any:
    return model.generate(
        **zoo.inputs("llama"), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None, **how,
    ).logits  # fmt: skip


def test_generation_with_a_compiled_forward_compiles_nothing_for_a_new_alpha(model: Any, counter: Any) -> None:
    plain = build()
    unsteered = generate(plain)
    model.forward = torch.compile(model.forward, backend=counter)
    torch.testing.assert_close(generate(model, cache_implementation="static"), unsteered, **CLOSE)
    handles = [repe.steer(each, vector_of(), scope="generated") for each in (model, plain)]
    generate(model, cache_implementation="static")
    compiled = counter.frame_count
    for alpha in (2.0, -1.0):
        for handle in handles:
            handle.alpha = alpha
        torch.testing.assert_close(generate(model, cache_implementation="static"), generate(plain), **CLOSE)
    assert counter.frame_count == compiled
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(generate(model, cache_implementation="static"), unsteered, **CLOSE)


# capture


@pytest.mark.parametrize("compile", [whole, its_forward, one_block_wrapped], ids=lambda way: way.__name__)
def test_capturing_a_compiled_model(model: Any, batch: dict, counter: Any, compile: Any) -> None:
    tokenizer, texts = zoo.tokenizer(), ["steer", "ab"]
    expected = repe.capture(model, tokenizer, texts)
    compiled = compile(model, counter)
    logits(compiled, batch)
    torch.testing.assert_close(repe.capture(compiled, tokenizer, texts), expected, **CLOSE)
    with repe.steer(compiled, vector_of(), 1.0):
        moved = repe.capture(compiled, tokenizer, texts)[:, BLOCK] - expected[:, BLOCK]
    torch.testing.assert_close(moved, oracles.shift_of(vector_of(), 1.0).expand_as(moved), **CLOSE)
