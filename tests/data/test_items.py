"""Items and texts from files: each line is read as it can alone be meant, or refused by its number."""

import itertools
import json

import numpy as np
import pytest

from repe.data.catalogue import find_task
from repe.data.items import Item, RequestPair, load_items, load_requests, load_texts

CHAT = [{"role": "user", "content": "count"}]
BEHAVIOUR = {"text": "a", "aligned": "b", "misaligned": "c"}
NO_NUMBERS = (-1, 2, 1.0, True, None, "B")
SKILL = {"text": "a", "options": ["b", "c", "d"], "answer": 2}


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def answer_of(tmp_path, options, answer):
    path = written(tmp_path / "x.jsonl", {"text": "a", "options": options, "answer": answer})
    return load_items(path)[0].answer


def test_a_line_is_a_behaviour_item_or_a_skill_item(tmp_path):
    lines = BEHAVIOUR | {"id": "1", "group": "g", "about": {"hard": True, "from": ["x"]}}, SKILL | {"id": "2"}
    chat = {key: value for key, value in SKILL.items() if key != "text"} | {"messages": CHAT}
    assert load_items(written(tmp_path / "x.jsonl", *lines, chat)) == [
        Item("a", ("b", "c"), 0, "g", {"hard": True, "from": ["x"]}),
        Item("a", ("b", "c", "d"), 2),
        Item(tuple(CHAT), ("b", "c", "d"), 2),
    ]


def test_a_row_has_the_same_in_columns_and_leaves_blank_what_it_has_no_use_for(tmp_path):
    header = "\ufefftext,group,aligned,misaligned,option_0,option_2,option_1,answer"
    rows = ["Is it?,a,yes,no,,,,", "How many?,b,,,1,3,2,C", "Who?,,,,I,,you,0"]
    assert load_items(written(tmp_path / "x.csv", header, *rows)) == [
        Item("Is it?", ("yes", "no"), 0, "a"),
        Item("How many?", ("1", "2", "3"), 2, "b"),
        Item("Who?", ("I", "you"), 0),
    ]


@pytest.mark.parametrize(
    ("answer", "number"),
    [(0, 0), (2, 2), ("0", 0), ("2", 2), ("A", 0), ("c", 2), ("red", 0), (" blue ", 1), ("1", 1), ("-1", 3)],
)
def test_an_answer_is_a_number_a_letter_or_the_option_itself(tmp_path, answer, number):
    assert answer_of(tmp_path, ["red", " blue", "green", "-1"], answer) == number


DOUBTFUL = [
    (["1", "2", "3"], "2"),
    (["B", "A"], "A"),
    (["x", " x"], "x"),
    (["b", "c"], "B"),
    (["yes", "Yes"], "yes"),
    (["1.0", "2.0"], "1"),
    (["01", "00"], "1"),
]


def test_what_an_answer_may_mean_counts_and_not_how_often_it_says_so(tmp_path):
    assert answer_of(tmp_path, ["A", "B"], "B") == 1
    assert answer_of(tmp_path, ["0", "1"], "1") == 1
    assert answer_of(tmp_path, ["1", "2", "3"], 2) == 2  # a number is no text
    for options, answer in DOUBTFUL:
        with pytest.raises(ValueError, match=rf"the answer '{answer}' means any of the options \d, \d: expected the"):
            answer_of(tmp_path, options, answer)


