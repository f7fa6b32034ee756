"""Contrast pairs: what is read is what was written, what is wrong says where, and no split leaks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repe.data.files import head, load
from repe.data.pairs import ContrastPair, check, split


def crossed(templates: int, items: int) -> list[ContrastPair]:
    return [
        ContrastPair(f"{t} {i} yes", f"{t} {i} no", f"t{t}", f"i{i}") for t in range(templates) for i in range(items)
    ]


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


# Pairs


def test_a_pair_is_frozen_and_a_list_of_messages_becomes_a_tuple():
    pair = ContrastPair([{"role": "user", "content": "yes"}], [{"role": "user", "content": "no"}])
    assert pair.positive == ({"role": "user", "content": "yes"},)
    with pytest.raises(AttributeError):
        pair.template = "other"


CHAT = ({"role": "user", "content": "yes"},)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (ContrastPair("", "no"), "pair 1: positive is empty"),
        (ContrastPair("yes", " \n"), "pair 1: negative is empty"),
        (ContrastPair("yes", ()), "pair 1: negative is empty"),
        (ContrastPair("yes", ({"role": "user", "content": ""},)), "pair 1: negative is empty"),
        (ContrastPair("yes", None), "pair 1: negative must be a text or a list of messages, and is None"),
        (ContrastPair("yes", ({"role": "user"},)), "pair 1: negative: a message has a 'role' and a 'content'"),
        (ContrastPair("yes", CHAT), "pair 1: one pole is a text and the other a chat"),
        (ContrastPair("yes", "yes"), "pair 1: the positive and the negative are identical"),
        (ContrastPair("yes", "yes", "t", "i"), r"pair 1 \(template 't', item 'i'\): .* identical"),
        (ContrastPair(CHAT, CHAT, item="i"), r"pair 1 \(item 'i'\): .* identical"),
    ],
)
def test_check_names_the_pair_and_what_is_wrong_with_it(pair, message):
    with pytest.raises(ValueError, match=message):
        check([ContrastPair("yes", "no"), pair])


def test_check_refuses_no_pairs_and_accepts_good_ones():
    with pytest.raises(ValueError, match="no contrast pairs"):
        check([])
    check([ContrastPair("yes", "no"), ContrastPair(CHAT, ({"role": "user", "content": "no"},))])


# Splitting


@settings(deadline=None)
@given(
    design=st.sets(st.tuples(st.sampled_from(["", *"abcd"]), st.sampled_from(["", *"uvwxyz"])), min_size=1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_no_template_or_item_is_on_both_sides(design, share, seed):
    pairs = [ContrastPair(f"{place} yes", f"{place} no", *place) for place in sorted(design)]
    try:
        fit, held = split(pairs, share, seed)
    except ValueError as error:
        assert "at least 2 of each" in str(error)  # noqa: PT017
        return
    assert min(len(fit), len(held)) >= 2
    assert set(fit) | set(held) <= set(pairs)
    templates, items = ({getattr(pair, name) for pair in pairs} for name in ("template", "item"))
    if len(templates) > 1:
        assert not {pair.template for pair in fit} & {pair.template for pair in held}
    if len(items) > 1:
        assert not {pair.item for pair in fit} & {pair.item for pair in held} - {""}
    assert not set(fit) & set(held)


@pytest.mark.parametrize(("templates", "items"), [(1, 4), (4, 1), (2, 4), (3, 3), (4, 3), (6, 2), (6, 6), (50, 50)])
def test_a_small_crossed_design_is_split(templates, items):
    fit, held = split(crossed(templates, items))
    assert len(fit) >= 2
    assert len(held) >= 2


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_share_is_of_templates_and_of_items(share):
    fit, held = split(crossed(4, 20), share)
    assert len({pair.template for pair in held}) == 4 * share
    assert len({pair.item for pair in held}) == 20 * share
    assert len(fit) == 4 * 20 * (1 - share) ** 2
    assert len(held) == 4 * 20 * share**2


def test_a_great_share_leaves_a_template_and_an_item_to_fit_on():
    fit, held = split(crossed(2, 10), 0.75)
    assert (len(fit), len(held)) == (2, 8)


def test_items_of_one_template_go_with_it():
    pairs = [ContrastPair(f"{n} yes", f"{n} no", f"t{n // 5}", f"i{n}" * (n % 2)) for n in range(20)]
    fit, held = split(pairs)
    assert (len(fit), len(held)) == (15, 5)


def test_an_item_that_alone_is_shared_does_not_leak():
    pairs = [ContrastPair(f"{n} yes", f"{n} no", f"t{n % 2}", f"i{n // 2 and n}") for n in range(10)]
    fit, held = split(pairs)
    assert "i0" not in {pair.item for pair in fit}
    assert len(fit) == 4
    assert len(held) == 5


def test_the_split_is_the_seeds():
    pairs = crossed(4, 8)
    assert split(pairs, seed=3) == split(pairs, seed=3)
    assert len({split(pairs, seed=seed) for seed in range(10)}) > 5
    backwards = split(pairs[::-1], seed=3)
    assert [set(side) for side in backwards] == [set(side) for side in split(pairs, seed=3)]


def test_the_split_is_the_same_in_another_process():
    code = (
        "from repe.data.pairs import ContrastPair, split;"
        "print(split([ContrastPair(f'{t}{i}', '-', t, i) for t in 'abc' for i in 'uvwxyz']))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(outputs) == 1


def test_the_pairs_own_decision_stands():
    pairs = [ContrastPair(f"{n} yes", f"{n} no", held_out=n > 2) for n in range(5)]
    assert split(pairs, 0.5) == (tuple(pairs[:3]), tuple(pairs[3:]))


@pytest.mark.parametrize(
    ("pairs", "share", "message"),
    [
        ([], 0.25, "no contrast pairs"),
        (crossed(1, 3), 0.25, "3 pairs split into 1 to fit on and 2 held out, and at least 2 of each are needed"),
        (crossed(1, 1), 0.25, "1 pairs split into 0 to fit on and 0 held out"),
        (crossed(2, 4), 0.0, "between 0 and 1: got 0.0"),
        (crossed(2, 4), 1.0, "between 0 and 1: got 1.0"),
        ([ContrastPair("a", "b", held_out=True), ContrastPair("c", "d")], 0.25, "decided for 1 of 2 pairs"),
        ([ContrastPair("a", "b", held_out=True)] * 4, 0.25, "4 pairs split into 0 to fit on and 4 held out"),
    ],
)
def test_what_cannot_be_split_says_why(pairs, share, message):
    with pytest.raises(ValueError, match=message):
        split(pairs, share)


# Concept files


def test_a_concept_is_every_item_in_every_template(tmp_path):
    loaded = load(written(tmp_path, concept()))
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
    pairs = load(written(tmp_path, concept(templates=templates))).pairs
    assert pairs[0].positive == ({"role": "system", "content": "Ann"}, {"role": "user", "content": "it is blue?"})
    assert pairs[0].negative == ({"role": "system", "content": "Ann"}, {"role": "user", "content": "it is green?"})
    assert pairs[3].positive == ({"role": "user", "content": "Bob"},)
    assert pairs[3].negative == ({"role": "user", "content": "not Bob"},)


def test_what_a_field_holds_is_not_filled_again_and_braces_written_twice_are_braces(tmp_path):
    template = {"name": "t", "positive": '{{"a": {x}}} {{}} {{1}} {{x}} yes', "negative": "{x} no"}
    pairs = load(written(tmp_path, concept(templates=[template], items=[{"name": "i", "x": "{y}"}]))).pairs
    assert pairs[0].positive == '{"a": {y}} {} {1} {x} yes'
    assert pairs[0].negative == "{y} no"


def test_pairs_that_would_leak_are_left_out(tmp_path):
    templates = [{"name": f"t{n}", "text": f"{n} {{x}}", "held_out": n > 1} for n in range(4)]
    items = [{"name": f"i{n}", "x": {"positive": f"a{n}", "negative": f"b{n}"}} for n in range(5)]
    items[0]["held_out"] = items[1]["held_out"] = True
    pairs = load(written(tmp_path, concept(templates=templates, items=items))).pairs
    expected = {(t, i): t > 1 for t, i in itertools.product(range(4), range(5)) if (t > 1) == (i < 2)}
    assert {(int(pair.template[1]), int(pair.item[1])): pair.held_out for pair in pairs} == expected
    fit, held = split(pairs)
    assert (len(fit), len(held)) == (6, 4)


@pytest.mark.parametrize("decided", ["templates", "items"])
def test_what_is_decided_for_templates_or_items_alone_decides(tmp_path, decided):
    content = concept(templates=[{"name": name, "text": f"{name} {{who}} {{claim}}"} for name in "ab"])
    content[decided][1]["held_out"] = True
    pairs = load(written(tmp_path, content)).pairs
    assert len(pairs) == 4
    assert [pair.held_out for pair in pairs] == (
        [False, False, True, True] if decided == "templates" else [False, True] * 2
    )


ITEM = {"name": "i", "x": {"positive": "a", "negative": "b"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"honesty.json: not JSON: .* line 1"),
        ("[]", r"honesty.json: expected names with values, got \[\]"),
        ({"templates": [], "items": []}, "honesty.json: 'concept' is missing"),
        (concept(concept=3), "honesty.json: 'concept' has a value of the wrong kind: 3"),
        (concept(poles={"positive": "x"}), "honesty.json: poles: 'negative' is missing"),
        (concept(templates=[]), "honesty.json: no contrast pairs"),
        (concept(templates=[{"text": "{claim}"}]), r"templates\[0\]: 'name' is missing"),
        (concept(templates=[{"name": "t"}]), "template 't': .* has none of them"),
        (concept(templates=[{"name": "t", "text": "", "messages": []}]), "template 't': .* has 'text', 'messages'"),
        (concept(templates=[{"name": "t", "positive": "x"}]), "template 't': .* has 'positive'"),
        (concept(templates=[{"name": "t", "text": " "}]), "template 't': positive is empty"),
        (concept(templates=[{"name": "t", "messages": ["x"]}]), "template 't': positive: a message has a 'role'"),
        (concept(templates=[{"name": "t", "text": "{x}", "heldout": True}]), "template 't': unknown 'heldout'"),
        (
            concept(templates=[{"name": "t", "text": "{z}"}]),
            "template 't', item 'sky' .line 1.: .* asks for {z}, .* who, claim",
        ),
        (concept(templates=[{"name": "t", "text": "{name}"}]), "item 'sky' .line 1.: the template asks for {name}"),
        (concept(templates=[{"name": "t", "text": "{who}"}]), "template 't', item 'sky' .line 1.: .* identical"),
        (concept(templates=[{"name": "t", "text": "{claim}"}] * 2), "two templates are named 't'"),
        (
            concept(templates=[{"name": n, "text": "{claim}"} for n in "ab"]),
            "template 'b', item 'sky' .*: the same .* 'a'",
        ),
        (concept(templates=[{"name": "t", "text": "{claim}", "held_out": "no"}]), "templates 't': 'held_out' must be"),
        (concept(templates=[{"name": "t", "text": "{claim}", "held_out": 0}]), "templates 't': 'held_out' must be"),
        (concept(items=[ITEM, ITEM]), "two items are named 'i'"),
        (
            concept(items=[{"name": "i", "who": "A", "claim": {"positive": "x"}}]),
            "field 'claim': 'negative' is missing",
        ),
        (
            concept(items=[{"name": "i", "who": 3, "claim": "x"}]),
            "item 'i' .line 1.: 'who' has a value of the wrong kind: 3",
        ),
        (concept(description=3), "honesty.json: 'description' has a value of the wrong kind: 3"),
        (concept(wording=["x"]), r"honesty.json: 'wording' has a value of the wrong kind: \['x'\]"),
        (concept(sources="a paper"), "honesty.json: 'sources' must be a list of texts, and is 'a paper'"),
        (concept(sources=["a paper", 3]), r"honesty.json: 'sources' must be a list of texts, and is \['a paper', 3\]"),
        (concept(item=[]), "honesty.json: unknown 'item': there are concept, "),
        (concept(prompts={"positive": "x"}), "honesty.json: prompts: 'negative' is missing"),
        (
            concept(prompts={"positive": "x", "negative": 3}),
            "honesty.json: prompts: 'negative' has a value of the wrong",
        ),
        (concept(prompts={"positive": "x", "negative": "y", "both": "z"}), "honesty.json: prompts: unknown 'both'"),
        (concept(poles={"positive": "x", "negative": "y", "both": "z"}), "honesty.json: poles: unknown 'both'"),
        (
            concept(
                items=[ITEM | {"x": {"positive": "a", "negative": "b", "neutral": "c"}}],
                templates=[{"name": "t", "text": "{x}"}],
            ),
            "item 'i' .line 1.: field 'x': unknown 'neutral'",
        ),
        (
            concept(items=[{"name": "i", "who": "A", "heldout": True, "claim": ITEM["x"]}]),
            "line 1: item 'i' has 'heldout', which no template asks for",
        ),
        (
            concept(templates=[{"name": "t", "messages": [{"role": "user", "content": "{claim}", "name": "x"}]}]),
            "template 't': positive: a message: unknown 'name'",
        ),
        (
            concept(templates=[{"name": "t", "text": "{claim} {1}"}]),
            "template 't': positive: the '{' in '{claim} .1}' belongs to no {field}: write a literal brace twice, '{{'",
        ),
        (
            concept(templates=[{"name": "t", "messages": [{"role": "user", "content": "{claim} }"}]}]),
            "template 't': positive: the '}' in '{claim} }' belongs to no {field}: write a literal brace twice, '}}'",
        ),
        (concept(templates=[{"name": "t", "text": "{ claim }"}]), "template 't': positive: the '{' in '{ claim }'"),
        (
            '{"concept": "a", "templates": [], "items": [{"name": "i", "x": "a", "x": "b"}]}',
            "honesty.json: the key 'x' stands twice in one object: {'name': 'i'",
        ),
    ],
)
def test_a_wrong_concept_file_says_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, content))


def test_a_file_is_named_by_the_lines_of_its_template_and_item(tmp_path):
    templates = [{"name": "a", "text": "{who}, {claim}"}, {"name": "b", "text": "{who}"}]
    text = json.dumps(concept(templates=templates), indent=1)
    line = {name: text.split("\n").index(f'   "name": "{name}",') for name in ("a", "b", "sky", "sea")}  # of its "{"
    assert line == {"a": 12, "b": 16, "sky": 22, "sea": 30}
    with pytest.raises(ValueError, match=r"honesty.json, line 16: template 'b', item 'sky' \(line 22\): .* identical"):
        load(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"line 12: template 'a', item 'sea' \(line 30\): 'who' has a value of the wr"):
        load(written(tmp_path, text.replace('"Bob"', "3")))


def test_held_out_of_null_is_undecided(tmp_path):
    content = concept()
    content["items"][0]["held_out"] = None
    assert [pair.held_out for pair in load(written(tmp_path, content)).pairs] == [None, None]
    content["items"][1]["held_out"] = True
    assert [pair.held_out for pair in load(written(tmp_path, content)).pairs] == [False, True]


def test_prompts_and_the_reason_for_its_wording_come_with_a_concept(tmp_path):
    prompts = {"positive": "Tell the truth.", "negative": "Lie."}
    loaded = load(written(tmp_path, concept(prompts=prompts, wording="it is a word")))
    assert loaded.prompts == prompts
    assert loaded.wording == "it is a word"
    assert load(written(tmp_path, concept())).prompts == {}
    assert head(written(tmp_path, concept())) == ("honesty", "saying what one believes")


def test_a_file_is_read_once_until_it_changes(tmp_path):
    path = written(tmp_path, concept())
    assert load(path) is load(str(path))
    written(tmp_path, concept(description="another"))
    assert load(path).description == "another"


def test_a_folder_is_no_file_of_pairs(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ValueError, match=r"x.json is a folder: a concept is read from a file"):
        load(tmp_path / "x.json")


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
    loaded = load(written(tmp_path, "\r\n".join(lines), "mood.jsonl"))
    assert loaded.name == "mood"
    assert loaded.pairs[:3] == PAIRS
    assert loaded.pairs[3].negative == ({"role": "user", "content": "b"},)


def test_csv(tmp_path):
    text = 'positive,negative,template,item,held_out\n"yes, \u2028 indeed",no,t,i,True\nja,nein,t,,false\noui,non,,,\n'
    assert load(written(tmp_path, "\ufeff" + text, "mood.csv")).pairs == PAIRS
    assert load(written(tmp_path, "negative,positive\nnon,oui\n", "mood.csv")).pairs == PAIRS[2:]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "x.jsonl: no contrast pairs"),
        ("x.jsonl", '{"positive": "a", "negative": "b"}\n\n{', "x.jsonl, line 3: not JSON"),
        ("x.jsonl", '"a"', "x.jsonl, line 1: expected names with values, got 'a'"),
        ("x.jsonl", '{"positive": "a"}', "x.jsonl, line 1: 'negative' is missing"),
        ("x.jsonl", '{"positive": "a", "negative": 3}', "line 1: 'negative' has a value of the wrong kind: 3"),
        ("x.jsonl", '{"positive": "a", "negative": ""}', "line 1: negative is empty"),
        ("x.jsonl", '{"positive": "a", "negative": "a"}', "line 1: .* identical"),
        (
            "x.jsonl",
            '{"positive": "a", "negative": "b", "held_out": "yes"}',
            "line 1: 'held_out' must be true or false",
        ),
        ("x.jsonl", '{"positive": "a", "negative": "b", "itme": "i"}', "line 1: unknown 'itme': .* item"),
        ("x.jsonl", '{"positive": "a", "positive": "c", "negative": "b"}', "line 1: the key 'positive' stands twice"),
        (
            "x.jsonl",
            '{"positive": [{"role": "user", "content": "a", "id": 3}], "negative": [{"role": "user", "content": "b"}]}',
            "line 1: positive: a message: unknown 'id': there are content, role",
        ),
        ("x.jsonl", '{"positive": "a", "negative": "b"}\n' * 2, "line 2: the same pair stands at .*x.jsonl, line 1"),
        ("x.csv", "positive,negative\na,b\nc\n", "x.csv, line 3: .* as many cells as the header: 2"),
        ("x.csv", "positive,negative\na,b,c\n", "x.csv, line 2: .* as many cells"),
        ("x.csv", "positive\na\n", "x.csv, line 2: 'negative' is missing"),
        ("x.csv", "positive,negative,held_out\na,b,maybe\n", "line 2: 'held_out' must be .* is 'maybe'"),
        ("x.csv", 'positive,negative\n"a"b,c\n', "x.csv, after line 1: not CSV"),
        ("x.csv", 'positive,negative\n"a\nb",\n', "line 3: negative is empty"),
        ("x.txt", "", r"x.txt: a concept is read from a file that ends in .json, .jsonl, .csv"),
    ],
)
def test_a_wrong_list_of_pairs_says_where(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, text, name))


def test_a_file_that_is_not_text_or_not_there(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x.jsonl: not UTF-8"):
        load(tmp_path / "x.jsonl")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "y.jsonl")
