"""The reader of files: what is read is what was written, and what is wrong says at which line."""

import json

import pytest

from repe.data.files import Row, TextOrChat, read_document, read_rows


class Line(Row):
    text: TextOrChat
    held_out: bool | None = None
    notes: list[dict[str, str]] = []


def rows(path, content):
    path.write_text(content, encoding="utf-8")
    return [(where.removeprefix(f"{path}, "), row.text, row.held_out) for where, row in read_rows(path, Line, "lines")]


def test_every_line_is_read_with_the_place_that_it_stands_at(tmp_path):
    path = tmp_path / "x.jsonl"
    assert rows(path, '\ufeff{"text": "a"}\r\n\n  {"text": "b", "held_out": true}') == [
        ("line 1", "a", None),
        ("line 3", "b", True),
    ]


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    text = "one\u2028two\u0085three\x1cfour"
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert rows(tmp_path / "x.jsonl", f"{line}\n{line}\n") == [("line 1", text, None), ("line 2", text, None)]
    assert rows(tmp_path / "x.csv", f"text\n{text}\n") == [("line 2", text, None)]


def test_a_null_and_a_blank_cell_are_as_if_they_were_not_there(tmp_path):
    assert rows(tmp_path / "x.jsonl", '{"text": "a", "held_out": null, "notes": null}') == [("line 1", "a", None)]
    assert rows(tmp_path / "x.csv", "text,held_out,notes\na,,\n") == [("line 2", "a", None)]
    with pytest.raises(ValueError, match="line 2: 'text' is missing"):
        rows(tmp_path / "x.csv", "text,held_out\n,true\n")


def test_cells_are_texts_but_for_true_and_false_where_a_flag_stands(tmp_path):
    content = '\ufeffheld_out,text\n True ,true\nfalse,"1,\n2"\n'
    assert rows(tmp_path / "x.csv", content) == [("line 2", "true", True), ("line 4", "1,\n2", False)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": }', "x.jsonl, line 3, column 10: not JSON: "),
        ("x.jsonl", '"a"', "x.jsonl, line 1: expected names with values, got 'a'"),
        ("x.jsonl", "{}", "line 1: 'text' is missing"),
        (
            "x.jsonl",
            '{"text": "a", "txt": 1, "Text": 1}',
            "line 1: unknown 'Text', 'txt': there are held_out, notes, text",
        ),
        ("x.jsonl", '{"text": 3}', "line 1: text: expected a text, got 3"),
        ("x.jsonl", '{"text": ["a"]}', r"line 1: text\[0\]: expected names with values, got 'a'"),
        ("x.jsonl", '{"text": [{"role": "user"}]}', r"line 1: text\[0\]: 'content' is missing"),
        ("x.jsonl", '{"text": "a", "held_out": 1}', "line 1: held_out: expected true or false, got 1"),
        ("x.jsonl", '{"text": "a", "notes": [{}, {"b": 1}]}', r"line 1: notes\[1\].b: expected a text, got 1"),
        ("x.jsonl", '{"text": "a", "text": "b"}', "line 1: the key 'text' stands twice in one object: {'text': 'b'}"),
        ("x.jsonl", '{"text": "a", "notes": [{"b": "c", "b": "c"}]}', "line 1: the key 'b' stands twice"),
        ("x.csv", "text,held_out\na,true\nc\n", "x.csv, line 3: .* as many cells as the header: 2"),
        ("x.csv", "text\na,b\n", "x.csv, line 2: .* as many cells"),
        ("x.csv", "text,text\na,b\n", "x.csv, line 1: two columns are called 'text'"),
        ("x.csv", 'text\n"a"b\n', "x.csv, after line 1: not CSV"),
        ("x.csv", "TEXT\na\n", "x.csv, line 2: unknown 'TEXT': there are"),
        ("x.csv", "text,held_out\na,yes\n", "x.csv, line 2: held_out: expected true or false, got 'yes'"),
        ("x.txt", "", r"x.txt: lines are read from a file that ends in .jsonl, .csv"),
    ],
)
def test_a_wrong_line_says_which_and_what_was_expected(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / name, content)


class Part(Row):
    name: str


class Document(Row):
    parts: list[Part]
    more: dict[str, Part] = {}


@pytest.mark.parametrize("strange", ["plain", 'a \\" quote {', "a {brace} } and \\\\", "\\u007b"])
def test_a_fault_in_a_document_is_at_the_line_of_the_object_that_it_stands_in(tmp_path, strange):
    path = tmp_path / "x.json"
    good, bad = f'{{"name": "{strange}"}}', '{\n"name": 3}'
    path.write_text(f'{{"parts": [{good}, {good},\n\n{bad},\n{good}]}}')
    with pytest.raises(ValueError, match=r"x.json, line 3: parts\[2\].name: expected a text, got 3"):
        read_document(path, Document)
    path.write_text(f'{{"parts": [{good}],\n "more": {{"a": {good},\n "b": {bad}}}}}')
    with pytest.raises(ValueError, match=r"x.json, line 3: more.b.name: expected a text, got 3"):
        read_document(path, Document)
    path.write_text(f'{{"parts": [{good},\n{{"name": "a", \n"name": "b"}}]}}')
    with pytest.raises(ValueError, match=r"x.json, line 2: the key 'name' stands twice"):
        read_document(path, Document)
    path.write_text(f'{{"parts": [{good}]}}')
    assert read_document(path, Document).parts[0].name == json.loads(good)["name"]


def test_a_file_that_is_not_text_or_not_there(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x.jsonl: not UTF-8"):
        list(read_rows(tmp_path / "x.jsonl", Line, "lines"))
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "y.csv", Line, "lines"))
