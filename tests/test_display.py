"""How things are shown: whatever they hold comes out as text, and can be read on any ground."""

import io
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import repe
from repe import display
from repe.reading.read import Reading
from repe.reading.vector import ROWS
from tests.drawn import contrast, curve, vector

SCRIPT = "<script>alert(1)</script>"
HOSTILE = (SCRIPT, '" onmouseover="x', "a & b", "</div></span>", "\x1b[2J", "\u202eabc", "a\rb", "")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
LIGHT, DARK = (255, 255, 255), (17, 17, 17)
BLACK, WHITE = (0, 0, 0), (238, 238, 238)


def read_of(tokens, scores=None, blocks=(3,)) -> Reading:
    scores = torch.linspace(-3, 3, len(tokens)) if scores is None else torch.tensor(scores)
    return Reading("honesty", tuple(tokens), blocks, scores[:, None].repeat(1, len(blocks)), blocks)


class Page(HTMLParser):
    """The text of HTML, its tags, and the tooltip and the style of every text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, dict]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((data, self.open[-1][1]))

    @property
    def tokens(self):
        return [(text, attrs) for text, attrs in self.texts if attrs.get("title")]


def handle(model, **how):
    return repe.steer(model, how.pop("concept", replace(vector(4), recommended=(1,))), how.pop("alpha", 1.0), **how)


@pytest.fixture
def narrow():
    """Something of four blocks and width 4, for handles alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 4, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))


def shown(narrow):
    """Everything that shows itself, with a hostile name."""
    name = HOSTILE[0] + HOSTILE[1]
    v = replace(vector(4), concept=name, recommended=(1,), provenance={"reader": name, "model": name, "pairs": 3})
    pairs = [repe.ContrastPair(f"{name} {i}", f"no {name} {i}") for i in range(8)]
    return {
        "vector": v,
        "reading": replace(read_of(HOSTILE), concept=name),
        "curve": replace(curve(), concept=name),
        "steering": handle(narrow, concept=v, gate=repe.Gate(v, block=0)),
        "audit": replace(repe.audit(pairs), concept=name),
    }


@pytest.mark.filterwarnings("ignore:.*edited nothing")
@pytest.mark.parametrize("what", ["vector", "reading", "curve", "steering", "audit"])
def test_html_is_well_formed_and_escapes_what_it_is_given(what, narrow):
    html = shown(narrow)[what]._repr_html_()
    page = Page(html)
    assert not page.open
    assert set(page.tags) <= {"div", "span", "b", "small", "table", "caption", "tr", "th", "td", "p", "pre"}
    assert SCRIPT in "".join(text for text, _ in page.texts)
    assert not [attrs for _, attrs in page.texts if set(attrs) - {"style", "title"}]
    assert "http" not in html
    assert "url(" not in html


def test_every_token_stands_in_the_html_with_its_score():
    words = ["The", " quick", " fox", "\n", " says", "."]
    reading = read_of(words, [0.5, -1.25, 0.0, 3.0, float("nan"), -0.01])
    tokens = Page(reading._repr_html_()).tokens
    assert [text for text, _ in tokens] == ["The", " quick", " fox", "↵\n", " says", "."]
    said = [attrs["title"].split(": ")[1] for _, attrs in tokens]
    assert said == ["+0.5", "-1.2", "0", "+3", "no score", "-0.01"]
    assert "honesty at block 3" in unescape(reading.html())


def test_hostile_tokens_are_text():
    tokens = Page(read_of(HOSTILE)._repr_html_()).tokens
    assert [text for text, _ in tokens] == [*HOSTILE[:4], "\\x1b[2J", "\\u202eabc", "a\\rb", "·"]


def test_stronger_scores_have_a_stronger_ground_and_the_sides_differ():
    scores = [-9.0, -2.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2.0, 9.0]
    grounds = [ground(attrs["style"]) for _, attrs in Page(read_of("abcdefghi", scores)._repr_html_()).tokens]
    opacities = [opacity for *_, opacity in grounds]
    assert opacities[:5] == sorted(opacities[:5], reverse=True)
    assert opacities == opacities[::-1]
    assert opacities[4] == 0 < opacities[5]
    assert len({tuple(color) for *color, _ in grounds[:4]} | {tuple(color) for *color, _ in grounds[5:]}) == 2
    assert grounds[0][:3] != grounds[-1][:3]


def ground(style: str) -> list[float]:
    return [float(n) for n in re.search(r"rgba\((.*?)\)", style).group(1).split(",")]


@pytest.mark.parametrize(("page", "letters"), [(LIGHT, BLACK), (DARK, WHITE)], ids=["light", "dark"])
def test_letters_are_legible_on_every_ground_in_either_theme(page, letters):
    scores = [s / 10 for s in range(-30, 31)]
    html = read_of(["x"] * 61, scores)._repr_html_()
    assert not re.search(r"(?<![-\w])color:", html)  # letters keep the colour of the theme
    for _, attrs in Page(html).tokens:
        *color, opacity = ground(attrs["style"])
        seen = [opacity * c / 255 + (1 - opacity) * p / 255 for c, p in zip(color, page, strict=True)]
        assert contrast(seen, [c / 255 for c in letters]) > 4.5


