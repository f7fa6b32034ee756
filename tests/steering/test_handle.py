"""Steering: exact numbers, and a life that leaves nothing behind."""

import contextlib
import copy
import gc
import io
import math
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, TextIteratorStreamer

import repe
import repe.models.tokens
from repe.models.blocks import find_stack
from repe.models.tracking import CallTracker, prompts_end
from repe.reading.vector import ConceptVector
from repe.steering.worth import NotWrittenWarning, StrengthWarning
from tests import oracles, zoo
from tests.oracles import BLOCK

SITES = ("block", "attention", "mlp")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # of float32 logits of size 10


@pytest.fixture
def model() -> Any:
    return zoo.build("llama")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return zoo.inputs("llama")


@pytest.fixture
def vector() -> ConceptVector:
    return oracles.vector()


def logits(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


def generated(model: Any, prompt: list[int], n: int = 5, **more: Any) -> list[int]:
    ids = torch.tensor([prompt])
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "do_sample": False}
    return model.generate(ids, **how, **more)[0].tolist()


def bare(model: nn.Module) -> bool:
    """Whether nothing of ours is on a model."""
    return all(
        not module._forward_hooks and not module._forward_pre_hooks and not {"forward", "generate"} & set(vars(module))
        for module in model.modules()
    )


# exact numbers


