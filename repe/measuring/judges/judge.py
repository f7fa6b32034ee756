"""A judge: what gives a text one number, and has a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Judge = Callable[[Any, str], float]
"""Called with the prompt, a text or a chat, and what was written after it."""


def named(judge: Judge | Sequence[Judge] | Mapping[str, Judge] | None) -> dict[str, Judge]:
    """Judges by name: that of the mapping, or their own.

    Raises:
        ValueError: one has no name of its own, or two have the same.

    Example:
        >>> [*named({"length": lambda prompt, text: len(text)})]
        ['length']
    """
    if isinstance(judge, Mapping):
        return dict(judge)
    judges = [judge] if callable(judge) else [*(judge or ())]
    names = [own_name(judge) for judge in judges]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"judgements are kept by name, and several judges are called {twice}: give a mapping of names")
    return dict(zip(names, judges, strict=True))


def own_name(judge: Judge) -> str:
    """The name that a judge has itself. Raises ValueError where it has none, as a lambda."""
    name = getattr(judge, "name", None) or getattr(judge, "__name__", "<nameless>")
    if str(name).startswith("<"):
        raise ValueError(
            f"judgements are kept under the judge's name, and {judge!r} has none: name it, as in "
            "judge={'length': judge}, another name for every judge"
        )
    return str(name)


def judgement(judge: Judge, prompt: Any, text: str, where: str = "") -> float:
    """What a judge gives a text.

    Args:
        judge, prompt, text: who judges, and what.
        where: what else is said of the text in errors.

    Raises:
        ValueError: it fails, or gives something else than one finite number.
        ImportError: it lacks a package.
    """
    of = f"the text {text!r}, written {where}after the prompt {prompt!r}"
    try:
        given: Any = judge(prompt, text)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"the judge failed on {of}: {error!r}") from error
    try:
        number = math.nan if isinstance(given, str | bytes) or np.ndim(given) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"a judge gives one finite number, and gave {given!r} for {of}")
    return number
