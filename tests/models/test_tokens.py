"""Texts to tokens, padding, positions and scopes, against loops over single tokens."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from repe.models.tokens import encode, pad, positions_at, strings
from repe.steering.gate import Gate, PromptReader
from repe.steering.scope import NAMED_SCOPES, check_inside, check_scope, in_scope, needs_prompt_length
from tests import oracles, zoo

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "ab"}]


def spelled(text: str) -> list[int]:
    """Tokens by their names, one a character or a mark in angle brackets."""
    vocabulary, ids = zoo.tokenizer().get_vocab(), []
    while text:
        name = next((mark for mark in zoo.SPECIAL_TOKENS if text.startswith(mark)), text[0])
        ids.append(vocabulary[name])
        text = text[len(name) :]
    return ids


# encoding


def test_a_text_has_one_bos_and_its_characters():
    assert encode(zoo.tokenizer(), "a b") == spelled("<bos>a b")


def test_a_chat_has_one_bos_and_opens_the_answer():
    assert encode(zoo.tokenizer(), CHAT) == spelled("<bos><system>S<end><user>u<end><assistant>")


@pytest.mark.parametrize("content", ["ab", " ab ", "u", "a<end>b"])
def test_a_begun_answer_is_continued(content):
    ids = encode(zoo.tokenizer(), [*CHAT, {"role": "assistant", "content": content}])
    assert ids == spelled("<bos><system>S<end><user>u<end><assistant>" + content.strip())


def test_an_answer_of_no_tokens_is_one_to_be_opened():
    assert encode(zoo.tokenizer(), [*CHAT, {"role": "assistant", "content": ""}]) == encode(zoo.tokenizer(), CHAT)


def test_messages_may_be_any_mapping_and_are_not_changed():
    messages = tuple(dict(m) for m in BEGUN)
    assert encode(zoo.tokenizer(), messages) == encode(zoo.tokenizer(), BEGUN)
    assert list(messages) == BEGUN


@pytest.mark.parametrize("padded", [True, False])
def test_the_tokenizer_stays_as_it_was(padded):
    tokenizer = zoo.tokenizer(pad=padded)
    before = state_of(tokenizer)
    for text in ("a b", CHAT, BEGUN):
        assert encode(tokenizer, text) == encode(zoo.tokenizer(), text)
    strings(tokenizer, [3, 20])
    assert state_of(tokenizer) == before
    assert (tokenizer.pad_token is None) != padded


def state_of(tokenizer) -> tuple:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    public = {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"}
    return backend, public, tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side


def test_a_text_of_no_tokens_is_refused():
    tokenizer = zoo.tokenizer()
    assert encode(tokenizer, "") == spelled("<bos>")
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="the text '' has no tokens: give a text of at least one token"):
        encode(tokenizer, "")


def test_every_token_is_read_as_it_stands():
    tokenizer = zoo.tokenizer()
    assert strings(tokenizer, encode(tokenizer, "a b")) == ("<bos>", "a", " ", "b")


# padding


ragged = st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=6), min_size=1, max_size=4)


@given(ragged, st.sampled_from(["left", "right"]))
def test_padding_hides_all_but_the_rows(rows, side):
    batch = pad(rows, side)
    width = max(map(len, rows))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), width)
    for ids, mask, row in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), rows, strict=True):
        fill = [0] * (width - len(row))
        assert ids == (fill + row if side == "left" else row + fill)
        assert mask == (fill + [1] * len(row) if side == "left" else [1] * len(row) + fill)
    assert {t.dtype for t in batch.values()} == {torch.long}


# positions and scopes, by a loop over tokens


@dataclass
class Layout:
    """A batch of prompts padded anywhere, and tokens written after it: what a loop over its tokens says of each."""

    mask: list[list[bool]]
    n_written: int
    slots: list[int]
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [sum(row) for row in self.mask]

    @property
    def positions(self) -> list[list[int | None]]:
        """The position of every slot asked for; None at padding."""
        table = []
        for row in self.mask:
            counter, places = 0, []
            for real in row + [True] * self.n_written:
                places.append(counter if real else None)
                counter += real
            table.append([places[slot] for slot in self.slots])
        return table

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.slots), torch.tensor(self.mask)


@st.composite
def layouts(draw) -> Layout:
    rows, width, written = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(0, 4))
    row = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    first = draw(st.integers(0, width + written - 1))
    last = draw(st.integers(first, width + written - 1))
    return Layout([draw(row) for _ in range(rows)], written, list(range(first, last + 1)))


def expected(scope, position: int, length: int) -> bool:
    """Whether one token is named, as the documentation has it."""
    if isinstance(scope, str):
        first, end = {
            "all": (0, None),
            "prompt": (0, length),
            "generated": (length, None),
            "answer": (length - 1, None),
        }[scope]
        return first <= position and (end is None or position < end)
    if isinstance(scope, slice):
        # a text far longer than any here stands for one that is not over; negatives count from the prompt's end
        bounds = [b if b is None or b >= 0 else max(length + b, 0) for b in (scope.start, scope.stop)]
        return position in range(1000)[slice(*bounds, scope.step)]
    return any(position == (p if p >= 0 else length + p) for p in scope)


def assert_named(scope, layout: Layout) -> None:
    slots, mask = layout.tensors()
    positions, valid = positions_at(slots, mask)
    lengths = torch.tensor(layout.lengths)[:, None] if needs_prompt_length(scope) else None
    named = in_scope(check_scope(scope), positions, lengths, slots)
    named = torch.ones_like(valid) if named is None else named.expand_as(valid)
    for row, places in enumerate(layout.positions):
        for column, position in enumerate(places):
            wanted = position is not None and expected(scope, position, layout.lengths[row])
            assert bool((named & valid)[row, column]) == wanted, (scope, row, column)


@given(layouts())
def test_positions_count_what_is_not_padding(layout):
    positions, valid = positions_at(*layout.tensors())
    assert positions.shape == valid.shape == (len(layout.mask), len(layout.slots))
    for row, places in enumerate(layout.positions):
        for column, position in enumerate(places):
            assert bool(valid[row, column]) == (position is not None)
            if position is not None:
                assert positions[row, column] == position


def test_without_a_mask_slots_are_positions():
    positions, valid = positions_at(torch.tensor([3, 4]), None)
    assert positions.tolist() == [[3, 4]]
    assert valid is None


@given(layouts(), st.sampled_from(NAMED_SCOPES))
def test_named_scopes(scope_layout, name):
    assert_named(name, scope_layout)


bounds = st.none() | st.integers(-9, 9)


FIVE = Layout([[True] * 5], 3, list(range(8)))


@given(layouts(), bounds, bounds, st.none() | st.integers(1, 4))
@example(FIVE, 1, None, 2)
@example(FIVE, -2, None, 2)
@example(FIVE, 1, -1, 3)
def test_slices(layout, start, stop, step):
    assert_named(slice(start, stop, step), layout)


@given(layouts(), st.lists(st.integers(-7, 10), min_size=1, max_size=4))
def test_lists_of_positions(layout, wanted):
    # positions before the start of a prompt are refused by `check_inside`
    assert_named([max(p, -min(layout.lengths)) for p in wanted], layout)


@given(layouts(), st.data())
def test_masks_name_columns_and_nothing_beyond_them(layout, data):
    width = data.draw(st.integers(1, 8))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = [data.draw(row) for _ in layout.mask]
    slots, _ = layout.tensors()
    named = in_scope(check_scope(torch.tensor(mask)), positions_at(*layout.tensors())[0], None, slots)
    assert named.tolist() == [[slot < width and row[slot] for slot in layout.slots] for row in mask]


def test_everything_is_no_mask_at_all():
    assert in_scope("all", torch.arange(3)[None], None, torch.arange(3)) is None


@pytest.mark.parametrize(
    ("scope", "needed"),
    [
        ("all", False), ("prompt", True), ("generated", True), ("answer", True), (slice(None), False),
        (slice(2, 5, 2), False), (slice(-1, None), True), (slice(None, -1), True), ((0, 3), False), ((0, -3), True),
        (torch.ones(1, 1, dtype=torch.bool), False),
    ],
)  # fmt: skip
def test_which_scopes_need_the_prompts_length(scope, needed):
    assert needs_prompt_length(scope) is needed


@pytest.mark.parametrize(
    ("scope", "kind", "message"),
    [
        ("promt", ValueError, r"scope='promt' is not known: use one of \('all', 'prompt', 'generated', 'answer'\)"),
        (slice(0, 4, 0), ValueError, "the step must be positive"),
        (slice(None, None, -1), ValueError, "the step must be positive"),
        (slice(0.5, 4), TypeError, "the bounds and the step of a slice must be integers"),
        (slice("a"), TypeError, "the bounds and the step of a slice must be integers"),
        (slice(0, 4, 1.5), TypeError, "the bounds and the step of a slice must be integers"),
        ([], TypeError, r"scope=\[\]: expected a name of"),
        ([1.0], TypeError, "expected a name of"),
        ([True, False], TypeError, "expected a name of"),
        ([[0]], TypeError, "expected a name of"),
        (3, TypeError, "expected a name of"),
        (None, TypeError, "a slice, at least one integer, or a mask"),
        (torch.ones(2, 2), TypeError, r"is a boolean mask \(rows, tokens\), got torch.float32 of \(2, 2\)"),
        (torch.ones(2, dtype=torch.bool), TypeError, r"got torch.bool of \(2,\)"),
    ],
)
def test_scopes_that_cannot_be_meant(scope, kind, message):
    with pytest.raises(kind, match=message):
        check_scope(scope)


def test_lists_and_ranges_become_tuples():
    assert check_scope([0, -2]) == (0, -2)
    assert check_scope(range(3)) == (0, 1, 2)


def test_positions_before_the_start_of_the_shortest_prompt_are_refused():
    check_inside([-3, 0, 99], shortest=3)
    with pytest.raises(IndexError, match="scope position -4 lies before the start of a prompt of 3 tokens"):
        check_inside([-4, 0], shortest=3)


# gates


def score(gate: Gate, x: Tensor) -> Tensor:
    v, row = gate.vector, gate.vector.row(gate.at)
    return (x.double() @ v.read[row].double() - v.midpoint[row].double()) / v.scale[row].double()


@pytest.mark.parametrize("token", ["last", "mean"])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_opens_on_its_side_of_the_threshold(token, above, block, dtype):
    gate = Gate(oracles.vector(), threshold=-0.2, above=above, block=block, token=token)
    assert gate.at == (oracles.BLOCK if block is None else block)
    generator = torch.Generator().manual_seed(0)
    mean, last = (8 * torch.randn(2, 12, zoo.D_MODEL, generator=generator)).to(dtype)
    scores = score(gate, mean if token == "mean" else last)
    wanted = scores > -0.2 if above else scores < -0.2
    assert 0 < wanted.sum() < 12
    assert torch.equal(gate.decide(mean, last), wanted)


@given(layouts(), st.integers(1, 7))
def test_a_prompt_in_chunks_is_the_whole_prompt(layout, size):
    mask = torch.tensor(layout.mask)
    positions, valid = positions_at(torch.arange(mask.shape[1]), mask)
    is_last = (positions == mask.sum(1, keepdim=True) - 1) & valid
    hidden = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(0))
    poisoned = hidden.masked_fill(~valid[..., None], torch.nan)
    seen: list[tuple[Tensor, Tensor]] = []

    def decide(mean: Tensor, last: Tensor) -> Tensor:
        seen.append((mean, last))
        return mean[:, 0] > 0

    reader = PromptReader(decide)
    for start in range(0, mask.shape[1], size):
        chunk = slice(start, start + size)
        reader.see(poisoned[:, chunk], valid[:, chunk], is_last[:, chunk])
    for row in range(len(mask)):
        tokens = hidden[row, mask[row]]
        torch.testing.assert_close(seen[-1][0][row], tokens.mean(0))
        assert torch.equal(seen[-1][1][row], tokens[-1])
        assert reader.open[row] == (tokens.mean(0)[0] > 0) or tokens.mean(0)[0].abs() < 1e-6
    reader.restart()
    assert reader.open is None


def test_halves_are_summed_in_float32():
    seen = []
    reader = PromptReader(lambda mean, last: seen.append(mean) or torch.tensor([True]))
    on = torch.ones(1, 5000, dtype=torch.bool)
    reader.see(torch.full((1, 5000, 1), 100.0, dtype=torch.float16), on, on & False)
    assert seen[0].item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("decision", "got"),
    [
        (True, "True"),
        (torch.tensor([1.0, 0.0]), r"torch.float32 \(2,\)"),
        (torch.tensor([True]), r"torch.bool \(1,\)"),
        (torch.ones(2, 1, dtype=torch.bool), r"torch.bool \(2, 1\)"),
        ([True, False], r"\[True, False\]"),
    ],
)
def test_a_gate_returns_one_boolean_a_row(decision, got):
    on = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=rf"a gate must return a boolean tensor of shape \(2,\), one a row; got {got}"):
        PromptReader(lambda mean, last: decision).see(torch.zeros(2, 3, 4), on, on)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"threshold": float("nan")}, ValueError, "a gate's threshold must be finite, got nan"),
        ({"token": "first"}, ValueError, "reads the 'last' token or the 'mean' of the prompt, got token='first'"),
        ({"block": 9}, IndexError, "has no block 9"),
        ({"vector": oracles.vector(site="mlp")}, ValueError, "its vector is of the site 'mlp'"),
        (
            {"vector": oracles.vector() - oracles.vector()},
            ValueError,
            r"no distance between the poles at block 1 \(scale 0\)",
        ),
    ],
)
def test_gates_that_cannot_be_meant(options, kind, message):
    with pytest.raises(kind, match=message):
        Gate(**{"vector": oracles.vector(), **options})
