"""The hooks that edit: from a module's output and the forward under way to the edited output. This is the hot path."""

from __future__ import annotations

from collections.abc import Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repe.models.blocks import hidden_of, with_hidden
from repe.models.call import Forward
from repe.models.hooks import Hook
from repe.models.tracking import is_running
from repe.ops.reference import plus

if TYPE_CHECKING:
    from repe.steering.handle import Steering


class EditHook(Hook):
    """Edits the output of one module.

    A model that writes runs this between any two blocks of every token, with all caches cold, where every call of
    Python costs microseconds: the simplest edit, one vector for all tokens, is kept ready and added in few steps.
    """

    def __init__(self, steering: Steering, block: int, forwards: Mapping[int, Forward]) -> None:
        self.steering, self.block, self.forwards = steering, block, forwards
        self.ready: tuple[tuple[int, torch.dtype, torch.device] | None, Tensor | None] = None, None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or type(output) is not Tensor:
            return self._edited(module, output)
        forward = self.forwards.get(get_ident())
        version = None if forward is None else forward.memo.get(self.steering)
        if version is None:
            return self._edited(module, output)
        wanted, (ready_for, added) = (version, output.dtype, output.device), self.ready
        if wanted != ready_for:
            added = self.steering.constant(output, self.block)
            self.ready = wanted, added  # at once: another thread may be doing the same
        if added is None:
            return self._edited(module, output)
        return output + added if output.dtype is added.dtype else plus(output, added)

    def _edited(self, module: nn.Module, output: Any) -> Any:
        if not self.steering.attached:
            return None  # taken off by another thread
        forward = self.steering.forward_under_way()
        if forward is None:
            if not torch.compiler.is_compiling() and is_running(self.steering.stack.module):
                return None  # begun before the handle was attached
            raise RuntimeError(
                f"{self.steering!r}: {type(module).__name__} was run outside of the forward of its stack, and nobody "
                "can tell which tokens it holds. Run the whole model, or steer another site"
            )
        if self.steering.came_after(forward):
            return None
        return with_hidden(output, self.steering.edited(hidden_of(output), self.block, forward))


class GateHook(Hook):
    """Reads the prompt for a gate, before anything is edited at its block."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self.steering.forward_under_way()
        if forward is not None and not self.steering.came_after(forward):
            self.steering.read_prompt(hidden_of(output), forward)
