"""Baking: a steering edit folded into a model's weights. It costs nothing, and what is saved is an ordinary checkpoint.

What is added to the stream becomes the bias of what a block writes last; what is ablated is projected out of all that
writes to it. Both only where it is exact: the arithmetic of a block must be known, and the model's class must have a
place for what is baked, which is tried on a copy without weights.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repe.models.blocks import Stack, find_stack, is_encoder_decoder
from repe.models.families import CLOSING, FIRST, MIXTURE, Family
from repe.models.tracking import trackers_of
from repe.ops import Coefficients, reference
from repe.reading.store import warn_if_foreign
from repe.steering.edit import Edit, EditOptions, Placement, spells_options
from repe.steering.precision import Precision
from repe.steering.steer import Steered, edit_of
from repe.steering.swap import Swap, put

INSTEAD = "steer with hooks instead, repe.steer"


@spells_options
def bake(
    model: nn.Module,
    concept: Steered,
    alpha: float = 1.0,
    *,
    tokenizer: Any = None,
    blocks_at: str | None = None,
    **options: Unpack[EditOptions],
) -> Baked:
    """Fold an edit into the weights of a model, which is changed, so that it runs and is saved like any other.

    "add" equals `repe.steer` at the same blocks with scope "all", in evaluation mode, for every token of a text.
    Padding is edited too, which no other token sees. Where biases are missing they are made, and the config says so;
    those that come along with them are 0.

    "ablate" projects one direction out of all that writes to the stream: the embeddings of tokens and positions, the
    attention and the mlp of every block. It equals hooks on all of these, after which the stream holds nothing along
    the direction. It is **not** ablation at the outputs of blocks, where an mlp still reads what the attention before
    it wrote. A head that shares the token embedding's weight keeps the old one, and the config unties them.

    Equal means up to rounding: a number in bfloat16 is off by up to 0.4% of itself, in float16 by 0.05%.

    Args:
        model: a model of `transformers` with plain floating-point weights.
        concept: as in `repe.steer`; the directions of one block for "ablate".
        alpha: the strength. For "ablate" 1 takes the whole direction away; 0 changes nothing.
        tokenizer, blocks_at: as in `repe.steer`.
        options: those of `repe.steer`, as far as weights can take them: edit="add" or "ablate", scope="all", no gate,
            no keep_norm, site="block". With "ablate", `blocks` is the one block whose direction is taken. Try several:
            what is left of the concept scores `-midpoint / scale` there.

    Returns:
        What was done, which can be undone; also a context manager that undoes it at its end.

    Raises:
        ValueError, TypeError, IndexError: an argument cannot be meant, or the model cannot be baked exactly, or not be
            loaded once it is saved; the model stays as it was.
        OverflowError: the dtype of a weight cannot hold what it would become.

    Example:
        >>> with repe.bake(model, "honesty", 0.5) as baked:
        ...     answers = repe.generate(model, tokenizer, ["Once"], max_new_tokens=2)
        >>> len(baked.changed) > 0
        True

    Source: Arditi et al. (arXiv 2406.11717) for the orthogonalised weights.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha is one finite number, as all rows have the same weights; got {alpha!r:.200}")
    model, strength = getattr(model, "_orig_mod", model), float(alpha)
    _check_bakeable(model)
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    _check_is_of_weights(edit)
    stack = find_stack(model, edit.stack, blocks_at)
    placement = edit.on(stack)
    for vector in edit.vectors:
        warn_if_foreign(model, vector)
    with torch.inference_mode(False), torch.no_grad():
        swaps = (_add if edit.kind == "add" else _ablate)(model, stack, placement, strength)
        return Baked(model, edit, strength, placement.blocks, swaps if strength else [])


