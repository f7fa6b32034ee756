"""The command line: it says what the library says, in text and in JSON, and ends as the shell expects."""

import contextlib
import inspect
import io
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import repe
from repe import cli
from repe.cli import arguments, terminal
from repe.models.blocks import SITES
from repe.models.cache import models_folder
from repe.models.files import draft_of
from repe.models.load import home_of
from repe.reading import readers, store
from repe.steering import kinds
from repe.steering.edit import EditOptions
from repe.steering.scope import NAMED_SCOPES
from repe.testbed import FOLDER
from tests import ggufs, oracles, zoo

QUESTION = "Name the trade of Abrin Tolva."
REPE = [sys.executable, "-m", "repe.cli"]
HEAVY = ["torch", "transformers", "numpy", "matplotlib", "sklearn", "scipy", "pandas", "rich", "tqdm"]
COMMANDS = [
    ["concepts"], ["edits"], ["audit"], ["extract"], ["read"], ["generate"], ["chat"], ["forecast"], ["tradeoff"],
    ["calibrate"], ["bake"], ["vectors", "list"], ["vectors", "show"], ["vectors", "verify"],
]  # fmt: skip


@pytest.fixture
def run(testbed, monkeypatch):
    """Runs a command in this process, with the testbed that is loaded already, and expects an exit code."""
    real = arguments.load
    monkeypatch.setattr(arguments, "load", lambda model=None, *rest: testbed if model is None else real(model, *rest))
    monkeypatch.delenv("REPE_DEBUG", raising=False)

    def run(*words, code=0, text=None, app=cli.app):
        done = CliRunner().invoke(app, [*map(str, words)], input=text)
        assert done.exit_code == code, done.output
        return done

    return run


def data(done):
    return json.loads(done.stdout)


def process(*words, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return subprocess.run([*REPE, *words], capture_output=True, text=True, env=env, **more)


# what it costs to ask


@pytest.mark.parametrize("words", [["--help"], ["read", "--help"], ["vectors", "--help"], ["--version"], ["concepts"]])
def test_help_and_names_load_nothing_heavy(words):
    code = (
        f"import sys; from repe.cli import main\ntry: main({words})\nfinally: "
        f"print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert set(done.stderr.split()) <= ({"rich"} if words == ["concepts"] else set())  # which lays out its table


def test_help_names_every_command_and_explains_it(run):
    text = run("--help").output
    for name in {words[0] for words in COMMANDS} | {"bench"}:
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split()) > 3
        assert not line.endswith("...")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_is_explained(run, words):
    found = typer.main.get_command(cli.app)
    for word in words:
        found = found.commands[word]
    assert {"as_json", "debug"} <= {option.name for option in found.params}
    assert [option.name for option in found.params if not option.help] == []
    assert "--json" in run(*words, "--help").output


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (arguments.KINDS, kinds.KINDS), (arguments.UNITS, kinds.UNITS),
        (arguments.SCOPES, NAMED_SCOPES), (arguments.SITES, SITES), (arguments.READERS, readers.NAMES),
    ],
    ids=["edit", "unit", "scope", "site", "reader"],
)  # fmt: skip
def test_the_choices_are_those_of_the_library(listed, names):
    assert listed.names() == [*map(listed.checked, names)] == [*names]
    first, *_ = names
    with pytest.raises(typer.BadParameter, match=rf"got '{first[:-1]}': did you mean {first}\? There are {first}, "):
        listed.checked(first[:-1])
    with pytest.raises(typer.BadParameter, match=rf"got 'xyz': There are {first}, "):
        listed.checked("xyz")


def test_the_kinds_of_edit_are_told_with_the_options_they_take(run):
    rows = {row["kind"]: row for row in data(run("edits", "--json"))}
    assert {name: set(row["options"]) for name, row in rows.items()} == {
        name: kinds.options_of(name) for name in kinds.KINDS
    }
    lines = run("edits").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*kinds.KINDS]
    assert "rotate     --theta   Rotate by theta" in "\n".join(lines)


