"""Edits by name: what a concept vector means as constants of the edit formula (`ops/reference.py`), block by block.

One function an edit, all alike: from the directions at one block to `Coefficients`. A new edit is a new entry of
`EDITS`; neither the formula nor steering needs to know of it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repe.ops import Coefficients
from repe.ops.reference import Gain
from repe.reading.vector import ConceptVector

UNITS = ("gap", "raw", "sigma", "norm")
PARALLEL = 1e-4  # two unit directions that differ by less cannot be told apart in float32


@dataclass(frozen=True)
class Directions:
    """The K vectors of an edit at one block: `write` and `read` (K, d_model), the rest (K,), all float32.

    `step` is what alpha = 1 displaces along `write`, in activation units; it depends on the unit and on how many blocks
    share the displacement.
    """

    write: Tensor
    read: Tensor
    midpoint: Tensor
    scale: Tensor
    step: Tensor


@dataclass(frozen=True)
class Options:
    """What an edit may be told besides its directions: `target` in scores (the poles stand at -1 and +1), `theta` in
    radians, `keep_norm`."""

    target: float | None = None
    theta: float | None = None
    keep_norm: bool = False


def directions(vectors: Sequence[ConceptVector], block: int, unit: str, n_blocks: int) -> Directions:
    """The directions of `vectors` at one of the `n_blocks` blocks that are edited.

    With the unit "gap" the displacement is shared out over the blocks, since what is added at one is still there at the
    next. "raw" (1), "sigma" and "norm" (the mean norm of the activations) are lengths at every block.

    Raises:
        ValueError: the poles could not be told apart at the block, or the vector does not know the unit.
    """
    rows = [v.row(block) for v in vectors]
    write, read, midpoint, scale, sigma, norm = (
        torch.stack([getattr(v, name)[row] for v, row in zip(vectors, rows, strict=True)])
        for name in ("write", "read", "midpoint", "scale", "sigma", "norm")
    )
    if not (scale > 0).all():
        raise ValueError(
            f"{' and '.join(v.concept for v in vectors)}: held-out pairs show no distance between the poles at block "
            f"{block} (scale {scale.tolist()}), so there is nothing to steer along. Choose other blocks, or more pairs"
        )
    step = {"gap": scale / n_blocks, "raw": torch.ones_like(scale), "sigma": sigma, "norm": norm}[unit]
    if step.isnan().any():
        raise ValueError(
            f"unit={unit!r}: the vector does not know its {unit}, as it was not fitted to pairs; use 'gap'"
        )
    return Directions(write, read, midpoint, scale, step)


# the edits


def add(at: Directions, options: Options) -> Coefficients:
    """x + alpha * step * write, for every direction."""
    return _formula(at.read, at.write, offset=at.step, keep_norm=options.keep_norm)


def ablate(at: Directions, options: Options) -> Coefficients:
    """Projects the directions out (Arditi et al., arXiv 2406.11717); oblique where reading is not writing."""
    return _formula(_dual(at), at.write, slope=-1.0, keep_norm=options.keep_norm)


def clamp(at: Directions, options: Options) -> Coefficients:
    """Sets the score to `target`."""
    return _to_target(at, options, "clamp")


def cap(at: Directions, options: Options) -> Coefficients:
    """Lowers the score to `target` where it is above."""
    return replace(_bound(at, options, "cap"), high=torch.zeros(1))


def floor(at: Directions, options: Options) -> Coefficients:
    """Raises the score to `target` where it is below."""
    return replace(_bound(at, options, "floor"), low=torch.zeros(1))


def erase(at: Directions, options: Options) -> Coefficients:
    """Moves every activation to the midpoint, so that the score says nothing any more (LEACE, arXiv 2306.03819)."""
    return clamp(at, Options(target=0.0, keep_norm=options.keep_norm))


def rotate(at: Directions, options: Options) -> Coefficients:
    """Rotates by `theta` in the plane of two directions, from the first towards the second."""
    plane = _plane(at, "rotate")
    cosine, sine = _turn(options, "rotate")
    rotation = torch.tensor([[cosine, -sine], [sine, cosine]])
    return _formula(plane, (rotation - torch.eye(2)).T @ plane, slope=1.0, keep_norm=options.keep_norm)


def angle(at: Directions, options: Options) -> Coefficients:
    """Sets the angle in the plane of two directions to `theta`, the length in the plane kept (angular steering)."""
    plane = _plane(at, "angle")
    return _formula(
        plane, plane, slope=-1.0, offset=torch.tensor(_turn(options, "angle")), gain="norm", keep_norm=options.keep_norm
    )


def piecewise(at: Directions, options: Options) -> Coefficients:
    """x + alpha * step * sign(read . x) * write: away from zero on either side (Zou et al., arXiv 2310.01405)."""
    return _formula(at.read, at.write, offset=at.step, gain="sign", keep_norm=options.keep_norm)


def loreft(rotation: Tensor, weight: Tensor, bias: Tensor) -> Coefficients:
    """The trained edit x + R^T (W x + b - R x) of LoReFT (Wu et al., arXiv 2404.03592), to be given to `repe.steer`.

    Args:
        rotation: R, (K, d_model), orthonormal rows.
        weight: W, (K, d_model).
        bias: b, (K,).

    Raises:
        ValueError: the shapes do not belong together.
    """
    if weight.shape != rotation.shape or bias.shape != rotation.shape[:1]:
        raise ValueError(
            "expected rotation and weight (K, d_model) and bias (K,); got the shapes "
            f"{tuple(rotation.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return _formula(weight.float() - rotation.float(), rotation.float(), slope=1.0, offset=bias.float())


Edit = Callable[[Directions, Options], Coefficients]
Concepts = ConceptVector | Sequence[ConceptVector] | Coefficients
EDITS: dict[str, Edit] = {
    edit.__name__: edit for edit in (add, ablate, clamp, cap, floor, erase, rotate, angle, piecewise)
}
WITH_A_LENGTH = ("add", "piecewise")
WITH_A_TARGET = ("clamp", "cap", "floor")
WITH_AN_ANGLE = ("rotate", "angle")


@dataclass(frozen=True)
class Plan:
    """What is to be done, before it is known to which model: an edit of some vectors, or bare constants."""

    vectors: tuple[ConceptVector, ...]
    constants: Coefficients | None
    edit: str
    unit: str
    options: Options

    @property
    def site(self) -> str:
        return self.vectors[0].site if self.vectors else "block"

    @property
    def stack(self) -> str:
        return self.vectors[0].stack if self.vectors else "decoder"

    @property
    def recommended(self) -> tuple[int, ...]:
        """The blocks of "auto". Raises ValueError where there are no vectors to recommend any."""
        if not self.vectors:
            raise ValueError("bare constants do not say where they belong: pass blocks=")
        return self.vectors[0].recommended

    @property
    def has_length(self) -> bool:
        return bool(self.vectors) and self.edit in WITH_A_LENGTH

    def at(self, block: int, n_blocks: int) -> Coefficients:
        """The constants at one of the `n_blocks` blocks that are edited."""
        if self.constants is not None:
            return self.constants
        return EDITS[self.edit](directions(self.vectors, block, self.unit, n_blocks), self.options)

    def step(self, block: int, n_blocks: int) -> tuple[float, float]:
        """What alpha = 1 adds to the activations of a block, and their mean norm there."""
        at = directions(self.vectors, block, self.unit, n_blocks)
        vector = self.vectors[0]
        return (at.step @ at.write).norm().item(), vector.norm[vector.row(block)].item()

    def check_fits(self, d_model: int, n_blocks: int) -> None:
        """Raises ValueError if the vectors were made for a model of another shape."""
        widths = {v.d_model for v in self.vectors} | ({self.constants.write.shape[-1]} if self.constants else set())
        if widths != {d_model}:
            raise ValueError(
                f"the vector has d_model {sorted(widths)} and the model {d_model}: extract it from this model"
            )
        if (last := max((max(v.blocks) for v in self.vectors), default=0)) >= n_blocks:
            raise ValueError(f"the vector holds block {last} and the model has {n_blocks}: extract it from this model")


def plan(concepts: Concepts, edit: str, unit: str, options: Options) -> Plan:
    """Checks what can be checked without a model.

    Raises:
        ValueError, TypeError: an unknown edit or unit, an option it would ignore, or something that is no vector.
    """
    if isinstance(concepts, Coefficients):
        _check_bare(edit, unit, options)
        return Plan((), concepts, "formula", unit, options)
    vectors = tuple(concepts) if isinstance(concepts, Sequence) else (concepts,)
    if not vectors or not all(isinstance(v, ConceptVector) for v in vectors):
        raise TypeError(
            f"expected a concept's name, a ConceptVector or several, or Coefficients; got {concepts!r:.200}"
        )
    for vector in vectors[1:]:
        vectors[0].check_alike(vector)
    _check_named(edit)
    _check_options(edit, unit, options)
    return Plan(vectors, None, edit, unit, options)


def _check_bare(edit: str, unit: str, options: Options) -> None:
    if (edit, unit, options) != ("add", "gap", Options()):
        raise ValueError(
            "bare constants are the whole edit: leave out edit=, unit=, target=, theta= and keep_norm=, or set them in "
            "the `Coefficients`"
        )


def _check_named(name: str) -> None:
    if name not in EDITS:
        near = difflib.get_close_matches(str(name), EDITS, n=2)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(f"edit={name!r} is not known{hint}: use one of {[*EDITS]}")


def _check_options(name: str, unit: str, options: Options) -> None:
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is not known: use one of {UNITS}")
    ignored = {
        "unit": unit != "gap" and name not in WITH_A_LENGTH,
        "target": options.target is not None and name not in WITH_A_TARGET,
        "theta": options.theta is not None and name not in WITH_AN_ANGLE,
    }
    if wrong := [option for option, is_ignored in ignored.items() if is_ignored]:
        raise ValueError(f"edit={name!r} takes no {' and no '.join(wrong)}: leave it out, or choose another edit")


# the formula's constants


def _formula(
    read: Tensor,
    write: Tensor,
    slope: float = 0.0,
    offset: Tensor | None = None,
    gain: Gain = "one",
    keep_norm: bool = False,
) -> Coefficients:
    ones = torch.ones(len(write), device=write.device)
    return Coefficients(
        read=read.contiguous(),
        write=write.contiguous(),
        slope=slope * ones,
        offset=0 * ones if offset is None else offset,
        low=-math.inf * ones,
        high=math.inf * ones,
        gain=gain,
        keep_norm=keep_norm,
        needs_projection=slope != 0 or gain != "one",
    )


def _to_target(at: Directions, options: Options, edit: str) -> Coefficients:
    projection = _needed(options.target, edit, "target", "the score to set") * at.scale + at.midpoint
    offset = torch.linalg.solve(_overlap(at), projection.double())
    return _formula(_dual(at), at.write, slope=-1.0, offset=offset.float(), keep_norm=options.keep_norm)


def _bound(at: Directions, options: Options, edit: str) -> Coefficients:
    if len(at.write) != 1:
        raise ValueError(f"cap and floor bound one vector, got {len(at.write)}: attach one after another")
    return _to_target(at, options, edit)


def _dual(at: Directions) -> Tensor:
    """Read directions with `read @ write.T = 1`, so that setting one concept's score leaves the others' alone."""
    return torch.linalg.solve(_overlap(at), at.read.double()).float()


def _overlap(at: Directions) -> Tensor:
    """(K, K), float64: how far what is written along one direction is read along another."""
    overlap = at.read.double() @ at.write.double().T
    if torch.linalg.svdvals(overlap).min() < PARALLEL:
        raise ValueError("the vectors of this edit point the same way: give directions that differ")
    return overlap


def _plane(at: Directions, edit: str) -> Tensor:
    if len(at.write) != 2:
        raise ValueError(f"edit={edit!r} works in the plane of two vectors, got {len(at.write)}: give [first, second]")
    first, second = at.write.double()
    first = first / first.norm()
    second = second - (second @ first) * first
    if second.norm() < PARALLEL:
        raise ValueError(f"edit={edit!r}: the two vectors point the same way, so they span no plane")
    return torch.stack([first, second / second.norm()]).float()


def _turn(options: Options, edit: str) -> tuple[float, float]:
    theta = _needed(options.theta, edit, "theta", "an angle in radians")
    return math.cos(theta), math.sin(theta)


def _needed(value: float | None, edit: str, name: str, meaning: str) -> float:
    if value is None:
        raise ValueError(f"edit={edit!r} needs {name}=, {meaning}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value
