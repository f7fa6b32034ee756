"""Which class of `transformers` loads a model with the head that it writes with."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def class_for(config: Any) -> Any:
    """The class that loads a model with the head it writes with, as its config and the tables of `transformers` say."""
    by_text = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kinds: tuple[Any, ...] = (by_text, AutoModelForImageTextToText)
    known = [kind for kind in kinds if type(config) in kind._model_mapping]
    if not config.architectures:
        is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
        return AutoModel if is_encoder or not known else known[0]
    if not config.is_encoder_decoder and not any(name.endswith(WRITING) for name in config.architectures):
        return AutoModel
    named = [kind for kind in known if _classes(kind, config) & set(config.architectures)]
    return [*named, *known, by_text][0]


def _classes(kind: Any, config: Any) -> set[str]:
    """The names of the classes that an `AutoModel` has for a config."""
    classes = kind._model_mapping[type(config)]
    return {c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))}
