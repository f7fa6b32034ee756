"""How a hook gets onto a module and comes off again, without leaving a trace in what is saved or copied.

A pickled or copied model is steered by nothing: its hooks have become inert, and what else stands on the copy (a
`forward` and a `generate` of its own) is what its class has.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn


class Hook:
    """A hook that is pickled and copied as one that does nothing and needs no `repe` to be loaded.

    A hook cannot leave the dictionary it is copied with, so it becomes a method of the standard library that takes any
    arguments and returns None.
    """

    def __call__(self, *call: Any) -> Any:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def put(module: nn.Module, hook: Hook) -> Callable[[], None]:
    """Puts a forward hook on a module, so that code compiled before is compiled anew; returns what takes it off."""
    registered = module.register_forward_hook(hook)
    mark(module)

    def take_off() -> None:
        registered.remove()
        unmark(module)

    return take_off


# Compiled code does not look at hooks again: dynamo guards on whether a module's `forward` was patched, not on its
# hooks. A patch that changes nothing makes it compile anew once, and taking it off brings the old code back.


def mark(module: nn.Module) -> None:
    if "forward" not in module.__dict__:
        module.forward = types.MethodType(type(module).forward, module)


def unmark(module: nn.Module) -> None:
    patch = module.__dict__.get("forward")
    hooked = any(
        isinstance(h, Hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for h in hooks.values()
    )
    if not hooked and getattr(patch, "__func__", None) is type(module).forward:
        del module.forward
