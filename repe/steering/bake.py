"""Baking: a steering edit folded into a model's weights. It costs nothing, and what is saved is an ordinary checkpoint.

What is added to the stream becomes the bias of what a block writes last; what is ablated is projected out of all that
writes to it. Both only where it is exact: the arithmetic of a block must be known, and the model's class must have a
place for what is baked, which is tried on a copy without weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repe.models.blocks import Stack, find_stack, is_encoder_decoder
from repe.models.tracking import trackers_of
from repe.ops import Coefficients, reference
from repe.reading.store import warn_if_foreign
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit, Placement
from repe.steering.kinds import KINDS
from repe.steering.precision import Precision

INSTEAD = "steer with hooks instead, repe.steer"
# How a config says that there are biases: "attention_bias" for Cohere, whose attention writes where its mlp does.
FLAGS = ("mlp_bias", "use_bias", "bias", "enable_bias", "attention_bias")
# The projection that a part of a block ends in, and those before it in an mlp that holds nothing else.
LAST = {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "Wo", "o_proj", "out_proj", "dense"}
FIRST = {"gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "Wi"}
MIXTURE = {"experts", "gate", "router"}
ROUTERS_OF_SUM_1 = {"GptOssTopKRouter"}
GRANITE = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
NORMED = {"Block", "MiniMaxDecoderLayer"}  # a norm after each sum, by parts with names like GPT-2's and Llama's
FINAL_NORMS = {"norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm"}


def bake(
    model: nn.Module,
    vector: ConceptVector | Sequence[ConceptVector],
    alpha: float = 1.0,
    *,
    blocks: Any = "auto",
    edit: str = "add",
    unit: str = "gap",
    site: str | None = None,
    blocks_at: str | None = None,
) -> Baked:
    """Folds an edit into the weights of a model, which is changed, so that it runs and is saved like any other.

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
        vector: the concept's, or several, which act together; of the site "block" for "add".
        alpha: the strength. For "ablate" 1 takes the whole direction away; 0 changes nothing.
        blocks: block numbers, "all", or "auto" for those that the vector recommends. For "ablate" the one block whose
            direction is taken. Try several: what is left of the concept scores `-midpoint / scale` there.
        edit: "add" or "ablate".
        unit: of alpha, for "add": see `repe.steer`.
        site: "block" or None, as nothing else can be baked.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.

    Returns:
        What was done, which can be undone; also a context manager that undoes it at its end.

    Raises:
        ValueError, TypeError, IndexError: an argument cannot be meant, or the model cannot be baked exactly, or not be
            loaded once it is saved; the model stays as it was.
        OverflowError: the dtype of a weight cannot hold what it would become.

    Source: Arditi et al. (arXiv 2406.11717) for the orthogonalised weights.
    """
    asked, strength = _edit(vector, alpha, edit, unit, site, blocks), float(alpha)
    model = getattr(model, "_orig_mod", model)
    stack = find_stack(model, asked.stack, blocks_at)
    _check_bakeable(model)
    placement = asked.on(stack)
    for each in asked.vectors:
        warn_if_foreign(model, each)
    with torch.inference_mode(False), torch.no_grad():
        swaps = (_add if edit == "add" else _ablate)(model, stack, placement, strength)
        return Baked(model, asked, strength, placement.blocks, swaps if strength else [])


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
        _put([(swap.owner, swap.name, swap.latter) for swap in swaps])

    def undo(self) -> None:
        """Brings back the former weights, config and modules: the very same objects. Does nothing the second time.

        Raises:
            RuntimeError: what was baked, or what it was before, has been written to or moved since.
        """
        if self._undone:
            return
        if touched := [swap.label for swap in self._swaps if not swap.is_untouched()]:
            what = f"{touched[0]} and {len(touched) - 1} more of what {self!r} changed"
            raise RuntimeError(f"{what} were written to or moved since: undo that first, or load the model anew")
        _put([(swap.owner, swap.name, swap.former) for swap in self._swaps])
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


class Swap:
    """An attribute of a module or a config that is `former` and becomes `latter`."""

    def __init__(self, owner: Any, name: str, label: str, latter: Any) -> None:
        self.owner, self.name, self.label, self.latter = owner, name, label, latter
        self.former = getattr(owner, name)
        self.seals = (_seal(self.former), _seal(latter))

    def is_untouched(self) -> bool:
        """Whether the latter is in place, and neither of the two was written to or moved."""
        present = getattr(self.owner, self.name)
        in_place = present is self.latter if isinstance(self.latter, Tensor) else present == self.latter
        return in_place and (_seal(self.former), _seal(present)) == self.seals


def _seal(value: Any) -> Any:
    """What differs once a tensor was written to or moved: a sum of each row's bits, weighted by where they stand."""
    if not isinstance(value, Tensor):
        return None
    rows = value.detach().reshape(-1, value.shape[-1]).contiguous()
    words = rows.view(torch.uint8 if rows.shape[1] * rows.element_size() % 8 else torch.int64)
    weights = 2 * torch.arange(words.shape[1], device=words.device) + 1
    return value.device, value.dtype, (words * weights).sum(-1).tolist()


