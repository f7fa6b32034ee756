"""Fanning out: whatever texts and strengths share, the numbers are those of steering and scoring one by one."""

import copy
import warnings
from collections.abc import Sequence
from contextlib import suppress
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
from repe.data.answers import Answer
from repe.data.items import Item
from repe.measuring import fanout, scoring
from repe.measuring.curve import Scores
from repe.measuring.fanout import grow
from repe.measuring.scoring import (
    AnswerFanout,
    TransformersScorer,
    log_likelihoods,
)
from repe.measuring.sweep import Exam, sweep
from repe.models import families
from repe.models.blocks import find_stack
from repe.reading import trees as prefixes
from repe.reading.trees import Batch, Measurement, in_trees
from repe.steering import Edit
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


def ids_of(tokenizer: Any, item: Item) -> tuple[list[int], list[list[int]]]:
    """A prompt, and its options."""
    return tokenizer(item.prompt)["input_ids"], [
        tokenizer(option, add_special_tokens=False)["input_ids"] for option in item.options
    ]


def by_loop(model: Any, tokenizer: Any, vector: Any, tasks: Any = TASKS, alphas: Any = ALPHAS, **how: Any) -> Any:
    """The same scores, from one strength after the other, and one text after the other."""
    tables = {n: np.full((len(alphas), len(i), max(len(x.options) for x in i)), np.nan) for n, i in tasks.items()}
    for row, alpha in enumerate(alphas):
        with repe.steer(model, vector, alpha, **how) as handle:
            for name, items in tasks.items():
                for column, item in enumerate(items):
                    prompt, options = ids_of(tokenizer, item)
                    handle.prompt_length = len(prompt)
                    found = [oracles.log_p(model, prompt, option)[0] for option in options]
                    tables[name][row, column, : len(found)] = found
    return tables


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
    return Spy(monkeypatch, prefixes, "inputs")


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
    scorer, exam = TransformersScorer(model, tokenizer, batch_tokens=60), Exam(tokenizer, TASKS)
    edit = Edit.of(vector, scope="answer", blocks=2)
    for along in (vector, other, third):
        got = exam.scores(scorer, edit.along(along), ALPHAS)
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
    assert {len(args[0]) for args, _ in trees.calls} == {3}
    assert_close(got, by_loop(model, tokenizer, vector, tasks, scope="answer"))


@pytest.mark.parametrize("scope", ["all", "answer", "prompt", "generated", slice(1, 4), [0, -2]], ids=str)
@pytest.mark.parametrize("edit", ["add", "ablate", "clamp", "piecewise"])
@pytest.mark.parametrize("blocks", [0, [1, 2]], ids=str)
def test_every_scope_goes_with_every_edit(model: Any, tokenizer: Any, vector: Any, scope: Any, edit: str, blocks: Any):
    how = {"scope": scope, "edit": edit, "blocks": blocks, "target": 1.5 if edit == "clamp" else None}
    got = sweep(model, tokenizer, vector, TASKS, ALPHAS, **how)
    assert_close(got, by_loop(model, tokenizer, vector, **how))


@pytest.mark.parametrize("batch_tokens", [1, 20, 50, 100])
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
@pytest.mark.parametrize("alphas", [(1.0,), (0.0, 1.0, 2.0, 3.0)], ids=len)
def test_blocks_that_no_strength_changes_run_once_a_batch(
    monkeypatch: Any, model: Any, tokenizer: Any, site: str, first: int, once: int, alphas: Any
) -> None:
    blocks, calls = list(model.model.layers), [0] * zoo.N_BLOCKS
    real = type(blocks[0]).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[next(i for i, block in enumerate(blocks) if block is self)] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(blocks[0]), "forward", counted)
    monkeypatch.setattr(Measurement, "_check", lambda *call: None)
    batches = Spy(monkeypatch, AnswerFanout, "begin")
    sweep(model, tokenizer, oracles.vector(site=site), TASKS, alphas, blocks=[first, 3], batch_tokens=12)
    assert len(batches) > 1
    assert calls[:once] == [len(batches)] * once
    assert min(calls[once:]) >= len(batches)
    assert len({*calls[once:]}) == 1


def test_where_there_is_room_all_strengths_of_all_texts_are_one_forward(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, forwards: list
) -> None:
    monkeypatch.setattr(Measurement, "_check", lambda *call: None)
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
    monkeypatch.setattr(Measurement, "_check", lambda *call: None)
    monkeypatch.setattr(fanout, "MOST_LOGITS", most)
    batches = Spy(monkeypatch, AnswerFanout, "logits")
    alphas = torch.linspace(-1, 1, 8)
    swept = sweep(Wrapper(model) if wrapped else model, tokenizer, vector, TASKS, alphas)
    (height,) = {args[1].height for args, _ in batches.calls}
    assert all(rows * size <= most or rows == height for rows, size in sizes)
    monkeypatch.undo()
    assert_close(swept, sweep(model, tokenizer, vector, TASKS, alphas))


ANSWERS = [Answer((*range(20 * length, 21 * length), length), length) for length in range(2, 12)]


