"""Concepts by name: the files of pairs, and of items to measure on, that there are for a model, and where.

A model's own folder comes first, then the library inside the package. Both are laid out alike: `concepts/NAME.json`
(or `.jsonl`, `.csv`) holds a concept's pairs, `tasks/NAME.jsonl` the items that its behaviour is measured on.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repe.concept_file import Concept, load
from repe.pairs import ContrastPair

LIBRARY = Path(__file__).parent / "library"
SUFFIXES = (".json", ".jsonl", ".csv")

Pairs = str | os.PathLike[str] | Concept | Sequence[ContrastPair]


def concepts(model: Any = None) -> dict[str, str]:
    """The concepts that can be named, with what each is: the library's, and those that came with the model."""
    return {name: load(path).description for name, path in sorted(_files(model, "concepts").items())}


def find(concept: str | os.PathLike[str], model: Any = None) -> Path:
    """The file of a concept's pairs: the path itself, or the file of that name for this model.

    Raises:
        ValueError: there is none; the text says which names are near.
    """
    return _find(concept, model, "concepts", "concept", "contrast pairs")


def find_task(task: str | os.PathLike[str], model: Any = None) -> Path:
    """The file of a task's items: the path itself, or the file of that name for this model.

    Raises:
        ValueError: there is none; the text says which names are near.
    """
    return _find(task, model, "tasks", "task", "items")


def concept_of(pairs: Pairs, model: Any = None) -> Concept:
    """A concept, from its name, from the path of its file, or from its bare pairs.

    Raises:
        ValueError: it is not known, or its file is malformed.
        FileNotFoundError: there is no such file.
    """
    if isinstance(pairs, Concept):
        return pairs
    if isinstance(pairs, str | os.PathLike):
        return load(find(pairs, model))
    return Concept("concept", description="", poles={}, sources=(), pairs=tuple(pairs))


def has(concept: str, model: Any = None) -> bool:
    """Whether there is a file of pairs of that name for the model."""
    return concept in _files(model, "concepts")


def _find(name: str | os.PathLike[str], model: Any, folder: str, kind: str, content: str) -> Path:
    if Path(name).suffix in SUFFIXES:
        return Path(name)
    files = _files(model, folder)
    if str(name) not in files:
        near = difflib.get_close_matches(str(name), files, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"no {kind} is called {str(name)!r}.{hint} There are {sorted(files)}; or give {content}, or the path of a "
            "file of them"
        )
    return files[str(name)]


def _files(model: Any, folder: str) -> dict[str, Path]:
    """Files of a folder beside the model's weights and, where it has none of a name, of the library."""
    homes = [LIBRARY] + [home for home in [_home(model)] if home is not None]
    return {p.stem: p for home in homes for p in sorted((home / folder).glob("*")) if p.suffix in SUFFIXES}


def _home(model: Any) -> Path | None:
    """The folder that a model was loaded from, whatever is wrapped around it.

    A name on the hub is none, and neither is a relative path, which looks like one: `repe.load` makes it absolute.
    """
    if model is None:
        return None
    names = (getattr(getattr(module, "config", None), "_name_or_path", "") for module in model.modules())
    name = next((name for name in names if name), "")
    return Path(name) if Path(name).is_absolute() and Path(name).is_dir() else None
