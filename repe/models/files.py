"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


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
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / target.name
        yield draft
        os.replace(draft, target)
