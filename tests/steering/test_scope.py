"""Scopes to masks, against a loop over single tokens."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from repe.models.tokens import positions_at
from repe.steering.scope import NAMED_SCOPES, check_inside, check_scope, in_scope, needs_prompt_length
from tests.layouts import Layout, layouts


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
