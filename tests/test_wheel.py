"""What is installed: the library, the testbed and its vectors, and not what made and measures them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import repe

ROOT = Path(repe.__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that an installed wheel is unpacked to."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(*folder.glob("*.whl")) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=installed.parent, env=env, capture_output=True, text=True)


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_a_wheel_holds_the_package_and_its_vectors_alone(installed):
    mine, vectors = files_of(ROOT / "repe"), {f"vectors/{name}" for name in files_of(ROOT / "vectors")}
    makers = {n for n in mine if n.startswith("testbed/") and n.endswith(".py")} - {"testbed/__init__.py"}
    benches = {name for name in mine if name.startswith(("bench/", "real/"))}
    assert len(makers) > 3
    assert len(benches) > 3
    assert files_of(installed / "repe") == (mine - makers - benches) | vectors


def test_an_installed_package_loads_the_testbed_and_steers_by_a_shipped_vector(installed):
    code = (
        "import repe; model, tokenizer = repe.load(); handle = repe.steer(model, 'honesty', 1)\n"
        "from repe.reading.store import shipped_folder; print(repe.__file__, shipped_folder(), handle, sep='\\n')"
    )
    done = run(installed, "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    package, shipped, handle = done.stdout.splitlines()
    assert package == str(installed / "repe" / "__init__.py")
    assert shipped == str(installed / "repe" / "vectors")
    assert "honesty" in handle


def test_where_there_are_no_benchmarks_the_command_says_where_they_are(installed):
    done = run(installed, "-m", "repe.cli", "bench")
    assert done.returncode == 1
    assert done.stderr == (
        "repe: error: the benchmarks are not installed: they live in the repository, where `make bench` runs them\n"
    )
