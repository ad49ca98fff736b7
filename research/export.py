"""Export a finished run: ``python -m research.export run=DIR``, as integers and as ONNX, with the parity report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from research.cli import command
from research.deploy import load_artifact
from research.results import artifact_places, deploy, recorded_data, test_batches
from research.runs.folder import RunFolder
from research.runs.records import read_config, read_summary, write_json

log = logging.getLogger(__name__)


def export(folder: RunFolder, paths: dict[str, str], output: Path | None = None) -> list[dict[str, Any]]:
    """Write the artifact and ONNX graph of every deployment and compare the graph with the network on the test set.

    Args:
        folder: a finished run folder; its config may name nothing outside the allow-list.
        paths: where things lie on this machine.
        output: folder to write to; None for the run's own ``artifact/``.

    Returns:
        One row per deployment: sizes and the parity report, also written as ``parity.json`` beside the graph.
    """
    config, data = read_config(folder.config_path), recorded_data(folder, paths)
    places, batches = artifact_places(folder), test_batches(data)
    accuracies = {row["name"]: row["accuracy"] for row in read_summary(folder.summary_path)["deployments"]}
    rows = []
    for name, source in places.items():
        place = source if output is None else output / source.relative_to(folder.artifact)
        meta = {"run": f"{folder.experiment}/{folder.hash}", "accuracy": accuracies[name]}
        row = {"name": name, **deploy(load_artifact(source), config, place, data, batches, meta, onnx=True)}
        write_json(place / "parity.json", row)
        rows.append(row)
        log.info("%s: %s", name, place)
    return rows


@command("export")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    folder = RunFolder.existing(cfg.run)
    output = None if cfg.output is None else Path(cfg.output)
    for row in export(folder, {str(key): str(place) for key, place in cfg.paths.items()}, output):
        for key, value in row.items():
            log.info("%-24s %s", key, value)


if __name__ == "__main__":
    main()