def fanned(model: Any, batch_tokens: int, strengths: int, answers: Any = ANSWERS) -> tuple[AnswerFanout, list[Batch]]:
    """What answers are run with, and their trees in batches."""
    stack = find_stack(model)
    planted, edited = grow(answers, "all", stack.d_model, batch_tokens)
    fan = AnswerFanout(model, stack, None, answers, torch.zeros(strengths), batch_tokens, edited)
    return fan, in_trees(planted, stack.module, fan.fits)


def test_masks_are_made_a_batch_at_a_time(model: Any, trees: Spy) -> None:
    _, batches = fanned(model, 30, 2)
    assert len(batches) > 3
    assert not len(trees)


@pytest.mark.parametrize("way", ["trees", "rows"])
@pytest.mark.parametrize("strengths", [1, 3])
def test_all_strengths_have_room_in_every_batch_and_batches_are_full(model: Any, way: str, strengths: int) -> None:
    fan, batches = fanned(model, 60, strengths)
    if way == "rows":
        batches = list(fan.in_rows(range(10)))
    assert sorted(text for batch in batches for text in batch.texts) == [*range(10)]
    assert all(batch.height == 1 or batch.height * batch.width * strengths <= 60 for batch in batches)
    for batch, after in pairwise(batches):
        narrowest = min(len(slots) for slots in after.slots)
        assert (batch.height + 1) * narrowest * strengths > 60


def test_answers_that_differ_in_their_last_token_share_a_row_if_their_prompts_end_alike(model: Any) -> None:
    answers = [Answer((1, 2, 3, 4), 3), Answer((1, 2, 3, 5), 3), Answer((1, 2, 3, 6), 2), Answer((1, 2, 4, 4), 3)]
    fan, _ = fanned(model, 8192, 1, answers)
    (batch,) = fan.in_rows(range(4))
    assert batch.height == 3
    assert dict(zip(batch.texts, batch.rows, strict=True)) == {0: 0, 1: 0, 2: 1, 3: 2}


def test_small_trees_are_grown_where_one_large_one_costs_more(monkeypatch: Any, model: Any) -> None:
    """A tree a prompt, or larger ones: texts that share prompts in part, with many nodes in all."""
    answers = [Answer((1, *range(9 + 50 * i, 39 + 50 * i), option), 31) for i in range(2) for option in (5, 6)]
    for cost, grown in ((lambda tree, d_model: len(tree) ** 2, 2), (lambda tree, d_model: len(tree), 1)):
        monkeypatch.setattr(prefixes.Tree, "cost", cost)
        _, (batch,) = fanned(model, 8192, 2, answers)
        assert batch.height == grown
        assert sorted(batch.texts) == [0, 1, 2, 3]


def test_trees_are_grown_once_for_the_same_answers(monkeypatch: Any, model: Any, tokenizer: Any, vector: Any) -> None:
    grown = Spy(monkeypatch, scoring, "grow")
    scorer, edit = TransformersScorer(model, tokenizer), Edit.of(vector, scope="answer")
    answers = Exam(tokenizer, TASKS).answers
    for along in (vector, vector * 2.0):
        scorer.log_likelihoods(answers, edit.along(along), ALPHAS)
    assert len(grown) == 1
    scorer.log_likelihoods(answers, Edit.of(vector), ALPHAS)
    scorer.log_likelihoods(answers[1:], Edit.of(vector), ALPHAS)
    assert len(grown) == 3


def test_every_item_is_encoded_once_with_what_stands_around_it_and_once_without(model: Any, vector: Any) -> None:
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
    texts = [item.prompt + option for item in ITEMS for option in ("", *item.options)]
    assert sorted(tokenizer.texts) == sorted(2 * texts)


# trees that are wrong


def assert_found_out(model: Any, tokenizer: Any, vector: Any, expected: Any, tasks: Any = TASKS, **how: Any) -> None:
    with pytest.warns(UserWarning, match=r"does not give texts in trees.*in padded rows instead") as seen:
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
    by_mistake = families.Family("listed by mistake", types=(name,), trees=True)
    monkeypatch.setattr(families, "_FAMILIES", [*families.known_families(), by_mistake])
    monkeypatch.setattr(families, "LAYER_TYPES", {*families.LAYER_TYPES, "linear_attention"})
    before = state_of(model)
    assert_found_out(model, tokenizer, vector, expected, **how)
    assert_found_out(model, tokenizer, vector, expected, resume=tmp_path / "kept", **how)
    assert_close(sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=tmp_path / "kept", **how), expected)
    assert state_of(model) == before


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
    expected, real = sweep(model, tokenizer, vector, TASKS, **how), prefixes.inputs

    def wrong(*given: Any) -> Any:
        return {**(batch := real(*given)), "position_ids": 0 * batch["position_ids"]}

    monkeypatch.setattr(prefixes, "inputs", wrong)
    assert_found_out(model, tokenizer, vector, expected, **how)


