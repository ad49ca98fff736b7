"""What sealing a run draws on."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from research.data import ImageDataModule
from research.export import main as export
from research.learning.finalise import finalise, measure
from research.learning.module import QuantModule
from research.results import statistics_batches
from research.train import build
from research.train import main as train
from tests.test_bad_input import TINY, command, run_folder
from tests.test_config import composed


def make_data() -> ImageDataModule:
    return ImageDataModule(
        "synthetic",
        "nowhere",
        batch_size=16,
        eval_batch_size=32,
        mean=[0.5],
        std=[0.5],
        num_classes=4,
        in_channels=1,
        image_size=8,
        padding=2,
        flip=True,
    )


def test_statistics_come_from_augmented_training_batches() -> None:
    data = make_data()
    found = statistics_batches(data, 3)
    wanted = [images for images, _ in make_data().train_dataloader()][:3]
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    plain = torch.cat([images for images, _ in data.calibration_batches(3, 16)])
    assert not any(torch.equal(image, other) for image in found[0][:1] for other in plain)


def test_no_batches_for_none() -> None:
    assert statistics_batches(make_data(), 0) == []


def test_a_run_records_its_accuracy_before_and_after_the_reestimation(tmp_path: Path) -> None:
    changes = ["trainer.max_epochs=1", "finalise.batchnorm_batches=2", "deploy.onnx=false"]
    done = command(train, *TINY, *changes, f"paths.runs={tmp_path}")
    assert done.code == 0, done.err
    folder = run_folder(tmp_path)
    (row,) = json.loads((folder / "summary.json").read_text())["deployments"]
    data, _ = build(composed([*TINY, *changes]))
    module = QuantModule.load_from_checkpoint(folder / "checkpoints/last.ckpt")
    assert row["accuracy_before_batchnorm"] == measure_accuracy(module, data, 0)
    assert row["accuracy"] == measure_accuracy(module, data, 2)
    assert row["accuracy"] != row["accuracy_before_batchnorm"]


def measure_accuracy(module: QuantModule, data: ImageDataModule, batches: int) -> float:
    net = finalise(module, statistics_batches(data, batches))["final"]
    return measure(net, module.task, data.test_dataloader())["accuracy"]


def test_an_export_in_place_leaves_the_artifact_as_it_was(tmp_path: Path) -> None:
    done = command(train, *TINY, "trainer.max_epochs=1", "deploy.onnx=false", f"paths.runs={tmp_path}")
    assert done.code == 0, done.err
    artifact = run_folder(tmp_path) / "artifact"
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    done = command(export, f"run={artifact.parent}")
    assert done.code == 0, done.err
    after = {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert set(after) - set(before) == {"model.onnx", "parity.json"}
    assert {name: after[name] for name in before} == before
