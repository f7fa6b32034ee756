"""Families: what is known of an architecture that cannot be seen in a model. One entry a family, for the whole library.

Most of it is structure: blocks with parts of these names do the arithmetic that is said here, whatever the model is
called. An entry names `types` of models only where the same parts do something else elsewhere, or for what parts do not
show: whether a model is exact on trees of prefixes. Add an entry to the table below, or at run time with `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

LAST = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "Wo", "o_proj", "out_proj", "dense")
"""The projection that a part of a block ends in."""
FIRST = {"gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "Wi"}
"""The projections before it, in an mlp that holds nothing else."""
MIXTURE = {"experts", "gate", "router"}
"""The parts of an mlp that is a mixture of experts and nothing else."""
FINAL_NORMS = ("norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm")
"""The norm behind the last block."""
BIAS_SETTINGS = ("mlp_bias", "use_bias", "bias", "enable_bias", "attention_bias")
"""How a config says that there are biases; "attention_bias" helps where attention writes behind the mlp's reading."""
INCIDENTAL = ("dropout", "activation")
"""In the names of parts by which no arrangement is told."""
SCALES = ("multiplier", "factor", "scale")
"""In the names of numbers that a block multiplies what it adds by."""
CLOSING = "a norm stands, or may stand, between the sum of each block and its output"


@dataclass(frozen=True)
class Family:
    """An arrangement of a block's parts whose arithmetic is known, and the model types that have it.

    Paths are dotted, from the block on; a number counts in a list. "" is none.

    Attributes:
        name: its own among the families.
        types: the model types (`config.model_type` of the part that holds the blocks) that it is known to hold for.
        parts: the arrangements, each the names of all parts of a block, with spaces between. None where only `trees`
            is known.
        by_parts: whether any model whose blocks have just these parts is taken for one of the family.
        attention, mlp: the paths of the modules whose outputs a block adds to the stream.
        without: for "attention" and "mlp", why no hook can be put there although the path is right; for "bake", why
            weights cannot take an edit.
        parallel: whether the mlp reads the stream as it was before attention was added.
        scale: the name of the block's attribute that what is added is multiplied by, where a block has one.
        closing_norm: the path of a norm between the sum of a block and its output.
        norm_first: the name of the block's attribute that says that this norm stands before the mlp instead.
        last: names of the projection that attention or mlp ends in.
        router: the class of a mixture's router whose weights sum to 1, so that a bias of all experts is added once.
        final_norms: names of the norm behind the last block.
        bias_settings: names of settings of the config that make biases.
        trees: whether the `types` are exact on trees of prefixes: places come from `position_ids` alone, and a 4D mask
            is obeyed as it is.
    """

    name: str
    types: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    by_parts: bool = False
    attention: str = ""
    mlp: str = ""
    without: Mapping[str, str] = field(default_factory=dict)
    parallel: bool = False
    scale: str = ""
    closing_norm: str = ""
    norm_first: str = ""
    last: tuple[str, ...] = LAST
    router: str = ""
    final_norms: tuple[str, ...] = FINAL_NORMS
    bias_settings: tuple[str, ...] = BIAS_SETTINGS
    trees: bool = False

    @property
    def arrangements(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(names.split()) for names in self.parts)


