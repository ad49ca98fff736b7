"""What varies between runs, and what it does to a number: factors, their levels, main effects and interactions."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.columns import Column
from analysis.measured_values import Unconverged
from analysis.rows import Row, flat
from analysis.significance import mean_and_deviation
from research.runs.folder import DISPLAY_OPTION, NOT_IDENTITY

NOT_FACTORS = ("seed", "data.seed", f"trainer.{DISPLAY_OPTION}")
MECHANICS = "mechanics"
"""Factor made of the names of a run's mechanics; what a mechanic's options do is told by their own keys."""
ABSENT = "absent"


@dataclass(frozen=True)
class Factor:
    """A configuration key that varies.

    Attributes:
        key: the key, dotted.
        levels: its values as text, numbers in order.
        of: position in ``levels`` for each row.
        same: other keys that divide the rows in the same way, so that nothing tells them apart.
    """

    key: str
    levels: tuple[str, ...]
    of: tuple[int, ...]
    same: tuple[str, ...] = ()

    @property
    def numeric(self) -> bool:
        """Whether all levels are numbers, so that there is something between them."""
        return all(_order(level)[0] == 1 for level in self.levels)


@dataclass(frozen=True)
class Level:
    """The numbers of the rows at one level of one factor, or of two."""

    factors: tuple[str, ...]
    levels: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over everything else that varies."""
        return mean_and_deviation(self.values)[0]

    @property
    def deviation(self) -> float | None:
        """Standard deviation over everything else that varies."""
        return mean_and_deviation(self.values)[1]


def settings(row: Row) -> dict[str, str]:
    """A row's configuration by dotted key, values as text, without what is no setting (seed, paths, display)."""
    config = {key: value for key, value in row["config"].items() if key not in NOT_IDENTITY}
    found = {key: _text(value) for key, value in flat(config) if key not in NOT_FACTORS and value != {}}
    return {MECHANICS: "+".join(row[MECHANICS] or ()) or "none", **found}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def varying(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The values of each key that is not the same in all rows; `ABSENT` where a row has no such key."""
    each = [settings(row) for row in rows]
    keys = dict.fromkeys(key for one in each for key in one)
    values = {key: [one.get(key, ABSENT) for one in each] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def factor(key: str, values: Sequence[str], same: Sequence[str] = ()) -> Factor:
    """A factor from the values of its key in each row."""
    levels = sorted(set(values), key=_order)
    return Factor(key, tuple(levels), tuple(levels.index(value) for value in values), tuple(same))


def _order(level: str) -> tuple[int, float, str]:
    """Absent first, then numbers by size, then words."""
    try:
        return (1, float(level), level)
    except ValueError:
        return (0 if level in (ABSENT, "none", "null") else 2, 0.0, level)


def find_factors(rows: Sequence[Row]) -> list[Factor]:
    """The factors of the rows; keys that divide the rows alike are one factor, named by the most telling key.

    That is the key as it was typed on the command line, else the mechanics, else the shortest key. The name of the
    experiment is none of them: it says nothing that its settings do not say.
    """
    typed = {override.split("=")[0].lstrip("+~") for row in rows for override in (row["changes"] or "").split()}

    def rank(key: str) -> tuple[bool, bool, int, str]:
        return (key not in typed, key != MECHANICS, len(key), key)

    alike: dict[Hashable, list[str]] = {}
    found = {key: values for key, values in varying(rows).items() if key != "name"}
    for key, values in found.items():
        numbers: dict[str, int] = {}
        alike.setdefault(tuple(numbers.setdefault(value, len(numbers)) for value in values), []).append(key)
    ranked = [sorted(keys, key=rank) for keys in alike.values()]
    return [factor(keys[0], found[keys[0]], keys[1:]) for keys in ranked]


def named_factors(rows: Sequence[Row], keys: Sequence[str]) -> list[Factor]:
    """The factors of these keys.

    Raises:
        ValueError: no row has the key, or all have the same value.
    """
    found = varying(rows)
    for key in keys:
        if key not in found:
            near = difflib.get_close_matches(key, found, n=3, cutoff=0.4)
            why = "is the same in all runs" if any(key in settings(row) for row in rows) else "is in no run"
            raise ValueError(f"factors={key}: {why}; these vary: {', '.join(near or list(found)[:8]) or 'none'}")
    return [factor(key, found[key]) for key in keys]


def numbers(rows: Sequence[Row], column: Column) -> tuple[list[Row], list[float]]:
    """The rows that know a number, and the numbers in the column's unit; unconverged estimates do not count.

    Raises:
        ValueError: none does.
    """
    pairs = [(row, value) for row in rows for value in [column.value(row)] if _is_number(value)]
    if not pairs:
        raise ValueError(f"metric={column.name}: no run has this number")
    return [row for row, _ in pairs], [column.factor * float(value) for _, value in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool | Unconverged)


def effect(one: Factor, values: Sequence[float]) -> list[Level]:
    """The main effect of a factor: its levels' numbers, over everything else that varies."""
    return [
        Level((one.key,), (level,), tuple(v for v, of in zip(values, one.of, strict=True) if of == position))
        for position, level in enumerate(one.levels)
    ]


def size(levels: Sequence[Level]) -> float:
    """Greatest less least mean of the levels of a factor."""
    means = [level.mean for level in levels]
    return max(means) - min(means)


def interaction(first: Factor, second: Factor, values: Sequence[float]) -> list[Level]:
    """The numbers of each pair of levels that a row has, second factor outermost."""
    cells: dict[tuple[int, int], list[float]] = {}
    for value, at in zip(values, zip(second.of, first.of, strict=True), strict=True):
        cells.setdefault(at, []).append(value)
    return [
        Level((first.key, second.key), (first.levels[x], second.levels[line]), tuple(cells[line, x]))
        for line, x in sorted(cells)
    ]


def balanced(one: Factor, factors: Sequence[Factor], rows: Sequence[Row]) -> bool:
    """Whether all levels of a factor have the same runs in everything else, seeds included, so that means compare.

    Args:
        one: the factor.
        factors: all that vary.
        rows: the runs.
    """
    others = [other for other in factors if other.key != one.key and one.key not in other.same]
    counts: Mapping[int, Counter[Hashable]] = {level: Counter() for level in range(len(one.levels))}
    for position, row in enumerate(rows):
        counts[one.of[position]][(row["seed"], *(other.of[position] for other in others))] += 1
    return len({frozenset(count.items()) for count in counts.values()}) == 1
