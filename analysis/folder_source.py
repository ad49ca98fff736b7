"""Run folders as a source of analysis: the one that knows everything."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.configurations import read_yaml
from analysis.rows import Run
from research.runs.folder import RunFolder
from research.runs.measurements import Measurement, read_measurements
from research.runs.ptq import read_ptq
from research.runs.records import Metric, read_metrics, read_summary

TOLD_ELSEWHERE = ("experiment", "name", "seed", "logger", "paths", "hydra")
"""Overrides that tell what a run is anyway, or where it went."""

TABLE = "quantizer.table="
"""What an override that names a table of widths begins with."""


class FolderRun(Run):
    """A finished run folder."""

    def __init__(self, path: Path) -> None:
        """Read summary, configuration, overrides, last metrics and post-training accuracies.

        Args:
            path: the folder; it must hold ``summary.json``.

        Raises:
            ValueError: a torn or foreign record.
        """
        summary = read_summary(path / "summary.json")
        self.folder = RunFolder(path.absolute(), summary["experiment"], summary["hash"])
        after = read_ptq(self.folder)
        typed: list[str] = read_yaml(self.folder.overrides_path) or []
        deployments = [
            {**row, **{_ptq_column(r): r["accuracy"] for r in after if r["name"] == row["name"]}}
            for row in summary.pop("deployments")
        ]
        fields = {
            "path": path,
            "config": read_yaml(self.folder.config_path),
            "changes": _changes(typed),
            "table_from": _table(typed),
            "metrics": last_values(self.folder.metrics_path),
        }
        super().__init__({**summary, **fields}, deployments)

    def history(self) -> list[Metric]:
        """``metrics.csv``."""
        return read_metrics(self.folder.metrics_path)

    @cached_property
    def measurements(self) -> list[Measurement]:  # type: ignore[override]
        """Everything in ``measurements/``."""
        return read_measurements(self.folder, "*")

    def environment(self) -> dict[str, Any]:
        """``environment.json``."""
        environment: dict[str, Any] = json.loads(self.folder.environment_path.read_text())
        return environment


def last_values(path: Path) -> dict[str, float]:
    """The last logged value of each metric in a ``metrics.csv``; a line that a kill tore does not count."""
    with path.open(newline="") as file:
        last = {row[2]: row[3] for row in csv.reader(line for line in file if line.endswith("\n")) if len(row) == 4}
    last.pop("name", None)
    return {name: float(value) for name, value in last.items()}


def _changes(typed: Sequence[str]) -> str:
    return " ".join(o for o in typed if o.split("=")[0].split(".")[0].lstrip("+~") not in TOLD_ELSEWHERE)


def _table(typed: Sequence[str]) -> str | None:
    files = [override.removeprefix(TABLE).strip("'\"") for override in typed if override.startswith(TABLE)]
    return files[-1] if files else None


def _ptq_column(row: dict[str, Any]) -> str:
    """``ptq_<bits>`` for the min-max range, ``ptq_<range>_<bits>`` for others."""
    return f"ptq_{row['bits']}" if row["range"] == "minmax" else f"ptq_{row['range']}_{row['bits']}"