def _put(values: Sequence[tuple[Any, str, Any]]) -> None:
    """Sets attributes, all of them or none."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
    except BaseException:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        raise


def _edit(vector: Any, alpha: Any, edit: str, unit: str, site: str | None, blocks: Any) -> Edit:
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha is one finite number, as all rows have the same weights; got {alpha!r:.200}")
    if isinstance(vector, str | Coefficients):
        raise TypeError(f"expected a ConceptVector, as `repe.extract` returns, or several; got {vector!r:.200}")
    if edit in KINDS and edit not in ("add", "ablate"):
        raise ValueError(f"edit={edit!r} is no change of weights, as 'add' and 'ablate' are: {INSTEAD}")
    asked = Edit.of(vector, edit=edit, unit=unit, blocks=blocks)
    where = site or (asked.site if edit == "add" else "block")
    if where != "block":
        raise ValueError(f"site={where!r}: 'add' is baked at the site 'block' alone, 'ablate' everywhere. Or {INSTEAD}")
    return asked


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
class Place:
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


def _fold(model: nn.Module, place: Place, value: Any, strength: float, constants: Coefficients) -> Swap:
    """Applies an edit to what a parameter writes, or one that is made for it: `value`."""
    label = place.label(model)
    _check_plain(model, label, value)
    rows = value.movedim(place.axis, -1)
    if len(_holders(model, value)) > 1 + isinstance(place.module, nn.Embedding):
        raise _refusal(model, f"{label} is shared with another module")
    if rows.shape[-1] != constants.write.shape[-1]:
        raise _refusal(model, f"{label} has the shape {tuple(value.shape)}, and what it writes another than the stream")
    amount = torch.full((1, 1), strength / place.factor, device=value.device)
    edited = reference.edit(rows.reshape(1, -1, rows.shape[-1]), amount, constants.to(value.device))
    latter = edited.reshape(rows.shape).movedim(-1, place.axis).contiguous()
    if not (latter.isfinite() | ~value.isfinite()).all():
        raise OverflowError(f"{label} would become more than {value.dtype} holds: lower alpha")
    return Swap(place.module, place.name, label, nn.Parameter(latter, requires_grad=value.requires_grad))


def _holders(model: nn.Module, value: Tensor) -> list[nn.Module]:
    return [module for module in model.modules() if any(p is value for p in module._parameters.values())]


def _check_plain(model: nn.Module, label: str, value: Any) -> None:
    if type(value) is not nn.Parameter or not value.is_floating_point() or value.element_size() == 1 or value.is_meta:
        kind = f"{type(value).__name__} ({getattr(value, 'dtype', None)}, {getattr(value, 'device', None)})"
        raise _refusal(model, f"{label} is a {kind} and no plain weight: load the model whole, in memory, in bfloat16")


def _parts(model: nn.Module, stack: Stack, number: int) -> list[nn.Module]:
    """What a block adds to the stream: its attention and its mlp, or the mixer that it has instead."""
    block: Any = stack.blocks[number]
    is_bart = hasattr(block, "final_layer_norm") and not hasattr(block, "do_layer_norm_before")
    if is_bart or type(block).__name__ in NORMED or _closing_norm(block) is not None:
        raise _refusal(model, "a norm stands, or may stand, between the sum of each block and its output")
    try:
        if hasattr(block, "residual_multiplier") and _with_weights(block).keys() == GRANITE:
            return [block.self_attn, block.mlp]
        mixer = [stack.site("attention", number)]
        return mixer if hasattr(block, "mixer") else [*mixer, getattr(block, "fc2", None) or stack.site("mlp", number)]
    except (AttributeError, ValueError) as error:
        raise _refusal(model, f"the arithmetic of its blocks, {type(block).__name__}, is not known") from error


def _closing_norm(block: Any) -> Any:
    """The norm between the sum of a block and its output, where there is one."""
    if getattr(block, "do_layer_norm_before", True) is False:
        return block.final_layer_norm
    return getattr(block, "output_layer_norm", None) or getattr(getattr(block, "output", None), "LayerNorm", None)


def _projection(model: nn.Module, part: nn.Module) -> nn.Module:
    """The projection that a part of a block ends in."""
    children = {"dense": part} if isinstance(part, nn.Linear | Conv1D) else _with_weights(part)
    last = LAST & children.keys()
    if len(last) != 1 or (FIRST & children.keys() and not children.keys() <= FIRST | LAST):
        raise _refusal(model, f"what its blocks add comes out of {type(part).__name__}, and not of a projection")
    return children[last.pop()]


def _experts(part: nn.Module) -> Any:
    """The experts of a mixture that is nothing else, as one module; None where it is not."""
    children = _with_weights(part)
    experts = children.get("experts") if children.keys() <= MIXTURE else None
    return None if getattr(experts, "has_post_expert_norm", True) else experts


def _with_weights(module: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _add(model: nn.Module, stack: Stack, placement: Placement, strength: float) -> list[Swap]:
    choices = {number: _biases(model, stack, number) for number in placement.blocks}
    there = {number: [place for place in places if place.value is not None] for number, places in choices.items()}
    swaps, made = ([], {}) if all(there.values()) else _make(model, stack, list(choices.values()))
    for number, places in choices.items():
        place = [*there[number], *(place for place in places if place.label(model) in made)][0]
        value = made.pop(place.label(model)) if place.value is None else place.value
        swaps.append(_fold(model, place, value, strength, placement.constants[number]))
        (step, norm), precision = placement.lengths[number], Precision()
        precision.is_new(number, value.dtype, 0)
        precision.check(number, value.dtype, abs(strength) * step, norm)
    return swaps + [Swap(model.get_submodule(label[: -len(".bias")]), "bias", label, p) for label, p in made.items()]


def _biases(model: nn.Module, stack: Stack, number: int) -> list[Place]:
    """The biases, there or not, that would be added to a block's output once, and that nothing in the block reads."""
    block: Any = stack.blocks[number]
    if (norm := _closing_norm(block)) is not None:
        return [Place(norm, "bias")]
    *others, last = _parts(model, stack, number)
    if (experts := _experts(last)) is not None:
        if not (experts.has_bias and any(type(part).__name__ in ROUTERS_OF_SUM_1 for part in last.children())):
            raise _refusal(model, "its mlp is a mixture of experts, without biases that together are added once")
        return [Place(experts, "down_proj_bias")]
    if any(getattr(part, "slow_but_exact", False) and part.pretraining_tp > 1 for part in block.modules()):
        raise _refusal(model, "under pretraining_tp its projections leave their biases out")
    is_parallel = _with_weights(block).keys() == {"self_attn", "mlp", "input_layernorm"}
    factor = getattr(block, "residual_multiplier", 1.0)
    return [Place(_projection(model, part), "bias", factor=factor) for part in [last, *others][: 1 + is_parallel]]


