"""Columns by name: what a table, an ablation or a tidy file can show of a run.

A name is, in this order, a standard column (``accuracy``), a measurement (``measurement:curvature.trace``), a metric
(``val/loss``, any name of ``metrics.csv``, last value), a field of the run or of its deployment (``macs``, ``ptq_4``),
or a key of the configuration (``optimizer.lr``).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.measured_values import Selector
from analysis.rows import Row, flat

FOUR_DIGITS = "4"
"""A number's format: four significant digits of the mean, and as many decimals of the deviation."""

IN_RUN_FOLDERS = ("allocation", "table")
"""Names, without suffix, of the tables in the folder of a run, which do not say whose they are."""

MISSING = object()
"""A row does not know the column at all, which is something else than None."""


@dataclass(frozen=True)
class Column:
    """One column: how it is headed, where a row's value comes from and how a number is written."""

    name: str
    title: str
    value: Callable[[Row], Any]
    number: str | None = None
    """Format of a number, such as ``.2f``, or `FOUR_DIGITS`; None writes values as text."""
    factor: float = 1.0
    setting: bool = False
    """Chosen before training, so that equal values are written without a deviation."""


def weight_quantizer(config: Mapping[str, Any]) -> str:
    """The name of the quantizer that most weights have, ``float`` for none."""
    quantizer = config.get("quantizer") or {}
    slots = [layer.get("weight") for layer in (quantizer.get("table") or {}).values()] or [quantizer.get("weight")]
    names = Counter("float" if slot is None or slot.get("bits") == 32 else slot.get("name", "float") for slot in slots)
    return names.most_common(1)[0][0]


def method(row: Row) -> str:
    """The weight quantizer's name and the mechanics, such as ``lsq+sam``."""
    return "+".join([weight_quantizer(row["config"]), *(row["mechanics"] or ())])


def _searches(row: Row) -> list[str]:
    """The mechanics with a budget, which choose widths within it."""
    return [name for name, callback in (row["config"].get("callbacks") or {}).items() if callback.get("budget")]


def widths_from(row: Row) -> str | None:
    """What chose the widths: the mechanics that searched, the table's file or the experiment whose run holds it, or
    ``recipe``; None of a float network, and of a table where the source knows no overrides."""
    config = row["config"]
    if (config.get("quantizer") or {}).get("table"):
        path = Path(row["table_from"] or "")
        return (path.parent.parent.name if path.stem in IN_RUN_FOLDERS else path.stem) or row["table_from"]
    return "+".join(_searches(row)) or (None if weight_quantizer(config) == "float" else "recipe")


def widths(row: Row) -> tuple[int, int] | None:
    """Bits of weights and inputs as the recipe states them, 32 for float; None where a table or a search chose them."""
    quantizer = row["config"].get("quantizer") or {}
    if quantizer.get("table") or _searches(row):
        return None
    weight, inputs = ((quantizer.get(slot) or {}).get("bits", 32) for slot in ("weight", "input"))
    return weight, inputs


def bits(row: Row) -> str:
    """Weight and input bits, such as ``4/4``; ``table`` or ``searched`` where these chose them."""
    stated = widths(row)
    if stated is not None:
        return f"{stated[0]}/{stated[1]}"
    return "table" if (row["config"].get("quantizer") or {}).get("table") else "searched"


def _experiment(row: Row) -> str:
    return str(row["experiment"]) + ("" if row["name"] == "final" else f" ({row['name']})")


def _field(key: str) -> Callable[[Row], Any]:
    return lambda row: row.get(key, MISSING)


def _percent(name: str, title: str, key: str | None = None) -> Column:
    return Column(name, title, _field(key or name), ".2f", 100.0)


STANDARD = {
    column.name: column
    for column in (
        Column("experiment", "experiment", _experiment),
        Column("method", "method", method),
        Column("bits", "bits", bits),
        Column("seeds", "seeds", _field("seed")),
        Column("epochs", "epochs", _field("epochs")),
        _percent("val_accuracy", "val %"),
        _percent("float_accuracy", "float %"),
        _percent("accuracy", "quantized %"),
        _percent("deployed_accuracy", "deployed %"),
        Column("size_kib", "size KiB", _field("size_kib"), ".1f", setting=True),
        Column("compression", "compression", _field("compression"), ".2f", setting=True),
        Column("gbops", "GBOPs", _field("bops"), ".3f", 1e-9, setting=True),
        Column("hardware", "hardware", _field("hardware")),
        Column("minutes", "minutes", _field("seconds"), ".1f", 1 / 60),
    )
}
"""The columns of a table that names none."""


def _gain(row: Row) -> float | None:
    found, start = row.get("accuracy"), row.get("float_accuracy")
    return None if found is None or start is None else found - start


FURTHER = {
    column.name: column
    for column in (
        Column("changes", "changes", lambda row: f"`{row['changes']}`" if row["changes"] else None),
        Column("gain", "quantized - float %", _gain, ".2f", 100.0),
        Column("widths_from", "widths from", widths_from),
    )
}
"""Columns that are shown where a table names them: the overrides, what is gained on the float network of the start, who
chose the widths."""


def split_names(text: str | None) -> list[str]:
    """Column names of a comma-separated list; commas inside brackets belong to the name."""
    return [name for name in re.split(r",(?![^\[]*\])", text or "") if name]


def columns(names: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    """The columns of these names.

    Args:
        names: see the module.
        rows: the rows they are for; one of them at least must know the column.

    Raises:
        ValueError: no row knows a name; the message has the nearest ones.
    """
    return [_column(name, rows) for name in names]


def _column(name: str, rows: Sequence[Row]) -> Column:
    known = STANDARD.get(name) or FURTHER.get(name)
    if known is not None:
        floats = name == "accuracy" and all(weight_quantizer(row["config"]) == "float" for row in rows)
        return replace(known, title="accuracy %") if floats else known
    if name.startswith(Selector.PREFIX):
        selector = Selector.parse(name)
        column = Column(name, name.removeprefix(Selector.PREFIX), lambda row: selector.value(row, MISSING), FOUR_DIGITS)
    else:
        column = _plain(name, rows)
    if all(column.value(row) is MISSING for row in rows):
        raise ValueError(f"columns={name}: no run knows it{_nearest(name, rows)}")
    return column


def _plain(name: str, rows: Sequence[Row]) -> Column:
    """A metric, field or configuration key; fields and metrics are measured numbers, configuration is text."""
    fraction = name.rpartition("/")[2].endswith("accuracy") or name.startswith("ptq_") or "accuracy_" in name
    title, form, factor = (f"{name} %", ".2f", 100.0) if fraction else (name, FOUR_DIGITS, 1.0)
    if any(name in row["metrics"] for row in rows):
        return Column(name, title, lambda row: row["metrics"].get(name, MISSING), form, factor)
    if any(name in row and not isinstance(row[name], Mapping) for row in rows):
        return Column(name, title, _field(name), form, factor)
    return Column(name, name, lambda row: at(row["config"], name))


def at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a configuration, `MISSING` where there is none."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _nearest(name: str, rows: Sequence[Row]) -> str:
    """The known names that look like an unknown one, for a message."""
    names = {*STANDARD, *FURTHER}
    for row in rows[:50]:
        names |= {*row["metrics"], *(key for key, _ in flat(row["config"]))} | {key for key in row if key != "run"}
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
