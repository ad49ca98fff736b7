"""Test a finished run again: ``python -m research.evaluate run=DIR``, from its artifacts alone."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig

from research.cli import command
from research.config import build_data
from research.deploy import load_artifact, parity_report
from research.learning.finalise import measure
from research.results import artifact_places, test_batches
from research.runs.folder import RunFolder
from research.runs.records import read_config, read_summary
from research.targets import resolve_target

log = logging.getLogger(__name__)


def evaluate(folder: RunFolder, paths: dict[str, str], onnx: bool = False) -> list[dict[str, Any]]:
    """Measure every deployment of a finished run on the test set.

    Args:
        folder: the run folder; its config may name nothing outside the allow-list.
        paths: where things lie on this machine.
        onnx: run the exported ONNX graph as well.

    Returns:
        One row per deployment: ``name``, ``accuracy``, ``loss``, ``recorded_accuracy`` of the summary, and with
        ``onnx`` the parity report.
    """
    config = {**read_config(folder.config_path), "paths": paths}
    data = build_data(config, trusted=False)
    task = resolve_target(config["task"], key="task")
    places = artifact_places(folder)
    recorded = {row["name"]: row["accuracy"] for row in read_summary(folder.summary_path)["deployments"]}
    batches = test_batches(data)
    rows = []
    for name, place in places.items():
        net = load_artifact(place)
        row = {"name": name, **measure(net, task, batches), "recorded_accuracy": recorded[name]}
        if onnx:
            row |= parity_report(net, place / "model.onnx", batches)
        rows.append(row)
    return rows


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    folder = RunFolder.existing(cfg.run)
    for row in evaluate(folder, {str(key): str(place) for key, place in cfg.paths.items()}, cfg.onnx):
        for key, value in row.items():
            log.info("%-24s %s", key, value)


if __name__ == "__main__":
    main()
