"""The bench: a model, the vectors it is steered along, and the rows that were measured of it, each measured once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import repe
from repe import display
from repe.measuring.intervals import Estimate
from repe.models.fingerprint import digest, fingerprint
from repe.models.load import home_of
from repe.reading.store import resolve

FEW = 6  # of everything, where the bench is small: intervals need four
Row = Mapping[str, Any]
"""Plain JSON data by the heads of its columns."""


class LeftOut(str):
    """What of a part could not be measured, and why: an error where the part was asked for by its name."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What is measured, and where its rows are kept.

    Attributes:
        name: the model's; "testbed" for the testbed.
        model, tokenizer: as `repe.load` gives them.
        folder: of the rows, a file a part.
        asked: the concepts that were asked for; none for those that a part takes by default.
        small: measure a few of everything, to see that it runs.
        loading: seconds that the model took to load.
    """

    name: str
    model: Any
    tokenizer: Any
    folder: Path
    asked: tuple[str, ...] = ()
    small: bool = False
    loading: float = 0.0

    @classmethod
    def of(cls, name: str, folder: Path, asked: tuple[str, ...] = (), small: bool = False) -> Bench:
        start = time.perf_counter()
        model, tokenizer = repe.load(None if name == "testbed" else name)
        return cls(name, model, tokenizer, folder, asked, small, time.perf_counter() - start)

    @cached_property
    def concepts(self) -> Sequence[str]:
        """Those that were asked for, else those that came with the model, else the library's."""
        home = home_of(self.model)
        own = [] if home is None else [path.stem for path in (home / "concepts").glob("*")]
        return self.asked or sorted(own or repe.concepts())

    def chosen(self, defaults: Iterable[str]) -> Sequence[str]:
        """The concepts that were asked for, else those of the defaults that the model has."""
        return self.asked or [concept for concept in defaults if concept in self.concepts]

    def at_most(self, count: int) -> int:
        """So many, or a few where the bench is small."""
        return min(count, FEW) if self.small else count

    @cache  # noqa: B019  # a bench lives as long as its command
    def vector(self, concept: str) -> repe.ConceptVector:
        """The one that `repe.steer` finds by this name: shipped, else extracted once."""
        return resolve(self.model, concept, self.tokenizer)

    def row(self, part: str, concept: str, measure: Callable[[], Row], *key: Any) -> Row:
        """The row that is kept of a concept's vector, and of what else is its key; else it is measured, and kept."""
        of = [self._model, self.vector(concept).digest, self.small, concept, *key]
        path = self.folder / f"{self.name}-{part}.jsonl"
        found: Row | None = next((row["row"] for row in _rows(path) if row["of"] == of), None)
        if found is None:
            found = measure()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"of": of, "row": found}))
            told = [f"{head} {shown(cell)}" for head, cell in found.items() if not isinstance(cell, list)]
            print(f"{part}: {', '.join(map(str, (concept, *key)))}", *told, sep="; ", file=sys.stderr, flush=True)
        return found

    @cached_property
    def _model(self) -> str:
        mine = fingerprint(self.model)
        return f"{mine['key']}/{digest(mine['sketch'])}"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in a file; a line that was broken off is none."""
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


# rows and how they are shown


def kept(estimate: Estimate) -> dict[str, float]:
    """An estimate as a cell."""
    return asdict(estimate)


def shown(cell: Any) -> str:
    """An estimate with its interval, a number with three digits, anything else as it is."""
    if isinstance(cell, dict):
        return str(Estimate(**cell))
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def table(title: str, first: str, rows: Mapping[Any, Row], note: str = "") -> display.Table:
    """A table of rows under the heads of their columns, of which lists are kept and not shown.

    `first` is the head of what the rows are called.
    """
    heads = [*dict.fromkeys(head for row in rows.values() for head, cell in row.items() if not isinstance(cell, list))]
    cells = [[name, *(shown(row.get(head, "")) for head in heads)] for name, row in rows.items()]
    return display.table(title, [first, *heads], cells, note)