UNKNOWN = Family("unknown")
_LLAMA = "self_attn mlp input_layernorm post_attention_layernorm"
_OLMO2 = "self_attn mlp post_attention_layernorm post_feedforward_layernorm"
_GEMMA2 = f"{_OLMO2} input_layernorm pre_feedforward_layernorm"
_NEOX = "attention mlp input_layernorm post_attention_layernorm"
_OPT = "self_attn self_attn_layer_norm fc1 fc2 final_layer_norm"
_GPT2 = "attn mlp ln_1 ln_2"
_BERT = "attention intermediate output"
_TABLE = (
    Family(
        "llama", parts=(
            _LLAMA, "self_attn mlp input_layernorm pre_feedforward_layernorm",
            "self_attn mlp attention_layernorm feedforward_layernorm",
        ),
        types=(
            "apertus", "arcee", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "gemma",
            "glm", "glm4_moe", "granite", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "ministral",
            "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmoe", "persimmon", "phi3", "phimoe", "qwen2",
            "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
        ),
        by_parts=True, attention="self_attn", mlp="mlp", scale="residual_multiplier", trees=True,
    ),
    Family(
        "gpt_oss", types=("gpt_oss",), parts=(_LLAMA,), attention="self_attn", mlp="mlp", router="GptOssTopKRouter",
        trees=True,
    ),
    Family(
        "minimax", types=("minimax",), parts=(_LLAMA,), attention="self_attn", mlp="mlp", without={"bake": CLOSING}
    ),
    Family(
        "qwen3_next", parts=("linear_attn mlp input_layernorm post_attention_layernorm",), by_parts=True,
        attention="linear_attn", mlp="mlp",
    ),
    Family(
        "cohere", types=("cohere", "cohere2", "phi"), parts=("self_attn mlp input_layernorm",), by_parts=True,
        attention="self_attn", mlp="mlp", parallel=True, trees=True,
    ),
    Family(
        "gemma2", types=("exaone4", "flex_olmo", "gemma2", "gemma3_text", "olmo2", "olmo3"),
        parts=(_OLMO2, _GEMMA2), by_parts=True,
        attention="post_attention_layernorm", mlp="post_feedforward_layernorm", trees=True,
    ),
    Family(
        "beam", types=("beam",), parts=(_GEMMA2,),
        attention="post_attention_layernorm", mlp="post_feedforward_layernorm",
        without=dict.fromkeys(("attention", "mlp", "bake"), "it scales what it adds with depth"),
    ),
    Family(
        "glm4", types=("glm4",), parts=(f"{_LLAMA} post_self_attn_layernorm post_mlp_layernorm",), by_parts=True,
        attention="post_self_attn_layernorm", mlp="post_mlp_layernorm", trees=True,
    ),
    Family(
        "gpt_neox", types=("gpt_neox",), parts=(_NEOX,), by_parts=True, attention="attention", mlp="mlp", trees=True
    ),
    Family(
        "gpt_neox_japanese", types=("gpt_neox_japanese",), parts=(_NEOX,), attention="attention", mlp="mlp",
        without=dict.fromkeys(("attention", "bake"), "it adds a bias to what its attention puts out"),
    ),
    Family(
        "falcon", types=("falcon",), parts=(
            "self_attention mlp input_layernorm", "self_attention mlp input_layernorm post_attention_layernorm",
            "self_attention mlp ln_attn ln_mlp",
        ),
        by_parts=True, attention="self_attention", mlp="mlp", trees=True,
    ),
    Family(
        "gpt2", types=("codegen", "gpt2", "gpt_bigcode", "gptj"),
        parts=(_GPT2, "attn mlp ln_1", "attn mlp attn_norm mlp_norm"), by_parts=True,
        attention="attn", mlp="mlp", trees=True,
    ),
    Family(
        "openai-gpt", types=("openai-gpt",), parts=(_GPT2,), attention="attn", mlp="mlp", without={"bake": CLOSING}
    ),
    Family("mpt", parts=("attn ffn norm_1 norm_2",), by_parts=True, attention="attn", mlp="ffn"),
    Family("mamba", parts=("mixer norm",), by_parts=True, attention="mixer"),
    Family(
        "bert", parts=(_BERT,), by_parts=True, attention="attention.output.dense", mlp="output.dense",
        closing_norm="output.LayerNorm",
    ),
    Family(
        "fnet", parts=("fourier intermediate output",), by_parts=True, mlp="output.dense",
        closing_norm="output.LayerNorm",
    ),
    Family(
        "roberta-prelayernorm", types=("roberta-prelayernorm",), parts=(_BERT,),
        attention="attention.output.dense", mlp="output.dense",
    ),
    Family(
        "distilbert", parts=("attention ffn sa_layer_norm output_layer_norm",), by_parts=True,
        attention="attention", mlp="ffn", closing_norm="output_layer_norm",
    ),
    Family(
        "opt", types=("opt",), parts=(_OPT,), attention="self_attn", mlp="fc2",
        without={"mlp": "its mlp runs with batch and tokens flattened into one dimension"},
        closing_norm="final_layer_norm", norm_first="do_layer_norm_before", trees=True,
    ),
    Family(
        "bart", types=("biogpt", "xglm"), parts=(_OPT, f"{_OPT} encoder_attn encoder_attn_layer_norm"), by_parts=True,
        attention="self_attn", mlp="fc2", without={"bake": CLOSING}, trees=True,
    ),
    Family("t5", parts=("layer",), by_parts=True, attention="layer.0.SelfAttention", mlp="layer.-1.DenseReluDense"),
    Family("granitemoe", types=("granitemoe", "granitemoeshared"), trees=True),
)  # fmt: skip

_FAMILIES: list[Family] = []
Class = TypeVar("Class", bound=type)


def known_families() -> tuple[Family, ...]:
    """All families, those that were registered last."""
    return tuple(_FAMILIES)


def family_of(model_type: str | None, parts: frozenset[str]) -> Family:
    """The family of blocks with these parts: the one of the model's type, else the one that is told by its parts."""
    fitting = [family for family in _FAMILIES if parts in family.arrangements]
    listed = [family for family in fitting if model_type in family.types]
    return next(iter(listed + [family for family in fitting if family.by_parts]), UNKNOWN)


# what a user adds


