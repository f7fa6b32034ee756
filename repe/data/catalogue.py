"""Concepts and tasks by name: the files of contrast pairs, and of items to measure on, and where they are.

A folder, such as a model was loaded from, comes first, then the library inside the package. Both are laid out alike:
`concepts/NAME.json` (or `.jsonl`, `.csv`) holds a concept's pairs, `tasks/NAME.jsonl` (or `.csv`) the items that its
behaviour is measured on.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repe.data.concept import SUFFIXES, Concept, head, load_concept
from repe.data.files import ROW_SUFFIXES
from repe.data.pairs import ContrastPair

LIBRARY = Path(__file__).parent / "library"
KINDS = {"concepts": (SUFFIXES, "contrast pairs"), "tasks": (ROW_SUFFIXES, "items")}

Pairs = str | os.PathLike[str] | Concept | Sequence[ContrastPair]


def concepts(model: Any = None) -> dict[str, str]:
    """List the concepts that can be named, with what each is: the library's, and those that came with a model.

    Args:
        model: the model, or the folder that it was loaded from; None for the library alone.

    Raises:
        ValueError: a file is malformed, or called otherwise than the concept in it.

    Example:
        >>> "honesty" in repe.concepts()
        True
    """
    return {name: _description(path) for name, path in sorted(_files(_home(model), "concepts").items())}


def find(concept: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Find the file of a concept's pairs: the path itself, or the file of that name.

    Raises:
        ValueError: there is none; the text says which names are near.
    """
    return _find(concept, folder, "concepts")


def find_task(task: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Find the file of a task's items as `find` finds a concept's."""
    return _find(task, folder, "tasks")


def has(concept: str, folder: Path | None = None) -> bool:
    """Whether there is a file of pairs of that name."""
    return concept in _files(folder, "concepts")


def has_task(task: str, folder: Path | None = None) -> bool:
    """Whether there is a file of items of that name."""
    return task in _files(folder, "tasks")


def concept_of(pairs: Pairs, folder: Path | None = None) -> Concept:
    """The concept of a name, of the path of its file, or of bare pairs.

    Raises:
        ValueError: it is not known, or its file is malformed, or called otherwise than the concept in it.
        TypeError: it is none of these.
        FileNotFoundError: there is no such file.
    """
    if isinstance(pairs, Concept):
        return pairs
    if isinstance(pairs, str | os.PathLike):
        path = find(pairs, folder)
        return load_concept(path) if is_path(pairs) else named(path)
    if isinstance(pairs, ContrastPair | Mapping) or not isinstance(pairs, Iterable):
        raise TypeError(
            f"got a {type(pairs).__name__}: expected the name of a concept, the path of a file of pairs, or a list of "
            "ContrastPair(positive, negative)"
        )
    return Concept("concept", description="", poles={}, sources=(), pairs=tuple(pairs))


def named(path: Path) -> Concept:
    """The concept of a file that is found by its name. Raises ValueError if the file calls it by another."""
    concept = load_concept(path)
    _check_name(concept.name, path)
    return concept


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether this is the path of a file, and not the name of a concept or a task."""
    return isinstance(name, os.PathLike) or Path(name).name != name or Path(name).suffix in SUFFIXES


def _description(path: Path) -> str:
    name, description = head(path)
    _check_name(name, path)
    return description


def _check_name(name: str, path: Path) -> None:
    if name != path.stem:
        raise ValueError(
            f"{path}: the concept in it is {name!r}, and the file's name says {path.stem!r}: make them one"
        )


def _find(name: str | os.PathLike[str], folder: Path | None, kind: str) -> Path:
    if is_path(name):
        return Path(name)
    name, files = str(name), _files(folder, kind)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"no {kind.removesuffix('s')} is called {name!r}.{hint} There are {sorted(files)}; or give "
            f"{KINDS[kind][1]}, or the path of a file of them"
        )
    return files[name]


def _files(folder: Path | None, kind: str) -> dict[str, Path]:
    """The files of a kind in a folder and, where it has none of a name, in the library."""
    homes = [LIBRARY] + ([] if folder is None else [folder])
    found = (path for home in homes for path in sorted((home / kind).glob("*")))
    return {path.stem: path for path in found if path.suffix in KINDS[kind][0]}


def _home(model: Any) -> Path | None:
    """The folder of a model; or the folder that is given in its place."""
    if model is None:
        return None
    if isinstance(model, str | os.PathLike):
        return Path(model)
    from repe.models.load import home_of  # loads transformers, as whoever has a model has done

    return home_of(model)
