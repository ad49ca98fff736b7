"""What was measured on a finished run afterwards: one JSON file per kind, settings and measured weights.

``measurements/<kind>-<digest>.json`` in the run folder. The digest is over the settings and the weights, so that a
measurement is found again without a second computation, and never mistaken for one of other weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.runs.folder import RunFolder
from research.runs.records import write_json

SCHEMA = 1

Measurement = dict[str, Any]
"""``schema``, ``kind``, ``settings``, ``subject`` (SHA-256 of the weights) and ``values``."""


def measurement_path(folder: RunFolder, kind: str, settings: Mapping[str, Any], subject: str) -> Path:
    """Where the measurement of these settings on these weights is kept, measured or not."""
    canonical = json.dumps({"settings": settings, "subject": subject}, sort_keys=True, separators=(",", ":"))
    return folder.measurements / f"{kind}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}.json"


def measured(
    folder: RunFolder,
    kind: str,
    settings: Mapping[str, Any],
    weights: Path,
    measure: Callable[[], Mapping[str, Any]],
) -> Measurement:
    """The measurement from the run folder, or a new one that is then kept there.

    Args:
        folder: the run.
        kind: what is measured, a word such as ``curvature`` or ``landscape``.
        settings: everything that the values depend on besides the weights; JSON values only.
        weights: the file that holds what is measured; its content is part of the measurement's name.
        measure: makes the values (JSON, finite numbers); called only where there is no record.

    Raises:
        ValueError: a torn record or one of another schema, ``weights`` is missing, or a value is not finite.
    """
    if not weights.is_file():
        raise ValueError(f"run={folder.path}: {weights.name} is missing, so nothing can be measured; train again")
    subject = hashlib.sha256(weights.read_bytes()).hexdigest()
    path = measurement_path(folder, kind, settings, subject)
    if path.is_file():
        return _read(path)
    values = measure()
    record = {"schema": SCHEMA, "kind": kind, "settings": dict(settings), "subject": subject, "values": dict(values)}
    json.dumps(record, allow_nan=False)
    write_json(path, record)
    return record


def read_measurements(folder: RunFolder, kind: str) -> list[Measurement]:
    """All measurements of a kind, ordered by file name; none where nothing was measured.

    Raises:
        ValueError: a torn record or one of another schema.
    """
    return [_read(path) for path in sorted(folder.measurements.glob(f"{kind}-*.json"))]


def _read(path: Path) -> Measurement:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupt: delete it and measure again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no measurement of schema {SCHEMA}: delete it and measure again")
    return record
