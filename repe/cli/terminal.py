"""How commands speak: what they found on standard output, all else on standard error, a line each; and how they end.

A command is a function that returns an `Answer`. Registered with `command`, it gets `--json` and `--debug` beside its
own options. Exit codes: 0, 1 where a request failed or what was checked is bad, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from shutil import get_terminal_size
from typing import Annotated, Any, get_args, get_type_hints

import typer

from repe.display import ENDLESS, visible

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; so does REPE_DEBUG=1.")]
ADDED = {"as_json": AsJson, "debug": Debug}

NARROWEST = 40  # columns
COLOURS = re.compile(r"(\x1b\[[\d;]*m)")

Command = Callable[..., Any]


@dataclass(frozen=True)
class Answer:
    """What a command found: data for machines, text for people, and whether what it checked is bad."""

    data: Any
    text: str
    bad: bool = False


def command(app: typer.Typer, name: str | None = None, **settings: Any) -> Callable[[Command], Command]:
    """Register a function as a command that prints what it returns."""

    def register(function: Command) -> Command:
        shared = ADDED.keys() & inspect.signature(function).parameters.keys()

        @wraps(function)
        def run(**options: Any) -> None:
            common = {option: options.pop(option) for option in ADDED}
            with speaking(common["debug"]):
                answer = function(**options, **{option: common[option] for option in shared})
                if answer is not None:
                    print(document(answer.data) if common["as_json"] else shown(answer.text))
            if answer is not None and answer.bad:
                raise typer.Exit(1)

        options = options_in(function)
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name, **settings)(run)

    return register


def options_in(function: Command) -> list[inspect.Parameter]:
    """A command's own parameters, those that a `**name: Unpack[...]` stands for, and what all commands have."""
    hints = get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters.values()
    found = {p.name: p.replace(annotation=hints[p.name]) for p in own if p.kind is not p.VAR_KEYWORD}
    spread = [get_args(hints[p.name])[0] for p in own if p.kind is p.VAR_KEYWORD]
    added = {name: kind for options in spread for name, kind in get_type_hints(options, include_extras=True).items()}
    for name, kind in {**added, **ADDED}.items():
        option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        found.setdefault(name, option)
    return [*found.values()]


# how they begin and end


def open_streams() -> None:
    """Give a program that was started with closed streams others: else its next files would take their numbers.

    Raises:
        SystemExit: standard output is closed, which somebody would have to read.
    """
    is_deaf = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the program
    if is_deaf:
        say("error: standard output is closed: leave it open, or send it to /dev/null")
        raise SystemExit(1)


@contextmanager
def speaking(debug: bool = False) -> Iterator[None]:
    """Warnings and errors are a line each on standard error, and an error ends the command."""
    try:
        with warnings_in_lines():
            yield
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        complain(error, debug)
        raise typer.Exit(1) from None


def complain(error: Exception, debug: bool = False) -> None:
    """Say what failed in one line, after a traceback if one is wanted."""
    if debug or os.environ.get("REPE_DEBUG"):
        print(visible("".join(traceback.format_exception(error))), file=sys.stderr)
    say(f"error: {told(error)}")


def told(error: Exception) -> str:
    """What an error says, in one line."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return one_line(str(said)) or type(error).__name__


def say(what: str) -> None:
    """A line to the person at the terminal, which is no part of what was asked for."""
    print(f"repe: {visible(what)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Every warning of the library is a line, the first time it is given; those for programmers are left out."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("default", category)
        warnings.showwarning = show
        yield


# what they print


def document(data: Any, indent: int | None = 2) -> str:
    """A JSON document of whatever a command found, in which nothing steers a terminal."""
    written = json.dumps(plain(data), indent=indent, ensure_ascii=False, allow_nan=False)
    return visible(written, spared="\n", coded=lambda letter: json.dumps(letter)[1:-1])


def shown(text: str) -> str:
    """What a command found as a terminal may have it: whatever files and names bring along, it only sets colours."""
    parts = COLOURS.split(text) if wants_colour() else [text]
    return "".join(part if number % 2 else visible(part) for number, part in enumerate(parts))


def plain(value: Any) -> Any:
    """Plain JSON data; what is no finite number is null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def width() -> int:
    """How many columns a line may have: those of the terminal, and as many as it needs elsewhere."""
    return max(get_terminal_size().columns, NARROWEST) if sys.stdout.isatty() else ENDLESS


def is_watched() -> bool:
    """Whether somebody sees standard error, so that progress is worth showing."""
    return sys.stderr.isatty()


def wants_colour() -> bool:
    """Whether standard output is a terminal whose user did not ask for plain text (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
