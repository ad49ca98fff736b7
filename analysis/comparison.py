"""Comparisons in a result table: the best mean of each block, Welch's test, and differences from a baseline or from
the line that several baselines make over a cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from analysis.cells import Cell, cell
from analysis.columns import FOUR_DIGITS, Column, columns, split_names
from analysis.rows import Row
from analysis.significance import welch

WITHIN = "model,data,bits,epochs"
"""Runs are compared with each other where these columns agree: one task, one size, one budget."""

Group = Sequence[Row]


def blocks(groups: Sequence[Group], within: str) -> list[tuple[str, list[int]]]:
    """The groups that may be compared: the values they share, and their positions.

    Args:
        groups: runs that differ by the seed only.
        within: column names, separated by commas.
    """
    shared = columns(split_names(within), [row for group in groups for row in group])
    found: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        found.setdefault(", ".join(cell(group, column).written()[0] for column in shared), []).append(position)
    return list(found.items())


def mark_best(cells: Sequence[Cell], smallest: bool) -> list[Cell]:
    """The cells of one column and block with the best mean marked, as written, so that equal numbers share the mark."""
    written = [None if c.mean is None or not c.converged else float(c.written()[0]) for c in cells]
    known = [value for value in written if value is not None]
    if len(known) < 2:
        return list(cells)
    target = min(known) if smallest else max(known)
    return [replace(c, best=value == target) for c, value in zip(cells, written, strict=True)]


def mark_significance(cells: Sequence[Cell], baseline: int) -> list[Cell]:
    """The cells of one column and block with Welch's p-value against the cell at ``baseline``."""
    reference = cells[baseline]
    return [
        c if c is reference or not c.values or not reference.values
        else replace(c, p=welch(c.values, reference.values), above=c.mean > reference.mean)  # type: ignore[operator]
        for c in cells
    ]  # fmt: skip


def difference(column: Column, reference: Group = ()) -> Column:
    """The column of a number less that of the baseline's run with the same seed; None where there is no such run.

    Args:
        column: of the number.
        reference: the baseline's runs.
    """
    values = {row["seed"]: column.value(row) for row in reference}

    def less(row: Row) -> float | None:
        number, other = column.value(row), values.get(row["seed"])
        return number - other if _numbers(number, other) else None

    return Column(f"{column.name} difference", f"Δ {column.title}", less, _signed(column), column.factor)


def along(column: Column, cost: Column, line: Sequence[Group] = ()) -> Column:
    """The column of a number less that of the baselines at the same cost, by linear interpolation between those runs
    of the same seed; None beyond their costs, and where no run has the seed.

    Args:
        column: of the number.
        cost: of the cost.
        line: the baselines' runs.

    Raises:
        ValueError: two runs of the line have the same seed and cost.
    """
    points: dict[int, dict[float, float]] = {}
    for row in (row for group in line for row in group):
        here, number = cost.value(row), column.value(row)
        if not _numbers(here, number):
            continue
        if here in points.setdefault(row["seed"], {}):
            raise ValueError(
                f"at_equal={cost.name}: two baselines of seed {row['seed']} cost {here * cost.factor:g} {cost.title}; "
                "say more in baseline=, or add to within= or where= what they differ in"
            )
        points[row["seed"]][here] = number

    def less(row: Row) -> float | None:
        costs, values = zip(*sorted(points.get(row["seed"], {np.inf: np.inf}).items()), strict=True)
        here, number = cost.value(row), column.value(row)
        if not _numbers(here, number) or not costs[0] <= here <= costs[-1]:
            return None
        return float(number - np.interp(here, costs, values))

    title = f"Δ {column.title} at equal {cost.title}"
    return Column(f"{column.name} difference at {cost.name}", title, less, _signed(column), column.factor)


def _numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _signed(column: Column) -> str:
    return f"+{column.number}" if column.number and column.number != FOUR_DIGITS else FOUR_DIGITS


def differences(column: Column, costs: Sequence[Column], references: Sequence[Group] = ()) -> list[Column]:
    """The columns that follow a number: its difference from the baseline, or from their line over each cost."""
    if costs:
        return [along(column, cost, references) for cost in costs]
    return [difference(column, references[0] if references else ())]


def baselines_of(groups: Sequence[Group], baseline: str, block: str, within: str, several: bool) -> list[int]:
    """Positions of the baselines among the groups of a block; empty where the block has none.

    Args:
        groups: the groups of the block.
        baseline: a method or experiment, or ``column=value`` pairs separated by commas.
        block: what the block shares, for the message.
        within: what makes blocks, for the message.
        several: whether there may be more than one.

    Raises:
        ValueError: several groups of the block fit, and only one may.
    """
    fitting = [position for position, group in enumerate(groups) if fits(group, baseline)]
    if len(fitting) > 1 and not several:
        raise ValueError(
            f"baseline={baseline}: {len(fitting)} rows fit among {block}; say more, such as "
            f"baseline='method=lsq,optimizer.lr=0.01', or add to within={within} what they differ in"
        )
    return fitting


def fits(group: Group, wanted: str) -> bool:
    """Whether a group has a method or experiment, or the values of ``column=value`` pairs separated by commas.

    A value is what the table shows, or of a key of the configuration what an override would say: ``2e-2`` is 0.02.
    """
    if "=" not in wanted:
        return wanted in {_written(group, column) for column in columns(("method", "experiment"), group)}
    pairs = [pair.partition("=") for pair in split_names(wanted)]
    return all(_has(group, _column(name, group), value) for name, _, value in pairs)


def _written(group: Group, column: Column) -> str:
    return cell(group, column).written()[0]


def _has(group: Group, column: Column, value: str) -> bool:
    if _written(group, column) == value:
        return True
    meant = _override_value(value)
    found = [column.value(row) for row in group] if column.number is None else []
    return bool(found) and all(one == meant and isinstance(one, bool) == isinstance(meant, bool) for one in found)


def _override_value(text: str) -> Any:
    """What ``text`` means on the right of an override: a number, true or false, null, a list, or itself."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _column(name: str, group: Group) -> Column:
    """A column that the other groups may know and this one does not."""
    try:
        return columns((name,), group)[0]
    except ValueError:
        return Column(name, name, lambda row: None)
