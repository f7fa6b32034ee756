"""Concept files: what is read is what was written, and what is wrong says where."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from repe.data.concept import head, load_concept
from repe.data.pairs import ContrastPair, split


def concept(**changes: Any) -> dict[str, Any]:
    return {
        "concept": "honesty",
        "description": "saying what one believes",
        "poles": {"positive": "honest", "negative": "untruthful"},
        "sources": ["a paper"],
        "templates": [{"name": "plain", "text": "{who} said: {claim}"}],
        "items": [
            {"name": "sky", "who": "Ann", "claim": {"positive": "it is blue", "negative": "it is green"}},
            {"name": "sea", "who": "Bob", "claim": {"positive": "it is wet", "negative": "it is dry"}},
        ],
    } | changes


def written(folder: Path, content: Any, name: str = "honesty.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# Concept files


def test_a_concept_is_every_item_in_every_template(tmp_path):
    loaded = load_concept(written(tmp_path, concept()))
    assert (loaded.name, loaded.description) == ("honesty", "saying what one believes")
    assert loaded.poles == {"positive": "honest", "negative": "untruthful"}
    assert loaded.sources == ("a paper",)
    assert loaded.pairs == (
        ContrastPair("Ann said: it is blue", "Ann said: it is green", "plain", "sky"),
        ContrastPair("Bob said: it is wet", "Bob said: it is dry", "plain", "sea"),
    )


def test_a_template_of_messages_is_filled_a_message_at_a_time(tmp_path):
    shared = [{"role": "system", "content": "{who}"}, {"role": "user", "content": "{claim}?"}]
    own = {"positive": [{"role": "user", "content": "{who}"}], "negative": [{"role": "user", "content": "not {who}"}]}
    templates = [{"name": "shared", "messages": shared}, {"name": "own"} | own]
    pairs = load_concept(written(tmp_path, concept(templates=templates))).pairs
    assert pairs[0].positive == ({"role": "system", "content": "Ann"}, {"role": "user", "content": "it is blue?"})
    assert pairs[0].negative == ({"role": "system", "content": "Ann"}, {"role": "user", "content": "it is green?"})
    assert pairs[3].positive == ({"role": "user", "content": "Bob"},)
    assert pairs[3].negative == ({"role": "user", "content": "not Bob"},)


def test_what_a_field_holds_is_not_filled_again_and_braces_written_twice_are_braces(tmp_path):
    template = {"name": "t", "positive": '{{"a": {x}}} {{}} {{1}} {{x}} yes', "negative": "{x} no"}
    pairs = load_concept(written(tmp_path, concept(templates=[template], items=[{"name": "i", "x": "{y}"}]))).pairs
    assert pairs[0].positive == '{"a": {y}} {} {1} {x} yes'
    assert pairs[0].negative == "{y} no"


def test_pairs_that_would_leak_are_left_out(tmp_path):
    templates = [{"name": f"t{n}", "text": f"{n} {{x}}", "held_out": n > 1} for n in range(4)]
    items = [{"name": f"i{n}", "x": {"positive": f"a{n}", "negative": f"b{n}"}} for n in range(5)]
    items[0]["held_out"] = items[1]["held_out"] = True
    pairs = load_concept(written(tmp_path, concept(templates=templates, items=items))).pairs
    expected = {(t, i): t > 1 for t, i in itertools.product(range(4), range(5)) if (t > 1) == (i < 2)}
    assert {(int(pair.template[1]), int(pair.item[1])): pair.held_out for pair in pairs} == expected
    fit, held = split(pairs)
    assert (len(fit), len(held)) == (6, 4)


@pytest.mark.parametrize("decided", ["templates", "items"])
def test_what_is_decided_for_templates_or_items_alone_decides(tmp_path, decided):
    content = concept(templates=[{"name": name, "text": f"{name} {{who}} {{claim}}"} for name in "ab"])
    content[decided][1]["held_out"] = True
    pairs = load_concept(written(tmp_path, content)).pairs
    assert len(pairs) == 4
    assert [pair.held_out for pair in pairs] == (
        [False, False, True, True] if decided == "templates" else [False, True] * 2
    )


ITEM = {"name": "i", "x": {"positive": "a", "negative": "b"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", r"honesty.json, line 2, column 1: not JSON: "),
        ("[]", r"honesty.json, line 1: expected names with values, got \[\]"),
        ({"templates": [], "items": []}, "honesty.json, line 1: 'concept' is missing"),
        (concept(concept=3), "line 1: concept: expected a text, got 3"),
        (concept(poles={"positive": "x"}), "line 1: poles: 'negative' is missing"),
        (concept(templates=[]), "honesty.json: no contrast pairs"),
        (concept(templates=[{"text": "{claim}"}]), r"templates\[0\]: 'name' is missing"),
        (concept(templates=[{"name": "t"}]), r"line 1: templates\[0\]: expected 'text', or 'messages', or .* none of"),
        (
            concept(templates=[{"name": "t", "text": "", "messages": []}]),
            r"templates\[0\]: expected .*, and there are 'text', 'messages'",
        ),
        (concept(templates=[{"name": "t", "positive": "x"}]), r"templates\[0\]: expected .*, and there are 'positive'"),
        (concept(templates=[{"name": "t", "text": " "}]), r"templates\[0\]: positive is empty"),
        (concept(templates=[{"name": "t", "messages": ["x"]}]), r"templates\[0\].messages\[0\]: expected names with"),
        (
            concept(templates=[{"name": "t", "text": "{x}", "heldout": True}]),
            r"templates\[0\]: unknown 'heldout': there are h",
        ),
        (
            concept(templates=[{"name": "t", "text": "{z}"}]),
            "template 't', item 'sky' .line 1.: .* asks for {z}, .* who, claim",
        ),
        (concept(templates=[{"name": "t", "text": "{name}"}]), "item 'sky' .line 1.: the template asks for {name}"),
        (concept(templates=[{"name": "t", "text": "{who}"}]), "template 't', item 'sky' .line 1.: .* identical"),
        (
            concept(templates=[{"name": "t", "text": "{claim}"}] * 2),
            "line 1: the template 't' stands already at .*honesty.json, line 1",
        ),
        (
            concept(templates=[{"name": n, "text": "{claim}"} for n in "ab"]),
            "template 'b', item 'sky' .*: the same .* 'a'",
        ),
        (
            concept(templates=[{"name": "t", "text": "{claim}", "held_out": "no"}]),
            r"templates\[0\].held_out: expected true or false, got 'no'",
        ),
        (
            concept(templates=[{"name": "t", "text": "{claim}", "held_out": 0}]),
            r"templates\[0\].held_out: expected true or false, got 0",
        ),
        (concept(items=[ITEM, ITEM]), "line 1: the item 'i' stands already at"),
        (
            concept(items=[{"name": "i", "who": "A", "claim": {"positive": "x"}}]),
            r"items\[0\].claim: 'negative' is missing",
        ),
        (
            concept(items=[{"name": "i", "who": 3, "claim": "x"}]),
            r"line 1: items\[0\].who: expected a text, got 3",
        ),
        (concept(description=3), "line 1: description: expected a text, got 3"),
        (concept(wording=["x"]), r"line 1: wording: expected a text, got \['x'\]"),
        (concept(sources="a paper"), "line 1: sources: expected a list, got 'a paper'"),
        (concept(sources=["a paper", 3]), r"line 1: sources\[1\]: expected a text, got 3"),
        (concept(item=[]), "line 1: unknown 'item': there are concept, "),
        (concept(prompts={"positive": "x"}), "line 1: prompts: 'negative' is missing"),
        (
            concept(prompts={"positive": "x", "negative": 3}),
            "line 1: prompts.negative: expected a text, got 3",
        ),
        (
            concept(prompts={"positive": "x", "negative": "y", "both": "z"}),
            "line 1: prompts: unknown 'both': there are negative, positive",
        ),
        (
            concept(poles={"positive": "x", "negative": "y", "both": "z"}),
            "line 1: poles: unknown 'both': there are negative, positive",
        ),
        (
            concept(
                items=[ITEM | {"x": {"positive": "a", "negative": "b", "neutral": "c"}}],
                templates=[{"name": "t", "text": "{x}"}],
            ),
            r"line 1: items\[0\].x: unknown 'neutral'",
        ),
        (
            concept(items=[{"name": "i", "who": "A", "heldout": "true", "claim": ITEM["x"]}]),
            "line 1: item 'i' has 'heldout', which no template asks for",
        ),
        (
            concept(templates=[{"name": "t", "messages": [{"role": "user", "content": "{claim}", "name": "x"}]}]),
            r"templates\[0\].messages\[0\]: unknown 'name': there are content, role",
        ),
        (
            concept(templates=[{"name": "t", "text": "{claim} {1}"}]),
            "template 't', item 'sky' .line 1.: the '{' in '{claim} .1}' belongs to no {field}: write .* twice, '{{'",
        ),
        (
            concept(templates=[{"name": "t", "messages": [{"role": "user", "content": "{claim} }"}]}]),
            "item 'sky' .line 1.: the '}' in '{claim} }' belongs to no {field}: write .* twice, '}}'",
        ),
        (concept(templates=[{"name": "t", "text": "{ claim }"}]), "item 'sky' .line 1.: the '{' in '{ claim }'"),
        (
            '{"concept": "a", "templates": [], "items": [{"name": "i", "x": "a", "x": "b"}]}',
            "line 1: the key 'x' stands twice in one object: {'name': 'i'",
        ),
    ],
)
def test_a_wrong_concept_file_says_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_concept(written(tmp_path, content))


def test_a_file_is_named_by_the_lines_of_its_template_and_item(tmp_path):
    templates = [{"name": "a", "text": "{who}, {claim}"}, {"name": "b", "text": "{who}"}]
    text = json.dumps(concept(templates=templates), indent=1)
    line = {name: text.split("\n").index(f'   "name": "{name}",') for name in ("a", "b", "sky", "sea")}  # of its "{"
    assert line == {"a": 12, "b": 16, "sky": 22, "sea": 30}
    with pytest.raises(ValueError, match=r"honesty.json, line 16: template 'b', item 'sky' \(line 22\): .* identical"):
        load_concept(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"honesty.json, line 30: items\[1\].who: expected a text, got 3"):
        load_concept(written(tmp_path, text.replace('"Bob"', "3")))


def test_held_out_of_null_is_undecided(tmp_path):
    content = concept()
    content["items"][0]["held_out"] = None
    assert [pair.held_out for pair in load_concept(written(tmp_path, content)).pairs] == [None, None]
    content["items"][1]["held_out"] = True
    assert [pair.held_out for pair in load_concept(written(tmp_path, content)).pairs] == [False, True]


def test_prompts_and_the_reason_for_its_wording_come_with_a_concept(tmp_path):
    prompts = {"positive": "Tell the truth.", "negative": "Lie."}
    loaded = load_concept(written(tmp_path, concept(prompts=prompts, wording="it is a word")))
    assert loaded.prompts == prompts
    assert loaded.wording == "it is a word"
    assert load_concept(written(tmp_path, concept())).prompts == {}
    assert head(written(tmp_path, concept())) == ("honesty", "saying what one believes")


def test_a_file_is_read_once_until_it_changes(tmp_path):
    path = written(tmp_path, concept())
    assert load_concept(path) is load_concept(str(path))
    written(tmp_path, concept(description="another"))
    assert load_concept(path).description == "another"


def test_a_folder_is_no_file_of_pairs(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ValueError, match=r"x.json is a folder: a concept is read from a file"):
        load_concept(tmp_path / "x.json")


# Lists of pairs

PAIRS = (
    ContrastPair("yes, \u2028 indeed", "no", "t", "i", True),
    ContrastPair("ja", "nein", "t", "", False),
    ContrastPair("oui", "non"),
)


def test_json_lines(tmp_path):
    lines = [json.dumps(vars(pair), ensure_ascii=False) for pair in PAIRS[:2]]
    lines += ["", json.dumps({"positive": "oui", "negative": "non"})]
    lines += [
        json.dumps({"positive": [{"role": "user", "content": "a"}], "negative": [{"role": "user", "content": "b"}]})
    ]
    loaded = load_concept(written(tmp_path, "\r\n".join(lines), "mood.jsonl"))
    assert loaded.name == "mood"
    assert loaded.pairs[:3] == PAIRS
    assert loaded.pairs[3].negative == ({"role": "user", "content": "b"},)


def test_csv(tmp_path):
    text = 'positive,negative,template,item,held_out\n"yes, \u2028 indeed",no,t,i,True\nja,nein,t,,false\noui,non,,,\n'
    assert load_concept(written(tmp_path, "\ufeff" + text, "mood.csv")).pairs == PAIRS
    assert load_concept(written(tmp_path, "negative,positive\nnon,oui\n", "mood.csv")).pairs == PAIRS[2:]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "\n", "x.jsonl: no contrast pairs"),
        ("x.jsonl", '{"positive": "a"}', "x.jsonl, line 1: 'negative' is missing"),
        ("x.jsonl", '{"positive": "a", "negative": 3}', "1: negative: expected a text, got 3"),
        ("x.jsonl", '{"positive": "a", "negative": ""}', "line 1: negative is empty"),
        ("x.jsonl", '{"positive": "a", "negative": []}', "line 1: negative is empty"),
        ("x.jsonl", '{"positive": "a", "negative": "a"}', "line 1: .* identical"),
        (
            "x.jsonl",
            '{"positive": "a", "negative": "b", "held_out": "true"}',
            "held_out: expected true or false, got 't",
        ),
        ("x.jsonl", '{"positive": "a", "negative": "b", "itme": "i"}', "line 1: unknown 'itme': .* item"),
        (
            "x.jsonl",
            '{"positive": [{"role": "user", "content": "a", "id": 3}], "negative": [{"role": "user", "content": "b"}]}',
            r"line 1: positive\[0\]: unknown 'id': there are content, role",
        ),
        ("x.jsonl", '{"positive": "a", "negative": "b"}\n' * 2, "line 2: the same pair stands already at .*, line 1"),
        ("x.csv", "positive\na\n", "x.csv, line 2: 'negative' is missing"),
        ("x.csv", "positive,negative,held_out\na,b,maybe\n", "line 2: held_out: expected true or false, got 'maybe'"),
        ("x.csv", 'positive,negative\n"a\nb",\n', "line 3: 'negative' is missing"),
        ("x.csv", "Positive,negative\na,b\n", "line 2: unknown 'Positive': there are .*positive"),
        ("x.txt", "", r"x.txt: a concept is read from a file that ends in .json, .jsonl, .csv"),
    ],
)
def test_a_wrong_list_of_pairs_says_where(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_concept(written(tmp_path, text, name))
