"""Steering done by hand, with plain PyTorch hooks on texts that stand alone: what the library's steering must equal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repe.models.blocks import find_stack, hidden_of, with_hidden
from repe.reading.vector import ConceptVector
from tests import zoo

BLOCK = 1  # where the tests steer unless they say otherwise

Chosen = Callable[[int, int], bool]
"""(position, prompt's length) to whether the token there is edited."""
SCOPES: dict[str, tuple[Any, Chosen]] = {
    "all": ("all", lambda position, length: True),
    "prompt": ("prompt", lambda position, length: position < length),
    "generated": ("generated", lambda position, length: position >= length),
    "answer": ("answer", lambda position, length: position >= length - 1),
    "slice": (slice(1, 5), lambda position, length: 1 <= position < 5),
    "every second": (slice(None, None, 2), lambda position, length: position % 2 == 0),
    "slice from the end": (slice(-2, None), lambda position, length: position >= length - 2),
    "list": ([0, 2], lambda position, length: position in (0, 2)),
    "list from the end": ([-1, 1], lambda position, length: position in (length - 1, 1)),
    "list in the answer": ([8, 9], lambda position, length: position in (8, 9)),
}


def vector(
    seed: int = 0,
    n_blocks: int = zoo.N_BLOCKS,
    recommended: tuple[int, ...] = (BLOCK,),
    d_model: int = zoo.D_MODEL,
    **where: str,
) -> ConceptVector:
    """A concept that no data say anything about, and that moves a toy model's activations a good deal."""
    generator = torch.Generator().manual_seed(seed)
    write, other, center = torch.randn(3, n_blocks, d_model, generator=generator)
    write = write / write.norm(dim=-1, keepdim=True)
    read = write + 0.3 * (other - (other * write).sum(-1, keepdim=True) * write) / d_model**0.5
    known = torch.ones(n_blocks)
    return ConceptVector(
        f"concept {seed}", tuple(range(n_blocks)), recommended, write, read, center, 3.0 + torch.arange(n_blocks),
        0.5 * known, 10.0 * known, known, known, **where,
    )  # fmt: skip


def shift_of(of: ConceptVector, alpha: float, block: int = BLOCK, n_blocks: int = 1) -> Tensor:
    """What alpha adds at one of `n_blocks` blocks, in the unit "gap"."""
    return alpha * of.scale[block] / n_blocks * of.write[block]


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the module's hidden tensor is what `change` makes of it."""
    hook = module.register_forward_hook(lambda _, args, output: with_hidden(output, change(hidden_of(output))))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def recorded(model: nn.Module, modules: Sequence[nn.Module], **batch: Any) -> list[Tensor]:
    """What each module puts out in one forward."""
    seen: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        return lambda _module, _args, output: seen.__setitem__(place, hidden_of(output).clone())

    hooks = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[place] for place in range(len(modules))]


def rows_of(batch: dict[str, Tensor]) -> list[list[int]]:
    """The texts of a padded batch, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@torch.no_grad()
def greedy(
    model: Any, prompt: Sequence[int], n_new: int, shift: Tensor, chosen: Chosen, start: int | None = None
) -> tuple[list[int], Tensor]:
    """Greedy decoding of one text, token by token, without cache, mask or padding.

    Returns the new tokens, and the logits that they were chosen by, (n_new, vocabulary). `start` is where the prompt
    ends, if not with `prompt`.
    """
    length = len(prompt) if start is None else start
    block = find_stack(model).blocks[BLOCK]
    ids, logits = list(prompt), []

    def change(hidden: Tensor) -> Tensor:
        edited = hidden.clone()
        for position in range(hidden.shape[1]):
            if chosen(position, length):
                edited[:, position] += shift
        return edited

    with changed(block, change):
        for _ in range(n_new):
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)