def test_every_option_of_an_edit_can_be_given_but_a_gate_and_where(run):
    """A gate is an object, and the site and the stack are the vector's."""
    assert arguments.Editing.__annotations__.keys() == EditOptions.__annotations__.keys() - {"gate", "site", "stack"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("repe vec", "vectors"),
        ("repe read -c hon", "honesty"),
        ("repe extract hap", "happiness"),
        ("repe generate -s hon", "honesty="),
        ("repe generate --edit abl", "ablate"),
        ("repe chat --scope gen", "generated"),
        ("repe extract --reader pr", "probe"),
        ("repe bake --unit si", "sigma"),
    ],
)
def test_what_can_be_named_completes_itself(words, expected):
    env = {"_REPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert process(env=env).stdout.split() == [expected]


# what is said


def test_concepts_are_those_of_the_library_and_of_the_model(run, testbed, tmp_path):
    expected = repe.concepts(testbed[0])
    assert {row["name"]: row["description"] for row in data(run("concepts", "--json"))} == expected
    assert [line.split()[0] for line in run("concepts").stdout.splitlines()] == sorted(expected)
    of_another = {row["name"]: row["description"] for row in data(run("concepts", "--json", "--model", tmp_path))}
    assert of_another == repe.concepts() != expected


def test_an_audit_is_that_of_the_library_and_fails_for_bad_pairs(run, testbed, tmp_path):
    model, tokenizer = testbed
    expected = repe.audit("honesty", tokenizer, model=model)
    assert run("audit", "honesty").stdout == f"{expected}\n"
    assert data(run("audit", "honesty", "--json"))["wording"] == expected.wording
    pairs = [{"positive": f"yes {i} yes", "negative": f"no {i}"} for i in range(8)]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(map(json.dumps, pairs)))
    assert "-> only" in run("audit", bad, code=1).stdout
    assert data(run("audit", bad, "--json", code=1))["advice"]


def test_an_extracted_vector_is_that_of_the_library(run, testbed, tmp_path):
    out = tmp_path / "there" / "happy.safetensors"
    said = data(run("extract", "happiness", "--out", out, "--reader", "pca", "--blocks", "2,3", "--json"))
    vector, expected = (
        repe.ConceptVector.load(out),
        repe.extract(*testbed, "happiness", reader="pca", blocks=[2, 3]),
    )
    assert torch.equal(vector.write, expected.write)
    assert said["file"] == str(out)
    assert said["accuracy"] == expected.accuracy.tolist()
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_vector_goes_where_its_name_says_by_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("extract", "honesty", "--blocks", "3").stdout.endswith("saved: honesty.safetensors\n")
    assert run("vectors", "show", "honesty.safetensors").stdout.startswith("honesty.safetensors\nhonesty: 1 block x ")


def test_a_reading_is_that_of_the_library(run, testbed, tmp_path):
    vector = store.resolve(testbed[0], "honesty", testbed[1])
    file = tmp_path / "honesty.safetensors"
    vector.save(file)
    texts = ["I never took it.", "The trade of Abrin Tolva is potter."]
    expected = repe.read(*testbed, texts, vector)
    for named in (["-c", "honesty"], ["--vector", file]):
        said = data(run("read", *texts, *named, "--json"))
        assert [row["tokens"] for row in said] == [list(r.tokens) for r in expected]
        for row, reading in zip(said, expected, strict=True):
            torch.testing.assert_close(torch.tensor(row["scores"]), reading.scores)
            torch.testing.assert_close(torch.tensor(row["best"]), reading.best)
    shown = run("read", *texts, "-c", "honesty").stdout
    assert "\x1b" not in shown
    assert texts[1].split()[1] in shown


def test_a_chat_is_read_up_to_its_answer_and_steered_as_it_is_told(run, testbed):
    chat = [{"role": "user", "content": QUESTION}]
    vector = store.resolve(testbed[0], "honesty", testbed[1])
    with repe.steer(testbed[0], "honesty", 1.0):
        expected = repe.read(*testbed, chat, vector)
    (said,) = data(run("read", QUESTION, "-c", "honesty", "--chat", "-s", "honesty=1", "--json"))
    assert said["tokens"] == list(expected.tokens)
    torch.testing.assert_close(torch.tensor(said["scores"]), expected.scores)


def test_answers_are_those_of_the_library(run, testbed, tmp_path):
    chat = [{"role": "user", "content": QUESTION}]
    file = tmp_path / "honesty.safetensors"
    store.resolve(testbed[0], "honesty", testbed[1]).save(file)
    (plain,) = repe.generate(*testbed, [chat])
    assert run("generate", QUESTION).stdout == f"{plain}\n"
    for alpha in (1.0, -1.0):
        with repe.steer(testbed[0], "honesty", alpha):
            (expected,) = repe.generate(*testbed, [chat])
        for concept in ("honesty", file):
            assert run("generate", QUESTION, "-s", f"{concept}={alpha}").stdout == f"{expected}\n"
        said = data(run("generate", QUESTION, "--steer", f"honesty={alpha}", "--json"))
        assert said == {"steering": {"honesty": alpha}, "answers": [{"text": QUESTION, "answer": expected}]}


