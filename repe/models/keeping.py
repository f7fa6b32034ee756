"""Models made of GGUF files, kept as ordinary folders in the user's cache: whole, or not there."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import transformers

from repe.models.cache import models_folder
from repe.models.files import draft_of
from repe.models.gguf import Source, read_model

LARGEST = 2**29  # bytes of a file whose weights are kept unasked


def folder_of(source: Source, cache: bool | None) -> Path | None:
    """The folder that is kept of a model, which is made first if need be; None if none is.

    Args:
        source: the GGUF file. What it holds, and the `transformers` that reads it, name the folder.
        cache: whether one may be kept; None: if the file is no larger than `LARGEST`.

    Warns:
        UserWarning: the folder cannot be written.
    """
    if cache is False or (cache is None and source.size > LARGEST):
        return None
    folder = models_folder() / _key(source)
    return folder if folder.is_dir() or _is_written(source, folder) else None


def _key(source: Source) -> str:
    return hashlib.sha256(f"{source.digest} {transformers.__version__}".encode()).hexdigest()[:16]


def _is_written(source: Source, folder: Path) -> bool:
    """Make the folder of a model, and say whether it is there."""
    with source.opened() as path:
        model, tokenizer = read_model(path)
    try:
        with draft_of(folder) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    except OSError as error:
        if not folder.is_dir():  # another process has not written it meanwhile
            warnings.warn(
                f"the weights of {Path(source.title).name} could not be kept ({error}) and will be dequantised again: "
                "name a folder that can be written to in REPE_CACHE, or give cache=False",
                UserWarning,
                stacklevel=5,
            )
    return folder.is_dir()
