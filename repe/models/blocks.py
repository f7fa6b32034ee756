"""Where a `transformers` model keeps its blocks and sites, and how to read and replace the hidden tensor of an output.

Blocks are found by structure, not from a list of models: the outermost list of modules with parts of their own, as long
as the config says, whatever wraps it (PEFT, DistributedDataParallel, `torch.compile`). What a block adds to the stream
cannot be seen from outside: only families whose arithmetic is known have sites, others are refused, not guessed.
"""

import difflib
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repe.models.counts import is_whole
from repe.models.families import INCIDENTAL, SCALES, Family, family_of

STACKS = ("decoder", "encoder")
SITES = ("block", "embedding", "attention", "mlp")


@dataclass(frozen=True)
class Stack:
    """A model's blocks, in the order in which they run, and the module around them.

    `module` is the one whose forward takes this stack's `input_ids`, `name` its qualified name in the model ("" is the
    model itself); `names` are those of `blocks`. All are called once a forward, so that hooks on them fire.
    """

    module: nn.Module = field(repr=False)
    name: str
    blocks: tuple[nn.Module, ...] = field(repr=False)
    names: tuple[str, ...]
    d_model: int

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def indices(self, blocks: int | Iterable[int] | slice | str) -> tuple[int, ...]:
        """Block numbers, sorted and each once, of an int (negatives count from the end), ints, a slice or "all".

        Raises IndexError for a block that does not exist or if no block is named, TypeError for anything else.
        """
        return block_numbers(blocks, self.n_blocks)

    def site(self, site: str, block: int) -> nn.Module:
        """The module whose output is the site: (batch, tokens, d_model), bare or as the first element of a tuple.

        "attention" and "mlp" are exactly what the block adds to the stream (before dropout, which eval mode turns off).
        Blocks that normalise after the sum, as BERT's, still do so, and cross-attention is a third term of the sum.
        Clone what is kept of it: some blocks, as Falcon's, add to a part's output in place.
        "embedding" is the token embedding, whatever the block. Raises ValueError where no module puts out the site.
        """
        if site not in SITES:
            raise ValueError(f"site={site!r} does not exist: choose one of {', '.join(map(repr, SITES))}.")
        if site == "embedding":
            return _embedding(self.module)
        number = _number(block, self.n_blocks)
        if site == "block":
            return self.blocks[number]
        inner, family = self._inner(number), self.family(number)
        try:
            _check_put_out(inner, site, family)
            return _added(inner, getattr(family, site), family)
        except ValueError as why:
            raise ValueError(
                f"Block {self.names[number]} ({type(inner).__name__}) has no site {site!r}: {why}. "
                'Use site="block", the residual stream at the output of the block, instead.'
            ) from None

    def family(self, block: int) -> Family:
        """What is known of a block's arithmetic; `UNKNOWN` if nothing."""
        config = getattr(self.module, "config", None)
        return family_of(getattr(config, "model_type", None), _parts(self._inner(block)))

    def added(self, block: int) -> tuple[list[nn.Module], float]:
        """The modules whose outputs a block adds to the stream, and the number that it multiplies them by.

        Raises ValueError where that is not known.
        """
        inner, family = self._inner(block), self.family(block)
        paths = [path for path in (family.attention, family.mlp) if path]
        if not paths or _weight(inner, known=family.scale):
            raise ValueError(f"the arithmetic of its blocks, {type(inner).__name__}, is not known")
        return [_added(inner, path, family) for path in paths], getattr(inner, family.scale, 1.0)

    def closing_norm(self, block: int) -> nn.Module | None:
        """The norm between the sum of a block and its output, where there is one."""
        inner, family = self._inner(block), self.family(block)
        stands_first = getattr(inner, family.norm_first, bool(family.norm_first))
        return None if stands_first or not family.closing_norm else _added(inner, family.closing_norm, family)

    def _inner(self, block: int) -> nn.Module:
        """A block without what `torch.compile` put around it."""
        number = _number(block, self.n_blocks)
        return getattr(self.blocks[number], "_orig_mod", self.blocks[number])


