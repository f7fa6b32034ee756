"""Tasks: the items and the texts that something is measured on, by name, by file, or as they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from repe.data.catalogue import find_task
from repe.data.items import Item, load_items, load_texts
from repe.data.worded import worded
from repe.models.load import home_of
from repe.models.tokens import Text

Task = str | os.PathLike[str] | Sequence[Item]


def items_of(task: Task, model: nn.Module) -> Sequence[Item]:
    """The items of a task, from its name, the path of its file, or as they are."""
    return load_items(find_task(task, home_of(model))) if isinstance(task, str | os.PathLike) else task


def asked(task: Task, model: nn.Module, *, letters: bool) -> Sequence[Item]:
    """The items of a task; unless `letters` are wanted, those that ask for an option's letter are asked in words."""
    items = items_of(task, model)
    return items if letters else worded(items)


def called(task: Any, otherwise: str) -> str:
    """What a task is called: its name, or that of its file; items have none of their own."""
    return Path(task).stem if isinstance(task, str | os.PathLike) else otherwise


def texts_of(neutral: Any, model: nn.Module) -> Sequence[Text]:
    """Texts, from the name of a task, the path of a file, or as they are; none for None."""
    if neutral is None:
        return ()
    return load_texts(find_task(neutral, home_of(model))) if isinstance(neutral, str | os.PathLike) else neutral
