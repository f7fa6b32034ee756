"""One row of the benchmark, and how it is printed."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass
from typing import Any

from repe.bench.timing import Estimate

COLUMNS = "{:>8}  {:<17}{:<82}{:<17}{}"


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        what: in words, ending with what it is compared to.
        ratio: the estimate, a ratio unless `unit` says otherwise; None where it was left out.
        bar: what it should be: "" or one of ">= 10" and "<= 1.02", which the end of the interval has to clear.
        note: seconds, counts, or why it was left out.
    """

    what: str
    ratio: Estimate | None
    bar: str = ""
    note: str = ""
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the worse end of the interval clears the bar; None without one."""
        if not self.bar or self.ratio is None:
            return None
        sign, number = self.bar.split()
        worse = self.ratio.low if sign == ">=" else self.ratio.high
        return bool({">=": operator.ge, "<=": operator.le}[sign](worse, float(number)))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def heading() -> str:
    return COLUMNS.format("ratio", "95% interval", "of what", "bar", "with")


def line(row: Row) -> str:
    if row.ratio is None:
        return COLUMNS.format("-", "left out", row.what, row.bar, row.note)
    value = short(row.ratio.value) + row.unit
    interval = "counted" if row.ratio.n == 1 else f"{short(row.ratio.low)} to {short(row.ratio.high)}"
    bar = row.bar and f"{row.bar} {'met' if row.met else 'NOT met'}"
    return COLUMNS.format(value, interval, row.what, bar, row.note)


def short(value: float) -> str:
    """Three digits, four near 1, where thousandths matter."""
    if value and math.isfinite(value) and 0.9 < abs(value) < 1.1:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
