"""The examples in docstrings run, and print what they say; every public name has one."""

import doctest
import importlib
from pathlib import Path

import pytest

import repe

PACKAGE = Path(repe.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_examples_of_a_file_run(path, testbed, tmp_path, monkeypatch):
    """With `model` and `tokenizer` those that `repe.load()` gives, and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    given = {"repe": repe, **dict(zip(("model", "tokenizer"), testbed, strict=True))}
    done = doctest.testmod(
        importlib.import_module(name), extraglobs=given, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize("name", repe.__all__)
def test_a_public_name_has_an_example(name):
    assert any(test.examples for test in doctest.DocTestFinder(recurse=False).find(getattr(repe, name), name))
