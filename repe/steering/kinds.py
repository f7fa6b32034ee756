"""The kinds of edit: what the directions at one block mean as constants of the edit formula (`ops/reference.py`).

One function a kind. By its parameters it says which options it takes besides the directions: `step`, what alpha = 1
displaces (the option `unit`), a `target` or an angle `theta`. A new kind is a new function in `KINDS`; neither the
formula nor the handle nor the command line needs to know of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from repe.ops import Coefficients
from repe.ops.reference import Gain
from repe.reading.vector import ConceptVector

PARALLEL = 1e-4  # two unit directions that differ by less cannot be told apart in float32


@dataclass(frozen=True)
class Directions:
    """The K vectors of an edit at one block: `write` and `read` (K, d_model), the rest (K,), all float32."""

    write: Tensor
    read: Tensor
    midpoint: Tensor
    scale: Tensor

    @classmethod
    def of(cls, vectors: Sequence[ConceptVector], block: int) -> Directions:
        """The directions of vectors at a block.

        Raises:
            ValueError: the poles could not be told apart at the block.
            IndexError: a vector does not hold it.
        """
        rows = [v.row(block) for v in vectors]
        parts = ([getattr(v, f.name)[row] for v, row in zip(vectors, rows, strict=True)] for f in fields(cls))
        at = cls(*map(torch.stack, parts))
        if not (at.scale > 0).all():
            raise ValueError(
                f"{' and '.join(v.concept for v in vectors)}: held-out pairs show no distance between the poles at "
                f"block {block} (scale {at.scale.tolist()}), so there is nothing to steer along. Choose other blocks, "
                "or more pairs"
            )
        return at


# units: how far alpha = 1 pushes along `write` at each of several blocks, (blocks,), in activation units

Unit = Callable[[ConceptVector, Sequence[int]], Tensor]


def shared_out(name: str) -> Unit:
    """A length that a vector knows of every block: what is added at one is still there at the next, so each has its
    share."""
    return lambda vector, blocks: getattr(vector, name)[[vector.row(block) for block in blocks]] / len(blocks)


UNITS: dict[str, Unit] = {
    "kl": ConceptVector.lengths_at,
    **{unit: shared_out(name) for unit, name in (("gap", "scale"), ("sigma", "sigma"), ("norm", "norm"))},
    "raw": lambda vector, blocks: torch.ones(len(blocks)),
}


def steps_of(vector: ConceptVector, blocks: Sequence[int], unit: str) -> Tensor:
    """(blocks,), what alpha = 1 displaces.

    Raises:
        ValueError: the vector lacks the unit, or its poles could not be told apart at a block.
        IndexError: it does not hold a block.
    """
    for block in blocks:
        Directions.of([vector], block)
    steps = UNITS[unit](vector, blocks)
    if steps.isnan().any():
        raise ValueError(f"unit={unit!r}: {WITHOUT.get(unit, 'the vector does not know it, as no pairs were read')}")
    return steps


WITHOUT = {
    "kl": "the vector does not know its dose, the length that costs 0.1 nats a token: measure it with "
    "`repe.reading.dosed(model, tokenizer, vector)`, or choose another unit, such as unit='gap'",
    "sigma": "the vector does not know its sigma, as it was not fitted to pairs; use 'gap'",
}


# the kinds


def add(at: Directions, step: Tensor) -> Coefficients:
    """Add alpha steps along every direction: x + alpha * step * write."""
    return _formula(at.read, at.write, offset=step)


def ablate(at: Directions) -> Coefficients:
    """Project the directions out (Arditi et al., arXiv 2406.11717); oblique where reading is not writing."""
    return _formula(_dual(at), at.write, slope=-1.0)


def clamp(at: Directions, target: float) -> Coefficients:
    """Set the score to the target."""
    projection = target * at.scale + at.midpoint
    offset = torch.linalg.solve(_overlap(at), projection.double())
    return _formula(_dual(at), at.write, slope=-1.0, offset=offset.float())


def cap(at: Directions, target: float) -> Coefficients:
    """Lower the score to the target where it is above."""
    return replace(_bound(at, target), high=torch.zeros(1))


def floor(at: Directions, target: float) -> Coefficients:
    """Raise the score to the target where it is below."""
    return replace(_bound(at, target), low=torch.zeros(1))


def erase(at: Directions) -> Coefficients:
    """Move every activation to the midpoint, so that its score says nothing (LEACE, arXiv 2306.03819)."""
    return clamp(at, 0.0)


def rotate(at: Directions, theta: float) -> Coefficients:
    """Rotate by theta in the plane of two directions, from the first towards the second."""
    plane = _plane(at)
    cosine, sine = math.cos(theta), math.sin(theta)
    rotation = torch.tensor([[cosine, -sine], [sine, cosine]])
    return _formula(plane, (rotation - torch.eye(2)).T @ plane, slope=1.0)


def angle(at: Directions, theta: float) -> Coefficients:
    """Set the angle in the plane of two directions to theta, the length in the plane kept (angular steering)."""
    plane = _plane(at)
    return _formula(plane, plane, slope=-1.0, offset=torch.tensor([math.cos(theta), math.sin(theta)]), gain="norm")


def piecewise(at: Directions, step: Tensor) -> Coefficients:
    """Push away from zero on either side: x + alpha * step * sign(read . x) * write (Zou et al., arXiv 2310.01405)."""
    return _formula(at.read, at.write, offset=step, gain="sign")


KINDS: dict[str, Callable[..., Coefficients]] = {
    kind.__name__: kind for kind in (add, ablate, clamp, cap, floor, erase, rotate, angle, piecewise)
}
OPTIONS = {"step": "unit", "target": "target", "theta": "theta"}
"""The parameters of a kind, and the options of an edit that they come from."""


def options_of(kind: str) -> frozenset[str]:
    """The options that a kind takes: some of "unit", "target" and "theta"."""
    return frozenset(OPTIONS[name] for name in inspect.signature(KINDS[kind]).parameters if name in OPTIONS)


def loreft(rotation: Tensor, weight: Tensor, bias: Tensor) -> Coefficients:
    """The trained edit x + R^T (W x + b - R x) of LoReFT (Wu et al., arXiv 2404.03592), to be given to `repe.steer`.

    Args:
        rotation: R, (K, d_model), orthonormal rows.
        weight: W, (K, d_model).
        bias: b, (K,).

    Raises:
        ValueError: the shapes do not belong together.

    Example:
        >>> edit = repe.loreft(torch.eye(4)[:2], torch.zeros(2, 4), torch.zeros(2))
        >>> edit.read.shape
        torch.Size([2, 4])
    """
    if weight.shape != rotation.shape or bias.shape != rotation.shape[:1]:
        raise ValueError(
            "expected rotation and weight (K, d_model) and bias (K,); got the shapes "
            f"{tuple(rotation.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return _formula(weight.float() - rotation.float(), rotation.float(), slope=1.0, offset=bias.float())


# the formula's constants


def _formula(
    read: Tensor, write: Tensor, slope: float = 0.0, offset: Tensor | None = None, gain: Gain = "one"
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
        needs_projection=slope != 0 or gain != "one",
    )


def _bound(at: Directions, target: float) -> Coefficients:
    if len(at.write) != 1:
        raise ValueError(f"cap and floor bound one vector, got {len(at.write)}: attach one after another")
    return clamp(at, target)


def _dual(at: Directions) -> Tensor:
    """Read directions with `read @ write.T = 1`, so that setting one concept's score leaves the others' alone."""
    return torch.linalg.solve(_overlap(at), at.read.double()).float()


def _overlap(at: Directions) -> Tensor:
    """(K, K), float64: how far what is written along one direction is read along another."""
    overlap = at.read.double() @ at.write.double().T
    if torch.linalg.svdvals(overlap).min() < PARALLEL:
        raise ValueError("the vectors of this edit point the same way: give directions that differ")
    return overlap


def _plane(at: Directions) -> Tensor:
    if len(at.write) != 2:
        raise ValueError(f"this edit works in the plane of two vectors, got {len(at.write)}: give [first, second]")
    first, second = at.write.double()
    first = first / first.norm()
    second = second - (second @ first) * first
    if second.norm() < PARALLEL:
        raise ValueError("the two vectors point the same way, so they span no plane: give directions that differ")
    return torch.stack([first, second / second.norm()]).float()
