"""Prefixes: texts to the trees of their distinct prefixes, and what a model needs to run a tree.

In a causal model the activation at a token depends only on what stands before it: what several texts begin with is
computed once. A tree is one row of nodes in depth-first order; a mask lets each see its ancestors alone, and its place
in the text is its depth. Models that count columns instead are silently wrong: `repe.models.families` says which are
known not to, and `disagreement` compares what came of a tree with what comes of a text alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repe.models.families import layer_types, obstacle_to_trees

LIMIT = 768
SMALLEST_LIMIT = 256
"""Nodes a tree, at most: see `limit_for`."""
SHARE = 0.9
"""Trees pay where they and their check cost at most this share of what the texts cost."""

WINDOWED = "sliding_attention"

TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.1}
TOLERANCE = 1e-3
"""How far a packed activation may be from the plain one, as a share of its norm, in float32."""


@dataclass(frozen=True, eq=False)
class Tree:
    """The distinct prefixes of some texts, depth first.

    `tokens` (nodes,) are token ids, `depth` (nodes,) how many tokens stand before each in its text, and `end` (nodes,)
    is one past the last node of the subtree. `texts` are the numbers of the texts, and `paths` has for every one of
    them the nodes of its tokens, in order.
    """

    tokens: Tensor
    depth: Tensor
    end: Tensor
    texts: tuple[int, ...]
    paths: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.tokens)


# texts -> trees


def plant(
    rows: Sequence[Sequence[int]], limit: int = LIMIT, marks: Sequence[Sequence[Hashable]] | None = None
) -> list[Tree]:
    """Trees that hold every text once; texts that are equal share all of their nodes.

    Args:
        rows: the token ids of texts.
        limit: nodes a tree. A text that is longer has a tree to itself.
        marks: something about every token. Tokens are shared only where all marks up to them are the same too.

    Raises:
        ValueError: a text has no tokens, or not one mark a token.
    """
    if not all(map(len, rows)):
        raise ValueError("a text of no tokens has no place in a tree: give texts of at least one token")
    words = [tuple(row) for row in rows] if marks is None else _marked(rows, marks)
    trees, tree = [], _Growing()
    for text in sorted(range(len(rows)), key=words.__getitem__):
        shared = tree.shared(words[text])
        new = len(words[text]) - shared
        if tree.texts and new and len(tree.tokens) + new > limit:
            trees.append(tree.grown())
            tree, shared = _Growing(), 0
        tree.add(text, words[text], rows[text], shared)
    return [*trees, tree.grown()] if tree.texts else trees


def _marked(rows: Sequence[Sequence[int]], marks: Sequence[Sequence[Hashable]]) -> list[tuple[int, ...]]:
    """A number for every pair of a token and its mark: marks need not have an order, and numbers are quickly sorted."""
    numbers: dict[Hashable, int] = {}
    for mark in chain.from_iterable(marks):
        numbers.setdefault(mark, len(numbers))
    return [
        tuple(token * len(numbers) + numbers[mark] for token, mark in zip(row, beside, strict=True))
        for row, beside in zip(rows, marks, strict=True)
    ]


class _Growing:
    """A tree that texts are added to in sorted order: what one shares with any before it, it shares with the latest."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depth: list[int] = []
        self.end: list[int] = []
        self.texts: list[int] = []
        self.paths: list[list[int]] = []
        self.latest: tuple[int, ...] = ()

    def shared(self, word: tuple[int, ...]) -> int:
        """How many tokens a text has in common with the latest."""
        length = min(len(word), len(self.latest))
        if word[:length] == self.latest[:length]:
            return length
        return next(i for i, (one, other) in enumerate(zip(word, self.latest, strict=False)) if one != other)

    def add(self, text: int, word: tuple[int, ...], row: Sequence[int], shared: int) -> None:
        first = len(self.tokens)
        self._close(shared)
        self.tokens += row[shared:]
        self.depth += range(shared, len(row))
        self.end += [0] * (len(row) - shared)
        self.paths.append([*self._path[:shared], *range(first, len(self.tokens))])
        self.texts.append(text)
        self.latest = word

    def grown(self) -> Tree:
        self._close(0)
        nodes = torch.tensor([node for path in self.paths for node in path])
        return Tree(
            torch.tensor(self.tokens),
            torch.tensor(self.depth),
            torch.tensor(self.end),
            tuple(self.texts),
            nodes.split([len(path) for path in self.paths]),
        )

    @property
    def _path(self) -> list[int]:
        return self.paths[-1] if self.paths else []

    def _close(self, depth: int) -> None:
        """No text to come goes through the latest path's nodes from this depth on."""
        for node in self._path[depth:]:
            self.end[node] = len(self.tokens)


# trees -> what a model is called with


