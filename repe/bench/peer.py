"""Another library in an environment of its own: what is handed over to it, and its process, which waits for a call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("peer_worker.py")


def hand_over(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], blocks: Sequence[int], folder: str | Path
) -> None:
    """The model, the tokenizer and the pairs, in files that older releases of transformers can read.

    What the model gives for the first text goes with them: a peer that reads another model refuses to run.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}  # older releases look for its values beside it, and would take others
    named = {name: rope[name] for name in ("rope_theta",) if name in rope}
    (folder / "config.json").write_text(json.dumps(config | named))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    inputs = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    told = inputs | {"padding_side": "left"} | tokenizer.special_tokens_map
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    ids = list(tokenizer(pairs[0][0])["input_ids"])
    with torch.no_grad():
        loss = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    asked = {"pairs": list(pairs), "blocks": list(blocks), "threads": torch.get_num_threads(), "ids": ids, "loss": loss}
    (folder / "workload.json").write_text(json.dumps(asked))


def interpreter(named: str | Path) -> str:
    """The path of an interpreter that holds in any folder. A link is not followed, as packages go by its place.

    Raises:
        FileNotFoundError: there is none.
    """
    if (found := shutil.which(named)) is None:
        raise FileNotFoundError(f"there is no interpreter {named}: `make .venv-peers` sets one up in .venv-peers")
    return os.path.abspath(found)


class Peer:
    """Another library in a process that waits; a call makes it extract once.

    The environment cannot put this library, whose name is another's too, before its packages.
    """

    def __init__(self, python: str | Path, name: str, folder: str | Path) -> None:
        self.process = subprocess.Popen(
            [interpreter(python), "-I", str(WORKER), name, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder,
        )  # fmt: skip
        self.path = Path(folder) / f"{name}.npz"
        said = self.heard()
        self.release, self.missing = said.get("ready", name), said.get("missing", "")

    def heard(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.strip() else {"missing": "its process ended without a word"}

    def __call__(self) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        if why := self.heard().get("missing"):
            raise RuntimeError(f"{self.release} failed: {why}")

    @property
    def directions(self) -> dict[int, Tensor]:
        """What the last call extracted: for every block the direction (d_model,) that is added to its output."""
        with np.load(self.path) as found:
            return {int(block): torch.tensor(found[block]) for block in found}

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()  # closes its pipes and waits for its end
