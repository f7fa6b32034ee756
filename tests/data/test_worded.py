"""Words for letters: the same question, with the option's text where its letter was."""

import pytest

from repe.data.catalogue import LIBRARY
from repe.data.items import Item, load_items
from repe.data.worded import worded

ASKED = "Which is wet?\n(A) the sea\n(B) the sand\nAnswer with the letter only."
TURNED = "Which is wet?\n(A) the sand\n(B) the sea\nAnswer with the letter only."


@pytest.mark.parametrize("chat", [False, True])
def test_letters_become_what_they_stand_for_and_twins_one(chat: bool) -> None:
    def prompt(text: str) -> object:
        return ({"role": "system", "content": "(A) no (B) option"}, {"role": "user", "content": text}) if chat else text

    items = [Item(prompt(ASKED), ("A", "B"), 0, "g"), Item(prompt(TURNED), ("B", "A"), 0, "g")]
    assert worded(items) == [Item(prompt("Which is wet?"), ("the sea", "the sand"), 0, "g")]


@pytest.mark.parametrize(
    "item",
    [
        Item("Name a colour.", ("red", "seven")),
        Item(ASKED, ("yes", "no")),
        Item("Which letter comes first?", ("A", "B")),
        Item("Which?\n(A) one\n(B) two\n(C) three", ("A", "B")),
    ],
)
def test_what_asks_for_no_letter_is_left_as_it_is(item: Item) -> None:
    assert worded([item]) == [item]


@pytest.mark.parametrize("path", sorted((LIBRARY / "tasks").glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_item_of_the_library_can_be_asked_in_words(path: object) -> None:
    if path.stem in ("neutral", "requests"):
        return
    items = worded(load_items(path))
    assert not any(option.strip() in ("A", "B", "C", "D") for item in items for option in item.options)
    assert not any("(A)" in str(item.prompt) for item in items)
    assert all(len(set(item.options)) == len(item.options) for item in items)


def test_the_order_is_kept() -> None:
    items = [Item(ASKED, ("A", "B")), Item("Name a colour.", ("red", "seven")), Item(TURNED, ("B", "A"))]
    assert [item.prompt for item in worded(items)] == ["Which is wet?", "Name a colour."]
