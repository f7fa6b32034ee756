"""The handle: an edit that is attached to a model, as a live thing.

Its hooks stand on the modules whose outputs are edited: `x + strength * displacement`, where the strength of every
token is worked out once a forward. All state lives in the handle and its hooks: nothing is global, and nothing is added
to the model's files.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from repe import ops
from repe.display import table
from repe.models.blocks import Stack, device_of, hidden_of, with_hidden
from repe.models.call import Forward
from repe.models.tracking import Attachment, Hook, can_be_watched, is_running, trackers_of
from repe.ops.plus import plus
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit
from repe.steering.gate import Gate, Latch
from repe.steering.precision import Precision
from repe.steering.scope import Alpha, Scope, is_uniform, named, strength_of
from repe.steering.worth import warn_if_only_read, warn_of_strength

SETTABLE = ("alpha", "scope", "prompt_length", "vector")
MANY = 12  # rows of alpha
UNATTACHED = sys.maxsize


def status(model: nn.Module) -> list[Steering]:
    """The handles attached to a model, in the order in which they apply.

    Example:
        >>> with repe.steer(model, "honesty", 0.5):
        ...     answers = repe.generate(model, tokenizer, ["Once"], max_new_tokens=2)
        ...     len(repe.status(model))
        1
    """
    return [user for tracker in trackers_of(model) for user in tracker.users if isinstance(user, Steering)]


def detach(model: nn.Module) -> int:
    """Remove every handle from a model, and return how many there were.

    Example:
        >>> handle = repe.steer(model, "honesty", 0.5)
        >>> answers = repe.generate(model, tokenizer, ["Once"], max_new_tokens=2)
        >>> repe.detach(model)
        1
    """
    handles = status(model)
    for handle in handles:
        handle._end()
    return len(handles)


class Steering:
    """A live handle: an edit on a model, with strength `alpha`. Made by `repe.steer`; ended by `remove` or `with`.

    Attributes:
        model, stack: what is edited.
        blocks, site: where.
        edit, alpha, scope, vector, prompt_length: see their properties; the last four can be set.

    Example:
        >>> handle = repe.steer(model, "honesty", 1.0)
        >>> handle.alpha = -0.5
        >>> answers = repe.generate(model, tokenizer, ["Once"], max_new_tokens=2)
        >>> handle.remove()
    """

    model: nn.Module
    stack: Stack
    blocks: tuple[int, ...]

    def __init__(self, model: nn.Module, stack: Stack, edit: Edit, implementation: ops.Implementation) -> None:
        placement = edit.on(stack)
        self.__dict__.update(model=model, stack=stack, blocks=placement.blocks)
        self._edit, self._placement, self._implementation = edit, placement, implementation
        self._modules = {block: stack.site(edit.site, block) for block in placement.blocks}
        with torch.inference_mode(False), torch.no_grad():  # autograd must be able to save them later
            self._constants = {b: placement.constants[b].to(device_of(m)) for b, m in self._modules.items()}
            self._alphas = torch.zeros(1, device=device_of(stack.module))
        self._largest = self._least = 0.0  # of the absolute values of alpha
        self._prompt_length: int | Tensor | None = None
        self._latch: Latch | None = None
        self._serial = UNATTACHED  # tells this handle from all others of its model, past ones too
        self._version = 0  # counts the changes of alpha and of the vector
        self._made_in = get_ident()
        self._thread: int | None = None  # in which alone it acts
        self._touched: bool | Tensor = False  # whether any token was ever in scope: known, or still on the device
        self._attachment: Attachment | None = None
        self._precision = Precision()
        self._warned_of_cache = False
        self._is_weighed = self._is_judged = True  # or will be, once somebody has chosen a strength

    # what it does

    @property
    def edit(self) -> Edit:
        """What is done, where, and at which tokens."""
        return self._edit

    @property
    def site(self) -> str:
        return self._edit.site

    @property
    def alpha(self) -> float | Tensor:
        """The strength: a number, or a tensor with one for every row. Setting it recompiles nothing."""
        return self._alphas.item() if self._has_one_alpha else self._alphas.clone()

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        new = _checked(value)
        rows = new.reshape(-1)
        with torch.inference_mode(False), torch.no_grad():
            if rows.shape == self._alphas.shape:
                self._alphas.copy_(rows)
            else:
                self._alphas = rows.to(self._alphas.device, copy=True)
        self._largest, self._least = new.abs().max().item(), new.abs().min().item()
        self._version += 1
        self._weigh()

    @property
    def divergence(self) -> float:
        """What the strength, or the largest of several, is expected to cost on plain text if every token is edited, in
        nats a token; NaN where the vector does not know its dose."""
        return self._placement.divergence(self._largest)

    def _weigh_from_now_on(self) -> None:
        """Warns of the strength, which somebody has chosen, and of what is chosen later, once of either kind."""
        self._is_weighed = self._is_judged = False
        self._weigh()

    def _weigh(self) -> None:
        if not self._largest:
            return
        if not self._is_judged:
            self._is_judged = True
            warn_if_only_read(self._edit, self.blocks)
        if not self._is_weighed:
            self._is_weighed = warn_of_strength(self._placement, self._largest)

    @property
    def scope(self) -> Scope:
        """The tokens that are edited; see `repe.steer`."""
        return self._edit.scope

    @scope.setter
    def scope(self, value: Scope) -> None:
        self._edit = replace(self._edit, scope=value)

    @property
    def prompt_length(self) -> int | Tensor | None:
        """The prompts' tokens without padding: a number, or a tensor of one a row. None: as the call tells.

        It is a fact of the model's calls, and holds for every handle on the model.
        """
        return self._prompt_length

    @prompt_length.setter
    def prompt_length(self, value: int | Tensor | None) -> None:
        if value is not None:
            torch.as_tensor(value)  # raises before anything is changed
        self._prompt_length = value
        if self._attachment is not None:
            self._attachment.tracker.hear_of_prompts()

    @property
    def vector(self) -> ConceptVector:
        """The concept vector that is steered along. Setting another, for the same blocks, recompiles nothing."""
        if len(self._edit.vectors) != 1:
            raise AttributeError(f"this handle steers along {len(self._edit.vectors)} vectors: see `edit.vectors`")
        return self._edit.vectors[0]

    @vector.setter
    def vector(self, new: ConceptVector) -> None:
        edit = replace(self._edit.along(new), blocks=self.blocks)
        placement = edit.on(self.stack)
        with torch.inference_mode(False), torch.no_grad():
            for block, constants in placement.constants.items():
                self._constants[block].copy_(constants)
        self._edit, self._placement = edit, placement
        self._version += 1

    # the lifetime

    @property
    def attached(self) -> bool:
        return self._attachment is not None

    def _attach(self, watch_generate: bool) -> None:
        self._attachment = attachment = Attachment(self.model, self.stack, self, watch_generate)
        try:
            gate = self._placement.gate
            if gate is not None and self._placement.gate_block is not None:
                self._latch = Latch(gate.decide if isinstance(gate, Gate) else gate)
                attachment.hook(self.stack.site("block", self._placement.gate_block), GateHook(self, self._latch))
            for block, module in self._modules.items():
                if self.site in ("attention", "mlp"):
                    attachment.watch_replays(self.stack.blocks[block])
                attachment.hook(module, EditHook(self, block, attachment.tracker.forwards))
            self._serial = attachment.tracker.issue()
            if self._latch is not None:
                self._latch.serial = self._serial
        except BaseException:
            self._take_off()
            raise

    def _take_off(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def remove(self) -> None:
        """Take the edits off; the model is as it was before. Does nothing the second time.

        Warns if nothing was ever edited, or if edited activations overflowed their dtype.
        """
        self._end()

    def _end(self) -> None:
        if not self.attached:
            return
        self._take_off()
        if overflow := self._precision.overflow():
            warnings.warn(overflow, RuntimeWarning, stacklevel=3)
        if self._latch is None and not bool(self._touched):
            warnings.warn(
                f"{self!r} edited nothing in its lifetime: the model was not run, or no token lay in the scope",
                UserWarning,
                stacklevel=3,
            )

    def __enter__(self) -> Steering:
        if not self.attached:
            raise RuntimeError(f"{self!r} acts no more: call `repe.steer` again")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._take_off()
        self._end()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in SETTABLE:
            raise AttributeError(
                f"{name!r} of a handle cannot be set: alpha, scope, prompt_length and vector can; for anything else, "
                "remove the handle and call `repe.steer` again"
            )
        super().__setattr__(name, value)

    # how it shows itself

    @property
    def _facts(self) -> dict[str, str]:
        """What it does, by what it is called in `repe.steer`."""
        alphas = [f"{alpha:g}" for alpha in self._alphas.tolist()]
        rows = f"{len(alphas)} rows" if len(alphas) > MANY else f"[{', '.join(alphas)}]"
        alpha = {"alpha": alphas[0] if self._has_one_alpha else rows} | self._costs
        return alpha | replace(self._edit, gate=self._placement.gate).facts | {"blocks": str(list(self.blocks))}

    @property
    def _costs(self) -> dict[str, str]:
        """What the strength is expected to cost, and how long the longest push is beside the activations."""
        if math.isnan(self.divergence):
            return {}
        share = max(self._largest * length / norm for length, norm in self._placement.lengths.values())
        return {"divergence": f"{self.divergence:.2g}", "of_norm": f"{share:.2g}"}

    def __repr__(self) -> str:
        facts = [f"{name}={fact}" for name, fact in self._facts.items()]
        return f"Steering({', '.join([repr(self._edit.name), *facts])}{'' if self.attached else ', removed'})"

    def _repr_html_(self) -> str:
        state = "attached" if self.attached else "removed"
        return table(f"steering along {self._edit.name}, {state}", [*self._facts], [[*self._facts.values()]]).html()

    # what the tracker of calls tells

    def starting(self, forward: Forward) -> None:
        """A forward begins."""
        one_alpha = self._least > 0 and self._has_one_alpha and self._latch is None
        if self.leaves(forward):
            return
        if one_alpha and is_uniform(self.scope, forward):
            forward.uniform[self._serial] = self._version
        if not self._warned_of_cache and (why := self._why_cache_differs(forward)):
            self._warned_of_cache = True
            warnings.warn(
                f"{why}; what is cached stays as it was. Start from an empty cache to steer the whole text alike",
                UserWarning,
                stacklevel=2,
            )

    def _why_cache_differs(self, forward: Forward) -> str:
        """Why keys and values of earlier tokens are not what this handle would make of them; "" where they are."""
        holds_text = forward.cache is not None and not forward.starts_prompt and can_be_watched(forward.cache)
        if self._attachment is None or not holds_text or (forward.generation and forward.generation.virtual):
            return ""
        version = self._attachment.tracker.version_in(forward.cache, self._serial)
        meant = self.scope if isinstance(self.scope, str) else ""
        if version is None and self._largest > 0 and meant in ("all", "prompt"):
            is_known = meant == "all" or forward.prompt_length is not None
            name = self._edit.name
            return (
                f"a cache holds keys and values that were not steered along {name!r} by this handle" if is_known else ""
            )
        if version not in (None, self._version):
            return "alpha or the vector was changed while a cache holds keys and values of steered tokens"
        return ""

    def cached(self, forward: Forward, cache: Any) -> None:
        """A forward left its keys and values in `cache`."""
        if self._attachment is not None and self._largest > 0 and not self.leaves(forward):
            self._attachment.tracker.note_cached(cache, self._serial, self._version)

    def own(self, cache: Any) -> None:
        """Take what a cache holds for steered as this handle steers, as a handle before it did."""
        if self._attachment is not None and cache is not None:
            self._attachment.tracker.note_cached(cache, self._serial, self._version)

    def generated(self) -> None:
        """A call of `generate` ended. Warns if what it steered overflowed."""
        if overflow := self._precision.overflow():
            warnings.warn(overflow, RuntimeWarning, stacklevel=3)

    @property
    def stamp(self) -> tuple[int, int]:
        """Differs once alpha or the vector was changed."""
        return self._serial, self._version

    # the hot path

    @property
    def _has_one_alpha(self) -> bool:
        return self._alphas.numel() == 1

    def leaves(self, forward: Forward) -> bool:
        """Whether a forward is left as it is: the handle came while it was under way, or acts in another thread."""
        if torch.compiler.is_compiling():
            return False
        return forward.latest < self._serial or self._thread not in (None, get_ident())

    def forward_under_way(self) -> Forward | None:
        return None if self._attachment is None else self._attachment.tracker.forward

    def edited(self, hidden: Tensor, block: int, forward: Forward) -> Tensor:
        """The edited activations of one block, (rows, tokens, d_model)."""
        eager = not torch.compiler.is_compiling()
        constants = self._constants_for(hidden, block)
        strength, everywhere = self._strength(forward, hidden.device)
        if eager and self._largest == 0:
            return hidden
        edited = self._implementation(hidden, strength, constants, everywhere=everywhere)
        if eager:
            self._precision.note(hidden, strength, edited, constants.keep_norm)
        return edited

    def shift(self, hidden: Tensor, block: int) -> Tensor | None:
        """(d_model,), alpha times what the edit adds to every token alike; None where it is not so simple."""
        constants = self._constants_for(hidden, block)
        is_watched = hidden.dtype == torch.float16  # for overflow
        if is_watched or not constants.is_constant or self._implementation not in (ops.auto, ops.edit):
            return None
        if not self._has_one_alpha:  # any more
            return None
        self._touched = True
        with torch.inference_mode(False), torch.no_grad():
            displacement = constants.shift.to(torch.promote_types(hidden.dtype, torch.float32))
            shift = self._alphas.to(displacement) * displacement
            if not self._placement.lengths:  # else it was checked
                self._precision.note(torch.zeros_like(shift), torch.ones(()), shift)
            return shift

    def _strength(self, forward: Forward, device: torch.device) -> tuple[Tensor, bool]:
        """How strongly every token is edited, and whether it is known that none is by 0: once a forward and device."""
        key = (self._serial, device)
        if key not in forward.strengths:
            home = forward.slots.device
            if device == home:
                forward.strengths[key] = self._strength_at_home(forward)
            else:
                strength, everywhere = self._strength(forward, home)
                forward.strengths[key] = strength.to(device), everywhere
        return forward.strengths[key]

    def _strength_at_home(self, forward: Forward) -> tuple[Tensor, bool]:
        eager = not torch.compiler.is_compiling()
        waits = isinstance(self.scope, str) and self.scope in ("generated", "answer")
        is_open = None if self._latch is None else self._latch.open_rows(forward, named(self.scope), waits)
        strength, mask = strength_of(self._alphas_on(forward.slots.device), self.scope, forward, is_open)
        self._touched = True if mask is None or not eager else mask.any() | self._touched
        return strength, mask is None and eager and self._least > 0

    def _alphas_on(self, device: torch.device) -> Tensor:
        if self._alphas.device == device:
            return self._alphas
        with torch.inference_mode(False), torch.no_grad():
            moved = self._alphas.to(device)
        if not torch.compiler.is_compiling():
            self._alphas = moved
        return moved

    def _constants_for(self, hidden: Tensor, block: int) -> ops.Coefficients:
        if not torch.compiler.is_compiling() and self._precision.is_new(block, hidden.dtype, self._version):
            self._check_precision(block, hidden.dtype)
        constants = self._constants[block]
        if constants.device != hidden.device:
            with torch.inference_mode(False), torch.no_grad():
                constants = self._constants[block] = constants.to(hidden.device)
        return constants

    def _check_precision(self, block: int, dtype: torch.dtype) -> None:
        if self._placement.lengths:
            step, norm = self._placement.lengths[block]
            self._precision.check(block, dtype, self._largest * step, norm)


def _checked(alpha: Alpha) -> Tensor:
    parts = alpha if isinstance(alpha, Sequence) else [alpha]
    if any(getattr(part, "requires_grad", False) for part in parts):
        raise ValueError(
            "alpha requires a gradient, and would get none, as a handle holds plain numbers: pass alpha.detach(), or "
            "learn a strength in a hook of your own that adds alpha * vector.write"
        )
    try:
        new = torch.as_tensor(alpha, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"alpha must be a number or one number a row, got {alpha!r}") from error
    if new.ndim > 1 or new.numel() == 0:
        raise ValueError(f"alpha must be a number or one number a row, got the shape {tuple(new.shape)}")
    if not new.isfinite().all():
        raise ValueError(f"alpha must be finite, got {alpha}")
    return new


# hooks


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
        version = None if forward is None else forward.uniform.get(self.steering._serial)
        if version is None:
            return self._edited(module, output)
        wanted, (ready_for, shift) = (version, output.dtype, output.device), self.ready
        if wanted != ready_for:
            shift = self.steering.shift(output, self.block)
            self.ready = wanted, shift  # at once: another thread may be doing the same
        if shift is None:
            return self._edited(module, output)
        return output + shift if output.dtype is shift.dtype else plus(output, shift)

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
        if self.steering.leaves(forward):
            return None
        return with_hidden(output, self.steering.edited(hidden_of(output), self.block, forward))


class GateHook(Hook):
    """Reads the prompt for a gate, before anything is edited at its block."""

    def __init__(self, steering: Steering, latch: Latch) -> None:
        self.steering, self.latch = steering, latch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self.steering.forward_under_way()
        if forward is not None and not self.steering.leaves(forward):
            self.latch.read(hidden_of(output), forward)
