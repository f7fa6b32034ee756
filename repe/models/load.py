"""Loading: the testbed, a local folder or a model of the hub, by one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

TESTBED = Path(__file__).parents[1] / "testbed" / "model"

FOR_EVERY_FILE = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load(name_or_path: str | os.PathLike[str] | None = None, **options: Any) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Args:
        name_or_path: a local folder or a name on the hub; None for the testbed, which ships with the package.
        options: for `from_pretrained` of the model, such as `dtype` and `device_map`. Those that say where files come
            from, such as `revision`, `token`, `subfolder` and `trust_remote_code`, hold for config and tokenizer too.

    Returns:
        (model, tokenizer), as `transformers` loads them: nothing is wrapped. The model has its language-model head,
        unless it was trained without one.

    Raises:
        OSError: there is no such model.

    Example:
        >>> model, tokenizer = repe.load()
        >>> type(model).__name__, model.num_parameters()
        ('LlamaForCausalLM', 1537920)
    """
    path = os.fspath(TESTBED if name_or_path is None else name_or_path)
    if os.path.isdir(path):
        path = os.path.abspath(path)  # the model remembers it, and the working directory may change
    shared = {name: options[name] for name in FOR_EVERY_FILE if name in options}
    config = AutoConfig.from_pretrained(path, **shared)
    model = _kind(config).from_pretrained(path, **options).eval()
    return model, AutoTokenizer.from_pretrained(path, **shared)


def home_of(model: Any) -> Path | None:
    """The folder that a model was loaded from, whatever is wrapped around it; None for None.

    A name on the hub is none, and neither is a relative path, which looks like one: `load` makes it absolute.
    """
    modules = () if model is None else model.modules()
    names = (getattr(getattr(module, "config", None), "_name_or_path", "") for module in modules)
    name = next((name for name in names if name), "")
    return Path(name) if os.path.isabs(name) and os.path.isdir(name) else None


def _kind(config: Any) -> Any:
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