@pytest.mark.parametrize("kind", ["add", "piecewise"])
@pytest.mark.parametrize("unit", ["kl", "norm", "raw"])
@pytest.mark.parametrize("places", [[(1,), (2,)], [(2,), (0, 2)], [(0, 1), (1, 3)]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_several_vectors_are_added_each_where_it_recommends(name: str, places: Any, unit: str, kind: str) -> None:
    """As if each were steered along by itself; but that signs are those of activations before either."""
    model, batch, vectors = (
        zoo.build(name),
        zoo.inputs(name),
        [oracles.vector(n, recommended=p) for n, p in enumerate(places)],
    )
    with repe.steer(model, vectors, 0.4, unit=unit, edit=kind) as handle:
        together, blocks, divergence = logits(model, batch), handle.blocks, handle.divergence
    assert blocks == tuple(sorted({block for of in places for block in of}))
    with contextlib.ExitStack() as alone:
        handles = [alone.enter_context(repe.steer(model, vector, 0.4, unit=unit, edit=kind)) for vector in vectors]
        one_by_one = logits(model, batch)
        if kind == "add" or not {*places[0]} & {*places[1]}:
            torch.testing.assert_close(together, one_by_one, **CLOSE)
        assert divergence == pytest.approx(sum(handle.divergence for handle in handles))


@pytest.mark.parametrize("kind", ["ablate", "erase"])
def test_what_is_done_to_several_vectors_together_is_done_at_the_same_blocks(model: Any, kind: str) -> None:
    vectors = [oracles.vector(0, recommended=(1,)), oracles.vector(1, recommended=(2,))]
    with pytest.raises(ValueError, match=r"'concept 0' \[1\], 'concept 1' \[2\]\): pass blocks="):
        repe.steer(model, vectors, edit=kind)
    with repe.steer(model, vectors, edit=kind, blocks=1) as handle:
        logits(model, zoo.inputs("llama"))
        assert handle.blocks == (1,)


@pytest.mark.parametrize("unit", ["kl", "gap", "raw", "sigma", "norm"])
@pytest.mark.parametrize("blocks", [[2], [0, 3], "all"])
def test_units_at_several_blocks(model: Any, batch: dict, vector: ConceptVector, unit: str, blocks: Any) -> None:
    numbers = range(zoo.N_BLOCKS) if blocks == "all" else blocks
    vector, share = replace(vector, dose=vector.scale / 3), 1 / len(numbers)
    step = {
        "kl": lambda b: vector.dose[b] * share, "gap": lambda b: vector.scale[b] * share, "raw": lambda b: 1.0,
        "sigma": lambda b: vector.sigma[b] * share, "norm": lambda b: vector.norm[b] * share,
    }[unit]  # fmt: skip
    stack = find_stack(model)
    with repe.steer(model, vector, 0.3, blocks=blocks, unit=unit):
        actual = logits(model, batch)
    in_text = batch["attention_mask"][..., None]
    hooks = [
        stack.blocks[b].register_forward_hook(lambda _m, _a, h, b=b: h + in_text * 0.3 * step(b) * vector.write[b])
        for b in numbers
    ]
    expected = logits(model, batch)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("unit", ["kl", "gap", "sigma", "norm", "raw"])
@pytest.mark.parametrize("blocks", [[2], [0, 3]])
def test_a_handle_says_what_its_strength_is_expected_to_cost(
    model: Any, batch: dict, vector: ConceptVector, unit: str, blocks: Any
) -> None:
    """A tenth of a nat for a dose, and quadratic, whatever the unit; doses at several blocks add up."""
    vector = replace(vector, dose=2 * vector.scale)
    with repe.steer(model, vector, -0.5, blocks=blocks, unit=unit) as handle:
        logits(model, batch)
        length = {"kl": vector.dose, "gap": vector.scale, "sigma": vector.sigma, "norm": vector.norm}
        share = 1 / len(blocks)
        steps = [1.0 if unit == "raw" else share * float(length[unit][b]) for b in blocks]
        doses = sum(step / float(vector.dose[b]) for step, b in zip(steps, blocks, strict=True))
        assert handle.divergence == pytest.approx(0.1 * (0.5 * doses) ** 2)
        assert f"divergence={handle.divergence:.2g}" in repr(handle)
    with repe.steer(model, replace(vector, dose=None), 1.0, unit="gap") as handle:
        logits(model, batch)
        assert math.isnan(handle.divergence)
        assert "divergence" not in repr(handle)


def test_what_costs_nothing_together_is_warned_of(model: Any, batch: dict, vector: ConceptVector) -> None:
    opposed = torch.eye(len(vector.blocks))
    opposed[0, 1] = opposed[1, 0] = -1.0
    with (
        pytest.warns(
            StrengthWarning, match="at which hardly a word will change: 0.1 nats.*are not expected of any alpha"
        ),
        repe.steer(model, replace(vector, coherence=opposed), 1.0, blocks=[0, 1]) as handle,
    ):
        logits(model, batch)
    assert handle.divergence == 0


def test_a_vector_that_does_not_know_its_dose_is_steered_in_another_unit(model: Any, vector: ConceptVector) -> None:
    with pytest.raises(ValueError, match=r"unit='kl': the vector does not know its dose.*repe.reading.dosed.*'gap'"):
        repe.steer(model, replace(vector, dose=None), 1.0)
    assert not repe.status(model)


@pytest.mark.filterwarnings("default:alpha=.* is expected to make plain text diverge:UserWarning")
@pytest.mark.parametrize(("alpha", "said"), [(0.05, "hardly a word"), (-3.0, "break down"), ([1.0, 3.0], "break down")])
def test_a_strength_that_is_not_felt_or_not_borne_is_warned_of_once(
    model: Any, batch: dict, vector: ConceptVector, alpha: Any, said: str
) -> None:
    with pytest.warns(StrengthWarning, match=f"{said}.*0.1 nats, at which a concept is plain, are alpha=1$"):
        handle = repe.steer(model, vector, alpha)
    for quiet in (alpha, 1.0, alpha):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.alpha = quiet
    handle._take_off()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = repe.steer(model, vector, 1.0)
        handle.alpha = 0.0
    with pytest.warns(StrengthWarning, match=said):
        handle.alpha = alpha
    handle._take_off()


def test_an_ablated_direction_is_gone(model: Any, batch: dict, vector: ConceptVector) -> None:
    blocks = find_stack(model).blocks
    with repe.steer(model, vector, edit="ablate"):
        (hidden,) = oracles.recorded(model, [blocks[BLOCK]], **batch)
    in_text = batch["attention_mask"].bool()
    read = hidden[in_text] @ vector.read[BLOCK]
    torch.testing.assert_close(read, torch.zeros_like(read), atol=1e-4, rtol=0)


def test_a_clamped_score_is_its_target(model: Any, vector: ConceptVector) -> None:
    with repe.steer(model, vector, edit="clamp", target=0.5):
        scores = repe.read(model, zoo.tokenizer(), "steer", vector.at(BLOCK)).scores
    torch.testing.assert_close(scores, torch.full_like(scores, 0.5), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_done_in_float32_and_returned_in_the_streams_dtype(
    model: Any, batch: dict, vector: ConceptVector, dtype: torch.dtype
) -> None:
    model, block = model.to(dtype), find_stack(model).blocks[BLOCK]
    (before,) = oracles.recorded(model, [block], **batch)
    with repe.steer(model, vector, 1.0):
        (after,) = oracles.recorded(model, [block], **batch)
    wide = torch.promote_types(dtype, torch.float32)
    in_text = batch["attention_mask"].bool()
    expected = (before.to(wide) + oracles.shift_of(vector, 1.0).to(wide)).to(dtype)
    assert after.dtype == dtype
    assert torch.equal(after[in_text], expected[in_text])


def test_the_activations_dtype_decides_not_the_models(model: Any, batch: dict, vector: ConceptVector) -> None:
    with repe.steer(model, vector, 1.0), torch.autocast("cpu", dtype=torch.bfloat16):
        steered = logits(model, batch)
    shift, in_text = oracles.shift_of(vector, 1.0), batch["attention_mask"][..., None]
    with (
        oracles.changed(find_stack(model).blocks[BLOCK], lambda h: (h.float() + in_text * shift).to(h.dtype)),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        expected = logits(model, batch)
    assert torch.equal(steered, expected)


def test_padding_that_overflowed_stays_as_it_is(model: Any, batch: dict, vector: ConceptVector) -> None:
    """0 times infinity is not a number: what is out of scope is selected, not multiplied by 0."""
    block, seen = find_stack(model).blocks[BLOCK], []
    at_padding = ~batch["attention_mask"].bool()[..., None]
    overflowed = oracles.changed(block, lambda h: h.masked_fill(at_padding, torch.inf))
    with overflowed, repe.steer(model, vector, edit="ablate"):
        block.register_forward_hook(lambda _m, _a, output: seen.append(output))
        logits(model, batch)
    assert (seen[0][at_padding.squeeze(-1)] == torch.inf).all()
    assert seen[0][~at_padding.squeeze(-1)].isfinite().all()


def test_a_batch_of_1_is_a_batch_of_8(model: Any, vector: ConceptVector) -> None:
    batch = zoo.inputs("llama", lengths=[7] * 8)
    with repe.steer(model, vector, 1.0):
        together = logits(model, batch)
        alone = torch.cat([logits(model, {key: v[i : i + 1] for key, v in batch.items()}) for i in range(8)])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_several_handles_apply_in_order_and_come_off_in_any(model: Any, batch: dict, vector: ConceptVector) -> None:
    other, block = oracles.vector(seed=1), find_stack(model).blocks[BLOCK]
    (plain,) = oracles.recorded(model, [block], **batch)
    in_text = batch["attention_mask"].bool()

    def edited(*edits: str) -> Tensor:
        x = plain[in_text]
        for edit in edits:
            if edit == "add":
                x = x + oracles.shift_of(vector, 1.0)
            else:
                x = x - (x @ other.read[BLOCK])[:, None] * other.write[BLOCK]
        return x

    def expect(*edits: str) -> None:
        (hidden,) = oracles.recorded(model, [block], **batch)
        torch.testing.assert_close(hidden[in_text], edited(*edits), **CLOSE)

    first = repe.steer(model, vector, 1.0)
    second = repe.steer(model, other, edit="ablate")
    assert repe.status(model) == [first, second]
    expect("add", "ablate")
    first.remove()
    expect("ablate")
    third = repe.steer(model, vector, 1.0)
    assert repe.status(model) == [second, third]
    expect("ablate", "add")
    assert repe.detach(model) == 2
    expect()
    assert repe.detach(model) == 0
    assert bare(model)


def test_a_handle_that_took_a_removed_ones_place_keeps_its_own_strength(model: Any, batch: dict) -> None:
    handles = [repe.steer(model, oracles.vector(seed), 0.5, blocks=2) for seed in range(3)]
    logits(model, batch)
    handles[0].remove()
    handles.append(repe.steer(model, oracles.vector(3), -1.5, blocks=2))
    with_alphas = logits(model, batch)
    shift = sum(oracles.shift_of(oracles.vector(s), a, 2) for s, a in [(1, 0.5), (2, 0.5), (3, -1.5)])
    repe.detach(model)
    in_text = batch["attention_mask"][..., None]
    with oracles.changed(find_stack(model).blocks[2], lambda h: h + in_text * shift):
        torch.testing.assert_close(with_alphas, logits(model, batch), **CLOSE)


def test_another_vector_in_place(model: Any, batch: dict, vector: ConceptVector) -> None:
    other = oracles.vector(seed=1)
    with repe.steer(model, other, 1.0):
        expected = logits(model, batch)
    with repe.steer(model, vector, 1.0) as handle:
        logits(model, batch)
        handle.vector = other
        assert handle.vector is other
        assert torch.equal(logits(model, batch), expected)
        with pytest.raises(ValueError, match="do not belong to one model"):
            handle.vector = oracles.vector(n_blocks=3)


# values that cannot be meant


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), [1.0, float("nan")], [[1.0]], []], ids=str)
def test_a_bad_alpha_leaves_the_old_one(model: Any, vector: ConceptVector, alpha: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be"):
        repe.steer(model, vector, alpha)
    assert bare(model)
    handle = repe.steer(model, vector, 0.25)
    with pytest.raises(ValueError, match="alpha must be"):
        handle.alpha = alpha
    assert handle.alpha == 0.25
    with pytest.warns(UserWarning, match="edited nothing"):
        handle.remove()


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"blocks": 4}, IndexError, "Block 4 does not exist"),
        ({"site": "nowhere"}, ValueError, "nowhere"),
        ({"edit": "ad"}, ValueError, "did you mean 'add'"),
        ({"scope": "promt"}, ValueError, "scope"),
        ({"impl": "fortran"}, ValueError, "fortran"),
        ({"gate": 3}, TypeError, "gate"),
        ({"site": "embedding", "blocks": "all"}, ValueError, "the embedding is one place"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_leaves_the_model_alone(
    model: Any, vector: ConceptVector, wrong: dict, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        repe.steer(model, vector, 1.0, **wrong)
    assert bare(model)


def test_a_failure_half_way_takes_off_what_was_put_on(model: Any, vector: ConceptVector) -> None:
    def fail(_hook: Any) -> None:
        raise OSError("this block takes no hooks")

    find_stack(model).blocks[-1].register_forward_hook = fail
    with pytest.raises(OSError, match="takes no hooks"):
        repe.steer(model, vector, 1.0, blocks="all")
    assert bare(model)
    assert repe.status(model) == []


def test_a_site_that_only_the_last_block_lacks(model: Any, vector: ConceptVector) -> None:
    find_stack(model).blocks[-1].stranger = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has no site 'mlp'"):
        repe.steer(model, vector, 1.0, blocks="all", site="mlp", unit="raw")
    assert bare(model)


@pytest.mark.parametrize("unit", ["gap", "sigma", "norm"])
@pytest.mark.parametrize("site", ["attention", "mlp", "embedding"])
def test_lengths_that_were_measured_at_another_site(model: Any, batch: dict, site: str, unit: str) -> None:
    vector = oracles.vector()
    with pytest.raises(ValueError, match=f"'{unit}' was measured at the site 'block', and does not hold at '{site}'"):
        repe.steer(model, vector, 1.0, site=site, unit=unit)
    assert bare(model)
    module = find_stack(model).site(site, BLOCK)
    (before,) = oracles.recorded(model, [module], **batch)
    with repe.steer(model, vector, 2.0, site=site, unit="raw"):
        (after,) = oracles.recorded(model, [module], **batch)
    added = (after - before)[batch["attention_mask"].bool()]
    torch.testing.assert_close(added, (2 * vector.write[BLOCK]).expand_as(added), **CLOSE)


def test_a_vector_of_another_width_or_depth(model: Any) -> None:
    for wrong in (oracles.vector(d_model=16), oracles.vector(n_blocks=5)):
        with pytest.raises(ValueError, match="extract it from this model"):
            repe.steer(model, wrong, 1.0)


# a lifetime


def test_an_exception_in_the_block_comes_through_and_leaves_nothing(model: Any, vector: ConceptVector) -> None:
    with pytest.raises(KeyError, match="mine"), repe.steer(model, vector, 1.0):
        raise KeyError("mine")
    assert bare(model)


def test_an_exception_in_a_forward_leaves_a_model_that_runs(model: Any, batch: dict, vector: ConceptVector) -> None:
    plain = logits(model, batch)

    def fail(*_: Any) -> None:
        raise OSError("no")

    with repe.steer(model, vector, 0.0):
        hook = find_stack(model).blocks[2].register_forward_hook(fail)
        with pytest.raises(OSError, match="no"):
            logits(model, batch)
        with pytest.raises(OSError, match="no"):
            generated(model, [9, 17])
        hook.remove()
        assert torch.equal(logits(model, batch), plain)
    assert bare(model)


def test_a_forward_that_failed_keeps_nothing(model: Any, batch: dict, vector: ConceptVector) -> None:
    cache = DynamicCache(config=model.config)
    gone = weakref.ref(cache)

    def fail(*_: Any) -> None:
        raise OSError("no")

    with repe.steer(model, vector, 1.0):
        hook = find_stack(model).blocks[2].register_forward_hook(fail)
        with contextlib.suppress(OSError):
            model(**batch, past_key_values=cache)
        hook.remove()
        del cache
        gc.collect()
        assert gone() is None


def test_caches_that_cannot_be_watched(vector: ConceptVector) -> None:
    tracker = CallTracker(nn.Linear(1, 1))
    for cache in ((torch.ones(1),), [torch.ones(1)]):
        tracker.note_cached(cache, 1, 1)
        assert tracker.version_in(cache, 1) is None
    watched = DynamicCache()
    tracker.note_cached(watched, 1, 5)
    tracker.note_cached(watched, 1, 6)
    assert tracker.version_in(watched, 1) == 5
    assert tracker.version_in(watched, 2) is None


def test_a_new_handle_is_not_taken_for_one_that_is_gone(model: Any, vector: ConceptVector) -> None:
    """Of a cache that another had steered, it says that it is not its own, and nothing of changes."""
    with repe.steer(model, oracles.vector(seed=1), 0.0), warnings.catch_warnings(record=True, action="always") as said:
        logits(model, zoo.inputs("llama"))
        serials, past = [], []
        for i in range(10):
            handle = repe.steer(model, vector, 1.0)
            for _ in range(i % 2):
                handle.alpha = 2.0
            for cache in past:
                logits(model, {"input_ids": torch.tensor([[9]])}, past_key_values=cache)
            with torch.no_grad():
                past.append(model(input_ids=torch.tensor([[9, 17]])).past_key_values)
            serials.append(handle.stamp[0])
            handle.remove()
            del handle
            gc.collect()
    assert len(set(serials)) == len(serials)
    assert len(said) == 9
    assert all("not steered along" in str(each.message) for each in said)


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda t: [t.requires_grad_()], lambda t: t.requires_grad_() * 2])
def test_a_strength_that_is_learnt_is_refused(model: Any, vector: ConceptVector, make: Any) -> None:
    alpha = make(torch.tensor(0.5))
    with pytest.raises(ValueError, match="alpha requires a gradient, and would get none"):
        repe.steer(model, vector, alpha)
    assert bare(model)
    with repe.steer(model, vector, 0.5) as handle:
        logits(model, zoo.inputs("llama"))
        with pytest.raises(ValueError, match=r"alpha\.detach"):
            handle.alpha = alpha


