"""Concepts and tasks by name: a folder's own come before the library's, and paths are taken as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repe.data import catalogue
from repe.data.items import load_items
from repe.data.pairs import ContrastPair
from tests import zoo

NAME = "politeness"


@pytest.fixture
def home(tmp_path):
    """A folder with a concept, as beside a model's weights."""
    write_pairs(tmp_path / "concepts" / f"{NAME}.jsonl")
    (tmp_path / "tasks").mkdir()
    return tmp_path


def write_pairs(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"positive": f"{word} please", "negative": f"{word} now!", "item": word} for word in "abcdefgh"]
    path.write_text("\n".join(map(json.dumps, lines)))


def test_the_room_is_quick_to_enter():
    heavy = ["torch", "transformers", "sklearn", "scipy", "numpy"]
    code = f"import sys, repe.data; repe.data.concepts('.'); print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_files_of_the_folder_join_the_library_and_come_first(home):
    write_pairs(home / "concepts" / "kindness.jsonl")
    write_pairs(home / "concepts" / "honesty.jsonl")
    (home / "concepts" / "notes.txt").write_text("not pairs")
    library = catalogue.concepts()
    assert "honesty" in library
    assert catalogue.concepts(home) == library | {"honesty": "", "kindness": "", NAME: ""}
    assert list(catalogue.concepts(home)) == sorted(catalogue.concepts(home))
    assert catalogue.find("honesty", home) == home / "concepts" / "honesty.jsonl"
    assert catalogue.find("fairness", home) == catalogue.LIBRARY / "concepts" / "fairness.json"
    assert catalogue.find(NAME, home) == home / "concepts" / f"{NAME}.jsonl"
    assert catalogue.has(NAME, home)
    assert not catalogue.has(NAME)


def test_the_concepts_of_a_model_are_those_of_its_folder(home):
    model = zoo.build("llama")
    assert catalogue.concepts(model) == catalogue.concepts()
    model.config._name_or_path = str(home)
    assert catalogue.concepts(model) == catalogue.concepts(home) == catalogue.concepts(str(home))


def test_without_a_folder_the_concepts_are_those_of_the_library():
    described = catalogue.concepts()
    assert "honesty" in described
    assert all(described.values())
    assert catalogue.find("honesty").is_file()


def test_concepts_are_listed_without_their_pairs(monkeypatch):
    monkeypatch.setattr("repe.data.concept._crossed", lambda *_: pytest.fail("pairs are made"))
    assert "honesty" in catalogue.concepts()


def test_an_unknown_name_says_which_are_near_and_which_there_are(home):
    with pytest.raises(ValueError, match=rf"no concept is called 'polite'\. Did you mean '{NAME}'.*or give contrast p"):
        catalogue.find("polite", home)
    with pytest.raises(ValueError, match=r"no concept is called 'xyz'\. There are \['confidence'"):
        catalogue.concept_of("xyz")


def test_a_path_is_found_as_it_is(home, tmp_path):
    assert catalogue.find(tmp_path / "x.json", home) == tmp_path / "x.json"
    assert catalogue.find("some/x.csv") == Path("some/x.csv")


@pytest.mark.parametrize("path", [Path("polite"), Path("polite.txt"), "some/polite", "./polite.txt", "concepts/"])
def test_what_is_a_path_and_no_name_is_read_as_one(path):
    with pytest.raises(ValueError, match=r"a concept is read from a file that ends in \.json, \.jsonl, \.csv"):
        catalogue.concept_of(path)


def test_a_task_is_found_by_name_in_the_folder_and_in_the_library(home, tmp_path):
    for name in ("honesty.jsonl", "manners.csv", "notes.json", "notes.txt"):
        (home / "tasks" / name).write_text("")
    assert catalogue.find_task("honesty", home) == home / "tasks" / "honesty.jsonl"
    assert catalogue.find_task("manners", home) == home / "tasks" / "manners.csv"
    assert catalogue.find_task("skills", home) == catalogue.LIBRARY / "tasks" / "skills.jsonl"
    assert catalogue.find_task("honesty") == catalogue.LIBRARY / "tasks" / "honesty.jsonl"
    assert catalogue.find_task(tmp_path / "x.jsonl") == tmp_path / "x.jsonl"
    assert catalogue.find_task("some/x.csv") == Path("some/x.csv")
    with pytest.raises(
        ValueError, match=r"no task is called 'notes'\..* There are \[.*\]; or give items, or the path of a"
    ):
        catalogue.find_task("notes", home)
    with pytest.raises(ValueError, match=r"no task is called 'honest'\. Did you mean 'honesty'"):
        catalogue.find_task("honest")


@pytest.mark.parametrize("path", ["x.json", "some/x.json", Path("x"), Path("x.txt"), "./x"])
def test_a_task_is_read_from_json_lines_and_csv_alone(path):
    with pytest.raises(ValueError, match=r"x.*: items are read from a file that ends in \.jsonl, \.csv"):
        load_items(catalogue.find_task(path))


def test_a_concept_comes_from_its_name_its_path_its_pairs_or_itself(home):
    concept = catalogue.concept_of(NAME, home)
    assert (concept.name, len(concept.pairs)) == (NAME, 8)
    assert catalogue.concept_of(home / "concepts" / f"{NAME}.jsonl") == concept
    assert catalogue.concept_of(str(home / "concepts" / f"{NAME}.jsonl")) == concept
    assert catalogue.concept_of(concept) is concept
    for pairs in (list(concept.pairs), concept.pairs, iter(concept.pairs)):
        bare = catalogue.concept_of(pairs)
        assert (bare.name, bare.pairs, bare.description) == ("concept", concept.pairs, "")


@pytest.mark.parametrize(
    ("pairs", "kind"), [(None, "NoneType"), (ContrastPair("a", "b"), "ContrastPair"), (3, "int"), ({"a": "b"}, "dict")]
)
def test_what_cannot_be_pairs_is_refused(pairs, kind):
    with pytest.raises(
        TypeError, match=rf"got a {kind}: expected the name of a concept, the path of a file of pairs, or"
    ):
        catalogue.concept_of(pairs)


def test_a_file_that_calls_its_concept_otherwise_is_refused_by_its_name(home):
    content = {
        "concept": "good", "templates": [{"name": "t", "text": "{x}"}],
        "items": [{"name": n, "x": {"positive": f"{n} please", "negative": f"{n} now"}} for n in "abcdefgh"],
    }  # fmt: skip
    path = home / "concepts" / "bad.json"
    path.write_text(json.dumps(content))
    message = r"bad\.json: the concept in it is 'good', and the file's name says 'bad': make them one"
    for use in (catalogue.concepts, lambda folder: catalogue.concept_of("bad", folder)):
        with pytest.raises(ValueError, match=message):
            use(home)
    assert catalogue.concept_of(path).name == "good"
