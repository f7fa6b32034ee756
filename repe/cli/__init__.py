"""The command line `repe`: what the library does, for texts and files. Heavy imports stand inside the commands."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Unpack

import typer

from repe.cli import arguments as ask
from repe.cli import stored
from repe.cli.terminal import Answer, Debug, command, is_watched, open_streams, speaking, wants_colour, width
from repe.display import table, visible
from repe.models.files import draft_of

HELP = """\
Representation engineering: read the concepts a language model represents, steer along them, measure the trade-off.

Start here; nothing is downloaded, the model is a small one inside the package:

\b
  repe concepts                                   what can be named
  repe read "I never took it." -c honesty         a score for every token
  repe generate "Name the trade of Abrin Tolva." -s honesty=1
  repe chat -s honesty=1                          and /alpha honesty -1 in between
  repe forecast honesty                           where writing works, without steering once
  repe tradeoff honesty --plot honesty.png        what a strength gains, and costs

With a model of your own (-m: a folder, a .gguf file, smollm2, or a name on the hub), from the idea to weights:

\b
  repe audit mine.json -m MODEL                   is it the wording, the length?
  repe extract mine.json -m MODEL -o mine.safetensors
  repe tradeoff mine.safetensors -m MODEL --alignment items.jsonl
  repe bake -s mine.safetensors=1.5 -m MODEL -o FOLDER

