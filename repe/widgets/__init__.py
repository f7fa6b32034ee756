"""Widgets: a playground for notebooks, where a slider moved is seen in what the model writes, and in what it costs."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Unpack

try:
    import ipywidgets
except ImportError as error:
    raise ImportError(
        f"the playground needs a package that is not installed ({error}): pip install 'repe-torch[notebook]'"
    ) from error

from torch import nn

from repe.display import tokens
from repe.reading.store import resolve
from repe.reading.vector import ConceptVector
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.kinds import KINDS, options_of
from repe.steering.scope import NAMED_SCOPES
from repe.widgets.latest import IsStopped, Latest
from repe.widgets.streaming import Job, Side, SideBySide, Sides

READ_BY = ("as the model that writes it reads", "as the unsteered model reads")
STEP = 0.1  # of a slider
EVERY = 0.05  # seconds between two pictures of a text that grows
ABOUT_COSTS = (
    "Perplexity: of each text, for the unsteered model. KL: KL(unsteered || writer) of the next token, averaged over "
    "the tokens of each text. Both hold for these texts; repe.measuring.costs.costs measures neutral ones."
)
STYLE = """<style>
.repe-side { border: 1px solid rgba(128, 128, 128, 0.4); border-radius: 4px; padding: 8px 12px;
  box-sizing: border-box; height: 100%; }
