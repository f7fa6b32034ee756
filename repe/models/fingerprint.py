"""A model's fingerprint: which architecture, and which weights, as far as a vector of activations depends on them.

The weights are sampled, not hashed, so that a model loaded in bfloat16 is recognised as the one that was read in
float32, and one whose weights were trained further is not. Quantisation leaves only embedding, norms and biases to be
compared, and offloading of all weights nothing: then less is told apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # what other libraries' wrappers put into names
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MATRICES, SCALES, VALUES = 15, 4, 16  # how many tensors are sampled besides the embedding, and how often each
LEAST = 2  # tensors to compare
TOLERANCE = 2.0**-7  # relative: twice the rounding of bfloat16
SMALLEST = 2.0**-24  # of the numbers of float16
AGREEING = 0.98

Fingerprint = dict[str, Any]


def fingerprint(model: nn.Module) -> Fingerprint:
    """`{"key": str, "sketch": {tensor's name: values}}`, plain JSON data.

    The key names the architecture and its sizes, fit for a file name. The sketch holds 16 values each of the embedding,
    4 norms or biases and 15 matrices, drawn by their names; quantised and offloaded ones are left out.
    """
    config = next((m.config for m in model.modules() if hasattr(getattr(m, "config", None), "model_type")), None)
    sizes = {name: getattr(config, name, None) for name in SHAPE}
    kind = sizes["model_type"] or type(model).__name__.lower()
    key = f"{kind}-{sizes['hidden_size']}x{sizes['num_hidden_layers']}-{digest(sizes)}"
    return {"key": key, "sketch": _sketch(model)}


def digest(data: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for plain JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


def agrees(one: Any, other: Any) -> bool:
    """Whether two fingerprints are of the same weights, in whatever dtypes. What is no fingerprint agrees with none.

    They are compared on the tensors that both sampled. Two that could sample none agree if their keys do.
    """
    if not (_is_fingerprint(one) and _is_fingerprint(other)) or one.get("key") != other.get("key"):
        return False
    mine, theirs = one["sketch"], other["sketch"]
    shared = [name for name in mine if name in theirs and len(mine[name]) == len(theirs[name])]
    if len(shared) < min(LEAST, max(len(mine), len(theirs))):
        return False
    pairs = [pair for name in shared for pair in zip(mine[name], theirs[name], strict=True)]
    return sum(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=SMALLEST) for a, b in pairs) >= AGREEING * len(pairs)


def _is_fingerprint(data: Any) -> bool:
    """Whether data from a file, which anyone may have written, have the form of a fingerprint."""
    sketch = data.get("sketch") if isinstance(data, Mapping) else None
    return isinstance(sketch, Mapping) and all(
        isinstance(values, list) and all(isinstance(v, float | int) for v in values) for values in sketch.values()
    )


def _sketch(model: nn.Module) -> dict[str, list[float]]:
    return {name: _sample(p) for name, p in _chosen(model).items() if _is_usable(p)}


def _chosen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to sample, by name: the same in every dtype, and however the model is quantised or offloaded.

    They are drawn by a hash of their names, for an even spacing would always hit the same part of a block.
    """
    named = sorted(((_unwrapped(name), p) for name, p in model.named_parameters()), key=lambda pair: _drawn(pair[0]))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings = sorted((pair for pair in named if id(pair[1]) in tables), key=lambda pair: -pair[1].numel())
    scales = [(name, p) for name, p in named if p.ndim == 1]
    matrices = [(name, p) for name, p in named if p.ndim > 1 and id(p) not in tables]
    return dict((*embeddings[:1], *scales[:SCALES], *matrices[:MATRICES]))


def _drawn(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _is_usable(p: nn.Parameter) -> bool:
    return p.is_floating_point() and p.device.type != "meta" and p.element_size() > 1


def _sample(parameter: Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    picked = flat[torch.tensor(_spread(flat.numel(), VALUES), device=flat.device)]
    return [float(f"{v:.6g}") for v in picked.float().tolist()]


def _spread(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly spread over `length`."""
    return sorted({(2 * i + 1) * length // (2 * count) for i in range(count)}) if length else []


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
