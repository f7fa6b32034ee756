"""What commands are told: their options, how these complete themselves, and what they mean to the library.

What can be chosen (kinds of edit, units, scopes, readers) is listed where it is made, and asked for when it is needed:
help and names load nothing heavy.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from repe.cli.terminal import is_watched

if TYPE_CHECKING:
    from repe.steering.edit import Edit

LONGEST = 256  # tokens of an answer
MOST_ALPHAS = 1000

# completion


def _concepts(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from repe.data.catalogue import concepts

    return [*concepts(home(ctx.params.get("model"))).items()]


def _strengths(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return [(f"{name}=", what) for name, what in _concepts(ctx, incomplete)]


class Listed:
    """An option that is one of the names in a list of the library, which is read when it is needed."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def names(self) -> list[str]:
        return [*getattr(import_module(self.module), self.name)]

    def checked(self, text: str) -> str:
        """The text, if it is one of the names. Raises BadParameter if not, and names what is near."""
        if text not in (names := self.names()):
            near = "".join(f"did you mean {name}? " for name in get_close_matches(text, names, n=1))
            raise typer.BadParameter(f"got {text!r}: {near}There are {', '.join(names)}")
        return text


KINDS = Listed("repe.steering.kinds", "KINDS")
UNITS = Listed("repe.steering.kinds", "UNITS")
SCOPES = Listed("repe.steering.scope", "NAMED_SCOPES")
SITES = Listed("repe.models.blocks", "SITES")
READERS = Listed("repe.reading.readers", "NAMES")


# what texts mean


def blocks_of(text: str) -> Any:
    """Numbers, "auto" or "all". Raises BadParameter for what names no blocks."""
    return text if text in ("auto", "all") else _numbers(text, int, "auto, all, or numbers as in 2,3")


def scope_of(text: str) -> Any:
    """A name, a slice or positions. Raises BadParameter for what is none of them."""
    if text[:1].isalpha():
        return SCOPES.checked(text)
    expected = "a name as in answer, a slice as in 2:-1, or positions as in 0,1"
    if ":" not in text:
        return _numbers(text, int, expected)
    bounds = [_numbers(bound, int, expected)[0] if bound else None for bound in text.split(":")]
    if len(bounds) > 3:
        raise typer.BadParameter(f"got {text!r}: expected {expected}")
    return slice(*bounds)


def alphas_of(text: str) -> list[float]:
    """Strengths from -2,0,2 or from -4:4:33, which are 33 from -4 to 4. Raises BadParameter for what is neither."""
    expected = "numbers as in -2,0,2, or from:to:how many, as in -4:4:33"
    if ":" not in text:
        return _numbers(text, float, expected)
    low, high, count = [*_numbers(text.replace(":", ","), float, expected), 0.0, 0.0][:3]
    if text.count(":") != 2 or not (2 <= count <= MOST_ALPHAS and count == int(count)):
        raise typer.BadParameter(f"got {text!r}: expected {expected}, and 2 to {MOST_ALPHAS} of them")
    return [low + (high - low) * i / (count - 1) for i in range(int(count))]


def strength_of(text: str) -> tuple[str, float]:
    """A concept and its alpha. Raises BadParameter for what is no CONCEPT=ALPHA."""
    name, _, alpha = text.rpartition("=")
    if not name:
        raise typer.BadParameter(f"got {text!r}: expected CONCEPT=ALPHA, as in honesty=1.5")
    return name, _numbers(alpha, float, "a number behind the =, as in honesty=1.5")[0]


