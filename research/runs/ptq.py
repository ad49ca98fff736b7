"""The record of post-training quantization: ``ptq.json`` in the run folder, a row per deployment, range and width."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.runs.folder import RunFolder
from research.runs.records import write_json

SCHEMA = 1
KEY = ("name", "range", "bits")

Row = Mapping[str, Any]


def ptq_path(folder: RunFolder) -> Path:
    """Where the record is, if there is one."""
    return folder.path / "ptq.json"


def write_ptq(folder: RunFolder, rows: Sequence[Row]) -> None:
    """Add rows (``name``, ``range``, ``bits``, ``accuracy``, ``loss``) to the record; they replace their like in it."""
    merged = {tuple(row[key] for key in KEY): dict(row) for row in [*read_ptq(folder), *rows]}
    ordered = sorted(merged.values(), key=lambda row: (row["name"], row["range"], -row["bits"]))
    write_json(ptq_path(folder), {"schema": SCHEMA, "rows": ordered})


def read_ptq(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of a run, widest first within a deployment and range; none where there is no record.

    Raises:
        ValueError: a torn record, or one of another schema.
    """
    path = ptq_path(folder)
    if not path.is_file():
        return []
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupt: delete it and evaluate again with ptq=[...]") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of schema {SCHEMA}: delete it and evaluate again with ptq=[...]")
    rows: list[dict[str, Any]] = record["rows"]
    return rows
