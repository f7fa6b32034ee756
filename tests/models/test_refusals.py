"""What every verb refuses: numbers that are none, by the weights or dtype they come from, and what is no tokenizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor

import repe
from repe.cli.conversation import Conversation
from repe.data.items import Item
from repe.models.blocks import find_stack
from repe.reading import aimed, dosed
from tests import oracles, zoo

TEXTS = ["abc", "a longer text", "d"]
ITEMS = [Item(prompt, ("c", "dd"), number % 2) for number, prompt in enumerate(["ab", "ef", "gh", "ijk"])]
NEW = {"max_new_tokens": 2}


def steered(model: Any, tokenizer: Any, vector: Any) -> Any:
    with repe.steer(model, vector, 0.1):
        return repe.generate(model, tokenizer, TEXTS, **NEW)


VERBS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "capture": lambda m, t, v: repe.capture(m, t, TEXTS),
    "the mean of tokens": lambda m, t, v: repe.capture(m, t, TEXTS, tokens="mean"),
    "read": lambda m, t, v: repe.read(m, t, TEXTS, v),
    "extract": lambda m, t, v: repe.extract(m, t, oracles.worded_pairs(), writes=False),
    "check": lambda m, t, v: repe.check(m),
    "dosed": lambda m, t, v: dosed(m, t, v, TEXTS),
    "aimed": lambda m, t, v: aimed(m, t, v, ITEMS),
    "forecast": lambda m, t, v: repe.forecast(m, t, v, alignment=ITEMS, neutral=TEXTS),
    "sweep": lambda m, t, v: repe.measuring.sweep(m, t, v, {"items": ITEMS}, [1.0]),
    "costs": lambda m, t, v: repe.measuring.costs(m, t, v, TEXTS[:2], [0.0]),
    "tradeoff": lambda m, t, v: repe.tradeoff(m, t, v, [1.0], alignment=ITEMS, helpfulness=ITEMS, neutral=TEXTS[:2]),
    "write": lambda m, t, v: repe.measuring.write(m, t, v, TEXTS, [1.0], **NEW),
    "generate": lambda m, t, v: repe.generate(m, t, TEXTS, **NEW),
    "generate at random": lambda m, t, v: repe.generate(m, t, TEXTS, do_sample=True, **NEW),
    "generate while steered": steered,
    "chat": lambda m, t, v: Conversation(m, t, "", **NEW).ask("hi"),
}  # fmt: skip
OF_HIDDEN_STATES = ("capture", "the mean of tokens", "read", "extract")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "check"])
@pytest.mark.filterwarnings("ignore:.*torchvision")
def test_a_processor_is_told_to_give_its_tokenizer(tokenizer: Any, verb: str) -> None:
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer, chat_template=tokenizer.chat_template)
    model, vector = zoo.build("llava"), oracles.vector()
    with pytest.raises(TypeError, match=r"got LlavaProcessor: pass its own, `processor\.tokenizer`"):
        VERBS[verb](model, processor, vector)
    with pytest.raises(TypeError, match="got NoneType: is the order of the arguments right"):
        VERBS[verb](model, None, vector)
    assert not repe.status(model)


COUNTED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "capture": (lambda m, t, v, **k: repe.capture(m, t, TEXTS, **k), ["batch_size"]),
    "read": (lambda m, t, v, **k: repe.read(m, t, TEXTS, v, **k), ["batch_size"]),
    "extract": (lambda m, t, v, **k: repe.extract(m, t, oracles.worded_pairs(), **k), ["batch_size", "seed"]),
    "forecast": (lambda m, t, v, **k: repe.forecast(m, t, v, alignment=ITEMS, **k), ["items", "draws", "seed"]),
    "sweep": (lambda m, t, v, **k: repe.measuring.sweep(m, t, v, {"a": ITEMS}, [1.0], **k), ["batch_tokens"]),
    "costs": (lambda m, t, v, **k: repe.measuring.costs(m, t, v, TEXTS, [1.0], **k), ["batch_tokens"]),
    "tradeoff": (lambda m, t, v, **k: repe.tradeoff(m, t, v, [1.0], alignment=ITEMS, **k), ["controls"]),
    "calibrate": (lambda m, t, v, **k: repe.calibrate(m, t, oracles.worded_pairs(), **k), ["tried", "seed"]),
    "write": (lambda m, t, v, **k: repe.measuring.write(m, t, v, TEXTS, [1.0], **k), ["batch_size", "max_new_tokens"]),
    "generate": (lambda m, t, v, **k: repe.generate(m, t, TEXTS, **k), ["max_new_tokens"]),
    "side effects": (
        lambda m, t, v, **k: repe.measuring.side_effects(m, t, v, [1.0], **k),
        ["pairs", "max_new_tokens", "seed", "batch_size"],
    ),
}


@pytest.mark.parametrize("value", [-1, 1.5, "3", torch.nan, True, 10**30], ids=repr)
@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, (_, names) in COUNTED.items() for name in names])
def test_what_is_no_count_is_named_before_anything_is_run(
    model: Any, tokenizer: Any, verb: str, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value!r} must be a whole number, [01] at least"):
        COUNTED[verb][0](model, tokenizer, oracles.vector(), **{name: value})


@pytest.mark.parametrize("verb", VERBS)
def test_weights_that_are_no_numbers_are_named(tokenizer: Any, verb: str) -> None:
    model = zoo.build("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    named = "not finite, 1 with 'model.layers.2.mlp.down_proj.weight': load it from a file that is whole"
    with pytest.raises(OverflowError, match=named) as told:
        VERBS[verb](model, tokenizer, oracles.vector())
    assert ("block 2" in str(told.value)) == (verb in OF_HIDDEN_STATES)
    assert not repe.status(model)


@pytest.mark.parametrize("verb", VERBS)
def test_float16_that_ends_says_which_dtype_does_not(tokenizer: Any, verb: str) -> None:
    model = zoo.build("llama").half()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(60_000)
    with pytest.raises(OverflowError, match=r"in torch\.float16: load it in bfloat16 or float32") as told:
        VERBS[verb](model, tokenizer, oracles.vector())
    assert ("at the site 'block' of block 1," in str(told.value)) == (verb in OF_HIDDEN_STATES)


@pytest.mark.parametrize("tokens", ["last", "mean", "all"])
@pytest.mark.parametrize("family", ["gpt2", "falcon", "bert", "mamba"])
def test_only_what_is_kept_is_looked_at(tokenizer: Any, family: str, tokens: Any) -> None:
    model = zoo.build(family)
    block = find_stack(model).blocks[1]

    def spoil(hidden: torch.Tensor) -> torch.Tensor:
        spoilt = hidden.clone()
        spoilt[..., -1, 0] = torch.nan  # of the last column, which is padding but in the longest row
        return spoilt

    with oracles.changed(block, spoil):
        repe.capture(model, tokenizer, ["abc", "abcd"], blocks=0, tokens=tokens, packed=False)
        with pytest.raises(OverflowError, match="NaN at the site 'block' of block 1"):
            repe.capture(model, tokenizer, ["abc", "abcd"], tokens=tokens, packed=False)


def test_padding_may_be_anything(model: Any, tokenizer: Any) -> None:
    padded = torch.tensor([[False] * 9 + [True] * 6, [False] * 15])

    def spoil(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.masked_fill(padded[: len(hidden), :, None], torch.nan)

    texts = ["a" * 8, "a" * 14]
    with oracles.changed(find_stack(model).blocks[-1], spoil):
        for tokens in ("last", "mean", "all"):
            assert len(repe.capture(model, tokenizer, texts, tokens=tokens, packed=False)) == 2
