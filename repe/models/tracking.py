"""Tracking: hooks on and off, which forward is under way in every thread, and inside which call of `generate`.

One tracker watches a stack while anything is attached to it: two hooks on the stack's module, and a shim on `generate`.
There is no registry of ours: what a model carries is found by looking at its hooks.

Every trick with torch and the interpreter stands in this file: hooks that are pickled as nothing, patches that make
compiled code look again, checkpoints that are replayed, frames that tell whether a module is running, and a `generate`
of the instance's own. A pickled or copied model is steered by nothing: its hooks have become inert, and what else
stands on the copy (a `forward` and a `generate` of its own) is what its class has.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from repe.models.blocks import Stack
from repe.models.call import UNCOUNTED, Forward, Generation, forward_of, generation_of, is_none, knows_length, length_of

CACHES = ("past_key_values", "cache_params")  # of outputs
CHECKPOINTING = "_gradient_checkpointing_func"  # where transformers keeps a block's checkpointing function


# hooks


class Hook:
    """A forward hook that is pickled and copied as one that does nothing and needs no `repe` to be loaded.

    A hook cannot leave the dictionary it is copied with, so it becomes a method of the standard library that takes any
    arguments and returns None.
    """

    def __call__(self, *call: Any) -> Any:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def put(module: nn.Module, hook: Hook) -> Callable[[], None]:
    """Put a forward hook on a module, so that code compiled before is compiled anew; return what takes it off."""
    registered = module.register_forward_hook(hook)
    mark(module)

    def take_off() -> None:
        registered.remove()
        unmark(module)

    return take_off


def mark(module: nn.Module) -> None:
    """Let code that was compiled before the hooks on a module came be compiled anew, once.

    Compiled code does not look at hooks again: dynamo guards on whether a module's `forward` was patched. A patch that
    changes nothing is enough, and taking it off brings the old code back.
    """
    if "forward" not in module.__dict__:
        module.forward = types.MethodType(type(module).forward, module)


def unmark(module: nn.Module) -> None:
    patch = module.__dict__.get("forward")
    hooked = any(
        isinstance(h, Hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for h in hooks.values()
    )
    if not hooked and getattr(patch, "__func__", None) is type(module).forward:
        del module.forward


# calls


class User(Protocol):
    """Who wants to know of the calls."""

    prompt_length: int | Tensor | None
    """Where the prompts of forwards outside of `generate` end, in tokens that are not padding, if it was told."""

    @property
    def stamp(self) -> Any:
        """What is another whenever it would edit otherwise."""

    def starting(self, forward: Forward) -> None:
        """A forward begins."""

    def cached(self, forward: Forward, cache: Any) -> None:
        """A forward left its keys and values in a cache."""

    def generated(self) -> None:
        """A call of `generate` ended."""


class CallTracker:
    """Knows the forward that is under way in a stack, for every thread, and who wants to know of it."""

    def __init__(self, module: nn.Module) -> None:
        self.names = tuple(inspect.signature(module.forward).parameters)
        self.users: list[User] = []
        self.generations: dict[int, Generation] = {}
        self.forwards: dict[int, Forward] = {}
        self.told: dict[int, Forward] = {}
        self.texts: dict[int, Tensor] = {}  # of the latest forward without a cache, by thread
        self.compiled_generation: Generation | None = None
        self.compiled_forward: Forward | None = None
        self.cached_under: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()
        self.uncounted: WeakSet[Any] = WeakSet()  # caches that hold tokens and do not say so
        self.undo: list[Callable[[], None]] = []
        self.prompts: Tensor | None = None  # where they end, as users were told
        self.ends: dict[int, Tensor] = {}  # where they end in a thread, whatever users were told
        self.compiled_ends: Tensor | None = None
        self.latest = 0

    def issue(self) -> int:
        """A number that no handle had before."""
        self.latest += 1
        return self.latest

    def hear_of_prompts(self) -> None:
        """Take where prompts end from the latest user that was told."""
        told = [user.prompt_length for user in self.users if user.prompt_length is not None]
        self.prompts = torch.as_tensor(told[-1]).reshape(-1, 1) if told else None

    def version_in(self, cache: Any, serial: int) -> int | None:
        """Under which version of a handle a cache came to hold what it holds, if it did."""
        return self.cached_under.get(cache, {}).get(serial) if can_be_watched(cache) else None

    def note_cached(self, cache: Any, serial: int, version: int) -> None:
        if can_be_watched(cache):
            self.cached_under.setdefault(cache, {}).setdefault(serial, version)

    @property
    def forward(self) -> Forward | None:
        """The forward under way in this thread."""
        if torch.compiler.is_compiling():
            return self.compiled_forward
        return self.forwards.get(threading.get_ident())

    def begin(self, inputs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            ends = self.prompts if self.compiled_ends is None else self.compiled_ends
            self.compiled_forward = forward_of(inputs, self.compiled_generation, ends)
            return
        thread = threading.get_ident()
        ends = self.ends.get(thread, self.prompts)
        forward = self.told.get(thread) or forward_of(inputs, self.generations.get(thread), ends)
        forward.latest = self.latest
        if thread not in self.told:
            self._mind_loops(thread, forward, inputs.get("input_ids"))
        if forward.starts_prompt and forward.generation is None and self._is_uncounted(forward.cache):
            forward.unplaced = UNCOUNTED
        self.forwards[thread] = self.compiled_forward = forward
        for user in self.users:
            user.starting(forward)

    def _is_uncounted(self, cache: Any) -> bool:
        return cache is not None and can_be_watched(cache) and cache in self.uncounted

    def _mind_loops(self, thread: int, forward: Forward, ids: Tensor | None) -> None:
        """Of a forward without a cache that goes on where the one before it ended, nobody can tell what is prompt."""
        before = self.texts.pop(thread, None)
        if ids is None or forward.cache is not None or forward.generation is not None:
            return
        self.texts[thread] = ids
        if before is not None and len(before) == len(ids) and (width := before.shape[1]) < ids.shape[1]:
            forward.goes_on = not forward.is_told and torch.equal(before, ids[:, :width].to(before))

    def end(self, output: Any) -> None:
        self.compiled_forward = None
        if torch.compiler.is_compiling():
            return
        forward = self.forwards.pop(threading.get_ident(), None)
        if forward is None:
            return
        for cache in (getattr(output, name, None) for name in CACHES):
            if cache is None:
                continue
            if can_be_watched(cache) and knows_length(cache) and is_none(length_of(cache)):
                self.uncounted.add(cache)
            for user in self.users:
                user.cached(forward, cache)

    def remove(self) -> None:
        for step in self.undo:
            step()

    def stamps(self) -> list[Any]:
        """What tells whether the same handles edit as they did."""
        return [user.stamp for user in self.users]

    @contextmanager
    def telling(self, forward: Forward) -> Iterator[None]:
        """What the next forward in this thread holds, whose arguments would not tell."""
        thread = threading.get_ident()
        self.told[thread] = forward
        try:
            yield
        finally:
            del self.told[thread]

    @contextmanager
    def replaying(self, forward: Forward) -> Iterator[None]:
        """A part of an earlier forward is run again, for its gradient, in this thread."""
        thread = threading.get_ident()
        self.forwards[thread] = forward
        try:
            yield
        finally:
            del self.forwards[thread]

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """The generation under way in this thread; they nest, as when a model drafts for itself."""
        thread = threading.get_ident()
        outer = self.generations.get(thread)
        self.generations[thread] = self.compiled_generation = generation
        try:
            yield
        finally:
            self.compiled_generation = outer
            self.forwards.pop(thread, None)
            self.generations.pop(thread)
            if outer is not None:
                self.generations[thread] = outer


class Before(Hook):
    """Stands before a stack's forward."""

    def __init__(self, tracker: CallTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tracker.begin({**dict(zip(self.tracker.names, args, strict=False)), **kwargs})


class After(Hook):
    """Stands behind a stack's forward."""

    def __init__(self, tracker: CallTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tracker.end(output)


class GenerateShim:
    """Stands in for `generate` on the instance, to learn where the prompt ends; everything is passed on as it came."""

    def __init__(self, model: Any, tracker: CallTracker) -> None:
        self.model, self.tracker = model, tracker
        self.replaced = model.__dict__.get("generate")
        self.generate = model.generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        users = tuple(self.tracker.users)
        with self.tracker.generating(generation_of(self.model, args, kwargs)):
            output = self.generate(*args, **kwargs)
        for user in users:
            user.generated()
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "generate")

    def remove(self) -> None:
        if self.replaced is None:
            del self.model.generate
        else:
            self.model.generate = self.replaced


def _new_tracker(model: nn.Module, stack: Stack, watch_generate: bool) -> CallTracker:
    module, tracker = stack.module, CallTracker(stack.module)
    generator = _generator(model, stack) if watch_generate else None
    before = module.register_forward_pre_hook(Before(tracker), with_kwargs=True)
    after = module.register_forward_hook(After(tracker), always_call=True)
    tracker.undo = [before.remove, after.remove, partial(unmark, module)]
    mark(module)
    if generator is not None:
        generator.generate = shim = GenerateShim(generator, tracker)
        tracker.undo.append(shim.remove)
    return tracker


def tracker_of(module: nn.Module) -> CallTracker | None:
    """The tracker that watches this module, if any does."""
    return next((hook.tracker for hook in module._forward_pre_hooks.values() if isinstance(hook, Before)), None)


def trackers_of(model: nn.Module) -> list[CallTracker]:
    """Every tracker inside a model."""
    return [tracker for module in model.modules() if (tracker := tracker_of(module)) is not None]


def begin_anew(module: nn.Module) -> None:
    """Say that the next forward of a stack in this thread is of another text, however it begins."""
    if (tracker := tracker_of(module)) is not None:
        tracker.texts.pop(threading.get_ident(), None)


@contextmanager
def prompts_end(model: nn.Module, lengths: Tensor) -> Iterator[None]:
    """Say where the prompts of forwards outside of `generate` end in this thread, to all that is attached to a model.

    Args:
        lengths: (rows,), each row's tokens up to where its answer begins, padding left out.
    """
    thread, trackers = threading.get_ident(), trackers_of(model)
    before = [(tracker.ends.get(thread), tracker.compiled_ends) for tracker in trackers]
    for tracker in trackers:
        tracker.ends[thread] = tracker.compiled_ends = lengths.reshape(-1, 1)
    try:
        yield
    finally:
        for tracker, (ends, compiled) in zip(trackers, before, strict=True):
            tracker.compiled_ends = compiled
            if ends is None:
                del tracker.ends[thread]
            else:
                tracker.ends[thread] = ends


def _generator(model: nn.Module, stack: Stack) -> Any:
    """The innermost module around the stack whose `generate` runs it."""
    parts = stack.name.split(".") if stack.name else []
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    return next((m for m in reversed(around) if callable(getattr(type(m), "generate", None))), None)


def is_running(module: nn.Module) -> bool:
    """Whether this thread is inside of a call of the module. It looks at every frame: not for the hot path."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_argcount and frame.f_locals.get(frame.f_code.co_varnames[0]) is module:
            return True
        frame = frame.f_back
    return False


def can_be_watched(cache: Any) -> bool:
    """Whether a cache can be referred to without being kept alive, as tuples cannot."""
    try:
        ref(cache)
    except TypeError:
        return False
    return type(cache).__hash__ is not None


# replays


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


# all of it, on and off


class Attachment:
    """The hooks of one handle on one model. `remove` takes off all of them, and nothing else."""

    def __init__(self, model: nn.Module, stack: Stack, user: User, watch_generate: bool) -> None:
        self.user = user
        self.undo: list[Callable[[], None]] = []
        self.tracker = tracker_of(stack.module) or _new_tracker(model, stack, watch_generate)
        self.tracker.users.append(user)
        self.tracker.hear_of_prompts()

    def hook(self, module: nn.Module, hook: Hook) -> None:
        self.undo.append(put(module, hook))

    def watch_replays(self, block: nn.Module) -> None:
        self.undo.append(watch_replays(block, self.tracker))

    def remove(self) -> None:
        for step in self.undo:
            step()
        self.tracker.users.remove(self.user)
        self.tracker.hear_of_prompts()
        if not self.tracker.users:
            self.tracker.remove()
