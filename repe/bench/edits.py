"""The fused kernel of the edits on a GPU, as a share of the bandwidth with which the device copies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from repe import ops
from repe.bench.table import Row
from repe.bench.timing import Estimate, Run, in_turns
from repe.bench.workload import Workload
from repe.ops import Coefficients
from repe.ops.reference import Gain

ROWS, WIDTH = 8192, 4096
DIRECTIONS = (1, 4, 16)
BARS = {1: ">= 0.85", 4: ">= 0.7"}
INNER = 20  # launches that are timed together, so that the clock costs nothing


def rows(work: Workload, turns: int) -> Iterator[Row]:
    """For every kind of edit, a full stream of bfloat16: time of a copy over time of the edit."""
    if not work.device.startswith("cuda"):
        yield Row("kernels of the edits", None, note="runs on a GPU: --device cuda")
        return
    yield from shares(ROWS, WIDTH, turns, work.device, torch.bfloat16, "triton")


def shares(tokens: int, width: int, turns: int, device: str, dtype: torch.dtype, impl: str) -> Iterator[Row]:
    x = torch.randn(1, tokens, width, device=device).to(dtype)
    out, strength, edit = torch.empty_like(x), torch.full((1, 1), 0.5, device=device), ops.pick(impl)
    for kind in KINDS:
        for k in DIRECTIONS:
            constants = coefficients(kind, k, width, device)
            runs = [repeated(partial(out.copy_, x)), repeated(partial(edit, x, strength, constants))]
            seconds = in_turns([recorded(run) for run in runs] if x.is_cuda else runs, turns, device, warm=3)
            speed = 2 * x.nbytes * INNER / sorted(seconds[:, 1])[turns // 2] / 1e9
            yield Row(
                f"kernel, {kind}, {k} directions, {tokens} x {width} {dtype}: share of the copy's bandwidth",
                Estimate.of(seconds[:, 0] / seconds[:, 1]), BARS.get(k, ""), f"{speed:.0f} GB/s",
            )  # fmt: skip


def repeated(run: Run) -> Run:
    def many() -> None:
        for _ in range(INNER):
            run()

    return many


def recorded(run: Run) -> Run:
    """The same as one CUDA graph: what Python takes to launch a kernel is not the kernel's."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


KINDS: dict[str, tuple[float, float, Gain, bool, bool]] = {  # slope, offset, gain, keep_norm, needs_projection
    "add": (0.0, 1.0, "one", False, False),
    "add, norm kept": (0.0, 1.0, "one", True, False),
    "ablate": (-1.0, 0.0, "one", False, True),
    "clamp": (-1.0, 1.0, "one", False, True),
    "piecewise": (0.0, 1.0, "sign", False, True),
    "angle": (-1.0, 1.0, "norm", False, True),
}


def coefficients(kind: str, k: int, width: int, device: str) -> Coefficients:
    slope, offset, gain, keep_norm, needs_projection = KINDS[kind]
    read = torch.nn.functional.normalize(torch.randn(k, width, device=device), dim=-1)
    ones = torch.ones(k, device=device)
    return Coefficients(
        read, read.clone(), slope * ones, offset * ones, -math.inf * ones, math.inf * ones, gain, keep_norm,
        needs_projection,
    )  # fmt: skip
