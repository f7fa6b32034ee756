"""The edit: what is done to activations, where, and at which tokens.

A value: frozen, hashable, equal by content, plain JSON on request. It knows no model and holds no strength. `on` says
what it means for a model of some shape; whoever wants to know where an edit acts, or whether it can, asks that.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from repe.models.blocks import block_numbers
from repe.ops import Coefficients
from repe.reading.vector import DIVERGENCE, ConceptVector, tensor_from_json, tensor_to_json
from repe.steering.gate import Decision, Gate, gate_block
from repe.steering.kinds import KINDS, UNITS, Directions, options_of, steps_of
from repe.steering.scope import Scope, check_scope, scope_from_json, scope_to_json

Blocks = str | int | slice | Iterable[int]
"""`"auto"` (those that the vector recommends), `"all"`, a number (negatives count from the end), or several."""
Concepts = ConceptVector | Sequence[ConceptVector] | Coefficients

MEANINGS = {"target": "the score to set", "theta": "an angle in radians"}


class EditOptions(TypedDict, total=False):
    """The options of an edit, as every function that steers takes them."""

    edit: str
    blocks: Blocks
    scope: Scope
    unit: str
    target: float | None
    theta: float | None
    gate: Gate | Decision | None
    keep_norm: bool
    site: str | None
    stack: str | None


class Shape(Protocol):
    """What an edit has to know of a model: a `Stack` is one."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Placement:
    """An edit in a model of some shape.

    Attributes:
        constants: those of the edit formula, for every block that is edited, in ascending order.
        lengths: for every block what alpha = 1 adds and the mean norm of the activations there; empty for an edit that
            has no length.
        doses: how many doses alpha = 1 costs, over all blocks; NaN where that is not known. Of several vectors as if
            they had nothing to do with each other.
        gate: fitted to the model, and `gate_block` the block whose output it reads.
    """

    constants: Mapping[int, Coefficients]
    lengths: Mapping[int, tuple[float, float]]
    doses: float
    gate: Gate | Decision | None
    gate_block: int | None

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.constants)

    def divergence(self, alpha: float) -> float:
        """What a strength is expected to cost on plain text, in nats a token: it is quadratic. NaN where unknown."""
        return DIVERGENCE * (alpha * self.doses) ** 2


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """An edit of activations along concept vectors. `Edit.of` makes one of what `repe.steer` takes.

    Attributes:
        vectors: what is edited along; none for bare `constants` of the edit formula.
        kind: one of `repe.steering.KINDS`.
        blocks: where, as in `repe.steer`.
        scope: at which tokens.
        unit: of alpha, one of `repe.steering.UNITS`, for kinds that have a length.
        target, theta: the score to set, and an angle in radians, for kinds that take them.
        keep_norm: every edited activation gets back its norm.
        gate: which rows are edited; None for all.
        site, stack: where in the model; the vectors' own by default.
        constants: the whole edit, in place of vectors.

    Raises:
        ValueError, TypeError: something cannot be meant: an unknown kind, unit or scope, an option that the kind would
            ignore or lacks, vectors that do not belong together.

    Example:
        >>> from repe.steering import Edit
        >>> edit = Edit.of(repe.extract(model, tokenizer, "honesty"), scope="answer")
        >>> edit.key() == edit.along(edit.vectors[0]).key()
        True
    """

    vectors: tuple[ConceptVector, ...] = ()
    kind: str = "add"
    blocks: Blocks = "auto"
    scope: Scope = "all"
    unit: str = "kl"
    target: float | None = None
    theta: float | None = None
    gate: Gate | Decision | None = None
    keep_norm: bool = False
    site: str = ""
    stack: str = ""
    constants: Coefficients | None = field(default=None)

    @classmethod
    def of(cls, concepts: Concepts | Edit, **options: Any) -> Edit:
        """Make an edit of vectors, or bare constants, and the options of `EditOptions`; an edit stays as it is.

        Raises:
            TypeError: an option that does not exist, which the message names a near one of, or options beside an edit,
                which holds its own; or something that is no vector.
        """
        _check_names(options)
        if isinstance(concepts, Edit):
            if options:
                raise TypeError(f"an Edit holds its options: leave out {', '.join(options)}, or make another Edit")
            return concepts
        chosen = {"kind" if name == "edit" else name: value for name, value in options.items()}
        chosen |= {name: chosen.get(name) or "" for name in ("site", "stack")}
        if isinstance(concepts, Coefficients):
            return cls(constants=concepts, **chosen)
        return cls(tuple(concepts) if isinstance(concepts, Sequence) else (concepts,), **chosen)

    def __post_init__(self) -> None:
        several = isinstance(self.blocks, Iterable) and not isinstance(self.blocks, str)
        first = self.vectors[0] if self.vectors and isinstance(self.vectors[0], ConceptVector) else None
        settled = {
            "scope": check_scope(self.scope),
            "blocks": tuple(self.blocks) if several else self.blocks,  # type: ignore[arg-type]
            "site": self.site or (first.site if first else "block"),
            "stack": self.stack or (first.stack if first else "decoder"),
            **{name: _number(name, getattr(self, name)) for name in MEANINGS},
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        _check_bare(self) if self.constants is not None else _check(self)

    @property
    def has_length(self) -> bool:
        """Whether alpha counts lengths along the vectors."""
        return bool(self.vectors) and "unit" in options_of(self.kind)

    def along(self, *vectors: ConceptVector) -> Edit:
        """The same edit along other vectors, which belong to the same blocks and site."""
        if len(vectors) != len(self.vectors):
            raise ValueError(f"this edit has {len(self.vectors)} vectors, and got {len(vectors)} in their place")
        for mine, theirs in zip(self.vectors, vectors, strict=True):
            mine.check_alike(theirs)
        return replace(self, vectors=vectors)

    def on(self, shape: Shape) -> Placement:
        """What the edit is in a model of this shape.

        Raises:
            ValueError: the vectors were made for a model of another shape, the poles of a vector cannot be told apart
                at a block, or the gate would read what was edited already.
            IndexError: a block does not exist, or a vector does not hold it.
        """
        _check_fits(self, shape)
        places = self._places(shape.n_blocks)
        blocks = sorted({*chain(*places)})
        if self.site == "embedding" and len(blocks) != 1:
            raise ValueError(
                f"the embedding is one place, and blocks={list(blocks)} names directions for several: name one"
            )
        _check_unit(self)
        gate = self.gate.fitted(shape.d_model, shape.n_blocks, self.stack) if isinstance(self.gate, Gate) else self.gate
        with torch.inference_mode(False), torch.no_grad():  # autograd must be able to save the constants later
            steps = (
                [steps_of(v, of, self.unit) for v, of in zip(self.vectors, places, strict=True)]
                if self.has_length
                else []
            )
            constants, lengths = {}, {}
            for block in blocks:
                here = [number for number, of in enumerate(places) if block in of]
                step = torch.tensor([float(steps[number][places[number].index(block)]) for number in here if steps])
                vectors = [self.vectors[number] for number in here if self.vectors]
                constants[block] = self._constants_at(block, vectors, step)
                if self.has_length:
                    lengths[block] = _length_at(block, vectors, step)
        doses = self._doses_of(places, steps) if self.has_length else math.nan
        read_at = None if gate is None else gate_block(gate, blocks[0], self.site)
        return Placement(constants, lengths, doses, gate, read_at)

    def _places(self, n_blocks: int) -> list[tuple[int, ...]]:
        """The blocks of every vector, or those of bare constants.

        Vectors that are added are so each where it recommends; what is done in the space that several span is done at
        the same blocks.
        """
        if not (isinstance(self.blocks, str) and self.blocks == "auto"):
            return [block_numbers(self.blocks, n_blocks)] * max(len(self.vectors), 1)
        if not self.vectors:
            raise ValueError("bare constants do not say where they belong: pass blocks=")
        places = [block_numbers(list(vector.recommended), n_blocks) for vector in self.vectors]
        if not self.has_length and len({*places}) > 1:
            told = ", ".join(f"{vector.concept!r} {list(of)}" for vector, of in zip(self.vectors, places, strict=True))
            raise ValueError(
                f"edit={self.kind!r} acts on all vectors together, which recommend different blocks ({told}): pass "
                "blocks="
            )
        return places

    def _constants_at(self, block: int, vectors: Sequence[ConceptVector], step: Tensor) -> Coefficients:
        if self.constants is not None:
            return self.constants
        at = Directions.of(vectors, block)
        given: dict[str, Any] = {name: getattr(self, name) for name in MEANINGS if name in options_of(self.kind)}
        if self.has_length:
            given["step"] = step
        return replace(KINDS[self.kind](at, **given), keep_norm=self.keep_norm)

    def _doses_of(self, places: Sequence[Sequence[int]], steps: Sequence[Tensor]) -> float:
        doses = [
            vector.cost_of(blocks, step / vector.dose[[vector.row(block) for block in blocks]])
            for vector, blocks, step in zip(self.vectors, places, steps, strict=True)
        ]
        return math.hypot(*doses)

    # as a value

    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for all that the edit does, the same in every process.

        Raises:
            ValueError: the gate is a function, of which nobody can tell whether it is another's.
        """
        return hashlib.sha256(json.dumps(self._content, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        gate = self._gate_to_json()
        if gate is not None:
            gate["vector"] = self.gate.vector.digest  # type: ignore[union-attr]
        return self._to_json([v.digest for v in self.vectors], gate)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data that `Edit.from_json` makes the edit of again. Raises ValueError for a gate of a function."""
        return self._to_json([v.to_json() for v in self.vectors], self._gate_to_json())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Edit:
        """The edit of what `to_json` gave. Raises ValueError, KeyError or TypeError for anything else."""
        values = {f.name: data[f.name] for f in fields(cls)}
        values["vectors"] = tuple(map(ConceptVector.from_json, values["vectors"]))
        values["blocks"] = slice(*values["blocks"]["slice"]) if isinstance(values["blocks"], dict) else values["blocks"]
        values["scope"] = scope_from_json(values["scope"])
        if values["gate"] is not None:
            values["gate"] = Gate(**{**values["gate"], "vector": ConceptVector.from_json(values["gate"]["vector"])})
        if values["constants"] is not None:
            given = values["constants"].items()
            read: dict[str, Any] = {n: tensor_from_json(v) if isinstance(v, Mapping) else v for n, v in given}
            values["constants"] = Coefficients(**read)
        return cls(**values)

    def _to_json(self, vectors: list[Any], gate: Any) -> dict[str, Any]:
        blocks: Any = self.blocks
        if isinstance(blocks, slice):
            blocks = {"slice": [blocks.start, blocks.stop, blocks.step]}
        elif not isinstance(blocks, str):
            blocks = [int(block) for block in blocks] if isinstance(blocks, tuple) else int(blocks)
        names = ("kind", "unit", "target", "theta", "keep_norm", "site", "stack")
        plain = {name: getattr(self, name) for name in names}
        constants = None if self.constants is None else _coefficients_to_json(self.constants)
        return plain | {
            "vectors": vectors, "blocks": blocks, "scope": scope_to_json(self.scope), "gate": gate,
            "constants": constants,
        }  # fmt: skip

    def _gate_to_json(self) -> dict[str, Any] | None:
        if self.gate is None:
            return None
        if not isinstance(self.gate, Gate):
            raise ValueError("whether a gate is the one of the file cannot be told of a function: pass a `repe.Gate`")
        return {f.name: getattr(self.gate, f.name) for f in fields(Gate)} | {"vector": self.gate.vector.to_json()}

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Edit) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, Any]:
        named = self.gate is None or isinstance(self.gate, Gate)
        return (self if named else replace(self, gate=None)).key(), None if named else self.gate

    # how it shows itself

    @property
    def name(self) -> str:
        """What is edited along."""
        return ", ".join(vector.concept for vector in self.vectors) or "constants"

    @property
    def facts(self) -> dict[str, str]:
        """What is set, by the names of the options."""
        told = {
            "edit": repr(self.kind) if self.vectors else "'formula'",
            "target": None if self.target is None else f"{self.target:g}",
            "theta": None if self.theta is None else f"{self.theta:.3g}",
            "unit": repr(self.unit) if self.has_length else None,
            "keep_norm": "True" if self.keep_norm else None,
            "site": repr(self.site),
            "blocks": repr(list(self.blocks) if isinstance(self.blocks, tuple) else self.blocks),
            "scope": f"mask of {tuple(self.scope.shape)}" if isinstance(self.scope, Tensor) else repr(self.scope),
            "gate": None if self.gate is None else getattr(self.gate, "__qualname__", str(self.gate)),
        }
        return {name: fact for name, fact in told.items() if fact is not None}

    def __repr__(self) -> str:
        return f"Edit({', '.join([repr(self.name), *(f'{name}={fact}' for name, fact in self.facts.items())])})"