def _make(model: Any, stack: Stack, choices: Sequence[list[Place]]) -> tuple[list[Swap], dict[str, nn.Parameter]]:
    """The setting under which every block has one of its places, and all the biases, of 0, that come with it."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    labels = [{place.label(model) for place in places} for places in choices]
    for flag in (flag for flag in FLAGS if getattr(config, flag, None) is False):
        lacking = _lacking(model, flag, True)
        if all(label.endswith(".bias") for label in lacking) and all(lacking.keys() & choice for choice in labels):
            keepers = [config, *(part for part in stack.module.modules() if vars(part).get(flag) is False)]
            made = {label: _zeros(model, label, shape) for label, shape in lacking.items()}
            return [Swap(keeper, flag, f"config.{flag}", True) for keeper in keepers], made
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
    untied = _untie(model, tables[0])
    parts = [part for number in range(stack.n_blocks) for part in _parts(model, stack, number)]
    places = [Place(table, "weight") for table in tables] + [place for part in parts for place in _outputs(model, part)]
    return [*untied, *(_fold(model, place, place.value, strength, constants) for place in places)]


def _tables(model: Any, stack: Stack) -> list[Any]:
    """The embeddings that are summed where the stream begins: the tokens', and those of positions."""
    token = stack.site("embedding", 0)
    early = {name: part for name, part in _with_weights(stack.module).items() if name not in FINAL_NORMS}
    tables = [part for part in early.values() if isinstance(part, nn.Embedding)]
    strange = [n for n, part in early.items() if part not in tables and stack.blocks[0] not in part.children()]
    if strange or token not in tables or model.config.get_text_config() is not model.config:
        what = ", ".join(strange) or "images, sound, or tokens embedded elsewhere"
        raise _refusal(model, f"more than embeddings writes to the stream before its blocks ({what})")
    return [token, *(table for table in tables if table is not token)]


def _outputs(model: nn.Module, part: nn.Module) -> list[Place]:
    if (experts := _experts(part)) is not None:
        weight, bias = Place(experts, "down_proj", 2 if experts.is_transposed else 1), Place(experts, "down_proj_bias")
    else:
        last = _projection(model, part)
        weight, bias = Place(last, "weight", 1 if isinstance(last, Conv1D) else 0), Place(last, "bias")
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
