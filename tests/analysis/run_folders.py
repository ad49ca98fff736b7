"""Finished run folders of a small sweep, made by the real record writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from research.runs.folder import RunFolder
from research.runs.measurements import measured
from research.runs.records import MetricsRecord, write_config, write_json, write_summary

CONFIG: dict[str, Any] = {
    "name": "sweep", "seed": 0, "data": {"_target_": "research.data.ImageDataModule", "name": "embedded", "seed": 0},
    "model": {"_target_": "research.models.resnet8", "num_classes": 10},
    "quantizer": {"bits": 4, "weight": {"name": "lsq", "bits": 4}, "input": {"name": "lsq", "bits": 4}, "rules": []},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, "callbacks": {},
    "trainer": {"max_epochs": 3, "enable_progress_bar": True},
}  # fmt: skip
DEPLOYMENT = {
    "name": "final", "float_accuracy": 0.9, "loss": 0.5, "deployed_accuracy": 0.8, "size_kib": 66.3,
    "compression": 15.8, "macs": 1000, "bops": 0.19e9, "parity": {"count": 8},
}  # fmt: skip


def write_run(
    root: Path,
    accuracy: float,
    seed: int = 0,
    lr: float = 0.1,
    callbacks: Mapping[str, Any] | None = None,
    typed: Sequence[str] = (),
    name: str = "sweep",
) -> RunFolder:
    """A finished run of three epochs."""
    config = deepcopy(CONFIG) | {"name": name, "seed": seed, "callbacks": dict(callbacks or {})}
    config["data"]["seed"], config["optimizer"]["lr"] = seed, lr
    folder = RunFolder.of(root, name, config)
    write_config(folder.config_path, config)
    write_config(folder.overrides_path, [*typed, f"seed={seed}"])
    write_config(folder.table_path, {"conv1": None})
    write_json(folder.environment_path, {"time": f"at {seed}", "python": "3.11.7", "packages": {"torch": "2.13.0"}})
    record = MetricsRecord(folder.metrics_path)
    for epoch in range(3):
        record.append(10 * epoch + 4, epoch, {"train/step/loss": 1.0 / (epoch + 1)})
        record.append(10 * epoch + 9, epoch, {"val/accuracy": accuracy - 0.1 + 0.05 * epoch, "val/loss": 2.0 - epoch})
    record.close()
    extra = {
        "model": "resnet8", "data": "embedded", "bits": 4, "mechanics": sorted(config["callbacks"]), "epochs": 3,
        "steps": 30, "seconds": 60.0, "hardware": "a CPU",
    }  # fmt: skip
    write_summary(folder, seed, [{**DEPLOYMENT, "accuracy": accuracy}], extra)
    return folder


def sweep_of_two(root: Path) -> None:
    """LSQ and LSQ with SAM at two learning rates, three seeds; SAM is better at the first rate only."""
    for seed in range(3):
        for lr, gain in ((0.1, 0.05), (0.2, 0.0)):
            write_run(root, 0.80 + 0.01 * seed, seed=seed, lr=lr)
            write_run(root, 0.80 + 0.01 * seed + gain, seed=seed, lr=lr, callbacks={"sam": {"rho": 0.1}})


def keep_measurement(folder: RunFolder, kind: str, settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """A measurement of the run, kept as analysis keeps it."""
    folder.final.write_bytes(b"weights")
    measured(folder, kind, settings, folder.final, lambda: values)
