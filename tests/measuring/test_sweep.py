"""Sweeps: whatever is shared between texts, strengths and vectors, the scores are those of steering one by one."""

import copy
import json
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import repe
from repe.data.items import Item
from repe.measuring import fanout
from repe.measuring import sweep as sweeping
from repe.measuring.curve import Scores
from repe.measuring.fanout import Fanout, Span
from repe.measuring.scoring import log_likelihoods
from repe.measuring.sweep import Record, scores_of, strengths_of, sweep, sweeps
from repe.reading import trees as prefixes
from tests import oracles, zoo

ITEMS = [
    Item("ab", ("cdef", "c", "cd", "x"), 1, group="one"),  # options that begin others
    Item("abc", ("d", "yz"), 0),  # a prompt that another begins, and an option that is another item's
    Item("ab", ("yyy", "cz"), 1, group="one"),  # the first item's prompt
    Item("then a long one", ("!", "?!", ", a"), 2),
]
TASKS = {"some": ITEMS[:3], "one": ITEMS[3:]}
ALPHAS = (-1.0, 0.0, 0.7)
ROWS_ONLY = ("bloom", "mpt", "mamba")
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "everywhere from the first block": ({"blocks": 0}, "block"),
    "answers at the last block": ({"blocks": -1, "scope": "answer", "edit": "ablate"}, "block"),
    "prompts in the middle": ({"blocks": 1, "scope": "prompt", "edit": "clamp", "target": 2.0}, "block"),
    "what follows, at two blocks": ({"blocks": [1, 3], "scope": "generated", "edit": "piecewise"}, "block"),
    "a slice at two blocks": ({"blocks": [0, 2], "scope": slice(1, -1), "keep_norm": True}, "block"),
    "positions from both ends": ({"blocks": 2, "scope": [-1, 1]}, "block"),
    "attention at the first block": ({"blocks": 0, "scope": "answer"}, "attention"),
    "attention at two blocks": ({"blocks": [1, 2], "edit": "erase"}, "attention"),
    "mlp": ({"blocks": 2, "scope": "prompt"}, "mlp"),
    "embedding": ({"blocks": 1, "scope": slice(-2, None)}, "embedding"),
}
LACKING = {("granite", "attention"), ("granite", "mlp"), ("opt", "mlp"), ("mamba", "mlp"), ("llava", "embedding")}
EVERYWHERE = [(name, case) for name in zoo.DECODERS for case in CASES if (name, CASES[case][1]) not in LACKING]


@cache
def built(name: str) -> Any:
    """A model that no test changes."""
    return zoo.build(name)


@pytest.fixture(scope="module")
def vector() -> Any:
    return oracles.vector(recommended=(2,))


@pytest.fixture(scope="module")
def other() -> Any:
    return oracles.vector(seed=1, recommended=(2,))


def by_loop(model: Any, tokenizer: Any, vector: Any, tasks: Any = TASKS, alphas: Any = ALPHAS, **how: Any) -> Any:
    """The same scores, from one strength after the other, every option in a row of its own."""
    rows: dict[str, list] = {name: [] for name in tasks}
    for alpha in alphas:
        with repe.steer(model, vector, alpha, tokenizer=tokenizer, **how):
            for name, items in tasks.items():
                rows[name].append(log_likelihoods(model, tokenizer, items, steering=repe.status(model)))
    return {name: tabled(rows[name]) for name in tasks}


def tabled(rows: list[list[Tensor]]) -> np.ndarray:
    table = np.full((len(rows), len(rows[0]), max(map(len, rows[0]))), np.nan)
    for i, row in enumerate(rows):
        for j, options in enumerate(row):
            table[i, j, : len(options)] = options
    return table


