"""Steering done by hand, with plain PyTorch hooks on texts that stand alone: what the library's steering must equal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repe.data.pairs import ContrastPair
from repe.models.blocks import find_stack, hidden_of, with_hidden
from repe.reading.vector import ConceptVector
from tests import zoo

POSITIVE, NEGATIVE = "yes", "no"
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
    known, scale = torch.ones(n_blocks), 3.0 + torch.arange(n_blocks)
    return ConceptVector(
        f"concept {seed}", tuple(range(n_blocks)), recommended, write, read, center, scale, 0.5 * known, 10.0 * known,
        known, known, dose=scale.clone(), **where,
    )  # fmt: skip


def plain_vector(model: Any) -> ConceptVector:
    """A vector with the standard axes for directions."""
    axes, ones = torch.eye(model.config.hidden_size)[: zoo.N_BLOCKS], torch.ones(zoo.N_BLOCKS)
    center = torch.zeros_like(axes)
    return ConceptVector("axes", tuple(range(zoo.N_BLOCKS)), (1,), axes, axes, center, *[ones] * 5, dose=ones)


def worded_pairs(templates: int = 4, items: int = 6) -> list[ContrastPair]:
    """The last word differs between the poles, so a model with random weights tells them apart."""
    words = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"][:items]
    return [
        ContrastPair(f"{'x' * t} {word} {POSITIVE}", f"{'x' * t} {word} {NEGATIVE}", f"t{t}", word)
        for t in range(templates)
        for word in words
    ]


def hooks_of(model: nn.Module) -> list[Any]:
    """All that may hang on the modules of a model."""
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]


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


def shifted(model: nn.Module, shift: Tensor, chosen: Chosen, length: int, block: int = BLOCK) -> Any:
    """While open, `shift` is added to the chosen tokens of a text that stands alone, whose prompt has this length."""

    def change(hidden: Tensor) -> Tensor:
        places = torch.tensor([chosen(position, length) for position in range(hidden.shape[1])])
        return hidden + places[:, None] * shift

    return changed(find_stack(model).blocks[block], change)


@torch.no_grad()
def greedy(
    model: Any, prompt: Sequence[int], n_new: int, shift: Tensor, chosen: Chosen, start: int | None = None
) -> tuple[list[int], Tensor]:
    """Greedy decoding of one text, token by token, without cache, mask or padding.

    Returns the new tokens, and the logits that they were chosen by, (n_new, vocabulary). `start` is where the prompt
    ends, if not with `prompt`.
    """
    ids, logits = list(prompt), []
    with shifted(model, shift, chosen, len(prompt) if start is None else start):
        for _ in range(n_new):
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@torch.no_grad()
def log_p(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
    """log P of an answer of a text that stands alone, and whether each of its tokens is the likeliest.

    The model is taken as it is, edited or not.
    """
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, -len(answer) - 1 : -1]
    found = logits.float().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return float(found.sum()), logits.argmax(-1).tolist() == [*answer]
