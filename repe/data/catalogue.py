"""Concepts by name: the files of pairs, and of items to measure on, that there are for a model, and where.

A model's own folder comes first, then the library inside the package. Both are laid out alike: `concepts/NAME.json`
(or `.jsonl`, `.csv`) holds a concept's pairs, `tasks/NAME.jsonl` (or `.csv`) the items that its behaviour is measured
on.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repe.data.files import Concept, head, load
from repe.data.pairs import ContrastPair

LIBRARY = Path(__file__).parent / "library"
SUFFIXES = (".json", ".jsonl", ".csv")
SUFFIXES_OF = {"concepts": SUFFIXES, "tasks": (".jsonl", ".csv")}

Pairs = str | os.PathLike[str] | Concept | Sequence[ContrastPair]


def concepts(model: Any = None) -> dict[str, str]:
    """The concepts that can be named, with what each is: the library's, and those that came with the model."""
    return {name: _description(path) for name, path in sorted(_files(model, "concepts").items())}


def find(concept: str | os.PathLike[str], model: Any = None) -> Path:
    """The file of a concept's pairs: the path itself, or the file of that name for this model.

    Raises:
        ValueError: there is none; the text says which names are near.
    """
    return Path(concept) if _is_path(concept) else _find(str(concept), model, "concepts", "contrast pairs")


def find_task(task: str | os.PathLike[str], model: Any = None) -> Path:
    """The file of a task's items: the path itself, or the file of that name for this model.

    Raises:
        ValueError: there is none, and the text says which names are near; or it is the path of another kind of file.
    """
    if not _is_path(task):
        return _find(str(task), model, "tasks", "items")
    if Path(task).suffix not in SUFFIXES_OF["tasks"]:
        raise ValueError(f"{task}: items are read from a file that ends in {', '.join(SUFFIXES_OF['tasks'])}")
    return Path(task)


def concept_of(pairs: Pairs, model: Any = None) -> Concept:
    """A concept, from its name, from the path of its file, or from its bare pairs.

    Raises:
        ValueError: it is not known, or its file is malformed, or called otherwise than the concept in it.
        TypeError: it is none of these.
        FileNotFoundError: there is no such file.
    """
    if isinstance(pairs, Concept):
        return pairs
    if isinstance(pairs, str | os.PathLike):
        path = find(pairs, model)
        return load(path) if _is_path(pairs) else named(path)
    if isinstance(pairs, ContrastPair | Mapping) or not isinstance(pairs, Iterable):
        raise TypeError(
            f"got a {type(pairs).__name__}: expected the name of a concept, the path of a file of pairs, or a list of "
            "ContrastPair(positive, negative)"
        )
    return Concept("concept", description="", poles={}, sources=(), pairs=tuple(pairs))


def named(path: Path) -> Concept:
    """The concept of a file that is found by its name. Raises ValueError if the file calls it by another."""
    concept = load(path)
    _check_name(concept.name, path)
    return concept


def has(concept: str, model: Any = None) -> bool:
    """Whether there is a file of pairs of that name for the model."""
    return concept in _files(model, "concepts")


def _description(path: Path) -> str:
    name, description = head(path)
    _check_name(name, path)
    return description


def _check_name(name: str, path: Path) -> None:
    if name != path.stem:
        raise ValueError(
            f"{path}: the concept in it is {name!r}, and the file's name says {path.stem!r}: make them one"
        )


def _is_path(name: str | os.PathLike[str]) -> bool:
    return isinstance(name, os.PathLike) or Path(name).name != name or Path(name).suffix in SUFFIXES


def _find(name: str, model: Any, folder: str, content: str) -> Path:
    files = _files(model, folder)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"no {folder.removesuffix('s')} is called {name!r}.{hint} There are {sorted(files)}; or give {content}, or "
            "the path of a file of them"
        )
    return files[name]


def _files(model: Any, folder: str) -> dict[str, Path]:
    """Files of a folder beside the model's weights and, where it has none of a name, of the library."""
    homes = [LIBRARY] + [home for home in [_home(model)] if home is not None]
    found = (path for home in homes for path in sorted((home / folder).glob("*")))
    return {path.stem: path for path in found if path.suffix in SUFFIXES_OF[folder]}


def _home(model: Any) -> Path | None:
    """The folder that a model was loaded from, whatever is wrapped around it.

    A name on the hub is none, and neither is a relative path, which looks like one: `repe.load` makes it absolute.
    """
    if model is None:
        return None
    names = (getattr(getattr(module, "config", None), "_name_or_path", "") for module in model.modules())
    name = next((name for name in names if name), "")
    return Path(name) if Path(name).is_absolute() and Path(name).is_dir() else None
