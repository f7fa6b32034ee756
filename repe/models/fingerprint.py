"""A model's fingerprint: which architecture, and which weights, as far as a vector of activations depends on them.

The weights are sampled, not hashed: a model is the same in another precision, quantised, loaded without its head, with
a resized vocabulary, or partly offloaded. So what is sampled are the weights below the head, by their names there.

How far two samples may lie apart follows from the coarser one. A number of a float type is off by its rounding. The
numbers of a quantised matrix repeat each other, the more the fewer bits they have, and the error grows with that: 8
bits are off by half a percent, 4 by 8, 2 by 30. Norms and biases are not quantised. So weights that were trained
further are told apart, unless by less than the rounding of the coarser one, and by nothing in norms and biases.

Adapters are small, and nobody keeps them in fewer bits: every tensor of those that act is sampled, at the strength at
which it acts, and none may differ by more than rounding.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

KEPT = ("base_layer", "original_module")  # where a module of an adapter has what it wraps
WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "token_adapter",
    *KEPT,
)  # what other libraries' wrappers put into names
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
PARTS = ("scales", "matrices", "adapter")
MATRICES, SCALES, VALUES = 15, 4, 16  # how many tensors of each kind are sampled, and how many values in a row
FEW = 4  # values in a row of a tensor of an adapter
LEAST = 2  # tensors to compare
BLOCK = 32  # values beside each other that are quantised together
COARSENESS = 0.5  # the error of a quantised matrix, relative to the share of its values that repeat others
EXACT = 2.0**-17  # relative: what is lost of a number that is kept with six digits
ROUNDED = (torch.bfloat16, torch.float16)
SMALLEST = 2.0**-24  # of the numbers of float16

Fingerprint = dict[str, Any]
Runs = list[list[float]]
Sample = Mapping[str, Runs]


def fingerprint(model: nn.Module) -> Fingerprint:
    """`{"key": str, "sketch": {part: {tensor's name: runs of values}}}`, plain JSON data.

    The key names the architecture and its sizes, fit for a file name. The parts of the sketch are "scales", which are 4
    norms or biases, "matrices", which are the embedding and 15 others, both drawn by their names, and "adapter",
    which are all tensors of the adapters of PEFT that act now. Quantised ones are left out.
    """
    config = next((m.config for m in model.modules() if hasattr(getattr(m, "config", None), "model_type")), None)
    sizes = {name: getattr(config, name, None) for name in SHAPE}
    kind = sizes["model_type"] or type(model).__name__.lower()
    key = f"{kind}-{sizes['hidden_size']}x{sizes['num_hidden_layers']}-{digest(sizes)}"
    return {"key": key, "sketch": _sketch(model)}


def digest(data: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for plain JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


# comparing


def agrees(one: Any, other: Any) -> bool:
    """Whether two fingerprints are of the same weights, in whatever precision. What is no fingerprint agrees with none.

    They are compared on the tensors that both sampled. Two that could sample none agree if their keys do.
    """
    if not _are_comparable(one, other):
        return False
    mine, theirs = one["sketch"], other["sketch"]
    return all(_distance(mine, theirs, part) <= _tolerance(mine, theirs, part) for part in PARTS)


def nearness(one: Any, other: Any) -> float:
    """How near the weights of two fingerprints are: 1 for equal ones, 0 for those that have nothing in common.

    It is 1 less the relative distance of the part that is farthest off. Rounding to bfloat16 leaves .998, quantisation
    .995 in 8 bits and .92 in 4.

    Example:
        >>> from repe.models.fingerprint import fingerprint, nearness
        >>> nearness(fingerprint(model), fingerprint(model))
        1.0
    """
    if not _are_comparable(one, other):
        return 0.0
    return 1.0 - max(_distance(one["sketch"], other["sketch"], part) for part in PARTS)


def strangeness(theirs: Any, mine: Fingerprint) -> str:
    """What the weights of a fingerprint that does not agree are, seen from another one."""
    if not is_fingerprint(theirs):
        return "weights that cannot be compared with these, as another version of the library described them"
    return f"other weights, {nearness(theirs, mine):.3f} near to these, where 1 is the same"


def _are_comparable(one: Any, other: Any) -> bool:
    """Whether both are fingerprints, of one architecture, and have sampled enough of the same tensors."""
    if not (is_fingerprint(one) and is_fingerprint(other)) or one["key"] != other["key"]:
        return False
    mine, theirs = one["sketch"], other["sketch"]
    counts = [sum(len(sketch[part]) for part in ("scales", "matrices")) for sketch in (mine, theirs)]
    shared = sum(len(_shared(mine, theirs, part)) for part in ("scales", "matrices"))
    return shared >= min(LEAST, max(counts))


def is_fingerprint(data: Any) -> bool:
    """Whether data from a file, which anyone may have written, have the form of a fingerprint."""
    sketch = data.get("sketch") if isinstance(data, Mapping) and "key" in data else None
    return isinstance(sketch, Mapping) and all(_is_sample(sketch.get(part)) for part in PARTS)


def _is_sample(data: Any) -> bool:
    return isinstance(data, Mapping) and all(
        isinstance(runs, list)
        and all(isinstance(run, list) and all(isinstance(v, float | int) for v in run) for run in runs)
        for runs in data.values()
    )


def _shared(mine: Mapping[str, Sample], theirs: Mapping[str, Sample], part: str) -> list[tuple[Runs, Runs]]:
    """The runs of the tensors that both have in the same sizes."""
    pairs = [(mine[part][name], theirs[part][name]) for name in mine[part] if name in theirs[part]]
    return [(a, b) for a, b in pairs if [*map(len, a)] == [*map(len, b)]]


def _distance(mine: Mapping[str, Sample], theirs: Mapping[str, Sample], part: str) -> float:
    """The mean relative distance of the tensors of a part, of an adapter the largest: 0 if none is to be compared.

    A tensor of an adapter that only one of them has is as far off as can be.
    """
    pairs = _shared(mine, theirs, part)
    apart = [_apart(a, b) for a, b in pairs]
    if part == "adapter":
        return max([float(len(pairs) < len({*mine[part], *theirs[part]})), *apart])
    return sum(apart) / max(len(apart), 1)


def _apart(one: Runs, other: Runs) -> float:
    """How far apart two samples are, relative to the larger, and at most 1."""
    a, b = (torch.tensor([v for run in runs for v in run], dtype=torch.float64) for runs in (one, other))
    differences = (a - b)[(a - b).abs() > SMALLEST] if bool((a - b).isfinite().all()) else torch.tensor([torch.inf])
    if not differences.numel():
        return 0.0
    return min(1.0, float(differences.norm() / max(a.norm(), b.norm())))


def _tolerance(mine: Mapping[str, Sample], theirs: Mapping[str, Sample], part: str) -> float:
    """The distance that the coarser of two samples of the same weights explains."""
    return max(
        max(_rounding(sample), COARSENESS * _repetition(sample) if part == "matrices" else 0.0)
        for sample in (mine[part], theirs[part])
    )


def _rounding(sample: Sample) -> float:
    """Twice the relative rounding of the coarsest type that holds the values as they are."""
    values = torch.tensor([v for runs in sample.values() for run in runs for v in run], dtype=torch.float64)
    for dtype in ROUNDED:
        if torch.allclose(values.to(dtype).double(), values, rtol=EXACT, atol=0.0):
            return torch.finfo(dtype).eps
    return EXACT


def _repetition(sample: Sample) -> float:
    """The share of values that repeat another of their run: along rows or along columns, whichever repeat more."""
    by_direction = [[run for run in runs if len(set(run)) > 1] for runs in _transposed(sample.values())]
    return max(
        (1 - _total(set(run) for run in runs) / max(_total(runs), 1) for runs in by_direction if runs), default=0.0
    )


def _transposed(samples: Collection[Runs]) -> list[Runs]:
    """The runs of all tensors along rows, and those along columns."""
    return [[runs[i] for runs in samples if len(runs) > i] for i in range(max(map(len, samples), default=0))]


def _total(collections: Iterable[Collection[float]]) -> int:
    return sum(map(len, collections))


# sampling


def _sketch(model: nn.Module) -> dict[str, dict[str, Runs]]:
    trunk, stored = _trunk(model), _offloaded(model)
    own = {id(p): (name, p) for name, p in reversed([*_own(trunk)])}  # by the first of its names
    table, head = _table(trunk, own), _head(trunk)
    named = [(name, p) for name, p in own.values() if p is not head or p is table]
    tables = {id(m.weight) for m in trunk.modules() if isinstance(m, nn.Embedding)}
    scales = [(name, p) for name, p in named if p.ndim == 1]
    matrices = [(name, p) for name, p in named if p.ndim > 1 and id(p) not in tables]
    found = {
        "scales": [(name, _runs(stored(p))) for name, p in _drawn(scales, SCALES)],
        "matrices": [
            *((name, _runs(stored(p), row=BLOCK)) for name, p in named if p is table),
            *((name, _runs(stored(p))) for name, p in _drawn(matrices, MATRICES)),
        ],
        "adapter": [
            (name, _runs(stored(p), FEW, strength=strength))
            for name, p, strength in [*_adapters(trunk, own), *_prompts(model)]
        ],
    }
    return {part: {name: runs for name, runs in tensors if runs} for part, tensors in found.items()}


def _offloaded(model: nn.Module) -> Callable[[nn.Parameter], Tensor]:
    """What brings a parameter from where accelerate keeps it; others are there."""
    kept: dict[int, tuple[Mapping[str, Tensor], str]] = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if weights := getattr(each, "weights_map", None):
                kept |= {id(p): (weights, name) for name, p in module.named_parameters()}

    def stored(p: nn.Parameter) -> Tensor:
        if p.device.type != "meta" or id(p) not in kept:
            return p
        weights, name = kept[id(p)]
        return weights.get(name, p)

    return stored


def _trunk(model: nn.Module) -> nn.Module:
    """The model below its head and what is wrapped around it, whose names are the same in every class of it."""
    from transformers import PreTrainedModel

    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    return model if inner is None else inner.base_model


def _table(trunk: nn.Module, own: Collection[int]) -> Tensor | None:
    """The embedding of tokens: the one that the model names, if it is its own, else the largest."""
    tables = [m.weight for m in trunk.modules() if isinstance(m, nn.Embedding) and id(m.weight) in own]
    named = _weight_named(trunk, "get_input_embeddings")
    return named if id(named) in own else max(tables, key=Tensor.numel, default=None)


def _head(trunk: nn.Module) -> Tensor | None:
    """The matrix of the head, of a model that is not apart from it."""
    return _weight_named(trunk, "get_output_embeddings")


def _weight_named(trunk: nn.Module, getter: str) -> Tensor | None:
    """What a model of `transformers` names as its embedding or head, if it does."""
    try:
        return getattr(getattr(trunk, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def _own(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """A model's own parameters, without those of adapters, by the names they have without any wrapper."""
    if kept := _kept(module):
        yield from _own(getattr(module, kept), prefix)
        return
    yield from ((prefix + name, p) for name, p in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        yield from _own(child, prefix if name in WRAPPERS else f"{prefix}{name}.")


def _kept(module: nn.Module) -> str:
    """The name of the module that PEFT has put an adapter around with this one; "" where it is none of these."""
    if hasattr(module, "adaption_prompt"):
        return "model"
    return next((name for name, _ in module.named_children() if name in KEPT), "")


def _adapters(trunk: nn.Module, own: Collection[int]) -> Iterator[tuple[str, nn.Parameter, float]]:
    """The parameters of the adapters that act now, and how strongly, by their place and not by the adapter's name."""
    for path, module in trunk.named_modules():
        if _kept(module):
            place = ".".join(part for part in path.split(".") if part not in WRAPPERS)
            for number, name, p, strength in _acting(module, own):
                yield f"{number}.{place}.{name}", p, strength


def _acting(module: nn.Module, own: Collection[int]) -> Iterator[tuple[str, str, nn.Parameter, float]]:
    """Of one module: which of its adapters a parameter belongs to, its name, the parameter, and its strength.

    An adapter that is merged into the weights acts, too; where it is off, its next forward takes it out of them.
    """
    merged, is_off = list(getattr(module, "merged_adapters", ())), getattr(module, "disable_adapters", False)
    acting = merged or ([] if is_off else list(getattr(module, "active_adapters", ())))
    scaling = getattr(module, "scaling", None)
    by_adapter = [f"{name}." for name, m in module.named_modules() if isinstance(m, nn.ModuleDict | nn.ParameterDict)]
    for name, p in module.named_parameters():
        holder = next((prefix for prefix in by_adapter if name.startswith(prefix)), "")
        adapter, _, rest = name.removeprefix(holder).partition(".")
        if id(p) in own or (holder and adapter not in acting):
            continue
        strength = scaling.get(adapter, 1.0) if isinstance(scaling, Mapping) and holder else 1.0
        number = f"{acting.index(adapter)}{'-' * is_off}" if holder else ""
        yield number, f"{holder}{rest}" if holder else name, p, float(strength)


def _prompts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, float]]:
    """The parameters of the prompt that PEFT has learned, where one acts now."""
    for module in model.modules():
        prompts = getattr(module, "prompt_encoder", None)
        if isinstance(prompts, nn.ModuleDict) and not getattr(module, "_adapters_disabled", False):
            yield from ((name, p, 1.0) for name, p in prompts[str(module.active_adapter)].named_parameters())


