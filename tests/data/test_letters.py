"""Letters: items whose options change places mean what they meant."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repe.data.catalogue import LIBRARY
from repe.data.items import Item, load_items
from repe.data.letters import places, question, turned

texts = st.text(st.sampled_from("ab ,.\n"), min_size=1).map(str.split).map(" ".join).filter(bool)


ENDS = [[], ["Answer with the letter only."], ["", "Answer:"]]


@st.composite
def lettered(draw: st.DrawFn) -> Item:
    """An item that asks for a letter, its options in any order, as a text or a chat."""
    letters = "ABCDE"[: draw(st.integers(2, 5))]
    lines = [f"({letter}) {draw(texts)}" for letter in letters]
    asked = "\n".join([draw(texts), *lines, *draw(st.sampled_from(ENDS))])
    prompt = (
        asked if draw(st.booleans()) else ({"role": "user", "content": "(A) a"}, {"role": "user", "content": asked})
    )
    space = draw(st.sampled_from(["", " "]))
    options = tuple(space + letter for letter in draw(st.permutations(letters)))
    return Item(prompt, options, draw(st.integers(0, len(letters) - 1)), "g", {"x": 1})


def text_of(item: Item, option: str) -> str:
    """What stands behind an option's letter, to the next letter or the end."""
    asked = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
    after = asked.rpartition(f"({option.strip()}) ")[2]
    for end in ("\n(", "\nAnswer with", "\n\nAnswer:"):
        after = after.partition(end)[0]
    return after


@given(lettered())
def test_every_option_keeps_its_text_and_stands_once_at_every_letter(item: Item) -> None:
    turns = [item]
    for _ in item.options:
        turns.append(turned(turns[-1]))
    assert turns.pop() == item
    for number, option in enumerate(item.options):
        assert {text_of(turn, turn.options[number]) for turn in turns} == {text_of(item, option)}
        assert sorted(turn.options[number] for turn in turns) == sorted(item.options)
    for turn in turns:
        assert replace(turn, prompt=item.prompt, options=item.options) == item
        for end in ENDS:
            assert question(turn).endswith("\n".join(end)) == question(item).endswith("\n".join(end))


@pytest.mark.parametrize("path", sorted((LIBRARY / "tasks").glob("*.jsonl")), ids=lambda path: path.stem)
def test_in_the_library_an_item_in_its_other_order_is_its_twin(path: object) -> None:
    if path.stem in ("neutral", "requests", "skills"):
        return
    asked = {(str(item.prompt), item.options) for item in load_items(path) if places(item)}
    assert asked
    assert {(str(turn.prompt), turn.options) for turn in map(turned, load_items(path)) if places(turn)} == asked


@pytest.mark.parametrize(
    "item",
    [
        Item("Name a colour.", ("red", "seven")),
        Item("Which?\n(A) one\n(B) two\n(C) three", ("A", "B")),
        Item(({"role": "user", "content": "Which letter comes first?"},), ("A", "B")),
    ],
)
def test_what_asks_for_no_letter_stays_as_it_is(item: Item) -> None:
    assert places(item) == []
    assert turned(item) is item
