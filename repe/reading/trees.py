"""Trees: texts to forwards in which what they begin with alike is computed once, and the check that it came out right.

In a causal model the activation at a token depends only on what stands before it. A tree holds the distinct prefixes
of texts: one row of nodes in depth-first order, with a mask that lets each see its ancestors alone, and its depth for
its position. Models that count columns instead are silently wrong: `repe.models.families` says which are known not to,
and whatever is measured of trees, a `Measurement` compares a few texts with themselves alone, and runs padded rows
where they differ.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from repe.models.blocks import device_of
from repe.models.families import layer_types, obstacle_to_trees, turning_point
from repe.models.tokens import pad

LIMIT = 768
SMALLEST_LIMIT = 256
"""Nodes a tree, at most: see `limit_for`."""
SHARE = 0.9
"""Trees pay where they and their check cost at most this share of what the texts cost."""

WINDOWED = "sliding_attention"

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far what comes of a tree may be from what comes of the text alone, as a share of its size, by dtype."""

Result = TypeVar("Result")
Part = TypeVar("Part")
Fits = Callable[[int, int], bool]
"""Whether one forward has room for so many rows and columns."""


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

    def cost(self, d_model: int) -> float:
        """What it costs, in tokens of padded rows: all of its nodes look at all of them.

        Attention grows with the nodes that stand in the row, and the rest of a block with d_model: as an estimate, a
        node costs 1 + nodes / (6 d_model) tokens of short rows.
        """
        return len(self) * (1 + len(self) / (6 * d_model))


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


