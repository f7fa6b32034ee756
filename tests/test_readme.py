"""The README tells the truth: its first code runs, and the files it names are there."""

import re
from pathlib import Path

import pytest

import repe

ROOT = Path(repe.__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_code_runs_and_steers(capsys):
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    exec(code, {})
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2
    assert answers[0] != answers[1]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b\w+\.py\b", TEXT))))
def test_the_files_it_names_are_there(name):
    assert list((ROOT / "repe").rglob(name))


def test_every_file_of_the_package_is_named_or_in_a_named_folder():
    flat = {p.name for p in (ROOT / "repe").glob("*.py")} - {"__init__.py"}
    assert flat - set(re.findall(r"\b\w+\.py\b", TEXT)) <= {"catalogue.py", "fingerprint.py", "loading.py"}


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", TEXT))
def test_its_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_it_can_be_read_in_one_sitting():
    assert len(TEXT.splitlines()) <= 150
