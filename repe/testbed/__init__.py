"""The testbed: a small language model trained on a synthetic world, shipped inside the package with its data files.

`FOLDER` is an ordinary local Hugging Face folder; its `README.md` says what the model is and what was measured on it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