def each_once(strengths: list[tuple[str, float]] | None) -> list[tuple[str, float]] | None:
    """The strengths. Raises BadParameter for two of one concept."""
    names = [name for name, _ in strengths or ()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise typer.BadParameter(f"{twice[0]} is given more than one strength: give one, which may be their sum")
    return strengths


def _numbers(text: str, kind: Any, expected: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"got {text!r}: expected {expected}") from None


# options

A_CONCEPT = "A name, a file of pairs, or a vector."
A_TASK = "a task's name or a file."
# fmt: off
Model = Annotated[str | None, typer.Option(
    "--model", "-m", metavar="MODEL",
    help="A local folder, a .gguf file, smollm2, or a name on the hub. [default: the testbed in the package]")]
Device = Annotated[str | None, typer.Option(
    metavar="NAME", help="cpu, cuda, cuda:1, ... [default: cuda where there is one]")]
Concept = Annotated[str, typer.Argument(metavar="CONCEPT", help=A_CONCEPT, autocompletion=_concepts)]
ConceptToRead = Annotated[str, typer.Option(
    "--concept", "-c", "--vector", metavar="CONCEPT", help=A_CONCEPT, autocompletion=_concepts)]
Pairs = Annotated[str, typer.Argument(metavar="CONCEPT", help="A name, or a file of pairs.", autocompletion=_concepts)]
Texts = Annotated[list[str] | None, typer.Argument(
    metavar="TEXT", help="Texts; - takes them from standard input, one a line.")]
TextFile = Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="A file of texts, one a line.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="A system message.")]
Steer = Annotated[list[Any] | None, typer.Option(
    "--steer", "-s", metavar="CONCEPT=ALPHA", autocompletion=_strengths, parser=strength_of, callback=each_once,
    help="What to steer along, as in honesty=1.5, or a plane as in honesty+happiness=1; may be repeated.")]
Alphas = Annotated[Any, typer.Option(metavar="ALPHAS", help="As in -2,0,2, or from:to:how many.", parser=alphas_of)]
Kind = Annotated[str | None, typer.Option(
    metavar="KIND", autocompletion=KINDS.names, parser=KINDS.checked,
    help="What is done to the activations, such as add (the default), ablate or clamp: repe edits lists all.")]
Scope = Annotated[Any, typer.Option(
    metavar="SCOPE", autocompletion=SCOPES.names, parser=scope_of,
    help="The tokens: all (the default), prompt, answer (the last of the prompt and all after it), ..., a slice as in "
         "2:-1, or positions as in 0,1,-1.")]
Blocks = Annotated[Any, typer.Option(
    metavar="BLOCKS", parser=blocks_of,
    help="Numbers as in 2,3; all; or for edits auto (their default), which are those that the vector recommends.")]
Unit = Annotated[str | None, typer.Option(
    metavar="UNIT", autocompletion=UNITS.names, parser=UNITS.checked,
    help="What alpha counts, such as kl (the default: 1 costs 0.1 nats a token) or gap.")]
Site = Annotated[str | None, typer.Option(
    metavar="SITE", autocompletion=SITES.names, parser=SITES.checked,
    help="Where in the model: block (the default: the residual stream), attention, mlp, ...")]
Reader = Annotated[str | None, typer.Option(
    metavar="READER", autocompletion=READERS.names, parser=READERS.checked,
    help="How the direction is fitted. [default: mean]")]
Readers = Annotated[Any, typer.Option(
    metavar="READERS", parser=lambda text: [*map(READERS.checked, text.split(","))],
    help="That are compared, as in mean,probe. [default: mean,pca,probe]")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, metavar="TOKENS", help="The longest answer.")]
Temperature = Annotated[float | None, typer.Option(
    min=0.0, metavar="NUMBER", help="0 for the likeliest token always. [default: as the model is set up]")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]
Alignment = Annotated[str | None, typer.Option(
    metavar="TASK", help=f"Items of behaviour: {A_TASK} [default: CONCEPT]")]
Skills = Annotated[str, typer.Option(metavar="TASK", help=f"Items with one right answer: {A_TASK}")]
Neutral = Annotated[str, typer.Option(metavar="TASK", help=f"Texts on which the divergence is measured: {A_TASK}")]
Letters = Annotated[bool, typer.Option(help="Ask items for an option's letter where they do, not in words.")]
AllItems = Annotated[bool, typer.Option(
    "--all-items", help="Measure also on items that tell nothing, as their answer does not follow or cannot move.")]
Requests = Annotated[str, typer.Option(
    metavar="TASK", help="Pairs of requests, by which it is told what becomes of refusing; none for none.")]
Budget = Annotated[float, typer.Option(help="The share of helpfulness that may be lost.")]
Files = Annotated[list[Path] | None, typer.Argument(
    metavar="FILE", help="Vector files. [default: all that are stored]")]
# fmt: on


class Editing(TypedDict, total=False):
    """The options of an edit, as a command takes them with `**editing: Unpack[Editing]`."""

    edit: Kind
    scope: Scope
    blocks: Blocks
    unit: Unit
    target: Annotated[float | None, typer.Option(metavar="NUMBER", help="The score to set, for a clamp.")]
    theta: Annotated[float | None, typer.Option(metavar="RADIANS", help="The angle to rotate by, or to set.")]
    keep_norm: Annotated[bool | None, typer.Option("--keep-norm", help="Give every edited activation back its norm.")]


