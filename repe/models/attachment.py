"""The attachment of one handle to one model: all its hooks, put on together and taken off together."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from repe.models.blocks import Stack
from repe.models.hooks import Hook, put
from repe.models.replays import watch_replays
from repe.models.tracking import User, new_tracker, tracker_of


class Attachment:
    """The hooks of one handle on one model. `remove` takes off all of them, and nothing else."""

    def __init__(self, model: nn.Module, stack: Stack, user: User, watch_generate: bool) -> None:
        self.user = user
        self.undo: list[Callable[[], None]] = []
        self.tracker = tracker_of(stack.module) or new_tracker(model, stack, watch_generate)
        self.tracker.users.append(user)

    def hook(self, module: nn.Module, hook: Hook) -> None:
        self.undo.append(put(module, hook))

    def watch_replays(self, block: nn.Module) -> None:
        self.undo.append(watch_replays(block, self.tracker))

    def remove(self) -> None:
        for step in self.undo:
            step()
        self.tracker.users.remove(self.user)
        if not self.tracker.users:
            self.tracker.remove()
