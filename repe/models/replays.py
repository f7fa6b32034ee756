"""Replays: gradient checkpointing runs the parts of a block twice, and they must be edited then as at first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from repe.models.hooks import Hook
from repe.models.tracking import CallTracker

CHECKPOINTING = "_gradient_checkpointing_func"  # where transformers keeps a block's checkpointing function


class Checkpoint:
    """Stands in for a block's checkpointing function: what is replayed for a gradient is edited as it was at first.

    A block's own hooks stay outside of a checkpoint. Those on its parts run again with it, with no forward under way.
    """

    def __init__(self, checkpoint: Callable[..., Any], tracker: CallTracker) -> None:
        self.checkpoint, self.tracker = checkpoint, tracker

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tracker, forward, stamps = self.tracker, self.tracker.forward, self.tracker.stamps()

        def run_in_forward(*args: Any) -> Any:
            if tracker.forward is not None or forward is None:
                return run(*args)
            if tracker.stamps() != stamps:
                raise RuntimeError(
                    "steering was removed or changed between a forward and its backward, and gradient checkpointing "
                    "runs the steered parts of the blocks again: change it after the backward, or use site='block'"
                )
            with tracker.replaying(forward):
                return run(*args)

        return self.checkpoint(run_in_forward, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.checkpoint,)


class BeforeBlock(Hook):
    """Stands before a block whose parts are edited, and minds that they are when they are replayed."""

    def __init__(self, tracker: CallTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: Any, args: Any) -> None:
        checkpoint = getattr(module, CHECKPOINTING, None)
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint) and not torch.compiler.is_compiling():
            setattr(module, CHECKPOINTING, Checkpoint(checkpoint, self.tracker))


def watch_replays(block: nn.Module, tracker: CallTracker) -> Callable[[], None]:
    """Minds the checkpoints of a block; returns what ends it."""
    registered = block.register_forward_pre_hook(BeforeBlock(tracker))

    def take_off() -> None:
        registered.remove()
        checkpoint = getattr(block, CHECKPOINTING, None)
        if isinstance(checkpoint, Checkpoint):
            setattr(block, CHECKPOINTING, checkpoint.checkpoint)

    return take_off