def test_what_a_small_strength_does_not_show_is_found_out_at_a_large_one(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    expected = sweep(model, tokenizer, vector, TASKS, ALPHAS, scope="prompt")
    monkeypatch.setattr(fanout, "scoped", lambda scope, length, start: torch.ones(length, dtype=torch.bool))
    assert_found_out(model, tokenizer, vector, expected, scope="prompt")


def test_what_counts_columns_is_found_out_at_the_last_text(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    """The longest text stands first, so that its columns are its places."""
    tasks = {"t": [Item("a", ("bcdefg", "z"))]}
    expected, real = sweep(model, tokenizer, vector, tasks, ALPHAS), prefixes.inputs

    def wrong(*given: Any) -> Any:
        batch = real(*given)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    monkeypatch.setattr(prefixes, "inputs", wrong)
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
    real = AnswerFanout.at

    def off(fan: AnswerFanout, batch: Batch, alphas: Tensor) -> Any:
        if batch.trees:
            widths.add(batch.width)
        return [found - float(bool(batch.trees) and batch.width == bad) for found in real(fan, batch, alphas)]

    monkeypatch.setattr(AnswerFanout, "at", off)
    bad = 0
    expected = sweep(model, tokenizer, vector, TASKS, ALPHAS, batch_tokens=12)
    assert len(widths) > 2
    bad = sorted(widths)[wrong]
    with pytest.warns(UserWarning, match="does not give texts in trees"):
        got = sweep(model, tokenizer, vector, TASKS, ALPHAS, batch_tokens=12)
    assert_close(got, expected)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_strengths_that_end_in_nothing_are_no_fault_of_the_trees(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, value: float
) -> None:
    real = AnswerFanout.at

    def overflowing(fan: AnswerFanout, batch: Batch, alphas: Tensor) -> Any:
        large = (alphas == alphas.max())[:, None]
        return [torch.where(large, value, found) for found in real(fan, batch, alphas)]

    monkeypatch.setattr(AnswerFanout, "at", overflowing)
    for name in ("llama", "bloom"):
        with pytest.raises(OverflowError, match=r"non-finite logits at the strengths \[0.75\].*: lower alpha"):
            sweep(built(name), tokenizer, vector, TASKS, (0.0, 0.1, 0.75))


# what is left behind


def test_an_exception_anywhere_leaves_the_model_as_it_was(monkeypatch: Any, tokenizer: Any, vector: Any) -> None:
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
                sweep(model, tokenizer, vector, tasks, ALPHAS, scope="answer")
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

    monkeypatch.setattr(AnswerFanout, "at", breaking)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        sweep(built("bloom"), tokenizer, vector, TASKS, ALPHAS)


def test_a_model_in_training_is_swept_as_in_evaluation_and_no_gradient_is_kept(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any
) -> None:
    in_training, trains = copy.deepcopy(model).train(), []
    in_training.config._attn_implementation = "sdpa"
    for layer in in_training.model.layers:
        layer.self_attn.attention_dropout = 0.5
    real = AnswerFanout.at

    def watched(fan: AnswerFanout, *rest: Any) -> Any:
        trains.append((torch.is_grad_enabled(), fan.model.training))
        return real(fan, *rest)

    monkeypatch.setattr(AnswerFanout, "at", watched)
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
        with pytest.raises(ValueError, match="need"):
            sweep(model, tokenizer, vector, TASKS, ALPHAS, edit="clamp")
        assert own.prompt_length == 5
    assert not len(trees)
    assert_close(
        got, {name: beside_by_hand(model, tokenizer, vector, other, items, scope) for name, items in TASKS.items()}
    )


def beside_by_hand(
    model: Any, tokenizer: Any, vector: Any, other: Any, items: Sequence[Item], scope: str
) -> np.ndarray:
    """(alphas, items, options): `other` at block 1 at strength 0.5 in the answer, and `vector` at block 2, with plain
    hooks on texts that stand alone."""
    table = np.full((len(ALPHAS), len(items), max(len(item.options) for item in items)), np.nan)
    for row, alpha in enumerate(ALPHAS):
        for column, item in enumerate(items):
            prompt, options = ids_of(tokenizer, item)
            own = oracles.shift_of(other, 0.5, 1), oracles.SCOPES["answer"][1], len(prompt), 1
            swept = oracles.shift_of(vector, alpha, 2), oracles.SCOPES[scope][1], len(prompt), 2
            with oracles.shifted(model, *own), oracles.shifted(model, *swept):
                found = [oracles.log_p(model, prompt, option)[0] for option in options]
            table[row, column, : len(found)] = found
    return table


def test_blocks_passed_over_get_back_a_forward_of_their_own() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    one.forward = own = lambda x: x
    with suppress(KeyError), fanout.passing([one, two], "output"):
        assert (one(0), two(0)) == ("output", "output")
        raise KeyError
    assert vars(one)["forward"] is own
    assert "forward" not in vars(two)


@pytest.mark.parametrize(("options", "way"), [(("b", "c"), "share too few"), (tuple("bcdefghijk"), "in 1 trees")])
def test_without_an_edit_trees_are_run_where_they_pay(
    model: Any, tokenizer: Any, caplog: Any, options: tuple[str, ...], way: str
) -> None:
    with caplog.at_level("INFO", "repe"):
        log_likelihoods(model, tokenizer, [Item("a long prompt", options)])
    assert way in caplog.text