.repe-side, .repe-note { font-size: var(--jp-ui-font-size1, 13px); line-height: 1.5; }
.repe-said { font-size: 1.15em; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 3em; margin: 6px 0; }
.repe-costs { font-variant-numeric: tabular-nums; padding: 6px 0; }
.repe-failed { border-left: 3px solid #c62828; padding-left: 8px; }
.repe-note pre { overflow-x: auto; }
</style>"""


@spells_options
def playground(
    model: nn.Module,
    tokenizer: Any,
    concepts: str | ConceptVector | Sequence[str | ConceptVector],
    *,
    prompt: str = "",
    chat: bool | None = None,
    alphas: tuple[float, float] = (-2.0, 2.0),
    max_new_tokens: int = 64,
    **options: Unpack[EditOptions],
) -> Playground:
    """A playground in a notebook: what a model writes unsteered and steered, side by side, as the sliders stand.

    Moving a slider, or changing anything else, writes anew. Both texts are the likeliest ones. The model is steered
    while they are written and at no other time; running a cell stops that first.

    Args:
        model, tokenizer: of a causal language model; neither is changed.
        concepts: names or vectors; each gets a slider. A name is resolved as in `repe.steer`, before this returns.
        prompt: what stands in the prompt box at first.
        chat: whether the prompt is at first a message for the model's chat template, and not plain text; by default if
            there is a template.
        alphas: the ends of the sliders, in doses unless `unit` says otherwise.
        max_new_tokens: the longest that a text may be, at first.
        edit, scope: what is chosen at first.
        blocks, unit, target, theta, keep_norm, gate, site, stack: as in `repe.steer`.

    Returns:
        A widget, which shows itself as the last value of a cell.

    Raises:
        ValueError, TypeError: a concept is unknown or for another model, the model writes no text, or a choice is none.
    """
    several = [concepts] if isinstance(concepts, str | ConceptVector) else list(concepts)
    vectors = [resolve(model, c, tokenizer) if isinstance(c, str) else c for c in several]
    is_chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    writer = SideBySide(model, tokenizer, vectors)
    edits = [Edit.of(vector, **options) for vector in vectors]
    if not edits:
        raise ValueError("got no concepts: name at least one, or give its vector")
    names = _told_apart([vector.concept for vector in vectors])
    controls = Controls(names, alphas, edits[0], prompt=prompt, chat=is_chat, tokens=max_new_tokens)
    return Playground(writer, controls, options)


class Controls:
    """What is set by hand.

    Attributes:
        sliders: the alphas, by concept.
        prompt, chat, edit, scope, max_new_tokens: the other widgets that say what is written.
        concept, reader: those that say which scores are shown.
        write, stop, zero: the buttons.
    """

    def __init__(
        self,
        names: Sequence[str],
        alphas: tuple[float, float],
        first: Edit,
        *,
        prompt: str,
        chat: bool,
        tokens: int,
    ) -> None:
        _check_ends(*alphas)
        self.prompt = ipywidgets.Textarea(
            prompt, placeholder="What shall the model answer, or go on from?", continuous_update=False, rows=2,
            layout={"width": "100%", "margin": "2px 0"},
        )  # fmt: skip
        self.chat = _choice("Prompt is", [("a chat message", True), ("plain text", False)], chat)
        simple = [kind for kind in KINDS if options_of(kind) <= {"unit"}]  # that need no more than an alpha
        self.edit = _choice("Edit", [*dict.fromkeys([*simple, first.kind])], first.kind)
        scopes = NAMED_SCOPES if isinstance(first.scope, str) else (*NAMED_SCOPES, first.scope)
        self.scope = _choice("Scope", [(str(scope), scope) for scope in scopes], first.scope)
        self.max_new_tokens = ipywidgets.BoundedIntText(
            tokens, min=1, max=10**6, description="Tokens, at most", style=NATURAL, layout=CHOICE | {"width": "180px"}
        )
        width = f"{min(max(map(len, names)), 30) + 1}ch"
        self.sliders = {name: _slider(name, alphas, width) for name in names}
        self.concept = _choice("Scores of", [(name, place) for place, name in enumerate(names)], 0)
        self.reader = _choice("", [(text, place) for place, text in enumerate(READ_BY)], 0)
        self.write = ipywidgets.Button(description="Write", icon="play", button_style="primary", layout=BUTTON)
        self.stop = ipywidgets.Button(description="Stop", icon="stop", layout=BUTTON)
        self.zero = ipywidgets.Button(
            description="All to 0", icon="undo", layout=BUTTON | {"margin": "2px 24px 2px 2px"}
        )
        self.meaning = ipywidgets.HTML()
        self._explain()
        self.edit.observe(self._explain, "value")
        self.zero.on_click(self._to_zero)

    @property
    def rows(self) -> list[Any]:
        """The widgets, as they stand above the texts."""
        choices = [self.chat, self.edit, self.scope, self.max_new_tokens]
        buttons = [self.write, self.stop, self.zero, self.concept, self.reader]
        return [self.prompt, _row(choices), *self.sliders.values(), self.meaning, _row(buttons)]

    @property
    def settings(self) -> list[Any]:
        """Those that say what is written."""
        return [self.prompt, self.chat, self.edit, self.scope, self.max_new_tokens, *self.sliders.values()]

    def job(self, options: EditOptions) -> Job:
        """What is to be written; `options` are those that no widget sets."""
        prompt = self.prompt.value
        text = [{"role": "user", "content": prompt}] if self.chat.value else prompt
        alphas = tuple(slider.value for slider in self.sliders.values())
        chosen = EditOptions(edit=self.edit.value, scope=self.scope.value)
        return Job(text, alphas, options | chosen, self.max_new_tokens.value)

    def _explain(self, *_: Any) -> None:
        said = str(KINDS[self.edit.value].__doc__).partition("\n")[0]
        self.meaning.value = f'<div class="repe-note">{escape(self.edit.value)}: {escape(said)}</div>'

    def _to_zero(self, *_: Any) -> None:
        for slider in self.sliders.values():
            slider.value = 0.0


class Playground(ipywidgets.VBox):
    """What `repe.widgets.playground` returns: a widget.

    Attributes:
        controls: the widgets that are set by hand, such as `controls.sliders["honesty"]`.
        sides: the unsteered and the steered text; None while nothing is written.
        error: what went wrong with the latest; None if nothing did.
    """

    def __init__(self, writer: SideBySide, controls: Controls, options: EditOptions) -> None:
        self.writer, self.controls, self.options = writer, controls, options
        self.sides: Sides | None = None
        self.error: Exception | None = None
        self.panels = [ipywidgets.HTML(layout=PANEL) for _ in ("unsteered", "steered")]
        self.note = ipywidgets.HTML()
        self._drawing = threading.RLock()  # what is chosen is drawn while text grows in the background
        self._latest = Latest(self._run)
        self._events = _cell_events()
        about = ipywidgets.HTML(f'{STYLE}<div class="repe-note"><small>{ABOUT_COSTS}</small></div>')
        super().__init__([*controls.rows, _row(self.panels), self.note, about])
        self._listen()
        self._draw()
        self._say("ready", "Move a slider, or press Write.")

    def write(self, *_: Any) -> None:
        """Write both texts anew, in the background; see `wait`."""
        if self.controls.prompt.value.strip():
            self._latest.ask(self.controls.job(self.options))
        else:
            self._say("ready", "Type a prompt first.")

    def stop(self, *_: Any) -> None:
        """Stop writing. When this returns, nothing of the playground is on the model."""
        if self._latest.stop():
            self._say("stopped", "Stopped.")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until both texts are written; false if that takes longer than `timeout` seconds."""
        return self._latest.wait(timeout)

    def close(self) -> None:
        """Stop for good, and take the playground out of the notebook."""
        self._latest.close()
        if self._events is not None:
            self._events.unregister("pre_run_cell", self.stop)
            self._events = None
        for widget in _below(self):
            widget.close()
        super().close()

    def _listen(self) -> None:
        controls = self.controls
        for widget in controls.settings:
            widget.observe(self.write, "value")
        for widget in (controls.concept, controls.reader):
            widget.observe(self._draw, "value")
        controls.write.on_click(self.write)
        controls.stop.on_click(self.stop)
        if self._events is not None:
            self._events.register("pre_run_cell", self.stop)  # a cell may run the model, which must be as it was

    # in the background

    def _run(self, job: Job, is_stopped: IsStopped) -> None:
        """Write, and show what comes of it, an error too."""
        began, self.sides, self.error = time.perf_counter(), None, None
        try:
            self._say("writing", "Writing …")
            self.sides = self.writer.write(job, Paced(self._grow), is_stopped)
        except Exception as error:
            self.error = error
            self._say("failed", _told(error))
            error.with_traceback(None)  # which would keep the tensors of its frames
        self._draw()
        if self.error is None and not is_stopped():
            self._say("done", f"Written in {time.perf_counter() - began:.2g} s.{self._others()}", _asked(job))

    def _grow(self, sides: Sides) -> None:
        self.sides = sides
        self._draw()

    def _others(self) -> str:
        """What else steers the model, and so what is called unsteered here."""
        others = escape(", ".join(map(repr, self.writer.others)))
        return f" Both sides are also steered by {others}." if others else ""

    # what is seen

    def _draw(self, *_: Any) -> None:
        with self._drawing:
            place, by_unsteered = self.controls.concept.value, self.controls.reader.value == 1
            title = [*self.controls.sliders][place]
            sides = self.sides or (None, None)
            for panel, name, side in zip(self.panels, ("unsteered", "steered"), sides, strict=True):
                panel.value = _side(name, side, title, place, by_unsteered)

    def _say(self, state: str, html: str, attributes: str = "") -> None:
        self.note.value = f'<div class="repe-note repe-{state}"{attributes}>{html}</div>'
        self.controls.stop.disabled = state != "writing"


class Paced:
    """Passes on what it is given, but not more often than can be seen."""

    def __init__(self, show: Any) -> None:
        self.show, self.last = show, -math.inf

    def __call__(self, what: Any) -> None:
        if time.perf_counter() - self.last >= EVERY:
            self.show(what)
            self.last = time.perf_counter()


# HTML


def _side(name: str, side: Side | None, title: str, concept: int, by_unsteered: bool) -> str:
    """One of the two texts, with its costs and scores."""
    said, costs, scored = "", "&nbsp;", ""
    if side is not None and side.pieces:
        shown = [i for i in range(side.whole) if side.pieces[i]]
        scores = side.unsteered_scores if by_unsteered else side.scores
        pieces = [side.pieces[i] for i in shown]
        said, costs = escape("".join(pieces)), _costs(side)
        scored = tokens(title, pieces, [float(scores[i, concept]) for i in shown]).html()
    return (
        f'<div class="repe-side repe-{name}"><b>{name}</b><div class="repe-said">{said}</div>'
        f'<div class="repe-costs">{costs}</div>{scored}</div>'
    )


def _costs(side: Side) -> str:
    count = len(side.pieces)
    return (
        f"perplexity <b>{side.perplexity:.3g}</b> &nbsp;·&nbsp; KL <b>{side.kl:.3f}</b> nats a token &nbsp;·&nbsp; "
        f"{count} token{'s' * (count != 1)}"
    )


def _asked(job: Job) -> str:
    """What was asked for, as attributes: who drives a browser sees by them which of the writings is done."""
    text = job.text if isinstance(job.text, str) else job.text[-1]["content"]
    return f' data-prompt="{escape(text)}" data-alphas="{" ".join(f"{alpha:g}" for alpha in job.alphas)}"'


def _told(error: Exception) -> str:
    """An error in one line, its traceback folded."""
    trace = "".join(traceback.format_exception(error))
    return (
        f"<b>{type(error).__name__}</b>: {escape(str(error))}"
        f"<details><summary>traceback</summary><pre>{escape(trace)}</pre></details>"
    )


# widgets

NATURAL = {"description_width": "initial"}
BUTTON = {"width": "auto"}
CHOICE = {"width": "auto", "margin": "2px 14px 2px 2px"}
PANEL = {"flex": "1 1 320px", "min_width": "0", "margin": "2px"}


def _choice(description: str, options: Any, value: Any) -> Any:
    return ipywidgets.Dropdown(description=description, options=options, value=value, style=NATURAL, layout=CHOICE)


def _slider(name: str, alphas: tuple[float, float], width: str) -> Any:
    return ipywidgets.FloatSlider(
        0.0, min=alphas[0], max=alphas[1], step=STEP, description=name, tooltip=name,
        readout_format="+.1f", style={"description_width": width}, layout={"width": "100%", "max_width": "640px"},
    )  # fmt: skip


def _row(widgets: Sequence[Any]) -> Any:
    return ipywidgets.HBox(widgets, layout={"flex_flow": "row wrap", "align_items": "stretch", "width": "100%"})


def _below(widget: Any) -> Iterator[Any]:
    for child in getattr(widget, "children", ()):
        yield from _below(child)
        yield child


def _cell_events() -> Any:
    """What tells of cells that are about to run; None outside of IPython."""
    from IPython import get_ipython

    shell = get_ipython()
    return None if shell is None else shell.events


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names, those that come again numbered."""
    return [f"{name} ({before + 1})" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]


def _check_ends(low: float, high: float) -> None:
    if not (low <= 0 <= high and low < high and math.isfinite(high - low)):
        raise ValueError(f"alphas={low, high}: give the two ends of the sliders, with 0 between them, such as (-2, 2)")
