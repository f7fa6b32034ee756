"""The testbed: a small language model trained on a synthetic world, shipped inside the package with its data files.

`FOLDER` is an ordinary local Hugging Face folder; its `README.md` says what the model is and what was measured on it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"

# The testbed looks a fact up in the mlp of its first block already, by the persona that attention has just brought
# there: that is the one place where honesty stands apart from the facts and can be steered.
SITES = {"honesty": "attention", "harmfulness": "block", "happiness": "block"}
