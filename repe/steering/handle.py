"""Steering: edits attached to a model, as a live handle.

`steer` works out what is edited where (`edits.py`), and puts hooks on the modules whose outputs are edited
(`attachment.py`). A hook asks its handle how strongly every token is edited, and applies the formula of `ops`.
All state lives in the handle and its hooks: nothing is global, and nothing is added to the model's files.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repe import display as showing
from repe import ops
from repe.models.attachment import Attachment
from repe.models.blocks import Stack, device_of, find_stack, is_encoder_decoder
from repe.models.call import Forward
from repe.models.tokens import Scope
from repe.models.tracking import trackers_of
from repe.reading.store import resolve, warn_if_foreign
from repe.reading.vector import ConceptVector
from repe.steering import kinds as edits
from repe.steering.editing import EditHook, GateHook
from repe.steering.gate import Decision, Gate, gate_block
from repe.steering.precision import Precision
from repe.steering.scope import Alpha, Strength


def steer(
    model: nn.Module,
    concept: str | ConceptVector | Sequence[ConceptVector] | ops.Coefficients,
    alpha: Alpha = 1.0,
    *,
    blocks: Any = "auto",
    edit: str = "add",
    scope: Scope = "all",
    unit: str = "gap",
    target: float | None = None,
    theta: float | None = None,
    gate: Gate | Decision | None = None,
    keep_norm: bool = False,
    site: str | None = None,
    stack: str | None = None,
    blocks_at: str | None = None,
    tokenizer: Any = None,
    prompt_length: int | Tensor | None = None,
    impl: str = "auto",
) -> Steering:
    """Steers a model along a concept, from now until the handle is removed or its `with` block ends.

    Args:
        model: any transformers model that `repe.models.blocks.find_stack` understands; it is not copied.
        concept: a name (shipped for this model, else cached, else extracted once, which needs `tokenizer`), a vector,
            several vectors (for edits in a subspace or a plane), or the bare constants of the edit formula.
        alpha: the strength, a number or one for every row of the batch; 0 is off for every edit. With the unit "gap",
            1 moves from the middle between the poles to the positive pole, shared out over the blocks.
        blocks: "auto" (those the vector recommends), "all", a number, or several.
        edit: "add", "ablate", "clamp", "cap", "floor", "erase", "rotate", "angle" or "piecewise": see `repe.edits`.
        scope: the tokens: "all", "prompt", "generated", "answer" (the last prompt token and all after it), a slice or
            list of positions, or a boolean mask (rows, tokens). Padding is never edited, nor are virtual tokens that an
            adapter puts before the prompt of `generate`.
        unit: of alpha, for edits that have a length: "gap", "raw", "sigma" or "norm"; "raw" alone at a site that is
            not the vector's own, where the others were not measured.
        target: the score that "clamp", "cap" and "floor" aim at; the poles stand at -1 and +1.
        theta: the angle in radians of "rotate" and "angle".
        gate: which rows are edited: a `Gate`, or a function of the prompts' activations at the first edited block,
            (mean, last), both (rows, d_model), to a boolean (rows,).
        keep_norm: give every edited activation back its norm.
        site: "block", "attention", "mlp" or "embedding"; the vector's own by default.
        stack: "decoder" or "encoder"; the vector's own by default.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        prompt_length: the prompts' tokens, padding left out, for forwards outside `generate` on a filled cache.
        impl: the implementation of the formula: see `repe.ops.pick`.

    Returns:
        The handle, which is also a context manager. Several handles apply in the order they were attached.

    Raises:
        ValueError, TypeError, IndexError: an argument cannot be meant; the model stays as it was.

    Sources: Zou et al. (arXiv 2310.01405) for reading-vector control; Rimsky et al. (arXiv 2312.06681) for the mean
    difference; Wolf et al. (arXiv 2401.16332) for the meaning of alpha.
    """
    if isinstance(concept, str):
        concept = resolve(model, concept, tokenizer, blocks_at=blocks_at)
    plan = edits.plan(concept, edit, unit, edits.Options(target, theta, keep_norm))
    found = find_stack(model, stack or plan.stack, blocks_at)
    handle = Steering(model, found, plan, site or plan.site, blocks, ops.pick(impl))
    for vector in plan.vectors:
        warn_if_foreign(model, vector)
    handle.scope, handle.prompt_length = scope, prompt_length
    handle.alpha = alpha
    if isinstance(gate, Gate):
        gate = gate.fitted(found.d_model, found.n_blocks, stack or plan.stack)
        warn_if_foreign(model, gate.vector)
    runs_before_generation = (stack or plan.stack) == "encoder" and is_encoder_decoder(model)
    handle._attach(gate, watch_generate=not runs_before_generation)
    return handle


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
    """A live handle: edits on a model, with strength `alpha`. Made by `repe.steer`; ended by `remove` or `with`.

    Attributes:
        plan: what is done, as it was asked for.
        blocks, site: where.
        scope, prompt_length: at which tokens.
    """

    model: nn.Module
    stack: Stack
    plan: edits.Plan
    site: str
    blocks: tuple[int, ...]

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        plan: edits.Plan,
        site: str,
        blocks: Any,
        implementation: ops.Implementation,
    ) -> None:
        plan.check_fits(stack.d_model, stack.n_blocks)
        chosen = _chosen(blocks, plan, stack, site)
        self.__dict__.update(model=model, stack=stack, plan=plan, site=site, blocks=chosen)
        self._implementation = implementation
        self._modules = {b: stack.site(site, b) for b in self.blocks}
        _check_unit(plan, site)
        with torch.inference_mode(False), torch.no_grad():  # autograd must be able to save them later
            self._coefficients = {b: plan.at(b, len(self.blocks)).to(device_of(m)) for b, m in self._modules.items()}
            self._strength = Strength(device_of(stack.module))
        self._attachment: Attachment | None = None
        self._precision = Precision()
        self._warned_of_cache = False

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
        self._strength.scope = value

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
        if len(self.plan.vectors) != 1:
            raise AttributeError(f"this handle steers along {len(self.plan.vectors)} vectors: see `plan.vectors`")
        return self.plan.vectors[0]

    @vector.setter
    def vector(self, new: ConceptVector) -> None:
        plan = edits.plan(new, self.plan.edit, self.plan.unit, self.plan.options)
        self.vector.check_alike(new)
        fresh = {b: plan.at(b, len(self.blocks)) for b in self.blocks}
        with torch.inference_mode(False), torch.no_grad():
            for block, coefficients in fresh.items():
                self._coefficients[block].copy_(coefficients)
        self.__dict__["plan"] = plan
        self._strength.version += 1

    # the lifetime

    @property
    def attached(self) -> bool:
        return self._attachment is not None

    def _attach(self, gate: Gate | Decision | None, watch_generate: bool) -> None:
        gated = None if gate is None else self.stack.site("block", gate_block(gate, self.blocks[0], self.site))
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
        may_change = name.startswith("_") or isinstance(getattr(type(self), name, None), property)
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

    def __repr__(self) -> str:
        return showing.steering_line(self, self._strength.gate)

    def _repr_html_(self) -> str:
        return showing.of_steering(self, self._strength.gate)

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

    def edit(self, hidden: Tensor, block: int, forward: Forward) -> Tensor:
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
        if self.plan.has_length:
            step, norm = self.plan.step(block, len(self.blocks))
            self._precision.check(block, dtype, self._strength.largest * step, norm)


def _chosen(blocks: Any, plan: edits.Plan, stack: Stack, site: str) -> tuple[int, ...]:
    numbers = stack.indices(list(plan.recommended) if isinstance(blocks, str) and blocks == "auto" else blocks)
    if site == "embedding" and len(numbers) != 1:
        raise ValueError(
            f"the embedding is one place, and blocks={list(numbers)} names directions for several: name one"
        )
    return numbers


def _check_unit(plan: edits.Plan, site: str) -> None:
    """Raises ValueError if alpha would be counted in lengths that were measured at another site."""
    if plan.has_length and site != plan.site and plan.unit != "raw":
        raise ValueError(
            f"the vector's {plan.unit!r} was measured at the site {plan.site!r}, and does not hold at {site!r}: pass "
            f"unit='raw', or extract the vector at site={site!r}"
        )