def _length_at(block: int, vectors: Sequence[ConceptVector], step: Tensor) -> tuple[float, float]:
    """What a step adds along vectors at a block, and the norm of activations there."""
    first = vectors[0]
    return (step @ Directions.of(vectors, block).write).norm().item(), first.norm[first.row(block)].item()


# what cannot be meant


def _check_names(options: Mapping[str, Any]) -> None:
    known = EditOptions.__annotations__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TypeError(f"an edit has no option {name!r}{hint}: there are {', '.join(known)}")


def _check_bare(edit: Edit) -> None:
    told = {"vectors": edit.vectors, **{name: getattr(edit, name) for name in ("kind", "unit", "target", "theta")}}
    expected = {"vectors": (), "kind": "add", "unit": "kl", "target": None, "theta": None}
    if told != expected or edit.keep_norm:
        raise ValueError(
            "bare constants are the whole edit: leave out edit=, unit=, target=, theta= and keep_norm=, or set them in "
            "the `Coefficients`"
        )


def _check(edit: Edit) -> None:
    vectors = edit.vectors
    if not vectors or not all(isinstance(v, ConceptVector) for v in vectors):
        got = vectors[0] if len(vectors) == 1 else list(vectors)
        raise TypeError(f"expected a concept's name, a ConceptVector or several, or Coefficients; got {got!r:.200}")
    for vector in vectors[1:]:
        vectors[0].check_alike(vector)
    _check_choice("edit", edit.kind, KINDS)
    _check_choice("unit", edit.unit, UNITS)
    _check_options(edit)


