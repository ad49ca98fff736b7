"""Run folders as rows: one per deployment, with the identity of its run."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import yaml

from research.runs.folder import RunFolder
from research.runs.ptq import read_ptq
from research.runs.records import read_config, read_metrics, read_summary

Row = dict[str, Any]


def collect(pattern: str) -> list[Row]:
    """Rows of all finished runs whose folder matches ``pattern``, ordered by folder.

    Args:
        pattern: glob over run folders, such as ``runs/*/*``.

    Returns:
        Per deployment: ``experiment``, ``hash``, ``seed``, ``path``, the summary's top-level fields, the deployment's
        own fields, ``val_accuracy`` (the last one logged, None without validation), the run's ``config``, ``changes``
        (what was overridden in the experiment, as typed) and, where the run was quantized after training, the
        accuracies ``ptq_<bits>`` (min-max range) and ``ptq_mse_<bits>``, 0 to 1.

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
        run = {
            **summary,
            "path": Path(path),
            "config": config,
            "changes": _changes(folder),
            "val_accuracy": _last(folder, "val/accuracy"),
        }
        rows += [{**run, **deployment, **_ptq(folder, deployment["name"])} for deployment in deployments]
    if not rows:
        raise ValueError(f"runs={pattern}: no finished run there; give a glob over run folders such as 'runs/*/*'")
    return rows


def _changes(folder: RunFolder) -> str:
    """The overrides of a run but for those that tell what it is anyway, or where it went."""
    known = ("experiment", "seed", "logger", "paths", "hydra")
    typed: list[str] = yaml.safe_load(folder.overrides_path.read_text()) or []
    return " ".join(override for override in typed if override.split("=")[0].split(".")[0].lstrip("+~") not in known)


def _ptq(folder: RunFolder, name: str) -> Row:
    """Accuracies of a deployment quantized after training, by column."""
    return {
        f"ptq_{row['bits']}" if row["range"] == "minmax" else f"ptq_{row['range']}_{row['bits']}": row["accuracy"]
        for row in read_ptq(folder)
        if row["name"] == name
    }


def _last(folder: RunFolder, name: str) -> float | None:
    """The last logged value of a metric."""
    values = [row.value for row in read_metrics(folder.metrics_path) if row.name == name]
    return values[-1] if values else None
