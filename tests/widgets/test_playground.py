"""The playground: what a slider does to what is shown, and that nothing of it stays on the model or in the process."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from IPython.core.events import EventManager, available_events

import repe
from repe import widgets
from repe.reading.store import resolve
from repe.steering import kinds
from repe.widgets import playground
from repe.widgets.streaming import Side
from tests import oracles, zoo

SCENE = "How does it go on? Greta brings a saddle to the school."
SECONDS = 120  # for what takes one or two


@pytest.fixture
def opened():
    """Makes playgrounds, and closes them in the end."""
    made = []

    def make(*args, **choices):
        made.append(playground(*args, **choices))
        return made[-1]

    yield make
    for one in made:
        one.close()
    until(lambda: not threads())


@pytest.fixture
def happy(testbed, opened):
    return opened(*testbed, ["honesty", "happiness"], prompt=SCENE)


@pytest.fixture
def endless(opened):
    """One that writes for hours, unless it is stopped."""
    model = zoo.build("llama")
    model.generation_config.eos_token_id = None
    return opened(model, zoo.tokenizer(), oracles.vector(), prompt="a", max_new_tokens=10**6)


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def begun(one):
    """Starts writing, and returns when some of it is there."""
    one.write()
    until(lambda: (sides := one.sides) and len(sides[1].pieces) > 3)


def texts(one):
    assert one.wait(SECONDS)
    assert one.error is None
    return [side.text for side in one.sides]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "repe-latest"]


# what is written


def test_the_steered_text_follows_the_slider_and_the_unsteered_does_not(testbed, happy):
    model, tokenizer = testbed
    chat = [{"role": "user", "content": SCENE}]
    plain = repe.generate(model, tokenizer, [chat], max_new_tokens=64)[0]
    happy.write()
    assert texts(happy) == [plain, plain]
    for alpha in (-1.5, 0.0, -0.5):
        happy.controls.sliders["happiness"].value = alpha
        found = texts(happy)
        with repe.steer(model, "happiness", alpha):
            steered = repe.generate(model, tokenizer, [chat], max_new_tokens=64)[0]
        assert found == [plain, steered]
    assert plain != steered


def test_every_choice_writes_anew_and_none_that_only_shows_does(happy):
    written = []
    happy.writer.write = lambda job, show, is_stopped: written.append(job)
    controls = happy.controls
    for widget, value in [
        (controls.prompt, "Another."), (controls.chat, False), (controls.edit, "ablate"),
        (controls.scope, "generated"), (controls.max_new_tokens, 7), (controls.sliders["honesty"], 0.5),
    ]:  # fmt: skip
        widget.value = value
        assert happy.wait(SECONDS)
    assert len(written) == 6
    last = written[-1]
    assert (last.text, last.alphas) == ("Another.", (0.5, 0.0))
    assert (last.options, last.max_new_tokens) == ({"edit": "ablate", "scope": "generated"}, 7)
    controls.concept.value = controls.reader.value = 1
    assert happy.wait(SECONDS)
    assert len(written) == 6
    controls.zero.click()
    assert happy.wait(SECONDS)
    assert written[-1].alphas == (0, 0)


def test_a_slider_that_is_dragged_writes_once(happy):
    written = []
    happy.writer.write = lambda job, show, is_stopped: written.append(job.alphas)
    with happy._latest._changed:  # nothing begins meanwhile, however long it takes
        for step in range(10):
            happy.controls.sliders["honesty"].value = step / 10
    assert happy.wait(SECONDS)
    assert written == [(0.9, 0.0)]


def test_a_slider_moved_while_text_streams_stops_that_and_starts_anew(endless):
    begun(endless)
    assert len(threads()) == 1
    endless.controls.max_new_tokens.value = 5
    assert endless.wait(SECONDS)
    assert [len(side.pieces) for side in endless.sides] == [5, 5]
    assert all(side.ended for side in endless.sides)
    assert "repe-done" in endless.note.value


def test_nothing_is_written_after_no_prompt(testbed, opened):
    one = opened(*testbed, "honesty")
    one.write()
    assert one.wait(SECONDS)
    assert one.sides is None
    assert "Type a prompt" in one.note.value


# what is left behind


def test_between_two_texts_the_model_is_untouched_and_there_is_no_thread(testbed, happy):
    model, _ = testbed
    ids = torch.arange(3, 11)[None]
    before = model(ids).logits
    happy.controls.sliders["happiness"].value = -1.5
    texts(happy)
    assert repe.status(model) == []
    assert torch.equal(model(ids).logits, before)
    until(lambda: not threads())


def test_what_goes_wrong_is_shown_and_leaves_nothing_on_the_model(testbed, opened):
    model, tokenizer = testbed
    one = opened(model, tokenizer, "honesty", prompt="<b>x</b>", chat=False, blocks=[99])
    one.controls.sliders["honesty"].value = 1.0
    assert one.wait(SECONDS)
    assert isinstance(one.error, IndexError)
    assert "repe-failed" in one.note.value
    assert str(one.error) in one.note.value.replace("&#x27;", "'")
    assert one.error.__traceback__ is None
    assert one.controls.stop.disabled
    assert repe.status(model) == []
    one.controls.sliders["honesty"].value = 0.0
    texts(one)
    assert "repe-done" in one.note.value


@pytest.mark.parametrize("end", ["stop", "close"])
def test_when_it_is_stopped_no_thread_and_no_handle_are_left(endless, end):
    endless.controls.sliders["concept 0"].value = 1.0
    begun(endless)
    assert not endless.controls.stop.disabled
    getattr(endless, end)()
    assert threads() == []
    assert repe.status(endless.writer.model) == []
    assert "repe-stopped" in endless.note.value or end == "close"


def test_after_close_nothing_is_written_and_no_widget_is_left(testbed, opened):
    one = opened(*testbed, "honesty", prompt=SCENE)
    one.close()
    one.write()
    assert one.wait(SECONDS)
    assert one.sides is None
    assert all(widget.comm is None for widget in (one, one.note, *one.panels, *one.controls.settings))


def test_running_a_cell_first_stops_what_is_being_written(endless, opened, monkeypatch):
    events = EventManager(None, available_events)
    monkeypatch.setattr(widgets, "_cell_events", lambda: events)
    model = endless.writer.model
    one = opened(model, zoo.tokenizer(), oracles.vector(), prompt="a", max_new_tokens=10**6)
    begun(one)
    events.trigger("pre_run_cell", None)
    assert threads() == []
    assert repe.status(model) == []
    one.close()
    assert events.callbacks["pre_run_cell"] == []


# what is shown


def test_both_texts_are_shown_with_their_costs_and_scores(testbed, happy):
    happy.controls.sliders["happiness"].value = -1.5
    happy.controls.concept.value = 1
    for text, side, panel, name in zip(texts(happy), happy.sides, happy.panels, ("unsteered", "steered"), strict=True):
        assert f'repe-{name}"' in panel.value
        assert text in panel.value
        assert f"perplexity <b>{side.perplexity:.3g}</b>" in panel.value
        assert f"KL <b>{side.kl:.3f}</b>" in panel.value
        assert "<b>happiness</b>" in panel.value
        assert f"{float(side.scores[0, 1]):+.2g}" in panel.value
    happy.controls.reader.value = 1
    assert f"{float(happy.sides[1].unsteered_scores[0, 1]):+.2g}" in happy.panels[1].value
    assert f"{float(happy.sides[1].scores[0, 1]):+.2g}" not in happy.panels[1].value


def test_a_text_that_grows_is_shown_in_whole_words(endless, monkeypatch):
    pieces, none = ("Greta ", "br", "ings a sad"), (0.5,) * 3
    scores = torch.ones(3, 1)
    html = widgets._side("steered", Side(pieces, scores, scores, none, none, False), "x", 0, False)
    assert "ings" not in html
    html = widgets._side("steered", Side(pieces, scores, scores, none, none, True), "x", 0, False)
    assert "Greta brings a sad<" in html


def test_what_is_done_says_for_which_prompt_and_alphas(happy):
    happy.controls.prompt.value = 'Is "a" < b?'
    happy.controls.sliders["happiness"].value = -1.2
    texts(happy)
    assert 'repe-done" data-prompt="Is &quot;a&quot; &lt; b?" data-alphas="0 -1.2"' in happy.note.value


def test_what_is_chosen_while_a_text_is_drawn_is_what_is_seen(happy, monkeypatch):
    happy.write()
    texts(happy)
    side, drawing, drawn = widgets._side, threading.Event(), threading.Event()
    slow = threading.Thread(target=happy._draw)

    def drawn_slowly(*what):
        if threading.current_thread() is slow:
            drawing.set()
            drawn.wait(0.2)
        return side(*what)

    monkeypatch.setattr(widgets, "_side", drawn_slowly)
    slow.start()
    assert drawing.wait(SECONDS)
    happy.controls.concept.value = 1
    drawn.set()
    slow.join()
    assert all("<b>happiness</b>" in panel.value for panel in happy.panels)


def test_text_stands_in_the_notebook_as_text():
    scores = torch.ones(1, 1)
    html = widgets._side("steered", Side(("<script>",), scores, scores, (0.5,), (0.5,), True), "x", 0, False)
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 2
    assert "<script>" not in widgets._told(ValueError("<script>"))


def test_what_else_steers_the_model_is_named(testbed, happy):
    with repe.steer(testbed[0], "honesty", 0.5):
        happy.write()
        texts(happy)
        assert "Both sides are also steered by Steering(&#x27;honesty&#x27;" in happy.note.value
        assert len(repe.status(testbed[0])) == 1
    happy.write()
    texts(happy)
    assert "also steered" not in happy.note.value


def test_every_concept_has_a_slider_of_its_own(testbed, opened):
    model, tokenizer = testbed
    vector = resolve(model, "honesty", tokenizer)
    concepts = [vector, "happiness", vector]
    one = opened(model, tokenizer, concepts, alphas=(-3, 1))
    assert [*one.controls.sliders] == ["honesty", "happiness", "honesty (2)"]
    assert all((s.min, s.max, s.value) == (-3, 1, 0) for s in one.controls.sliders.values())
    assert concepts == [vector, "happiness", vector]


@pytest.mark.parametrize(
    ("options", "edits", "scope"),
    [
        ({}, ("add", "ablate", "erase", "piecewise"), "all"),
        ({"edit": "clamp", "target": 1.0, "scope": [0, -1]}, ("add", "ablate", "erase", "piecewise", "clamp"), (0, -1)),
        ({"scope": slice(1, None)}, ("add", "ablate", "erase", "piecewise"), slice(1, None)),
    ],
    ids=["none", "clamp", "slice"],
)
def test_there_is_a_choice_of_simple_edits_and_of_what_was_asked_for(opened, model, options, edits, scope):
    one = opened(model, zoo.tokenizer(), oracles.vector(), prompt="a", max_new_tokens=2, **options)
    assert one.controls.edit.options == edits
    assert one.controls.edit.value == options.get("edit", "add")
    assert one.controls.scope.value == scope
    one.controls.sliders["concept 0"].value = 1.0
    texts(one)
    assert one.controls.meaning.value.count(kinds.KINDS[one.controls.edit.value].__doc__) == 1


@pytest.mark.parametrize(("template", "is_chat"), [(True, True), (False, False)])
def test_the_prompt_is_a_message_where_there_is_a_template(opened, model, template, is_chat):
    tokenizer = zoo.tokenizer()
    if not template:
        tokenizer.chat_template = None
    assert opened(model, tokenizer, oracles.vector()).controls.chat.value is is_chat


# what is refused


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"alphas": (1, 2)}, "the two ends"),
        ({"alphas": (0, 0)}, "the two ends"),
        ({"alphas": (-float("inf"), 1)}, "the two ends"),
        ({"scope": "everywhere"}, "scope='everywhere'"),
        ({"edit": "ad"}, "did you mean 'add'"),
        ({"concepts": []}, "no concepts"),
        ({"concepts": "honestly"}, "honest"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(testbed, choice, message):
    concepts = choice.pop("concepts", "honesty")
    with pytest.raises(ValueError, match=message):
        playground(*testbed, concepts, **choice)


def test_what_is_no_concept_is_refused(testbed):
    with pytest.raises(TypeError, match="expected a concept's name"):
        playground(*testbed, [3])


def test_without_ipywidgets_the_error_says_what_to_install():
    code = "import sys; sys.modules['ipywidgets'] = None; import repe; repe.widgets"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the playground needs" in done.stderr
    assert done.stderr.rstrip().endswith("pip install 'repe-torch[notebook]'")
