"""The shape of the package: which room may import which, and what `import repe` costs."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import repe

PACKAGE = Path(repe.__file__).parent
CHANGELOG = (PACKAGE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
ROOMS = {
    "display": set(),
    "ops": set(),
    "models": {"display"},
    "data": {"display", "models"},
    "reading": {"data", "display", "models"},
    "steering": {"display", "models", "ops", "reading"},
    "measuring": {"data", "display", "models", "reading", "steering"},
}
"""What the files of a room may import, for types too."""
FACES = {"bench", "cli", "demo", "plot", "real", "testbed", "widgets"}
DRAWN = "repe.plot"  # a face, which a data class may import inside its own `plot()`


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports: when it runs, inside functions, and for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "repe":
            found |= {module_named(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "repe"}
    return {name.removeprefix("repe").removeprefix(".") for name in found} - {""}


def module_named(base: str, name: str) -> str:
    """The module that `from base import name` imports: the file of that name where there is one."""
    path = PACKAGE.parent.joinpath(*base.split("."), name)
    return f"{base}.{name}" if path.with_suffix(".py").exists() or (path / "__init__.py").exists() else base


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[0]


def drawn_in(path: Path) -> set[str]:
    """The modules that a file imports inside methods called `plot`."""
    methods = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == "plot"]
    nodes = [n for method in methods for n in ast.walk(method) if isinstance(n, ast.ImportFrom)]
    return {str(n.module).removeprefix("repe.") for n in nodes}


FILES = {module_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"}
GRAPH = {module: imports_of(path) for module, path in FILES.items()}
INSIDE = {module: path for module, path in FILES.items() if room_of(module) in ROOMS}


@pytest.mark.parametrize("module", INSIDE)
def test_a_file_imports_only_what_the_table_allows(module):
    imported = {room_of(name) for name in GRAPH[module] - drawn_in(INSIDE[module])} - {room_of(module)}
    assert imported <= ROOMS[room_of(module)]


def test_the_table_names_what_exists():
    assert {room_of(module) for module in FILES} == set(ROOMS) | FACES


def test_imports_run_in_no_circle():
    without = {module: {module} | drawn_in(path) for module, path in FILES.items()}
    list(TopologicalSorter({module: GRAPH[module] - without[module] for module in FILES}).static_order())


@pytest.mark.parametrize("statement", ["import repe", "import repe; dir(repe); repe.__version__"])
def test_importing_the_package_loads_nothing_heavy(statement):
    heavy = ["torch", "triton", "matplotlib", "ipywidgets", "vllm", "transformers", "sklearn", "scipy", "numpy"]
    code = f"import sys; {statement}; print(*[m for m in {heavy} if m in sys.modules])"
    assert run(code).split() == []


def test_readers_and_pairs_need_no_torch():
    code = "import sys, repe.reading.readers, repe.data.pairs; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def run(code: str) -> str:
    """What it prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", repe.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(repe, name).__doc__
    assert not isinstance(getattr(repe, name), type(repe))  # a function or class, never the file of the same name


@pytest.mark.parametrize("room", sorted({*ROOMS, *FACES} - {"bench", "demo", "real"}))
def test_a_room_is_there_without_an_import_of_its_own(room):
    assert room in dir(repe)
    assert room not in repe.__all__
    assert getattr(repe, room) is sys.modules[f"repe.{room}"]


def test_a_star_loads_public_names_alone():
    assert run("from repe import *; import sys; print(steer.__name__, 'repe.plot' in sys.modules)") == "steer False\n"


def test_an_unknown_name_is_an_attribute_error_that_names_the_near_one():
    with pytest.raises(AttributeError, match="steeer"):
        _ = repe.steeer
    done = subprocess.run([sys.executable, "-c", "import repe; repe.steeer"], capture_output=True, text=True)
    assert "Did you mean: 'steer'?" in done.stderr


def test_the_version_is_the_one_of_the_changelog():
    newest = re.search(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)
    assert newest is not None
    assert repe.__version__ == newest[1]


def test_the_changelog_leads_to_files_that_are_there():
    rows = [line.split("|")[2] for line in CHANGELOG.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 5
    for row in rows:
        full, *same_room = re.findall(r"`(.+?)`", row)
        room = full.rpartition(".")[0]
        assert {name.removeprefix("repe.") for name in (full, *(room + name for name in same_room))} <= set(FILES)


@pytest.mark.parametrize("room", ["data", "measuring", "models", "reading", "steering"])
def test_a_public_name_of_a_room_is_never_the_file_of_the_same_name(room):
    files = [module for module in FILES if module.startswith(f"{room}.")]
    code = (
        f"import importlib, types\nfor file in {files}: importlib.import_module('repe.' + file)\n"
        f"room = importlib.import_module('repe.{room}')\n"
        "print(*[n for n in room.__all__ if isinstance(getattr(room, n), types.ModuleType)], len(room.__all__) > 3)"
    )
    assert run(code) == "True\n"


def test_log_p_is_computed_in_one_place():
    names = re.compile(r"log_softmax|logsumexp|cross_entropy\(|\.softmax\(")
    found = [
        m
        for m, path in FILES.items()
        if room_of(m) in ("models", "reading", "measuring", "widgets", "cli") and names.search(path.read_text())
    ]
    assert found == ["models.logits"]
    assert FILES["models.logits"].read_text().count(".log_softmax(") == 1