# what they mean


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; the library has defaults for the rest."""
    return {option: value for option, value in options.items() if value is not None}


def writing_of(max_new_tokens: int, temperature: float | None) -> dict[str, Any]:
    """What `generate` is told; at temperature 0 the settings of sampling are left out, which it would warn of."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature == 0:
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return options if temperature is None else options | {"do_sample": True, "temperature": temperature}


def unless_none(task: str) -> str | None:
    """The task, or None for the word."""
    return None if task == "none" else task


def texts_of(texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The texts of the command line, of standard input and of a file. Raises BadParameter if there are none."""
    found: list[str] = []
    for text in texts or ():
        found += sys.stdin.read().split("\n") if text == "-" else [text]
    if file is not None:
        found += file.read_text(encoding="utf-8-sig").split("\n")
    if not (found := [text for text in found if text.strip()]):
        raise typer.BadParameter("give at least one text, - for standard input, or --file", param_hint="TEXT")
    return found


def chat_of(text: str, system: str) -> list[dict[str, str]]:
    """What a user says, behind a system message if there is one."""
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]


# models and vectors


def home(model: str | None) -> Path | None:
    """The folder of a model, of which nothing is loaded; None for a name."""
    folder = folder_of(model)
    if not os.path.isabs(folder):
        return None
    return Path(folder).parent if os.path.isfile(folder) else Path(folder)


def folder_of(model: str | None) -> str:
    """The folder or the GGUF file of a model, or its name. Raises FileNotFoundError for one that is not there.

    What can only be a path is not looked for on the hub.
    """
    if model is None:
        from repe.testbed import FOLDER

        return os.fspath(FOLDER)
    from repe.models.named import NAMED

    path = os.path.abspath(os.path.expanduser(model))
    if model not in NAMED and (os.path.isdir(path) or (model.endswith(".gguf") and os.path.isfile(path))):
        return path
    if model.startswith((os.sep, "~", ".")) or model.endswith(".gguf") or model.count("/") > 1:
        raise FileNotFoundError(
            f"there is no model folder or file {model}: give a folder, a .gguf file, or a name on the hub"
        )
    return model


def load(model: str | None, device: str | None = None) -> tuple[Any, Any]:
    """A model on its device, and its tokenizer."""
    name = None if model is None else folder_of(model)

    import torch

    from repe.models.load import load

    loaded, tokenizer = load(name)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def load_tokenizer(model: str | None) -> Any:
    """The tokenizer alone, where the weights are not asked for."""
    name = folder_of(model)

    from repe.models.load import load_tokenizer

    return load_tokenizer(name)


def vector_of(model: Any, tokenizer: Any, concept: str) -> Any:
    """The vector in a file, of the pairs in a file, or of a name."""
    from repe.data.concept import SUFFIXES
    from repe.reading.extract import extract
    from repe.reading.store import resolve
    from repe.reading.vector import ConceptVector

    if concept.endswith(".safetensors"):
        return ConceptVector.load(concept)
    if concept.endswith(SUFFIXES):
        return extract(model, tokenizer, concept, progress=is_watched())
    with nullcontext() if is_watched() else redirect_stderr(io.StringIO()):  # it shows its progress to everyone
        return resolve(model, concept, tokenizer)


def edit_of(model: Any, tokenizer: Any, concept: str, **options: Any) -> Edit:
    """The edit along a concept, or along several with a + between them, which span a plane."""
    from repe.steering.edit import Edit

    names = [concept] if os.path.exists(concept) else concept.split("+")
    return Edit.of([vector_of(model, tokenizer, name) for name in names], **options)


@contextmanager
def steering(model: Any, tokenizer: Any, strengths: Sequence[tuple[str, float]], **options: Any) -> Iterator[None]:
    """Steer a model along all these concepts meanwhile; a strength of 0 is none."""
    from repe.steering.steer import steer

    edits = [(edit_of(model, tokenizer, concept, **options), alpha) for concept, alpha in strengths]
    with ExitStack() as handles:  # once all are made: no vector is of a steered model
        for edit, alpha in edits:
            if alpha:
                handles.enter_context(steer(model, edit, alpha))
        yield