A CONCEPT is a name, a file of pairs (.json, .jsonl, .csv) or a vector (.safetensors). The strength alpha counts what it
costs: at 1 plain text diverges from the unsteered model by 0.1 nats a token, -1 goes the other way, 0 is off.
"""
MORE = "More: repe COMMAND --help. Commands, concepts and options complete themselves after repe --install-completion."

app = typer.Typer(help=HELP, epilog=MORE, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as of

        print(f"repe {of('repe-torch')}")
        raise typer.Exit


@command(app)
def concepts(model: ask.Model = None) -> Answer:
    """List the concepts that can be named.

    They are the library's, and those in a folder concepts/ beside the model's weights.
    """
    from repe.data.catalogue import concepts, find

    home = ask.home(model)
    found = concepts(home)
    data = [{"name": name, "description": what, "file": find(name, home)} for name, what in found.items()]
    return Answer(data, table("", ["", ""], found.items()).text(width()))


@command(app)
def edits() -> Answer:
    """List the kinds of edit, and the options that each takes."""
    from repe.steering.kinds import KINDS, options_of

    data = [
        {"kind": name, "options": sorted(options_of(name)), "description": str(kind.__doc__).partition("\n")[0]}
        for name, kind in KINDS.items()
    ]
    rows = [(row["kind"], " ".join(f"--{option}" for option in row["options"]), row["description"]) for row in data]
    return Answer(data, table("", ["", "", ""], rows).text(width()))


@command(app)
def audit(concept: ask.Pairs, model: ask.Model = None) -> Answer:
    """Check contrast pairs for what else a direction could be.

    That is the wording, the length, the last token, or texts that both sides of the split share.

    The model's tokenizer counts; the model is not run. Exits with 1 if something is to be mended.
    """
    from repe.data.audit import audit
    from repe.data.catalogue import concept_of

    found = audit(concept_of(concept, ask.home(model)), ask.load_tokenizer(model))
    return Answer(found, str(found), bad=bool(found.advice))


@command(app)
def extract(
    concept: ask.Pairs,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file. [default: CONCEPT.safetensors]")] = None,
    model: ask.Model = None,
    device: ask.Device = None,
    reader: ask.Reader = None,
    blocks: ask.Blocks = "all",
    site: ask.Site = None,
    held_out: Annotated[float, typer.Option(help="The share of templates and items held out.")] = 0.25,
    seed: ask.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a forward pass.")] = 32,
) -> Answer:
    """Make a concept's vector from contrast pairs.

    It is judged block by block on pairs that are held out, and saved.
    """
    loaded, tokenizer = ask.load(model, device)
    from repe.reading.extract import extract

    vector = extract(
        loaded, tokenizer, concept, blocks=blocks, held_out=held_out, seed=seed, batch_size=batch_size,
        progress=is_watched(), **ask.given({"reader": reader, "site": site}),
    )  # fmt: skip
    path = vector.save(out or f"{vector.concept}.safetensors")
    return Answer({**stored.about(vector), "file": path}, f"{vector.text()}\nsaved: {path}")


@command(app)
def read(
    texts: ask.Texts = None,
    *,
    concept: ask.ConceptToRead,
    file: ask.TextFile = None,
    model: ask.Model = None,
    device: ask.Device = None,
    chat: Annotated[bool, typer.Option("--chat", help="The texts are what a user says, up to the answer.")] = False,
    system: ask.System = "",
    blocks: ask.Blocks = "all",
    steer: ask.Steer = None,
) -> Answer:
    """Score every token of texts for a concept.

    The concept's poles stand at -1 and +1. Shown are the scores at the blocks that the vector recommends; --json has
    those of all --blocks.
    """
    given = ask.texts_of(texts, file)
    loaded, tokenizer = ask.load(model, device)
    from repe.reading.read import read

    vector = ask.vector_of(loaded, tokenizer, concept)
    asked: Any = [ask.chat_of(text, system) for text in given] if chat or system else given
    with ask.steering(loaded, tokenizer, steer or []):
        readings = read(loaded, tokenizer, asked, vector, blocks=blocks, progress=is_watched())
    data = [
        {
            "text": text,
            "concept": r.concept,
            "tokens": r.tokens,
            "blocks": r.blocks,
            "recommended": r.recommended,
            "sinks": r.sinks,
        }
        | {"best": r.best, "scores": r.scores}
        for text, r in zip(given, readings, strict=True)
    ]
    return Answer(data, "\n\n".join(reading.text(color=wants_colour()) for reading in readings))


@command(app)
def generate(
    texts: ask.Texts = None,
    steer: ask.Steer = None,
    file: ask.TextFile = None,
    model: ask.Model = None,
    device: ask.Device = None,
    system: ask.System = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the texts, and do not answer them as a chat.")] = False,
    max_new_tokens: ask.NewTokens = ask.LONGEST,
    temperature: ask.Temperature = None,
    seed: ask.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are answered together.")] = 16,
    **editing: Unpack[ask.Editing],
) -> Answer:
    """Answer texts, steered or not.

    A text is what a user says, where the model has a chat template; else it is continued.
    """
    given, strengths = ask.texts_of(texts, file), steer or []
    options, writing = ask.given(editing), ask.writing_of(max_new_tokens, temperature)
    loaded, tokenizer = ask.load(model, device)
    import torch
    from tqdm import tqdm

    from repe.models.generate import generate

    if raw and system:
        raise typer.BadParameter("a text that is continued has no system message", param_hint="--system")
    is_chat = not raw and bool(getattr(tokenizer, "chat_template", None) or system)
    asked: list[Any] = [ask.chat_of(text, system) for text in given] if is_chat else list(given)
    torch.manual_seed(seed)
    answers: list[str] = []
    with ask.steering(loaded, tokenizer, strengths, **options):
        for start in tqdm(range(0, len(asked), batch_size), "generate", disable=not is_watched() or len(asked) == 1):
            answers += generate(loaded, tokenizer, asked[start : start + batch_size], **writing)
    data = [{"text": text, "answer": answer} for text, answer in zip(given, answers, strict=True)]
    shown = [f"> {row['text']}\n{row['answer']}" for row in data] if len(data) > 1 else answers
    return Answer({"steering": dict(strengths), "answers": data}, visible("\n\n".join(shown)))


@command(app)
def chat(
    steer: ask.Steer = None,
    model: ask.Model = None,
    device: ask.Device = None,
    system: ask.System = "",
    max_new_tokens: ask.NewTokens = ask.LONGEST,
    temperature: ask.Temperature = None,
    seed: ask.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    debug: Debug = False,
    **editing: Unpack[ask.Editing],
) -> None:
    """Talk with a model, and steer it while you talk.

    /alpha honesty 1.5 changes a strength, and /help lists all such commands. Earlier turns stay cached; once a strength
    changes, they are run anew under it.
    """
    options, writing = ask.given(editing), ask.writing_of(max_new_tokens, temperature)
    loaded, tokenizer = ask.load(model, device)
    import torch

    from repe.cli.conversation import Conversation
    from repe.cli.talk import Talk

    torch.manual_seed(seed)
    conversation = Conversation(loaded, tokenizer, system, **writing)
    talk = Talk(conversation, lambda concept: ask.edit_of(loaded, tokenizer, concept, **options), as_json, debug)
    for concept, alpha in steer or []:
        talk.steer(concept, alpha)
    talk.run()


@command(app)
def forecast(
    concept: ask.Concept,
    model: ask.Model = None,
    device: ask.Device = None,
    readers: ask.Readers = None,
    plot: Annotated[Path | None, typer.Option(help="Where the picture goes: .png, .svg, .pdf.")] = None,
    alignment: ask.Alignment = None,
    neutral: ask.Neutral = "neutral",
    letters: ask.Letters = False,
    all_items: ask.AllItems = False,
    scope: ask.Scope = None,
    seed: ask.Seed = 0,
) -> Answer:
    """Forecast where steering works, and at what cost.

    Nothing is steered: gradients tell, for every block, what a dose gains on behaviour items, and where 1,000 random
    directions stand.
    """
    if plot is not None:
        check_picture(plot)
    loaded, tokenizer = ask.load(model, device)
    from repe.measuring.forecast import forecast

    of = ask.vector_of(loaded, tokenizer, concept) if concept.endswith(".safetensors") else concept
    found = forecast(
        loaded, tokenizer, of, alignment=alignment, neutral=neutral, letters=letters, all_items=all_items, seed=seed,
        progress=is_watched(), **ask.given({"readers": readers, "scope": scope}),
    )  # fmt: skip
    path = plot and drawn(found.plot, plot, (8, 4))
    data = {"best": found.best, "is_written": found.is_written, **vars(found), "picture": path}
    return Answer(data, f"{found}\npicture: {path}" if path else str(found))


@command(app)
def tradeoff(
    concept: ask.Concept,
    alphas: ask.Alphas = "-2,-1.5,-1,-.75,-.5,-.375,-.25,-.125,0,.125,.25,.375,.5,.75,1,1.5,2",
    model: ask.Model = None,
    device: ask.Device = None,
    plot: Annotated[Path | None, typer.Option(help="Where the picture goes: .png, .svg, .pdf.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where all scores go, as JSON.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A file that keeps what is measured; once broken off, it goes on from there.")
    ] = None,
    alignment: ask.Alignment = None,
    helpfulness: ask.Skills = "skills",
    neutral: ask.Neutral = "neutral",
    controls: Annotated[
        int | None,
        typer.Option(min=0, help="Random directions to steer along. [default: 4; 20 without a forecast]"),
    ] = None,
    budget: ask.Budget = 0.05,
    letters: ask.Letters = False,
    all_items: ask.AllItems = False,
    requests: ask.Requests = "requests",
    **editing: Unpack[ask.Editing],
) -> Answer:
    """Measure what steering gains, and what it costs.

    Prints behaviour and helpfulness over the strength, the fits, and the strength to use within the budget. Random
    directions, and the plain prompt where the concept has one, are measured beside it.
    """
    options = ask.given(editing)
    if plot is not None:
        check_picture(plot)
    loaded, tokenizer = ask.load(model, device)
    from repe.measuring.tradeoff import tradeoff

    curve = tradeoff(
        loaded, tokenizer, ask.vector_of(loaded, tokenizer, concept), alphas, alignment=alignment,
        helpfulness=helpfulness, neutral=neutral, controls=controls, letters=letters, all_items=all_items,
        requests=ask.unless_none(requests), resume=resume, progress=is_watched(), **options,
    )  # fmt: skip
    files = {
        "scores": out and curve.save(out),
        "picture": plot and drawn(partial(curve.plot, budget=budget), plot, (9, 6)),
    }
    best = curve.best(budget)
    data = {"concept": curve.concept, "curve": curve.columns, "fits": curve.fits, "best": best, "files": files}
    made = "".join(f"\n{what}: {path}" for what, path in files.items() if path)
    data |= {"left_out": curve.left_out, "side_effects": curve.side_effects, "provenance": curve.provenance}
    return Answer(data, f"{curve}\n\n{curve.fits}\n\nto use: {best}{made}")


@command(app)
def calibrate(
    concept: ask.Pairs,
    model: ask.Model = None,
    device: ask.Device = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the vector for more of it goes.")] = None,
    readers: ask.Readers = None,
    alignment: ask.Alignment = None,
    helpfulness: ask.Skills = "skills",
    neutral: ask.Neutral = "neutral",
    limit: Annotated[float, typer.Option(help="Of the divergence, in nats a token.")] = 1.0,
    budget: ask.Budget = 0.05,
    letters: ask.Letters = False,
    all_items: ask.AllItems = False,
    requests: ask.Requests = "requests",
    seed: ask.Seed = 0,
    **editing: Unpack[ask.Editing],
) -> Answer:
    """Choose reader, block and alpha together.

    They are chosen by what steering there does, for more and for less of the concept, and tested on other items.
    """
    options = ask.given({"readers": readers, **editing})
    loaded, tokenizer = ask.load(model, device)
    from repe.measuring.calibrate import calibrate

    found = calibrate(
        loaded, tokenizer, concept, alignment=alignment, helpfulness=helpfulness,
        neutral=neutral, limit=limit, budget=budget, letters=letters, all_items=all_items,
        requests=ask.unless_none(requests), seed=seed, progress=is_watched(), **options,
    )  # fmt: skip
    if out is not None and not found.more.alpha:
        raise ValueError(f"{found.more}, so there is no vector to save")
    path = out and found.more.vector.save(out)
    settings = {
        name: {
            "alpha": s.alpha,
            "trial": s.trial,
            "test": s.test,
            "trials": s.trials,
            "side_effects": s.side_effects,
        }
        for name, s in (("more", found.more), ("less", found.less))
    }
    data = {"concept": found.concept, "limit": limit, "budget": budget, **settings, "left_out": found.left_out}
    data |= {"file": path}
    return Answer(data, f"{found}\nsaved: {path}" if path else str(found))


@command(app)
def bake(
    steer: ask.Steer = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new model's folder.")],
    model: ask.Model = None,
    device: ask.Device = None,
    **editing: Unpack[ask.Editing],
) -> Answer:
    """Fold steering into a model's weights.

    What is saved is an ordinary checkpoint, which costs nothing more to run.
    """
    options = ask.given(editing)
    if not steer:
        raise typer.BadParameter("name what to bake, as in --steer honesty=1.5", param_hint="--steer")
    if out.exists():
        raise FileExistsError(f"{out} is there already, and what is in it stays: name another folder")
    loaded, tokenizer = ask.load(model, device)
    from repe.steering.bake import bake

    edits = [(ask.edit_of(loaded, tokenizer, concept, **options), alpha) for concept, alpha in steer]
    baked = [bake(loaded, edit, alpha) for edit, alpha in edits]
    with draft_of(out) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = {"folder": out, "steering": dict(steer), "edit": baked[0].edit.kind, "changed": [b.changed for b in baked]}
    return Answer(data, "\n".join([*map(repr, baked), f"saved: {out}"]))


app.add_typer(stored.app, name="vectors")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(ctx: typer.Context) -> None:
    """Measure what steering costs on this machine.

    repe bench --help lists its options.
    """
    with speaking():
        code = benchmarks().main(list(ctx.args))
    raise typer.Exit(code or 0)


def benchmarks() -> Any:
    try:
        return importlib.import_module("repe.bench")
    except ModuleNotFoundError as error:
        if error.name != "repe.bench":
            raise
        raise FileNotFoundError(
            "the benchmarks are not installed: they live in the repository, where `make bench` runs them"
        ) from None


# pictures


def check_picture(path: Path) -> None:
    """Raise BadParameter for a picture that could not be drawn once everything is measured."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise typer.BadParameter(f"{str(path)!r} is none of {', '.join(sorted(known))}", param_hint="--plot")


def drawn(plot: Callable[[Any], Any], path: Path, size: tuple[int, int]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    plot(figure.subplots())
    with draft_of(path) as draft:
        figure.savefig(draft, dpi=150)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. What the libraries below would say unasked is left out, unless the environment asks for it."""
    open_streams()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not is_watched():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    app(args=arguments, prog_name="repe")
