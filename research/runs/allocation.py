"""``allocation.yaml``: a bit allocation in the form of a recipe's table, which ``quantizer.table=FILE`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from research.quant.allocation import Allocation
from research.quant.recipe import Table, table_from_plain, table_to_plain
from research.runs.files import atomic_write_text
from research.runs.records import read_config

ALLOCATION = "allocation.yaml"
"""Name of the file in the folder of a run that searched for widths."""


def write_allocation(path: Path, allocation: Allocation, base: Table) -> None:
    """Write an allocation, atomically.

    Args:
        path: the file.
        allocation: the widths.
        base: resolved recipe table of the same network: which quantizer each slot has at these widths.

    Raises:
        ValueError: the two do not fit, or the folder cannot be written.
    """
    write_table(path, allocation.table(base))


class _Line(dict[str, Any]):
    """A mapping that is written on one line."""


class _TableDumper(yaml.SafeDumper):
    pass


_TableDumper.add_representer(
    _Line, lambda dumper, line: dumper.represent_mapping("tag:yaml.org,2002:map", line, flow_style=True)
)


def write_table(path: Path, table: Table) -> None:
    """Write a resolved recipe table, a line for each quantizer, atomically."""
    lines = {
        name: {slot: None if settings is None else _Line(settings) for slot, settings in slots.items()}
        for name, slots in table_to_plain(table).items()
    }
    atomic_write_text(path, yaml.dump(lines, Dumper=_TableDumper, sort_keys=False, allow_unicode=True, width=200))


def read_allocation(path: Path) -> Allocation:
    """The widths in an ``allocation.yaml`` or in a run's ``table.yaml``.

    Raises:
        ValueError: no such file, or no table in it.
    """
    return Allocation.from_table(read_table(path))


def read_table(path: Path) -> Table:
    """A resolved recipe table.

    Raises:
        ValueError: no such file, or no table in it.
    """
    if not path.is_file():
        raise ValueError(f"allocation={path}: no such file; use the allocation.yaml or table.yaml of a run")
    return table_from_plain(read_config(path), f"allocation={path}: ")
