"""Files that are whole or not there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

MARK = ".repe-draft-"
OLD = 24 * 60 * 60  # seconds, after which nobody writes a draft any more


def _clear(folder: Path, prefix: str) -> None:
    """Remove the drafts of a file whose runs were killed, known by name and age."""
    for path in folder.iterdir():
        if path.name.startswith(prefix) and path.is_dir() and time.time() - path.lstat().st_mtime > OLD:
            rmtree(path, ignore_errors=True)


@contextmanager
def draft_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a place to write to, whose file or folder takes the place of `path` once it is whole.

    Where anything goes wrong, the old file stays and the draft does not. A folder that holds something is not replaced:
    that is an OSError.

    Example:
        >>> with draft_of("notes/today.txt") as draft:
        ...     _ = draft.write_text("whole")
        >>> Path("notes/today.txt").read_text()
        'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}{MARK}"
    _clear(target.parent, prefix)
    with TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        draft = Path(folder) / target.name
        yield draft
        os.replace(draft, target)
