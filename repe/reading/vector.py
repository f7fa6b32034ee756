"""The concept vector: for every block, the direction a concept is written along and the one it is read along.

Fitting happens elsewhere; what is here is frozen. Arithmetic and `to`-like operations return new vectors, and files are
safetensors with a JSON header, never pickles. The file knows nothing of models.

The header names its format. A header field or a tensor that is not known here was added by a later version, which kept
the format's name because a reader may do without: it is passed over. Another format is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from repe import display
from repe.models.blocks import SITES, STACKS
from repe.models.files import draft_of
from repe.models.gguf import Header, is_gguf

PER_DIRECTION = ("write", "read", "center")
PER_BLOCK = ("scale", "sigma", "norm", "accuracy", "separation", "dose")
PER_TWO_BLOCKS = ("coherence",)
TENSORS = PER_DIRECTION + PER_BLOCK + PER_TWO_BLOCKS
ADDED = ("dose", "coherence")  # that files of earlier versions lack
STEERED_BY = ("write", "read", "center", "scale", "sigma", "norm", "dose", "coherence")
MAY_BE_UNKNOWN = ("sigma", "accuracy", "separation", "dose", "coherence")
ROUNDING = 1e-6  # relative: what is left of a float32 direction once it has been taken away from itself
NORMALISED = 1e-3  # how far `|write|` and `read . write` may be from 1
SHOWN = ("accuracy", "separation", "scale", "sigma", "norm", "dose")
TOLD = ("made", "reader", "pairs", "held_out_pairs", "model")  # of the provenance, where the vector is shown
ROWS = 12  # shown in a notebook, at most, besides the recommended
AIMED_AT = "aimed_at"  # what provenance calls the items that a direction was fitted to, whatever is made of it
IDENTITY = ("model", "fingerprint")  # what provenance says of the model, whatever is made of the vector
FORMAT = "repe.vector/1"
DEEPEST = 32  # how deep the provenance in a file may be nested, that all can be shown
UNUSUAL = 0.95  # of random directions are less efficient than one that is said to be written
DIVERGENCE = 0.1
"""Nats a token that plain text diverges by at a length of one dose."""


@dataclass(frozen=True, eq=False)
class ConceptVector:
    """A concept's directions at `blocks`, in float32 on the CPU.

    Attributes:
        concept: its name.
        blocks: the block numbers that the rows of the tensors stand for.
        recommended: the block or blocks to steer at.
        write: (blocks, d_model), unit norm; what steering adds.
        read: (blocks, d_model), scaled so that `read . write = 1`; what scores project on.
        center: (blocks, d_model), the middle between the poles' mean activations.
        scale: (blocks,), half the distance of the poles' means along `read`, on held-out pairs. Not positive where the
            concept cannot be steered.
        sigma: (blocks,), standard deviation of the projection on `read` inside the poles; NaN where unknown.
        norm: (blocks,), mean norm of the activations.
        accuracy: (blocks,), share of held-out pairs that `read` orders rightly; NaN where nothing was held out.
        separation: (blocks,), distance of the poles along `read` in sigmas, on held-out pairs; infinite at sigma 0.
        dose: (blocks,), the length along `write` at which plain text diverges by 0.1 nats a token; NaN where unknown,
            everywhere by default. Measured at the recommended blocks, and forecast elsewhere; several recommended ones
            are measured together, so that what is true is what their shares cost.
        coherence: (blocks, blocks), the correlation of what pushes at two blocks do to the next token of plain text: 1
            where their costs add up like one push, 0 like two that have nothing to do with each other. NaN where
            unknown, everywhere by default.
        site, stack: where in the model: see `repe.steer`.
        provenance: how it was made; plain JSON data. Multiples keep it, as the pairs that were measured are the same;
            what is drawn or computed from other vectors names these instead.

    Example:
        >>> vector = repe.extract(model, tokenizer, "honesty")
        >>> weaker = 0.5 * vector
        >>> bool((weaker.displacement == 0.5 * vector.displacement).all())
        True
    """

    concept: str
    blocks: tuple[int, ...]
    recommended: tuple[int, ...]
    write: Tensor
    read: Tensor
    center: Tensor
    scale: Tensor
    sigma: Tensor
    norm: Tensor
    accuracy: Tensor
    separation: Tensor
    site: str = "block"
    stack: str = "decoder"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    dose: Tensor = None  # type: ignore[assignment]  # which it is no more once it is made
    coherence: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, ndim in (("dose", 1), ("coherence", 2)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.full((len(self.blocks),) * ndim, math.nan))
        for name in ("blocks", "recommended"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            _check_blocks(name, getattr(self, name))
        if strangers := set(self.recommended) - set(self.blocks):
            raise ValueError(f"recommended blocks {sorted(strangers)} are not among the vector's blocks {self.blocks}")
        if self.write.ndim != 2:
            raise ValueError(f"`write` has shape {tuple(self.write.shape)}, expected (blocks, d_model)")
        for name, known in (("site", SITES), ("stack", STACKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} does not exist: choose one of {list(known)}")
        count = len(self.blocks)
        shapes = dict.fromkeys(PER_DIRECTION, (count, self.d_model)) | dict.fromkeys(PER_BLOCK, (count,))
        for name, shape in (shapes | dict.fromkeys(PER_TWO_BLOCKS, (count, count))).items():
            _check_tensor(name, getattr(self, name), shape)
        _check_normalised(self.write, self.read)
        _check_correlation(self.coherence)

    @property
    def d_model(self) -> int:
        return self.write.shape[-1]

    @property
    def midpoint(self) -> Tensor:
        """(blocks,), the projection on `read` at which neither pole is nearer."""
        return (self.read * self.center).sum(-1)

    @property
    def displacement(self) -> Tensor:
        """(blocks, d_model), `write * scale`: from the middle to the positive pole."""
        return self.write * self.scale[:, None]

    def row(self, block: int) -> int:
        """The row of the tensors that holds `block`. Raises IndexError if the vector does not have it."""
        if block not in self.blocks:
            raise IndexError(f"the vector {self.concept!r} has no block {block}: it holds {list(self.blocks)}")
        return self.blocks.index(block)

    def at(self, *blocks: int) -> ConceptVector:
        """The vector of these blocks alone, which it then recommends."""
        rows = [self.row(b) for b in blocks]
        return self._with_rows(rows, blocks=tuple(blocks), recommended=tuple(blocks))

    def spread(self, block: int) -> ConceptVector:
        """The vector with the directions of one block at every block, as when one direction is ablated everywhere.

        Every block keeps its own `norm`, which is one of activations and not of directions.
        """
        unknown = torch.full_like(self.coherence, math.nan)
        return self._with_rows([self.row(block)] * len(self.blocks), norm=self.norm, coherence=unknown)

    def _with_rows(self, rows: Sequence[int], **changes: Any) -> ConceptVector:
        tensors = {name: getattr(self, name)[list(rows)] for name in TENSORS}
        tensors |= {name: tensors[name][:, list(rows)] for name in PER_TWO_BLOCKS}
        return replace(self, **(tensors | changes))

    # arithmetic, on write * scale

    def __mul__(self, factor: float) -> ConceptVector:
        if not isinstance(factor, Real):  # NumPy's numbers too
            return NotImplemented
        number = float(factor)
        if not math.isfinite(number):
            raise ValueError(f"a concept vector can be multiplied by a finite number, got {factor}")
        sign = math.copysign(1.0, number)
        lengths = {name: getattr(self, name) * abs(number) for name in ("scale", "dose")}  # what alpha = 1 may add
        return replace(self, write=self.write * sign, read=self.read * sign, **lengths)

    __rmul__ = __mul__

    def __neg__(self) -> ConceptVector:
        return self * -1

    def __add__(self, other: ConceptVector) -> ConceptVector:
        """The vector whose displacement is the sum, at the blocks that the first recommends.

        It reads along what it writes, as no pairs say otherwise. Where one of the two cannot be steered along, neither
        can the sum.
        """
        if not isinstance(other, ConceptVector):
            return NotImplemented
        self.check_alike(other)
        return self._moved(
            self.displacement + other.displacement,
            reversed_at=(self.scale < 0) | (other.scale < 0),
            concept=f"{self.concept} + {other.concept}",
            center=(self.center + other.center) / 2,
            norm=(self.norm + other.norm) / 2,
            provenance=_made("sum", [self, other], of=[self.concept, other.concept]),
        )

    def __sub__(self, other: ConceptVector) -> ConceptVector:
        if not isinstance(other, ConceptVector):
            return NotImplemented
        return replace(
            self + (-other),
            concept=f"{self.concept} - {other.concept}",
            provenance=_made("difference", [self, other], of=[self.concept, other.concept]),
        )

    def orthogonal_to(self, *others: ConceptVector) -> ConceptVector:
        """The part of the displacement at right angles to the write directions of `others`, block by block.

        Where nothing but rounding is left, the scale is 0.
        """
        if not others:
            raise ValueError("orthogonal to what? Give at least one concept vector")
        for other in others:
            self.check_alike(other)
        whole = self.displacement.double()[..., None]
        span = torch.stack([o.write.double() for o in others], dim=-1)
        left = (whole - span @ (torch.linalg.pinv(span, rtol=ROUNDING) @ whole))[..., 0]
        left[left.norm(dim=-1) <= ROUNDING * whole.norm(dim=(-2, -1))] = 0
        return self._moved(
            left.float(),
            reversed_at=self.scale < 0,
            concept=f"{self.concept} without {', '.join(o.concept for o in others)}",
            provenance=_made("orthogonal", [self], of=self.concept, to=[o.concept for o in others]),
        )

    @classmethod
    def random(cls, like: ConceptVector, seed: int = 0) -> ConceptVector:
        """A control: seeded directions drawn evenly from the sphere, with the lengths of `like` at every block.

        Its `dose` and `coherence` are those of `like`, so that the same alpha pushes as far; what it costs is its own.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(like.write.shape, generator=generator, dtype=torch.float64)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        displacement = (drawn * like.scale[:, None]).float()
        return like._moved(
            displacement,
            reversed_at=like.scale < 0,
            concept=f"random {seed}",
            dose=like.dose,
            coherence=like.coherence,
            provenance={"made": "random", "seed": seed, "like": like.concept, **_model_of([like])},  # aimed at nothing
        )

    def cost_of(self, blocks: Sequence[int], doses: Tensor) -> float:
        """How many doses it costs to push at several blocks at once, by so many (blocks,) at each, while costs are
        quadratic. NaN where a dose is not known; two blocks add up where their coherence is not."""
        rows = [self.row(block) for block in blocks]
        coherence = self.coherence[rows][:, rows].double().nan_to_num(nan=1.0)
        return float((doses.double() @ coherence @ doses.double()).clamp(min=0).sqrt())

    def lengths_at(self, blocks: Sequence[int]) -> Tensor:
        """(blocks,), how far to push at each of several blocks for all of them to cost one dose, in activation units.

        They are the same part of the way between the poles everywhere, which grows with the depth as the activations
        do. No more than a dose is pushed at any of them, so that where blocks cancel, all cost less than one. NaN where
        a dose is not known.
        """
        rows = [self.row(block) for block in blocks]
        if len(rows) == 1:
            return self.dose[rows]
        way = self.scale[rows].double().abs().clamp(min=torch.finfo(torch.float32).tiny)
        doses = way / self.dose[rows].double()
        return (way / max(self.cost_of(blocks, doses), float(doses.max()))).float()

    @property
    def is_written(self) -> bool | None:
        """Whether adding it at the recommended block moves behaviour items its way, and further than 95% of random
        directions that cost as much; None where that is not known, as of several blocks."""
        known = self.above_random(self.recommended[0]) if len(self.recommended) == 1 else None
        return None if known is None else known >= UNUSUAL

    def above_random(self, block: int) -> float | None:
        """The share of random directions that are less efficient at a block than it is, None where it is not known.

        It is known of a vector that was extracted where its concept has behaviour items, for adding it everywhere.
        """
        return self.provenance.get("above_random", {}).get(str(block))

    def cosine(self, other: ConceptVector) -> Tensor:
        """(blocks,), the cosine of the two write directions at every block."""
        self.check_alike(other)
        return torch.nn.functional.cosine_similarity(self.write.double(), other.write.double(), dim=-1).float()

    def _moved(self, displacement: Tensor, reversed_at: Tensor, **changes: Any) -> ConceptVector:
        """The vector of another displacement, with a negative scale where it cannot be steered along.

        Where the displacement is 0, so is the scale, and the direction stays.
        """
        length = displacement.double().norm(dim=-1) * torch.where(reversed_at, -1, 1)
        write = torch.where(length[:, None] == 0, self.write, displacement / length[:, None]).float()
        unknown = {name: torch.full_like(getattr(self, name), torch.nan) for name in MAY_BE_UNKNOWN}
        return replace(self, write=write, read=write, scale=length.float(), **(unknown | changes))

    def check_alike(self, other: ConceptVector) -> None:
        """Raises ValueError unless both belong to the same blocks and site of models of one width."""
        for name in ("blocks", "d_model", "site", "stack"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"{self.concept!r} and {other.concept!r} do not belong to one model and site: "
                    f"{name} is {mine} and {theirs}"
                )

    def __repr__(self) -> str:
        best = ", ".join(
            f"block {b} (accuracy {self.accuracy[self.row(b)]:.2f}, scale {self.scale[self.row(b)]:.3g})"
            for b in self.recommended
        )
        where = "" if self.site == "block" else f", site {self.site}"
        told = "; read, not written" if self.is_written is False else ""
        return (
            f"ConceptVector({self.concept!r}, {len(self.blocks)} blocks x {self.d_model}{where}; best at {best}{told})"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draws the held-out accuracy of every block on matplotlib axes, and returns them; see `repe.plot.profile`."""
        from repe.plot import profile

        return profile(self, ax)

    def text(self) -> str:
        """A table of the blocks, and what the vector was made of."""
        return str(self._table(range(len(self.blocks))))

    def html(self) -> str:
        """The same for notebooks, which show it of themselves. Of many blocks there are some, and the recommended."""
        count = len(self.blocks)
        spread = torch.linspace(0, count - 1, min(count, ROWS)).round().int().tolist()
        return self._table({*spread, *map(self.row, self.recommended)}).html()

    def _table(self, rows: Iterable[int]) -> display.Table:
        where = "" if self.site == "block" else f", at the site {self.site!r}"
        title = f"{self.concept}: {len(self.blocks)} block{'s' * (len(self.blocks) != 1)} x {self.d_model}{where}"
        shown = [self._cells(row) for row in sorted(rows, key=lambda row: self.blocks[row])]
        made = (f"{key.replace('_', ' ')}: {self.provenance[key]}" for key in TOLD if key in self.provenance)
        return display.table(title, ["block", *SHOWN], shown, ", ".join(made))

    def _cells(self, row: int) -> list[str]:
        block = self.blocks[row]
        numbers = [float(getattr(self, name)[row]) for name in SHOWN]
        mark = " ← recommended" if block in self.recommended else ""
        return [f"{block}{mark}", *("unknown" if math.isnan(number) else f"{number:.3g}" for number in numbers)]

    def _repr_html_(self) -> str:
        return self.html()

    # files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a safetensors file, whole or not at all, and returns its path."""
        # a copy of each, as safetensors refuses tensors that share memory
        tensors = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in TENSORS}
        header = json.dumps(self._header)
        with draft_of(path) as draft:
            draft.write_bytes(save(tensors, metadata={"repe": header, "digest": _digest_of(header, tensors)}))
        return Path(path)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data that `from_json` makes the vector of again."""
        return self._header | {name: tensor_to_json(getattr(self, name)) for name in TENSORS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConceptVector:
        """The vector of what `to_json` gave. Raises ValueError or KeyError for anything else."""
        header = _checked_header(json.dumps({k: v for k, v in data.items() if k not in TENSORS}))
        tensors: dict[str, Any] = {
            name: tensor_from_json(data[name]) for name in TENSORS if name in data or name not in ADDED
        }
        return cls(**header, **tensors)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with anything that steering along the vector depends on."""
        told = hashlib.sha256(repr((self.blocks, self.recommended, self.site, self.stack)).encode())
        for name in STEERED_BY:
            told.update(getattr(self, name).contiguous().numpy().tobytes())
        return told.hexdigest()[:16]

    @property
    def _header(self) -> dict[str, Any]:
        header = {name: getattr(self, name) for name in ("concept", "site", "stack")}
        header |= {"blocks": list(self.blocks), "recommended": list(self.recommended)}
        return header | {"provenance": dict(self.provenance), "format": FORMAT}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConceptVector:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is broken, cut short, or not a concept vector; the text says which.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no vector file at {path}")
        try:
            if is_gguf(path):
                raise ValueError(_of_gguf(Path(path)))
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                header = _checked_header(told.get("repe"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if told.get("digest", "") not in ("", _digest_of(told["repe"], tensors)):
                raise ValueError("its digest is that of other numbers, which were changed since")
            return cls(**header, **{name: tensors[name] for name in TENSORS if name not in ADDED or name in tensors})
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a whole concept vector: {error}. A new one is what `repe.extract` returns: save it at "
                "another path"
            ) from error


def has_digest(path: str | os.PathLike[str]) -> bool:
    """Whether a vector's file says what its numbers are: those of earlier versions do not, and are read as they are."""
    with safe_open(path, framework="pt") as file:
        return bool((file.metadata() or {}).get("digest"))


def _digest_of(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Of all that a vector's file holds."""
    told = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        told.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def _of_gguf(path: Path) -> str:
    kind = Header.of(path).kind
    return f"it is a GGUF {kind}" + (", which `repe.load` loads" if kind == "model" else ", which is not read here")


def tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    """A float32 tensor as plain JSON data."""
    raw = tensor.detach().float().cpu().contiguous().numpy().tobytes()
    return {"shape": list(tensor.shape), "float32": base64.b64encode(raw).decode()}


def tensor_from_json(data: Mapping[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(data["float32"]))
    return torch.frombuffer(raw, dtype=torch.float32).reshape(data["shape"]) if raw else torch.empty(data["shape"])


def _checked_header(text: str | None) -> dict[str, Any]:
    if text is None:
        raise ValueError("it has no `repe` header")
    header = json.loads(text)
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"its format is {found!r}, and this version of the library reads {FORMAT!r}; read it with the version that "
            "wrote it, or with the newest"
        )
    kinds = {"concept": str, "site": str, "stack": str, "blocks": list, "recommended": list, "provenance": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(header.get(name), kind)]:
        raise ValueError(f"its header has missing or mistyped fields: {wrong}")
    if _is_deeper(header["provenance"], DEEPEST):
        raise ValueError(f"its provenance is nested deeper than {DEEPEST} times")
    return {name: header[name] for name in kinds}


def _is_deeper(data: Any, depth: int) -> bool:
    """Whether JSON data are nested deeper than that."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return depth < 0 or any(_is_deeper(part, depth - 1) for part in parts)


def _check_blocks(name: str, numbers: tuple[int, ...]) -> None:
    if not numbers or not all(type(b) is int and b >= 0 for b in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"`{name}` holds at least one block number, none twice, counted from 0; got {list(numbers)}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device.type != "cpu":
        raise ValueError(f"`{name}` is on {tensor.device}, expected the CPU: steering copies it to where it is needed")
    if tensor.dtype != torch.float32:
        raise ValueError(f"`{name}` is {tensor.dtype}, expected torch.float32")
    is_without_spread = (tensor == math.inf) & (name == "separation")
    if not (tensor.isfinite() | (tensor.isnan() & (name in MAY_BE_UNKNOWN)) | is_without_spread).all():
        raise ValueError(f"`{name}` holds values that are not finite")
    if name in ("dose", "norm", "sigma") and (tensor < 0).any():
        raise ValueError(f"`{name}` holds negative lengths")
    if name == "accuracy" and ((tensor < 0) | (tensor > 1)).any():
        raise ValueError("`accuracy` holds numbers that are no shares, between 0 and 1")


def _check_normalised(write: Tensor, read: Tensor) -> None:
    write, read = write.double(), read.double()
    lengths, overlaps = write.norm(dim=-1), (read * write).sum(-1)
    if not ((lengths - 1).abs() <= NORMALISED).all():
        raise ValueError(
            f"`write` has unit norm at every block, got norms {_listed(lengths)}: put the length into `scale`"
        )
    if not ((overlaps - 1).abs() <= NORMALISED + ROUNDING * read.norm(dim=-1)).all():
        raise ValueError(f"`read . write` is 1 at every block, got {_listed(overlaps)}: divide `read` by it")


def _check_correlation(coherence: Tensor) -> None:
    """NaN to NaN, as where it is unknown."""
    known = coherence.nan_to_num(nan=1.0).double()
    is_even = (known - known.T).abs() <= NORMALISED
    if not (is_even & (known.abs() <= 1 + NORMALISED)).all() or ((known.diagonal() - 1).abs() > NORMALISED).any():
        raise ValueError(
            f"`coherence` is no correlation of blocks, whose diagonal is 1, the same both ways and at most 1: "
            f"{[_listed(row) for row in coherence]}"
        )


def _listed(values: Tensor) -> list[float]:
    return [float(f"{v:.4g}") for v in values.tolist()]


def _made(how: str, sources: Sequence[ConceptVector], **of: Any) -> dict[str, Any]:
    """The provenance of what is made of other vectors, whose model it is as far as they agree, and which items
    any of them was aimed at."""
    items = sorted({item for source in sources for item in source.provenance.get(AIMED_AT, ())})
    return {"made": how, **of, **_model_of(sources), **({AIMED_AT: items} if items else {})}


def _model_of(sources: Sequence[ConceptVector]) -> dict[str, Any]:
    """What provenance says of the model, as far as all agree."""
    first, *others = (source.provenance for source in sources)
    return {k: first[k] for k in IDENTITY if k in first and all(k in o and o[k] == first[k] for o in others)}