def find_stack(model: nn.Module, stack: str = "decoder", blocks_at: str | None = None) -> Stack:
    """Find the blocks of a model's "decoder" or "encoder". A model with one stack has it as its decoder, BERT too.

    `blocks_at` names the list of blocks outright, as `model.named_modules()` spells it: "model.layers".
    Raises ValueError, with the lists of modules that there are, if none fits or several do.
    """
    if stack not in STACKS:
        raise ValueError(f"stack={stack!r} does not exist: choose one of {', '.join(map(repr, STACKS))}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, a torch.nn.Module, and got {type(model).__name__}: is the order right?")
    path = _search(model, stack) if blocks_at is None else _checked(model, blocks_at)
    owner = _owner(model, path)
    blocks = tuple(model.get_submodule(path).children())
    names = tuple(f"{path}.{number}" for number in range(len(blocks)))
    return Stack(model.get_submodule(owner), owner, blocks, names, _d_model(model, path))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes and its inputs go. Offloaded weights are brought to inputs on the CPU."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether texts go into one stack of a model and answers come out of another, whatever is wrapped around it."""
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    return bool(getattr(config, "is_encoder_decoder", False))


def hidden_of(output: Any) -> Tensor:
    """The hidden tensor of a module's output: the output, or the first element of a tuple, list or ModelOutput.

    Raises TypeError if that is not a tensor.
    """
    hidden = output
    if isinstance(output, tuple | list | OrderedDict):
        hidden = next(iter(output.values() if isinstance(output, OrderedDict) else output), None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"Cannot read or steer an output of type {type(output).__name__}: "
            "expected a tensor, or a tuple, list or ModelOutput that begins with one."
        )
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """An output of the same type with `hidden` in the place of its hidden tensor. The one passed in is not changed."""
    hidden_of(output)
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, OrderedDict):
        return type(output)(**{**output, next(iter(output)): hidden})
    return getattr(output, "_make", type(output))((hidden, *output[1:]))  # a namedtuple takes its elements one by one


def block_numbers(blocks: int | Iterable[int] | slice | str, n_blocks: int) -> tuple[int, ...]:
    """Block numbers, sorted and each once: see `Stack.indices`."""
    chosen: Any = slice(None) if isinstance(blocks, str) and blocks == "all" else blocks
    if isinstance(chosen, slice):
        chosen = range(n_blocks)[chosen]
    numbers = tuple(sorted({_number(block, n_blocks) for block in _items(chosen)}))
    if not numbers:
        raise IndexError(f"blocks={blocks!r} names none of this model's {n_blocks} blocks: name at least one.")
    return numbers


def _number(block: Any, n_blocks: int) -> int:
    if not is_whole(block):
        raise TypeError(f'Blocks are an int, ints, a slice or "all", not {block!r} of type {type(block).__name__}.')
    number = operator.index(block)
    if not -n_blocks <= number < n_blocks:
        raise IndexError(
            f"Block {number} does not exist: this model has {n_blocks} blocks. "
            f"Use 0 to {n_blocks - 1}, or -1 to -{n_blocks} to count from the end."
        )
    return number % n_blocks


def _items(blocks: Any) -> Iterable[Any]:
    if isinstance(blocks, str | bytes) or getattr(blocks, "ndim", None) == 0 or not isinstance(blocks, Iterable):
        return (blocks,)
    return blocks


def _search(model: nn.Module, stack: str) -> str:
    lists = _outermost_lists(model)
    owners = {path: _owner(model, path) for path in lists if _has_configured_length(model, path, len({*lists[path]}))}
    # A tower of images or sound takes no token ids: its owner is the model that has the language model inside.
    found = [path for path in owners if not any(owners[path] in _ancestors(other) for other in owners.values())]
    if len(found) > 1 or stack == "encoder":
        found = [path for path in found if _side(path) in (stack, None)]
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell which modules of {type(model).__name__} are its {stack} blocks: "
            f"{'several lists fit' if found else 'no list fits'}. Lists of modules found: {_listing(lists)}. "
            'Pass the path of the right one, e.g. blocks_at="model.layers".'
        )
    return found[0]


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules that have parts themselves, except inside such modules: experts and sub-layers are no blocks."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        is_outermost = isinstance(module, nn.ModuleList) and not any(outer in _ancestors(path) for outer in lists)
        if is_outermost and len(module) and all(any(block.children()) for block in module):
            lists[path] = module
    return lists