def assert_close(got: dict[str, Scores], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert list(got) == list(expected)
    for name, table in expected.items():
        table = table.log_likelihoods if isinstance(table, Scores) else table
        np.testing.assert_allclose(got[name].log_likelihoods, table, atol=tolerance, rtol=1e-5)


def same(one: dict[str, Scores], other: dict[str, Scores]) -> bool:
    return one == other and list(one) == list(other)


class Spy:
    """Stands in for a function: keeps what it was called with."""

    def __init__(self, monkeypatch: Any, owner: Any, name: str) -> None:
        self.calls: list[tuple] = []
        real = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    def __len__(self) -> int:
        return len(self.calls)


@pytest.fixture
def trees(monkeypatch: Any) -> Spy:
    """The calls that make the inputs of trees."""
    return Spy(monkeypatch, fanout, "inputs")


@pytest.fixture
def forwards(monkeypatch: Any, model: Any) -> list[tuple[int, ...]]:
    """The shapes of a Llama's forwards, as they come. Its class is watched: a hook would stop trees."""
    shapes: list[tuple[int, ...]] = []
    kind = type(model.model)
    real = kind.forward

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return shapes


def state_of(model: nn.Module) -> list[Any]:
    """What a sweep must leave as it was."""
    parts = [
        (m.training, [*m._forward_hooks], [*m._forward_pre_hooks], {"forward", "generate"} & {*vars(m)})
        for m in model.modules()
    ]
    return [parts, [(name, p.requires_grad, p._version) for name, p in model.named_parameters()]]


# exact


@pytest.mark.parametrize(("name", "case"), EVERYWHERE)
def test_a_sweep_is_steering_and_scoring_at_every_strength(name: str, case: str, tokenizer: Any, trees: Spy) -> None:
    how, site = CASES[case]
    model, vector = built(name), oracles.vector(site=site)
    before = state_of(model)
    got = sweep(model, tokenizer, vector, TASKS, ALPHAS, **how)
    assert bool(len(trees)) == (name not in ROWS_ONLY)
    assert state_of(model) == before
    assert_close(got, by_loop(model, tokenizer, vector, **how))


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_vectors_beside_the_concept_have_the_scores_that_they_have_alone(
    name: str, tokenizer: Any, vector: Any, other: Any
) -> None:
    model, third = built(name), oracles.vector(seed=2)
    found = sweeps(model, tokenizer, vector, [other, third], TASKS, ALPHAS, scope="answer", batch_tokens=60)
    assert len(found) == 3
    for got, along in zip(found, (vector, other, third), strict=True):
        assert_close(got, by_loop(model, tokenizer, along, blocks=2, scope="answer"))


@pytest.mark.parametrize("site", ["block", "attention"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "falcon", "gptj"])
def test_several_trees_in_a_batch(name: str, tokenizer: Any, site: str, trees: Spy) -> None:
    model, vector = built(name), oracles.vector(recommended=(2,), site=site)
    prompts = (
        "the quick brown fox jumps",
        "a lazy dog, of all things, lies",
        "nothing but words, words, words, and words",
    )
    tasks = {"t": [Item(prompt, (" yes", "no", " n"), group=prompt) for prompt in prompts]}
    got = sweep(model, tokenizer, vector, tasks, ALPHAS, scope="answer")
    assert [len(args[0]) for args, _ in trees.calls] == [3, 3]
    assert_close(got, by_loop(model, tokenizer, vector, tasks, scope="answer"))


@pytest.mark.parametrize("scope", ["all", "answer", "prompt", "generated", slice(1, 4), [0, -2]], ids=str)
@pytest.mark.parametrize("edit", ["add", "ablate", "clamp", "piecewise"])
@pytest.mark.parametrize("blocks", [0, [1, 2]], ids=str)
def test_every_scope_goes_with_every_edit(model: Any, tokenizer: Any, vector: Any, scope: Any, edit: str, blocks: Any):
    how = {"scope": scope, "edit": edit, "blocks": blocks, "target": 1.5 if edit == "clamp" else None}
    got = sweep(model, tokenizer, vector, TASKS, ALPHAS, **how)
    assert_close(got, by_loop(model, tokenizer, vector, **how))


@pytest.mark.parametrize("batch_tokens", [0, 1, 20, 50, 100])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_batches_of_any_size_give_the_same(name: str, tokenizer: Any, vector: Any, batch_tokens: int) -> None:
    got = sweep(built(name), tokenizer, vector, TASKS, ALPHAS, batch_tokens=batch_tokens, scope="answer")
    assert_close(got, sweep(built(name), tokenizer, vector, TASKS, ALPHAS, scope="answer"))


@pytest.mark.parametrize("name", [name for name in zoo.DECODERS if name not in ROWS_ONLY])
def test_no_block_writes_to_what_is_handed_to_every_strength(name: str, tokenizer: Any, vector: Any) -> None:
    """One strength a forward: nothing is copied for it."""
    how: Any = {"blocks": 2} if (name, "attention") in LACKING else {"blocks": 2, "site": "attention", "unit": "raw"}
    tasks = {"t": ITEMS[:1]}
    got = sweep(built(name), tokenizer, vector, tasks, ALPHAS, batch_tokens=1, **how)
    assert_close(got, sweep(built(name), tokenizer, vector, tasks, ALPHAS, **how))


@pytest.mark.parametrize("scope", ["all", "answer", "generated"])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_gate_opens_for_the_rows_it_opens_for_alone(name: str, tokenizer: Any, other: Any, scope: str, trees: Spy):
    model, vector = built(name), oracles.vector(recommended=(2,))
    for gate in (repe.Gate(other, block=1), repe.Gate(other, block=0, token="mean", above=False, threshold=-0.1)):
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS, scope=scope, gate=gate, batch_tokens=100)
        expected = by_loop(model, tokenizer, vector, scope=scope, gate=gate)
        assert_close(got, expected)
    assert not len(trees)


def test_several_vectors_of_one_edit(model: Any, tokenizer: Any, vector: Any, other: Any) -> None:
    got = sweep(model, tokenizer, [vector, other], TASKS, ALPHAS, edit="rotate", theta=1.0)
    assert_close(got, by_loop(model, tokenizer, [vector, other], edit="rotate", theta=1.0))


def test_a_task_has_its_own_answers_and_groups_and_the_order_of_its_items(model: Any, tokenizer: Any, vector: Any):
    for name, scores in sweep(model, tokenizer, vector, TASKS, ALPHAS).items():
        assert scores.name == name
        assert scores.answers.tolist() == [item.answer for item in TASKS[name]]
        assert list(scores.groups) == [item.group for item in TASKS[name]]


def test_scores_of_are_those_of_a_sweep(model: Any, tokenizer: Any) -> None:
    rows = [log_likelihoods(model, tokenizer, ITEMS)] * 2
    assert np.array_equal(scores_of("t", ITEMS, rows).log_likelihoods, tabled(rows), equal_nan=True)


# models that are wrapped, rough, or not at hand


