"""The user's own folder, where what took long to make is kept: vectors, and models that were made of GGUF files."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The user's own folder of vectors: REPE_CACHE, else where this system keeps caches, as `~/.cache/repe`."""
    named = os.environ.get("REPE_CACHE")
    try:
        return Path(named).expanduser() if named else user_cache_path("repe", appauthor=False)
    except RuntimeError as error:  # who runs this has no home
        raise OSError(f"there is no home folder to keep a cache in ({error}): name a folder in REPE_CACHE") from error


def models_folder() -> Path:
    """Where inside it models are kept, as ordinary folders, by what the files that they were made of hold."""
    return cache_folder() / "models"
