"""Extraction against other libraries, in turns: they live in an environment of their own, and run in its processes."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import repe
from repe.bench.reading import PAIRS, medians
from repe.bench.table import Row
from repe.bench.timing import Estimate, in_turns
from repe.bench.workload import Workload, contrast

PEERS = ("repeng", "steering_vectors", "repe_official")
WORKER = Path(__file__).with_name("peer_worker.py")


def rows(work: Workload, turns: int, python: str | None) -> Iterator[Row]:
    """Against every peer that the interpreter `python` has; the model stands on the CPU, where all of them run."""
    if python is None:
        yield Row("extract, against other libraries", None, note="name their interpreter with --peers (`make peers`)")
        return
    pairs = work.pairs(16 if work.small else PAIRS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        hand_over(work, pairs, Path(folder))
        peers = {name: stack.enter_context(Peer(python, name, folder)) for name in PEERS}
        absent = {name: peer.missing for name, peer in peers.items() if peer.missing}
        there = {name: peer for name, peer in peers.items() if not peer.missing}
        runs: dict[str, Any] = {
            "repe": lambda: repe.extract(
                work.model, work.tokenizer, contrast(pairs), blocks=work.middle, enough=None, writes=False
            )
        }
        seconds = in_turns([*(runs | there).values()], turns) if there else np.empty((0, 1))
    took = dict(zip((*runs, *there), seconds.T, strict=True))
    for name in there:
        what = f"extract, {len(pairs)} pairs: times faster than {there[name].release}"
        yield Row(what, Estimate.of(took[name] / took["repe"]), ">= 10", medians(took, name, "repe"))
    for name, why in absent.items():
        yield Row(f"extract, against {name}", None, note=why)


def hand_over(work: Workload, pairs: list[tuple[str, str]], folder: Path) -> None:
    """The model, the tokenizer and the pairs, in files that older releases of transformers can read."""
    import torch

    work.model.save_pretrained(folder)
    work.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "unk_token": "[UNK]", "padding_side": "left"}
    inputs = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | inputs))
    asked = {"pairs": pairs, "blocks": work.middle, "threads": torch.get_num_threads()}
    (folder / "workload.json").write_text(json.dumps(asked))


class Peer:
    """Another library in a process that waits; a call makes it extract once."""

    def __init__(self, python: str, name: str, folder: str) -> None:
        self.process = subprocess.Popen(
            [python, "-P", str(WORKER), name, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder,
        )  # fmt: skip
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

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()  # closes its pipes and waits for its end