def inputs(trees: Sequence[Tree], dtype: torch.dtype, device: Any = None, config: Any = None) -> dict[str, Any]:
    """Trees as the rows of a batch, filled up on the right with a token 0 that sees itself alone.

    Args:
        trees: one a row; a tree may stand in several rows.
        dtype: of the mask. It must be the one that the model computes in: `dtype_of`.
        device: where the tensors go.
        config: the model's. Its sliding windows count depth, not nodes.

    Returns:
        `input_ids` and `position_ids` (trees, nodes), and `attention_mask` (trees, 1, nodes, nodes), which is added to
        the scores; or a mask for every type of layer, by name, where only some have a window.
    """
    ids, depth, end = (_filled([getattr(tree, name) for tree in trees], device) for name in ("tokens", "depth", "end"))
    nodes = torch.arange(ids.shape[1], device=device)
    filler = nodes >= torch.tensor([len(tree) for tree in trees], device=device)[:, None]
    end = torch.where(filler, nodes + 1, end)
    visible = (nodes <= nodes[:, None]) & (nodes[:, None] < end[:, None, :])
    masks = {name: _added(seen, dtype) for name, seen in _windowed(visible, depth, config)}
    return {"input_ids": ids, "position_ids": depth, "attention_mask": masks.get("", masks)}


def _filled(rows: Sequence[Tensor], device: Any) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(trees, 1, nodes, nodes): 0 where something is seen, and as low as can be elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _windowed(visible: Tensor, depth: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """What is seen in every type of layer; a name of "" stands for all of them."""
    window, types = getattr(config, "sliding_window", None), layer_types(config)
    if not window or (types and WINDOWED not in types):
        return [("", visible)]
    near = visible & (depth[:, :, None] - depth[:, None, :] < window)
    return [("full_attention", visible), (WINDOWED, near)] if types else [("", near)]


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: the dtype of its weights, unless autocast says otherwise."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    kind = "cpu" if weight.device.type == "meta" else weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


# which models, which texts


def obstacle(module: nn.Module) -> str:
    """Why a stack cannot be run on trees, as the end of a sentence, or "" if it can.

    `module` is the one that takes the stack's `input_ids`. What is attached to it stands in the way too: it was written
    for rows of text.
    """
    if any(getattr(part, "is_causal", True) is False for part in module.modules()):
        return "its attention is not causal, so that a token depends on those behind it"
    if why_not := obstacle_to_trees(getattr(module, "config", None)):
        return why_not
    if any(is_compiled(part) for part in module.modules()):
        return "a part of it is compiled, and would be compiled anew for trees"
    if any(attached(part) for part in module.modules()):
        return "something is attached to it (steering, or a hook) that expects rows of text: remove it first"
    return ""


def is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


def attached(module: nn.Module) -> list[Any]:
    """The hooks on a module, apart from those of `transformers`, which only keep what is asked for."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]


def cost_of(tree: Tree, d_model: int) -> float:
    """What a tree costs, in tokens of padded rows: all of its nodes look at all of them.

    Attention grows with the nodes that stand in the row, and the rest of a block with d_model: as an estimate, a node
    costs 1 + nodes / (6 d_model) tokens of short rows.
    """
    return len(tree) * (1 + len(tree) / (6 * d_model))


def limit_for(d_model: int) -> int:
    """How many nodes a tree may have so that each costs a quarter more than a token, where that leaves it any size."""
    return min(LIMIT, max(SMALLEST_LIMIT, 3 * d_model // 2))


def pays(trees: Sequence[Tree], rows: Sequence[Sequence[int]], d_model: int) -> bool:
    """Whether running the trees, and their witnesses alone, is clearly quicker than running the texts."""
    checked = sum(len(rows[text]) for text in witnesses(trees))
    return sum(cost_of(tree, d_model) for tree in trees) + checked <= SHARE * sum(map(len, rows))


# whether it came out right


def witnesses(trees: Sequence[Tree]) -> list[int]:
    """The texts to compare with themselves alone: the last of every tree, and the longest of all.

    What counts columns goes wrong most where most nodes stand before, and a window where most tokens do.
    """
    longest = max((len(path), text) for tree in trees for text, path in zip(tree.texts, tree.paths, strict=True))[1]
    return list(dict.fromkeys([*(tree.texts[-1] for tree in trees), longest]))


def disagreement(packed: Tensor, plain: Tensor, dtype: torch.dtype) -> str:
    """How far vectors (..., d_model) from a tree are from those of the texts alone, if too far for `dtype`, or ""."""
    distance = (packed.float() - plain.float()).norm(dim=-1)
    worst = float((distance / plain.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)).max())
    allowed = TOLERANCES.get(dtype, TOLERANCE)
    return (
        "" if worst <= allowed else f"they differ by {worst:.2g} of their norm, and {allowed} is what rounding explains"
    )
