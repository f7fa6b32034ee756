"""The handle: an edit that is attached to a model, as a live thing.

The hooks stand on the modules whose outputs are edited. A hook asks its handle how strongly every token is edited, and
applies the edit formula. All state lives in the handle and its hooks: nothing is global, and nothing is added to the
model's files.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repe import ops
from repe.display import table
from repe.models.attachment import Attachment
from repe.models.blocks import Stack, device_of
from repe.models.call import Forward
from repe.models.tracking import trackers_of
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit
from repe.steering.editing import EditHook, GateHook
from repe.steering.gate import Gate
from repe.steering.precision import Precision
from repe.steering.scope import Alpha, Scope, Strength

SETTABLE = ("alpha", "scope", "prompt_length", "vector")
MANY = 12  # rows of alpha


def status(model: nn.Module) -> list[Steering]:
    """The handles attached to a model, in the order in which they apply."""
    return [user for tracker in trackers_of(model) for user in tracker.users if isinstance(user, Steering)]


def detach(model: nn.Module) -> int:
    """Removes every handle from a model, and returns how many there were."""
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
            self._coefficients = {b: placement.constants[b].to(device_of(m)) for b, m in self._modules.items()}
            self._strength = Strength(device_of(stack.module))
        self._strength.scope = edit.scope
        self._attachment: Attachment | None = None
        self._precision = Precision()
        self._warned_of_cache = False

    @property
    def edit(self) -> Edit:
        """What is done, where, and at which tokens."""
        return self._edit

    @property
    def site(self) -> str:
        return self._edit.site

    # the values that may change while it lives

    @property
    def alpha(self) -> float | Tensor:
        """The strength: a number, or a tensor with one for every row. Setting it recompiles nothing."""
        return self._strength.alpha

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        self._strength.alpha = value

    @property
    def scope(self) -> Scope:
        """The tokens that are edited; see `repe.steer`."""
        return self._strength.scope

    @scope.setter
    def scope(self, value: Scope) -> None:
        self._edit = replace(self._edit, scope=value)
        self._strength.scope = self._edit.scope

    @property
    def prompt_length(self) -> int | Tensor | None:
        """The prompts' tokens without padding: a number, or a tensor of one a row. None: as the call tells."""
        return self._strength.prompt_length

    @prompt_length.setter
    def prompt_length(self, value: int | Tensor | None) -> None:
        self._strength.prompt_length = value

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
            for block, coefficients in placement.constants.items():
                self._coefficients[block].copy_(coefficients)
        self._edit, self._placement = edit, placement
        self._strength.version += 1

    # the lifetime

    @property
    def attached(self) -> bool:
        return self._attachment is not None

    def _attach(self, watch_generate: bool) -> None:
        gate, gate_block = self._placement.gate, self._placement.gate_block
        gated = None if gate_block is None else self.stack.site("block", gate_block)
        self._attachment = attachment = Attachment(self.model, self.stack, self, watch_generate)
        try:
            if gate is not None and gated is not None:
                self._strength.gate = gate.decide if isinstance(gate, Gate) else gate
                attachment.hook(gated, GateHook(self))
            for block, module in self._modules.items():
                if self.site in ("attention", "mlp"):
                    attachment.watch_replays(self.stack.blocks[block])
                attachment.hook(module, EditHook(self, block, attachment.tracker.forwards))
            self._strength.serial = attachment.tracker.issue()
        except BaseException:
            self._take_off()
            raise

    def _take_off(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def remove(self) -> None:
        """Takes the edits off; the model is as it was before. Does nothing the second time.

        Warns if nothing was ever edited, or if edited activations overflowed their dtype.
        """
        self._end()

    def _end(self) -> None:
        if not self.attached:
            return
        self._take_off()
        if overflow := self._precision.overflow():
            warnings.warn(overflow, RuntimeWarning, stacklevel=3)
        if self._strength.gate is None and not bool(self._strength.touched):
            warnings.warn(
                f"{self!r} edited nothing in its lifetime: the model was not run, or no token lay in the scope",
                UserWarning,
                stacklevel=3,
            )

    def __enter__(self) -> Steering:
        if not self.attached:
            raise RuntimeError(f"{self!r} acts no more: call `repe.steer` again")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        may_change = name.startswith("_") or name in SETTABLE
        if not may_change:
            raise AttributeError(
                f"{name!r} of a handle cannot be set: alpha, scope, prompt_length and vector can; for anything else, "
                "remove the handle and call `repe.steer` again"
            )
        super().__setattr__(name, value)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._take_off()
        self._end()

    @property
    def _facts(self) -> dict[str, str]:
        """What it does, by what it is called in `repe.steer`."""
        rows = [self.alpha] if isinstance(self.alpha, float) else self.alpha.tolist()
        alphas = [f"{alpha:g}" for alpha in rows]
        shown = f"{len(alphas)} rows" if len(alphas) > MANY else f"[{', '.join(alphas)}]"
        alpha = alphas[0] if isinstance(self.alpha, float) else shown
        return {"alpha": alpha} | self._edit.facts | {"blocks": str(list(self.blocks))}

    def __repr__(self) -> str:
        facts = [f"{name}={fact}" for name, fact in self._facts.items()]
        return f"Steering({', '.join([repr(self._edit.name), *facts])}{'' if self.attached else ', removed'})"

    def _repr_html_(self) -> str:
        state = "attached" if self.attached else "removed"
        return table(f"steering along {self._edit.name}, {state}", [*self._facts], [[*self._facts.values()]])

    # what the tracker of calls tells

    def starting(self, forward: Forward) -> None:
        """A forward begins."""
        if not self.came_after(forward) and self._strength.is_one(forward):
            forward.memo[self] = self._strength.version
        if self._attachment is not None and forward.cache is not None and not forward.starts_prompt:
            steered_under = self._attachment.tracker.version_in(forward.cache, self._strength.serial)
            if steered_under not in (None, self._strength.version) and not self._warned_of_cache:
                self._warned_of_cache = True
                warnings.warn(
                    "alpha or the vector was changed while a cache holds keys and values of steered tokens; what is "
                    "cached stays as it was. Start from an empty cache to steer the whole text alike",
                    UserWarning,
                    stacklevel=2,
                )

    def cached(self, forward: Forward, cache: Any) -> None:
        """A forward left its keys and values in `cache`."""
        if self._attachment is not None and self._strength.largest > 0:
            self._attachment.tracker.note_cached(cache, self._strength.serial, self._strength.version)

    def generated(self) -> None:
        """A call of `generate` ended. Warns if what it steered overflowed."""
        if overflow := self._precision.overflow():
            warnings.warn(overflow, RuntimeWarning, stacklevel=3)

    @property
    def stamp(self) -> tuple[int, int]:
        """Differs once alpha or the vector was changed."""
        return self._strength.serial, self._strength.version

    # the hot path

    def came_after(self, forward: Forward) -> bool:
        """Whether it was attached while the forward was under way, which is then left as it is."""
        return not torch.compiler.is_compiling() and forward.latest < self._strength.serial

    def forward_under_way(self) -> Forward | None:
        return None if self._attachment is None else self._attachment.tracker.forward

    def edited(self, hidden: Tensor, block: int, forward: Forward) -> Tensor:
        """The edited activations of one block, (rows, tokens, d_model)."""
        eager = not torch.compiler.is_compiling()
        coefficients = self._coefficients_for(hidden, block)
        strength, everywhere = self._strength.on(hidden.device, forward)
        if eager and self._strength.largest == 0:
            return hidden
        edited = self._implementation(hidden, strength, coefficients, everywhere=everywhere)
        if eager:
            self._precision.note(hidden, strength, edited)
        return edited

    def constant(self, hidden: Tensor, block: int) -> Tensor | None:
        """(d_model,), what the edit adds to every token alike until a value changes; None if it is not so simple."""
        coefficients = self._coefficients_for(hidden, block)
        is_watched = hidden.dtype == torch.float16  # for overflow
        if is_watched or not coefficients.is_constant or self._implementation not in (ops.auto, ops.edit):
            return None
        if not self._strength.is_number:  # any more
            return None
        self._strength.touched = True
        with torch.inference_mode(False), torch.no_grad():
            return self._strength.times(coefficients.shift.to(torch.promote_types(hidden.dtype, torch.float32)))

    def _coefficients_for(self, hidden: Tensor, block: int) -> ops.Coefficients:
        if not torch.compiler.is_compiling() and self._precision.is_new(block, hidden.dtype, self._strength.version):
            self._check(block, hidden.dtype)
        coefficients = self._coefficients[block]
        if coefficients.device != hidden.device:
            with torch.inference_mode(False), torch.no_grad():
                coefficients = self._coefficients[block] = coefficients.to(hidden.device)
        return coefficients

    def read_prompt(self, hidden: Tensor, forward: Forward) -> None:
        """Lets the gate see the activations of its block."""
        self._strength.read_prompt(hidden, forward)

    def _check(self, block: int, dtype: torch.dtype) -> None:
        if self._placement.lengths:
            step, norm = self._placement.lengths[block]
            self._precision.check(block, dtype, self._strength.largest * step, norm)
