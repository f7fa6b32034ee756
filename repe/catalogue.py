"""Concepts by name: which files of pairs there are for a model, and where."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from repe import pairs
from repe.testbed import FOLDER

SUFFIXES = (".json", ".jsonl", ".csv")


def concepts(model: Any = None) -> dict[str, str]:
    """The concepts that can be named for a model, with what each is; without a model, those of the testbed."""
    return {name: pairs.load(path).description for name, path in sorted(_files(model).items())}


def find(concept: str | os.PathLike[str], model: Any = None) -> Path:
    """The file of a concept's pairs: the path itself, or the file of that name that came with the model.

    Raises:
        ValueError: there is none; the text says which names are near.
    """
    if Path(concept).suffix in SUFFIXES:
        return Path(concept)
    name, files = str(concept), _files(model)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        known = f"There are {sorted(files)}" if files else "It came with none"
        raise ValueError(
            f"no concept is called {name!r} for this model.{hint} {known}; or give contrast pairs, or the path of a "
            "file of them"
        )
    return files[name]


def has(concept: str, model: Any = None) -> bool:
    """Whether a file of pairs of that name came with the model."""
    return concept in _files(model)


def _files(model: Any) -> dict[str, Path]:
    """Files of pairs in the folder `concepts` beside a model's weights."""
    home = FOLDER if model is None else _home(model)
    return {} if home is None else {p.stem: p for p in sorted(home.glob("concepts/*")) if p.suffix in SUFFIXES}


def _home(model: Any) -> Path | None:
    """The folder that a model was loaded from, whatever is wrapped around it.

    A name on the hub is none, and neither is a relative path, which looks like one: `repe.load` makes it absolute.
    """
    names = (getattr(getattr(module, "config", None), "_name_or_path", "") for module in model.modules())
    name = next((name for name in names if name), "")
    return Path(name) if Path(name).is_absolute() and Path(name).is_dir() else None
