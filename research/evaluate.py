"""Test a finished run again: ``python -m research.evaluate run=DIR``, from its artifacts alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from research.cli import command
from research.deploy import load_artifact, parity_report
from research.learning.finalise import measure
from research.quant.ptq import quantized_copy
from research.results import artifact_places, recorded_data, test_batches
from research.runs.folder import RunFolder
from research.runs.ptq import write_ptq
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
    data = recorded_data(folder, paths)
    task = resolve_target(read_config(folder.config_path)["task"], key="task")
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


def evaluate_ptq(
    folder: RunFolder, paths: dict[str, str], widths: Sequence[int], init: str = "minmax"
) -> list[dict[str, Any]]:
    """Measure every deployment of a finished float run with its weights quantized after training.

    Args:
        folder: the run folder; its config may name nothing outside the allow-list.
        paths: where things lie on this machine.
        widths: bits of the weights.
        init: how the range is set, see `research.quant.ptq`.

    Returns:
        One row per deployment and width: ``name``, ``range``, ``bits``, ``accuracy``, ``loss``.

    Raises:
        ValueError: the run is not finished or has quantizers, or widths or range are not offered.
    """
    data = recorded_data(folder, paths)
    task = resolve_target(read_config(folder.config_path)["task"], key="task")
    nets = {name: load_artifact(place) for name, place in artifact_places(folder).items()}
    variants = {(name, bits): quantized_copy(net, bits, init) for name, net in nets.items() for bits in widths}
    batches = test_batches(data)
    return [
        {"name": name, "range": init, "bits": bits, **measure(net, task, batches)}
        for (name, bits), net in variants.items()
    ]


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    folder = RunFolder.existing(cfg.run)
    paths = {str(key): str(place) for key, place in cfg.paths.items()}
    widths = OmegaConf.to_container(cfg.ptq) if OmegaConf.is_list(cfg.ptq) else cfg.ptq
    if not isinstance(widths, list):
        raise ValueError(f"ptq={widths}: use a list of widths, such as ptq=[8,7,6,5,4,3], or []")
    if widths:
        rows = evaluate_ptq(folder, paths, widths, cfg.ptq_range)
        write_ptq(folder, rows)
        log.info("%-16s %-8s %4s  %8s  %8s", "deployment", "range", "bits", "accuracy", "loss")
        for row in rows:
            log.info(
                "%-16s %-8s %4d  %8.4f  %8.4f", *(row[key] for key in ("name", "range", "bits", "accuracy", "loss"))
            )
    for row in evaluate(folder, paths, cfg.onnx):
        for key, value in row.items():
            log.info("%-24s %s", key, value)


if __name__ == "__main__":
    main()