def test_the_same_handle_attached_again_is_said_to_add_up(model: Any, vector: ConceptVector) -> None:
    first = repe.steer(model, vector, 0.5)
    with pytest.warns(UserWarning, match=r"1 handle like Steering\('concept 0', .* acts on .* add up: .*repe.detach"):
        second = repe.steer(model, vector, 1.0)
    with pytest.warns(UserWarning, match="2 handles like .* act on"):
        third = repe.steer(model, vector, 0.25)
    with repe.steer(model, vector, 0.5, scope="prompt"), repe.steer(model, oracles.vector(1), 0.5):
        logits(model, zoo.inputs("llama"))
    for handle in (first, second, third):
        handle.remove()


def in_thread(run: Any) -> Any:
    """What a call returns or raises in a thread of its own, which has ended."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_a_handle_of_one_thread_acts_in_no_other(model: Any, batch: dict, vector: ConceptVector, scope: str) -> None:
    plain = logits(model, batch)
    with repe.steer(model, vector, 1.0, scope=scope):
        forth = logits(model, batch)
    with repe.steer(model, vector, -1.0, scope=scope):
        back = logits(model, batch)

    def steered_back() -> Tensor:
        with repe.steer(model, vector, -1.0, scope=scope, only_here=True):
            return logits(model, batch)

    with repe.steer(model, vector, 1.0, scope=scope, only_here=True):
        assert torch.equal(in_thread(lambda: logits(model, batch)), plain)
        assert torch.equal(in_thread(steered_back), back)
        assert torch.equal(logits(model, batch), forth)


def test_two_threads_that_would_steer_each_other_are_refused(model: Any, batch: dict, vector: ConceptVector) -> None:
    def steered(**how: Any) -> Tensor:
        with repe.steer(model, oracles.vector(1), 1.0, **how):
            return logits(model, batch)

    with repe.steer(model, vector, 1.0):
        assert torch.equal(in_thread(lambda: logits(model, batch)), logits(model, batch))
        error = in_thread(steered)
        assert isinstance(error, RuntimeError)
        assert "the thread 'MainThread' attached Steering('concept 0'" in str(error)
        assert "pass only_here=True" in str(error)
        assert isinstance(in_thread(partial(steered, only_here=True)), Tensor)
    left = in_thread(lambda: repe.steer(model, vector, 1.0))
    steered()  # that thread has ended, and its handle is anybody's
    left.remove()


@pytest.mark.parametrize("how", ["not run", "out of scope"])
def test_a_handle_that_edited_nothing_warns(model: Any, batch: dict, vector: ConceptVector, how: str) -> None:
    handle = repe.steer(model, vector, 1.0, scope="generated")
    if how == "out of scope":
        logits(model, batch)
    with pytest.warns(UserWarning, match="edited nothing in its lifetime"):
        handle.remove()
    handle.remove()


def test_a_handle_that_edited_does_not_warn(model: Any, batch: dict, vector: ConceptVector) -> None:
    for how in ({"alpha": 0.0}, {"scope": "prompt"}, {"gate": lambda mean, last: torch.zeros(3, dtype=torch.bool)}):
        with repe.steer(model, vector, **how):
            logits(model, batch)
    with repe.steer(model, vector, scope="generated"):
        generated(model, [9, 17])


@pytest.mark.parametrize("site", SITES)
def test_a_steered_model_is_pickled_and_copied_as_a_plain_one(
    model: Any, batch: dict, site: str, tmp_path: Any
) -> None:
    plain, vector = logits(model, batch), oracles.vector(site=site)
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    with repe.steer(model, vector, 1.0):
        model.train()
        model(**batch)
        model.eval()
        assert {name for name, _ in model.named_parameters()} | set(model.state_dict()) == names
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        model.save_pretrained(tmp_path)
        assert not torch.equal(logits(model, batch), plain)
    assert repe.status(copied) == []
    file.seek(0)
    for fresh in (copied, torch.load(file, weights_only=False), type(model).from_pretrained(tmp_path)):
        assert torch.equal(logits(fresh, batch), plain)
        ids = generated(fresh, [9, 17])
        assert ids == generated(model, [9, 17])
    with repe.steer(copied, vector, 1.0):
        assert not torch.equal(logits(copied, batch), plain)


def test_a_pickle_of_a_steered_model_needs_no_repe(model: Any, batch: dict, tmp_path: Any) -> None:
    for block in find_stack(model).blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    with repe.steer(model, oracles.vector(site="mlp"), 1.0):
        model.train()(**batch)
        (tmp_path / "model").write_bytes(pickle.dumps(model.eval()))
    program = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb'));"
        "model.train()(input_ids=torch.tensor([[9, 17]])).logits.sum().backward();"
        "assert not any(name.startswith('repe') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model")], check=True, cwd=tmp_path)


def test_a_removed_handle_lets_go_of_the_model(batch: dict, vector: ConceptVector) -> None:
    model = zoo.build("llama")
    with repe.steer(model, vector, 1.0):
        logits(model, batch)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# no global state


def test_two_models_in_one_process(batch: dict, vector: ConceptVector) -> None:
    one, other = zoo.build("llama"), zoo.build("llama")
    plain = logits(one, batch)
    with repe.steer(one, vector, 1.0):
        first = logits(one, batch)
        assert torch.equal(logits(other, batch), plain)
        with repe.steer(other, vector, -1.0):
            second = logits(other, batch)
            assert torch.equal(logits(one, batch), first)
    assert not torch.equal(first, second)


def test_a_stream_from_another_thread(model: Any, vector: ConceptVector) -> None:
    tokenizer = zoo.tokenizer()
    inputs = tokenizer("steer", return_tensors="pt", return_token_type_ids=False)
    with repe.steer(model, vector, 2.0, scope="generated"):
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        arguments = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected)


def test_two_threads_generate_at_once(model: Any, vector: ConceptVector) -> None:
    prompts = [[9, 17, 30, 44, 50, 51], [60, 9]]

    def gate(mean: Tensor, last: Tensor) -> Tensor:
        return last[:, 0] > threshold

    both = [oracles.recorded(model, [find_stack(model).blocks[BLOCK]], input_ids=torch.tensor([p]))[0] for p in prompts]
    threshold = (both[0][0, -1, 0] + both[1][0, -1, 0]) / 2
    for how in ({"scope": "generated"}, {"gate": gate}):
        with repe.steer(model, vector, 3.0, **how):
            expected = [generated(model, prompt, 20) for prompt in prompts]
            found: dict[int, list[int]] = {}
            both_inside = threading.Barrier(2, timeout=60)

            def work(i: int, found: Any = found, meet: Any = both_inside) -> None:
                def wait(_ids: Any, scores: Tensor) -> Tensor:
                    meet.wait()
                    return scores

                found[i] = generated(model, prompts[i], 20, logits_processor=[wait])

            threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [found[0], found[1]] == expected


def test_where_prompts_end_is_said_to_one_thread(model: Any, vector: ConceptVector, batch: dict) -> None:
    """Something is measured in this thread, and another thread uses the model, or is told otherwise meanwhile."""
    found: dict[str, Tensor] = {}
    with repe.steer(model, vector, 3.0, scope="prompt") as handle:
        whole = logits(model, batch)

        def use() -> None:
            found["theirs"] = logits(model, batch)

        with prompts_end(model, torch.tensor([2])):
            cut = logits(model, batch)
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
            handle.prompt_length = 3
            assert torch.equal(logits(model, batch), cut)
            with prompts_end(model, torch.tensor([3])):
                nested = logits(model, batch)
            assert torch.equal(logits(model, batch), cut)
        assert torch.equal(logits(model, batch), nested)  # as the handle was told
    assert torch.equal(found["theirs"], whole)
    assert not torch.equal(cut, whole)


@pytest.mark.parametrize("steered_before", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_a_forward_that_began_before_the_steering_is_left_as_it_is(
    model: Any, batch: dict, site: str, steered_before: bool
) -> None:
    first = repe.steer(model, oracles.vector(seed=1), 1.0) if steered_before else None
    plain, found = logits(model, batch), {}
    inside, attached = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert attached.wait(60)

    hook = find_stack(model).blocks[0].register_forward_hook(wait)
    thread = threading.Thread(target=lambda: found.update(logits=logits(model, batch)))
    thread.start()
    assert inside.wait(60)
    handle = repe.steer(model, oracles.vector(site=site), 1.0, blocks=2)
    attached.set()
    thread.join()
    hook.remove()
    assert torch.equal(found["logits"], plain)
    assert not torch.equal(logits(model, batch), plain)
    handle.remove()
    if first is not None:
        first.remove()


def test_a_generation_inside_a_generation(model: Any, vector: ConceptVector) -> None:
    with repe.steer(model, vector, 3.0, scope="generated"):
        outer, inner = generated(model, [9, 17, 30]), generated(model, [44, 9, 21, 50, 60])
        found = []

        def nest(ids: Tensor, scores: Tensor) -> Tensor:
            found.append(generated(model, [44, 9, 21, 50, 60]))
            return scores

        assert generated(model, [9, 17, 30], logits_processor=[nest]) == outer
        assert found == [inner] * 5


# gates


def test_a_gate_decides_by_the_prompt_and_holds(model: Any, vector: ConceptVector) -> None:
    batch, condition = zoo.inputs("llama"), oracles.vector(seed=5)
    for token in ("last", "mean"):
        (hidden,) = oracles.recorded(model, [find_stack(model).blocks[0]], **batch)
        mask = batch["attention_mask"][..., None]
        counted = mask * (mask.cumsum(1) > 1)
        x = hidden[:, -1] if token == "last" else (hidden * counted).sum(1) / counted.sum(1)
        scores = (x @ condition.read[0] - condition.midpoint[0]) / condition.scale[0]
        threshold = scores.sort().values[1:].mean().item()
        for above in (True, False):
            gate = repe.Gate(condition, threshold, above=above, block=0, token=token)
            wanted = scores > threshold if above else scores < threshold
            how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            with repe.steer(model, vector, wanted.float() * 2):
                expected = model.generate(**batch, **how)
            for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
                with repe.steer(model, vector, 2.0, gate=gate):
                    gated = model.generate(**batch, **how, **more)
                torch.testing.assert_close(torch.stack(gated.logits), torch.stack(expected.logits), **CLOSE)


def test_a_gate_on_a_prompt_in_pieces(model: Any, vector: ConceptVector) -> None:
    seen = []

    def gate(mean: Tensor, last: Tensor) -> Tensor:
        seen.append((mean, last))
        return torch.tensor([True])

    prompt = [9, 17, 30, 44, 50]
    for scope in ("generated", "answer"):
        with repe.steer(model, vector, 2.0, scope=scope):
            expected = generated(model, prompt)
        with repe.steer(model, vector, 2.0, scope=scope, gate=gate):
            assert generated(model, prompt, prefill_chunk_size=2) == expected
        (hidden,) = oracles.recorded(model, [find_stack(model).blocks[BLOCK]], input_ids=torch.tensor([prompt]))
        torch.testing.assert_close(seen[-1], (hidden[:, 1:].mean(1), hidden[:, -1]), **CLOSE)
    with (
        repe.steer(model, vector, 2.0, gate=gate),
        pytest.raises(ValueError, match="the whole prompt, which comes in pieces"),
    ):
        generated(model, prompt, prefill_chunk_size=2)


def test_a_gate_reads_the_prompt_and_not_guidances_second_stream(model: Any, vector: ConceptVector) -> None:
    seen = []

    def gate(mean: Tensor, last: Tensor) -> Tensor:
        seen.append(last)
        return torch.tensor([True])

    with repe.steer(model, vector, 2.0, gate=gate):
        generated(model, [9, 17, 30], guidance_scale=1.5, negative_prompt_ids=torch.tensor([[50, 51]]))
    assert len(seen) == 1


def test_gates_that_cannot_work(model: Any, batch: dict, vector: ConceptVector) -> None:
    with pytest.raises(ValueError, match="the gate reads block 2, after the first edit at the block of block 1"):
        repe.steer(model, vector, gate=repe.Gate(vector, block=2))
    with pytest.raises(ValueError, match="the gate reads block 1, after the first edit at the attention of block 1"):
        repe.steer(model, vector, gate=repe.Gate(vector, block=1), site="attention", unit="raw")
    assert bare(model)
    with repe.steer(model, vector, gate=lambda mean, last: last), pytest.raises(TypeError, match="a gate must return"):
        logits(model, batch)


def test_the_mean_of_a_gate_leaves_out_the_first_token_unless_it_is_alone(model: Any, vector: ConceptVector) -> None:
    seen: list[Tensor] = []

    def gate(mean: Tensor, last: Tensor) -> Tensor:
        seen.append(mean)
        return torch.ones(len(mean), dtype=torch.bool)

    batch = repe.models.tokens.pad([[9, 17, 30, 12], [44]], side="left")
    (hidden,) = oracles.recorded(model, [find_stack(model).blocks[BLOCK]], **batch)
    with repe.steer(model, vector, gate=gate):
        logits(model, batch)
        model.generate(**batch, max_new_tokens=3)
    expected = torch.stack([hidden[0, 1:].mean(0), hidden[1, -1]])
    for mean in seen:
        torch.testing.assert_close(mean, expected, **CLOSE)


def test_a_gate_decides_once_a_generation(model: Any, vector: ConceptVector) -> None:
    batch, seen = zoo.inputs("llama"), []

    def gate(mean: Tensor, last: Tensor) -> Tensor:
        seen.append(last)
        return torch.tensor([True, False, True])

    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}):
        with repe.steer(model, vector, gate=gate):
            model.generate(**batch, max_new_tokens=4, eos_token_id=None, **how)
        assert len(seen) == 1
        seen.clear()


def test_a_gate_holds_when_tokens_are_decoded_by_hand(model: Any, vector: ConceptVector) -> None:
    batch, new = zoo.inputs("llama"), torch.tensor([[9], [17], [30]])
    is_open = torch.tensor([True, False, True])

    def decoded() -> Tensor:
        with torch.no_grad():
            cache = model(**batch).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        return logits(model, {"input_ids": new, "attention_mask": mask}, past_key_values=cache)

    with repe.steer(model, vector, is_open.float()):
        expected = decoded()
    with repe.steer(model, vector, 1.0, gate=lambda mean, last: is_open):
        torch.testing.assert_close(decoded(), expected, **CLOSE)


def test_a_gate_on_pieces_of_a_told_length(model: Any, vector: ConceptVector) -> None:
    seen: list[Tensor] = []

    def gate(mean: Tensor, last: Tensor) -> Tensor:
        seen.append(last)
        return torch.tensor([True])

    with repe.steer(model, vector, gate=gate, scope="generated", prompt_length=4):
        cache = None
        for piece in ([9, 17], [30, 12], [44], [45]):
            with torch.no_grad():
                cache = model(input_ids=torch.tensor([piece]), past_key_values=cache).past_key_values
    assert len(seen) == 2
    (hidden,) = oracles.recorded(model, [find_stack(model).blocks[BLOCK]], input_ids=torch.tensor([[9, 17, 30, 12]]))
    torch.testing.assert_close(seen[-1], hidden[:, -1], **CLOSE)


def test_a_gate_of_another_model_or_stack(model: Any, vector: ConceptVector) -> None:
    for wrong, match in (
        (oracles.vector(d_model=16), "d_model 16 and holds block 3, and the model has d_model 32"),
        (oracles.vector(n_blocks=5), "holds block 4, and the model has d_model 32 and 4 blocks"),
        (oracles.vector(stack="encoder"), "the gate's vector reads the encoder, and the decoder is steered"),
    ):
        with pytest.raises(ValueError, match=match):
            repe.steer(model, vector, gate=repe.Gate(wrong, block=0))
    theirs = {"key": "another", "sketch": {"scales": {}, "matrices": {}, "adapter": {}}}
    foreign = replace(vector, provenance={"fingerprint": theirs, "model": "another"})
    with pytest.warns(UserWarning, match="extracted from other weights"):
        handle = repe.steer(model, vector, blocks=2, gate=repe.Gate(foreign, block=0))
    assert handle.attached
    handle.remove()
    assert bare(model)


def test_a_gates_block_counts_from_the_end(model: Any, batch: dict, vector: ConceptVector) -> None:
    condition = oracles.vector(seed=5)
    found = []
    for block in (1, -3):
        with repe.steer(model, vector, 2.0, blocks=2, gate=repe.Gate(condition, block=block)):
            found.append(logits(model, batch))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="the gate reads block 3, after the first edit"):
        repe.steer(model, vector, blocks=2, gate=repe.Gate(condition, block=-1))
    with pytest.raises(IndexError, match="the gate reads block -5, and the model has 4"):
        repe.steer(model, vector, blocks=2, gate=repe.Gate(condition, block=-5))


# warnings about numbers


def test_alpha_changed_on_a_filled_cache_warns_once(model: Any, vector: ConceptVector) -> None:
    with repe.steer(model, vector, 1.0) as handle:
        cache = model(input_ids=torch.tensor([[9, 17]])).past_key_values
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        handle.alpha = 2.0
        with pytest.warns(UserWarning, match="cache holds keys and values of steered tokens"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        handle.alpha = 3.0
        model(input_ids=torch.tensor([[9, 17]]))


def test_bfloat16_that_rounds_the_edit_away_warns_once(model: Any, batch: dict, vector: ConceptVector) -> None:
    model = model.bfloat16()
    with repe.steer(model, vector, 0.001):
        with pytest.warns(UserWarning, match="bfloat16 rounds most of it away"):
            logits(model, batch)
        logits(model, batch)


def test_an_addition_that_the_dtype_cannot_hold(model: Any, batch: dict, vector: ConceptVector) -> None:
    handle = repe.steer(model.half(), vector, 1e6)
    with pytest.raises(OverflowError, match="more than torch"):
        logits(model, batch)
    handle.alpha = 0.1
    logits(model, batch)
    handle.remove()


def test_float16_that_overflows_is_told_at_the_end(model: Any, batch: dict, vector: ConceptVector) -> None:
    model.half()
    find_stack(model).blocks[BLOCK].register_forward_hook(lambda _m, _a, h: h * 0 + 60_000)
    handle = repe.steer(model, vector, 9_000.0 / vector.scale[BLOCK].item() / vector.write[BLOCK].max().item())
    other = repe.steer(model, oracles.vector(seed=1), 9_000.0)
    with pytest.warns(RuntimeWarning, match="steered activations overflowed float16") as warned:
        assert len(generated(model, [9, 17], 2)) == 4
    assert len(warned) == 1
    other.remove()
    logits(model, batch)
    with pytest.warns(RuntimeWarning, match="steered activations overflowed float16"):
        handle.remove()
    find_stack(model).blocks[BLOCK]._forward_hooks.clear()
    assert bare(model)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_float16_that_overflowed_without_the_steering_is_not_told(
    model: Any, batch: dict, vector: ConceptVector, alpha: float
) -> None:
    block = find_stack(model.half()).blocks[BLOCK]
    with oracles.changed(block, lambda h: h * 0 + torch.inf), repe.steer(model, vector, alpha):
        logits(model, batch)
        generated(model, [9, 17], 2)


# gradients


def grown(model: Any, batch: dict, n: int = 1) -> list[Tensor]:
    """The gradients of all parameters after `n` forwards of different padding and one backward."""
    model.zero_grad()
    loss = sum(model(**zoo.inputs("llama", (5, 3 + i, 7), side="right")).logits.square().mean() for i in range(n))
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("site", SITES)
def test_gradients_flow_through_the_edit(batch: dict, site: str) -> None:
    model, vector = zoo.build("llama").double(), oracles.vector(site=site)
    weight = find_stack(model).blocks[0].mlp.down_proj.weight
    for edit in ("add", "ablate"):
        with repe.steer(model, vector, 1.0, edit=edit):
            model(**batch).logits.square().mean().backward()
            slope, step = weight.grad.norm().item(), 1e-3  # Llama's norms compute in float32
            uphill = step * weight.grad / slope
            with torch.no_grad():
                weight += uphill
                high = model(**batch).logits.square().mean().item()
                weight -= 2 * uphill
                low = model(**batch).logits.square().mean().item()
                weight += uphill
        assert slope == pytest.approx((high - low) / (2 * step), rel=1e-3)
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("site", SITES)
def test_checkpoints_change_no_gradient(batch: dict, site: str, enabled: str, reentrant: bool) -> None:
    """Two forwards of different padding before one backward: each is replayed with its own tokens."""
    model, vector = zoo.build("llama").train(), oracles.vector(site=site)
    model.get_input_embeddings().weight.requires_grad_(True)
    how = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with repe.steer(model, vector, torch.tensor([1.0, -2.0, 0.5]), edit="ablate", blocks=[1, 2]):
        expected = grown(model, batch, n=2)
    if enabled == "before":
        model.activation_checkpointing_enable(**how)
    with repe.steer(model, vector, torch.tensor([1.0, -2.0, 0.5]), edit="ablate", blocks=[1, 2]):
        if enabled == "after":
            model.activation_checkpointing_enable(**how)
        actual = grown(model, batch, n=2)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert repe.status(model) == []
    assert all(type(b._gradient_checkpointing_func).__module__ == "functools" for b in find_stack(model).blocks)


@pytest.mark.parametrize("change", ["remove", "alpha"])
def test_a_change_before_the_backward_is_refused_where_it_would_be_wrong(batch: dict, change: str) -> None:
    model = zoo.build("llama").train()
    model.activation_checkpointing_enable()
    for site in SITES:
        with repe.steer(model, oracles.vector(site=site), 1.0) as handle:
            loss = model(**batch).logits.square().mean()
            if change == "remove":
                handle.remove()
            else:
                handle.alpha = 2.0
            if site == "block":
                loss.backward()
            else:
                with pytest.raises(RuntimeError, match="between a forward and its backward"):
                    loss.backward()


def test_a_users_own_checkpoint_around_a_steered_block_is_refused(model: Any, batch: dict, vector: Any) -> None:
    block = find_stack(model).blocks[BLOCK]
    plain = block.__call__

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(plain, *args, use_reentrant=False, **kwargs)

    with repe.steer(model, vector, 1.0):
        model.model.layers[BLOCK] = Wrapped()
        loss = model(**batch, use_cache=False).logits.square().mean()
        with pytest.raises(RuntimeError, match="outside of the forward of its stack"):
            loss.backward()
        model.model.layers[BLOCK] = block


def test_inference_mode_and_then_autograd(model: Any, batch: dict, vector: ConceptVector) -> None:
    with torch.inference_mode(), repe.steer(model, vector, 1.0) as handle:
        handle.alpha = 2.0
        handle.vector = oracles.vector(seed=1)
        model(**batch)
        handle.alpha = [1.0, 2.0, 3.0]
        model(**batch)
        with torch.inference_mode(False), torch.enable_grad():
            model(**batch).logits.square().mean().backward()
            handle.alpha = 0.5
            model(**batch).logits.square().mean().backward()
    assert find_stack(model).blocks[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_a_model_in_training_mode_is_steered_and_stays_in_it(model: Any, batch: dict, vector: ConceptVector) -> None:
    model.train()
    plain = logits(model, batch)
    with repe.steer(model, vector, 1.0):
        assert not torch.equal(logits(model, batch), plain)
        repe.capture(model, zoo.tokenizer(), ["ab"])
    assert all(module.training for module in model.modules())


# wrapped models


def test_a_model_inside_peft(batch: dict, vector: ConceptVector) -> None:
    plain = zoo.build("llama")
    with warnings.catch_warnings(action="ignore"):
        wrapped = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with repe.steer(plain, vector, 2.0, scope="generated"):
        expected = generated(plain, [9, 17, 30])
    with repe.steer(wrapped, vector, 2.0, scope="generated"):
        ids = torch.tensor([[9, 17, 30]])
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
        assert wrapped.generate(input_ids=ids, **how)[0].tolist() == expected
        assert repe.status(wrapped)
    assert bare(wrapped)


class Wrapper(nn.Module):
    """As DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_model_inside_a_wrapper(model: Any, batch: dict, vector: ConceptVector) -> None:
    with repe.steer(model, vector, 1.0):
        expected, ids = logits(model, batch), generated(model, [9, 17])
    wrapped = Wrapper(model)
    with repe.steer(wrapped, vector, 1.0):
        assert torch.equal(logits(wrapped, batch), expected)
        assert generated(wrapped.module, [9, 17]) == ids
    assert bare(wrapped)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "disk"], ids=str)
