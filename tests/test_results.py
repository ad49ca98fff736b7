"""What sealing a run draws on."""

from __future__ import annotations

import torch

from research.data import ImageDataModule
from research.results import statistics_batches


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
