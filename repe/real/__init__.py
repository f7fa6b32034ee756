"""What is claimed about real models, measured here and now: `python -m repe.real [PART ...] [--model smollm2]`.

A part yields tables. Its rows are kept as they come, so that a run that was broken off goes on. A row is known again by
the model and the vector: after a change of texts, items or code, `--fresh` measures anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from repe.models.named import NAMED
from repe.real import aiming, concepts, doses, forecasts, laws, peers, times, writing
from repe.real.bench import Bench, LeftOut

FOLDER = Path(__file__).parents[2] / "build" / "real"
PARTS: Mapping[str, Callable[[Bench], Iterator[object]]] = {
    "doses": doses.tables,
    "forecasts": forecasts.tables,
    "concepts": concepts.tables,
    "aiming": aiming.tables,
    "writing": writing.tables,
    "laws": laws.tables,
    "times": times.tables,
    "peers": peers.tables,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that the arguments name, and print their tables as they come.

    Raises:
        SystemExit: a part that was asked for by its name was left out.
    """
    asked = parser().parse_args(arguments)
    parts = asked.parts or [*PARTS]
    if asked.fresh:
        for path in (path for part in parts for path in asked.folder.glob(f"{asked.model}-{part}*.jsonl")):
            path.unlink()
    bench = Bench.of(asked.model, asked.folder, tuple(asked.concepts or ()), asked.small)
    os.environ["REPE_CACHE"] = str(asked.folder / "vectors")  # of vectors; the model, which has a cache, is loaded
    for part in parts:
        for table in PARTS[part](bench):
            if part in asked.parts and isinstance(table, LeftOut):
                sys.exit(table)
            print(table, end="\n\n", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="repe.real", description=__doc__.split("\n")[0])
    made.add_argument("parts", nargs="*", metavar="PART", type=part, help=f"of {', '.join(PARTS)}; all by default")
    made.add_argument("--model", default="smollm2", choices=[*NAMED, "testbed"])
    made.add_argument("--concepts", nargs="+", metavar="CONCEPT", help="these alone")
    made.add_argument("--folder", default=FOLDER, type=Path, help="where rows and vectors are kept; build/real")
    made.add_argument("--fresh", action="store_true", help="forget the rows that are kept")
    made.add_argument("--small", action="store_true", help="a toy of the same course, to see that it runs")
    return made


def part(name: str) -> str:
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"no part is called {name!r}: there are {', '.join(PARTS)}")
    return name