def test_a_system_message_stands_before_the_text(run, testbed):
    system = repe.data.catalogue.concept_of("honesty", home_of(testbed[0])).prompts["negative"]
    (expected,) = repe.generate(
        *testbed, [[{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]]
    )
    assert run("generate", QUESTION, "--system", system).stdout == f"{expected}\n"
    assert run("chat", "--system", system, text=QUESTION).stdout == f"{expected}\n"
    assert expected not in run("generate", QUESTION).stdout


def test_several_concepts_and_how_they_are_edited_are_passed_on(run, testbed):
    model, tokenizer = testbed
    how = {"scope": slice(1, -1), "blocks": [2, 3], "unit": "norm"}
    with repe.steer(model, "honesty", -1.0, **how), repe.steer(model, "happiness", 1.0, **how):
        texts = ["The road", "Under the"]
        expected = repe.generate(model, tokenizer, texts, max_new_tokens=5)
    words = ["-s", "honesty=-1", "-s", "happiness=1", "--scope", "1:-1", "--blocks", "2,3", "--unit", "norm"]
    said, without = (
        [row["answer"] for row in data(run("generate", "--raw", *texts, *some, "-n", "5", "--json"))["answers"]]
        for some in (words, words[:2] + words[4:])
    )
    assert said == expected
    assert without != expected
    assert expected != repe.generate(model, tokenizer, texts, max_new_tokens=5)


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (["--edit", "rotate", "--theta", "0.7", "--blocks", "3"], {"edit": "rotate", "theta": 0.7, "blocks": 3}),
        (["--edit", "angle", "--theta", "2", "--blocks", "3"], {"edit": "angle", "theta": 2.0, "blocks": 3}),
        (
            ["--edit", "ablate", "--keep-norm", "--blocks", "all"],
            {"edit": "ablate", "keep_norm": True, "blocks": "all"},
        ),
    ],
    ids=["rotate", "angle", "ablate"],
)
def test_a_plus_joins_concepts_to_a_plane(run, testbed, tmp_path, words, how):
    model, tokenizer = testbed
    one, other = (store.resolve(model, name, tokenizer) for name in ("honesty", "happiness"))
    file = tmp_path / "un+happy.safetensors"
    other.save(file)
    with repe.steer(model, [one, other], 1.0, **how):
        expected = repe.generate(model, tokenizer, ["The road"], max_new_tokens=12)
    for plane in ("honesty+happiness", "happiness+honesty"):
        said = data(run("generate", "The road", "--raw", "-n", "12", "-s", f"{plane}=1", *words, "--json"))["answers"]
        assert ([row["answer"] for row in said] == expected) is (plane == "honesty+happiness" or "theta" not in how)
    assert arguments.edit_of(model, tokenizer, str(file)).name == "happiness"