def _has_configured_length(model: nn.Module, path: str, length: int) -> bool:
    """Whether the config speaks of so many blocks. One block that is run many times, as ALBERT's, fails here."""
    config = _config(model, path)
    names = {"num_hidden_layers", *(name for name in getattr(config, "__dict__", ()) if "layer" in name)}
    counts = [value for name in names if type(value := getattr(config, name, None)) is int]
    return length in counts or not counts


def _checked(model: nn.Module, path: str) -> str:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not len(lists.get(path, ())):
        near = {name: lists[name] for name in difflib.get_close_matches(path, lists, n=3, cutoff=0)}
        raise ValueError(
            f"blocks_at={path!r} is not a list of blocks in this {type(model).__name__}. "
            f"Lists of modules with the nearest names: {_listing(near)}."
        )
    return path


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{path!r} ({len(blocks)} long)" for path, blocks in lists.items()) or "none at all"


def _ancestors(path: str) -> Iterator[str]:
    """The nearest first, the model itself last: "a.b.c" has "a.b", "a" and ""."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _side(path: str) -> str | None:
    return next((stack for part in path.split(".") for stack in STACKS if stack in part), None)


def _owner(model: nn.Module, path: str) -> str:
    for argument in ("input_ids", "inputs_embeds"):
        for name in _ancestors(path):
            if argument in inspect.signature(model.get_submodule(name).forward).parameters:
                return name
    return next(_ancestors(path))


def _config(model: nn.Module, path: str) -> Any:
    configs = (getattr(model.get_submodule(name), "config", None) for name in _ancestors(path))
    return next((config for config in configs if config is not None), None)


def _d_model(model: nn.Module, path: str) -> int:
    config = _config(model, path)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if hasattr(text_config, "hidden_size"):
        return text_config.hidden_size
    return _embedding(model.get_submodule(_owner(model, path))).weight.shape[-1]


def _embedding(owner: Any) -> Any:
    if hasattr(owner, "get_input_embeddings"):
        return owner.get_input_embeddings()
    embeddings = [module for module in owner.modules() if isinstance(module, nn.Embedding)]
    if len(embeddings) == 1:
        return embeddings[0]
    raise ValueError(f'{type(owner).__name__} has no get_input_embeddings(), so it has no site "embedding".')


def _parts(block: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in block.named_children() if not any(word in name for word in INCIDENTAL))


def _descend(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = module[int(part)] if isinstance(module, nn.ModuleList) else getattr(module, part, None)
    return module


def _check_put_out(block: nn.Module, site: str, family: Family) -> None:
    """Raises ValueError, why as the end of a sentence, where no part puts out just what a block adds for a site."""
    if not getattr(family, site):
        parts = ", ".join(sorted(_parts(block)))
        raise ValueError(f"none of its parts ({parts}) is known to put out just what its {site} adds to the stream")
    if why := _weight(block) or family.without.get(site, ""):
        raise ValueError(why)


def _weight(block: nn.Module, known: str = "") -> str:
    """How a block weighs what it adds, other than by its attribute `known`; "" if it does not."""
    for name, value in vars(block).items():
        is_scale = name != known and any(word in name for word in SCALES)
        if is_scale and isinstance(value, int | float) and value != 1:
            return f"what its parts put out is multiplied by {name}={value} before it is added"
    weights = [*block._parameters, *block._buffers]
    return f"it weighs what it adds with tensors of its own ({', '.join(weights)})" if weights else ""


def _added(block: nn.Module, path: str, family: Family) -> nn.Module:
    """The module at a path in a block, or its last projection where the module adds the stream to that itself."""
    module = _descend(block, path)
    if module is None:
        raise ValueError(f"it has no part {path!r}, of which the family {family.name!r} tells")
    if "residual" in inspect.signature(module.forward).parameters:
        return next(getattr(module, name) for name in family.last if hasattr(module, name))
    return module