def _number(name: str, value: Any) -> float | None:
    try:
        number = 0.0 if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={value!r} must be a number, {MEANINGS[name]}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}={value} must be finite")
    return None if value is None else number


def _check_choice(option: str, value: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(str(value), known, n=2)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(f"{option}={value!r} is not known{hint}: use one of {[*known]}")


def _check_options(edit: Edit) -> None:
    takes = options_of(edit.kind)
    given = {"unit": edit.unit != "kl", "target": edit.target is not None, "theta": edit.theta is not None}
    if wrong := [name for name, is_given in given.items() if is_given and name not in takes]:
        raise ValueError(f"edit={edit.kind!r} takes no {' and no '.join(wrong)}: leave it out, or choose another edit")
    for name, meaning in MEANINGS.items():
        value = getattr(edit, name)
        if name in takes and value is None:
            raise ValueError(f"edit={edit.kind!r} needs {name}=, {meaning}")


def _check_unit(edit: Edit) -> None:
    """Raises ValueError if alpha would be counted in lengths that were measured at another site."""
    if edit.has_length and edit.site != (site := edit.vectors[0].site) and edit.unit != "raw":
        raise ValueError(
            f"the vector's {edit.unit!r} was measured at the site {site!r}, and does not hold at {edit.site!r}: pass "
            f"unit='raw', or extract the vector at site={edit.site!r}"
        )


def _check_fits(edit: Edit, shape: Shape) -> None:
    widths = {v.d_model for v in edit.vectors} | ({edit.constants.write.shape[-1]} if edit.constants else set())
    if widths != {shape.d_model}:
        raise ValueError(
            f"the vector has d_model {sorted(widths)} and the model {shape.d_model}: extract it from this model"
        )
    if (last := max((max(v.blocks) for v in edit.vectors), default=0)) >= shape.n_blocks:
        raise ValueError(
            f"the vector holds block {last} and the model has {shape.n_blocks}: extract it from this model"
        )


def _coefficients_to_json(constants: Coefficients) -> dict[str, Any]:
    values = {f.name: getattr(constants, f.name) for f in fields(constants) if f.init}
    return {name: tensor_to_json(value) if isinstance(value, Tensor) else value for name, value in values.items()}


# how functions that take options show them

Function = TypeVar("Function", bound=Callable[..., Any])


def spells_options(function: Function) -> Function:
    """Show the options of an edit, each with its default, in the signature of a function that takes `**options`."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {f.name: f.default for f in fields(Edit)} | {"edit": "add", "site": None, "stack": None}
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind)
        for name, kind in EditOptions.__annotations__.items()
    ]
    function.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return function
