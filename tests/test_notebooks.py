"""The notebooks as they are committed: executed from top to bottom, small, and free of one machine's traces."""

import json
import re
from pathlib import Path

import pytest

import repe

FOLDER = Path(repe.__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 500_000  # bytes


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_they_are_numbered_without_a_gap() -> None:
    assert [path.name.split("_")[0] for path in NOTEBOOKS] == [str(n + 1) for n in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_in_order_and_nothing_went_wrong(path: Path) -> None:
    assert [cell["execution_count"] for cell in cells(path)] == [n + 1 for n in range(len(cells(path)))]
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert "stderr" not in {output.get("name") for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs) or "pitfalls" in path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_cell_at_the_top_names_the_model(path: Path) -> None:
    """But for the first, which begins with a real model."""
    codes = ["".join(cell["source"]) for cell in cells(path)]
    (place,) = [place for place, code in enumerate(codes) if re.search(r"^MODEL = None", code, re.MULTILINE)]
    assert place == (path.stem == "1_quickstart")
    assert "repe.load(MODEL)" in codes[place]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_names_no_place_of_one_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < LARGEST
    assert not re.search(r"/(work|root|home|tmp)/", text)
