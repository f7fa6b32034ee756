"""Extraction against other libraries, in turns: they live in an environment of their own, and run in its processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

import repe
from repe.bench.peer import Peer, hand_over
from repe.bench.reading import PAIRS, medians
from repe.bench.table import Row
from repe.bench.timing import Estimate, in_turns
from repe.bench.workload import Workload, contrast

PEERS = ("repeng", "steering_vectors", "repe_official")


def rows(work: Workload, turns: int, python: str | None) -> Iterator[Row]:
    """Against every peer that the interpreter `python` has; the model stands on the CPU, where all of them run."""
    if python is None:
        yield Row("extract, against other libraries", None, note="name their interpreter with --peers (`make peers`)")
        return
    pairs = work.pairs(16 if work.small else PAIRS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        hand_over(work.model, work.tokenizer, pairs, work.middle, folder)
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