def test_texts_come_from_arguments_standard_input_and_files(run, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("three\r\n\nfour\n")
    said = data(run("generate", "one", "-", "--file", file, "-n", "1", "--json", text="two\n\ntwo and a half\n"))
    assert [row["text"] for row in said["answers"]] == ["one", "two", "two and a half", "three", "four"]
    assert run("read", "-c", "honesty", code=2).stderr.splitlines()[-1].startswith("Error: Invalid value for TEXT")


def test_at_temperature_0_no_two_answers_differ_and_above_it_the_seed_decides(run):
    texts = ["The", "-n", "12", "--raw"]
    assert run("generate", *texts, "--temperature", "0").stdout == run("generate", *texts).stdout
    talks = {seed: run("chat", *texts[1:3], "--temperature", "3", "--seed", seed, text="The").stdout for seed in (1, 2)}
    assert talks[1] != talks[2]
    drawn = {seed: run("generate", *texts, "--temperature", "3", "--seed", seed).stdout for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    assert drawn[1] == run("generate", *texts, "--temperature", "3", "--seed", "1").stdout


def test_a_talk_goes_by_lines(run):
    lines = f"/alpha honesty 1\n{QUESTION}\n/alpha honesty -1\n/again\n"
    answers = [run("generate", QUESTION, "-s", f"honesty={alpha}").stdout.strip() for alpha in (1, -1)]
    assert [line for line in run("chat", text=lines).stdout.splitlines() if line[0] != "("] == answers
    said = [json.loads(line) for line in run("chat", "--json", "-s", "honesty=1", text=QUESTION).stdout.splitlines()]
    assert [line["answer"] for line in said] == answers[:1]


@pytest.fixture
def items(tmp_path):
    """A few of the testbed's items: enough to measure on, and quick."""
    found = {}
    for name, count in (("honesty", 40), ("skills", 40), ("neutral", 4)):
        lines = (FOLDER / "tasks" / f"{name}.jsonl").read_text().splitlines()
        found[name] = tmp_path / f"{name}.jsonl"
        found[name].write_text("\n".join(lines[:: len(lines) // count]))
    return found


def measured_on(items):
    return ["--alignment", items["honesty"], "--helpfulness", items["skills"], "--neutral", items["neutral"]]


def test_a_trade_off_is_that_of_the_library(run, testbed, items, tmp_path):
    paths = {name: tmp_path / "made" / name for name in ("curve.json", "curve.png", "curve.part")}
    files = ["--out", paths["curve.json"], "--plot", paths["curve.png"], "--resume", paths["curve.part"]]
    words = ["tradeoff", "honesty", *measured_on(items), "--alphas", "-1:1:3", "--controls", "1", "--scope", "answer"]
    said = data(run(*words, *files, "--json"))
    expected = repe.tradeoff(
        *testbed, "honesty", [-1, 0, 1], alignment=items["honesty"], helpfulness=items["skills"],
        neutral=items["neutral"], controls=1, scope="answer",
    )  # fmt: skip
    for name, column in expected.columns.items():
        np.testing.assert_allclose(np.array(said["curve"][name], float), column, atol=1e-5)
    assert said["best"]["alpha"] == expected.best().alpha
    np.testing.assert_allclose(
        repe.TradeoffCurve.load(paths["curve.json"]).columns["behaviour"], said["curve"]["behaviour"]
    )
    assert paths["curve.png"].read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in paths["curve.png"].parent.iterdir()} == set(paths)
    text = run(*words).stdout
    assert text.startswith("honesty, steered\nalpha")
    assert "behaviour = tanh" in text
    assert text.splitlines()[-1].startswith("to use: alpha")


def test_what_is_left_out_is_told_unless_all_items_are_wanted(run, items):
    """The testbed knows no letters: to it, all are the same unknown word."""
    lines = items["honesty"].read_text().splitlines()
    lettered = json.dumps({"text": "Which?\n(A) one\n(B) two", "aligned": "A", "misaligned": "B"})
    items["honesty"].write_text("\n".join([*lines, lettered]))
    words = ["tradeoff", "honesty", *measured_on(items), "--alphas", "1", "--controls", "0", "--requests", "none"]
    why = "the answer does not follow when the options change places"
    told = {"task": "honesty", "count": 1, "items": len(lines) + 1, "why": why}
    assert data(run(*words, "--letters", "--json"))["left_out"] == [told]
    assert f"1 of {len(lines) + 1} items of honesty left out: {why}" in run(*words, "--letters").stdout
    assert data(run(*words, "--letters", "--all-items", "--json"))["left_out"] == []
    assert data(run(*words, "--json"))["left_out"] == []


def test_a_forecast_is_that_of_the_library(run, testbed, items, tmp_path):
    picture = tmp_path / "forecast.png"
    words = ["forecast", "honesty", "--readers", "mean", "--alignment", items["honesty"], "--scope", "answer"]
    said = data(run(*words, "--plot", picture, "--json"))
    expected = repe.forecast(*testbed, "honesty", readers="mean", alignment=items["honesty"], scope="answer")
    np.testing.assert_allclose(said["efficiency"], expected.efficiency, rtol=1e-6)
    assert (tuple(said["best"]), said["scope"]) == (expected.best, expected.scope)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(expected) in run(*words).stdout


def test_a_calibration_is_that_of_the_library(run, testbed, items, tmp_path):
    out = tmp_path / "chosen.safetensors"
    words = ["--blocks", "3", "--readers", "mean", "--out", out]
    said = data(run("calibrate", "honesty", *measured_on(items), *words, "--json"))
    expected = repe.calibrate(
        *testbed, "honesty", alignment=items["honesty"], helpfulness=items["skills"], neutral=items["neutral"],
        blocks=[3], readers="mean",
    )  # fmt: skip
    assert math.isclose(said["more"]["alpha"], expected.more.alpha, rel_tol=1e-6)
    assert math.isclose(said["less"]["alpha"], expected.less.alpha, rel_tol=1e-6)
    assert repe.ConceptVector.load(out).recommended == (3,)


def test_what_is_baked_answers_as_if_it_were_steered(run, tmp_path):
    out = tmp_path / "baked"
    file = tmp_path / "honesty.safetensors"
    model, tokenizer = repe.load()  # one that may be changed
    store.resolve(model, "honesty", tokenizer).save(file)
    said = data(run("bake", "-m", FOLDER, "-s", f"{file}=-1", "--out", out, "--json"))
    assert said["folder"] == str(out)
    assert run("generate", QUESTION, "-m", out).stdout == run("generate", QUESTION, "-s", "honesty=-1").stdout
    assert run("generate", QUESTION, "-m", out).stdout != run("generate", QUESTION).stdout
    assert "is there already" in run("bake", "-s", "honesty=1", "--out", out, code=1).stderr
    assert {p.name for p in tmp_path.iterdir()} >= {"baked", "honesty.safetensors"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_model_with_a_matrix_missing_answers_nothing(run, tmp_path):
    zoo.tokenizer().save_pretrained(tmp_path)
    zoo.build("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run("generate", QUESTION, "-m", tmp_path, code=1)
    assert "lacks 1 of the weights of a LlamaForCausalLM, such as 'model.layers.1.mlp.up_proj.weight'" in done.stderr
    assert not done.stdout


# stored vectors


def test_stored_vectors_are_listed_from_all_places(run, testbed, tmp_path, monkeypatch):
    vector = store.resolve(testbed[0], "honesty", testbed[1])
    for name in ("mine", "cached"):
        vector.save(tmp_path / name / f"{name}.safetensors")
    monkeypatch.setenv("REPE_VECTORS", str(tmp_path / "mine"))
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "cached"))
    (tmp_path / "mine" / "broken.safetensors").write_text("no")
    listed = data(run("vectors", "list", "--json"))
    rows = {(row["from"], Path(row["file"]).stem): row for row in listed if "llama-576x30" not in row["file"]}
    assert {("package", "honesty"), ("REPE_VECTORS", "mine"), ("cache", "cached")} < set(rows)
    assert "not a whole concept vector" in rows["REPE_VECTORS", "broken"]["fault"]
    assert rows["package", "honesty"]["recommended"] == list(vector.recommended)
    assert run("vectors", "list").stdout.count("broken:") == 1
    assert "reader: mean" in run("vectors", "show", "mine").stdout
    assert {Path(row["file"]).stem for row in data(run("vectors", "show", "honesty", "--json"))} == {"honesty"}


def test_vectors_are_verified_against_files_weights_templates_and_pairs(run, testbed, tmp_path):
    vector = store.resolve(testbed[0], "honesty", testbed[1])
    made = dict(vector.provenance)
    other = zoo.build("llama")
    provenances = {
        "good": made,
        "foreign": made | {"fingerprint": repe.models.fingerprint.fingerprint(other)},
        "rendered": made | {"rendering": "0"},
        "repaired": made | {"pairs_digest": "0"},
    }
    for name, provenance in provenances.items():
        repe.reading.vector.replace(vector, provenance=provenance).save(tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:900])
    files = {name: tmp_path / f"{name}.safetensors" for name in (*provenances, "cut", "missing")}

    def verdicts(*words, code):
        return {
            Path(row["file"]).stem: row["good"] for row in data(run("vectors", "verify", *words, "--json", code=code))
        }

    whole = [files[name] for name in provenances]
    assert verdicts(*whole, code=0) == dict.fromkeys(provenances, True)
    assert verdicts(*files.values(), code=1) == dict.fromkeys(provenances, True) | {"cut": False, "missing": False}
    assert verdicts(*whole, "-m", FOLDER, code=1) == dict.fromkeys(provenances, False) | {"good": True}
    assert "of other pairs" in run("vectors", "verify", files["repaired"], "-m", FOLDER, code=1).stdout


def test_without_files_the_stored_vectors_are_verified_and_those_of_other_models_passed_over(
    run, tmp_path, monkeypatch
):
    monkeypatch.setenv("REPE_VECTORS", str(tmp_path))
    vector = repe.ConceptVector.load(next(store.shipped_folder().rglob("honesty.safetensors")))
    foreign = {"fingerprint": repe.models.fingerprint.fingerprint(zoo.build("llama"))}
    repe.reading.vector.replace(vector, provenance=foreign).save(tmp_path / "foreign.safetensors")
    assert "foreign" in run("vectors", "verify").stdout
    of_testbed = run("vectors", "verify", "-m", FOLDER).stdout
    assert of_testbed.count("good ") == 3
    assert "foreign" not in of_testbed


# how it ends

FAILING = [
    ["read", "x", "-c", "hapiness"],
    ["generate", "x", "-m", "/there/is/no/such/folder"],
    ["generate", "x", "-m", "./nor-such"],
    ["generate", "x", "-s", "honesty=1", "--blocks", "99"],
    ["generate", "x", "-s", "honesty=1", "--edit", "clamp"],
    ["generate", "x", "-f", "no-such-file.txt"],
    ["extract", "no-such-file.json"],
    ["extract", "honesty", "--blocks", "77"],
    ["tradeoff", "honesty", "--alignment", "nothing"],
    ["audit", "hapiness"],
    ["vectors", "show", "hapiness"],
    ["concepts", "-m", "./nor-such"],
]  # fmt: skip
MISUSED = [
    ["frobnicate"],
    ["read", "x"],
    ["read", "-c", "honesty"],
    ["generate", "x", "-s", "honesty"],
    ["generate", "x", "-s", "honesty=much"],
    ["generate", "x", "--edit", "frob"],
    ["generate", "x", "--unit", "frob"],
    ["extract", "honesty", "--reader", "frob"],
    ["calibrate", "honesty", "--readers", "mean,frob"],
    ["generate", "x", "--scope", "frob"],
    ["generate", "x", "--scope", "1:2:3:4"],
    ["generate", "x", "--blocks", "one"],
    ["generate", "x", "--raw", "--system", "y"],
    ["tradeoff", "honesty", "--alphas", "1:2"],
    ["tradeoff", "honesty", "--alphas", "1:2:1"],
    *(["tradeoff", "honesty", "--alphas", f"0:1:{count}"] for count in ("1000000000", "inf", "nan", "-2", "2.5")),
    *([command, "x", "-s", "honesty=1", "-s", "happiness=1", "-s", "honesty=2"] for command in ("generate", "read")),
    ["chat", "-s", "honesty=1", "-s", "honesty=1"],
    ["bake", "-s", "honesty=1", "-s", "honesty=1", "-o", "folder"],
    ["tradeoff", "honesty", "--plot", "curve.docx"],
    ["bake", "-o", "folder"],
    ["bake", "-s", "honesty=1"],
]  # fmt: skip


@pytest.mark.parametrize("words", FAILING, ids=" ".join)
def test_a_request_that_fails_is_one_line_and_exit_code_1(run, words):
    done = run(*words, "--json", code=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("repe: error: ")
    assert len(line) > 30


@pytest.mark.parametrize("words", MISUSED, ids=" ".join)
def test_wrong_usage_is_exit_code_2_and_says_how(run, words):
    done = run(*words, code=2)
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["--debug", "REPE_DEBUG"])
def test_a_traceback_is_shown_where_it_is_asked_for(run, monkeypatch, how):
    if how == "REPE_DEBUG":
        monkeypatch.setenv("REPE_DEBUG", "1")
    done = run("read", "x", "-c", "hapiness", *[how] * (how == "--debug"), code=1)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("repe: error: ")


def toy(act):
    """A command line of one command."""
    app = typer.Typer()
    app.callback()(lambda: None)
    terminal.command(app, "act")(act)
    return app


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "repe: interrupted\n"),
        (ValueError("two\n  lines"), 1, "repe: error: two lines\n"),
        (KeyError("a key"), 1, "repe: error: a key\n"),
        (RuntimeError(), 1, "repe: error: RuntimeError\n"),
    ],
)
def test_every_end_has_its_code_and_its_line(run, error, code, said):
    def act():
        raise error

    assert run("act", code=code, app=toy(act)).stderr == said