class Baked:
    """An edit that was folded into a model's weights. Made by `repe.bake`; ended by `undo` or `with`, if ever.

    The former weights are kept, in memory, for as long as this object is.

    Attributes:
        model: the model.
        edit, alpha, blocks: what was folded in, and where.
        changed: the names of the parameters and settings that are others now.
    """

    def __init__(self, model: nn.Module, edit: Edit, alpha: float, blocks: tuple[int, ...], swaps: list) -> None:
        self.model, self.edit, self.alpha, self.blocks = model, edit, alpha, blocks
        self.changed = tuple(dict.fromkeys(swap.label for swap in swaps))
        self._swaps, self._undone = swaps, False
        put([(swap.owner, swap.name, swap.latter) for swap in swaps])

    def undo(self) -> None:
        """Bring back the former weights, config and modules: the very same objects. Do nothing the second time.

        Raises:
            RuntimeError: what was baked, or what it was before, has been written to or moved since.
        """
        if self._undone:
            return
        if touched := [swap.label for swap in self._swaps if not swap.is_untouched()]:
            what = f"{touched[0]} and {len(touched) - 1} more of what {self!r} changed"
            raise RuntimeError(f"{what} were written to or moved since: undo that first, or load the model anew")
        put([(swap.owner, swap.name, swap.former) for swap in self._swaps])
        self._undone = True

    def __enter__(self) -> Baked:
        if self._undone:
            raise RuntimeError(f"{self!r} acts no more: call `repe.bake` again")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        what = self.edit.name
        unit = f"unit={self.edit.unit!r}, " if self.edit.has_length else ""
        return (
            f"Baked({what!r}, alpha={self.alpha:g}, edit={self.edit.kind!r}, {unit}"
            f"blocks={list(self.blocks)}{', undone' if self._undone else ''})"
        )


def _check_is_of_weights(edit: Edit) -> None:
    """Raises ValueError or TypeError for an edit that no weights do."""
    if edit.constants is not None:
        raise TypeError(f"expected a concept's name, a ConceptVector or several; got {edit.constants!r:.200}")
    if edit.kind not in ("add", "ablate"):
        raise ValueError(f"edit={edit.kind!r} is no change of weights, as 'add' and 'ablate' are: {INSTEAD}")
    if edit.site != "block" and (edit.kind == "add" or edit.site != edit.vectors[0].site):
        raise ValueError(
            f"site={edit.site!r}: 'add' is baked at the site 'block' alone, 'ablate' everywhere. Or {INSTEAD}"
        )
    everywhere = {"scope": "all", "gate": None, "keep_norm": False}
    for name, value in ((name, getattr(edit, name)) for name in everywhere):
        if isinstance(value, Tensor) or value != everywhere[name]:
            raise ValueError(f"{name}={value!r:.200}: weights do the same at all tokens of all rows. Or {INSTEAD}")


def _check_bakeable(model: nn.Module) -> None:
    if trackers_of(model):
        raise ValueError("something steers this model: remove it first, with repe.detach(model)")
    if hasattr(model, "peft_type") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model holds an adapter of PEFT: merge it first, model = model.merge_and_unload()")
    if is_encoder_decoder(model):
        raise _refusal(model, "what writes to the streams of an encoder-decoder is not worked out")


