"""GGUF files: what one holds, as its first bytes say, and the ordinary model and tokenizer that are made of it.

The header is read here, so that what is no model, or not a whole one, is said before anything is loaded: metadata that
name the architecture, then a table of the tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The
weights are dequantised by `transformers`, with the package `gguf`.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DIRECTION = re.compile(r"direction\.\d+")


class Source(Protocol):
    """What a model is made of: a GGUF file, or what becomes one."""

    @property
    def title(self) -> str:
        """What the model is called."""

    @property
    def size(self) -> int:
        """Of the file, in bytes."""

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""

    def opened(self) -> AbstractContextManager[Path]:
        """The file, as long as it is read."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file in a place of the user's."""

    path: Path
    title: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def digest(self) -> str:
        return digest_of(self.path)

    def opened(self) -> AbstractContextManager[Path]:
        return nullcontext(self.path)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(path: Path, **options: Any) -> tuple[Any, Any]:
    """The model of a GGUF file, an ordinary one of dequantised weights, and its tokenizer.

    Args:
        path: the file.
        options: for `from_pretrained`; the weights are in float32 where no `dtype` is given.

    Raises:
        ValueError: the file is cut short, holds something else than a model, or one that `transformers` cannot read.
        ModuleNotFoundError: the package `gguf` is not installed.
    """
    import torch
    import transformers

    from repe.models.heads import class_for

    check(path)
    place = path.parent
    unpacked = getattr(transformers, "GgufConfig", None)  # of releases that would else keep weights packed on a GPU
    plain = {} if unpacked is None else {"quantization_config": unpacked(dequantize=True)}
    with _translated(path):
        config = transformers.AutoConfig.from_pretrained(place, gguf_file=path.name, trust_remote_code=False)
        model, found = class_for(config).from_pretrained(
            place, gguf_file=path.name, config=config, output_loading_info=True, trust_remote_code=False,
            **{"dtype": torch.float32, **plain, **options},
        )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path} lacks weights of a {config.model_type!r} model, such as {missing[0]}: give a file of all of them"
        )
    return _without_quantiser(model.eval()), read_tokenizer(path)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file, with its chat template. Raises as `read_model` does."""
    from transformers import AutoTokenizer

    check(path)
    with _translated(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)


def check(path: Path) -> None:
    """Raise ValueError unless the file is a whole model, and ModuleNotFoundError without what would read it."""
    found = Header.of(path)
    if found.kind != "model":
        raise ValueError(f"{path} holds no model, but a GGUF {found.kind}: give the file of a model")
    if found.metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {found.metadata['split.count']} files of a model: join them first, as "
            "`llama-gguf-split --merge` does, and give what comes out"
        )
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ModuleNotFoundError(
            f"{path} is a GGUF file, and the packages that read it are not installed: pip install 'repe-torch[gguf]'",
            name="gguf",
        )
    if (size := path.stat().st_size) < (needed := found.end()):
        raise ValueError(f"{path} is cut short: it has {size:,} bytes of {needed:,}. Fetch it again, to another place")


# the header


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself that it is GGUF."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        metadata: numbers and texts by name; of lists the length alone.
        tensors: for each its elements, its type's number and where it begins, by name.
        data: where in the file the tensors begin.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, int, int]]
    data: int

    @classmethod
    def of(cls, path: Path) -> Header:
        """Read the header of a file. Raises ValueError for what has none, or only a part of one."""
        size = path.stat().st_size
        with path.open("rb") as file:
            try:
                return cls._read(_Fields(file, size))
            except (struct.error, ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} is no whole GGUF file: {error}. It has {size:,} bytes; fetch it again, to another place"
                ) from error

    @classmethod
    def _read(cls, fields: _Fields) -> Header:
        if (magic := fields.bytes(4)) != MAGIC:
            raise ValueError(f"it begins with {magic!r}, expected {MAGIC!r}")
        if (version := fields.number("I")) not in VERSIONS:
            raise ValueError(f"its version is {version}, expected 2 or 3, in little-endian order")
        n_tensors, n_metadata = fields.number("Q"), fields.number("Q")
        metadata = {}
        for _ in range(n_metadata):
            name = fields.text()
            metadata[name] = fields.value(fields.number("I"))
        tensors = dict(fields.tensor() for _ in range(n_tensors))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        return cls(metadata, tensors, -(-fields.at // alignment) * alignment)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unnamed"))

    @property
    def kind(self) -> str:
        """Such as "model", "adapter", "control vector"."""
        if self.architecture == "controlvector" or (self.tensors and all(map(DIRECTION.fullmatch, self.tensors))):
            return "control vector"
        return str(self.metadata.get("general.type", "model"))

    def end(self) -> int:
        """How long the file is if it is whole."""
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): (count, n_bytes) for kind, (count, n_bytes) in GGML_QUANT_SIZES.items()}
        ends = [self.data]
        for elements, kind, begin in self.tensors.values():
            count, n_bytes = sizes.get(kind, (1, 0))
            ends.append(self.data + begin + elements // count * n_bytes)
        return max(ends)


class _Fields:
    """The fields of a header, one after the other. Raises ValueError where the file ends before one does."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def bytes(self, count: int) -> bytes:
        if self.at + count > self.size:
            raise ValueError("it ends within its header")
        self.at += count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            self.bytes(count * struct.calcsize(SCALARS[kind]))
        else:
            for _ in range(count):
                self.value(kind)
        return count

    def tensor(self) -> tuple[str, tuple[int, int, int]]:
        name = self.text()
        shape = [self.number("Q") for _ in range(self.number("I"))]
        return name, (prod(shape), self.number("I"), self.number("Q"))


# what transformers makes of it


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Say of which file `transformers` could not make a model or a tokenizer, and why."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
        import transformers

        raise ValueError(
            f"{path} cannot be read: it holds a model of the architecture {Header.of(path).architecture!r}, of which "
            f"transformers {transformers.__version__} says: {error}. Give a file of an architecture that it reads, or "
            "the model's folder of safetensors"
        ) from error


def _without_quantiser(model: Any) -> Any:
    """The model as an ordinary one, for its weights are: saved, compared and trained like any other."""
    for holder, names in ((model, ("hf_quantizer", "quantization_method")), (model.config, ("quantization_config",))):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
    vars(model).pop("is_quantized", None)
    for module in model.modules():
        vars(getattr(module, "config", model.config)).pop("_is_quantized", None)
    return model