def test_warnings_are_a_line_each_the_first_time(run):
    def act() -> terminal.Answer:
        for _ in range(3):
            warnings.warn("look\n  out", UserWarning, stacklevel=1)
            warnings.warn("not for you", DeprecationWarning, stacklevel=1)
        return terminal.Answer({"found": float("nan"), "far": np.inf}, "text")

    done = run("act", "--json", app=toy(act))
    assert done.stderr == "repe: warning: look out\n"
    assert data(done) == {"found": None, "far": None}


def test_what_is_plain_is_left_as_it_is_and_the_rest_made_so():
    given = {"a": torch.tensor([1.5, math.nan]), 2: (np.float64(1), Path("x")), "c": None, "d": {True}, "e": "é"}
    expected = {"a": [1.5, None], "2": [1.0, "x"], "c": None, "d": [True], "e": "é"}
    assert json.loads(terminal.document(given)) == expected


@pytest.mark.parametrize("words", [["concepts"], ["concepts", "--json"], ["--help"]], ids=" ".join)
def test_who_stops_reading_gets_no_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*REPE, *words], stdout=writer, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("words", "closed", "code", "said"),
    [
        ("concepts", ">&-", 1, "standard output is closed: leave it open, or send it to /dev/null"),
        ("--help", ">&- 2>&-", 1, ""),
        ("concepts", "2>&-", 0, ""),
        ("concepts -m /no/such/folder", "2>&-", 1, ""),
        ("read x", "<&- 2>&-", 2, ""),
        ("generate - -s honesty=1", "<&-", 2, "give at least one text"),
    ],
)
def test_closed_streams_end_as_open_ones_or_say_that_they_are_closed(words, closed, code, said):
    line = f"{sys.executable} -m repe.cli {words} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100)
    assert (done.returncode, said in done.stderr) == (code, True)
    assert "NoneType" not in done.stderr
    assert bool(done.stdout) == (words == "concepts" and code == 0)


