"""Letters: items that ask for an option's letter, and the same items with their options in other places.

What such an item says of a model can be trusted where the answer follows its text from place to place.
"""

from __future__ import annotations

import re
from dataclasses import replace

from repe.data.items import Item

OPTION = re.compile(r"\s*\(([A-Z])\)\s+(.+?)(?=\s*\([A-Z]\)|\s*Answer with|\n\s*\n|\s*$)", re.DOTALL)


def places(item: Item) -> list[re.Match[str]]:
    """Where the options of an item stand in what it asks, each with its letter and its text, in their order there.

    There are none if the item does not ask for a letter: if its options are not those that stand in brackets before
    texts at the end of its prompt. A text ends before the next bracket, an empty line or "Answer with".
    """
    found = {match[1]: match for match in OPTION.finditer(question(item))}
    asks = sorted(found) == sorted(option.strip() for option in item.options)
    return sorted(found.values(), key=re.Match.start) if asks else []


def question(item: Item) -> str:
    """The prompt, or its last message where it is a chat."""
    return item.prompt if isinstance(item.prompt, str) else str(item.prompt[-1]["content"])


def asking(item: Item, text: str, options: tuple[str, ...]) -> Item:
    """The item with another question and other options."""
    if isinstance(item.prompt, str):
        return replace(item, prompt=text, options=options)
    return replace(item, prompt=(*item.prompt[:-1], {**item.prompt[-1], "content": text}), options=options)


def turned(item: Item) -> Item:
    """The item with each option's text one place further, the last one's in the first; as it is, without letters.

    Every option means what it meant: its letter is that of the place where its text now stands.

    Example:
        >>> item = Item("How many legs has a bee?\\n(A) six\\n(B) eight\\nAnswer with the letter only.", ("A", "B"))
        >>> print(turned(item).prompt, turned(item).options)
        How many legs has a bee?
        (A) eight
        (B) six
        Answer with the letter only. ('B', 'A')
    """
    found = places(item)
    if not found:
        return item
    text, before = question(item), [found[-1], *found[:-1]]
    for place, other in reversed([*zip(found, before, strict=True)]):
        text = text[: place.start(2)] + other[2] + text[place.end(2) :]
    letters = {other[1]: place[1] for place, other in zip(found, before, strict=True)}
    return asking(item, text, tuple(option.replace(o := option.strip(), letters[o]) for option in item.options))
