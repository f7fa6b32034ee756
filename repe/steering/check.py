"""Checking a model: what the library believes of its architecture, tried on random tokens and a random direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repe.display import table
from repe.models.blocks import Stack, device_of, find_stack
from repe.models.families import CLOSING
from repe.models.finite import check_finite
from repe.reading.capture import evaluating, recording
from repe.reading.trees import disagreement, dtype_of, inputs, obstacle, plant
from repe.reading.vector import ConceptVector
from repe.steering.bake import bake
from repe.steering.steer import steer

BEGIN, ENDS = 6, (3, 3, 5)
"""How many tokens the texts begin with alike, and how many each ends with."""


@dataclass(frozen=True)
class Findings:
    """What of a model is as the library believes.

    Attributes:
        family: the name of the family of its first block.
        exact: what was tried and is so, among "sites" (attention and mlp are all that every block but the first
            adds to the stream), "trees" (texts in trees of prefixes get what they get alone), "add" and "ablate" (a
            bake is the edit).
        refused: what the library would refuse, or could not try, and why.
        wrong: what it would do, and do wrongly, and how far off: the family's entry is not the model's.
    """

    family: str
    exact: tuple[str, ...]
    refused: Mapping[str, str]
    wrong: Mapping[str, str]

    def __str__(self) -> str:
        rows = dict.fromkeys(self.exact, "exact") | {name: f"refused: {why}" for name, why in self.refused.items()}
        rows |= {name: f"WRONG: {how}" for name, how in self.wrong.items()}
        return str(table(f"family {self.family!r}", ["", ""], rows.items()))


def check(model: nn.Module, *, stack: str = "decoder", blocks_at: str | None = None) -> Findings:
    """Try what the library believes of a model's architecture: above all after an entry in `repe.models.families`.

    Texts are three rows of random tokens. The model is left as it was; while a bake is tried, its weights are others.

    Args:
        model: any model of `transformers`; a small random one tells as much as a trained one, and sooner.
        stack, blocks_at: as in `repe.capture`.

    Returns:
        What is exact, what is refused and why, and what is wrong. `print` shows it as a table.

    Raises:
        ValueError: the blocks of the model cannot be found.
        OverflowError: what its blocks put out is not finite.

    Example:
        >>> print(repe.check(repe.load()[0]))
        family 'llama'
        sites   exact
        trees   exact
        add     exact
        ablate  exact
    """
    found = find_stack(model, stack, blocks_at)
    trials: dict[str, Callable[[], str]] = {
        "sites": lambda: _sites(found),
        "trees": lambda: _trees(found),
        "add": lambda: _add(model, found, stack, blocks_at),
        "ablate": lambda: _ablate(model, found, stack, blocks_at),
    }
    refused, wrong = {}, {}
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        for output in _seen(found, found.blocks, _row(found)):  # a model that does not run at all says so itself
            check_finite(output, model, "at its blocks")
        for name, trial in trials.items():
            try:
                if how := trial():
                    wrong[name] = how
            except (ValueError, OverflowError) as error:
                refused[name] = str(error)
    exact = tuple(name for name in trials if name not in (*refused, *wrong))
    return Findings(found.family(0).name, exact, refused, wrong)


def _sites(stack: Stack) -> str:
    families = [stack.family(block) for block in range(stack.n_blocks)]
    if any(map(stack.closing_norm, range(stack.n_blocks))) or any(CLOSING in f.without.values() for f in families):
        raise ValueError("not tried: norms stand between the sums and the outputs of its blocks")
    wrong = ""
    for block in range(1, stack.n_blocks):
        names = ("attention", "mlp") if families[block].mlp else ("attention",)
        modules = [stack.blocks[block - 1], *(stack.site(name, block) for name in names), stack.blocks[block]]
        before, *added, after = _seen(stack, modules, _row(stack))
        wrong = wrong or disagreement(before + sum(added), after, dtype_of(stack.module))
    return wrong


def _trees(stack: Stack) -> str:
    if why := obstacle(stack.module):
        raise ValueError(why)
    config: Any = stack.module.config
    rows, last, dtype = _texts(stack), stack.blocks[-1:], dtype_of(stack.module)
    (tree,) = plant(rows)
    try:
        (packed,) = _seen(stack, last, inputs([tree], dtype, device_of(stack.module), config))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = ""
    for text, path in zip(tree.texts, tree.paths, strict=True):
        (alone,) = _seen(stack, last, _row(stack, text))
        wrong = wrong or disagreement(packed[0, path], alone[0], dtype)
    return wrong


def _add(model: nn.Module, stack: Stack, name: str, blocks_at: str | None) -> str:
    vector, last = _direction(stack, name), stack.blocks[-1:]
    alpha = 0.5 * float(vector.norm)
    with bake(model, vector, alpha, unit="raw", blocks_at=blocks_at):
        (baked,) = _seen(stack, last, _row(stack))
    with steer(model, vector, alpha, unit="raw", blocks_at=blocks_at):
        (steered,) = _seen(stack, last, _row(stack))
    return disagreement(baked, steered, dtype_of(stack.module))


def _ablate(model: nn.Module, stack: Stack, name: str, blocks_at: str | None) -> str:
    vector = _direction(stack, name)
    with bake(model, vector, edit="ablate", blocks_at=blocks_at):
        outputs = torch.stack(_seen(stack, stack.blocks, _row(stack))).float()
    along = (outputs @ vector.read[0])[..., None] * vector.write[0]
    return disagreement(outputs, outputs - along, dtype_of(stack.module))


def _seen(stack: Stack, modules: Sequence[nn.Module], batch: dict[str, Any]) -> list[Tensor]:
    """What the modules put out in one forward of the stack, on the CPU."""
    without_cache = {"use_cache": False} if hasattr(getattr(stack.module, "config", None), "use_cache") else {}
    with recording(modules, lambda hidden: hidden.to("cpu", copy=True)) as records:
        stack.module(**batch, **without_cache)
    return list(records)


def _row(stack: Stack, text: int = 0) -> dict[str, Any]:
    return {"input_ids": torch.tensor([_texts(stack)[text]], device=device_of(stack.module))}


def _texts(stack: Stack) -> list[list[int]]:
    """Texts of random tokens that begin alike, without padding."""
    vocabulary: Any = stack.site("embedding", 0).weight
    padding = getattr(getattr(stack.module, "config", None), "pad_token_id", None)
    known = torch.tensor([token for token in range(len(vocabulary)) if token != padding])
    chosen = known[torch.randint(len(known), (BEGIN + sum(ENDS),), generator=torch.Generator().manual_seed(0))]
    begin, *ends = chosen.split([BEGIN, *ENDS])
    return [[*begin.tolist(), *end.tolist()] for end in ends]


def _direction(stack: Stack, name: str) -> ConceptVector:
    """A random one in the middle of the stack."""
    block = stack.n_blocks // 2
    (output,) = _seen(stack, [stack.blocks[block]], _row(stack))
    write = nn.functional.normalize(torch.randn(1, stack.d_model, generator=torch.Generator().manual_seed(0)))
    one, unknown = torch.ones(1), torch.full((1,), torch.nan)
    return ConceptVector(
        "a random direction", (block,), (block,), write, write, torch.zeros_like(write), scale=one, sigma=unknown,
        norm=output.float().norm(dim=-1).mean()[None], accuracy=unknown, separation=unknown, stack=name,
    )  # fmt: skip
