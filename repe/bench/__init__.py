"""What steering and reading cost, measured here and now: `python -m repe.bench`.

A bench is a function that yields rows. Everything that is compared runs in turns in one process, so that what else the
machine does falls on both sides; a row is the median of the turns' ratios with its 95% interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch

from repe.bench import compiled, edits, gpu, peers, reading, scaling, steering, sweeping
from repe.bench.table import Row, heading, line
from repe.bench.workload import Workload

SECTIONS = ("reading", "steering", "compiled", "sweep", "scaling", "peers", "gpu")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benches that the arguments name, and prints their rows as they come.

    Raises:
        SystemExit: of a section that was asked for by its name, something was left out.
    """
    asked = parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    rows: list[Row] = []
    ready, lacking = benches(asked), []
    if not asked.json:
        print(f"{about(asked)}\n\n{heading()}", flush=True)
    for name in asked.only or SECTIONS:
        for row in guarded(name, ready[name]):
            rows.append(row)
            lacking += [f"{name}: {row.what}: {row.note}"] * (row.ratio is None)
            if not asked.json:
                print(line(row), flush=True)
    if asked.json:
        json.dump({"machine": about(asked), "rows": [row.as_json() for row in rows]}, sys.stdout, indent=1)
        print()
    if asked.only and lacking:
        sys.exit("\n".join(["of what was asked for by name, this was left out", *lacking]))


def guarded(name: str, bench: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a section; where it fails, why, so that the others are not lost."""
    try:
        yield from bench()
    except Exception as error:
        yield Row(name, None, note=f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="repe.bench", description=__doc__.split("\n")[0])
    made.add_argument(
        "--device", default="cpu", type=device, help="cpu, or cuda, which adds the kernels and a model of 8B shape"
    )
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch on the CPU")
    made.add_argument("--turns", type=int, default=7, help="of everything that takes seconds")
    made.add_argument("--steps", type=int, default=250, help="single decode steps on either side")
    made.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    made.add_argument("--peers", metavar="PYTHON", help="an interpreter that has other libraries: see `make peers`")
    made.add_argument("--json", action="store_true", help="print JSON once all is done")
    made.add_argument("--small", action="store_true", help="a toy of the same course, to see that it runs")
    return made


def benches(asked: argparse.Namespace) -> dict[str, Callable[[], Iterator[Row]]]:
    """The sections by name, none of them begun."""
    work = Workload(asked.device, asked.small)
    return {
        "reading": partial(reading.rows, work, asked.turns),
        "steering": partial(steering.rows, work, asked.turns, asked.steps),
        "compiled": partial(compiled.rows, work, asked.steps),
        "sweep": partial(sweeping.rows, work.small, asked.turns),
        "scaling": partial(scaling.rows, work, asked.turns),
        "peers": partial(peers.rows, Workload("cpu", asked.small), asked.turns, asked.peers),
        "gpu": lambda: chain(edits.rows(work, asked.steps), gpu.rows(work, asked.turns, asked.steps)),
    }


def device(name: str) -> str:
    """Raises ValueError for one whose end of work cannot be waited for."""
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"cpu, cuda or cuda:N, got {name!r}")
    return name


def about(asked: argparse.Namespace) -> str:
    place = (
        torch.cuda.get_device_name(asked.device) if asked.device.startswith("cuda") else platform.processor() or "CPU"
    )
    return f"{place}, {asked.threads} threads, torch {torch.__version__}, Python {platform.python_version()}"