def test_a_model_that_accelerate_dispatched(batch: dict, vector: ConceptVector, device_map: Any, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = zoo.build("llama")
    with repe.steer(model, vector, 2.0, scope="generated"):
        expected = generated(model, [9, 17, 30])
    if device_map == "disk":
        model = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        model = accelerate.dispatch_model(model, device_map, force_hooks=True)
    plain = logits(model, batch)
    for site in SITES:
        with repe.steer(model, oracles.vector(site=site), 2.0, scope="generated"):
            ids = generated(model, [9, 17, 30])
        assert ids == expected or site != "block"
        assert torch.equal(logits(model, batch), plain)


class Int8Linear(nn.Module):
    """As quantised layers are: integer buffers, no parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("site", SITES)
def test_a_quantised_model(model: Any, batch: dict, site: str) -> None:
    for block in find_stack(model).blocks:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Int8Linear(linear))
    module, vector = find_stack(model).site(site, BLOCK), oracles.vector(site=site)
    (before,) = oracles.recorded(model, [module], **batch)
    with repe.steer(model, vector, 1.0):
        (after,) = oracles.recorded(model, [module], **batch)
    in_text = batch["attention_mask"].bool()
    added = (after - before)[in_text]
    torch.testing.assert_close(added, oracles.shift_of(vector, 1.0).expand_as(added), atol=1e-5, rtol=1e-5)


def test_a_generate_of_the_users_own_is_kept(model: Any, vector: ConceptVector) -> None:
    def mine(*args: Any, **kwargs: Any) -> str:
        return "mine"

    model.generate = mine
    with pytest.warns(UserWarning, match="edited nothing"), repe.steer(model, vector, 1.0):
        assert model.generate(torch.tensor([[9]])) == "mine"
    assert model.generate is mine


@pytest.mark.parametrize(
    ("place", "how", "is_told"),
    [
        (0.5, {}, True),
        (0.95, {}, False),
        (None, {}, False),
        (0.5, {"scope": "prompt"}, False),
        (0.5, {"alpha": 0.0}, False),
        (0.5, {"blocks": "all"}, False),
        (0.5, {"keep_norm": True}, False),
    ],
)
def test_a_concept_that_is_read_and_not_written_is_warned_of_when_it_is_steered(
    model: Any, vector: ConceptVector, place: float | None, how: dict, is_told: bool
) -> None:
    known = replace(vector, provenance={} if place is None else {"above_random": {str(vector.recommended[0]): place}})
    assert known.is_written is (None if place is None else place >= 0.95)
    assert ("read, not written" in repr(known)) is (known.is_written is False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        repe.steer(model, known, **{"alpha": 1.0, **how})._take_off()
    told = [warning for warning in caught if issubclass(warning.category, NotWrittenWarning)]
    assert len(told) == is_told
    assert all("further than along 50% of random directions" in str(w.message) and w.filename == __file__ for w in told)


def test_of_what_is_only_read_is_warned_once_when_a_strength_is_chosen(
    model: Any, batch: dict, vector: ConceptVector
) -> None:
    known = replace(vector, provenance={"above_random": {str(vector.recommended[0]): 0.5}})
    with repe.steer(model, known, 0.0) as handle:
        with pytest.warns(NotWrittenWarning, match="further than along 50%"):
            handle.alpha = 1.0
        handle.alpha = -1.0
        logits(model, batch)