def test_another_block_can_be_shown():
    reading = Reading("honesty", ("a", "b"), (1, 4), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), (1,))
    for block, expected in ((None, ["+0.1", "+0.3"]), (4, ["+0.2", "+0.4"])):
        titles = [attrs["title"] for _, attrs in Page(reading.html(block)).tokens]
        assert [title.split(": ")[1] for title in titles] == expected
        assert f"at block {1 if block is None else 4}" in reading.html(block)
        assert f"at block {1 if block is None else 4}" in reading.text(block)
    for show in (reading.html, reading.text, reading.at):
        with pytest.raises(IndexError, match=r"block 3 was not read: there are scores at \[1, 4\]"):
            show(3)


# tables


def test_a_table_has_columns_under_a_title_and_over_a_note():
    shown = display.table("two", ["a", "bb"], [["ccc", 1], ["日本", ""]], "so far")
    assert str(shown) == "two\na     bb\nccc   1\n日本\nso far"
    assert str(display.table("", ["", ""], [["a", "bb"]])) == "a  bb"
    assert [text for text, _ in Page(shown.html()).texts] == ["two", "a", "bb", "ccc", "1", "日本", "so far"]


def test_where_a_table_is_too_wide_its_last_column_is_broken_into_lines():
    shown = display.table("", ["", ""], [["of words", "word " * 9], ["joy", "x"]])
    assert shown.text(20).split("\n") == [
        "of words  word word",
        *["          word word"] * 3,
        "          word",
        "joy       x",
    ]
    assert shown.text(14).split("\n") == ["of words  word", *["          word"] * 8, "joy       x"]
    assert len(str(display.table("", ["", ""], [["a", "word " * 999]])).split("\n")) == 1


def test_what_stands_in_a_table_is_a_line_without_controls_or_markup():
    cells = [*HOSTILE, "[bold]x[/bold] :smile:", "two\nlines", "\u2028"]
    expected = ["\\x1b[2J", "\\u202eabc", "a\\rb", "", "[bold]x[/bold] :smile:", "two\\nlines", "\\u2028"]
    shown = display.table("\x07", ["cell"], [[cell] for cell in cells], "\x1b\n.")
    assert str(shown).split("\n") == ["\\x07", "cell", *HOSTILE[:4], *expected, "\\x1b", "."]
    texts = [text for text, _ in Page(shown.html()).texts]
    assert texts == ["\\x07", "cell", *HOSTILE[:4], *filter(None, expected), "\\x1b\n."]


