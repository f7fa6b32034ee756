"""Words for letters: items that ask for an option's letter, asked again with the options' own texts to follow.

A small model binds no letters to what they stand for: its answer stays where it is when the options change places, and
nothing moves it. It may well know which of the texts is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from repe.data.items import Item
from repe.data.letters import asking, places, question


def worded(items: Iterable[Item]) -> list[Item]:
    """The items, those that ask for a letter in words, and each once whichever order its options came in.

    An item asks for a letter if its options are those that stand in brackets before texts at the end of its prompt. It
    is left without the texts, which become its options.

    Example:
        >>> asked = Item("How many legs has a bee?\\n(A) six\\n(B) eight\\nAnswer with the letter only.", ("A", "B"), 0)
        >>> worded([asked])
        [Item(prompt='How many legs has a bee?', options=('six', 'eight'), answer=0, group='', about={})]
    """
    found: dict[str, Item] = {}
    for item in map(_in_words, items):
        found.setdefault(json.dumps([item.prompt, sorted(item.options)]), item)
    return list(found.values())


def _in_words(item: Item) -> Item:
    found = {place[1]: place for place in places(item)}
    if not found:
        return item
    start = min(place.start() for place in found.values())
    options = tuple(found[option.strip()][2].strip() for option in item.options)
    return asking(item, question(item)[:start].rstrip(), options)