def _refusal(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be baked exactly: {why}. Or {INSTEAD}")


@dataclass(frozen=True, eq=False)
class Writer:
    """A parameter, perhaps still to be made, that writes to the stream along its dimension `axis`, times `factor`."""

    module: nn.Module
    name: str
    axis: int = -1
    factor: float = 1.0

    @property
    def value(self) -> Any:
        return self.module._parameters.get(self.name)

    def label(self, model: nn.Module) -> str:
        return next(f"{path}.{self.name}" for path, module in model.named_modules() if module is self.module)


def _fold(model: nn.Module, writer: Writer, value: Any, strength: float, constants: Coefficients) -> Swap:
    """Apply an edit to what a parameter writes, or one that is made for it: `value`."""
    label = writer.label(model)
    _check_plain(model, label, value)
    rows = value.movedim(writer.axis, -1)
    if len(_holders(model, value)) > 1 + isinstance(writer.module, nn.Embedding):
        raise _refusal(model, f"{label} is shared with another module")
    if rows.shape[-1] != constants.write.shape[-1]:
        raise _refusal(model, f"{label} has the shape {tuple(value.shape)}, and what it writes another than the stream")
    amount = torch.full((1, 1), strength / writer.factor, device=value.device)
    edited = reference.edit(rows.reshape(1, -1, rows.shape[-1]), amount, constants.to(value.device))
    latter = edited.reshape(rows.shape).movedim(-1, writer.axis).contiguous()
    if not (latter.isfinite() | ~value.isfinite()).all():
        raise OverflowError(f"{label} would become more than {value.dtype} holds: lower alpha")
    return Swap(writer.module, writer.name, label, nn.Parameter(latter, requires_grad=value.requires_grad))


def _holders(model: nn.Module, value: Tensor) -> list[nn.Module]:
    return [module for module in model.modules() if any(p is value for p in module._parameters.values())]


def _check_plain(model: nn.Module, label: str, value: Any) -> None:
    if type(value) is not nn.Parameter or not value.is_floating_point() or value.element_size() == 1 or value.is_meta:
        kind = f"{type(value).__name__} ({getattr(value, 'dtype', None)}, {getattr(value, 'device', None)})"
        raise _refusal(model, f"{label} is a {kind} and no plain weight: load the model whole, in memory, in bfloat16")


def _added(model: nn.Module, stack: Stack, number: int) -> tuple[list[nn.Module], float]:
    """What a block adds to the stream, its attention and its mlp or the mixer that it has instead, and times what."""
    closing = CLOSING if stack.closing_norm(number) is not None else ""
    if why := stack.family(number).without.get("bake", closing):
        raise _refusal(model, why)
    try:
        return stack.added(number)
    except ValueError as error:
        raise _refusal(model, str(error)) from error


def _projection(model: nn.Module, part: nn.Module, family: Family) -> nn.Module:
    """The projection that a part of a block ends in."""
    if isinstance(part, nn.Linear | Conv1D):
        return part
    children, last = _with_weights(part), set(family.last)
    if len(last & children.keys()) != 1 or (FIRST & children.keys() and not children.keys() <= FIRST | last):
        raise _refusal(model, f"what its blocks add comes out of {type(part).__name__}, and not of a projection")
    return children[(last & children.keys()).pop()]


def _experts(part: nn.Module) -> Any:
    """The experts of a mixture that is nothing else, as one module; None where it is not."""
    children = _with_weights(part)
    experts = children.get("experts") if children.keys() <= MIXTURE else None
    return None if getattr(experts, "has_post_expert_norm", True) else experts


def _with_weights(module: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _add(model: nn.Module, stack: Stack, placement: Placement, strength: float) -> list[Swap]:
    choices = {number: _biases(model, stack, number) for number in placement.blocks}
    there = {number: [writer for writer in biases if writer.value is not None] for number, biases in choices.items()}
    swaps, made = ([], {}) if all(there.values()) else _make(model, stack, choices)
    for number, biases in choices.items():
        writer = [*there[number], *(bias for bias in biases if bias.label(model) in made)][0]
        value = made.pop(writer.label(model)) if writer.value is None else writer.value
        swaps.append(_fold(model, writer, value, strength, placement.constants[number]))
        (step, norm), precision = placement.lengths[number], Precision()
        precision.is_new(number, value.dtype, 0)
        precision.check(number, value.dtype, abs(strength) * step, norm)
    return swaps + [Swap(model.get_submodule(label[: -len(".bias")]), "bias", label, p) for label, p in made.items()]


def _biases(model: nn.Module, stack: Stack, number: int) -> list[Writer]:
    """The biases, there or not, that would be added to a block's output once, and that nothing in the block reads."""
    family = stack.family(number)
    if (norm := stack.closing_norm(number)) is not None:
        return [Writer(norm, "bias")]
    (*others, last), factor = _added(model, stack, number)
    if (experts := _experts(last)) is not None:
        if not (experts.has_bias and family.router in {type(part).__name__ for part in last.children()}):
            raise _refusal(model, "its mlp is a mixture of experts, without biases that together are added once")
        return [Writer(experts, "down_proj_bias")]
    slow: list[Any] = [part for part in stack.blocks[number].modules() if getattr(part, "slow_but_exact", False)]
    if any(part.pretraining_tp > 1 for part in slow):
        raise _refusal(model, "under pretraining_tp its projections leave their biases out")
    unread = [last, *others] if family.parallel else [last]
    return [Writer(_projection(model, part, family), "bias", factor=factor) for part in unread]


def _make(model: Any, stack: Stack, choices: dict[int, list[Writer]]) -> tuple[list[Swap], dict[str, nn.Parameter]]:
    """The setting under which every block has one of its biases, and all the biases, of 0, that come with it."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    labels = [{writer.label(model) for writer in biases} for biases in choices.values()]
    settings = dict.fromkeys(name for number in choices for name in stack.family(number).bias_settings)
    for setting in (name for name in settings if getattr(config, name, None) is False):
        lacking = _lacking(model, setting, True)
        if all(label.endswith(".bias") for label in lacking) and all(lacking.keys() & choice for choice in labels):
            keepers = [config, *(part for part in stack.module.modules() if vars(part).get(setting) is False)]
            made = {label: _zeros(model, label, shape) for label, shape in lacking.items()}
            return [Swap(keeper, setting, f"config.{setting}", True) for keeper in keepers], made
    why = f"it has no {min(labels[0])}, and no setting of its config makes one that a checkpoint would keep"
    raise _refusal(model, f"{why}. Llama, GPT-2, GPT-NeoX, Falcon, OPT, Phi, Starcoder2 and others have such biases")


def _lacking(model: Any, setting: str, value: bool) -> dict[str, torch.Size]:
    """The parameters that the model's class makes under a setting of the config, and that this model lacks."""
    config = copy.deepcopy(model.config)
    setattr(config.get_text_config(), setting, value)
    with torch.device("meta"):
        twin = type(model)(config)
    present = dict(model.named_parameters())
    return {label: parameter.shape for label, parameter in twin.named_parameters() if label not in present}


def _zeros(model: nn.Module, label: str, shape: torch.Size) -> nn.Parameter:
    weight = model.get_parameter(f"{label.removesuffix('bias')}weight")
    _check_plain(model, f"the weight beside {label}", weight)
    return nn.Parameter(weight.new_zeros(shape), requires_grad=weight.requires_grad)


def _ablate(model: nn.Module, stack: Stack, placement: Placement, strength: float) -> list[Swap]:
    if len(placement.blocks) != 1:
        blocks = list(placement.blocks)
        raise ValueError(f"'ablate' takes one block's direction away, and blocks={blocks} are several: name one")
    (constants,) = placement.constants.values()
    tables = _tables(model, stack)
    swaps, writers = _untie(model, tables[0]), [Writer(table, "weight") for table in tables]
    for number in range(stack.n_blocks):
        for part in _added(model, stack, number)[0]:
            writers += _weights(model, part, stack.family(number))
    return [*swaps, *(_fold(model, writer, writer.value, strength, constants) for writer in writers)]


def _tables(model: Any, stack: Stack) -> list[Any]:
    """The embeddings that are summed where the stream begins: the tokens', and those of positions."""
    token, final = stack.site("embedding", 0), stack.family(0).final_norms
    early = {name: part for name, part in _with_weights(stack.module).items() if name not in final}
    tables = [part for part in early.values() if isinstance(part, nn.Embedding)]
    strange = [n for n, part in early.items() if part not in tables and stack.blocks[0] not in part.children()]
    if strange or token not in tables or model.config.get_text_config() is not model.config:
        what = ", ".join(strange) or "images, sound, or tokens embedded elsewhere"
        raise _refusal(model, f"more than embeddings writes to the stream before its blocks ({what})")
    return [token, *(table for table in tables if table is not token)]


def _weights(model: nn.Module, part: nn.Module, family: Family) -> list[Writer]:
    if (experts := _experts(part)) is not None:
        weight, bias = (
            Writer(experts, "down_proj", 2 if experts.is_transposed else 1),
            Writer(experts, "down_proj_bias"),
        )
    else:
        last = _projection(model, part, family)
        weight, bias = Writer(last, "weight", 1 if isinstance(last, Conv1D) else 0), Writer(last, "bias")
    return [weight] if bias.value is None else [weight, bias]


def _untie(model: Any, token: Any) -> list[Swap]:
    """What lets a head keep its weight that is the token embedding's too."""
    holders = _holders(model, token.weight)
    if holders == [token]:
        return []
    if len(holders) > 2 or len(_lacking(model, "tie_word_embeddings", False)) != 1:
        raise _refusal(model, "the token embedding's weight is shared, and no setting of its config unties it alone")
    kept = {key: of for key, of in model.all_tied_weights_keys.items() if model.get_parameter(of) is not token.weight}
    changes = [(model.config, "tie_word_embeddings", False), (model, "all_tied_weights_keys", kept)]
    return [Swap(owner, name, "config.tie_word_embeddings", latter) for owner, name, latter in changes]
