"""Run folders as rows: one per deployment, with the identity of its run."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from research.runs.folder import RunFolder
from research.runs.records import read_config, read_metrics, read_summary

Row = dict[str, Any]


def collect(pattern: str) -> list[Row]:
    """Rows of all finished runs whose folder matches ``pattern``, ordered by folder.

    Args:
        pattern: glob over run folders, such as ``runs/*/*``.

    Returns:
        Per deployment: ``experiment``, ``hash``, ``seed``, ``path``, the summary's top-level fields, the deployment's
        own fields, ``val_accuracy`` (the last one logged, None without validation) and the run's ``config``.

    Raises:
        ValueError: no finished run matches.
    """
    rows: list[Row] = []
    for path in sorted(glob.glob(pattern)):
        if not (Path(path) / "summary.json").is_file():
            continue
        folder = RunFolder.existing(path)
        summary = read_summary(folder.summary_path)
        deployments = summary.pop("deployments")
        config = read_config(folder.config_path)
        run = {**summary, "path": Path(path), "config": config, "val_accuracy": _last(folder, "val/accuracy")}
        rows += [{**run, **deployment} for deployment in deployments]
    if not rows:
        raise ValueError(f"runs={pattern}: no finished run there; give a glob over run folders such as 'runs/*/*'")
    return rows


def _last(folder: RunFolder, name: str) -> float | None:
    """The last logged value of a metric."""
    values = [row.value for row in read_metrics(folder.metrics_path) if row.name == name]
    return values[-1] if values else None