class Registration:
    """A family that holds in this process until `remove` or the end of a `with` block.

    Put above the class of a model it decorates it: the class stays as it is.
    """

    def __init__(self, family: Family) -> None:
        self.family = family

    def remove(self) -> None:
        """Take the family back. Do nothing the second time."""
        if self.family in _FAMILIES:
            _FAMILIES.remove(self.family)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __call__(self, model: Class) -> Class:
        model_type = getattr(getattr(model, "config_class", None), "model_type", None)
        if model_type not in self.family.types:
            self.remove()
            raise ValueError(
                f"the family {self.family.name!r} is for the model types {self.family.types}, and {model.__name__} has "
                f"the type {model_type!r}: name it in types="
            )
        return model


def register(family: Family) -> Registration:
    """Make a family known to all of the library, in this process: to sites, to trees of prefixes and to baking.

    Args:
        family: its entry. `known_families()` lists what is there, and `dataclasses.replace` makes one of another.

    Returns:
        What takes it back, by `remove` or as a context manager; also a decorator for the class of the model.

    Raises:
        TypeError: something that is no Family, or a string where there must be a tuple of them.
        ValueError: the entry says nothing, names a part that its blocks do not have, or says again what another says.

    Example:
        >>> import repe
        >>> mine = repe.models.Family("mine", types=("mine",), parts=("attn ffn norm",), attention="attn", mlp="ffn")
        >>> with repe.models.register(mine):
        ...     repe.models.known_families()[-1].name
        'mine'
    """
    _check_sense(family)
    for other in _FAMILIES:
        _check_new(family, other)
    _FAMILIES.append(family)
    return Registration(family)


def _check_sense(family: Family) -> None:
    if not isinstance(family, Family):
        raise TypeError(f"expected a Family, got {family!r:.200}")
    start = f"the family {family.name!r}"
    for name in ("types", "parts", "last", "final_norms", "bias_settings"):
        if isinstance(value := getattr(family, name), str):
            raise TypeError(f"{start}: {name}={value!r} is one string, and a tuple is expected: ({value!r},)")
    if not family.types and not (family.by_parts and family.parts):
        raise ValueError(f"{start} would hold for no model: name its types=, or its parts= and by_parts=True")
    if unknown := family.without.keys() - {"attention", "mlp", "bake"}:
        raise ValueError(f"{start}: without={sorted(unknown)} is not known: say it of 'attention', 'mlp' or 'bake'")
    for name in ("attention", "mlp", "closing_norm"):
        part = getattr(family, name).split(".")[0]
        if part and not all(part in names for names in family.arrangements or [frozenset()]):
            raise ValueError(f"{start}: {name}={getattr(family, name)!r} is not in all of its parts={family.parts}")


def _check_new(family: Family, other: Family) -> None:
    if family.name == other.name:
        raise ValueError(f"there is a family {other.name!r} already: choose another name, or take that one back")
    both = [" ".join(sorted(parts)) for parts in {*family.arrangements} & {*other.arrangements}]
    if both and (types := sorted({*family.types} & {*other.types})):
        raise ValueError(f"the family {other.name!r} says what blocks of {both[0]!r} do in models of type {types[0]!r}")
    if both and family.by_parts and other.by_parts:
        raise ValueError(
            f"the family {other.name!r} says already what blocks of {both[0]!r} do in any model: leave out by_parts=, "
            "and name the types= that do something else"
        )


for _family in _TABLE:
    register(_family)


# trees of prefixes

MASKED_BY_ADDING = ("eager", "sdpa")
LAYER_TYPES = {"full_attention", "sliding_attention"}


def types_on_trees() -> frozenset[str]:
    """The model types that are exact on trees of prefixes."""
    return frozenset(model_type for family in _FAMILIES if family.trees for model_type in family.types)


def obstacle_to_trees(config: Any) -> str:
    """Why models of a config are not exact on trees of prefixes, as the end of a sentence, or "" if they are."""
    model_type, attention = getattr(config, "model_type", None), getattr(config, "_attn_implementation", None)
    if types := layer_types(config) - LAYER_TYPES:
        return f"it has layers of {', '.join(sorted(types))}, which do not look at a mask of ancestors"
    if getattr(config, "alibi", False):
        return "its attention counts columns (ALiBi), and in a tree they are not places"
    if turning_point(config) is not None:
        return "its rotary embedding depends on the longest text of a batch"
    if model_type not in types_on_trees():
        return f"model type {model_type!r} is not among those that are known to be exact on trees"
    if attention not in MASKED_BY_ADDING:
        return f"its attention is {attention!r}, and only {' and '.join(MASKED_BY_ADDING)} take a mask of ancestors"
    return ""


def turning_point(config: Any) -> int | None:
    """The length beyond which the longest text of a batch decides how all of it is rotated; None where nothing does."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else ropes.values():  # which may be one a type of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic"):
            trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            return min(int(trained), config.max_position_embeddings)
    return None


def layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())
