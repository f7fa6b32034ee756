"""A person at the terminal, line by line, in conversation with a model that is steered."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from repe.cli.terminal import complain, document, told
from repe.display import visible

if TYPE_CHECKING:
    from repe.cli.conversation import Conversation
    from repe.reading.vector import ConceptVector

HELP = """\
/alpha                   the strengths
/alpha CONCEPT NUMBER    steers along a concept, as in /alpha honesty 1.5; 0 is off
/off                     steers along nothing any more
/again                   asks the last question again, in place of its answer
/system TEXT             sets the system message; without a text, there is none
/reset                   begins anew, with the strengths and the system message as they are
/help                    this
/quit                    ends, as Ctrl-D does. Ctrl-C stops an answer"""


class Talk:
    """A person's lines to a conversation: those that begin with / are commands, all others are said to the model.

    With `as_json` every answer, note and error is a JSON object of one line; otherwise answers come as they are
    written.
    """

    def __init__(
        self,
        conversation: Conversation,
        vector_of: Callable[[str], ConceptVector],
        as_json: bool = False,
        debug: bool = False,
    ) -> None:
        self.conversation, self.vector_of, self.as_json, self.debug = conversation, vector_of, as_json, debug
        self.over = False

    def run(self) -> None:
        """Takes lines from standard input until they end, or one says so."""
        if sys.stdin.isatty() and not self.as_json:
            self._note("/help lists what else can be said; Ctrl-D ends")
        while not self.over and (line := self._line()) is not None:
            try:
                self.take(line.strip())
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

    def take(self, line: str) -> None:
        """One line of the person's."""
        if not line.startswith("/"):
            return self._ask(line) if line else None
        word, _, rest = line[1:].partition(" ")
        command = getattr(self, f"_do_{word}", None)
        if command is None:
            raise ValueError(f"there is no command /{word}: /help lists them")
        return command(rest.strip())

    def steer(self, name: str, alpha: float) -> None:
        """Changes a strength, or begins to steer along a concept, whose vector is looked for."""
        known = self.conversation.knows(name)
        self.conversation.steer(name, alpha, None if known else self.vector_of(name))

    # the commands

    def _do_alpha(self, rest: str) -> None:
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

    def _do_off(self, rest: str) -> None:
        self.conversation.unsteer()
        self._note(f"nothing is steered{self._consequence()}")

    def _do_again(self, rest: str) -> None:
        said = self.conversation.messages
        if not (question := self.conversation.take_back()):
            raise ValueError("nothing was asked yet")
        try:
            self._ask(question)
        except BaseException:
            self.conversation.messages = said
            raise

    def _do_system(self, rest: str) -> None:
        self.conversation.system = rest
        self._note("the system message is set" if rest else "there is no system message")

    def _do_reset(self, rest: str) -> None:
        self.conversation.reset()
        self._note("begun anew")

    def _do_help(self, rest: str) -> None:
        self._note(HELP)

    def _do_quit(self, rest: str) -> None:
        self.over = True

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
            print(f"({text})" if "\n" not in text else text, flush=True)

    def _line(self) -> str | None:
        """The next line; None where there is none any more."""
        watched = sys.stdin.isatty()
        strengths = "".join(f"{name} {alpha:+g} " for name, alpha in self.conversation.acting)
        while True:
            try:
                return input(f"{strengths}> " if watched and not self.as_json else "")
            except EOFError:
                return print() if watched else None
            except KeyboardInterrupt:
                if not watched:
                    raise
                print("\n(Ctrl-D or /quit ends)", flush=True)


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, which is not raised but for the second time."""
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
