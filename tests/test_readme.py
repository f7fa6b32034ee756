"""The README tells the truth: its first code runs, and the files it names are there."""

import re
from functools import partial
from pathlib import Path

import pytest

import repe
from repe.measuring.tasks import items_of
from repe.models.named import NAMED
from repe.reading.placing import spread

ROOT = Path(repe.__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_code_runs_and_steers(capsys, monkeypatch):
    """On the model that it names, or on the testbed where that is not installed."""
    code, load = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0], repe.load
    if not NAMED["smollm2"].parts:
        monkeypatch.setattr(repe, "load", lambda *_: load())
    exec(code + "        print('-----')", {})
    first, second, rest = capsys.readouterr().out.split("-----\n")
    assert first.strip()
    assert first != second
    assert not rest


def test_all_its_code_runs_in_order(monkeypatch, tmp_path):
    """With the testbed in the place of a model of the hub, and fewer strengths, items, blocks and readers."""
    load, tradeoff, calibrate = repe.load, repe.tradeoff, repe.calibrate
    moods, skills = (items_of(name, load()[0]) for name in ("happiness", "skills"))
    few = {"alignment": spread(moods, 60), "helpfulness": spread(skills, 60)}
    curves = partial(tradeoff, alphas=[-1, -0.5, -0.2, 0, 0.2, 0.5, 1], controls=3, **few)
    monkeypatch.setenv("REPE_CACHE", str(tmp_path))
    monkeypatch.setattr(repe, "load", lambda *_: load())
    monkeypatch.setattr(repe, "tradeoff", curves)
    monkeypatch.setattr(
        repe, "calibrate", partial(calibrate, blocks=[2, 3], readers=["mean"], helpfulness=few["helpfulness"])
    )
    names = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(code, names)
    assert repe.status(names["model"]) == []
    assert names["choice"].alpha > 0
    assert names["reading"].scores.shape == (len(names["reading"].tokens), 6)
    assert {*names["settings"].more.vector.recommended} <= {2, 3}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b\w+\.py\b", TEXT))))
def test_the_files_it_names_are_there(name):
    assert list((ROOT / "repe").rglob(name))


def test_every_file_of_the_package_is_named_or_in_a_named_folder():
    flat = {p.name for p in (ROOT / "repe").glob("*.py")} - {"__init__.py"}
    folders = {f"{p.parent.name}/" for p in (ROOT / "repe").glob("*/__init__.py")}
    assert flat <= set(re.findall(r"\b\w+\.py\b", TEXT))
    assert all(folder in TEXT for folder in folders)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", TEXT))
def test_its_links_lead_somewhere(target):
    assert (ROOT / target).exists()