@pytest.mark.parametrize("answer", [3, -1, 1.0, True, None, "3", "-1", "1.0", "D", "AB", "e", "", [1], {"is": 1}])
def test_an_answer_that_means_no_option_is_refused(tmp_path, answer):
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: (the answer .* means none of the options|expected 'alig)"):
        answer_of(tmp_path, ["ba", "ca", "da"], answer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ([BEHAVIOUR], "expected names with values"),
        ({"aligned": "b", "misaligned": "c"}, "expected 'text', or 'messages', and there are none of them"),
        (BEHAVIOUR | {"messages": CHAT}, "expected 'text', or 'messages', and there are 'text', 'messages'"),
        (BEHAVIOUR | {"text": " "}, "text is empty"),
        (BEHAVIOUR | {"text": 3}, "text: expected a text, got 3"),
        ({"messages": [{"role": "user"}], "aligned": "b", "misaligned": "c"}, r"messages\[0\]: 'content' is missing"),
        ({"messages": "count", "aligned": "b", "misaligned": "c"}, "messages: expected a list, got 'count'"),
        ({"text": "a", "aligned": "b"}, "expected 'aligned' and 'misaligned', or 'options' and 'answer', .* 'aligned'"),
        ({"text": "a", "options": ["b", "c"]}, "or 'options' and 'answer', and there are 'options'"),
        (BEHAVIOUR | {"answer": 0}, "there are 'aligned', 'misaligned', 'answer'"),
        (BEHAVIOUR | SKILL, "there are 'aligned', 'misaligned', 'options', 'answer'"),
        (BEHAVIOUR | {"misaligned": "b"}, r"two options or more, all different and none blank, got \['b', 'b'\]"),
        (SKILL | {"options": ["b"], "answer": 0}, "two options or more"),
        (SKILL | {"options": ["b", "b", "c"]}, "all different"),
        (SKILL | {"options": ["b", " ", "c"]}, "none blank"),
        (SKILL | {"options": ["b", 3, "c"]}, r"options\[1\]: expected a text, got 3"),
        (SKILL | {"option_0": "b"}, "unknown 'option_0': there are about, aligned, answer"),
        (BEHAVIOUR | {"Group": "g"}, "unknown 'Group': there are .* group"),
        (BEHAVIOUR | {"kind": "harmful"}, "unknown 'kind': there are about"),
        (BEHAVIOUR | {"group": 3}, "group: expected a text, got 3"),
        (BEHAVIOUR | {"about": "x"}, "about: expected names with values, got 'x'"),
        (BEHAVIOUR | {"id": "1"}, "the id '1' stands already at .*, line 1"),
    ],
)
def test_a_file_with_a_bad_line_is_refused_by_its_number(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2(, column 1)?: .*{message}"):
        load_items(written(tmp_path / "x.jsonl", BEHAVIOUR | {"id": "1"}, line))


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            "text,option_0,option_1,option_2,answer",
            "a,b,,d,0",
            "expected options in option_0, option_1, .*, got option_0",
        ),
        ("text,option_1,option_2,answer", "a,b,c,1", "with none left out, got option_1, option_2"),
        ("text,option_0,option_1,answer", "a,b,c,", "there are 'options'"),
        ("text,option_0,option_1,answer", "a,b,c,1.0", "the answer '1.0' means none of the options"),
        ("text,option_0,option_1,answer", "a,b,c,2", "from 0 to 1, its letter from A on, or its own text"),
        ("text,option_0,option_1,Answer", "a,b,c,1", "unknown 'Answer'"),
        ("messages,aligned,misaligned", "a,b,c", "messages: expected a list, got 'a'"),
        ("text,aligned,misaligned", "a,b,", "and there are 'aligned'"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path, header, row, message):
    with pytest.raises(ValueError, match=rf"x\.csv, line 2: .*{message}"):
        load_items(written(tmp_path / "x.csv", header, row))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud83d", "aligned": "b", "misaligned": "c"}', r"'\\ud83d' is half of a character"),
        (BEHAVIOUR | {"aligned": "\udc00"}, r"'\\udc00' is half of a character"),
        (
            {"messages": [*CHAT, {"role": "bot", "content": "x"}], "aligned": "b", "misaligned": "c"},
            "messages: message 1 has the role 'bot': expected one of system, user",
        ),
    ],
)
def test_what_no_tokenizer_and_no_template_reads_is_refused_by_its_number(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: {message}"):
        load_items(written(tmp_path / "x.jsonl", BEHAVIOUR, line))


def test_the_order_of_columns_says_nothing(tmp_path):
    cells = {"text": "a", "option_0": "x", "option_1": "y", "option_2": "z", "answer": "B"}
    for names in itertools.permutations(cells):
        path = written(tmp_path / "x.csv", ",".join(names), ",".join(cells[name] for name in names))
        assert load_items(path) == [Item("a", ("x", "y", "z"), 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "the prompt must be a text or a list of messages, and is None"),
        ({"prompt": ["count"]}, "the prompt: message 0 is 'count': expected a mapping"),
        ({"options": "bc"}, r"`options` are texts in a row, .*; got 'bc'"),
        ({"options": ("b", 1)}, r"`options` are texts in a row, .*; got \('b', 1\)"),
        ({"options": ("b", "b")}, "all different; got"),
        ({"options": ()}, "one or more, and all different"),
        *[({"answer": answer}, "`answer` is the number of an option, from 0 to 1; got") for answer in NO_NUMBERS],
    ],
    ids=str,
)
def test_an_item_is_checked_wherever_it_comes_from(given, message):
    with pytest.raises(ValueError, match=message):
        Item(**{"prompt": "a", "options": ("b", "c")} | given)


