"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import repe

PACKAGE = Path(repe.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def given():
    model, tokenizer = repe.load()
    return {"repe": repe, "model": model, "tokenizer": tokenizer}


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_examples_of_a_file_run(path, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    done = doctest.testmod(importlib.import_module(name), extraglobs=given)
    assert done.attempted > 0
    assert done.failed == 0
