"""Measurements of many runs as tables: one for each kind, with a line for each measurement and its single numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from analysis.cells import Cell, four_digits
from analysis.formats import Table
from analysis.rows import Row, flat, label

MOST_COLUMNS = 16


class Measured(NamedTuple):
    """The measurements of one kind; ``left_out`` are numbers that found no room."""

    kind: str
    titles: list[str]
    lines: list[list[str]]
    left_out: list[str]


def single_numbers(tree: Any, path: str = "", converged: bool = True) -> Iterator[tuple[str, str]]:
    """The numbers of nested mappings as text by dotted path; lists are curves or pictures, and left to figures.

    A mapping with a ``value`` is one number, with its ``standard_error`` if it has one; a number under a mapping that
    says ``converged: false`` is written ``~``.
    """
    if isinstance(tree, Mapping):
        converged = converged and tree.get("converged", True) is not False
        if "value" in tree:
            error = tree.get("standard_error")
            text = _written(tree["value"], converged) + (f" ± {error:.2g}" if isinstance(error, float) else "")
            yield path, text
            return
        for key, value in tree.items():
            yield from single_numbers(value, f"{path}.{key}" if path else str(key), converged)
    elif isinstance(tree, list) and tree and all(isinstance(item, Mapping) and "value" in item for item in tree):
        for number, item in enumerate(tree):
            yield from single_numbers(item, f"{path}.{number}", converged)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path, _written(tree, converged)


def _written(value: float, converged: bool) -> str:
    return f"{'' if converged else '~'}{float(value):{four_digits(float(value))}}"


def measured_tables(rows: Sequence[Row]) -> list[Measured]:
    """One table for each kind of measurement that the runs keep; none where nothing was measured."""
    kinds: dict[str, list[tuple[Row, Mapping[str, Any]]]] = {}
    for run in {id(row["run"]): row["run"] for row in rows}.values():
        for measurement in run.measurements:
            kinds.setdefault(measurement["kind"], []).append((run.rows[0], measurement))
    return [_table(kind, found) for kind, found in sorted(kinds.items())]


def measured_table(rows: Sequence[Row], kind: str) -> Table:
    """The measurements of one kind as a result table.

    Raises:
        ValueError: no run keeps one of this kind.
    """
    tables = {table.kind: table for table in measured_tables(rows)}
    if kind not in tables:
        raise ValueError(
            f"measured={kind}: the runs have no such measurements; use {' or '.join(tables) or 'columns='}"
        )
    found = tables[kind]
    marked = any(text.startswith("~") for line in found.lines for text in line)
    notes = ["~: an estimate that has not converged."] if marked else []
    notes += [f"Not shown: {', '.join(found.left_out)}."] if found.left_out else []
    return Table(found.titles, [[Cell(text) for text in line] for line in found.lines], notes)


def _table(kind: str, found: Sequence[tuple[Row, Mapping[str, Any]]]) -> Measured:
    """Settings that differ, then numbers."""
    settings = [{key: str(value) for key, value in flat(m["settings"])} for _, m in found]
    keys = dict.fromkeys(key for one in settings for key in one)
    telling = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    numbers = [dict(single_numbers(m["values"])) for _, m in found]
    names = list(dict.fromkeys(name for one in numbers for name in one))
    shown = names[:MOST_COLUMNS]
    lines = [
        [label(row), *(one.get(key, "–") for key in telling), *(values.get(name, "–") for name in shown)]
        for (row, _), one, values in zip(found, settings, numbers, strict=True)
    ]
    return Measured(kind, ["run", *telling, *shown], lines, names[MOST_COLUMNS:])