def test_the_options_of_an_item_may_be_any_row_and_its_answer_any_whole_number():
    assert Item("a", ["b", "c"], np.int64(1)) == Item("a", ("b", "c"), 1)


def test_texts_are_texts_and_chats(tmp_path):
    lines = {"text": "a b", "id": "1", "group": "g"}, {"messages": CHAT, "about": {"long": False}}
    assert load_texts(written(tmp_path / "x.jsonl", *lines)) == ["a b", tuple(CHAT)]
    assert load_texts(written(tmp_path / "x.csv", "id,text", "1,a b")) == ["a b"]
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: unknown 'txt': there are about, group, id, messages, text"):
        load_texts(written(tmp_path / "x.jsonl", {"text": "a b"}, {"txt": "c"}))
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: unknown 'aligned', 'misaligned'"):
        load_texts(written(tmp_path / "x.jsonl", BEHAVIOUR))


def test_a_file_without_lines_is_refused(tmp_path):
    for load, content in ((load_items, "items"), (load_texts, "texts")):
        for path in (written(tmp_path / "x.jsonl", ""), written(tmp_path / "x.csv", "text,aligned,misaligned")):
            with pytest.raises(ValueError, match=rf"{path.name}: no {content}: expected at least one"):
                load(path)


@pytest.mark.parametrize("path", ["x.json", "some/x.json", "x.txt", "./x"])
def test_items_are_read_from_json_lines_and_csv_alone(path):
    with pytest.raises(ValueError, match=r"x.*: items are read from a file that ends in \.jsonl, \.csv"):
        load_items(find_task(path) if path != "x.txt" else path)


# requests


def test_a_line_is_a_pair_of_requests(tmp_path):
    lines = (
        {"harmful": "a", "harmless": "b", "id": "1"},
        {"harmful": CHAT, "harmless": [*CHAT, *CHAT], "refusals": ["No"]},
    )
    assert load_requests(written(tmp_path / "x.jsonl", *lines)) == [
        RequestPair("a", "b"),
        RequestPair(tuple(CHAT), (*CHAT, *CHAT), ("No",)),
    ]
    assert load_requests(written(tmp_path / "x.csv", "harmful,harmless", "a,b")) == [RequestPair("a", "b")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"harmful": "a"}, "'harmless' is missing"),
        ({"harmful": "a", "harmless": " "}, "harmless: the request is empty"),
        ({"harmful": "a", "harmless": "a"}, "the harmful and the harmless request are the same: 'a'"),
        ({"harmful": "a", "harmless": CHAT}, "one request of the pair is a text and the other a chat"),
        ({"harmful": "a", "harmless": "b", "refusals": [""]}, r"beginnings of texts, such as \['Sorry, I'\]; got"),
        ({"harmful": "a", "harmless": "b", "kind": "c"}, "unknown 'kind'"),
        ({"text": "a"}, "unknown 'text'"),
    ],
    ids=str,
)
def test_a_line_that_is_no_pair_of_requests_is_refused_by_its_number(tmp_path, line, told):
    path = written(tmp_path / "x.jsonl", {"harmful": "c", "harmless": "d"}, line)
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2.*{told}"):
        load_requests(path)


def test_a_pair_that_says_one_refusal_for_several_is_refused():
    with pytest.raises(ValueError, match="beginnings of texts"):
        RequestPair("a", "b", "Sorry")
