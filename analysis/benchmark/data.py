"""Images a second: our loader beside a DataLoader that transforms one sample at a time, crop and flip in both."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from analysis.benchmark.interleaved import interleaved
from research.data.augment import Augmentation
from research.data.images import ImageSet
from research.data.loader import ImageLoader

MEAN, STD, PADDING = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 4


class PerSample(Dataset[tuple[Tensor, int]]):
    """uint8 images (N, H, W, C), cropped, flipped and normalised one at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = torch.nn.functional.pad(images.permute(0, 3, 1, 2), (PADDING,) * 4)
        self.labels = labels
        self.side = images.shape[1]
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left = (int(place) for place in torch.randint(2 * PADDING + 1, (2,)))
        image = self.images[index, :, top : top + self.side, left : left + self.side]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image.float() / 255 - self.mean) / self.std, int(self.labels[index])


def consume(loader: Any) -> None:
    """Take every batch."""
    for _ in loader:
        pass


def measure(rounds: int, batch_size: int, images: int, device: str) -> dict[str, Any]:
    """By loader: ``images_per_second`` (median) and ``ratio`` to the per-sample loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (images,), generator=generator)
    ours = ImageLoader(
        ImageSet(pixels, labels),
        batch_size,
        shuffle=True,
        augment=Augmentation(padding=PADDING, flip=True),
        mean=MEAN,
        std=STD,
        device=device,
    )
    loaders = {
        "per-sample DataLoader": DataLoader(PerSample(pixels, labels), batch_size, shuffle=True),
        "flatbit": ours,
    }
    seconds = interleaved({name: lambda loader=loader: consume(loader) for name, loader in loaders.items()}, rounds, 1)  # type: ignore[misc]
    speed = {name: images / median(values) for name, values in seconds.items()}
    base = next(iter(speed.values()))
    return {name: {"images_per_second": value, "ratio": value / base} for name, value in speed.items()}