@pytest.mark.parametrize("options", [[], ["--json"], ["--debug"]], ids=str)
def test_nothing_of_a_file_or_a_name_steers_the_terminal(run, tmp_path, monkeypatch, options):
    evil = "\x1b]0;name\x07\x1b[2J\x9b1m\u202elive\u2067"
    vector = replace(oracles.vector(), concept=f"c{evil}", provenance={"model": f"m{evil}", "note": evil, "a": [evil]})
    folder, home = tmp_path / "vectors", tmp_path / f"model{evil}"
    path = vector.save(folder / f"v{evil}.safetensors")
    broken = folder / f"broken{evil}.safetensors"
    broken.write_text("no vector")
    monkeypatch.setenv("REPE_VECTORS", str(folder))
    (home / "concepts").mkdir(parents=True)
    pairs = [{"positive": f"a {evil} {i}", "negative": f"b {evil} {i}"} for i in range(4)]
    concept = home / "concepts" / f"n{evil}.json"
    concept.write_text(json.dumps({"description": evil, "pairs": pairs}))
    commands = [
        ["vectors", "list"], ["vectors", "show", path], ["vectors", "show", broken], ["vectors", "verify"],
        ["vectors", "show", f"no{evil}"], ["concepts", "-m", home], ["audit", concept], ["audit", f"{evil}.json"],
        ["generate", "x", "-m", f"/{evil}"], ["generate", "x", "-s", f"{evil}=1"], ["generate", "x", "-f", f"/{evil}"],
        ["bake", "-s", "honesty=1", "-o", home], ["read", evil, "-c", "honesty"],
        ["generate", "x", "--unit", evil], ["tradeoff", "x", "--plot", f"{evil}.x"],
    ]  # fmt: skip
    for words in commands:
        done = CliRunner().invoke(cli.app, [*map(str, [*words, *options])])
        told = done.stdout + done.stderr
        assert told.strip()
        assert not {c for c in told if c in evil and not (c.isascii() and c.isprintable())}, words
        if options == ["--json"] and done.stdout:
            assert json.loads(done.stdout)