@given(st.text())
def test_what_is_visible_neither_steers_a_terminal_nor_turns_the_writing(text):
    shown = display.visible(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Zl", "Zp") for c in shown)
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not {unicodedata.bidirectional(c) for c in shown} & turning
    assert len(display.visible(text, "").split("\n")) == 1


# terminals


def test_colours_say_how_strong_a_score_is():
    scores = [-2.0, -1.0, -0.5, 0.1, float("nan"), 0.5, 1.0, 2.0]
    text = read_of("abcdefgh", scores).text().split("\n\n")[0]
    grounds = dict(re.findall(r"48;5;(\d+)m(\w)", text)[i][::-1] for i in range(6))
    assert grounds == {"a": "208", "b": "215", "c": "180", "f": "146", "g": "141", "h": "99"}
    assert ESCAPE.sub("", text) == "abcdefgh"
    assert text.count("\x1b[0m") == 6


def test_colours_of_terminals_are_legible_on_themselves_and_seen_on_any_ground():
    for code in (*display.MORE_OF_256, *display.LESS_OF_256):
        color = xterm(code)
        assert contrast(color, xterm(display.BLACK_OF_256)) > 4.5
        assert contrast(color, (1, 1, 1)) > 1.3


def xterm(code: int) -> list[float]:
    levels = (0, 95, 135, 175, 215, 255)
    return [levels[(code - 16) // step % 6] / 255 for step in (36, 6, 1)]


@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_gets_the_text_and_no_control_of_it(color):
    text = read_of(HOSTILE, [0.0] * len(HOSTILE)).text(color=color).split("\n\n")[0]
    assert text == "".join([*HOSTILE[:4], "\\x1b[2J", "\\u202eabc", "a\\rb", "·"])
    everything = replace(read_of(HOSTILE), concept="\x1b]0;x\x07").text(color=color)
    assert "\x1b" not in (ESCAPE.sub("", everything) if color else everything)
    assert "\x07" not in everything


def test_without_colour_the_scores_stand_behind_their_tokens():
    reading = read_of(["The", " fox", "\n", " ran"], [0.1, 1.25, -2.0, -0.25])
    assert reading.text(color=False) == (
        "The fox[+1.2]↵[-2.0]\n ran[-0.2]\n\nhonesty at block 3: [score] beyond ±0.25, poles at ±1"
    )


def test_a_colour_ends_with_its_line():
    text = read_of(["a\n\nb", "c"], [2.0, 0.0]).text()
    first, middle, last = text.split("\n")[:3]
    assert first.endswith("↵\x1b[0m")
    assert middle == "\x1b[38;5;16;48;5;99m↵\x1b[0m"
    assert last.endswith("b\x1b[0mc")


# what is shown


def test_a_vector_shows_its_blocks_and_what_it_was_made_of():
    v = replace(vector(6), site="mlp", provenance={"reader": "mean", "pairs": 432, "held_out_pairs": 160})
    page = Page(v._repr_html_())
    texts = [text for text, _ in page.texts]
    assert texts[0] == "honesty: 6 blocks x 6, at the site 'mlp'"
    assert texts[-1] == "reader: mean, pairs: 432, held out pairs: 160"
    assert page.tags.count("tr") == 7
    assert {"4 ← recommended", "0.88"} < set(texts)
    assert [" ".join(line.split()) for line in v.text().split("\n")][1:-1] == [
        " ".join(texts[i : i + 7]) for i in range(1, len(texts) - 1, 7)
    ]


def test_a_vector_of_many_blocks_shows_some_and_the_recommended():
    v = replace(vector(80), recommended=(41,), accuracy=torch.full((80,), torch.nan))
    page = Page(v._repr_html_())
    rows = [text for text, _ in page.texts]
    assert page.tags.count("tr") <= ROWS + 2
    assert {"0", "79", "41 ← recommended", "unknown"} < set(rows)


@pytest.mark.filterwarnings("ignore:.*edited nothing")
def test_a_handle_shows_all_that_was_set_and_nothing_else(narrow):
    v = replace(vector(4), recommended=(1,))
    other = repe.ConceptVector.random(v)
    mask = torch.ones(2, 7, dtype=torch.bool)
    gate = repe.Gate(v, -0.5, above=False, block=-4, token="mean")
    cases = [
        (
            {"alpha": 1.5},
            "alpha=1.5, divergence=0.23, of_norm=1.5, edit='add', unit='kl', site='block', blocks=[1], scope='all'",
        ),
        (
            {"edit": "clamp", "target": 0.5, "keep_norm": True, "scope": mask},
            "alpha=1, edit='clamp', target=0.5, keep_norm=True, site='block', blocks=[1], scope=mask of (2, 7)",
        ),
        (
            {"concept": [v, other], "edit": "rotate", "theta": 1.25, "scope": [0, -1]},
            "alpha=1, edit='rotate', theta=1.25, site='block', blocks=[1], scope=(0, -1)",
        ),
        (
            {"alpha": [1, -2], "gate": gate, "site": "mlp", "unit": "raw"},
            "alpha=[1, -2], divergence=0.4, of_norm=2, edit='add', unit='raw', site='mlp', blocks=[1], scope='all', "
            "gate=Gate('honesty' < -0.5 at block 0, mean token)",
        ),
        ({"alpha": [1.0] * 64, "gate": is_open, "scope": "answer"}, "alpha=64 rows, "),
    ]
    for how, said in cases:
        with handle(narrow, **how) as h:
            name = "honesty, random 0" if "theta" in how else "honesty"
            assert repr(h).startswith(f"Steering({name!r}, {said}")
            page = [text for text, _ in Page(h._repr_html_()).texts]
            assert page[0] == f"steering along {name}, attached"
            facts = page[1:]
            heads, values = facts[: len(facts) // 2], facts[len(facts) // 2 :]
            assert ", ".join(f"{k}={v}" for k, v in zip(heads, values, strict=True)) in repr(h)
            assert ("gate=is_open" in repr(h)) == (how.get("gate") is is_open)
        assert repr(h).endswith(", removed)")
        assert "removed" in h._repr_html_()


def is_open(mean, last):
    return last.sum(-1) > 0


def test_long_lines_of_an_audit_are_broken_in_notebooks():
    pairs = [repe.ContrastPair(f"candid {'word ' * 30}{i}", f"deceitful {i}") for i in range(8)]
    found = repe.audit(pairs)
    (text,) = [text for text, _ in Page(found._repr_html_()).texts]
    assert max(map(len, str(found).splitlines())) > 130
    assert max(map(len, text.splitlines())) <= 100
    assert text.split() == str(found).split()


@pytest.mark.parametrize(("wish", "looking", "shown"), [(None, False, ""), (None, True, "work"), (False, True, "")])
def test_a_bar_shows_itself_where_somebody_is_looking(wish, looking, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: looking
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(display, "SOON", 0.0)
    assert list(display.bar_of(range(3), "work", progress=wish, mininterval=0)) == [0, 1, 2]
    assert bool(stream.getvalue()) == bool(shown)
    assert shown in stream.getvalue()


@pytest.mark.parametrize(("disabled", "shown"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_who_wants_no_bars_at_all_gets_none(disabled, shown):
    code = (
        "import io, sys; from repe import display; said, sys.stderr = sys.stderr, io.StringIO()\n"
        "sys.stderr.isatty = lambda: True; display.SOON = 0\n"
        "list(display.bar_of(range(3), 'work', progress=None, mininterval=0)); print(sys.stderr.getvalue())"
    )
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | disabled
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert ("work" in done.stdout) == shown