class Wrapper(nn.Module):
    """As DistributedDataParallel does: no config, and a forward of any arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_wrapped_models_are_swept_on_trees_too(model: Any, tokenizer: Any, vector: Any, scope: str, trees: Spy):
    with warnings.catch_warnings(action="ignore"):
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        lora = peft.get_peft_model(zoo.build("llama"), config).eval()
    for wrapped in (lora, Wrapper(model)):
        trees.calls.clear()
        got = sweep(wrapped, tokenizer, vector, TASKS, ALPHAS, scope=scope)
        assert len(trees)
        assert_close(got, by_loop(wrapped, tokenizer, vector, scope=scope))
    assert_close(got, sweep(model, tokenizer, vector, TASKS, ALPHAS, scope=scope))


def test_virtual_tokens_of_an_adapter_stand_in_the_way_of_trees(tokenizer: Any, vector: Any, trees: Spy) -> None:
    with warnings.catch_warnings(action="ignore"):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        prompted = peft.get_peft_model(zoo.build("llama"), config).eval()
    got = sweep(prompted, tokenizer, vector, TASKS, ALPHAS)
    assert not len(trees)
    assert_close(got, by_loop(prompted, tokenizer, vector))


def test_offloaded_models_are_swept_in_rows(model: Any, tokenizer: Any, vector: Any, trees: Spy) -> None:
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    got = sweep(offloaded, tokenizer, vector, TASKS, ALPHAS)
    assert not len(trees)
    assert_close(got, by_loop(model, tokenizer, vector))


def test_a_map_of_one_device_is_no_obstacle(tokenizer: Any, vector: Any, trees: Spy) -> None:
    model = zoo.build("llama")
    model.hf_device_map = {"": 0}
    sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert len(trees)


def test_experts_that_are_counted_by_rows_stand_in_the_way_of_trees(tokenizer: Any, vector: Any, trees: Spy) -> None:
    model = zoo.build("mixtral")
    model.config.output_router_logits = True
    got = sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert not len(trees)
    assert_close(got, by_loop(built("mixtral"), tokenizer, vector))


def test_logarithms_are_taken_in_float32(model: Any, vector: Any) -> None:
    logits = torch.randn(1, 2, 3, zoo.VOCABULARY).bfloat16() * 9
    spans = [Span((5, 6, 7, 8), 2)]

    class Known:
        def logits(self, *call: Any) -> Any:
            yield slice(0, 2), logits[:, :, 1:]

    batch = fanout.Batch([0], 1, 3, dict, [0], [torch.arange(3)])
    known: Any = Known()
    found = sweeping.gains(known, batch, spans, torch.zeros(2), None)
    expected = logits[0].float().log_softmax(-1)
    torch.testing.assert_close(found[:, 0], expected[:, 1, 7] + expected[:, 2, 8], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mamba"])
def test_half_precision_is_near_the_plain_loop(name: str, tokenizer: Any, vector: Any) -> None:
    model = zoo.build(name).bfloat16()
    got = sweep(model, tokenizer, vector, TASKS, ALPHAS)
    for task, table in by_loop(model, tokenizer, vector).items():
        np.testing.assert_allclose(got[task].log_likelihoods, table, atol=0.3, rtol=0.05)


def test_autocast_is_no_disagreement(model: Any, tokenizer: Any, vector: Any, trees: Spy) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert len(trees)
    assert_close(got, by_loop(model, tokenizer, vector), 0.5)


def test_double_precision(tokenizer: Any, vector: Any, trees: Spy) -> None:
    model = zoo.build("llama").double()
    assert_close(sweep(model, tokenizer, vector, TASKS, ALPHAS), by_loop(model, tokenizer, vector), 1e-5)
    assert len(trees)


def test_inference_mode_around_is_no_obstacle(model: Any, tokenizer: Any, vector: Any) -> None:
    with torch.inference_mode():
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert same(got, sweep(model, tokenizer, vector, TASKS, ALPHAS))


# free


@pytest.mark.parametrize(
    ("site", "first", "once"), [("block", 0, 1), ("block", 2, 3), ("attention", 2, 2), ("mlp", 0, 0)]
)
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("alphas", [(1.0,), (0.0, 1.0, 2.0, 3.0)], ids=len)
def test_blocks_that_no_strength_changes_run_once_a_batch(
    monkeypatch: Any, model: Any, tokenizer: Any, site: str, first: int, once: int, others: int, alphas: Any
) -> None:
    blocks, calls = list(model.model.layers), [0] * zoo.N_BLOCKS
    real = type(blocks[0]).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[next(i for i, block in enumerate(blocks) if block is self)] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(blocks[0]), "forward", counted)
    monkeypatch.setattr(sweeping, "_compare", lambda *call: None)
    batches = Spy(monkeypatch, Fanout, "begin")
    along = [oracles.vector(seed=seed, site=site) for seed in range(1 + others)]
    sweeps(model, tokenizer, along[0], along[1:], TASKS, alphas, blocks=[first, 3], batch_tokens=12)
    n_batches = len(batches) if once else len(batches) // len(along)
    assert n_batches > 1
    assert calls[:once] == [n_batches] * once
    assert min(calls[once:]) >= n_batches * len(along)
    assert len({*calls[once:]}) == 1


def test_where_there_is_room_all_strengths_of_all_texts_are_one_forward(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, forwards: list
) -> None:
    monkeypatch.setattr(sweeping, "_compare", lambda *call: None)
    sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert len(forwards) == 2
    (begun, _), (all_rows, width) = forwards
    assert all_rows == len(ALPHAS) * begun
    prompts = {tuple(tokenizer(item.prompt)["input_ids"]) for item in ITEMS}
    assert begun * width < sum(map(len, prompts)) + 30  # the options' tokens, and filler


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 12, 30, 90, 300])
def test_no_forward_has_more_tokens_than_were_allowed_unless_it_is_a_single_text(
    model: Any, tokenizer: Any, vector: Any, other: Any, forwards: list, batch_tokens: int, gated: bool
) -> None:
    gate = repe.Gate(other, block=0) if gated else None
    sweep(model, tokenizer, vector, TASKS, (-2, -1, 0, 1, 2), batch_tokens=batch_tokens, gate=gate)
    longest = len(tokenizer(ITEMS[-1].prompt)["input_ids"]) + 2
    assert all(rows * width <= batch_tokens or (rows == 1 and width <= longest) for rows, width in forwards)
    assert max(rows * width for rows, width in forwards) > min(batch_tokens / 2, longest - 1)


@pytest.mark.parametrize("most", [1, 10_000, 20_000])
@pytest.mark.parametrize("wrapped", [False, True])
def test_no_forward_has_more_logits_than_were_allowed_unless_it_is_of_one_strength(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, wrapped: bool, most: int
) -> None:
    sizes, real = [], type(model.lm_head).forward

    def counted(self: Any, hidden: Tensor) -> Tensor:
        if self is model.lm_head:
            sizes.append((hidden.shape[0], hidden.shape[1] * zoo.VOCABULARY))
        return real(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setattr(sweeping, "_compare", lambda *call: None)
    monkeypatch.setattr(fanout, "MOST_LOGITS", most)
    batches = Spy(monkeypatch, Fanout, "logits")
    alphas = torch.linspace(-1, 1, 8)
    swept = sweep(Wrapper(model) if wrapped else model, tokenizer, vector, TASKS, alphas)
    (height,) = {args[1].height for args, _ in batches.calls}
    assert all(rows * size <= most or rows == height for rows, size in sizes)
    monkeypatch.undo()
    assert_close(swept, sweep(model, tokenizer, vector, TASKS, alphas))


def test_masks_are_made_a_batch_at_a_time(model: Any, tokenizer: Any, vector: Any, trees: Spy) -> None:
    spans = [Span((*range(20 * length, 21 * length), length), length) for length in range(2, 12)]
    with repe.steer(model, vector, 0.0) as handle:
        batches = Fanout(model, handle, "", 30).batches(spans, 2)
        assert len(batches) > 3
        assert not len(trees)
        handle._touched = True


@pytest.mark.parametrize("why_padded", ["", "to try rows"])
@pytest.mark.parametrize("strengths", [1, 3])
def test_all_strengths_have_room_in_every_batch_and_batches_are_full(
    model: Any, vector: Any, why_padded: str, strengths: int
) -> None:
    spans = [Span((*range(20 * length, 21 * length), length), length) for length in range(2, 12)]
    with repe.steer(model, vector, 0.0) as handle:
        batches = Fanout(model, handle, why_padded, 60).batches(spans, strengths)
        handle._touched = True
    assert sorted(text for batch in batches for text in batch.texts) == [*range(10)]
    assert all(batch.height == 1 or batch.height * batch.width * strengths <= 60 for batch in batches)
    for batch, after in pairwise(batches):
        narrowest = min(len(slots) for slots in after.slots)
        assert (batch.height + 1) * narrowest * strengths > 60


def test_small_trees_are_grown_where_one_large_one_costs_more(monkeypatch: Any, model: Any, vector: Any) -> None:
    """A tree a prompt, or larger ones: texts that share prompts in part, with many nodes in all."""
    spans = [Span((1, *range(9 + 50 * i, 39 + 50 * i), option), 31) for i in range(2) for option in (5, 6)]
    with repe.steer(model, vector, 0.0) as handle:
        for cost, grown in ((lambda tree, d_model: len(tree) ** 2, 2), (lambda tree, d_model: len(tree), 1)):
            monkeypatch.setattr(fanout, "cost_of", cost)
            (batch,) = Fanout(model, handle, "", 8192).batches(spans, 2)
            assert batch.height == grown
            assert sorted(batch.texts) == [0, 1, 2, 3]
        handle._touched = True


def test_every_item_is_encoded_once(model: Any, vector: Any) -> None:
    class Counting:
        def __init__(self) -> None:
            self.inner, self.texts = zoo.tokenizer(), []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, **how: Any) -> Any:
            self.texts.append(text)
            return self.inner(text, **how)

    tokenizer = Counting()
    sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert sorted(tokenizer.texts) == sorted(text for item in ITEMS for text in (item.prompt, *item.options))


# trees that are wrong


def assert_found_out(model: Any, tokenizer: Any, vector: Any, expected: Any, tasks: Any = TASKS, **how: Any) -> None:
    with pytest.warns(UserWarning, match=r"does not give texts in trees.*in a padded row instead") as seen:
        got = sweep(model, tokenizer, vector, tasks, **{"alphas": ALPHAS, **how})
    assert len(seen) == 1
    assert_close(got, expected)


@pytest.mark.parametrize("scope", ["all", "generated"])
@pytest.mark.parametrize("name", ROWS_ONLY)
def test_a_family_that_is_listed_by_mistake_is_found_out(
    monkeypatch: Any, name: str, tokenizer: Any, vector: Any, scope: str, tmp_path: Any
) -> None:
    model, how = built(name), {"scope": scope, "batch_tokens": 100}
    expected = sweep(model, tokenizer, vector, TASKS, ALPHAS, **how)
    monkeypatch.setattr(prefixes, "FAMILIES", prefixes.FAMILIES | {name})
    monkeypatch.setattr(prefixes, "LAYER_TYPES", {*prefixes.LAYER_TYPES, "linear_attention"})
    before = state_of(model)
    assert_found_out(model, tokenizer, vector, expected, **how)
    assert_found_out(model, tokenizer, vector, expected, resume=tmp_path / "kept", **how)
    assert_found_out(model, tokenizer, vector, expected, resume=tmp_path / "kept", **how)
    assert state_of(model) == before


def test_what_came_of_wrong_trees_is_never_taken_from_the_record(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, tmp_path: Any
) -> None:
    """The first batch passes, the last does not; both ways have a batch of the same texts."""
    tasks = {"t": [Item("a", ("b", "cc")), Item("a long prompt", ("b", "cc"))]}
    real = sweeping.gains

    def wrong(fan: Any, batch: Any, spans: Any, alphas: Tensor, outset: Any) -> Tensor:
        found = real(fan, batch, spans, alphas, outset)
        return found if fan.why_padded else found - (1e-4 if batch.width < 6 else 1.0)

    expected = sweep(model, tokenizer, vector, tasks, ALPHAS, batch_tokens=1)
    monkeypatch.setattr(sweeping, "gains", wrong)
    for _ in range(2):
        with pytest.warns(UserWarning, match="does not give texts in trees"):
            got = sweep(model, tokenizer, vector, tasks, ALPHAS, batch_tokens=1, resume=tmp_path / "kept")
        assert same(got, expected) or np.abs(got["t"].log_likelihoods - expected["t"].log_likelihoods).max() < 2e-5


def test_blocks_that_are_passed_over_wrongly_are_found_out(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    expected, real = sweep(model, tokenizer, vector, TASKS, ALPHAS), fanout.passing
    monkeypatch.setattr(fanout, "passing", lambda blocks, output: real(blocks, output.roll(1, 1)))
    assert_found_out(model, tokenizer, vector, expected)


def test_what_a_large_strength_drowns_is_found_out_at_a_small_one(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    how = {"alphas": (0.0, 1e6), "blocks": 3}
    expected, real = sweep(model, tokenizer, vector, TASKS, **how), fanout.inputs

    def wrong(*given: Any) -> Any:
        return {**(batch := real(*given)), "position_ids": 0 * batch["position_ids"]}

    monkeypatch.setattr(fanout, "inputs", wrong)
    assert_found_out(model, tokenizer, vector, expected, **how)


def test_what_a_small_strength_does_not_show_is_found_out_at_a_large_one(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    expected = sweep(model, tokenizer, vector, TASKS, ALPHAS, scope="prompt")
    monkeypatch.setattr(Fanout, "_edited", lambda self, span: torch.ones(len(span.ids), dtype=torch.bool))
    assert_found_out(model, tokenizer, vector, expected, scope="prompt")


def test_what_counts_columns_is_found_out_at_the_last_text(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    """The longest text stands first, so that its columns are its places."""
    tasks = {"t": [Item("a", ("bcdefg", "z"))]}
    expected, real = sweep(model, tokenizer, vector, tasks, ALPHAS), fanout.inputs

    def wrong(*given: Any) -> Any:
        batch = real(*given)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    monkeypatch.setattr(fanout, "inputs", wrong)
    tasks["t"][0] = Item("a", ("bcdefg", "zz"))
    expected = by_loop(model, tokenizer, vector, tasks)
    assert_found_out(model, tokenizer, vector, expected, tasks)


def test_a_window_that_a_config_does_not_tell_of_is_found_out_at_the_longest_text(
    monkeypatch: Any, tokenizer: Any, vector: Any
) -> None:
    """The last text is shorter than the window."""
    model, tasks = built("mistral"), {"t": [Item("a", ("b long option", "zz"))]}
    expected = by_loop(model, tokenizer, vector, tasks)
    monkeypatch.setattr(prefixes, "_windowed", lambda visible, depth, config: [("", visible)])
    assert_found_out(model, tokenizer, vector, expected, tasks)


@pytest.mark.parametrize("wrong", [0, -1])
def test_the_narrowest_and_the_widest_batch_are_checked(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, wrong: int
) -> None:
    widths: set[int] = set()
    real = sweeping.gains

    def gains(fan: Any, batch: Any, *rest: Any) -> Tensor:
        if not fan.why_padded:
            widths.add(batch.width)
        off = not fan.why_padded and batch.width == sorted(every)[wrong]
        return real(fan, batch, *rest) - float(off)

    monkeypatch.setattr(sweeping, "gains", gains)
    every = {0}
    expected = sweep(model, tokenizer, vector, TASKS, ALPHAS, batch_tokens=12)
    every = set(widths)
    assert len(every) > 2
    with pytest.warns(UserWarning, match="does not give texts in trees"):
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS, batch_tokens=12)
    assert_close(got, expected)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_strengths_that_end_in_nothing_are_no_fault_of_the_trees(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, value: float
) -> None:
    real = sweeping.gains

    def overflowing(fan: Any, batch: Any, spans: Any, alphas: Tensor, outset: Any) -> Tensor:
        return torch.where(alphas[:, None] == alphas.max(), value, real(fan, batch, spans, alphas, outset))

    monkeypatch.setattr(sweeping, "gains", overflowing)
    for name in ("llama", "bloom"):
        with pytest.raises(OverflowError, match=r"strengths \[0.75\] the model puts out no numbers: leave them out"):
            sweep(built(name), tokenizer, vector, TASKS, (0.0, 0.1, 0.75))


# what is left behind


def test_an_exception_anywhere_leaves_the_model_as_it_was(monkeypatch: Any, tokenizer: Any, vector: Any, other: Any):
    model, tasks = zoo.build("llama"), {"t": ITEMS[:1]}
    model.model.layers[1].train()
    model.lm_head.weight.requires_grad_(False)
    batch, before = zoo.inputs("llama"), state_of(model)
    plain = model(**batch).logits
    part = type(model.model.layers[0].mlp)
    real, left = part.forward, [0]

    def breaking(self: Any, hidden: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(self, hidden)

    monkeypatch.setattr(part, "forward", breaking)
    for error in (OSError("broken"), KeyboardInterrupt(), RuntimeError("which is a warning first")):
        for number in range(1, 100):
            left[0] = number
            try:
                sweeps(model, tokenizer, vector, [other], tasks, ALPHAS, scope="answer")
            except (type(error), UserWarning):
                assert state_of(model) == before
                assert not repe.status(model)
            else:
                break
        assert 8 < number < 99
    monkeypatch.undo()
    assert state_of(model) == before
    assert torch.equal(model(**batch).logits, plain)
    handle = repe.steer(model, vector, 0.0)
    assert torch.equal(model(**batch).logits, plain)
    handle.remove()


def test_an_exception_in_rows_is_no_fault_of_trees(monkeypatch: Any, tokenizer: Any, vector: Any) -> None:
    def breaking(*call: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(sweeping, "gains", breaking)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        sweep(built("bloom"), tokenizer, vector, TASKS, ALPHAS)


def test_a_model_in_training_is_swept_as_in_evaluation_and_no_gradient_is_kept(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    in_training, trains = copy.deepcopy(model).train(), []
    in_training.config._attn_implementation = "sdpa"
    for layer in in_training.model.layers:
        layer.self_attn.attention_dropout = 0.5
    real = sweeping.gains

    def gains(fan: Any, *rest: Any) -> Tensor:
        found = real(fan, *rest)
        trains.append((torch.is_grad_enabled(), fan.model.training))
        return found

    monkeypatch.setattr(sweeping, "gains", gains)
    assert same(*(sweep(m, tokenizer, vector, TASKS, ALPHAS) for m in (in_training, model)))
    assert {*trains} == {(False, False)}
    assert all(part.training for part in in_training.modules())


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_a_handle_of_the_users_own_applies_and_is_left_alone(
    model: Any, tokenizer: Any, vector: Any, other: Any, scope: str, trees: Spy
) -> None:
    with repe.steer(model, other, 0.5, blocks=1, scope="answer", prompt_length=5) as own:
        before = state_of(model)
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS, scope=scope)
        assert state_of(model) == before
        assert (own.prompt_length, own.alpha, own.scope) == (5, 0.5, "answer")
        assert repe.status(model) == [own]
        expected = by_loop(model, tokenizer, vector, scope=scope)
        with pytest.raises(ValueError, match="need"):
            sweep(model, tokenizer, vector, TASKS, ALPHAS, edit="clamp")
        assert own.prompt_length == 5
    assert not len(trees)
    assert_close(got, expected)


def test_blocks_passed_over_get_back_a_forward_of_their_own() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    one.forward = own = lambda x: x
    with suppress(KeyError), fanout.passing([one, two], "output"):
        assert (one(0), two(0)) == ("output", "output")
        raise KeyError
    assert vars(one)["forward"] is own
    assert "forward" not in vars(two)


# going on


SPLIT = {"batch_tokens": 12, "scope": "answer"}


class Stop(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("gated", [False, True])
def test_a_sweep_that_was_broken_off_goes_on_where_it_was(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, other: Any, forwards: list, tmp_path: Any, gated: bool
) -> None:
    how = {**SPLIT, **({"gate": repe.Gate(other, block=0)} if gated else {})}
    others = [] if gated else [other]
    real, done, stop = Record.put, [], [-1]

    def put(self: Any, *line: Any) -> None:
        if len(done) == stop[0]:
            raise Stop
        real(self, *line)
        done.append(len(forwards))

    monkeypatch.setattr(Record, "put", put)
    whole = sweeps(model, tokenizer, vector, others, TASKS, ALPHAS, **how)
    at = [0, *done]
    assert len(at) > 4
    for k in range(len(at)):
        path = tmp_path / f"deeper/{k}"
        done.clear()
        stop[0] = k
        if k < len(at) - 1:
            with pytest.raises(Stop):
                sweeps(model, tokenizer, vector, others, TASKS, ALPHAS, resume=path, **how)
        else:
            sweeps(model, tokenizer, vector, others, TASKS, ALPHAS, resume=path, **how)
        lines = path.read_text().split("\n")
        assert [json.loads(line) for line in lines[:-1]]
        assert len(lines) == k + 2
        assert lines[-1] == ""
        stop[0] = -1
        done.clear()
        forwards.clear()
        resumed = sweeps(model, tokenizer, vector, others, TASKS, ALPHAS, resume=path, **how)
        assert all(map(same, resumed, whole))
        assert len(done) == len(at) - 1 - k
        begun_again = k % (1 + len(others)) != 0
        assert len(forwards) == at[-1] - at[k] + begun_again


def test_what_was_written_after_the_last_line_break_is_forgotten(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any
) -> None:
    path = tmp_path / "kept"
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, **SPLIT)
    written = path.read_bytes()
    key, lines = json.loads(written.split(b"\n")[0])["sweep"], written.split(b"\n")[1:-1]
    assert len(lines) > 2
    ends = [place for place, byte in enumerate(written) if byte == ord("\n")]
    for cut in {*range(0, len(written), 37), *ends, *(end + 1 for end in ends)}:
        path.write_bytes(written[:cut])
        record = Record.open(path, key)
        kept = max(written[:cut].count(b"\n") - 1, 0)
        assert len(record.kept) == kept
        head = written[: written.index(b"\n") + 1]
        assert path.read_bytes() == head + b"".join(line + b"\n" for line in lines[:kept])
    path.write_bytes(written[:-9])
    assert same(sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, **SPLIT), whole)
    assert path.read_bytes().count(b"\n") == written.count(b"\n")


def retrained() -> Any:
    model = zoo.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


GATE = repe.Gate(oracles.vector(seed=3), block=0)
DIFFERENT: dict[str, dict[str, Any]] = {
    "model": {"model": retrained()},
    "dtype": {"model": zoo.build("llama").bfloat16()},
    "vector": {"vector": oracles.vector(seed=7, recommended=(2,))},
    "alpha": {"alphas": (-1.0, 0.0, 0.8)},
    "fewer alphas": {"alphas": ALPHAS[:2]},
    "scope": {"scope": "all"},
    "blocks": {"blocks": [1, 2]},
    "edit": {"edit": "piecewise"},
    "unit": {"unit": "raw"},
    "keep_norm": {"keep_norm": True},
    "fewer items": {"tasks": {"t": ITEMS[:3]}},
    "another option": {"tasks": {**TASKS, "one": [Item(ITEMS[3].prompt, ("!", "?!", ", b"))]}},
    "another prompt": {"tasks": {**TASKS, "one": [Item("then a long ona", ITEMS[3].options)]}},
    "others": {"others": [oracles.vector(seed=1)]},
    "gate": {"gate": GATE},
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_the_file_of_another_sweep_is_refused_and_left_alone(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any, change: str
) -> None:
    path = tmp_path / "kept"

    def run(model=model, vector=vector, tasks=TASKS, alphas=ALPHAS, others=(), **how: Any) -> Any:
        how = {"resume": path, "scope": "answer", **how}
        return sweeps(model, tokenizer, vector, others, tasks, alphas, **how)

    run()
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"kept holds another sweep, or something else.*Name another file"):
        run(**DIFFERENT[change])
    assert path.read_bytes() == written
    run()


def test_another_gate_site_vector_beside_dtype_or_handle_of_the_users_is_another_sweep(
    model: Any, tokenizer: Any, vector: Any, other: Any, tmp_path: Any
) -> None:
    number = iter(range(10))
    for one, two in (
        ({"gate": GATE}, {"gate": repe.Gate(GATE.vector, block=0, threshold=0.1)}),
        ({"others": [other]}, {"others": [oracles.vector(seed=5)]}),
        ({"edit": "ablate"}, {"edit": "ablate", "site": "mlp"}),
        ({"others": [other], "unit": "sigma", "edit": "add"}, {"others": [other], "unit": "norm", "edit": "add"}),
    ):
        path = tmp_path / str(next(number))
        others = one.pop("others", []), two.pop("others", [])
        sweeps(model, tokenizer, vector, others[0], TASKS, ALPHAS, resume=path, **one)
        with pytest.raises(ValueError, match="holds another sweep"):
            sweeps(model, tokenizer, vector, others[1], TASKS, ALPHAS, resume=path, **two)
    rough = zoo.build("llama").bfloat16()
    sweep(rough, tokenizer, vector, TASKS, ALPHAS, resume=tmp_path / "rough")
    with pytest.raises(ValueError, match="holds another sweep"):
        sweep(copy.deepcopy(rough).float(), tokenizer, vector, TASKS, ALPHAS, resume=tmp_path / "rough")
    path = tmp_path / "beside"
    with repe.steer(model, other, 0.5) as own:
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
        own.alpha = 0.6
        with pytest.raises(ValueError, match="holds another sweep"):
            sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)


def test_bare_constants_of_another_gain_or_at_another_block_are_another_sweep(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any
) -> None:
    with repe.steer(model, vector, 0.0) as handle:
        constants = handle.edit.on(handle.stack).constants[2]
        handle._touched = True
    sweep(model, tokenizer, constants, TASKS, ALPHAS, blocks=2, resume=tmp_path / "kept")
    signed = replace(constants, gain="sign", needs_projection=True)
    for given, blocks in ((signed, 2), (constants, 1)):
        with pytest.raises(ValueError, match="holds another sweep"):
            sweep(model, tokenizer, given, TASKS, ALPHAS, blocks=blocks, resume=tmp_path / "kept")


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b"\xff\xfe\x00", b'{"sweep": "12345678"}', b"\n"], ids=repr)
def test_a_file_that_is_no_record_is_refused_and_left_alone(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any, content: bytes
) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="theirs holds another sweep, or something else"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["{}", "7", "not json", '{"padded": 0, "vector": 0, "texts": [0], "scores": ["a"]}'])
def test_a_line_that_is_no_batch_is_named(model: Any, tokenizer: Any, vector: Any, tmp_path: Any, line: str) -> None:
    path = tmp_path / "kept"
    sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    head, *rest = path.read_text().split("\n")
    path.write_text("\n".join([head, line, *rest]))
    with pytest.raises(ValueError, match=r"kept, line 2: not the scores of a batch"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)


# what cannot be meant


@pytest.mark.parametrize(
    "alphas",
    [
        (0.5, -2, 0), [0.5, -2, -0.0], [0, 0.5, -2.0, 0, 0.5], torch.tensor([0.5, -2.0, 0.0]), np.array([0.5, 0, -2]),
        torch.tensor([0, 0.5, -2]).double(), {0.5, -2, 0}, [np.float32(0.5), torch.tensor(-2), 0], iter((0.5, -2, 0)),
    ],
)  # fmt: skip
def test_strengths_are_sorted_and_each_once_whatever_holds_them(alphas: Any) -> None:
    strengths = strengths_of(alphas)
    assert strengths.dtype == torch.float64
    assert strengths.tolist() == [-2.0, 0.0, 0.5]
    assert not torch.signbit(strengths[1])


def test_strengths_that_are_one_in_float32_are_one() -> None:
    assert strengths_of([0.1, np.float32(0.1)]).tolist() == [0.1]


def test_integers_are_strengths(model: Any, tokenizer: Any, vector: Any) -> None:
    assert same(*(sweep(model, tokenizer, vector, TASKS, a) for a in (torch.tensor([2, -1]), [-1.0, 2.0, 2.0])))


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        (1.0, "numbers in a row"), (torch.tensor(1.0), "numbers in a row"), (torch.ones(2, 2), "numbers in a row"),
        ("12", "numbers in a row"), (["1"], "numbers in a row"), ([None], "numbers in a row"),
        (None, "numbers in a row"), ([[1.0], 2.0], "numbers in a row"), ([1j], "numbers in a row"),
        ([], "at least one finite"), ([0.0, np.nan], "at least one finite"), ([np.inf], "at least one finite"),
        ([1e300], "numbers in a row|at least one finite"),
    ],
    ids=repr,
)  # fmt: skip
def test_strengths_that_are_no_row_of_finite_numbers_are_refused(
    model: Any, tokenizer: Any, vector: Any, alphas: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"alphas are ({message})"):
        sweep(model, tokenizer, vector, TASKS, alphas)
    assert not repe.status(model)


@pytest.mark.parametrize(
    ("tasks", "how", "error", "message"),
    [
        ({}, {}, ValueError, "at least one task with items, got {}"),
        ({"t": ITEMS, "u": []}, {}, ValueError, r"at least one task with items, got {'t': 4, 'u': 0}"),
        ({"t": [Item("a", ("b", ""))]}, {}, ValueError, "the option '' has no tokens"),
        ({"t": [*ITEMS, Item("a", ("b",))]}, {}, ValueError, r"items \[4\] of 't' have fewer than two options"),
        ({"t": [Item("a", ()), *ITEMS]}, {}, ValueError, r"items \[0\] of 't' have fewer than two options"),
        ({"t": [Item("a", ("b", "c"), 2)]}, {}, ValueError, r"items \[0\] of 't' have no right option"),
        (TASKS, {"scope": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "a mask of one batch is no scope"),
        (TASKS, {"scope": [-5]}, IndexError, "position -5 lies before the start of a prompt of 3 tokens"),
        (TASKS, {"scope": "answers"}, ValueError, "scope='answers' is not known"),
        (TASKS, {"resume": "x", "gate": lambda mean, last: mean[:, 0] > 0}, ValueError, "cannot be told of a function"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_before_anything_is_run(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tasks: Any, how: dict, error: type, message: str
) -> None:
    before = state_of(model)
    with pytest.raises(error, match=message):
        sweep(model, tokenizer, vector, tasks, ALPHAS, **how)
    assert not forwards
    assert state_of(model) == before


def test_others_have_one_vector_to_stand_in_for(model: Any, tokenizer: Any, vector: Any, other: Any) -> None:
    with pytest.raises(ValueError, match="this edit has 2 vectors, and got 1 in their place"):
        sweeps(model, tokenizer, [vector, other], [vector], TASKS, ALPHAS, edit="rotate", theta=1.0)
    with pytest.raises(ValueError, match="do not belong to one model and site"):
        sweeps(model, tokenizer, vector, [oracles.vector(site="mlp")], TASKS, ALPHAS)
    assert not repe.status(model)


@pytest.mark.parametrize("name", [*zoo.ENCODERS, *zoo.ENCODER_DECODERS])
def test_models_that_see_the_option_are_refused(name: str, tokenizer: Any, vector: Any) -> None:
    with pytest.raises(ValueError, match=r"(is an encoder-decoder|is not causal).*need a causal language model"):
        sweep(built(name), tokenizer, vector, TASKS, ALPHAS)


def test_a_scope_that_names_no_token_is_not_silent(model: Any, tokenizer: Any, vector: Any, trees: Spy) -> None:
    with pytest.warns(UserWarning, match="edited nothing in its lifetime"):
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS, scope=[100])
    assert len(trees)
    assert np.ptp(got["some"].log_likelihoods[:, 0], axis=0).max() == 0


def test_progress_is_shown_where_it_is_asked_for(model: Any, tokenizer: Any, vector: Any, capsys: Any) -> None:
    sweep(model, tokenizer, vector, TASKS, ALPHAS)
    assert not capsys.readouterr().err
    sweep(model, tokenizer, vector, TASKS, ALPHAS, progress=True)
    assert "sweep: 100%" in capsys.readouterr().err


def test_the_log_says_in_what_way_texts_are_run(model: Any, tokenizer: Any, vector: Any, caplog: Any) -> None:
    with caplog.at_level("INFO", "repe"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS)
        sweep(built("bloom"), tokenizer, vector, TASKS, ALPHAS)
    assert "of trees, past 3 blocks" in caplog.text
    assert "of padded rows: model type 'bloom' is not among" in caplog.text
