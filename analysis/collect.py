"""Runs as one tidy table: ``python -m analysis.collect runs=GLOB output=runs.parquet|runs.csv [columns=NAME,NAME]``.

One line per deployment: what the run is, the deployment's numbers, the last value of every metric
(``metrics.val/loss``) and the configuration by dotted key (``config.optimizer.lr``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.cli import REQUIRED, script
from analysis.columns import MISSING, columns, split_names
from analysis.configurations import complete
from analysis.measured_values import Unconverged
from analysis.rows import Row, flat
from analysis.sources import read_runs
from research.runs.files import atomic_write_bytes, atomic_write_text

__all__ = ["Row", "collect"]

NESTED = ("config", "metrics")
LEFT_OUT = ("run", "schema")


def collect(pattern: str) -> list[Row]:
    """Rows of all finished runs of a source, ordered by folder.

    Args:
        pattern: glob over run folders, such as ``runs/*/*``, or another source, see ``analysis.sources.read_runs``.

    Returns:
        Per deployment: ``experiment``, ``hash``, ``seed``, ``path``, the summary's top-level fields, the deployment's
        own fields, the run's ``config`` (completed, see ``analysis.configurations.complete``), ``changes`` (what was
        overridden in the experiment, as typed), ``table_from`` (the file of ``quantizer.table=``, as typed),
        ``metrics`` (the last value of each), ``val_accuracy`` (None without validation), ``run`` (history, measurements
        and environment) and, where the run was quantized after training, the accuracies ``ptq_<bits>`` (min-max range)
        and ``ptq_mse_<bits>``, 0 to 1. What the source does not know is None.

    Raises:
        ValueError: no finished run matches.
    """
    rows = [row for run in read_runs(pattern) for row in run.rows]
    complete([row["config"] for row in rows])
    return rows


def tidy(rows: Sequence[Row], names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The table by column; None where a row has no value, lists as JSON.

    A column that holds numbers and text over the runs (``bits`` with and without a table) is text throughout.

    Args:
        rows: deployments as `collect` gives them.
        names: further columns, such as ``measurement:curvature.trace``.
    """
    chosen = columns(names, rows)
    lines = []
    for row in rows:
        own = {key: value for key, value in row.items() if key not in (*NESTED, *LEFT_OUT)}
        line = dict(flat(own)) | {key: value for name in NESTED for key, value in flat(row[name], f"{name}.")}
        lines.append(line | {column.name: _told(column.value(row)) for column in chosen})
    keys = dict.fromkeys(key for line in lines for key in line)
    ordered = sorted(keys, key=lambda key: key.startswith("config."))
    return {key: _alike([_plain(line.get(key)) for line in lines]) for key in ordered}


def _told(value: Any) -> Any:
    """A column's value; an estimate that has not converged is left out, as a number alone cannot say so."""
    return None if value is MISSING or isinstance(value, Unconverged) else value


def _plain(value: Any) -> Any:
    if isinstance(value, list | Mapping):
        return json.dumps(value)
    return str(value) if isinstance(value, Path) else value


def _alike(values: list[Any]) -> list[Any]:
    """Values of one type: bool, int, float or str."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1:
        return values
    make = float if kinds == {int, float} else str
    return [None if value is None else make(value) for value in values]


def write_tidy(table: Mapping[str, Sequence[Any]], output: Path) -> None:
    """Write the table as Parquet or CSV, by suffix.

    Raises:
        ValueError: another suffix, or Parquet without pyarrow.
    """
    if output.suffix == ".csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
        atomic_write_text(output, buffer.getvalue())
    elif output.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(
                f"output={output}: Parquet needs pyarrow: pip install 'flatbit[analysis]', or write a .csv"
            ) from error
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(dict(table)), sink)
        atomic_write_bytes(output, sink.getvalue().to_pybytes())
    else:
        raise ValueError(f"output={output}: use a file.parquet or file.csv")


def main(runs: str, output: str, columns: str | None) -> None:
    """Write the tidy table of all finished runs.

    Args:
        runs: run folders or another source, see ``analysis.sources``.
        output: ``.parquet`` or ``.csv`` file.
        columns: further columns, separated by commas, such as ``measurement:curvature.trace``.
    """
    rows = collect(runs)
    table = tidy(rows, split_names(columns))
    write_tidy(table, Path(output))
    print(f"wrote {output}: {len(rows)} rows, {len(table)} columns")


if __name__ == "__main__":
    script(main, {"runs": REQUIRED, "output": REQUIRED, "columns": None})
