"""Runs as analysis sees them, wherever they were read: rows, one per deployment, and what is read only on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.runs.measurements import Measurement
from research.runs.records import Metric

Row = dict[str, Any]
"""One deployment of a finished run. `FIELDS` are in every row, None where the source does not know them."""

FIELDS = (
    "experiment", "hash", "seed", "path", "model", "data", "bits", "mechanics", "epochs", "steps", "seconds",
    "hardware", "changes", "table_from", "config", "metrics", "val_accuracy", "name", "float_accuracy", "accuracy",
    "deployed_accuracy", "size_kib", "compression", "bops",
)  # fmt: skip


class Run(ABC):
    """One finished run of a source."""

    measurements: list[Measurement]
    """What was measured on the run afterwards; none where the source keeps no measurements."""

    def __init__(self, fields: Mapping[str, Any], deployments: Sequence[Mapping[str, Any]]) -> None:
        """Make the rows.

        Args:
            fields: what the deployments share; ``config`` (plain containers) and ``metrics`` (last value of each
                metric by name) must be there.
            deployments: ``name`` and the numbers of each deployment.
        """
        shared = {**dict.fromkeys(FIELDS), "val_accuracy": fields["metrics"].get("val/accuracy"), **fields, "run": self}
        self.rows: list[Row] = [{**shared, **deployment} for deployment in deployments]

    @abstractmethod
    def history(self) -> list[Metric]:
        """Every logged number, in order."""

    @abstractmethod
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the run; empty where the source does not know them."""


def label(row: Row) -> str:
    """What to call a run in a message."""
    return f"{row['experiment']}/{row['hash']}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted key; lists and empty mappings are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
