"""``allocation.yaml``: a bit allocation in the form of a recipe's table, which ``quantizer.table=FILE`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from research.quant.allocation import SLOTS, Allocation
from research.quant.recipe import SLOT_KEYS, Table, make_spec, table_to_plain
from research.runs.records import read_config, write_config

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
    write_config(path, table_to_plain(allocation.table(base)))


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
    plain = read_config(path)
    for name, slots in plain.items():
        if not isinstance(slots, Mapping) or not all(slot in slots for slot in SLOTS):
            raise ValueError(f"allocation={path}: {name} has not the keys {', '.join(SLOTS)}; use a resolved table")
    return {
        str(name): {slot: make_spec(slots.get(slot), f"{name}.{slot}") for slot in SLOT_KEYS}
        for name, slots in plain.items()
    }
