"""A person at the terminal, line by line, in conversation with a model that is steered."""

from __future__ import annotations

import cmd
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from repe.cli.terminal import complain, document, told
from repe.display import table, visible

if TYPE_CHECKING:
    from repe.cli.conversation import Conversation
    from repe.steering.edit import Edit

END = "EOF"  # what `cmd` reads where there is no line any more


class Talk(cmd.Cmd):
    """A person's lines to a conversation: those that begin with / are commands, all others are said to the model.

    With `as_json` every answer, note and error is a JSON object of one line; otherwise answers come as they are
    written. The docstring of a command is what /help says of it.
    """

    def __init__(
        self,
        conversation: Conversation,
        edit_of: Callable[[str], Edit],
        as_json: bool = False,
        debug: bool = False,
    ) -> None:
        super().__init__()
        self.conversation, self.edit_of, self.as_json, self.debug = conversation, edit_of, as_json, debug

    def run(self) -> None:
        """Take lines from standard input until they end, or one says so."""
        watched = sys.stdin.isatty()
        if watched and not self.as_json:
            self._note("/help lists what else can be said; Ctrl-D ends")
        while True:
            try:
                self.cmdloop()
                return print() if watched else None
            except KeyboardInterrupt:
                if not watched:
                    raise
                print("\n(Ctrl-D or /quit ends)", flush=True)

    def onecmd(self, line: str) -> bool:
        """One line of the person's; whether it was the last."""
        try:
            return bool(super().onecmd(line.strip()))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self._note("stopped, and nothing of it is kept")
        except BrokenPipeError:  # nobody reads on
            raise
        except Exception as error:
            complain(error, self.debug)
            if self.as_json:
                print(document({"error": told(error)}, indent=None), flush=True)
        return False

    def steer(self, name: str, alpha: float) -> None:
        """Change a strength, or begin to steer along a concept, whose edit is looked for."""
        self.conversation.steer(name, alpha, self.conversation.edits.get(name) or self.edit_of(name))

    # how `cmd` reads a line

    @property
    def prompt(self) -> str:  # type: ignore[override]
        strengths = "".join(f"{name} {alpha:+g} " for name, alpha in self.conversation.acting)
        return f"{strengths}> " if sys.stdin.isatty() and not self.as_json else ""

    def parseline(self, line: str) -> tuple[str | None, str | None, str]:
        if line == END:
            return "quit", "", line
        word, _, rest = line[1:].partition(" ")
        return (word, rest.strip(), line) if line.startswith("/") else (None, None, line)

    def emptyline(self) -> bool:
        return False

    def default(self, line: str) -> None:
        if line.startswith("/"):
            raise ValueError(f"there is no command {line.partition(' ')[0]}: /help lists them")
        self._ask(line)

    def completedefault(self, text: str, line: str, begin: int, end: int) -> list[str]:
        return self.completenames(text) if line.startswith("/") and begin == 1 else []

    def complete_alpha(self, text: str, *_: Any) -> list[str]:
        from repe.data.catalogue import concepts

        return [name for name in concepts(self.conversation.model) if name.startswith(text)]

    # the commands

    def do_alpha(self, rest: str) -> None:
        """/alpha CONCEPT NUMBER: steer along a concept, as in /alpha honesty 1.5; alone, show strengths"""
        if not rest:
            alphas = self.conversation.alphas
            return self._note("\n".join(f"{name} {alpha:+g}" for name, alpha in alphas.items()) or "nothing is steered")
        name, _, number = rest.rpartition(" ")
        try:
            alpha = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"got /alpha {rest}: expected a concept and a number, as in /alpha honesty 1.5")
        self.steer(name, alpha)
        return self._note(f"{name} {alpha:+g}{self._consequence()}")

    def do_off(self, rest: str) -> None:
        """/off: steer along nothing any more"""
        self.conversation.unsteer()
        self._note(f"nothing is steered{self._consequence()}")

    def do_again(self, rest: str) -> None:
        """/again: ask the last question again, in place of its answer"""
        said = self.conversation.messages
        if not (question := self.conversation.take_back()):
            raise ValueError("nothing was asked yet")
        try:
            self._ask(question)
        except BaseException:
            self.conversation.messages = said
            raise

    def do_system(self, rest: str) -> None:
        """/system TEXT: set the system message; without a text, there is none"""
        self.conversation.system = rest
        self._note("the system message is set" if rest else "there is no system message")

    def do_reset(self, rest: str) -> None:
        """/reset: begin anew, with the strengths and the system message as they are"""
        self.conversation.reset()
        self._note("begun anew")

    def do_help(self, rest: str) -> None:
        """/help: show this"""
        commands = [name for name in self.get_names() if name.startswith("do_")]
        self._note(str(table("", ["", ""], [str(getattr(self, name).__doc__).split(": ", 1) for name in commands])))

    def do_quit(self, rest: str) -> bool:
        """/quit: end, as Ctrl-D does. Ctrl-C stops an answer"""
        return True

    def _consequence(self) -> str:
        if not (count := self.conversation.outdated):
            return ""
        return f"; the {count} cached tokens are of other strengths: rebuilt before the next answer"

    # what is said

    def _ask(self, question: str) -> None:
        conversation = self.conversation
        rebuilt = conversation.outdated
        if rebuilt and not self.as_json:
            strengths = ", ".join(f"{name} {alpha:+g}" for name, alpha in conversation.acting)
            self._note(f"rebuilding {rebuilt} cached tokens, steered by {strengths or 'nothing'}")
        with listening() as stopped:
            answer = conversation.ask(question, self._piece, stopped)
        if not self.as_json:
            return print("  (stopped)" if stopped() else "", flush=True)
        tokens = {"reused": conversation.reused, "read": conversation.read, "rebuilt": rebuilt}
        said = {"question": question, "answer": answer, "stopped": stopped(), "alphas": conversation.alphas}
        return print(document(said | {"tokens": tokens}, indent=None), flush=True)

    def _piece(self, text: str) -> None:
        if not self.as_json:
            print(visible(text), end="", flush=True)

    def _note(self, text: str) -> None:
        if self.as_json:
            print(document({"note": text}, indent=None), flush=True)
        else:
            print(visible(f"({text})" if "\n" not in text else text), flush=True)


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C was pressed, which is not raised but for the second time."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
