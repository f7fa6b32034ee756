"""The shape of the package: who may import whom, what `import repe` costs, and how long a file may grow."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import repe

PACKAGE = Path(repe.__file__).parent
FACES = {"bench", "cli", "demo", "testbed.curves", "testbed.measure", "testbed.vectors", "widgets"}
ARROWS = {
    "pairs": set(),
    "concept_file": {"pairs"},
    "blocks": set(),
    "chats": set(),
    "tokens": {"chats"},
    "vector": {"plot", "showing"},
    "fingerprint": set(),
    "readers": set(),
    "ops": set(),
    "testbed": set(),
    "calls": {"tokens"},
    "hooks": set(),
    "tracking": {"blocks", "calls", "hooks"},
    "replays": {"hooks", "tracking"},
    "attachment": {"blocks", "hooks", "replays", "tracking"},
    "gates": {"vector"},
    "edits": {"ops", "vector"},
    "strength": {"calls", "gates", "tokens"},
    "prefixes": set(),
    "capturing": {"blocks", "hooks", "prefixes", "tokens"},
    "catalogue": {"concept_file", "pairs"},
    "auditing": {"catalogue", "pairs", "tokens"},
    "extraction": {
        "blocks", "capturing", "catalogue", "chats", "fingerprint", "pairs", "readers", "tracking", "vector",
    },
    "store": {"catalogue", "concept_file", "extraction", "fingerprint", "vector"},
    "loading": {"testbed"},
    "reading": {"blocks", "capturing", "plot", "showing", "tokens", "vector"},
    "plot": {"fits"},
    "showing": set(),
    "precision": set(),
    "editing": {"blocks", "calls", "hooks", "ops", "tracking"},
    "generation": {"tokens"},
    "steering": {
        "attachment", "blocks", "calls", "editing", "edits", "gates", "ops", "precision", "showing", "store",
        "strength", "tokens", "tracking", "vector",
    },
    "baking": {"blocks", "edits", "ops", "precision", "store", "tracking", "vector"},
    "tasks": {"blocks", "capturing", "chats", "tokens", "tracking"},
    "fits": set(),
    "choice": {"fits"},
    "scores": {"fits"},
    "curve": {"choice", "fits", "plot", "scores", "showing"},
    "fanout": {"blocks", "calls", "capturing", "hooks", "prefixes", "steering", "tokens", "tracking"},
    "sweep": {
        "blocks", "capturing", "edits", "fanout", "fingerprint", "gates", "prefixes", "scores", "steering", "tasks",
        "vector",
    },
    "costs": {"blocks", "capturing", "fanout", "prefixes", "scores", "steering", "sweep", "tasks", "tokens"},
    "measuring": {
        "catalogue", "costs", "curve", "extraction", "fingerprint", "scores", "steering", "store", "sweep", "tasks",
        "tokens", "vector",
    },
    "calibration": {
        "catalogue", "choice", "costs", "extraction", "fits", "sweep", "tasks", "tokens", "measuring", "vector",
    },
    "writing": {"capturing", "fingerprint", "fits", "generation", "scores", "steering", "store", "tokens"},
    "harness": {"blocks", "capturing", "scores", "steering", "tasks", "tokens", "writing"},
}  # fmt: skip


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def step_of(module: str) -> str:
    """A file of a folder counts as the folder, except for the faces in it."""
    return module if module in FACES else module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports when it runs, inside functions too."""
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "repe":
            base = node.module.removeprefix("repe").removeprefix(".")
            names = {f"{base}.{a.name}".strip(".") for a in node.names}
            found |= {
                n if (PACKAGE / f"{n.replace('.', '/')}.py").exists() or (PACKAGE / n).is_dir() else base for n in names
            }
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("repe").removeprefix(".") for a in node.names if a.name.split(".")[0] == "repe"
            }
    return found - {""}


FILES = {module_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"}
GRAPH = {module: imports_of(path) for module, path in FILES.items()}


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_what_the_table_allows(module):
    if step_of(module) in FACES:
        return
    imported = {step_of(name) for name in GRAPH[module]} - {step_of(module)}
    assert imported <= ARROWS[step_of(module)]


def test_nothing_but_a_face_imports_a_face():
    imported = set().union(*(names for module, names in GRAPH.items() if step_of(module) not in FACES))
    assert not FACES & {step_of(name) for name in imported}


def test_the_table_names_only_what_exists():
    assert set(ARROWS) == {step_of(module) for module in FILES} - FACES


def test_imports_run_in_no_circle():
    steps: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        steps.setdefault(step_of(module), set()).update({step_of(i) for i in imported} - {step_of(module)})
    list(TopologicalSorter(steps).static_order())
    list(TopologicalSorter({m: {i for i in GRAPH[m] if i != m} for m in GRAPH}).static_order())


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_a_file_is_one_idea_long(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "statement", ["import repe", "import repe; repe.ConceptVector.__name__ if False else dir(repe)"]
)
def test_importing_the_package_loads_nothing_heavy(statement):
    heavy = ["torch", "triton", "matplotlib", "ipywidgets", "vllm", "transformers", "sklearn", "scipy", "numpy"]
    code = f"import sys; {statement}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_readers_and_pairs_need_no_torch():
    code = "import sys, repe.readers, repe.pairs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", repe.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(repe, name).__doc__
    assert not isinstance(getattr(repe, name), type(repe))  # a function or class, never the file of the same name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'steeer'"):
        _ = repe.steeer
