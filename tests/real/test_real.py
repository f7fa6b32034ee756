"""What is claimed about real models: every part runs, keeps its rows, and would show what is wrong."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import repe
from repe import real
from repe.measuring import texts_of
from repe.measuring.intervals import Estimate
from repe.models.blocks import find_stack
from repe.models.tokens import encode
from repe.reading.dose import short_texts
from repe.real import PARTS, aiming, concepts, doses, forecasts, laws, main, peers, times, writing
from repe.real.bench import Bench, kept, table

MEASURED_BY = {
    "aiming": aiming,
    "doses": doses,
    "forecasts": forecasts,
    "writing": writing,
    "laws": laws,
    "times": times,
    "peers": peers,
}


@pytest.fixture
def bench(testbed, tmp_path) -> Bench:
    return Bench("testbed", *testbed, tmp_path, ("happiness",), small=True)


@pytest.fixture(autouse=True)
def peers_that_find_something_else(monkeypatch):
    def extractions(bench: Bench, concept: str):
        ours = bench.vector(concept)
        vector = peers.vector_of("theirs", dict(zip(ours.blocks, ours.displacement.flip(0), strict=True)), ours)
        return {name: peers.Extraction(f"{name} 1.0", 1.0, vector) for name in peers.PLACES if name != peers.OURS}

    monkeypatch.setattr(peers, "PYTHON", peers.Path(sys.executable))
    monkeypatch.setattr(peers, "extractions", extractions)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_says_at_once_what_it_measured_and_does_not_measure_it_again(part, bench, capsys, monkeypatch):
    tables = [str(table) for table in PARTS[part](bench)]
    assert f"{part}: happiness" in capsys.readouterr().err
    assert all("happiness" in table or "on testbed" not in table or part == "times" for table in tables)
    assert max(len(line) for table in tables for line in table.splitlines()) <= 120

    def refuse(*args):
        raise AssertionError("measured again")

    if part == "concepts":
        monkeypatch.setattr(concepts, "GROUPS", dict.fromkeys(concepts.GROUPS, refuse))
    else:
        monkeypatch.setattr(MEASURED_BY[part], "row", refuse)
    again = replace(bench)
    assert [str(table) for table in PARTS[part](again)] == tables
    assert capsys.readouterr().err == ""
    with pytest.raises(AssertionError, match="measured again"):
        list(PARTS[part](replace(bench, folder=bench.folder / "fresh")))


def test_the_command_prints_the_parts_that_are_named_and_fresh_forgets_them(tmp_path, capsys):
    asked = ["doses", "--model", "testbed", "--small", "--folder", str(tmp_path), "--concepts", "honesty"]
    main(asked)
    printed, told = capsys.readouterr()
    assert printed.startswith("doses on testbed")
    assert "doses: honesty" in told
    main(asked)
    assert "doses: honesty" not in capsys.readouterr().err
    main([*asked, "--fresh"])
    assert "doses: honesty" in capsys.readouterr().err


def test_a_part_that_is_left_out_is_an_error_where_it_was_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "PYTHON", tmp_path / "none")
    monkeypatch.setattr(real, "PARTS", {"peers": peers.tables})
    with pytest.raises(SystemExit, match=r"peers on testbed: left out.*`make \.venv-peers` sets them up"):
        main(["peers", "--model", "testbed", "--folder", str(tmp_path)])
    main(["--model", "testbed", "--folder", str(tmp_path)])
    assert "left out" in capsys.readouterr().out


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        main(["dozes"])
    assert "no part is called 'dozes': there are doses, forecasts" in capsys.readouterr().err


# rows


def test_a_row_is_of_a_vector_and_a_key_and_one_that_was_broken_off_is_measured_again(bench, monkeypatch):
    measured = []

    def of(bench: Bench, *key) -> None:
        bench.row("doses", "happiness", lambda: measured.append(key) or {"what": kept(Estimate(1, 0, 2))}, *key)

    of(bench), of(bench), of(bench, 1), of(bench, 1)
    assert measured == [(), (1,)]
    other = replace(bench)
    doubled = 2 * bench.vector("happiness")
    monkeypatch.setattr("repe.real.bench.resolve", lambda *args: doubled)
    of(other), of(other)
    assert measured == [(), (1,), ()]
    path = bench.folder / "testbed-doses.jsonl"
    path.write_text(path.read_text()[:-9])
    of(other), of(other), of(bench), of(bench, 1)
    assert measured == [(), (1,), (), ()]


def test_a_vector_that_is_not_shipped_is_extracted_once_and_kept(testbed, tmp_path, monkeypatch):
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "vectors"))
    monkeypatch.setattr("repe.reading.store.shipped_folder", lambda: tmp_path / "none")
    found = Bench("testbed", *testbed, tmp_path).vector("happiness")
    (path,) = (tmp_path / "vectors").rglob("*.safetensors")
    assert repe.ConceptVector.load(path).digest == found.digest
    monkeypatch.setattr("repe.reading.extract.extract", None)
    assert Bench("testbed", *testbed, tmp_path).vector("happiness").digest == found.digest


def test_rows_of_different_columns_stand_in_one_table():
    rows = {"honesty": {"loss": kept(Estimate(0.5, 0, 1)), "block": 3}, "happiness": {"new": 0.12345}}
    assert str(table("t", "concept", rows)).splitlines() == [
        "t",
        "concept    loss        block  new",
        "honesty    0.5 [0, 1]  3",
        "happiness                     0.123",
    ]


# what is wrong is seen


@pytest.mark.parametrize(
    ("found", "said"),
    [(0.1, "+0%, within 20%"), (0.124, "+24%, within 25%"), (0.074, "-26%, beyond 25%"), (0.2, "+100%, beyond 25%")],
)
def test_a_dose_that_costs_something_else_is_said_to_be_off(found, said):
    assert doses.nearness(found, 0.1) == said


def test_a_dose_is_tried_on_texts_that_it_was_not_measured_on(bench, monkeypatch):
    measured, costs = [], doses.costs
    monkeypatch.setattr(doses, "costs", lambda *args: measured.extend(args[3]) or costs(*args))
    doses.row(replace(bench, small=False), "happiness")
    used = {answer.ids for answer in short_texts(bench.model, bench.tokenizer)}
    assert len(measured) == doses.TEXTS
    assert not used & {tuple(encode(bench.tokenizer, text)) for text in measured}
    assert not set(measured) & set(texts_of("neutral", bench.model)[::2])


@pytest.fixture
def places() -> dict:
    """A forecast that is right to a twentieth: efficiency is the slope for a dose, over sqrt(2 * .1)."""
    slope = np.linspace(-1, 3, 20)
    forecast = slope * (1 + 0.05 * np.cos(np.arange(20)))
    efficiency = forecast / np.sqrt(0.2)
    ends = {"forecast low": efficiency - 0.5, "forecast high": efficiency + 0.5}
    kl = np.full(20, 0.1 * forecasts.ALPHA**2)
    return {"slope": slope, "kl": kl, "forecast slope": forecast, "forecast efficiency": efficiency, **ends}


def test_a_right_forecast_is_shown_as_one(places):
    found = forecasts.compared(places)
    assert found["Spearman"] > 0.99
    assert found["slopes off"] <= found["worst"] < 0.051
    assert found["right sign of clear"] == 1
    assert 0 < found["clear"] < found["places"] == found["small"]


def test_a_permuted_and_a_reversed_forecast_are_shown_as_wrong(places):
    order = np.random.default_rng(0).permutation(20)
    wrong = forecasts.compared({k: v[order] if "forecast" in k else v for k, v in places.items()})
    assert abs(wrong["Spearman"]) < 0.6
    assert wrong["slopes off"] > 0.5
    assert wrong["right sign of clear"] < 1
    turned = {"forecast low": -places["forecast high"], "forecast high": -places["forecast low"]}
    turned |= {name: -places[name] for name in ("forecast slope", "forecast efficiency")}
    assert forecasts.compared(places | turned)["right sign of clear"] == 0


def test_slopes_of_large_pushes_do_not_count(places):
    places["forecast slope"][0], places["kl"][0] = 100.0, 0.05
    assert forecasts.compared(places)["worst"] < 0.051
    assert forecasts.compared(places)["small"] == 19


def test_a_forecast_of_the_testbed_agrees_with_what_is_measured_there(bench):
    assert forecasts.compared(forecasts.row(bench, "happiness"))["Spearman"] > 0.7


def test_a_direction_along_which_the_poles_do_not_part_is_pushed_too(testbed):
    vector = repe.extract(*testbed, "happiness", writes=False)
    pushed = {"mean": forecasts.pushable(replace(vector, scale=-vector.scale))}
    found = repe.forecast(*testbed, pushed, items=4, draws=1)
    edits = forecasts.pushes(found, pushed)
    for row, edit in enumerate(edits):
        ((length, _),) = edit.on(find_stack(testbed[0])).lengths.values()
        assert length == pytest.approx(found.dose[0, row], rel=1e-5)


def test_the_recommended_block_is_held_against_the_best(testbed):
    vector = replace(repe.extract(*testbed, "happiness"), recommended=(2,))
    places = {"reader": ["mean"] * 3 + ["pca"], "block": [2, 4, 5, 5], "slope": [0.1, 0.4, 0.2, 9.0], "kl": [0.01] * 4}
    found = forecasts.placed(vector.at(2, 4, 5), places)
    assert found["best block"] == 4
    assert found["share"] == pytest.approx(0.25) if found["recommended block"] == 2 else False