def limit_for(d_model: int) -> int:
    """How many nodes a tree may have so that each costs a quarter more than a token, where that leaves it any size."""
    return min(LIMIT, max(SMALLEST_LIMIT, 3 * d_model // 2))


def pays(batches: Sequence[Batch], rows: Sequence[Sequence[int]], d_model: int) -> bool:
    """Whether running batches of trees, and their witnesses alone, is clearly quicker than running the texts."""
    trees = sum(tree.cost(d_model) for batch in batches for tree in batch.trees)
    checked = sum(len(rows[text]) for batch in _ends(batches) for text in witnesses(batch))
    return trees + checked <= SHARE * sum(map(len, rows))


# trees and rows -> forwards


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward holds: the tokens of `texts[k]`, in order, stand in the columns `slots[k]` of its row `rows[k]`.

    It has `height` rows and `width` columns. `inputs()` makes what the model is called with, a batch at a time: masks
    are large. `trees` are those that stand in its rows; none where every text has a row of its own.
    """

    texts: Sequence[int]
    rows: Sequence[int]
    slots: Sequence[Tensor]
    height: int
    width: int
    inputs: Callable[[], dict[str, Any]]
    trees: Sequence[Tree] = ()


def in_trees(trees: Sequence[Tree], module: nn.Module, fits: Fits) -> list[Batch]:
    """Batches with a tree in every row, from the narrow to the wide."""
    return [_of_trees(chosen, module) for chosen in _together(sorted(trees, key=len), len, fits)]


def _of_trees(trees: Sequence[Tree], module: nn.Module) -> Batch:
    return Batch(
        [text for tree in trees for text in tree.texts],
        [row for row, tree in enumerate(trees) for _ in tree.texts],
        [path for tree in trees for path in tree.paths],
        len(trees),
        max(map(len, trees)),
        lambda: inputs(trees, dtype_of(module), device_of(module), getattr(module, "config", None)),
        trees,
    )


def in_rows(
    rows: Sequence[Sequence[int]],
    texts: Iterable[int],
    module: nn.Module,
    fits: Fits,
    beside: Sequence[Hashable] | None = None,
) -> list[Batch]:
    """Batches with texts in padded rows, from the short to the long.

    Texts share a row that are the same, and of which the same stands `beside`. Those that would be rotated otherwise
    beside a longer one stay among those of their own length.
    """
    alike: dict[Hashable, list[int]] = {}
    for text in texts:
        alike.setdefault((tuple(rows[text]), beside and beside[text]), []).append(text)
    turn = turning_point(getattr(module, "config", None)) or max(map(len, rows))
    order = sorted(alike.values(), key=lambda same: len(rows[same[0]]))
    return [
        _of_rows(rows, chosen, module)
        for _, group in groupby(order, lambda same: max(turn, len(rows[same[0]])))
        for chosen in _together(group, lambda same: len(rows[same[0]]), fits)
    ]


def _of_rows(rows: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]], module: nn.Module) -> Batch:
    texts = [text for same in chosen for text in same]
    return Batch(
        texts,
        [row for row, same in enumerate(chosen) for _ in same],
        [torch.arange(len(rows[text])) for text in texts],
        len(chosen),
        max(len(rows[text]) for text in texts),
        lambda: pad([rows[same[0]] for same in chosen], device=device_of(module)),
    )


def _together(parts: Iterable[Part], width: Callable[[Part], int], fits: Fits) -> Iterator[list[Part]]:
    """Parts of ascending width, as many together as there is room for, one at least."""
    chosen: list[Part] = []
    for part in parts:
        if chosen and not fits(len(chosen) + 1, width(part)):
            yield chosen
            chosen = []
        chosen.append(part)
    if chosen:
        yield chosen


# running, and whether it came out right


class Measurement(ABC, Generic[Result]):
    """Something to be measured of `rows`, the token ids of texts, on `module`, which takes them: one result a text.

    The numbers that are compared count for `smallest` at least.
    """

    module: nn.Module
    rows: Sequence[Sequence[int]]
    smallest = 0.0

    @abstractmethod
    def measured(self, batch: Batch) -> Sequence[Result]:
        """Runs a batch."""

    @abstractmethod
    def compared(self, result: Result) -> Tensor:
        """(..., numbers), what of a result shows whether trees came out right."""

    def alone(self, batch: Batch) -> Sequence[Tensor]:
        """What is compared, of the texts of a batch of rows."""
        return [self.compared(result) for result in self.measured(batch)]

    @abstractmethod
    def in_rows(self, texts: Iterable[int]) -> Sequence[Batch]:
        """Batches of some of the texts."""

    def run(self, trees: Sequence[Batch], must: bool = False) -> Iterator[tuple[Batch, Sequence[Result]]]:
        """The results of all texts, batch by batch: of these trees that hold them; of rows where there are none.

        Nothing of a tree is given out before the narrowest and the widest batch were checked.

        Raises:
            RuntimeError: trees came out wrong, and `must`.

        Warns:
            UserWarning: trees came out wrong; what was not given out yet is run in rows.
        """
        left = dict.fromkeys(range(len(self.rows)))
        try:
            for batch, results in self._checked(trees):
                yield batch, results
                for text in batch.texts:
                    del left[text]
        except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError):
            raise  # of a file, a strength or the machine: rows would not change that
        except Exception as error:
            wrong = (
                f"{type(self.module).__name__} does not give texts in trees of shared prefixes what it gives them "
                f"alone ({type(error).__name__}: {error})"
            )
            if must:
                raise RuntimeError(f"packed=True: {wrong}") from error
            warnings.warn(f"{wrong}. They are run in padded rows instead", stacklevel=3)
        for batch in self.in_rows(left):
            yield batch, self.measured(batch)

    def _checked(self, trees: Sequence[Batch]) -> Iterator[tuple[Batch, Sequence[Result]]]:
        ends = [(batch, self.measured(batch)) for batch in _ends(trees)]
        for batch, results in ends:
            self._check({text: results[place] for text, place in witnesses(batch).items()})
        yield from ends
        for batch in trees[-2:0:-1]:  # from the wide on: what does not fit into the memory is known soon
            yield batch, self.measured(batch)

    def _check(self, results: Mapping[int, Result]) -> None:
        """Raises RuntimeError where results are not those of the texts alone."""
        for batch in self.in_rows(results):
            for text, plain in zip(batch.texts, self.alone(batch), strict=True):
                found = self.compared(results[text])
                if wrong := disagreement(found, plain, dtype_of(self.module), self.smallest):
                    raise RuntimeError(wrong)


def _ends(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The narrowest and the widest."""
    return [*batches[:1], *batches[1:][-1:]]


def witnesses(batch: Batch) -> dict[int, int]:
    """The texts of a batch to compare with themselves alone, and their places: the longest, and the last.

    What counts columns goes wrong most where most nodes stand before, and a window where most tokens do.
    """
    places = range(len(batch.texts))
    longest = max(places, key=lambda place: (len(batch.slots[place]), place))
    return {batch.texts[place]: place for place in (longest, places[-1])}


def disagreement(found: Tensor, plain: Tensor, dtype: torch.dtype, smallest: float = 0.0) -> str:
    """How far (..., numbers) from a tree are from those of the texts alone, if too far for `dtype`, or "".

    They are measured by the size of the latter, `smallest` at least. What is not finite agrees with its like.
    """
    found, plain = found.double(), plain.double()
    alike = (found == plain) | (found.isnan() & plain.isnan())
    size = plain.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).clamp_min(max(smallest, torch.finfo(torch.float32).tiny))
    worst = float((torch.where(alike, 0.0, found - plain).norm(dim=-1) / size).max())
    allowed = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    return "" if worst <= allowed else f"they differ by {worst:.2g} of their size, where rounding explains {allowed}"