def _drawn(named: Iterable[tuple[str, nn.Parameter]], count: int) -> list[tuple[str, nn.Parameter]]:
    """Some of the parameters, the same in every precision, and however the model is quantised or offloaded.

    Of every kind, which is a name without numbers, comes one in turn. Which one goes by a hash of the names, for an
    even spacing would always hit the same part of a stack.
    """
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in sorted(named, key=lambda pair: hashlib.sha256(pair[0].encode()).hexdigest()):
        kinds.setdefault(re.sub(r"\d+", "", name), []).append((name, p))
    in_turn = (pair for turn in zip_longest(*kinds.values()) for pair in turn if pair is not None)
    return [*islice(in_turn, count)]


def _is_usable(p: Tensor) -> bool:
    return p.is_floating_point() and p.device.type != "meta" and p.element_size() > 1


def _runs(parameter: Tensor, count: int = VALUES, row: int | None = None, strength: float = 1.0) -> Runs:
    """Values spread over a vector; of a matrix one run along a row and one along a column, from its middle. None of
    what is quantised, or nowhere.

    Both begin where blocks of quantised values do. `row` is where they begin if the matrix has as many rows.
    """
    if not _is_usable(parameter):
        return []
    tensor = parameter.detach() * strength if strength != 1 else parameter.detach()
    if tensor.ndim < 2:
        flat = tensor.reshape(-1)
        return [_values(flat[torch.tensor(_spread(flat.numel(), count), dtype=torch.long, device=flat.device)])]
    matrix = tensor.reshape(-1, tensor.shape[-1])
    top, left = (size // 2 // BLOCK * BLOCK for size in matrix.shape)
    if row is not None:
        top = row if len(matrix) >= row + count else 0
    return [_values(matrix[top, left : left + count]), _values(matrix[top : top + count, left])]


def _values(tensor: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in tensor.float().tolist()]


def _spread(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly spread over `length`."""
    return sorted({(2 * i + 1) * length // (2 * count) for i in range(count)}) if length else []
