"""The trade-off curve: what was measured of a concept at every strength. Frozen data, and JSON files of it.

Measuring happens elsewhere, and so do the fits and the choice of a strength: the curve hands its numbers over.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from repe import display
from repe.measuring.choice import Choice, Fits, Rehearsal, choose, fit_all, rehearse
from repe.measuring.fits import Array, Estimate, Measured
from repe.measuring.scores import Baseline, ByValue, Control, Costs, Scores, check_scores, freeze, numbers_in, texts_in

FORMAT = "repe.curve/1"
SHOWN = ("behaviour", "helpfulness", "loss", "kl")
ROWS = 11


@dataclass(frozen=True, eq=False)
class TradeoffCurve(ByValue):
    """Behaviour, helpfulness and costs of steering along a concept, over the strength.

    Attributes:
        concept: its name.
        alphas: (alphas,), sorted, distinct, 0 among them.
        alignment: the behaviour items' scores.
        helpfulness: the skill items' scores.
        costs, control, baseline: what else was measured.
        provenance: how it was made; plain JSON data.
    """

    concept: str
    alphas: Array
    alignment: Scores
    helpfulness: Scores
    costs: Costs = field(default_factory=Costs)
    control: Control | None = None
    baseline: Baseline | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        freeze(self, "alphas", numbers_in("alphas", self.alphas, 1))
        freeze(self, "provenance", _json_data(self.provenance))
        texts_in("concept", [self.concept])
        if (np.diff(self.alphas) <= 0).any():
            raise ValueError(f"alphas are sorted, none twice; got {self.alphas.tolist()}")
        if 0 not in self.alphas:
            raise ValueError(f"alphas hold 0, against which all is measured; got {self.alphas.tolist()}")
        for name in ("alignment", "helpfulness"):
            check_scores(name, getattr(self, name), len(self.alphas), "alphas")
        for name, kind in (("costs", Costs), ("control", Control | None), ("baseline", Baseline | None)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"`{name}` is of {kind}, got {type(getattr(self, name)).__name__}")
        measured = {f.name: getattr(self.costs, f.name) for f in fields(Costs)}
        if self.control is not None:
            measured["control"] = self.control.behaviour.T
        if wrong := {k: len(v) for k, v in measured.items() if v is not None and len(v) != len(self.alphas)}:
            raise ValueError(f"there are {len(self.alphas)} alphas, but {wrong} rows")

    @cached_property
    def fits(self) -> Fits:
        """All fits, with what is linear fitted up to |alpha| = 2; `repe.measuring.choice.fit_all` has another reach."""
        return fit_all(self)

    def best(self, budget: float = 0.05, *, seed: int = 0, sign: int | None = 1) -> Choice:
        """The strength that gains most within a budget: see `repe.measuring.choice.choose`."""
        return choose(self, budget, seed=seed, sign=sign)

    def rehearse(self, splits: int = 200, budget: float = 0.05, *, seed: int = 0, sign: int | None = 1) -> Rehearsal:
        """How often `best` keeps its budget over random splits: see `repe.measuring.choice.rehearse`."""
        return rehearse(self, splits, budget, seed=seed, sign=sign)

    @cached_property
    def columns(self) -> dict[str, Array]:
        """The curve as columns, each (alphas,): means over items, and the ends of their intervals."""
        aligned, helpful = self.alignment, self.helpfulness
        columns = {"alpha": self.alphas}
        for name, scores, values in (
            ("behaviour", aligned, aligned.behaviour),
            ("difference", aligned, aligned.difference),
            ("helpfulness", helpful, helpful.probability),
            ("full", helpful, helpful.full),
            ("accuracy", helpful, helpful.accuracy),
        ):
            columns |= _with_interval(name, Measured(self.alphas, values, scores.groups).estimates())
        columns |= _with_interval("loss", Measured(self.alphas, helpful.probability, helpful.groups).loss.estimates())
        for name in ("kl", "cross_entropy", "change"):
            if (values := getattr(self.costs, name)) is not None:
                columns |= _with_interval(name, Measured(self.alphas, values).estimates())
        single = {"kl_p95": self.costs.kl_p95, "perplexity": self.costs.perplexity}
        return columns | {name: values for name, values in single.items() if values is not None}

    def to_frame(self) -> Any:
        """A pandas DataFrame of `columns`, one row a strength. Raises ImportError where there is no pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame(self.columns)

    def plot(self, ax: Any = None, *, budget: float = 0.05) -> Any:
        """Draws the curve on matplotlib axes, and returns the upper and the lower: see `repe.plot.tradeoff`.

        The second view, alignment against helpfulness, is `repe.plot.frontier`.
        """
        return importlib.import_module("repe.plot").tradeoff(self, ax, budget)

    def _table(self) -> tuple[list[str], list[list[str]], str]:
        """Heads, rows of a few strengths with a mark at the best, and what is said under them."""
        choice = self.best()
        spread = np.linspace(0, len(self.alphas) - 1, ROWS).round().astype(int)
        chosen = [int(np.flatnonzero(self.alphas == alpha)[0]) for alpha in (0, choice.alpha)]
        names = [name for name in SHOWN if name in self.columns]
        rows = [
            [f"{self.alphas[i]:g}" + " *" * (i == chosen[1]), *(self._cell(name, i) for name in names)]
            for i in np.unique([*spread, *chosen]).tolist()
        ]
        return ["alpha", *names], rows, f"* {choice}"

    def _cell(self, name: str, row: int) -> str:
        return str(Estimate(*(self.columns[name + end][row] for end in ("", "_low", "_high"))))

    def __str__(self) -> str:
        heads, rows, note = self._table()
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
        return "\n".join([f"{self.concept}, steered", *lines, note])

    def _repr_html_(self) -> str:
        return display.table(f"{self.concept}, steered", *self._table()).html()

    __repr__ = __str__

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a JSON file of all scores, whole or not at all, and returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / "draft"
            draft.write_text(json.dumps({"format": FORMAT} | _plain(self), allow_nan=False), encoding="utf-8")
            os.replace(draft, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TradeoffCurve:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is broken, cut short, or not a trade-off curve; the text says which.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no trade-off curve at {path}")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError(f"it is not of the format {FORMAT}")
            return _built(cls, data, "the curve")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole trade-off curve: {error}. Measure it anew") from error


PARTS = {"alignment": Scores, "helpfulness": Scores, "costs": Costs, "control": Control, "baseline": Baseline}


def _built(kind: Any, data: Any, where: str) -> Any:
    """The dataclass that `_plain` took apart. The control's `helpfulness` is an array, and stays one."""
    names = {f.name for f in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        raise ValueError(f"{where} is not an object with the fields {sorted(names)}")
    parts = {} if kind is Control else {name: PARTS[name] for name in names & set(PARTS) if data[name] is not None}
    return kind(**data | {name: _built(part, data[name], f"`{name}`") for name, part in parts.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, ByValue):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}  # type: ignore[arg-type]
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value] if value.ndim > 1 else [None if v != v else v for v in value.tolist()]
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _json_data(provenance: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(provenance), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance is a mapping of plain JSON data: {error}") from error


def _with_interval(name: str, estimates: Sequence[Estimate]) -> dict[str, Array]:
    ends = (("", "value"), ("_low", "low"), ("_high", "high"))
    return {name + suffix: np.array([getattr(e, end) for e in estimates]) for suffix, end in ends}
