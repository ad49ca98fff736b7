"""Cells of a result table: text, or mean and deviation over seeds, before any output format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.columns import FOUR_DIGITS, MISSING, Column
from analysis.measured_values import Unconverged
from analysis.rows import Row
from analysis.significance import mean_and_deviation


@dataclass(frozen=True)
class Cell:
    """One cell of one group of runs; text where ``values`` is None."""

    text: str = ""
    values: tuple[float, ...] | None = None
    """The numbers of the seeds that know the column, in the unit of the column."""
    rows: int = 1
    number: str = ""
    plain: bool = False
    """Whether the number stands without deviation because it is a setting or a count, equal for all seeds."""
    converged: bool = True
    best: bool = False
    p: float | None = None
    """Welch's p-value against the baseline; None where it was not or cannot be tested."""
    above: bool = False
    """Whether the mean is above the baseline's."""

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return mean_and_deviation(self.values)[0] if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed and for settings."""
        return mean_and_deviation(self.values)[1] if self.values and not self.plain else None

    def written(self) -> tuple[str, str | None, str]:
        """Mean, deviation and the count of seeds where some are missing, as the table writes them."""
        if self.mean is None:
            return self.text or "–", None, ""
        form = four_digits(self.mean) if self.number == FOUR_DIGITS else self.number
        mean = f"{'' if self.converged else '~'}{self.mean:{form}}"
        deviation = None if self.deviation is None else f"{self.deviation:{form.lstrip('+')}}"
        return mean, deviation, "" if len(self.values or ()) == self.rows else f" (n={len(self.values or ())})"


def cell(rows: Sequence[Row], column: Column) -> Cell:
    """The cell of one column for the runs of one group."""
    found = [column.value(row) for row in rows]
    known = [value for value in found if value is not None and value is not MISSING]
    if column.name == "seeds":
        return Cell(", ".join(map(str, known)))
    plain = [value.value if isinstance(value, Unconverged) else value for value in known]
    if column.number is None or not all(isinstance(value, int | float) for value in plain):
        return Cell("; ".join(dict.fromkeys(map(str, plain))))
    values = tuple(column.factor * float(value) for value in plain)
    fixed = column.setting or all(isinstance(value, int) for value in plain)
    return Cell(
        values=values,
        rows=len(rows),
        number=column.number,
        plain=fixed and len(set(values)) <= 1,
        converged=not any(isinstance(value, Unconverged) for value in known),
    )


def four_digits(value: float) -> str:
    """The format that writes a number with four significant digits, and whole numbers below ten million in full."""
    if value == 0 or (value.is_integer() and abs(value) < 1e7):
        return ".0f"
    power = math.floor(math.log10(abs(value)))
    return f".{max(0, 3 - power)}f" if -4 <= power < 7 else ".3e"
