"""The store: a concept's name to a vector for this very model: shipped, else cached, else extracted once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from repe.data.catalogue import find, has, is_path, named
from repe.data.concept import stamp
from repe.models.cache import cache_folder as cache_folder
from repe.models.fingerprint import Fingerprint, agrees, digest, fingerprint, strangeness
from repe.models.load import home_of
from repe.reading.vector import ConceptVector


def resolve(model: nn.Module, concept: str, tokenizer: Any = None, blocks_at: str | None = None) -> ConceptVector:
    """The vector of a named concept for this model.

    It is looked for among the vectors shipped in the package, in the folders of the environment variable
    `REPE_VECTORS`, and in the user's cache (see `cache_folder`); never in the working directory. Where
    none was made for these weights, or only one, not in a folder of yours, of other pairs than the concept's file now
    has, or of chats that this tokenizer writes otherwise, it is extracted and cached.

    Raises:
        ValueError: there is no vector, and either no such concept, or no tokenizer to extract it with; or a path is
            given, whose file may change while a cached vector would not.
    """
    if is_path(concept):
        raise ValueError(
            f"{concept!r} is the path of a file, and not the name of a concept: give the vector that `repe.extract` "
            "returns for it"
        )
    from repe.reading.extract import extract

    mine = fingerprint(model)
    present = _present(concept, model, tokenizer)
    stale = 0
    for vector, is_ours in _stored(concept, mine):
        if not (is_ours and _is_stale(vector, present)):
            return vector
        stale += 1
    path = find(concept, home_of(model))
    if tokenizer is None:
        raise ValueError(
            f"no vector of {concept!r} is stored for this model"
            + (", except one of other pairs than the concept's file now has" if stale else "")
            + f": pass tokenizer= to extract it once from {path}, or give a vector that `repe.extract` returned"
        )
    vector = extract(model, tokenizer, path, blocks_at=blocks_at)
    _cache(vector, location(cache_folder(), mine, concept))
    return vector


def _cache(vector: ConceptVector, path: Path) -> None:
    """Keeps a vector, which is as good where the folder cannot be written to."""
    try:
        vector.save(path)
    except OSError as error:
        warnings.warn(
            f"the vector {vector.concept!r} could not be cached ({error}) and will be extracted again: name a folder "
            "that can be written to in REPE_CACHE",
            UserWarning,
            stacklevel=4,
        )


def warn_if_foreign(model: nn.Module, vector: ConceptVector) -> None:
    """Warns if a vector says that it was made on other weights than this model's, and how near these are."""
    theirs, mine = vector.provenance.get("fingerprint"), fingerprint(model)
    if theirs and not agrees(theirs, mine):
        warnings.warn(
            f"the vector {vector.concept!r} was extracted from {strangeness(theirs, mine)} "
            f"({vector.provenance.get('model', 'an unnamed model')}): directions differ from model to model",
            UserWarning,
            stacklevel=3,
        )


def location(folder: Path, model: Fingerprint, concept: str) -> Path:
    """Where a folder of vectors keeps a concept's vector for a model; other weights of its shape have other places."""
    return folder / str(model["key"]) / digest(model["sketch"]) / f"{concept}.safetensors"


def shipped_folder() -> Path:
    """The vectors that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "vectors" if (package / "vectors").is_dir() else package.parent / "vectors"


def _present(concept: str, model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """What a vector's provenance says if it is up to date, as far as that can be known.

    The pairs are unknown where the model came without a file of them, and the rendering where there is no tokenizer.
    """
    from repe.reading.extract import rendering_of

    present = {} if tokenizer is None else {"rendering": rendering_of(tokenizer)}
    if has(concept, home_of(model)):
        path = find(concept, home_of(model))
        present["pairs_digest"] = _pairs_digest(path, stamp(path))
    return present


@lru_cache(maxsize=64)
def _pairs_digest(path: Path, stamp: tuple[int, ...]) -> str:
    """The digest of the pairs in a file, which is as it was when it was stamped."""
    from repe.reading.extract import digest_of

    return digest_of(named(path).pairs)


def _is_stale(vector: ConceptVector, present: Mapping[str, str]) -> bool:
    """Whether a vector was made from other pairs, or of chats rendered otherwise; one that does not say is not."""
    return any(vector.provenance.get(key, value) != value for key, value in present.items())


def _stored(concept: str, mine: Fingerprint) -> Iterator[tuple[ConceptVector, bool]]:
    """The vectors of that name for these weights, in whatever dtype they were loaded when a vector was made.

    With each comes whether the library keeps it itself.
    """
    for folder, is_ours in _folders():
        for path in sorted((folder / str(mine["key"])).rglob("*.safetensors")):
            vector = _loaded(path, mine) if path.stem == concept and path.is_file() else None
            if vector is not None and agrees(vector.provenance.get("fingerprint"), mine):
                yield vector, is_ours


def _loaded(path: Path, mine: Fingerprint) -> ConceptVector | None:
    """A stored vector; None, with a warning, for a broken file that was kept for other weights.

    Raises:
        ValueError: the file is broken, and was kept for these weights.
    """
    try:
        return ConceptVector.load(path)
    except ValueError as error:
        if path.parent.name == digest(mine["sketch"]):
            raise
        warnings.warn(f"passed over: {error}", UserWarning, stacklevel=4)
        return None


def _folders() -> Iterator[tuple[Path, bool]]:
    """The folders of vectors, and whether the library keeps them itself."""
    yield shipped_folder(), True
    yield from ((Path(p).expanduser(), False) for p in os.environ.get("REPE_VECTORS", "").split(os.pathsep) if p)
    yield cache_folder(), True
