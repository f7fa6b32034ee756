"""The vectors that are stored, as `repe vectors` lists, shows and verifies them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repe.cli import arguments as ask
from repe.cli.terminal import Answer, command, told
from repe.display import table, visible

if TYPE_CHECKING:
    from repe.reading.vector import ConceptVector

COLUMNS = ("accuracy", "separation", "scale", "sigma", "norm")

app = typer.Typer(help="List, show and verify the stored vectors.", no_args_is_help=True, rich_markup_mode=None)


@command(app, "list")
def list_() -> Answer:
    """List the vectors that are shipped, in the folders of REPE_VECTORS, and in the cache (REPE_CACHE)."""
    from repe.reading.vector import ConceptVector

    data, rows = [], []
    for home, path in files():
        try:
            vector = ConceptVector.load(path)
        except ValueError as error:
            data.append({"concept": path.stem, "from": home, "file": path, "fault": told(error)})
            rows.append([path.stem, "broken: see repe vectors verify", "", "", home, path])
            continue
        data.append({**about(vector), "from": home, "file": path})
        best = ", ".join(f"block {block}" for block in vector.recommended)
        accuracy = ", ".join(f"{vector.accuracy[vector.row(block)]:.3f}" for block in vector.recommended)
        rows.append([vector.concept, vector.provenance.get("model", "?"), best, accuracy, home, path])
    heads = ["concept", "model", "best", "accuracy", "from", "file"]
    return Answer(data, str(table("", heads, rows)) if data else "no vector is stored yet: repe extract makes one")


@command(app)
def show(
    vector: Annotated[str, typer.Argument(help="A file, or the name of a concept of which vectors are stored.")],
) -> Answer:
    """Show a vector, block by block, and how it was made."""
    from repe.reading.vector import ConceptVector

    paths = [path for _, path in files() if path.stem == vector] or [Path(vector)]
    found = [(ConceptVector.load(path), path) for path in paths]
    data = [{**about(v), "file": path} for v, path in found]
    shown = (f"{path}\n{v.text()}\n{provenance(v)}" for v, path in found)
    return Answer(data, "\n\n".join(shown))


@command(app)
def verify(vectors: ask.Files = None, model: ask.Model = None, device: ask.Device = None) -> Answer:
    """Check that vectors are whole and, with --model, that they are of its weights, its templates and its pairs.

    Without files, the stored ones are checked, and with --model those of its weights. Exits with 1 if one is bad.
    """
    from repe.reading.vector import has_digest

    loaded, tokenizer = (None, None) if model is None else ask.load(model, device)
    named = vectors or [path for _, path in files()]
    checked = {path: fault(path, loaded, tokenizer, passing=not vectors) for path in named}
    found = {path: said for path, said in checked.items() if said is not None}
    data = [
        {"file": path, "good": not said, "fault": said, "verified": not said and has_digest(path)}
        for path, said in found.items()
    ]
    lines = [f"{'bad ' if said else 'good'}  {path}{said and f': {said}'}" for path, said in found.items()]
    bare = [row["file"] for row in data if row["good"] and not row["verified"]]
    told = [f"unverified, as they hold no digest of their numbers: {len(bare)}, such as {bare[0]}"] if bare else []
    text = "\n".join([*lines, *told])
    return Answer(data, text or "there is no vector to check", bad=any(found.values()))


def files() -> Iterator[tuple[str, Path]]:
    """The files of stored vectors, each with where it comes from."""
    from repe.models.cache import models_folder
    from repe.reading.store import cache_folder, shipped_folder

    yours = [Path(folder).expanduser() for folder in os.environ.get("REPE_VECTORS", "").split(os.pathsep) if folder]
    homes = [("package", shipped_folder()), *(("REPE_VECTORS", folder) for folder in yours), ("cache", cache_folder())]
    for home, folder in homes:
        found = sorted(folder.rglob("*.safetensors"))
        yield from ((home, path) for path in found if path.is_file() and not path.is_relative_to(models_folder()))


def fault(path: Path, model: Any, tokenizer: Any, passing: bool) -> str | None:
    """What is wrong with a vector, in a line, or nothing; None where `passing` passes over one of another model."""
    from repe.data.catalogue import concept_of, has
    from repe.models.fingerprint import agrees, fingerprint, strangeness
    from repe.models.load import home_of
    from repe.reading.extract import digest_of, rendering_of
    from repe.reading.vector import ConceptVector

    try:
        vector = ConceptVector.load(path)
    except (ValueError, OSError) as error:
        return told(error)
    if model is None:
        return ""
    made = vector.provenance
    theirs, mine = made.get("fingerprint"), fingerprint(model)
    if not agrees(theirs, mine):
        return (
            None if passing else f"it is of {strangeness(theirs, mine)}: {made.get('model', 'it does not name them')}"
        )
    if made.get("rendering", rendering_of(tokenizer)) != rendering_of(tokenizer):
        return "the model's chats are rendered otherwise than when it was made: extract it anew"
    home = home_of(model)
    pairs = digest_of(concept_of(vector.concept, home).pairs) if has(vector.concept, home) else None
    if pairs and made.get("pairs_digest", pairs) != pairs:
        return "it is of other pairs than the concept's file now has: extract it anew, or give it another name"
    return ""


def about(vector: ConceptVector) -> dict[str, Any]:
    """A vector as plain data, without its directions."""
    names = ("concept", "site", "stack", "d_model", "blocks", "recommended", *COLUMNS, "provenance")
    return {name: getattr(vector, name) for name in names}


def provenance(vector: ConceptVector) -> str:
    """What a vector was made of, beside what it shows itself."""
    from repe.reading.vector import TOLD

    hidden = (*TOLD, "fingerprint", "pairs_digest", "rendering")
    return visible("\n".join(f"{name}: {value}" for name, value in vector.provenance.items() if name not in hidden))
