"""Names in pictures: which, and letter by letter as they are, never as formulas, in a font that has their letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import font_manager

LONGEST = 20  # of a name, in letters
UNKNOWN = "�?"  # what stands for a letter that no font has: the first of these that one has
WIDE = (  # fonts of many scripts that systems have; asked only for what the chosen ones lack
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "WenQuanYi Micro Hei", "Arial Unicode MS", "Noto Sans", "Segoe UI Symbol", "Symbola",
)  # fmt: skip


def by_name(things: Any) -> dict[str, Any]:
    """Name one thing, or several in a list or a mapping: by its concept, and by what else tells it from the others."""
    if isinstance(things, Mapping):
        named = {str(name): thing for name, thing in things.items()}
    else:
        several = list(things) if isinstance(things, list | tuple) else [things]
        named = dict(zip(_told_apart(several), several, strict=True))
    if not named:
        raise ValueError("there is nothing to draw: give at least one")
    return {f" {name}" if name.startswith("_") else name: thing for name, thing in named.items()}


def concept_of(named: Mapping[str, Any], otherwise: str) -> str:
    """The concept that all are of."""
    concepts = {thing.concept for thing in named.values()}
    return concepts.pop() if len(concepts) == 1 else otherwise


def _told_apart(things: Sequence[Any]) -> list[str]:
    names = [thing.concept for thing in things]
    if len(set(names)) < len(names):
        readers = [getattr(thing, "provenance", {}).get("reader") for thing in things]
        names = [f"{name}, {reader}" if reader else name for name, reader in zip(names, readers, strict=True)]
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, seen, strict=True)]


# letters


def literal(texts: Iterable[Any]) -> None:
    """Makes matplotlib's texts say what they hold, and nothing of it a formula or an empty box."""
    families = fonts()
    for text in texts:
        text.set(text=drawable(text.get_text()), parse_math=False, fontfamily=families)


def drawable(text: str) -> str:
    """The text with another sign for every letter that no font has."""
    families = tuple(fonts())
    return "".join(_sign(letter, families) for letter in text)


def short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def word(token: str) -> str:
    """A token in one line."""
    return " ".join(token.split()) or "·"


def fonts() -> list[str]:
    """The families that the user chose, then those of many scripts that are installed."""
    chosen = plt.rcParams["font.family"]
    return [*([chosen] if isinstance(chosen, str) else chosen), *_installed()]


@cache
def _installed() -> tuple[str, ...]:
    there = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in WIDE if name in there)


@lru_cache(4096)
def _sign(letter: str, families: tuple[str, ...]) -> str:
    if letter == "\n" or _has(letter, families):
        return letter
    unseen = unicodedata.category(letter) in ("Cc", "Cf", "Mn")  # joiners and selectors, which show nothing alone
    return "" if unseen else next((sign for sign in UNKNOWN if _has(sign, families)), "")


def _has(letter: str, families: tuple[str, ...]) -> bool:
    return any(font_manager.get_font(path).get_char_index(ord(letter)) for path in map(_path, families) if path)


@cache
def _path(family: str) -> str:
    try:
        return str(font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False))
    except ValueError:
        return ""