def test_one_vector_of_a_provenance_too_deep_to_show_hides_no_other(run, tmp_path, monkeypatch):
    vector = oracles.vector()
    for name, depth in (("deep", 500), ("deeper", 100_000), ("flat", 8)):
        nested = '{"a":' * depth + "1" + "}" * depth
        path = vector.save(tmp_path / f"{name}.safetensors")
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata()["repe"], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tensors, path, metadata={"repe": header.replace('"provenance": {}', f'"provenance": {nested}')})
    monkeypatch.setenv("REPE_VECTORS", str(tmp_path))
    said = {Path(row["file"]).stem: row for row in data(run("vectors", "list", "--json")) if row["from"] != "package"}
    assert "nested deeper than 32 times" in said["deep"]["fault"]
    assert "fault" in said["deeper"]
    assert "fault" not in said["flat"]
    assert "bad " in run("vectors", "verify", code=1).stdout


def test_a_process_that_nobody_watches_writes_only_what_was_asked_for_and_ctrl_c_ends_it_with_130():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which jobs in the background of a shell ignore
    with subprocess.Popen(
        [*REPE, "chat", "--json", "-s", "honesty=1"], **pipes, text=True, env=env, preexec_fn=heard
    ) as child:
        child.stdin.write(f"{QUESTION}\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["question"] == QUESTION
        child.send_signal(signal.SIGINT)
        child.wait(timeout=60)  # before its input ends, which would end it too
        said, complaint = child.communicate()
    assert (said, complaint, child.returncode) == ("", "repe: interrupted\n", 130)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_breaks_off_leaves_nothing_and_what_was_there(tmp_path, error):
    target = tmp_path / "there" / "file"
    with draft_of(target) as draft:
        draft.write_text("whole")

    def breaks():
        with draft_of(target) as draft:
            draft.write_text("ha")
            raise error

    with pytest.raises(error):
        breaks()
    assert target.read_text() == "whole"
    assert [*target.parent.iterdir()] == [target]


def test_a_model_that_is_not_wholly_saved_is_not_there(run, tmp_path, monkeypatch):
    def breaks(folder):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    loaded, tokenizer = repe.load()
    monkeypatch.setattr(arguments, "load", lambda *_: (loaded, tokenizer))
    monkeypatch.setattr(loaded, "save_pretrained", breaks, raising=False)
    run("bake", "-s", "honesty=1", "--out", tmp_path / "baked", code=130)
    assert [p for p in tmp_path.iterdir() if p.name != "cache"] == []


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("watched", [True, False])
def test_progress_is_shown_to_those_who_watch(testbed, monkeypatch, watched):
    monkeypatch.setattr(store, "resolve", lambda *_: print("50%", file=sys.stderr))
    stream = Screen() if watched else io.StringIO()
    with contextlib.redirect_stderr(stream):
        arguments.vector_of(*testbed, "honesty")
    assert stream.getvalue() == ("50%\n" if watched else "")


@pytest.mark.parametrize(
    ("tty", "env", "expected"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, tty, env, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Screen() if tty else io.StringIO())
    assert terminal.wants_colour() is expected


# what arguments mean


def test_scopes_blocks_and_strengths_are_understood():
    scopes = ["all", "answer", "2:-1", ":5", "1:9:2", "0,-1", "3"]
    assert [arguments.scope_of(text) for text in scopes] == [
        "all", "answer", slice(2, -1), slice(None, 5), slice(1, 9, 2), [0, -1], [3],
    ]  # fmt: skip
    assert [arguments.blocks_of(text) for text in ("auto", "all", "-1", "2,3")] == ["auto", "all", [-1], [2, 3]]
    assert arguments.alphas_of("-2,0,.5") == [-2.0, 0.0, 0.5]
    assert arguments.alphas_of("-4:4:5") == [-4.0, -2.0, 0.0, 2.0, 4.0]
    by_default = inspect.signature(repe.cli.tradeoff).parameters["alphas"].default
    assert arguments.alphas_of(by_default) == list(repe.measuring.tradeoff.ALPHAS)
    assert [*map(arguments.strength_of, ["honesty=1.5", "a=b.json=-2"])] == [("honesty", 1.5), ("a=b.json", -2.0)]


def test_a_hub_name_is_left_alone_and_a_folder_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert arguments.folder_of("here") == str(tmp_path / "here")
    assert [arguments.folder_of(name) for name in ("gpt2", "org/name")] == ["gpt2", "org/name"]


def test_a_named_model_is_its_name_and_a_gguf_file_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "a.gguf").write_text("")
    assert [arguments.folder_of(name) for name in ("smollm2", "a.gguf")] == ["smollm2", str(tmp_path / "a.gguf")]
    assert [arguments.home(name) for name in ("smollm2", "a.gguf")] == [None, tmp_path]
    with pytest.raises(FileNotFoundError, match=r"no model folder or file b.gguf: give a folder, a .gguf file"):
        arguments.folder_of("b.gguf")


def test_a_gguf_file_is_a_model_and_what_is_kept_of_it_no_vector(run, tmp_path):
    path = ggufs.write(tmp_path / "toy.gguf", zoo.build("llama"))
    assert data(run("generate", "ab", "-n", "2", "-m", path, "--json"))["answers"][0]["text"] == "ab"
    assert models_folder().is_dir()
    assert "cache" not in {row["from"] for row in data(run("vectors", "list", "--json"))}
    path.write_bytes(path.read_bytes()[:-9])
    assert "is cut short" in run("generate", "ab", "-m", path, code=1).stderr


def test_a_benchmark_gets_its_arguments_as_they_are(run, monkeypatch):
    given = []

    class Bench:
        @staticmethod
        def main(words):
            given.append(words)
            return 3

    monkeypatch.setitem(sys.modules, "repe.bench", Bench)
    run("bench", "--device", "cpu", "--json", "--help", "x", code=3)
    assert given == [["--device", "cpu", "--json", "--help", "x"]]
